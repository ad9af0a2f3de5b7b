"""Executes the decoder on a GPU with our own kernels, eagerly or while a CUDA graph is captured.

Values are matrices [rows, width] in device memory. A matrix that is no longer referenced gives its memory to the next:
kernels run in the order in which they are called, on one stream.
"""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cqil_trt.config import DTYPE_BYTES, EngineLimits
from cqil_trt.errors import JobError, UserError
from cqil_trt.gpu import abi, cuda
from cqil_trt.gpu.fused_ops import FusedOps, attention_fields, gating, norm_kind, rotary_names, square_fields
from cqil_trt.gpu.packed import DeviceMatrix
from cqil_trt.gpu.workspace import Workspace, fuses_norm, fuses_norms
from cqil_trt.network.ops import Ops
from cqil_trt.schedule import Peers
from cqil_trt.shard import LayerShard, RankPlan


class Pool:
    """Device memory by size: reuses what was given back, and allocates what is missing."""

    def __init__(self) -> None:
        self._free: dict[int, list[int]] = defaultdict(list)
        self._arenas: list[cuda.Arena] = []

    def take(self, size: int) -> int:
        free, size = self._bucket(size)
        if free:
            return free.pop()
        try:
            self._arenas.append(cuda.Arena(size, "activations"))
            return self._arenas[-1].address
        except UserError as error:
            # The other ranks are in the middle of the pass and cannot agree on an error: this ends the job.
            raise JobError(f"{error}: build with a smaller --prefill-chunk or --max-batch-size") from None

    def free(self) -> None:
        for arena in self._arenas:
            arena.free()

    def give(self, address: int, size: int) -> None:
        self._bucket(size)[0].append(address)

    def _bucket(self, size: int) -> tuple[list[int], int]:
        """Powers of two, so that prompts of many lengths share the same memory."""
        size = max(cuda.ALIGNMENT, 1 << (size - 1).bit_length())
        return self._free[size], size


@dataclass(eq=False)
class Matrix:
    """Device memory of `rows` rows of `width` elements; returns to `pool` when the last reference is gone."""

    address: int
    rows: int
    width: int
    size: int = field(default=0, kw_only=True)
    pool: Pool | None = field(default=None, repr=False, kw_only=True)

    def __del__(self) -> None:
        if self.pool is not None:
            self.pool.give(self.address, self.size)


