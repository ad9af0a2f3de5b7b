"""Executes a rank's network on a GPU, for every GPU backend. Needs numpy, mpi4py, cuda-bindings and our kernels.

Weights, caches and buffers are allocated when the session begins. Decode steps are CUDA graphs, one for each batch
size: the network, the choice of a token over all ranks, and the input of the next step. The host reads a step's tokens
while the next step runs.
"""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from enum import IntEnum
from typing import Any

import numpy as np

from cqil_trt.config import DTYPE_BYTES
from cqil_trt.engine import Engine, tensor_spans
from cqil_trt.errors import UserError
from cqil_trt.gpu import abi, cuda
from cqil_trt.gpu.fused_ops import attention_fields
from cqil_trt.gpu.workspace import Workspace, guard
from cqil_trt.network.rotary import rotary_tables
from cqil_trt.sampling import SamplingConfig
from cqil_trt.session import Session

_STAGING_BYTES = 64 << 20
# Steps in one graph, when that many are left: the GPU pauses between two graphs. After the last token that is wanted,
# up to this many more may be computed for nothing.
_STEPS = 4
# Rows of page-locked memory for tokens that the host has not read yet.
_SLOTS = 2 * _STEPS


def _portions(steps: int) -> list[int]:
    """The steps of each graph that is launched, to make `steps` in all."""
    return [_STEPS] * (steps // _STEPS) + [1] * (steps % _STEPS)


class Phase(IntEnum):
    PREFILL = 0
    DECODE = 1


# The buffers that a pass reads and writes, by the names of the decoder's inputs and outputs.
BUFFERS: dict[Phase, dict[str, str]] = {
    Phase.PREFILL: {"past": "prefill.past"},
    # The decode step runs on what it wrote itself.
    Phase.DECODE: {"tokens": "next", "select": "each", "logits": "prediction"},
}


class CudaSession(Session):
    """One rank on the current GPU. Raises UserError for too little memory, or GPUs that cannot reach each other.

    Subclasses find out what they execute, then call `_load`, after which `_memory` has the address of every buffer and
    weight.
    """

    def __init__(self, engine: Engine, comm: Any, library: Any):
        rank = 0 if comm is None else comm.Get_rank()
        super().__init__(engine, rank)
        self._comm, self._library = comm, library
        self._stream = cuda.call("StreamCreate")
        self._workspace = None if comm is None else Workspace(comm)
        self._bytes, self._dtype_code = DTYPE_BYTES[engine.limits.dtype], abi.dtype_code(engine.limits.dtype)
        self._memory: dict[str, int] = {}
        self._batch = 0
        self._rows = 0  # tokens of the last pass
        self._selected: tuple[int, ...] = (0, 0)
        self._common_past = 0  # tokens that every sequence had before the last prefill pass
        self._on_device: np.ndarray | None = None  # what the decode step's token input holds
        self._chosen = False  # whether `best` belongs to the current prediction
        self._advances = 0  # how often `next` was filled by a choice, as the counter `step` on the GPU
        # By batch size, steps, and whether tokens are sampled.
        self._graphs: dict[tuple[int, int, bool], cuda.Graph] = {}
        self._arenas: list[cuda.Arena] = []

    @abstractmethod
    def _execute(self, phase: Phase, batch: int, length: int, rows: int) -> None:
        """Enqueues the network: `length` tokens of `batch` sequences, predicting from `rows` of them."""

    # Memory

    def _arena(self, size: int, what: str) -> cuda.Arena:
        """Memory that `close` frees."""
        self._arenas.append(cuda.Arena(size, what))
        return self._arenas[-1]

    def close(self) -> None:
        self._finish()
        for graph in self._graphs.values():
            graph.destroy()
        cuda.free_pinned(self._history)
        if self._workspace is not None:
            self._workspace.close()
        for arena in self._arenas:
            arena.free()
        cuda.call("StreamDestroy", self._stream)

    def _load(self, engine: Engine) -> None:
        self._allocate()
        self._load_constants(engine)
        self._load_weights(engine)

    def _cache_sizes(self) -> dict[str, int]:
        """Bytes of every cache, by name."""
        sizes = {}
        for index, shard in self._plan.layers.items():
            if not shard.num_heads:
                continue
            fields = attention_fields(self._plan.model, shard, self.limits)
            shape = abi.cqil_attention_shape(**fields, dtype=self._dtype_code)
            sizes[f"cache.{index}"] = self._library.cqil_attention_cache_bytes(shape)
        return sizes

    def _extra_sizes(self) -> dict[str, int]:
        """Bytes of buffers that only this backend has, by name."""
        return {}

    def _allocate(self) -> None:
        limits, model = self.limits, self._plan.model
        batch, chunk = limits.max_batch_size, min(limits.prefill_chunk, limits.max_seq_len)
        width, hidden = self._widths[self._plan.rank], model.hidden_size * self._bytes
        rows = max(chunk, batch)  # scoring predicts from a chunk of one prompt, prefill from one token of each
        sizes = {
            "tokens": 4 * batch * chunk,
            "select": 4 * rows,
            "logits": self._bytes * rows * width,
            "joined": hidden * batch * chunk,
            "prefill.past": 4 * batch,
            "next": 4 * batch,
            "past": 4 * batch,
            "each": 4 * batch,
            "prediction": self._bytes * batch * width,
            "value": 4 * batch,
            "index": 4 * batch,
            "best_value": 4 * batch,
            "best": 4 * batch,
            "step": 4,
            "sampling": ctypes.sizeof(abi.cqil_sampling),
            "uniforms": 8 * batch * limits.max_seq_len,
            "all_logits": self._bytes * batch * model.vocab_size,
            **self._extra_sizes(),
        }
        tables = limits.max_seq_len * model.head_dim // 2 * 4
        sizes |= {"rotary.cos": tables, "rotary.sin": tables}
        self._caches = self._cache_sizes()
        sizes |= self._caches
        arena = self._arena(sum(map(cuda.aligned, sizes.values())), "the KV cache and buffers")
        self._memory |= {name: arena.take(size) for name, size in sizes.items()}
        self._history = cuda.pinned((_SLOTS, batch), np.int64)

    def _load_constants(self, engine: Engine) -> None:
        cuda.upload(self._memory["each"], np.arange(self.limits.max_batch_size, dtype=np.int32), self._stream)
        tables = rotary_tables(engine.model, engine.rotary, self.limits.max_seq_len)
        for name, table in zip(("rotary.cos", "rotary.sin"), tables):
            cuda.upload(self._memory[name], table, self._stream)
        for name, size in (*self._caches.items(), ("step", 4)):
            cuda.call("MemsetAsync", self._memory[name], 0, size, self._stream)
        self._synchronize()

    def _load_weights(self, engine: Engine) -> None:
        """Copies the rank's tensors to the GPU, through page-locked memory."""
        path = engine.rank_file(self._plan.rank)
        spans = tensor_spans(path)
        first, last = self._plan.vocabulary
        row = self._plan.model.hidden_size * self._bytes
        shared = self._plan.shares_embedding
        copied = shared and first * row % cuda.ALIGNMENT != 0
        sizes = [length for _, length in spans.values()] + [(last - first) * row] * copied
        arena = self._arena(sum(map(cuda.aligned, sizes)), "the weights")
        staging = cuda.pinned((min(_STAGING_BYTES, max(sizes, default=1)),), np.uint8)
        with open(path, "rb", buffering=0) as file:
            for name, (begin, length) in spans.items():
                address = self._memory[name] = arena.take(length)
                file.seek(begin)
                for offset in range(0, length, len(staging)):
                    part = staging.data[: min(len(staging), length - offset)]
                    if file.readinto(part) != len(part):
                        raise UserError(f"{path}: truncated while reading {name}")
                    cuda.upload(address + offset, np.frombuffer(part, np.uint8), self._stream)
                    self._synchronize()
        cuda.free_pinned(staging)
        if shared:
            address = self._memory["embedding.weight"] + first * row
            if copied:
                source, address = address, arena.take((last - first) * row)
                cuda.copy(address, source, (last - first) * row, self._stream)
            self._memory["lm_head.weight"] = address

    # The pass

    def _synchronize(self) -> None:
        cuda.call("StreamSynchronize", self._stream)

    def _finish(self) -> None:
        """Waits for the stream. Raises CollectiveError when a kernel gave up waiting."""
        with self._guard():
            self._synchronize()

    def _guard(self) -> AbstractContextManager[None]:
        return guard(self._library, self._workspace)

    def _start(self, lengths: np.ndarray) -> None:
        self._batch = len(lengths)

    def _forward(self, tokens: np.ndarray, past: np.ndarray, select: np.ndarray) -> None:
        batch, length = tokens.shape
        rows = (np.arange(batch)[:, None] * length + select).reshape(-1)
        inputs = {"tokens": tokens, "prefill.past": past, "select": rows}
        for name, array in inputs.items():
            cuda.upload(self._memory[name], array.astype(np.int32), self._stream)
        self._common_past = int(past[0])
        self._execute(Phase.PREFILL, batch, length, len(rows))
        self._rows, self._selected = batch * length, select.shape
        self._finish()

    def _keep(self, rows: np.ndarray) -> None:
        size = self._bytes * self._widths[self._plan.rank]
        for row in np.flatnonzero(rows) if size else ():
            offset = int(row) * size
            cuda.copy(self._memory["prediction"] + offset, self._memory["logits"] + offset, size, self._stream)
        self._chosen, self._on_device = False, None

    def _last_logits(self) -> np.ndarray:
        return self._fetch_floats("logits", (*self._selected, self._widths[self._plan.rank]))

    def _prediction(self) -> np.ndarray:
        return self._fetch_floats("prediction", (self._batch, self._widths[self._plan.rank]))

    def _fetch_floats(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor of the engine's type, as float32."""
        if self.limits.dtype == "bfloat16":  # which numpy does not have: the upper half of a float32
            return (self._fetch(name, shape, np.uint16).astype(np.uint32) << 16).view(np.float32)
        return self._fetch(name, shape, self.limits.dtype).astype(np.float32, copy=False)

    def _fetch(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        array = np.empty(shape, dtype)
        if array.size:
            cuda.download(array, self._memory[name], self._stream)
        self._finish()
        return array

    # The decode step

    def _step(self, tokens: np.ndarray, past: np.ndarray) -> None:
        self._prepare(tokens, past)
        self._launch(1, sampled=False)

    def _prepare(self, tokens: np.ndarray, past: np.ndarray) -> None:
        """Uploads the step's inputs, unless the previous step left the same ones on the GPU."""
        if self._on_device is None:  # after a prefill
            cuda.upload(self._memory["past"], past.astype(np.int32), self._stream)
        if self._on_device is None or not np.array_equal(tokens, self._on_device):
            cuda.upload(self._memory["next"], tokens.astype(np.int32), self._stream)

    def _launch(self, steps: int, sampled: bool) -> None:
        """Steps from what `next` and `past` hold."""
        self._graph(steps, sampled).launch(self._stream)
        self._advanced(steps, sampled)
        self._rows = self._batch

    def _graph(self, steps: int, sampled: bool) -> cuda.Graph:
        key = self._batch, steps, sampled
        if key not in self._graphs:
            # Some things are set up when a shape first runs, which must not be during capture. The step runs once, then
            # is captured and writes the same again. It starts after everything that was enqueued, because a step reads
            # positions early (cqil_attention).
            self._finish()
            self._execute(Phase.DECODE, self._batch, 1, self._batch)
            self._finish()

            def record() -> None:
                for _ in range(steps):
                    self._execute(Phase.DECODE, self._batch, 1, self._batch)
                    self._choose(sampled)
                    self._advance()

            self._graphs[key] = cuda.Graph(self._stream, record)
        return self._graphs[key]

    def _call(self, name: str, *arguments: Any) -> None:
        if getattr(self._library, f"cqil_{name}")(*arguments, int(self._stream)):
            raise RuntimeError(f"{name}: {self._library.cqil_last_error().decode()}")

    def _advance(self) -> None:
        """What was chosen becomes the input of the next step, and goes to the host."""
        memory, limits = self._memory, self.limits
        state = memory["best"], memory["next"], memory["past"], self._batch, limits.max_seq_len - 1, memory["step"]
        self._call("advance", *state, self._history.ctypes.data, _SLOTS, limits.max_batch_size)

    def _advanced(self, steps: int, sampled: bool) -> None:
        """Called after `steps` calls of `_advance` were enqueued."""
        self._advances += steps
        # The chosen tokens are known once they are read. A caller's other tokens are uploaded.
        self._chosen, self._on_device = not sampled, np.full(self._batch, -1)

    def _read(self, number: int) -> np.ndarray:
        """Waits for the tokens of an advance, one of the last _SLOTS."""
        with self._guard():
            while True:
                done = cuda.is_done(self._stream)
                words = self._history[number % _SLOTS, : self._batch].copy()
                if (words >> 32 == number + 1).all():
                    return words & 0xFFFFFFFF
                if done:
                    raise RuntimeError(f"the GPU is done, and there are no tokens of advance {number}")

    def _choose(self, sampled: bool) -> None:
        """A token for every sequence, over the vocabulary of all ranks, into `best`."""
        memory, width, dtype = self._memory, self._widths[self._plan.rank], self._dtype_code
        batch, logits, together = self._batch, memory["prediction"], self._workspace is not None
        if sampled:
            everything = sum(self._widths)
            if self._workspace is not None:
                whole, count = memory["all_logits"], batch * everything
                self._call("spread", logits, whole, batch, width, self._offset, everything, dtype)
                self._workspace.call("all_reduce", whole, None, whole, count, dtype, int(self._stream))
                logits = whole
            draws = memory["sampling"], memory["uniforms"], memory["step"], batch
            self._call("sample", logits, batch, everything, dtype, *draws, memory["best"])
            return
        value, index = memory["value"], memory["index"] if together else memory["best"]
        self._call("row_argmax", logits, batch, width, self._offset, dtype, value, index)
        if self._workspace is not None:
            best = memory["best_value"], memory["best"]
            self._workspace.call("argmax", value, index, *best, batch, int(self._stream))

    def greedy(self) -> np.ndarray:
        if self._chosen:
            self._on_device = self._read(self._advances - 1)
            return self._on_device.copy()
        self._choose(sampled=False)
        return self._fetch("best", (self._batch,), np.int32).astype(np.int64)

    def tokens(
        self, sampling: SamplingConfig, uniforms: np.ndarray, ends: tuple[int, ...] = ()
    ) -> Iterator[np.ndarray]:
        steps, launched = len(uniforms), 1
        if steps > self.limits.max_seq_len:
            raise ValueError(f"{steps} steps, the engine holds {self.limits.max_seq_len} tokens")
        sampled = sampling.temperature > 0
        self._begin(sampling, uniforms)
        counts = iter(_portions(steps - launched))
        for step in range(steps):
            if launched == step + 1 < steps:  # keep the GPU busy while the host reads the last step
                count = next(counts)
                self._go_on(count, sampled)
                launched += count
            yield self._read(step)

    def _begin(self, sampling: SamplingConfig, uniforms: np.ndarray) -> None:
        """Chooses the first token from the prediction, and makes it the input of the next step."""
        uploads, sampled = {"past": (self._past - 1).astype(np.int32)}, sampling.temperature > 0
        if sampled:
            settings = abi.cqil_sampling(
                temperature=sampling.temperature, top_p=sampling.top_p, top_k=min(sampling.top_k, sum(self._widths))
            )
            uploads |= {"sampling": np.frombuffer(settings, np.uint8), "uniforms": uniforms}
        self._finish()
        self._history[:] = 0  # steps are counted anew
        self._advances = 0
        for name, array in uploads.items():
            cuda.upload(self._memory[name], array, self._stream)
        cuda.call("MemsetAsync", self._memory["step"], 0, 4, self._stream)
        self._choose(sampled)
        self._advance()  # which makes `past` what it is
        self._advanced(1, sampled)

    def _go_on(self, steps: int, sampled: bool) -> None:
        """Launches the next steps as one graph."""
        self._launch(steps, sampled)
        self._past = np.minimum(self._past + steps, self.limits.max_seq_len - 1)

    def time_decode(self, steps: int) -> list[float]:
        """As in Session, by CUDA events; steps of one graph share its time."""
        self._begin(SamplingConfig(), np.zeros(0))
        counts = _portions(steps)
        for count in sorted(set(counts)):
            self._graph(count, sampled=False)
        events = [cuda.call("EventCreate") for _ in range(len(counts) + 1)]
        cuda.call("EventRecord", events[0], self._stream)
        for count, event in zip(counts, events[1:]):
            self._go_on(count, sampled=False)
            cuda.call("EventRecord", event, self._stream)
        self._finish()
        times = [cuda.call("EventElapsedTime", a, b) for a, b in zip(events, events[1:])]
        for event in events:
            cuda.call("EventDestroy", event)
        return [time / count for time, count in zip(times, counts) for _ in range(count)]

    # Results of all ranks

    def _gather(self, columns: np.ndarray) -> np.ndarray:
        if self._comm is None:
            return columns
        return np.concatenate(self._comm.allgather(columns), axis=1)

    def joined(self) -> bytes:
        if not self._plan.schedule.all_reduces:
            return b""
        return self._fetch("joined", (self._rows, self._plan.model.hidden_size * self._bytes), np.uint8).tobytes()
