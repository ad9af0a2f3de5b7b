"""Executes a rank's network on a GPU, for every GPU backend.

It needs numpy, mpi4py, cuda-bindings, cuda-pathfinder and our kernels.

Weights, caches and buffers are allocated when the session begins; meanwhile a thread loads the weights (`weights.py`).
Decode steps are CUDA graphs, one for each number of sequences: the network, the choice of a token over all ranks, and
the input of the next step. Chunks of prompts are graphs too, but for TensorRT's own layers. What a sequence needs from
step to step (its last token, its length, how it is sampled) stays on the GPU, by slot; the rows of a step are arranged
from it when they change. So a step can be enqueued before the tokens of the one before are known.
"""

from __future__ import annotations

import ctypes
import sys
import time
from abc import abstractmethod
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import partial
from itertools import repeat
from statistics import median
from typing import Any

import numpy as np

from cqil_trt.collectives import agree, split
from cqil_trt.config import DTYPE_BYTES
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.gpu import abi, cuda, kernel_library
from cqil_trt.gpu.fused_ops import DRAFT_ROWS, attention_fields, rotary_names
from cqil_trt.gpu.weights import DeviceWeights
from cqil_trt.gpu.workspace import Workspace, guard
from cqil_trt.network.rotary import rotary_tables
from cqil_trt.sampling import MAX_LOGPROBS, Choice, SamplingConfig
from cqil_trt.schedule import Peers
from cqil_trt.scheduler import Outcome, Start, Step
from cqil_trt.session import Session, cache_bytes, fitting_slots
from cqil_trt.speculation import StepCosts

# Steps whose tokens the host may not have read yet: one, that after it, and, on ranks that follow rank 0, one more.
_FLYING = 3
# Graphs of chunks, each with a node for every kernel; those that were not used for longest go first.
_MAX_PROMPT_GRAPHS = 32
# A copy of so much memory that is not page-locked is staged at once. A larger one may wait for the stream (CUDA Runtime
# API, "API synchronization behavior").
_STAGED_BYTES = 64 << 10
# Device memory that is left to activations, libraries and graphs when the KV cache takes the rest.
_RESERVED_BYTES = 2 << 30
# Until it is measured: what one more row costs in a decode step, as a part of a step of one, dense and with packed
# weights. Two H200, LLaMA-7B, `sharded`, scripts/benchmark.py --drafts 7.
_ROW_COST, _PACKED_ROW_COST = 0.035, 0.08
# Without a step in flight the GPU waits for the host. An estimate, from two H200 with steps of 2 ms: ms, and the part.
_WAIT_MS, _WAIT_COST = 0.1, 0.05
# How steps are measured: after so many tokens, so many in a row, all widths in turns so often.
_MEASURED_AT, _MEASURED_STEPS, _MEASURED_TURNS = 200, 3, 2
# The widths of captured decode steps: rows for each sequence.
_WIDTHS = (1, 2, 4, 8, 16)
# The lengths of chunks that are graphs: from an entry's first up to the next entry's first, in its steps. The padding
# of a chunk is computed in vain.
_LENGTH_STEPS = ((16, 16), (64, 32), (128, 64), (512, 128), (2048, 256))


class Phase(IntEnum):
    PREFILL = 0
    DECODE = 1
    VERIFY = 2  # a decode step with drafts


# The buffers that a pass reads and writes, by the names of the decoder's inputs and outputs.
BUFFERS: dict[Phase, dict[str, str]] = {
    Phase.PREFILL: {"past": "prefill.past", "slots": "prefill.slots"},
    # The decode step runs on what it wrote itself.
    Phase.DECODE: {"tokens": "next", "select": "each", "logits": "prediction"},
    Phase.VERIFY: {
        "tokens": "draft.tokens",
        "past": "draft.past",
        "slots": "draft.slots",
        "select": "each",
        "logits": "prediction",
    },
}


def prompt_lengths(most: int) -> list[int]:
    """The lengths of chunks that are graphs, up to `most`."""
    ends = [first for first, _ in _LENGTH_STEPS[1:]] + [most + 1]
    found = [n for (first, step), end in zip(_LENGTH_STEPS, ends) for n in range(first, min(end, most + 1), step)]
    return found if most in found else [*found, most]


def _phase_of(width: int) -> Phase:
    return Phase.DECODE if width == 1 else Phase.VERIFY


