"""Emits the decoder into a TensorRT network definition, one or a few layers per operation.

There are two lowerings. *Native* (TensorRT 10.15 and later, TensorRT-RTX) uses TensorRT's own layers for rotary
embedding, KV-cache update and attention. *Classic* (8.5 to 10.14) uses our plugins for everything. From primitive
layers, TensorRT 8.5 compiles most of a decoder with dynamic shapes into engines that CUDA graphs cannot capture. Its
matrix products read a decode step's weights at 60% of the memory bandwidth and round more often (docs/tensorrt.md).
Networks are strongly typed where TensorRT supports it (10 and later). Collectives are our plugins, or TensorRT's
collective layer (NCCL).

The residual stream is a matrix [N, H], N = B * T, so every projection is one matrix product. Weights are inputs of the
network, not constants. So an engine is small and quick to build whatever the model's size, all profiles share the
weights, and they go from the safetensors file to the GPU unchanged.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cqil_trt.config import DTYPES, EngineLimits
from cqil_trt.gpu import abi, tensorrt_plugins
from cqil_trt.gpu.fused_ops import (
    DRAFT_ROWS,
    FusedOps,
    attention_fields,
    gating,
    norm_kind,
    rotary_names,
    square_fields,
)
from cqil_trt.gpu.packed import quantized_matrices
from cqil_trt.gpu.workspace import fuses_norm, workspace_input
from cqil_trt.network.decoder import decode
from cqil_trt.network.ops import Ops
from cqil_trt.network.rotary import rotary_tables
from cqil_trt.schedule import Peers
from cqil_trt.shard import LayerShard, RankPlan

Tensor = Any  # an ITensor of tensorrt or tensorrt_rtx


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """What a network may use. `native`, `typed`: see above; `plugins`: our plugins; `nccl`: the collective layer."""

    native: bool
    typed: bool
    plugins: bool
    nccl: bool

    @classmethod
    def of(cls, trt: Any) -> Lowering:
        """What the package (tensorrt or tensorrt_rtx) can do."""
        network = trt.INetworkDefinition
        layers = ("add_rotary_embedding", "add_kv_cache_update", "add_attention_v2")
        return cls(
            native=all(hasattr(network, layer) for layer in layers),
            typed=hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"),
            plugins=hasattr(network, "add_plugin_v2"),
            nccl=hasattr(network, "add_dist_collective"),
        )


@dataclass(frozen=True)
class TensorRtPositions:
    """Native: positions of the new tokens, int64 [B, T], and the keys they see, bool [B, 1, T, S].

    `windowed`: those that they see in layers with a window.
    """

    index: Tensor
    mask: Tensor
    windowed: Tensor


class TensorRtOps(Ops[Tensor]):
    """What both lowerings share: adds layers to `network`.

    Keep the object until the engine is built: TensorRT reads its arrays then.

    Args:
        trt: the package that made the network, tensorrt or tensorrt_rtx.
        rotary: as in `Engine`.
        nccl: join ranks by TensorRT's collective layer instead of our plugins.
        kernels: the kernel library, for the GPU that the network is for; None: quantized weights are dequantized when
            the engine is loaded.
    """

    _entries: tuple[int, ...] = (-1,)  # the shape of `past`

    def __init__(
        self,
        trt: Any,
        network: Any,
        lowering: Lowering,
        plan: RankPlan,
        limits: EngineLimits,
        rotary: Sequence[float],
        nccl: bool,
        kernels: Any = None,
    ):
        self.plan = plan
        self.outputs: dict[str, Tensor] = {}
        self._shape_dtype: Any = None  # of shape tensors; it differs between versions
        self._trt, self._network, self._lowering, self._limits = trt, network, lowering, limits
        self._dtype = getattr(trt, limits.dtype)
        # The type of every tensor, by name: a weakly typed network does not know it before it is built.
        self._types: dict[str, Any] = {}
        self._kept: list[Any] = []
        self._weights: dict[str, Tensor] = {}
        # Not those of codes, some of which TensorRT lacks.
        self._dtypes = {tensor.name: getattr(trt, tensor.dtype) for tensor in plan.tensors if tensor.dtype in DTYPES}

        self.tokens = self._input("tokens", trt.int32, (-1, -1))
        self.past = self._input("past", trt.int32, self._entries)
        self.select_rows = self._input("select", trt.int32, (-1,)) if plan.schedule.predicts else None
        self._nccl = nccl
        self._quantized = quantized_matrices(plan, None if lowering.native else kernels)
        self._workspaces: dict[str, Tensor] = {}
        self._with_heads = {index: shard for index, shard in plan.layers.items() if shard.num_heads}
        self._define_caches(rotary)

    @abstractmethod
    def _define_caches(self, rotary: Sequence[float]) -> None:
        """Adds the inputs that attention needs."""

    # Helpers that add layers

    def _input(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Tensor:
        tensor = self._network.add_input(name, dtype, shape)
        self._types[name] = dtype
        return tensor

    def _constant(self, array: np.ndarray) -> Tensor:
        array = np.ascontiguousarray(array)
        self._kept.append(array)
        layer = self._network.add_constant(self._trt.Dims(array.shape), self._trt.Weights(array))
        out = layer.get_output(0)
        self._types[out.name] = out.dtype
        return out

    def type_of(self, x: Tensor) -> Any:
        return self._types.get(x.name, x.dtype)

    def _out(self, layer: Any, dtype: Any, index: int = 0) -> Tensor:
        """An output of a layer that computes in `dtype`."""
        out = layer.get_output(index)
        if not self._lowering.typed and dtype in (self._trt.float32, self._trt.float16):
            layer.precision = dtype
            layer.set_output_type(index, dtype)
        self._types[out.name] = dtype
        return out

    def _elementwise(self, operation: str, x: Tensor, y: Tensor) -> Tensor:
        kind = getattr(self._trt.ElementWiseOperation, operation)
        return self._out(self._network.add_elementwise(x, y, kind), self.type_of(x))

    def _unary(self, operation: str, x: Tensor) -> Tensor:
        return self._out(self._network.add_unary(x, getattr(self._trt.UnaryOperation, operation)), self.type_of(x))

    def _cast(self, x: Tensor, dtype: Any) -> Tensor:
        if self.type_of(x) == dtype:
            return x
        if hasattr(self._network, "add_cast"):
            return self._out(self._network.add_cast(x, dtype), dtype)
        layer = self._network.add_identity(x)
        layer.set_output_type(0, dtype)
        return self._out(layer, dtype)

    def _dims(self, *sizes: int | Tensor) -> Tensor:
        """A shape of constants and of shape tensors [1]."""
        kind = np.int64 if self._shape_dtype == getattr(self._trt, "int64", None) else np.int32
        parts = [self._constant(np.array([size], kind)) if isinstance(size, int) else size for size in sizes]
        return self._network.add_concatenation(parts).get_output(0)

    def _reshape(self, x: Tensor, dims: Sequence[int] | Tensor, then: tuple[int, ...] | None = None) -> Tensor:
        """In numbers, 0 keeps a dimension and -1 infers one; `then` permutes the result."""
        layer = self._network.add_shuffle(x)
        if isinstance(dims, (tuple, list)):
            layer.reshape_dims = tuple(dims)
        else:
            layer.set_input(1, dims)
        if then is not None:
            layer.second_transpose = then
        return self._out(layer, self.type_of(x))

    def _permute(self, x: Tensor, order: tuple[int, ...]) -> Tensor:
        layer = self._network.add_shuffle(x)
        layer.first_transpose = order
        return self._out(layer, self.type_of(x))

    def _span(self, x: Tensor, axis: int, first: int, last: int) -> Tensor:
        """x[..., first:last, ...] along `axis`, whose size is known; the other axes keep theirs."""
        shape = tuple(x.shape)
        start = tuple(first if i == axis else 0 for i in range(len(shape)))
        sizes = [last - first if i == axis else size for i, size in enumerate(shape)]
        layer = self._network.add_slice(x, start, [max(size, 0) for size in sizes], (1,) * len(shape))
        if min(sizes) < 0:
            whole = self._network.add_shape(x).get_output(0)
            dynamic = [
                self._network.add_slice(whole, (i,), (1,), (1,)).get_output(0) if size < 0 else size
                for i, size in enumerate(sizes)
            ]
            layer.set_input(2, self._dims(*dynamic))
        return self._out(layer, self.type_of(x))

    def _gather(self, x: Tensor, indices: Tensor, axis: int) -> Tensor:
        return self._out(self._network.add_gather(x, indices, axis), self.type_of(x))

    def _scalar(self, value: float, rank: int, dtype: Any) -> Tensor:
        return self._cast(self._constant(np.full((1,) * rank, value, np.float32)), dtype)

    # Parameters and inputs

    def _weight(self, name: str) -> Tensor:
        if name not in self._weights:
            matrix = self._quantized.get(name.removesuffix(".weight"))
            dtype, shape = self._dtypes.get(name, self._dtype), self.plan.shapes[name]
            if matrix is not None and name.endswith(".weight"):
                packed = self._trt.int32, (1,)  # what the plugin finds at its address
                dtype, shape = packed if matrix.packed else (self._dtype, (matrix.rows, matrix.inputs))
            self._weights[name] = self._input(name, dtype, shape)
        return self._weights[name]

    def _bias(self, name: str) -> Tensor | None:
        """The bias of the projection `name`; None without one."""
        return self._weight(f"{name}.bias") if f"{name}.bias" in self.plan.shapes else None

    # Collectives

    def _plugin(self, name: str, inputs: list[Tensor], outputs: int, /, **fields: int | float) -> list[Tensor]:
        """`fields`: without `dtype` it is the engine's."""
        fields.setdefault("dtype", abi.dtype_code(self._limits.dtype))
        dtype = next(name for name in DTYPES if abi.dtype_code(name) == fields["dtype"])
        plugin = tensorrt_plugins.create(self._trt, name, fields)
        layer = self._network.add_plugin_v2(inputs, plugin)
        # No layer precision: it would apply to integer inputs too. The plugin accepts only the type of its field.
        found = [layer.get_output(i) for i in range(outputs)]
        self._types |= {tensor.name: getattr(self._trt, dtype) for tensor in found}
        return found

    def _workspace(self, peers: Peers) -> Tensor:
        name = workspace_input(self.plan.schedule, peers)
        if name not in self._workspaces:
            self._workspaces[name] = self._input(name, self._trt.int32, (1,))
        return self._workspaces[name]

    def _collective(self, x: Tensor, operation: str, reduce: str = "NONE", root: int = -1) -> Tensor:
        trt = self._trt
        kind, reduction = getattr(trt.CollectiveOperation, operation), getattr(trt.ReduceOperation, reduce)
        layer = self._network.add_dist_collective(x, kind, reduction, root, [])
        layer.num_ranks = self.plan.world_size
        return self._out(layer, self.type_of(x))

    def _sum_of(self, x: Tensor, ranks: Sequence[int]) -> Tensor:
        """The sum of these ranks' x [N, W], float32, by TensorRT's collective layer."""
        if len(ranks) == self.plan.world_size:
            # NCCL has its own order of summation, the same on every rank.
            return self._collective(self._cast(x, self._trt.float32), "ALL_REDUCE", "SUM")
        return self._gathered_sum(x, ranks)

    def _gathered_sum(self, x: Tensor, ranks: Sequence[int]) -> Tensor:
        """As `_sum_of` for x [..., W], [N, W]: all ranks gather, and each adds up the parts it needs.

        For subsets of the ranks, on which TensorRT has no collective.
        """
        wide = self._cast(x, self._trt.float32)
        parts = self._collective(self._reshape(wide, (1, -1, x.shape[-1])), "ALL_GATHER")
        needed = [1.0 if source in ranks else 0.0 for source in range(self.plan.world_size)]
        kept = self._elementwise("PROD", parts, self._constant(np.array(needed, np.float32).reshape(-1, 1, 1)))
        reduce = self._network.add_reduce(kept, self._trt.ReduceOperation.SUM, 1, False)
        return self._out(reduce, self._trt.float32)

    def all_reduce_residual(self, delta: Tensor, residual: Tensor, peers: Peers = Peers.ALL) -> Tensor:
        if self._nccl:
            wide = self._sum_of(delta, self.plan.schedule.peers(peers))
            out = self._cast(self.add(wide, self._cast(residual, self._trt.float32)), self.type_of(residual))
        else:
            [out] = self._plugin("CqilAllReduce", [delta, residual, self._workspace(peers)], 1, mode=1, eps=0.0)
        if peers is Peers.ALL:
            self.outputs["joined"] = out
        return out

    def all_reduce_residual_norm(
        self, delta: Tensor, residual: Tensor, norm: str, peers: Peers = Peers.ALL
    ) -> tuple[Tensor, Tensor]:
        fused = not self.plan.model.wide_norms and fuses_norm(self.plan.model.hidden_size, self._limits.dtype)
        if self._nccl or not fused:
            return super().all_reduce_residual_norm(delta, residual, norm, peers)
        inputs = [delta, residual, self._weight(f"{norm}.weight"), self._workspace(peers)]
        out, normed = self._plugin("CqilAllReduce", inputs, 2, mode=2, eps=self.plan.model.rms_norm_eps)
        if peers is Peers.ALL:
            self.outputs["joined"] = out
        return out, normed

    def all_reduce(self, x: Tensor, peers: Peers = Peers.ALL) -> Tensor:
        if self._nccl:
            out = self._cast(self._sum_of(x, self.plan.schedule.peers(peers)), self.type_of(x))
        else:
            [out] = self._plugin("CqilAllReduce", [x, self._workspace(peers)], 1, mode=0, eps=0.0)
        if peers is Peers.ALL:
            self.outputs["joined"] = out
        return out

    def broadcast(self, x: Tensor | None, tokens: Tensor) -> Tensor:
        hidden = self.plan.model.hidden_size
        if not self._nccl:
            inputs = [tokens if x is None else x, self._workspace(Peers.ALL)]
            return self._plugin("CqilBroadcast", inputs, 1, rank=self.plan.rank, hidden=hidden, flat=int(x is None))[0]
        if x is None:  # something of the right shape and type to receive into
            zeros = self._constant(np.zeros((1, hidden), np.float32))
            rows = self._reshape(self._cast(tokens, self._trt.float32), (-1, 1))
            x = self._cast(self._elementwise("PROD", rows, zeros), self._dtype)
        # TensorRT refuses to broadcast bfloat16.
        wide = self._trt.float32 if self._limits.dtype == "bfloat16" else self._dtype
        return self._cast(self._collective(self._cast(x, wide), "BROADCAST", root=0), self._dtype)

    def bypass(self, x: Tensor, d: int) -> Tensor:
        """In the first layer zeros: a layer with an unused result would be removed, and its sending with it."""
        if not self._nccl:
            return self._plugin("CqilBypass", [x, self._workspace(Peers.PART)], 1, distance=d)[0]
        earlier = [rank for rank in self.plan.schedule.peers(Peers.PART) if rank < self.plan.rank]
        return self._cast(self._sum_of(x, earlier[-d:]), self.type_of(x))


