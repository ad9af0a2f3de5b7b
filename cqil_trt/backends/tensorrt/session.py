"""Executes a rank's TensorRT engine: with tensorrt, numpy, mpi4py, cuda-bindings, cuda-pathfinder and our plugins."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cqil_trt.backends.tensorrt.compiler import import_package, logger, version
from cqil_trt.collectives import agree
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.gpu import cuda, kernel_library, tensorrt_plugins
from cqil_trt.gpu.session import BUFFERS, CudaSession, Phase
from cqil_trt.gpu.sources import source_version
from cqil_trt.gpu.weights import DeviceWeights
from cqil_trt.gpu.workspace import workspace_input
from cqil_trt.scheduler import Outcome, Step


class TensorRtSession(CudaSession):
    """One rank on one GPU. `device`: its number, modulo the number of GPUs.

    The KV cache holds as many sequences as the engine was compiled for. TensorRT's own cache layers take neighbouring
    sequences only, so a step of others becomes several passes.

    Raises UserError for an engine of another TensorRT or GPU, too little memory, or GPUs that cannot reach each other.
    """

    _slots_are_fixed = True
    _weights_type = DeviceWeights
    # TensorRT prepares a context for a shape when it first runs, after it has run another one.
    _settles_shapes = True

    def __init__(self, engine: Engine, comm: Any, device: int):
        package = engine.backend_version.split()[0]
        trt = import_package((package,))
        if version(trt) != engine.backend_version:
            raise UserError(
                f"{engine.path}: compiled by {engine.backend_version}, here is {version(trt)}: compile it here "
                "(build.py --model with the engine of backend torch that it came from)"
            )
        made, here = engine.build.get("plugins"), source_version()
        if made not in (None, here):
            raise UserError(f"{engine.path}: made with plugins {made}, these are {here}: compile the engine again")
        agree(comm, partial(_use_gpu, engine, device))  # the ranks' GPUs may differ
        super().__init__(
            engine,
            comm,
            tensorrt_plugins.register(trt) if package == "tensorrt" else kernel_library.load(),
            engine.limits.max_batch_size,
        )
        self._log = logger(trt)
        self._engine = agree(comm, partial(self._deserialize, trt, engine.rank_file(self._plan.rank, "engine")))
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._names = set(names)
        self._native = "positions" in self._names
        if self._native:
            self._passes_of_step = -(-engine.limits.max_batch_size // 2)
        self._passes: deque[int] = deque()  # of each step whose outcome was not collected
        self._held: Step | None = None  # a step that begins when its masks come
        # The plugins take the room for a dense copy of a packed matrix from TensorRT's scratch memory.
        weights = self._weights_type(
            engine, self._plan.rank, device, self._library, packs=not self._native, unpacks=False
        )
        with weights.closed_on_failure(), self._released_on_failure():
            if not self._native:
                self._use_plugins()
            self._load(engine, weights)
            self._contexts = agree(comm, partial(self._make_contexts, trt))
            agree(comm, partial(self._join_nccl, engine))

    def _deserialize(self, trt: Any, path: Path) -> Any:
        engine = trt.Runtime(self._log).deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise UserError(f"{path}: TensorRT cannot load it: {self._log.first_error}")
        return engine

    def _cache_sizes(self) -> dict[str, int]:
        if not self._native:
            return super()._cache_sizes()
        limits = self.limits
        row = limits.max_batch_size * limits.max_seq_len * self._plan.model.head_dim * self._bytes
        return {
            f"cache.{index}.{part}": row * shard.num_kv_heads
            for index, shard in self._plan.layers.items()
            if shard.num_heads
            for part in ("key", "value")
        }

    def _extra_sizes(self) -> dict[str, int]:
        limits = self.limits
        count = max(limits.max_batch_size, min(limits.prefill_chunk, limits.max_seq_len))
        return {name: 4 * count for name in ("positions", "idle")}

    def _cache_parts(self, index: int) -> tuple[int, int]:
        if not self._native:
            return super()._cache_parts(index)
        return self._memory[f"cache.{index}.key"], self._memory[f"cache.{index}.value"]

    def _describe_chunk(self, count: int, past: int) -> None:
        if self._native:
            self._upload("positions", np.minimum(past + np.arange(count), self.limits.max_seq_len - 1))

    def submit(self, step: Step) -> None:
        if not self._native:
            super().submit(step)
        elif step.guided:
            self._held = step
        else:
            self._submit_runs(step)

    def choose(self, masks: Mapping[int, np.ndarray]) -> None:
        if self._held is None:
            super().choose(masks)
            return
        step, self._held = self._held, None
        self._submit_runs(step, masks)

    def _submit_runs(self, step: Step, masks: Mapping[int, np.ndarray] | None = None) -> None:
        """One pass for each run of neighbouring slots."""
        given = dict(zip(step.decode, step.given))
        runs: list[tuple[int, ...]] = [()] if step.chunk is not None else neighbours(step.decode)
        for number, run in enumerate(runs):
            super().submit(
                replace(
                    step,
                    starts=step.starts if number == 0 else (),
                    decode=run,
                    given=tuple(given[slot] for slot in run if given),
                )
            )
            if masks is not None:
                super().choose(masks)
        self._passes.append(len(runs))

    def collect(self) -> Outcome:
        if not self._native:
            return super().collect()
        parts = [super(TensorRtSession, self).collect() for _ in range(self._passes.popleft())]
        return Outcome(choices={s: c for part in parts for s, c in part.choices.items()}, logits=parts[0].logits)

    def _variant(self) -> Any:
        return self._arranged[0] if self._native else None

    def _make_contexts(self, trt: Any) -> list[Any]:
        """One context for each profile (network.add_profiles); they share their scratch memory: one runs at a time."""
        engine = self._engine
        size: Any = getattr(engine, "device_memory_size_v2", None) or getattr(engine, "device_memory_size", 0)
        arena = self._arena(int(size), "TensorRT's scratch memory")
        contexts = []
        phases = [phase for phase in Phase if phase is not Phase.VERIFY or self._draft_rows]
        for phase in phases:
            if hasattr(engine, "create_execution_context_without_device_memory"):
                context = engine.create_execution_context_without_device_memory()
            else:
                context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            context.device_memory = arena.address
            if not context.set_optimization_profile_async(phase, int(self._stream)):
                raise RuntimeError(f"TensorRT has no profile {phase.value}: {self._log.first_error}")
            contexts.append(context)
        self._synchronize()
        schedule = self._plan.schedule
        workspaces = {workspace_input(schedule, kind): each.address for kind, each in self._workspaces.items()}
        for context, phase in zip(contexts, phases):
            for name in self._names:
                # A decode step's token is at position `past`.
                buffers = BUFFERS[phase] | ({"positions": "past"} if phase is Phase.DECODE else {})
                source = buffers.get(name, name).removesuffix(".updated")
                address = workspaces.get(name) or self._memory[source]
                context.set_tensor_address(name, int(address))
        return contexts

    def _join_nccl(self, engine: Engine) -> None:
        if self._comm is None or engine.build["collective"] != "nccl":
            return
        from cqil_trt.backends.tensorrt.nccl import communicator

        handle = communicator(self._comm)
        for context in self._contexts:
            context.set_communicator(handle)

    def _execute(self, phase: Phase, batch: int, length: int, rows: int) -> None:
        context = self._contexts[phase]
        entries = (batch,) if self._native else (batch, length if phase is Phase.VERIFY else 1)
        shapes: dict[str, tuple[int, ...]] = {
            "tokens": (batch, length),
            "positions": (batch, length),
            "past": entries,
            "slots": entries,
            "select": (rows,),
        }
        if self._native:
            for index, shard in self._plan.layers.items():
                shape: tuple[int, ...] = (batch, shard.num_kv_heads, self.limits.max_seq_len, self._plan.model.head_dim)
                first = self._slot if phase is Phase.PREFILL else self._arranged[0]
                offset = first * int(np.prod(shape[1:])) * self._bytes
                for part, address in zip(("key", "value"), self._cache_parts(index)):
                    shapes[f"cache.{index}.{part}"] = shape
                    for name in (f"cache.{index}.{part}", f"cache.{index}.{part}.updated"):
                        context.set_tensor_address(name, address + offset)
        for name, shape in shapes.items():
            if name in self._names and not context.set_input_shape(name, shape):
                raise RuntimeError(f"TensorRT refuses the shape {shape} of {name}: {self._log.first_error}")
        with self._guard():
            if not context.execute_async_v3(int(self._stream)):
                raise RuntimeError(f"TensorRT could not execute the engine: {self._log.first_error}")

    def joined(self) -> bytes:
        return super().joined() if "joined" in self._names else b""

    def close(self) -> None:
        self._synchronize()
        self._contexts.clear()
        self._engine = None
        super().close()


def _use_gpu(engine: Engine, device: int) -> None:
    """Makes a GPU the current one. Raises UserError when the engine was not compiled for it."""
    cuda.use_device(device)
    found = cuda.compute_capability()
    if found not in engine.architecture.split(", "):
        raise UserError(
            f"{engine.path}: compiled for compute capability {engine.architecture}, {cuda.device_name()} has {found}: "
            "compile it for this GPU" + (" (--target)" if engine.backend_version.startswith("tensorrt_rtx") else "")
        )


def neighbours(slots: Sequence[int]) -> list[tuple[int, ...]]:
    """Sorted slots as runs without gaps."""
    runs: list[tuple[int, ...]] = []
    for slot in slots:
        if runs and runs[-1][-1] == slot - 1:
            runs[-1] += (slot,)
        else:
            runs.append((slot,))
    return runs