class _Collectives(Ops[Matrix]):
    """Joins ranks by the kernels of collectives.cu."""

    _workspaces: Mapping[Peers, Workspace]
    _weights: dict[str, Matrix]
    _memory: Mapping[str, int]
    _limits: EngineLimits
    _dtype: int  # cqil_dtype
    _stream: int
    _left: int  # all-reduces that are still to come in this pass

    @abstractmethod
    def _new(self, rows: int, width: int) -> Matrix:
        """Memory for a result."""

    def all_reduce_residual(self, delta: Matrix, residual: Matrix, peers: Peers = Peers.ALL) -> Matrix:
        out = self._joined(delta)
        count = delta.rows * delta.width
        self._join("all_reduce", delta.address, residual.address, out.address, count, self._dtype, peers=peers)
        return out

    def all_reduce(self, x: Matrix, peers: Peers = Peers.ALL) -> Matrix:
        out = self._joined(x)
        self._join("all_reduce", x.address, None, out.address, x.rows * x.width, self._dtype, peers=peers)
        return out

    def all_reduce_squares(self, x: Matrix, peers: Peers) -> Matrix:
        count = x.rows * x.width
        self._join("all_reduce", x.address, None, x.address, count, abi.dtype_code("float32"), peers=peers)
        return x

    def all_reduce_residual_norm(
        self, delta: Matrix, residual: Matrix, norm: str, peers: Peers = Peers.ALL
    ) -> tuple[Matrix, Matrix]:
        if self.plan.model.wide_norms and fuses_norms(delta.width, self._limits.dtype):
            return self._join_norms(delta, None, residual, norm, peers)
        if self.plan.model.wide_norms or not fuses_norm(delta.width, self._limits.dtype):
            return super().all_reduce_residual_norm(delta, residual, norm, peers)
        out, normed = self._joined(delta), self._new(delta.rows, delta.width)
        weight = self._weights[f"{norm}.weight"]
        addresses = [matrix.address for matrix in (delta, residual, weight, out, normed)]
        shape = delta.rows, delta.width, self.plan.model.rms_norm_eps, self._dtype
        self._join("all_reduce_residual_norm", *addresses, *shape, peers=peers)
        return out, normed

    def _join_norms(
        self, delta: Matrix, name: str | None, residual: Matrix, following: str | None, peers: Peers
    ) -> tuple[Matrix, Matrix]:
        """residual + the sum of delta, or its RMSNorm `name`; and the RMSNorm `following` of that, or that again."""
        out = self._joined(delta)
        normed = None if following is None else self._new(delta.rows, delta.width)
        before, after = (
            None if norm is None else self._weights[f"{norm}.weight"].address for norm in (name, following)
        )
        addresses = delta.address, before, residual.address, after, out.address, normed and normed.address
        model = self.plan.model
        shape = delta.rows, delta.width, model.rms_norm_eps, norm_kind(model), self._dtype
        self._join("all_reduce_norms", *addresses, *shape, peers=peers)
        return out, out if normed is None else normed

    def _joined(self, like: Matrix) -> Matrix:
        """Memory for an all-reduce's result. The last one goes where the session reads it."""
        self._left -= 1
        if self._left:
            return self._new(like.rows, like.width)
        return Matrix(self._memory["joined"], like.rows, like.width)

    def broadcast(self, x: Matrix | None, tokens: Matrix) -> Matrix:
        out = self._new(tokens.rows, self.plan.model.hidden_size) if x is None else x
        given, received = (None, out.address) if x is None else (out.address, None)
        self._join("broadcast", given, received, out.rows * out.width, self._dtype)
        return out

    def bypass(self, x: Matrix, d: int) -> Matrix | None:
        receives = self.plan.rank > self.plan.schedule.peers(Peers.PART)[0]
        out = self._new(x.rows, x.width) if receives else None
        count = x.rows * x.width
        self._join("bypass", x.address, out and out.address, count, d, self._dtype, peers=Peers.PART)
        return out

    def _join(self, name: str, *arguments: Any, peers: Peers = Peers.ALL) -> None:
        self._workspaces[peers].call(name, *arguments, self._stream)