class _Part(Enum):
    """What a graph contains."""

    GREEDY = "a step whose sequences all take the likeliest token"
    SAMPLED = "a step with any sampling"
    FORWARD = "a step without the choice, which waits for masks"
    CHOICE = "that choice"


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The names of the buffers with the rows of a pass: the token to feed or chosen, its position, the slot."""

    tokens: str
    past: str
    slots: str


_DECODE_ROWS = _Rows(tokens="next", past="past", slots="slots")
_DRAFT_ROWS = _Rows(tokens="draft.tokens", past="draft.past", slots="draft.slots")
# After a prompt: `past` is then the position of its last token.
_PROMPT_ROWS = _Rows(tokens="prompt.next", past="prompt.past", slots="prefill.slots")


@dataclass(kw_only=True)
class _Flying:
    """A step whose outcome was not collected.

    `width`: rows for each sequence. `advance`: the number of its advance. `wanted`: how many log-probabilities each
    sequence reports. `reported`: an event after which they are in `place` of the page-locked memory.
    """

    step: Step
    width: int = 1
    advance: int = 0
    wanted: tuple[int | None, ...] = ()
    scored: np.ndarray | None = None
    reported: Any = None
    place: int = 0


class CudaSession(Session):
    """One rank on the current GPU. Raises UserError for too little memory, or GPUs that cannot reach each other.

    Subclasses find out what they execute, then call `_load`, after which `_memory` has the address of every buffer and
    weight. `slots`: the most sequences that the KV cache is to hold.
    """

    ahead = 1
    on_gpu = True
    # Penalties depend on the tokens before, which a step with drafts has yet to choose.
    drafts_penalized = False
    _draft_rows = 0  # the most rows of a step with drafts

    def __init__(self, engine: Engine, comm: Any, library: Any, slots: int):
        rank = 0 if comm is None else comm.Get_rank()
        super().__init__(engine, rank, slots)
        self._comm, self._library = comm, library
        self._stream = cuda.call("StreamCreate")
        self._workspaces: dict[Peers, Workspace] = {}
        if comm is not None:
            peers, made = self._plan.peers, {}
            for kind, each in split(comm, peers).items():
                if id(each) not in made:  # one for each communicator, whatever its kinds
                    made[id(each)] = agree(comm, partial(Workspace, each, ranks=peers[kind]))
                self._workspaces[kind] = made[id(each)]
        self._bytes, self._dtype_code = DTYPE_BYTES[engine.limits.dtype], abi.dtype_code(engine.limits.dtype)
        self._memory: dict[str, int] = {}
        self._phase = Phase.PREFILL  # of the last pass
        self._rows = 0  # tokens of the last pass
        self._width = 1  # tokens of each sequence of the last decode step
        self._predicted = 1  # tokens that the last pass predicted from
        self._slot = 0  # of the last prefill pass
        self._configs: dict[int, SamplingConfig] = {}
        self._arranged: tuple[int, ...] = ()  # the slots whose sequences are the rows of decode steps
        self._advances = 0  # how often tokens were chosen, as the counter `step` on the GPU
        self._reports = 0
        self._flying: deque[_Flying] = deque()
        self._graphs: dict[tuple[Any, ...], cuda.Graph] = {}
        self._shapes: set[tuple[Any, ...]] = set()  # of decode steps that were executed, whatever their part
        # By the length of the chunk, the one that was used last at the end; None once such a chunk has run.
        self._prompts: OrderedDict[int, cuda.Graph | None] = OrderedDict()
        self._arenas: list[cuda.Arena] = []
        self._pinned: list[np.ndarray] = []

    @abstractmethod
    def _execute(self, phase: Phase, batch: int, length: int, rows: int) -> None:
        """Enqueues the network: `length` tokens of `batch` sequences, predicting from `rows` of them."""

    # Memory

    def _arena(self, size: int, what: str) -> cuda.Arena:
        """Memory that `close` frees."""
        self._arenas.append(cuda.Arena(size, what))
        return self._arenas[-1]

    def _pin(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Page-locked memory that `close` frees."""
        self._pinned.append(cuda.pinned(shape, dtype))
        return self._pinned[-1]

    def close(self) -> None:
        self._finish()
        for graph in (*self._graphs.values(), *self._prompts.values()):
            if graph is not None:
                graph.destroy()
        self._release()
        self._weights.close()

    def _release(self) -> None:
        """Gives back everything but the weights, on all ranks together."""
        for array in self._pinned:
            cuda.free_pinned(array)
        for workspace in dict.fromkeys(self._workspaces.values()):
            workspace.close()
        for arena in self._arenas:
            arena.free()
        cuda.call("StreamDestroy", self._stream)

    @contextmanager
    def _released_on_failure(self) -> Iterator[None]:
        """For the part of a start in which all ranks raise UserError together: a process may go on and open another."""
        try:
            yield
        except UserError:
            self._release()
            raise

    def _load(self, engine: Engine, weights: DeviceWeights) -> None:
        """Allocates memory, and fills what does not come from the rank's file; `wait` waits for that."""
        self._weights = weights
        agree(self._comm, weights.allocated)
        self._memory |= weights.memory
        self._quantized = weights.quantized
        if self._draft_rows:
            packed = any(matrix.packed for matrix in self._quantized.values())
            row = _PACKED_ROW_COST if packed else _ROW_COST
            self.step_costs = StepCosts(steps=(1.0, 1.0 + row), wait=_WAIT_COST)
        if not self._slots_are_fixed:
            free = self._free_memory() - sum(self._buffer_sizes().values())
            each = cache_bytes(engine, self._plan.rank) + sum(self._slot_sizes().values())
            self.slots = fitting_slots(self.slots, max(0, free), each, self._comm)
        agree(self._comm, self._allocate)
        self._load_constants(engine)

    def wait(self) -> dict[str, float]:
        with self._weights.closed_on_failure():
            agree(self._comm, self._weights.wait)
        if self._rows:  # what ran meanwhile differs between ranks, and may not be finite
            self._forget()
        return self._weights.seconds

    def _forget(self) -> None:
        """Leaves nothing of what ran in any slot."""
        self._rows, self._arranged = 0, ()
        self._clear(self._caches | self._states)

    # Whether the network was compiled for a number of slots, and the most passes that it needs for a step.
    _slots_are_fixed = False
    _passes_of_step = 1

    def _free_memory(self) -> int:
        """Bytes of this GPU's memory that this rank may use for its cache; ranks that share a GPU share it."""
        if self._comm is not None:
            self._comm.Barrier()  # all have allocated their weights
        free = cuda.call("MemGetInfo")
        here = cuda.call("DeviceGetPCIBusId", 32, cuda.call("GetDevice"))
        if self._comm is not None:
            sharing = self._comm.allgather(here).count(here)
            self._comm.Barrier()
            free //= sharing
        return max(0, int(free) - _RESERVED_BYTES)

    def _cache_sizes(self) -> dict[str, int]:
        """Bytes of every cache, by name."""
        sizes = {}
        for index, shard in self._plan.layers.items():
            if not shard.num_heads:
                continue
            fields = attention_fields(self._plan.model, shard, self.limits, self.slots)
            shape = abi.cqil_attention_shape(**fields, dtype=self._dtype_code)
            sizes[f"cache.{index}"] = self._library.cqil_attention_cache_bytes(shape)
        return sizes

    def _extra_sizes(self) -> dict[str, int]:
        """Bytes of buffers that only this backend has, by name."""
        return {}

    def _slot_sizes(self) -> dict[str, int]:
        """Bytes for each slot next to its caches, by name."""
        vocabulary = self._plan.model.vocab_size
        return {
            "slot.next": 4,
            "slot.past": 4,
            "settings": ctypes.sizeof(abi.cqil_sampling),
            "uniforms": 8 * self.limits.max_seq_len,
            "counts": 4 * vocabulary,
            "bias": 4 * vocabulary,
            "mask": 4 * -(-vocabulary // 32),
        }

    def _chunk_sizes(self) -> dict[str, int]:
        """Bytes of a chunk's inputs, which are uploaded together; the tokens are last, as they are often fewer."""
        count = 4 * min(self.limits.prefill_chunk, self.limits.max_seq_len)
        sizes = {"prefill.past": 4, "prefill.slots": 4, "prompt.past": 4, "select": count, "tokens": count}
        return {name: cuda.aligned(size) for name, size in sizes.items()}

    @property
    def _most_rows(self) -> int:
        """Rows of a decode step."""
        return max(self.limits.max_batch_size, self._draft_rows)

    def _buffer_sizes(self) -> dict[str, int]:
        """Bytes of the buffers that do not depend on the number of slots, by name."""
        limits, model = self.limits, self._plan.model
        batch, chunk = limits.max_batch_size, min(limits.prefill_chunk, limits.max_seq_len)
        drafts, rows = self._draft_rows, self._most_rows
        width, hidden = self._widths[self._plan.rank], model.hidden_size * self._bytes
        vocabulary = model.vocab_size
        table = limits.max_seq_len * model.rotary_dim // 2 * 4
        return {
            # Of a chunk of a prompt, and of the token chosen after it.
            "chunk": sum(self._chunk_sizes().values()),
            "logits": self._bytes * chunk * width,  # scoring predicts from all of its tokens
            "prompt.next": 4,
            # Of the rows of a decode step.
            "next": 4 * batch,
            "past": 4 * batch,
            "slots": 4 * batch,
            "each": 4 * rows,
            "prediction": self._bytes * rows * width,
            # Of one with drafts: slots, drafts and their numbers are uploaded together.
            "drafts": 3 * 4 * drafts,
            "draft.tokens": 4 * drafts,
            "draft.past": 4 * drafts,
            # Of any pass.
            "joined": hidden * max(rows, chunk),
            "value": 4 * rows,
            "index": 4 * rows,
            "best_value": 4 * rows,
            "best": 4 * rows,
            "step": 4,
            "all_logits": self._bytes * rows * vocabulary,
            "adjusted": 4 * rows * vocabulary,
            "report.ids": 4 * rows * (MAX_LOGPROBS + 1),
            "report.values": 4 * rows * (MAX_LOGPROBS + 1),
            **{name: table for which in range(len(model.ropes)) for name in rotary_names(which)},
            **self._extra_sizes(),
        }

    def _allocate(self) -> None:
        drafts, rows = self._draft_rows, self._most_rows
        sizes = self._buffer_sizes() | {name: self.slots * size for name, size in self._slot_sizes().items()}
        # What slots keep from step to step, next to their caches.
        self._states = {name: sizes[name] for name in ("slot.next", "slot.past", "counts")}
        self._caches = self._cache_sizes()
        sizes |= self._caches
        arena = self._arena(sum(map(cuda.aligned, sizes.values())), "the KV cache and buffers")
        self._memory |= {name: arena.take(size) for name, size in sizes.items()}
        # Where the host puts a chunk's inputs together: all of them, and parts of that by name.
        self._chunk, at = np.zeros(sizes["chunk"] // 4, np.int32), 0
        self._inputs: dict[str, np.ndarray] = {}
        for name, size in self._chunk_sizes().items():
            self._memory[name] = self._memory["chunk"] + at
            self._inputs[name] = self._chunk[at // 4 : (at + size) // 4]
            at += size
        for i, name in enumerate(("slots", "given", "counts")):
            self._memory[f"draft.{name}"] = self._memory["drafts"] + 4 * drafts * i
        # In page-locked memory: what the host has not read yet. A power of 2, as cqil_advance wants.
        unread = 1 << (_FLYING * self._passes_of_step - 1).bit_length()
        self._history = self._pin((unread, rows), np.uint64)
        self._history[:] = 0
        self._report_ids = self._pin((unread, rows, MAX_LOGPROBS + 1), np.int32)
        self._report_values = self._pin((unread, rows, MAX_LOGPROBS + 1), np.float32)

    def _load_constants(self, engine: Engine) -> None:
        cuda.upload(self._memory["each"], np.arange(self._most_rows, dtype=np.int32), self._stream)
        for which in range(len(engine.model.ropes)):
            tables = rotary_tables(engine.model, engine.rotary, self.limits.max_seq_len, which)
            for name, table in zip(rotary_names(which), tables):
                cuda.upload(self._memory[name], table, self._stream)
        self._clear(self._caches | self._states | {"step": 4})

    def _clear(self, sizes: Mapping[str, int]) -> None:
        """Fills buffers with zeros, by their bytes."""
        for name, size in sizes.items():
            cuda.call("MemsetAsync", self._memory[name], 0, size, self._stream)
        self._synchronize()

    # The pass

    def _synchronize(self) -> None:
        cuda.call("StreamSynchronize", self._stream)

    def _finish(self) -> None:
        """Waits for the stream. Raises CollectiveError when a kernel gave up waiting."""
        with self._guard():
            self._synchronize()

    def _guard(self) -> AbstractContextManager[None]:
        return guard(self._library, *self._workspaces.values())

    def _upload(self, name: str, values: Any, dtype: Any = np.int32, offset: int = 0) -> None:
        """Fills a buffer from `offset` bytes on."""
        cuda.upload(self._memory[name] + offset, np.asarray(values).astype(dtype, copy=False), self._stream)

    def _call(self, name: str, *arguments: Any) -> None:
        if getattr(self._library, f"cqil_{name}")(*arguments, int(self._stream)):
            raise RuntimeError(f"{name}: {self._library.cqil_last_error().decode()}")

    # Lengths of chunks that are executed as CUDA graphs, in rising order; shorter chunks are padded.
    _prompt_lengths: Sequence[int] = ()

    def _use_plugins(self) -> None:
        """For networks of our plugins, before `_load`: chunks of prompts are graphs, and steps can have drafts.

        Finds cuBLASLt too.
        """
        self._draft_rows = DRAFT_ROWS
        self._prompt_lengths = prompt_lengths(min(self.limits.prefill_chunk, self.limits.max_seq_len))
        found = agree(self._comm, partial(kernel_library.find_linear_library, self._library))
        if not found and self._plan.rank == 0:
            print(
                "no cuBLASLt for this driver was found, so prompts take longer: install nvidia-cublas (for CUDA 12 "
                "nvidia-cublas-cu12), or let CQIL_CUBLASLT name its file",
                file=sys.stderr,
            )

    # Whether a pass must run just before it is captured, and not only once before others of its phase.
    _settles_shapes = False

    def padded_chunk(self, count: int, past: int) -> int:
        return self._graph_length(count, past) or count

    def _graph_length(self, count: int, past: int) -> int | None:
        """The length of the graph that takes a chunk of `count` tokens after `past`, if one does."""
        lengths = self._prompt_lengths
        at = bisect_left(lengths, count)
        return lengths[at] if at < len(lengths) and lengths[at] <= self.limits.max_seq_len - past else None

    def _forward(self, tokens: Sequence[int], past: int, slot: int, predict: int) -> None:
        """A chunk of one prompt: `tokens` after `past` others, predicting from the last `predict` of them."""
        count = len(tokens)
        padded = self._graph_length(count, past) if predict == 1 else None
        fed, inputs = padded or count, self._inputs
        inputs["prefill.past"][0], inputs["prefill.slots"][0], inputs["prompt.past"][0] = past, slot, past + count - 1
        inputs["select"][:predict] = range(count - predict, count)
        inputs["tokens"][:count] = tokens
        # The padding comes after the prompt, whose tokens do not see it; the sequence will overwrite it in the cache.
        inputs["tokens"][count:fed] = 0
        used = self._chunk.size - inputs["tokens"].size + fed
        cuda.upload(self._memory["chunk"], self._chunk[:used], self._stream)
        self._describe_chunk(fed, past)
        self._phase, self._slot = Phase.PREFILL, slot
        self._rows, self._predicted = count, predict
        if padded is None:
            self._execute(Phase.PREFILL, 1, count, predict)
        else:
            self._launch_prompt(padded)

    def _describe_chunk(self, count: int, past: int) -> None:
        """Uploads what else the network reads about a chunk of `count` tokens, padding included."""

    def _launch_prompt(self, length: int) -> None:
        """Executes a chunk of `length` tokens: kernel by kernel the first time, as a graph from then on."""
        if length not in self._prompts:
            self._prompts[length] = None
            self._execute(Phase.PREFILL, 1, length, 1)
            return
        self._prompt_graph(length).launch(self._stream)

    def _prompt_graph(self, length: int) -> cuda.Graph:
        """The graph of a chunk of `length` tokens, which has been executed before; it becomes the last one used."""
        graph = self._prompts[length]
        if graph is None:
            if self._settles_shapes:
                self._execute(Phase.PREFILL, 1, length, 1)  # the graph writes the same again
            self._finish()
            captured = [known for known, graph in self._prompts.items() if graph is not None]
            if len(captured) >= _MAX_PROMPT_GRAPHS:
                self._prompts.pop(captured[0]).destroy()  # type: ignore[union-attr]
            graph = cuda.Graph(self._stream, lambda: self._execute(Phase.PREFILL, 1, length, 1))
            self._prompts[length] = graph
        self._prompts.move_to_end(length)
        return graph

    def _last_logits(self) -> np.ndarray:
        width = self._widths[self._plan.rank]
        if self._phase is Phase.PREFILL:
            return self._fetch_floats("logits", (1, self._predicted, width))
        return self._fetch_floats("prediction", (self._rows // self._width, self._width, width))

    def _fetch_floats(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor of the engine's type, as float32."""
        if self.limits.dtype == "bfloat16":  # which numpy does not have: the upper half of a float32
            return (self._fetch(name, shape, np.uint16).astype(np.uint32) << 16).view(np.float32)
        return self._fetch(name, shape, self.limits.dtype).astype(np.float32, copy=False)

    def _fetch(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        array = np.empty(shape, dtype)
        with self._guard():
            if array.size:
                cuda.download(array, self._memory[name], self._stream)
            self._synchronize()
        return array

    # Slots

    def _start(self, starts: Sequence[Start]) -> None:
        """Uploads what the choice of these sequences' tokens needs, but not the network."""
        for start in starts:
            slot, config = start.slot, start.sampling
            self._configs[slot] = config
            settings = abi.cqil_sampling(
                temperature=config.temperature,
                top_p=config.top_p,
                min_p=config.min_p,
                repetition_penalty=config.repetition_penalty,
                presence_penalty=config.presence_penalty,
                frequency_penalty=config.frequency_penalty,
                top_k=min(config.top_k, self.vocab_size),
                logprobs=-1 if config.logprobs is None else config.logprobs,
                masked=config.guided,
                biased=bool(config.logit_bias),
            )
            self._upload("settings", np.frombuffer(settings, np.uint8), np.uint8, slot * ctypes.sizeof(settings))
            if config.temperature > 0 and start.room:
                # Token k is drawn at the position of the token before it.
                draws = np.random.Generator(np.random.Philox(config.seed)).random(start.room)
                first = slot * self.limits.max_seq_len + len(start.prompt) - 1
                self._upload("uniforms", draws, np.float64, 8 * first)
            row = 4 * slot * self.vocab_size
            if config.penalizes:
                counts = np.zeros(self.vocab_size, np.uint32)
                counts[list(start.prompt)] = 1 << 31
                self._upload("counts", counts, np.uint32, row)
            if config.logit_bias:
                bias = np.zeros(self.vocab_size, np.float32)
                for token, value in config.logit_bias:
                    bias[token] += np.float32(value)
                self._upload("bias", bias, np.float32, row)

    def _is_staged(self, start: Start) -> bool:
        """Whether all that `_start` uploads is small."""
        of_vocabulary = start.sampling.penalizes or start.sampling.logit_bias
        return not of_vocabulary and 8 * start.room <= _STAGED_BYTES

    def _copy(self, source: int, target: int, count: int) -> None:
        dim = self._plan.model.head_dim * DTYPE_BYTES[self.limits.cache_dtype]
        for index, shard in self._plan.layers.items():
            if not shard.num_heads:
                continue
            length = self.limits.cache_length(self._plan.model.window_of(index))
            pitch = length * dim
            for cache in self._cache_parts(index):
                rows = shard.num_kv_heads
                to, start = (cache + slot * rows * pitch for slot in (target, source))
                cuda.copy_rows(to, start, pitch, min(count, length) * dim, rows, self._stream)

    def _cache_parts(self, index: int) -> tuple[int, int]:
        """The addresses of a layer's keys and values, each [slots, key/value heads, `cache_length`, head_dim]."""
        model, shard, limits = self._plan.model, self._plan.layers[index], self.limits
        row = limits.cache_length(model.window_of(index)) * model.head_dim * DTYPE_BYTES[limits.cache_dtype]
        size = self.slots * shard.num_kv_heads * row
        address = self._memory[f"cache.{index}"]
        return address, address + size

    # Steps

    def submit(self, step: Step) -> None:
        flying = _Flying(step=step)
        chunk = step.chunk
        # Sampling is uploaded while a prompt is computed, unless the host would wait for the prompt.
        later = [start for start in step.starts if self._is_staged(start)]
        with self._guard():
            for start in step.starts:
                if start.cached and start.source != start.slot:
                    self._copy(start.source, start.slot, start.cached)
            self._start([start for start in step.starts if not self._is_staged(start)])
            if chunk is not None:
                self._forward(chunk.tokens, chunk.past, chunk.slot, chunk.predict)
                # From here on the GPU computes, and nothing waits for the host.
                if chunk.slot in self._arranged:
                    self._arranged = ()
                if not chunk.choose:
                    # What decodes beside it must not believe that the slot's tokens end before `past`.
                    self._upload("slot.past", [chunk.past + len(chunk.tokens)], offset=4 * chunk.slot)
                if chunk.scored:
                    flying.scored = self._gather(self._last_logits()[0])
            else:
                flying.width = self._width = self.padded_width(step.width)
                self._arrange(step, flying.width)
                self._phase, self._rows = _phase_of(flying.width), len(step.decode) * flying.width
            self._start(later)
            self._flying.append(flying)
            if not step.guided:
                self.choose({})
            elif chunk is None:
                self._launch(_Part.FORWARD, len(step.decode), flying.width)

    def choose(self, masks: Mapping[int, np.ndarray]) -> None:
        flying = self._flying[-1]
        step = flying.step
        flying.advance = self._advances
        slots = step.choosing
        plain = all(self._configs[slot].plain for slot in slots)
        with self._guard():
            for slot, mask in masks.items():
                self._upload("mask", mask, np.uint32, slot * mask.nbytes)
            if step.chunk is not None:
                if slots:
                    last = (self._predicted - 1) * self._widths[self._plan.rank] * self._bytes
                    self._choose(1, self._memory["logits"] + last, plain, _PROMPT_ROWS)
                    self._advance(1, _PROMPT_ROWS)
            elif step.guided:
                self._launch(_Part.CHOICE, len(slots), flying.width)
            else:
                self._launch(_Part.GREEDY if plain else _Part.SAMPLED, len(slots), flying.width)
            self._advances += bool(slots)
            wanted = (self._configs[slot].logprobs for slot in slots)
            flying.wanted = tuple(None if count is None else min(count, self.vocab_size) for count in wanted)
            if any(wanted is not None for wanted in flying.wanted):
                self._report(flying, len(slots) * flying.width)

    def _report(self, flying: _Flying, rows: int) -> None:
        """Enqueues the copy of log-probabilities to the host."""
        flying.place, self._reports = self._reports % len(self._report_ids), self._reports + 1
        for name, target in (("report.ids", self._report_ids), ("report.values", self._report_values)):
            cuda.download(target[flying.place, :rows], self._memory[name], self._stream)
        flying.reported = cuda.call("EventCreate")
        cuda.call("EventRecord", flying.reported, self._stream)

    def collect(self) -> Outcome:
        flying = self._flying.popleft()
        slots, width = flying.step.choosing, flying.width
        tokens = self._read(flying.advance, len(slots) * width) if slots else []
        if flying.reported is not None:
            with self._guard():
                cuda.call("EventSynchronize", flying.reported)
            cuda.call("EventDestroy", flying.reported)
        choices: dict[int, list[Choice]] = {}
        for i, (slot, wanted, draft) in enumerate(zip(slots, flying.wanted, flying.step.drafts or repeat(()))):
            choices[slot] = []
            for row, expected in enumerate((*draft, None), i * width):
                choices[slot].append(Choice(tokens[row], self._reported(flying.place, row, wanted)))
                if tokens[row] != expected:
                    break
        return self._note(Outcome(choices=choices, logits=flying.scored))

    def _reported(self, place: int, row: int, wanted: int | None) -> tuple[tuple[int, float], ...] | None:
        """The log-probabilities of a row's token and of the `wanted` likeliest; None for None."""
        if wanted is None:
            return None
        reports = (report[place, row, : wanted + 1].tolist() for report in (self._report_ids, self._report_values))
        return tuple(zip(*reports))

    def _read(self, number: int, rows: int) -> list[int]:
        """Waits for the tokens of an advance, one of those that the history holds."""
        place, wanted = self._history[number % len(self._history), :rows], number + 1 & 0xFFFFFFFF
        with self._guard():
            while True:
                done = cuda.is_done(self._stream)
                words = place.tolist()
                if all(word >> 32 == wanted for word in words):  # the GPU's counter has 32 bits
                    return [word & 0xFFFFFFFF for word in words]
                if done:
                    raise RuntimeError(f"the GPU is done, and there are no tokens of advance {number}")

    def _arrange(self, step: Step, width: int) -> None:
        """Makes the sequences in these slots the rows of decode steps, `width` of each."""
        if width > 1:
            self._arrange_drafts(step, width)
            return
        if step.decode != self._arranged:
            memory, rows = self._memory, len(step.decode)
            self._upload("slots", step.decode)
            state = memory["slots"], memory["slot.next"], memory["slot.past"]
            fed = memory["next"], memory["past"]
            self._call("arrange", *state, None, *fed, rows, 1, self.limits.max_seq_len - 1)
            self._arranged = step.decode
        if step.given:
            self._upload("next", step.given)

    # Drafts

    def draft_width(self, sequences: int) -> int:
        return max((width for width in _WIDTHS if sequences * width <= self._draft_rows), default=1)

    def padded_width(self, width: int) -> int:
        return next(known for known in _WIDTHS if known >= width)

    def _arrange_drafts(self, step: Step, width: int) -> None:
        """Fills the row buffers of a step with drafts; what follows a sequence's drafts is computed in vain."""
        memory, rows = self._memory, len(step.decode) * width
        if rows > self._draft_rows:
            raise UserError(f"a step with drafts has {rows} rows, this backend takes {self._draft_rows}")
        uploaded = np.zeros((3, self._draft_rows), np.int32)
        uploaded[0, :rows] = np.repeat(step.decode, width)
        for i, draft in enumerate(step.drafts):
            uploaded[1, i * width + 1 : i * width + 1 + len(draft)] = draft
        uploaded[2, : len(step.drafts)] = [len(draft) for draft in step.drafts]
        self._upload("drafts", uploaded)
        state = (memory[name] for name in ("draft.slots", "slot.next", "slot.past", "draft.given"))
        fed = memory["draft.tokens"], memory["draft.past"]
        self._call("arrange", *state, *fed, rows, width, self.limits.max_seq_len - 1)
        self._arranged = ()

    # The decode step

    def _launch(self, part: _Part, sequences: int, width: int) -> None:
        """A step from what the row buffers hold."""
        self._graph(part, sequences, width).launch(self._stream)

    def _variant(self) -> Any:
        """What else than the number of rows a captured step depends on."""

    def _graph(self, part: _Part, sequences: int, width: int = 1) -> cuda.Graph:
        key = sequences, width, part, self._variant()
        phase, rows = _phase_of(width), sequences * width
        if key not in self._graphs:
            # Some things are set up when a shape first runs, which must not be during capture. The step runs once, then
            # is captured and writes the same again. It starts after everything that was enqueued, because a step reads
            # positions early (cqil_attention).
            self._finish()
            shape = sequences, width, self._variant()
            if part is not _Part.CHOICE and (self._settles_shapes or shape not in self._shapes):
                self._execute(phase, sequences, width, rows)
                self._shapes.add(shape)
            self._finish()

            def record() -> None:
                if part is not _Part.CHOICE:
                    self._execute(phase, sequences, width, rows)
                if part is not _Part.FORWARD:
                    names = _DECODE_ROWS if width == 1 else _DRAFT_ROWS
                    self._choose(rows, self._memory["prediction"], part is _Part.GREEDY, names)
                    if width == 1:
                        self._advance(rows, names)
                    else:
                        self._accept(rows, width)

            self._graphs[key] = cuda.Graph(self._stream, record)
        return self._graphs[key]

    def warm_up(self, rows: int, chunk: int, drafts: bool = False) -> dict[str, float]:
        """As in Session: captures the graphs of both, of chunks as many as are kept, the shortest first."""
        began = time.perf_counter()
        used = bisect_left(self._prompt_lengths, chunk) + 1  # up to the first that holds such a chunk
        with self._guard():
            for length in self._prompt_lengths[: min(used, _MAX_PROMPT_GRAPHS)]:
                self._forward((0,) * length, 0, 0, 1)
                # Executing it too would take as long as reading such a prompt.
                self._prompt_graph(length).upload(self._stream)
            self._synchronize()
            between = time.perf_counter()
            for count in range(1, rows + 1):
                slots = tuple(range(count))
                self._start([Start(slot=slot, prompt=(0,), sampling=SamplingConfig(), room=1) for slot in slots])
                widest = self.draft_width(count) if drafts else 1
                for width in (known for known in _WIDTHS if known <= widest):
                    self._arrange(Step(decode=slots), width)
                    for part in _Part:
                        self._graph(part, count, width)
            self._arranged = ()
            self._synchronize()
        return {"of chunks": between - began, "of decode steps": time.perf_counter() - between}

    def _advance(self, count: int, rows: _Rows) -> None:
        """What was chosen becomes the input of the next step, and goes to the host."""
        memory, limits = self._memory, self.limits
        row = memory[rows.slots], memory[rows.tokens], memory[rows.past], memory["slot.next"], memory["slot.past"]
        counts = memory["counts"], self.vocab_size
        self._call("advance", memory["best"], *row, *counts, count, limits.max_seq_len - 1, *self._told())

    def _accept(self, count: int, width: int) -> None:
        """As `_advance` for `count` rows with drafts, `width` of each sequence."""
        memory, last = self._memory, self.limits.max_seq_len - 1
        row = (memory[f"draft.{name}"] for name in ("tokens", "counts", "slots", "past"))
        state = memory["slot.next"], memory["slot.past"], memory["counts"], self.vocab_size
        self._call("accept", memory["best"], *row, *state, count, width, last, *self._told())

    def _told(self) -> tuple[int, ...]:
        """Where the host is told which tokens were chosen: the counter of advances, and the history with its sizes."""
        return self._memory["step"], self._history.ctypes.data, len(self._history), self._most_rows

    def _choose(self, count: int, logits: int, plain: bool, rows: _Rows) -> None:
        """A token for every row, over the vocabulary of all ranks, into `best`; and log-probabilities if wanted."""
        memory, width, dtype = self._memory, self._widths[self._plan.rank], self._dtype_code
        workspace = self._workspaces.get(Peers.ALL)
        if plain:
            value, index = memory["value"], memory["best" if workspace is None else "index"]
            self._call("row_argmax", logits, count, width, self._offset, dtype, value, index)
            if workspace is not None:
                best = memory["best_value"], memory["best"]
                workspace.call("argmax", value, index, *best, count, int(self._stream))
            return
        everything = self.vocab_size
        if workspace is not None:
            whole, elements = memory["all_logits"], count * everything
            self._call("spread", logits, whole, count, width, self._offset, everything, dtype)
            workspace.call("all_reduce", whole, None, whole, elements, dtype, int(self._stream))
            logits = whole
        settings = memory["settings"], memory[rows.slots]
        state = memory["counts"], memory["bias"], memory["mask"], memory["adjusted"]
        self._call("adjust", logits, count, everything, dtype, *settings, *state)
        draws = memory["uniforms"], self.limits.max_seq_len, memory[rows.past], memory["best"]
        self._call("sample", memory["adjusted"], count, everything, *settings, *draws)
        report = memory["best"], MAX_LOGPROBS, memory["report.ids"], memory["report.values"]
        self._call("logprobs", logits, count, everything, dtype, *settings, *report)

    def time_decode(self, slots: Sequence[int], steps: int, drafted: int = 0) -> list[float]:
        """As in Session, by CUDA events; steps are enqueued without waiting for their tokens."""
        step = Step.of(slots, drafted)
        self.submit(step)  # captures it, where it is not
        events = [cuda.call("EventCreate") for _ in range(steps + 1)]
        cuda.call("EventRecord", events[0], self._stream)
        for event in events[1:]:
            self.submit(step)
            cuda.call("EventRecord", event, self._stream)
        self._finish()
        self._flying.clear()
        times = [cuda.call("EventElapsedTime", a, b) for a, b in zip(events, events[1:])]
        for event in events:
            cuda.call("EventDestroy", event)
        return times

    def measure_steps(self) -> None:
        """As in Session: the medians on rank 0's GPU, so that all ranks know the same. The graphs stay."""
        widths = [width for width in _WIDTHS if width <= min(self.draft_width(1), self.limits.max_seq_len)]
        if len(widths) < 2:
            return
        times: dict[int, list[float]] = {width: [] for width in widths}
        with self._guard():
            self._start([Start(slot=0, prompt=(0,), sampling=SamplingConfig(), room=1)])
            for _ in range(_MEASURED_TURNS):
                for width in widths:
                    self._upload("slot.past", [min(_MEASURED_AT, self.limits.max_seq_len - 1)])  # of slot 0
                    self._arranged = ()
                    times[width] += self.time_decode((0,), _MEASURED_STEPS, width - 1)
            self._forget()
        medians = {width: median(each) for width, each in times.items()}
        self.step_costs = StepCosts.of(medians if self._comm is None else self._comm.bcast(medians), _WAIT_MS)

    # Results of all ranks

    def _gather(self, columns: np.ndarray) -> np.ndarray:
        if self._comm is None:
            return columns
        return np.concatenate(self._comm.allgather(columns), axis=1)

    def logits(self) -> np.ndarray:
        return self._gather(self._last_logits()[:, -1])

    def joined(self) -> bytes:
        if not self._plan.schedule.all_reduces:
            return b""
        return self._fetch("joined", (self._rows, self._plan.model.hidden_size * self._bytes), np.uint8).tobytes()