class NativeOps(TensorRtOps):
    """TensorRT's own layers for everything except, where possible, the collectives."""

    def _define_caches(self, rotary: Sequence[float]) -> None:
        trt, network, length = self._trt, self._network, self._limits.max_seq_len
        self._positions = self._input("positions", trt.int32, (-1, -1))
        model = self.plan.model
        dim = model.head_dim
        self._caches = {
            (index, part): self._input(f"cache.{index}.{part}", self._dtype, (-1, shard.num_kv_heads, length, dim))
            for index, shard in self._with_heads.items()
            for part in ("key", "value")
        }
        shape = network.add_shape(self.tokens).get_output(0)
        self._shape_dtype = shape.dtype
        self._batch, self._length = (network.add_slice(shape, (i,), (1,), (1,)).get_output(0) for i in (0, 1))
        # numpy has no bfloat16: the network rounds.
        self._tables = [
            [self._cast(self._constant(table), self._dtype) for table in rotary_tables(model, rotary, length, i)]
            for i in range(len(model.ropes))
        ]

    def positions(self, tokens: Tensor, past: Tensor) -> TensorRtPositions:
        trt = self._trt
        keys = self._constant(np.arange(self._limits.max_seq_len, dtype=np.int32).reshape(1, 1, 1, -1))
        queries = self._reshape(self._positions, self._dims(self._batch, 1, self._length, 1))
        mask = self._unary("NOT", self._compare("GREATER", keys, queries))
        index, windowed, window = self._cast(self._positions, trt.int64), mask, self.plan.model.sliding_window
        if window is not None and window < self._limits.max_seq_len:
            beyond = self._elementwise("SUB", queries, self._constant(np.full((1, 1, 1, 1), window, np.int32)))
            windowed = self._elementwise("AND", mask, self._compare("GREATER", keys, beyond))
        return TensorRtPositions(index, mask, windowed)

    def _compare(self, operation: str, x: Tensor, y: Tensor) -> Tensor:
        kind = getattr(self._trt.ElementWiseOperation, operation)
        return self._out(self._network.add_elementwise(x, y, kind), self._trt.bool)

    def embedding(self, tokens: Tensor) -> Tensor:
        return self._gather(self._weight("embedding.weight"), self._reshape(tokens, (-1,)), 0)

    def project(self, x: Tensor, name: str) -> Tensor:
        kind, weight, bias = self._trt.MatrixOperation, self._weight(f"{name}.weight"), self._bias(name)
        out = self._out(self._network.add_matrix_multiply(x, kind.NONE, weight, kind.TRANSPOSE), self.type_of(x))
        return out if bias is None else self.add(out, self._reshape(bias, (1, -1)))

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        weight, model = self._weight(f"{name}.weight"), self.plan.model
        rank, dtype = len(x.shape), self.type_of(x)
        wide = self._cast(x, self._trt.float32)
        mean = self._reduced("AVG", self._elementwise("PROD", wide, wide), 1 << (rank - 1))
        normed = self._elementwise("DIV", wide, self._deviation(mean))
        weight = self._reshape(weight, (1,) * (rank - 1) + (-1,))
        if not model.wide_norms:
            return self._elementwise("PROD", self._cast(normed, dtype), weight)
        weight = self._cast(weight, self._trt.float32)
        if model.offset_norms:
            weight = self._elementwise("SUM", weight, self._scalar(1.0, rank, self._trt.float32))
        return self._cast(self._elementwise("PROD", normed, weight), dtype)

    def _reduced(self, operation: str, x: Tensor, axes: int) -> Tensor:
        """float32 x reduced along axes (bits), which remain with size 1."""
        reduce = self._network.add_reduce(x, getattr(self._trt.ReduceOperation, operation), axes, True)
        return self._out(reduce, self._trt.float32)

    def _deviation(self, mean: Tensor) -> Tensor:
        """What a norm divides by, of a float32 mean of squares."""
        shifted = self._scalar(self.plan.model.rms_norm_eps, len(mean.shape), self._trt.float32)
        return self._unary("SQRT", self._elementwise("SUM", mean, shifted))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._elementwise("SUM", x, y)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        half = gate_up.shape[-1] // 2
        gate, up = self._span(gate_up, 1, 0, half), self._span(gate_up, 1, half, 2 * half)
        sigmoid = self._activation("SIGMOID", gate)
        return self._elementwise("PROD", self._elementwise("PROD", gate, sigmoid), up)

    def geglu(self, gate_up: Tensor) -> Tensor:
        half = gate_up.shape[-1] // 2
        gate, up = self._span(gate_up, 1, 0, half), self._span(gate_up, 1, half, 2 * half)
        return self._elementwise("PROD", self._activation("GELU_TANH", gate), up)

    def _activation(self, kind: str, x: Tensor) -> Tensor:
        return self._out(self._network.add_activation(x, getattr(self._trt.ActivationType, kind)), self.type_of(x))

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return self._elementwise("PROD", x, self._scalar(factor, len(x.shape), self.type_of(x)))

    def soft_cap(self, x: Tensor, cap: float) -> Tensor:
        return self.scale(self._activation("TANH", self.scale(x, 1 / cap)), cap)

    def zeros_like(self, x: Tensor) -> Tensor:
        return self._elementwise("PROD", x, self._scalar(0.0, len(x.shape), self.type_of(x)))

    def select(self, x: Tensor, indices: Tensor) -> Tensor:
        """`indices` are those of `select_rows`: rows of the matrix."""
        return self._gather(x, indices, 0)

    def split_heads(self, qkv: Tensor, shard: LayerShard) -> tuple[Tensor, Tensor, Tensor]:
        ends = np.cumsum([0, shard.num_heads, shard.num_kv_heads, shard.num_kv_heads]).tolist()
        shape = self._dims(self._batch, self._length, ends[-1], self.plan.model.head_dim)
        heads = self._reshape(qkv, shape, then=(0, 2, 1, 3))
        q, k, v = (self._span(heads, 1, first, last) for first, last in zip(ends, ends[1:]))
        return q, k, v

    def head_squares(self, q: Tensor | None, k: Tensor | None, like: Tensor, shard: LayerShard) -> Tensor:
        wide, axes = self._trt.float32, 1 << 1 | 1 << 3
        first, last = shard.owned_kv_heads(self.plan.model.group_size)
        owned = None if k is None or first == last else self._span(k, 1, first, last)
        sums = []
        for x in (q, owned):
            if x is None:
                # Zeros that depend on what came before, as the order of collectives must.
                rows = self._reshape(self._span(like, 1, 0, 1), self._dims(self._batch, 1, self._length, 1))
                sums.append(self.scale(self._cast(rows, wide), 0.0))
            else:
                x = self._cast(x, wide)
                sums.append(self._reduced("SUM", self._elementwise("PROD", x, x), axes))
        layer = self._network.add_concatenation(sums)
        layer.axis = 3
        return self._out(layer, wide)

    def all_reduce_squares(self, x: Tensor, peers: Peers) -> Tensor:
        if self._nccl:
            # Not an all-reduce, with which TensorRT-RTX 1.7 crashes while it builds some networks.
            whole = self._gathered_sum(x, self.plan.schedule.peers(peers))
            return self._reshape(whole, self._dims(self._batch, 1, self._length, 2))
        fields = {"mode": 0, "eps": 0.0, "dtype": abi.dtype_code("float32")}
        return self._plugin("CqilAllReduce", [x, self._workspace(peers)], 1, **fields)[0]

    def zeros_after(self, x: Tensor, squares: Tensor) -> Tensor:
        zeros = self._reshape(self.scale(self._span(squares, 3, 0, 1), 0.0), (-1, 1))
        return self._elementwise("PROD", x, self._cast(zeros, self.type_of(x)))

    def scale_heads(self, x: Tensor, squares: Tensor, which: int, name: str) -> Tensor:
        model, wide = self.plan.model, self._trt.float32
        count = (model.num_kv_heads if which else model.num_heads) * model.head_dim
        mean = self.scale(self._span(squares, 3, which, which + 1), 1 / count)
        normed = self._elementwise("DIV", self._cast(x, wide), self._deviation(mean))
        weight = self._reshape(self._weight(f"{name}.weight"), (1, -1, 1, model.head_dim))
        return self._cast(self._elementwise("PROD", normed, self._cast(weight, wide)), self.type_of(x))

    def rotary(self, x: Tensor, positions: TensorRtPositions, which: int) -> Tensor:
        model = self.plan.model
        dim = 0 if model.rotary_dim == model.head_dim else model.rotary_dim  # 0: all of a head
        layer = self._network.add_rotary_embedding(x, *self._tables[which], False, dim)
        layer.set_input(3, positions.index)
        return self._out(layer, self.type_of(x))

    def cached_attention(
        self, q: Tensor, k: Tensor, v: Tensor, positions: TensorRtPositions, shard: LayerShard
    ) -> Tensor:
        trt, index = self._trt, shard.index
        cached = []
        for part, new in (("key", k), ("value", v)):
            layer = self._network.add_kv_cache_update(self._caches[index, part], new, self.past, trt.KVCacheMode.LINEAR)
            # The runtime binds the output to the input's memory: the cache is updated in place.
            cached.append(self._out(layer, self._dtype))
            self.outputs[f"cache.{index}.{part}.updated"] = cached[-1]
        model = self.plan.model
        q = self.scale(q, model.head_dim**-0.5 if model.query_scale is None else model.query_scale)
        if not shard.grouped:  # the layer takes grouped heads in equal groups
            q = self._gather(q, self._constant(np.array(shard.query_slots, np.int32)), 1)
        softmax, causal = trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE
        layer = self._network.add_attention_v2(q, *cached, softmax, causal)
        layer.mask = positions.mask if model.window_of(index) is None else positions.windowed
        layer.decomposable = True
        out = self._out(layer, self.type_of(q))
        if not shard.grouped:
            out = self._gather(out, self._constant(np.array(shard.slot_of, np.int32)), 1)
        return self._reshape(self._permute(out, (0, 2, 1, 3)), (-1, shard.num_heads * self.plan.model.head_dim))