class CudaOps(FusedOps[Matrix], _Collectives):
    """One rank's operations, enqueued on `stream`.

    Args:
        memory: addresses by name: weights, caches, rotary tables, `logits` and `joined`; with packed weights `dense`,
            room for the largest of these matrices.
        workspaces: for the kinds of peers that the rank has.
        slots: sequences that the caches hold.
        quantized: the projections whose weights in `memory` were quantized, by name.
    """

    def __init__(
        self,
        plan: RankPlan,
        limits: EngineLimits,
        memory: Mapping[str, int],
        workspaces: Mapping[Peers, Workspace],
        kernels: ctypes.CDLL,
        stream: int,
        slots: int,
        quantized: Mapping[str, DeviceMatrix] | None = None,
    ):
        self.plan = plan
        self._limits, self._memory, self._workspaces = limits, memory, workspaces
        self._cached = slots
        self._kernels, self._stream = kernels, stream
        self._bytes, self._dtype = DTYPE_BYTES[limits.dtype], abi.dtype_code(limits.dtype)
        self._pool = Pool()
        quantized = quantized or {}
        self._packed = {name: matrix for name, matrix in quantized.items() if matrix.packed}
        self._few_packed = kernels.cqil_packed_rows() if self._packed else 0
        parts = {part for matrix in quantized.values() for part in matrix.parts}
        self._weights = {
            name: Matrix(memory[name], shape[0] if len(shape) > 1 else 1, shape[-1])
            for name, shape in plan.shapes.items()
            if name not in parts
        }
        for matrix in quantized.values():
            self._weights[matrix.parts[0]] = Matrix(memory[matrix.parts[0]], matrix.rows, matrix.inputs)

    def begin(self, batch: int, length: int, past: int, slots: int, logits: int, decodes: bool = False) -> None:
        """Sets up the next pass; it reads the addresses `past` and `slots`, and writes the address `logits`.

        `decodes`: it is a decode step, whose tokens after the first ones are drafts.
        """
        self._batch, self._length, self._past, self._slots, self._logits = batch, length, past, slots, logits
        self._decodes = decodes
        self._left = self.plan.stream_all_reduces

    def close(self) -> None:
        """Gives back the memory of activations."""
        self._pool.free()

    def _new(self, rows: int, width: int) -> Matrix:
        size = rows * width * self._bytes
        return Matrix(self._pool.take(size), rows, width, size=size, pool=self._pool)

    def _call(self, name: str, *arguments: Any) -> None:
        given = [argument.address if isinstance(argument, Matrix) else argument for argument in arguments]
        if getattr(self._kernels, f"cqil_{name}")(*given, self._stream):
            raise RuntimeError(f"{name}: {self._kernels.cqil_last_error().decode()}")

    def embedding(self, tokens: Matrix) -> Matrix:
        return self.rows(self._weights["embedding.weight"], tokens)

    def select(self, x: Any, indices: Matrix) -> Any:
        # A decode step predicts from all of its tokens, and one token leaves no choice.
        return x if self._decodes or self._length == 1 else super().select(x, indices)

    def rows(self, x: Matrix, indices: Matrix) -> Matrix:
        out = self._new(indices.rows, x.width)
        self._call("gather_rows", x, indices, out, out.rows, out.width, self._dtype)
        return out

    def fused_project(
        self,
        x: Matrix,
        name: str,
        norm: str | None = None,
        delta: Matrix | None = None,
        residual: Matrix | None = None,
        gated: str | None = None,
        scale: float = 1.0,
    ) -> Matrix:
        return self._project(x, name, norm, delta, residual, gated, scale, None)

    def project_and_add(self, x: Matrix, name: str, residual: Matrix, scale: float) -> tuple[Matrix, Matrix]:
        total = self._new(residual.rows, residual.width)
        return self._project(x, name, None, None, residual, None, scale, total), total

    def _project(
        self,
        x: Matrix,
        name: str,
        norm: str | None,
        delta: Matrix | None,
        residual: Matrix | None,
        gated: str | None,
        scale: float,
        total: Matrix | None,
    ) -> Matrix:
        """With `total`, the residual is added there, and not to the result."""
        weight, bias = self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias")
        outputs = weight.rows // 2 if gated else weight.rows
        out = Matrix(self._logits, x.rows, outputs) if name == "lm_head" else self._new(x.rows, outputs)
        packed = self._packed.get(name)
        if packed is not None and x.rows > self._few_packed:
            weight, packed = self._unpacked(packed, weight), None
        norm_weight = None if norm is None else self._weights[f"{norm}.weight"]
        eps = self.plan.model.rms_norm_eps
        fields: dict[str, float] = {"gated": gating(gated), "scale": 0.0 if scale == 1 else scale}
        if packed is not None:
            shape = packed.shape(x.rows, eps, **fields)
        else:
            sizes = {"rows": x.rows, "outputs": outputs, "inputs": x.width}
            shape = abi.cqil_linear_shape(**sizes, **fields, dtype=self._dtype, eps=eps)
        scratch = self._scratch(self._kernels.cqil_linear_scratch_bytes(shape))
        self._call("linear", shape, x, delta, weight, bias, norm_weight, residual, out, total, scratch)
        return out

    def _unpacked(self, packed: DeviceMatrix, weight: Matrix) -> Matrix:
        """A dense copy of packed weights, until the next one."""
        dense = Matrix(self._memory["dense"], weight.rows, weight.width)
        self._call("unpack", packed.shape(), weight, dense)
        return dense

    def _scratch(self, size: int) -> Matrix:
        return Matrix(self._pool.take(size), 1, size, size=size, pool=self._pool)

    def fused_norm(self, x: Matrix, delta: Matrix | None, name: str) -> Matrix:
        weight = self._weights[f"{name}.weight"]
        out, total = self._new(x.rows, x.width), None if delta is None else self._new(x.rows, x.width)
        self._call("residual_norm", delta, None, x, weight, total, out, *self._norm_shape(x))
        return out

    def fused_post_norm(
        self, delta: Matrix, name: str, residual: Matrix, following: str | None
    ) -> tuple[Matrix, Matrix]:
        total = self._new(delta.rows, delta.width)
        normed = total if following is None else self._new(delta.rows, delta.width)
        weights = [None if norm is None else self._weights[f"{norm}.weight"] for norm in (name, following)]
        shape = self._norm_shape(delta)
        self._call("residual_norm", delta, weights[0], residual, weights[1], total, normed, *shape)
        return total, normed

    def fused_join_norm(
        self, delta: Matrix, peers: Peers, name: str, residual: Matrix, following: str | None
    ) -> tuple[Matrix, Matrix]:
        if not fuses_norms(delta.width, self._limits.dtype):
            return super().fused_join_norm(delta, peers, name, residual, following)
        return self._join_norms(delta, name, residual, following, peers)

    def _norm_shape(self, x: Matrix) -> tuple[int | float, ...]:
        model = self.plan.model
        return x.rows, x.width, model.rms_norm_eps, norm_kind(model), self._dtype

    def fused_scale(self, x: Matrix, factor: float, cap: float | None) -> Matrix:
        out = x if x.address == self._logits else self._new(x.rows, x.width)
        self._call("scale", x, out, x.rows * x.width, factor, cap or 0.0, self._dtype)
        return out

    def fused_add(self, x: Matrix, y: Matrix) -> Matrix:
        out = self._new(x.rows, x.width)
        self._call("add", x, y, out, x.rows * x.width, self._dtype)
        return out

    def zeros_like(self, x: Matrix) -> Matrix:
        x = self.keep(x)
        out = self._new(x.rows, x.width)
        cuda.call("MemsetAsync", out.address, 0, out.size, self._stream)
        return out

    def attention(self, qkv: Matrix, positions: Any, shard: LayerShard) -> Matrix:
        qkv, fields = self.keep(qkv), attention_fields(self.plan.model, shard, self._limits, self._cached)
        tokens = {"batch": self._batch, "length": self._length, "drafts": self._decodes}
        shape = abi.cqil_attention_shape(**tokens, **fields, dtype=self._dtype)
        norms: list[Matrix | None] = [self._weights[name] for name in self.head_norms(shard)]
        norms = norms or [None, None]
        model, which = self.plan.model, self.plan.model.rope_of(shard.index)
        tables = [None, None] if which is None else [self._memory[name] for name in rotary_names(which)]
        squares = None
        if model.joint_qk_norm:
            squares = self.head_squares(qkv, None, qkv, shard)
            if shard.parts > 1:
                squares = self.all_reduce_squares(squares, self.sharing(shard))
        cache = self._memory[f"cache.{shard.index}"]
        out = self._new(qkv.rows, shard.num_heads * model.head_dim)
        scratch = self._scratch(self._kernels.cqil_attention_scratch_bytes(shape))
        inputs = qkv, self._past, self._slots, *tables, *norms, squares
        self._call("attention", shape, *inputs, cache, out, scratch)
        return out

    def head_squares(self, q: Any, k: Any, like: Any, shard: LayerShard) -> Matrix:
        """Means over all heads of the model instead of sums, as cqil_attention takes them; q: the whole qkv."""
        rows = self.keep(like).rows
        size = rows * 2 * 4
        out = Matrix(self._pool.take(size), rows, 2, size=size, pool=self._pool)
        self._call("head_squares", q, out, rows, *square_fields(self.plan.model, shard).values(), self._dtype)
        return out

    def zeros_after(self, x: Any, squares: Matrix) -> Matrix:
        return self.zeros_like(x)  # kernels run in the order in which they are called
