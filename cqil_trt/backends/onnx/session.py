"""Executes a rank's ONNX file with ONNX's reference evaluator, in numpy, with collectives over MPI.

It shows that the file computes what it should, slowly: a node at a time, and over the whole KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx.model_container import ModelContainer
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from cqil_trt.backends.onnx.network import DOMAIN, TYPES
from cqil_trt.collectives import split
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.gpu.workspace import workspace_input
from cqil_trt.session import HostSession, available_memory, cache_bytes, fitting_slots


class OnnxSession(HostSession):
    """Executes on the CPU in numpy, with collectives over MPI."""

    def __init__(self, engine: Engine, comm: Any, slots: int):
        self._comm = comm
        rank = 0 if comm is None else comm.Get_rank()
        free = available_memory() // 2 // engine.world_size
        super().__init__(engine, rank, fitting_slots(slots, free, cache_bytes(engine, rank), comm))
        schedule = self._plan.schedule
        joined = [] if comm is None else list(split(comm, self._plan.peers).items())
        network, path = ModelContainer(), engine.rank_file(rank, "onnx")
        try:
            network.load(str(path))
        except onnx.checker.ValidationError as error:  # the weights are a link
            raise UserError(f"{path}: cannot be loaded ({error})") from None
        # What the workspaces hold here: the numbers of the communicators that the collectives use.
        self._workspaces = {workspace_input(schedule, kind): np.array([i]) for i, (kind, _) in enumerate(joined)}
        operators = _collectives([communicator for _, communicator in joined])
        self._evaluator = ReferenceEvaluator(network, new_ops=[RMSNormalization, *operators])
        self._last: np.ndarray = np.zeros(0, np.float32)
        self._joined = np.zeros(0, np.float32)
        length, dim = self.limits.max_seq_len, self._plan.model.head_dim
        dtype = onnx.helper.tensor_dtype_to_np_dtype(TYPES[self.limits.cache_dtype])
        self._cache = {
            f"cache.{index}.{part}": np.zeros((self.slots, shard.num_kv_heads, length, dim), dtype)
            for index, shard in self._plan.layers.items()
            if shard.num_heads
            for part in ("key", "value")
        }

    def _forward(
        self, tokens: np.ndarray, past: np.ndarray, select: np.ndarray, slots: np.ndarray, length: int | None
    ) -> None:
        # The evaluator ignores inputs that a rank's graph does not have.
        inputs = {"tokens": tokens, "past": past, "select": select, **self._workspaces}
        caches = {name: cache[slots] for name, cache in self._cache.items()}
        inputs = {name: value.astype(np.int32) for name, value in inputs.items()} | caches
        # Its sigmoid computes exp in both branches, and it overflows in the unused one.
        with np.errstate(over="ignore", invalid="ignore"):
            outputs = dict(zip(self._evaluator.output_names, self._evaluator.run(None, inputs)))
        for name, cache in self._cache.items():
            cache[slots] = outputs[f"{name}.updated"]
        self._joined = outputs.get("joined", self._joined)
        self._last = outputs.get("logits", np.zeros((*select.shape, 0), np.float32))

    def _last_logits(self) -> np.ndarray:
        return self._last

    def _copy(self, source: int, target: int, count: int) -> None:
        for cache in self._cache.values():
            cache[target, :, :count] = cache[source, :, :count]

    def _greedy(self, count: int) -> np.ndarray:
        last = self._last[:, -count:]
        values, tokens = np.full(last.shape[:2], -np.inf), np.zeros(last.shape[:2], np.int64)
        if last.shape[2]:
            values, tokens = last.max(axis=2), self._offset + last.argmax(axis=2)
        by_rank = _all_gather(self._comm, (values, tokens))
        values, tokens = np.stack([part[0] for part in by_rank]), np.stack([part[1] for part in by_rank])
        # Lower ranks have smaller token ids: the first of equal values wins.
        return np.take_along_axis(tokens, values.argmax(axis=0)[None], axis=0)[0]

    def _gather(self, columns: np.ndarray) -> np.ndarray:
        return np.concatenate(_all_gather(self._comm, columns), axis=1)

    def joined(self) -> bytes:
        return self._joined.tobytes()


def _all_gather(comm: Any, value: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    return [value] if comm is None else comm.allgather(value)


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    wide = x.astype(np.float32)
    wide = wide / np.sqrt(np.square(wide).mean(axis=-1, keepdims=True) + np.float32(eps))
    return wide.astype(x.dtype) * weight


class RMSNormalization(OpRun):
    """The operator as the standard defines it. The evaluator's own version squares in x's type: float16 overflows."""

    def _run(self, x: Any, weight: Any, epsilon: Any = None, **_: Any) -> tuple[Any]:
        return (_rms_norm(x, weight, epsilon),)


def _ordered_sum(parts: list[np.ndarray]) -> np.ndarray:
    """The sum in float32, in this order."""
    total = parts[0].astype(np.float32)
    for part in parts[1:]:
        total = total + part.astype(np.float32)
    return total


def _collectives(communicators: Sequence[Any]) -> list[type[OpRun]]:
    """The custom operators over the mpi4py communicator whose number their workspace holds.

    `_` takes the attributes that only TensorRT needs.
    """

    class CqilAllReduce(OpRun):
        op_domain = DOMAIN

        def _run(self, delta: Any, residual: Any, *rest: Any, mode: Any = None, eps: Any = None, **_: Any) -> Any:
            comm = communicators[(rest[-1] if rest else residual).item()]
            if mode == 0:  # the second input is the workspace
                return (_ordered_sum(comm.allgather(delta)).astype(delta.dtype),)
            total = _ordered_sum([*comm.allgather(delta), residual]).astype(delta.dtype)
            return (total,) if mode == 1 else (total, _rms_norm(total, rest[0], eps))

    class CqilBroadcast(OpRun):
        op_domain = DOMAIN

        def _run(self, x: Any, workspace: Any, **_: Any) -> tuple[Any]:
            return (communicators[workspace.item()].bcast(x, root=0),)

    class CqilBypass(OpRun):
        op_domain = DOMAIN

        def _run(self, x: Any, workspace: Any, distance: Any = None, **_: Any) -> tuple[Any]:
            comm = communicators[workspace.item()]
            rank = comm.Get_rank()
            before = comm.allgather(x)[max(0, rank - distance) : rank]
            return (_ordered_sum([np.zeros_like(x), *before]).astype(x.dtype),)

    return [CqilAllReduce, CqilBroadcast, CqilBypass]
