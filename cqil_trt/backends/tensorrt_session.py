"""Executes a rank's TensorRT engine: tensorrt, numpy, mpi4py, cuda-bindings and our plugin library, nothing else.

Everything is allocated when the session begins. A decode step is one CUDA graph for each batch size: the
engine, the greedy choice over all ranks, and the input of the next step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cqil_trt import cuda, plugins
from cqil_trt.backends.tensorrt import import_package, load_plugins, logger, version
from cqil_trt.collectives.cuda import DTYPES, Workspace
from cqil_trt.config import DTYPE_BYTES
from cqil_trt.engine import Engine, tensor_spans
from cqil_trt.errors import UserError
from cqil_trt.network.rotary import rotary_tables
from cqil_trt.session import Session

_STAGING_BYTES = 64 << 20
_PREFILL, _DECODE = 0, 1  # optimization profiles


class TensorRtSession(Session):
    """One rank on one GPU. `device`: which, modulo those there are.

    Raises UserError for an engine of another TensorRT or GPU, too little memory, or GPUs that cannot reach each other.
    """

    def __init__(self, engine: Engine, comm: Any, device: int):
        rank = 0 if comm is None else comm.Get_rank()
        super().__init__(engine, rank)
        self._comm = comm
        package = engine.backend_version.split()[0]
        trt = import_package((package,))
        if version(trt) != engine.backend_version:
            raise UserError(
                f"{engine.path}: compiled by {engine.backend_version}, here is {version(trt)}: compile it here "
                "(build.py --model with the engine of backend torch that it came from)"
            )
        if engine.build.get("plugins") not in (None, plugins.source_version()):
            raise UserError(
                f"{engine.path}: made with plugins {engine.build['plugins']}, these are {plugins.source_version()}: "
                "compile the engine again"
            )
        cuda.use_device(device)
        found = cuda.compute_capability()
        if found not in engine.architecture.split(", "):
            raise UserError(
                f"{engine.path}: compiled for compute capability {engine.architecture}, {cuda.device_name()} has "
                f"{found}: compile it for this GPU" + (" (--target)" if package == "tensorrt_rtx" else "")
            )
        self._library = load_plugins(trt) if package == "tensorrt" else plugins.load()
        self._stream = cuda.call("StreamCreate")
        self._workspace = None if comm is None else Workspace(comm)
        self._bytes = DTYPE_BYTES[engine.limits.dtype]

        log = logger(trt)
        with open(engine.rank_file(rank, "engine"), "rb") as file:
            self._engine = trt.Runtime(log).deserialize_cuda_engine(file.read())
        if self._engine is None:
            raise UserError(f"{engine.rank_file(rank, 'engine')}: TensorRT cannot load it: {log.first_error}")
        self._log = log
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._names = set(names)
        self._native = "positions" in self._names
        self._allocate()
        self._upload_constants(engine)
        self._load_weights(engine, rank)
        self._contexts = self._make_contexts(trt)
        self._join_nccl(engine)
        self._batch = 0
        self._rows = 0  # tokens of the last pass
        self._on_device: np.ndarray | None = None  # what the decode step's token input holds
        self._chosen = False  # whether `best` belongs to the current prediction
        self._graphs: dict[int, cuda.Graph] = {}  # by batch size

    # Memory

    def _cache_sizes(self) -> dict[str, int]:
        """Bytes of every cache, by the name of the engine's input."""
        limits, model = self.limits, self._plan.model
        sizes = {}
        for index, shard in self._plan.layers.items():
            if not shard.num_heads:
                continue
            if self._native:
                size = limits.max_batch_size * shard.num_kv_heads * limits.max_seq_len * model.head_dim * self._bytes
                sizes |= {f"cache.{index}.{part}": size for part in ("key", "value")}
            else:
                shape = plugins.AttentionShape(
                    heads=shard.num_heads,
                    kv_heads=shard.num_kv_heads,
                    head_dim=model.head_dim,
                    capacity=limits.max_seq_len,
                    max_batch=limits.max_batch_size,
                    dtype=DTYPES[limits.dtype],
                )
                sizes[f"cache.{index}"] = self._library.cqil_attention_cache_bytes(shape)
        return sizes

    def _allocate(self) -> None:
        limits, model = self.limits, self._plan.model
        batch, chunk = limits.max_batch_size, min(limits.prefill_chunk, limits.max_seq_len)
        width, hidden = self._widths[self._plan.rank], model.hidden_size * self._bytes
        rows = max(chunk, batch)  # scoring predicts from a chunk of one prompt, prefill from one token of each
        sizes = {
            "tokens": 4 * batch * chunk,
            "positions": 4 * batch * chunk,
            "select": 4 * rows,
            "logits": self._bytes * rows * width,
            "joined": hidden * batch * chunk,
            "idle": 4 * batch * chunk,
            "prefill.past": 4 * batch,
            # Of the decode step, which runs on what it wrote itself
            "next": 4 * batch,
            "past": 4 * batch,
            "each": 4 * batch,
            "prediction": self._bytes * batch * width,
            "value": 4 * batch,
            "index": 4 * batch,
            "best_value": 4 * batch,
            "best": 4 * batch,
        }
        tables = limits.max_seq_len * model.head_dim // 2 * 4
        sizes |= {} if self._native else {"rotary.cos": tables, "rotary.sin": tables}
        self._caches = self._cache_sizes()
        sizes |= self._caches
        arena = cuda.Arena(sum(map(cuda.aligned, sizes.values())), "the KV cache and buffers")
        self._memory = {name: arena.take(size) for name, size in sizes.items()}
        self._best = cuda.pinned((batch,), np.int32)

    def _upload_constants(self, engine: Engine) -> None:
        cuda.upload(self._memory["each"], np.arange(self.limits.max_batch_size, dtype=np.int32), self._stream)
        if not self._native:
            tables = rotary_tables(engine.rotary, self.limits.max_seq_len)
            for name, table in zip(("rotary.cos", "rotary.sin"), tables):
                cuda.upload(self._memory[name], table, self._stream)
        self._clear_caches(self.limits.max_batch_size)
        self._synchronize()

    def _load_weights(self, engine: Engine, rank: int) -> None:
        """Copies the rank's tensors to the GPU, each to an address of its own, through page-locked memory."""
        path = engine.rank_file(rank)
        spans = tensor_spans(path)
        first, last = self._plan.vocabulary
        row = self._plan.model.hidden_size * self._bytes
        shared = self._plan.shares_embedding
        copied = shared and first * row % cuda.ALIGNMENT != 0
        sizes = [length for _, length in spans.values()] + [(last - first) * row] * copied
        arena = cuda.Arena(sum(map(cuda.aligned, sizes)), "the weights")
        staging = cuda.pinned((min(_STAGING_BYTES, max(sizes, default=1)),), np.uint8)
        with open(path, "rb", buffering=0) as file:
            for name, (begin, length) in spans.items():
                address = self._memory[name] = arena.take(length)
                file.seek(begin)
                for offset in range(0, length, len(staging)):
                    part = memoryview(staging)[: min(len(staging), length - offset)]
                    if file.readinto(part) != len(part):
                        raise UserError(f"{path}: truncated while reading {name}")
                    cuda.upload(address + offset, np.frombuffer(part, np.uint8), self._stream)
                    self._synchronize()
        if shared:
            address = self._memory["embedding.weight"] + first * row
            if copied:
                source, address = address, arena.take((last - first) * row)
                cuda.copy(address, source, (last - first) * row, self._stream)
            self._memory["lm_head.weight"] = address

    def _make_contexts(self, trt: Any) -> list[Any]:
        """One context for each profile; they share their scratch memory, as they never run at the same time."""
        engine = self._engine
        size = getattr(engine, "device_memory_size_v2", None) or getattr(engine, "device_memory_size", 0)
        arena = cuda.Arena(int(size), "TensorRT's scratch memory")
        contexts = []
        for profile in (_PREFILL, _DECODE):
            if hasattr(engine, "create_execution_context_without_device_memory"):
                context = engine.create_execution_context_without_device_memory()
            else:
                context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            context.device_memory = arena.address
            context.set_optimization_profile_async(profile, int(self._stream))
            contexts.append(context)
        self._synchronize()
        decode = {"tokens": "next", "positions": "past", "past": "past", "select": "each", "logits": "prediction"}
        for context, names in zip(contexts, ({"past": "prefill.past"}, decode)):
            for name in self._names:
                source = names.get(name, name).removesuffix(".updated")
                address = self._workspace.address if name == "workspace" else self._memory[source]
                context.set_tensor_address(name, int(address))
        return contexts

    def _join_nccl(self, engine: Engine) -> None:
        if self._comm is None or engine.build["collective"] != "nccl":
            return
        from cqil_trt.collectives.nccl import communicator

        handle = communicator(self._comm)
        for context in self._contexts:
            context.set_communicator(handle)

    # The pass

    def _synchronize(self) -> None:
        cuda.call("StreamSynchronize", self._stream)

    def _finish(self) -> None:
        """Waits for the stream. Raises CollectiveError when a peer did not come."""
        if self._workspace is None:
            self._synchronize()
            return
        with self._workspace.guard():
            self._synchronize()

    def _set_shapes(self, profile: int, batch: int, length: int, rows: int) -> None:
        shapes = {"tokens": (batch, length), "positions": (batch, length), "past": (batch,), "select": (rows,)}
        if self._native:
            for index, shard in self._plan.layers.items():
                shape = (batch, shard.num_kv_heads, self.limits.max_seq_len, self._plan.model.head_dim)
                shapes |= {f"cache.{index}.{part}": shape for part in ("key", "value")}
        for name, shape in shapes.items():
            if name in self._names and not self._contexts[profile].set_input_shape(name, shape):
                raise RuntimeError(f"TensorRT refuses the shape {shape} of {name}: {self._log.first_error}")

    def _execute(self, profile: int) -> None:
        if not self._contexts[profile].execute_async_v3(int(self._stream)):
            if self._workspace is not None and (failure := self._workspace.failure()):
                raise failure
            raise RuntimeError(f"TensorRT could not execute the engine: {self._log.first_error}")

    def _start(self, batch: int, longest: int) -> None:
        self._batch = batch
        if self._native:
            # The layer attends to the whole cache: what is masked takes part with weight 0, and 0 * NaN is NaN.
            self._clear_caches(batch)

    def _clear_caches(self, batch: int) -> None:
        for name, size in self._caches.items():
            used = size * batch // self.limits.max_batch_size if self._native else size
            cuda.call("MemsetAsync", self._memory[name], 0, used, self._stream)

    def _forward(self, tokens: np.ndarray, past: np.ndarray, select: np.ndarray) -> None:
        batch, length = tokens.shape
        positions = np.minimum(past[:, None] + np.arange(length), self.limits.max_seq_len - 1)
        rows = (np.arange(batch)[:, None] * length + select).reshape(-1)
        inputs = {"tokens": tokens, "positions": positions, "prefill.past": past, "select": rows}
        for name, array in inputs.items():
            cuda.upload(self._memory[name], array.astype(np.int32), self._stream)
        self._set_shapes(_PREFILL, batch, length, len(rows))
        self._execute(_PREFILL)
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
        self._graph().launch(self._stream)
        self._rows, self._chosen = self._batch, True

    def _prepare(self, tokens: np.ndarray, past: np.ndarray) -> None:
        """Makes the step's inputs what the caller says, where the step before has not left them so."""
        if self._on_device is None:  # behind a prefill
            cuda.upload(self._memory["past"], past.astype(np.int32), self._stream)
        if self._on_device is None or not np.array_equal(tokens, self._on_device):
            cuda.upload(self._memory["next"], tokens.astype(np.int32), self._stream)
        # What the step leaves is known when `greedy` reads it; anything but that is uploaded again.
        self._on_device = np.full(len(tokens), -1)

    def _graph(self) -> cuda.Graph:
        if self._batch not in self._graphs:
            self._set_shapes(_DECODE, self._batch, 1, self._batch)
            # TensorRT wants to have run a shape before it is captured; the step writes the same again.
            self._execute(_DECODE)
            self._finish()

            def record() -> None:
                self._execute(_DECODE)
                self._choose()
                memory, last = self._memory, self.limits.max_seq_len - 1
                self._call("advance", memory["best"], memory["next"], memory["past"], self._batch, last)

            self._graphs[self._batch] = cuda.Graph(self._stream, record)
        return self._graphs[self._batch]

    def _call(self, name: str, *arguments: Any) -> None:
        if getattr(self._library, f"cqil_{name}")(*arguments, int(self._stream)):
            raise RuntimeError(f"{name}: {self._library.cqil_last_error().decode()}")

    def _choose(self) -> None:
        """The likeliest token of every sequence, over the vocabulary of all ranks, into `best` here and on the host."""
        memory, width = self._memory, self._widths[self._plan.rank]
        value, index = memory["value"], memory["index"] if self._workspace is not None else memory["best"]
        logits = memory["prediction"], self._batch, width, self._offset, DTYPES[self.limits.dtype]
        self._call("row_argmax", *logits, value, index)
        if self._workspace is not None:
            best = memory["best_value"], memory["best"]
            self._workspace.call("argmax", value, index, *best, self._batch, int(self._stream))
        cuda.download(self._best[: self._batch], memory["best"], self._stream)

    def greedy(self) -> np.ndarray:
        if not self._chosen:
            self._choose()
            self._chosen = True
        self._finish()
        tokens = self._best[: self._batch].astype(np.int64)
        if self._on_device is not None:
            self._on_device = tokens
        return tokens

    def time_decode(self, steps: int) -> list[float]:
        tokens = self.greedy()
        events = [cuda.call("EventCreate") for _ in range(steps + 1)]
        cuda.call("EventRecord", events[0], self._stream)
        for event in events[1:]:
            self.decode(tokens)
            self._on_device = tokens  # the step's own choice: nothing comes from the host
            cuda.call("EventRecord", event, self._stream)
        self._finish()
        times = [cuda.call("EventElapsedTime", a, b) for a, b in zip(events, events[1:])]
        for event in events:
            cuda.call("EventDestroy", event)
        return times

    # What the ranks say together

    def _gather(self, columns: np.ndarray) -> np.ndarray:
        if self._comm is None:
            return columns
        return np.concatenate(self._comm.allgather(columns), axis=1)

    def joined(self) -> bytes:
        if "joined" not in self._names:
            return b""
        return self._fetch("joined", (self._rows, self._plan.model.hidden_size * self._bytes), np.uint8).tobytes()