class ClassicOps(FusedOps[Tensor], TensorRtOps):
    """Our plugins for everything. Caches have the layout of cqil_attention and are bound as int32 [1]."""

    _entries = (-1, -1)

    def _define_caches(self, rotary: Sequence[float]) -> None:
        trt = self._trt
        self._caches = {index: self._input(f"cache.{index}", trt.int32, (1,)) for index in self._with_heads}
        self._slots = self._input("slots", trt.int32, self._entries) if self._with_heads else None
        model = self.plan.model
        table = (self._limits.max_seq_len, model.rotary_dim // 2)
        used = {which for index in self._with_heads if (which := model.rope_of(index)) is not None}
        self._tables = {
            which: [self._input(name, trt.float32, table) for name in rotary_names(which)] for which in sorted(used)
        }

    def embedding(self, tokens: Tensor) -> Tensor:
        return self.rows(self._weight("embedding.weight"), tokens)

    def rows(self, x: Tensor, indices: Tensor) -> Tensor:
        """`indices`, whatever their shape: rows of the matrix."""
        return self._plugin("CqilGather", [x, indices], 1)[0]

    def fused_project(
        self,
        x: Tensor,
        name: str,
        norm: str | None = None,
        delta: Tensor | None = None,
        residual: Tensor | None = None,
        gated: str | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        return self._linear(x, name, norm, delta, residual, gated, scale)[0]

    def project_and_add(self, x: Tensor, name: str, residual: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        alone, total = self._linear(x, name, residual=residual, scale=scale, added=True)
        return alone, total

    def _linear(
        self,
        x: Tensor,
        name: str,
        norm: str | None = None,
        delta: Tensor | None = None,
        residual: Tensor | None = None,
        gated: str | None = None,
        scale: float = 1.0,
        added: bool = False,
    ) -> list[Tensor]:
        """`added`: the second result is the sum with the residual."""
        weight, bias = self._weight(f"{name}.weight"), self._bias(name)
        of_norm = None if norm is None else self._weight(f"{norm}.weight")
        inputs = [tensor for tensor in (x, delta, weight, bias, of_norm, residual) if tensor is not None]
        given = {"delta": delta, "bias": bias, "norm": of_norm, "residual": residual}
        fields: dict[str, int | float] = {name: int(tensor is not None) for name, tensor in given.items()}
        if scale != 1:
            fields["scale"] = float(scale)
        matrix = self._quantized.get(name)
        if matrix is not None and matrix.packed:
            shape = matrix.shape()
            fields |= {"weights": int(shape.weights), "outputs": shape.outputs, "group": shape.group}
        fields |= {"gated": gating(gated), "eps": self.plan.model.rms_norm_eps}
        if added:
            fields["sum"] = 1
        return self._plugin("CqilLinear", inputs, 1 + added, **fields)

    def fused_norm(self, x: Tensor, delta: Tensor | None, name: str) -> Tensor:
        weight = self._weight(f"{name}.weight")
        inputs = [tensor for tensor in (x, delta, weight) if tensor is not None]
        model = self.plan.model
        fields = {"delta": int(delta is not None), "eps": model.rms_norm_eps, "kind": norm_kind(model)}
        return self._plugin("CqilNorm", inputs, 1, **fields)[0]

    def fused_post_norm(
        self, delta: Tensor, name: str, residual: Tensor, following: str | None
    ) -> tuple[Tensor, Tensor]:
        model = self.plan.model
        inputs = [delta, self._weight(f"{name}.weight"), residual]
        if following is not None:
            inputs.append(self._weight(f"{following}.weight"))
        fields = {"residual": 1, "next": int(following is not None), "kind": norm_kind(model)}
        found = self._plugin("CqilPostNorm", inputs, 1 + fields["next"], **fields, eps=model.rms_norm_eps)
        return found[0], found[-1]

    def fused_scale(self, x: Tensor, factor: float, cap: float | None) -> Tensor:
        return self._plugin("CqilScale", [x], 1, factor=float(factor), cap=float(cap or 0))[0]

    def fused_add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._plugin("CqilAdd", [x, y], 1, terms=2)[0]

    def zeros_like(self, x: Tensor) -> Tensor:
        return self._plugin("CqilAdd", [self.keep(x)], 1, terms=0)[0]

    def attention(self, qkv: Tensor, positions: Any, shard: LayerShard) -> Tensor:
        model, which = self.plan.model, self.plan.model.rope_of(shard.index)
        norms = [self._weight(name) for name in self.head_norms(shard)]
        qkv = self.keep(qkv)
        squares = []
        if model.joint_qk_norm:
            squares = [self.head_squares(qkv, None, qkv, shard)]
            if shard.parts > 1:
                squares = [self.all_reduce_squares(squares[0], self.sharing(shard))]
        tables = [] if which is None else self._tables[which]
        inputs = [qkv, *tables, *norms, *squares, self.past, self._slots, self._caches[shard.index]]
        fields = attention_fields(model, shard, self._limits, self._limits.max_batch_size)
        flags = {"head_norms": model.qk_norm, "unrotated": which is None, "joint": model.joint_qk_norm}
        return self._plugin("CqilAttention", inputs, 1, **fields, **{name: int(on) for name, on in flags.items()})[0]

    def head_squares(self, q: Any, k: Any, like: Any, shard: LayerShard) -> Tensor:
        """Means over all heads of the model instead of sums, as CqilAttention takes them; q: the whole qkv."""
        fields = square_fields(self.plan.model, shard)
        [found] = self._plugin("CqilHeadSquares", [self.keep(like) if q is None else q], 1, **fields)
        self._types[found.name] = self._trt.float32
        return found

    def all_reduce_squares(self, x: Tensor, peers: Peers) -> Tensor:
        fields = {"mode": 0, "eps": 0.0, "dtype": abi.dtype_code("float32")}
        return self._plugin("CqilAllReduce", [x, self._workspace(peers)], 1, **fields)[0]

    def zeros_after(self, x: Any, squares: Tensor) -> Tensor:
        return self._plugin("CqilAdd", [self.keep(x), squares], 1, terms=0, after=1)[0]


def define_network(
    trt: Any,
    network: Any,
    lowering: Lowering,
    plan: RankPlan,
    limits: EngineLimits,
    rotary: Sequence[float],
    nccl: bool,
    kernels: Any = None,
) -> TensorRtOps:
    """Emits a rank's whole network; arguments as for `TensorRtOps`. Keep the result until the engine is built.

    Inputs: tokens int32 [B, T], past int32 [B] (classic [B, E]: E is 1, or T in a step with drafts, each token's
    position then), select int32 [R] (rows b * T + t to predict from), the rank's tensors under their names (a quantized
    matrix as one, NAME.weight: dense, or where our plugins take it packed, int32 [1]), and the plugins' workspaces
    int32 [1] (workspace, and for collectives of fewer ranks workspace.layer and workspace.part). Native: positions
    int32 [B, T], and for each layer of the rank cache.N.key and cache.N.value [B, key/value heads, S, head_dim];
    classic, where the rank has attention heads: slots int32 [B, E] (sequence b of the pass is in slot slots[b, 0] of
    the caches), cache.N int32 [1], and the rotary tables that its layers take, float32 [S, rotary_dim / 2]: rotary.cos
    and rotary.sin, and rotary.local.cos and rotary.local.sin.
    Outputs: logits [R, V] (where the rank predicts), joined [B * T, H] (the residual stream after the last all-reduce,
    where there is one), and native every cache, updated in place.
    """
    kind = NativeOps if lowering.native else ClassicOps
    ops = kind(trt, network, lowering, plan, limits, rotary, nccl, kernels)
    out = decode(ops, ops.tokens, ops.past, ops.select_rows)
    outputs = dict(ops.outputs)
    if plan.schedule.predicts:
        outputs["logits"] = out
    elif not outputs:  # a rank with nothing to do; an engine needs an output
        outputs["idle"] = network.add_identity(out).get_output(0)
    for name, tensor in outputs.items():
        dtype = ops.type_of(tensor)
        tensor.name = name
        network.mark_output(tensor)
        if not lowering.typed:  # else it would be float32, whatever the layer computes in
            tensor.dtype = dtype
    return ops


def add_profiles(trt: Any, builder: Any, config: Any, network: Any, limits: EngineLimits) -> None:
    """The optimization profiles of an engine, in the order of `gpu.session.Phase`.

    0 is for a chunk of one prompt, up to prefill_chunk tokens; 1 for decode steps, a token of each sequence; 2, with
    our plugins, for decode steps with drafts, DRAFT_ROWS tokens in all.
    """
    chunk, most = min(limits.prefill_chunk, limits.max_seq_len), limits.max_batch_size
    # Sequences at most; tokens of each at least and at most; entries of `past` for each at most.
    passes = [(1, 1, chunk, 1), (most, 1, 1, 1)]
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if any(tensor.name == "past" and len(tensor.shape) == 2 for tensor in inputs):
        passes.append((min(most, DRAFT_ROWS // 2), 2, DRAFT_ROWS, DRAFT_ROWS))
    for batch, shortest, longest, entries in passes:
        usual = min(longest, 128)
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            shape, name = tuple(tensor.shape), tensor.name
            if -1 not in shape:
                continue
            ranges: tuple[tuple[int, ...], ...]
            if name in ("tokens", "positions"):
                ranges = (1, shortest), (1, usual), (batch, longest)
            elif name in ("past", "slots") and len(shape) == 2:
                ranges = (1, min(shortest, entries)), (1, entries), (batch, entries)
            elif name == "past":
                ranges = (1,), (1,), (batch,)
            elif name == "select":
                ranges = (1,), (1,), (batch * longest,)
            else:
                ranges = tuple((b, *shape[1:]) for b in (1, 1, batch))
            profile.set_shape(name, *ranges)
        config.add_optimization_profile(profile)


def describe_network(network: Any) -> list[dict[str, Any]]:
    """Name, kind, and the names, shapes and types of the inputs and outputs of every layer."""

    def tensor(t: Any) -> dict[str, Any] | None:
        return t and {"name": t.name, "shape": list(t.shape), "dtype": str(t.dtype).rpartition(".")[2]}

    layers = []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        layers.append(
            {
                "name": layer.name,
                "type": str(layer.type).rpartition(".")[2],
                "inputs": [tensor(layer.get_input(j)) for j in range(layer.num_inputs)],
                "outputs": [tensor(layer.get_output(j)) for j in range(layer.num_outputs)],
            }
        )
    return layers
