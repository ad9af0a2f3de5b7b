"""Emits the decoder into a TensorRT network definition, one call a layer or a few.

Two lowerings of the operations that TensorRT versions differ in: *native* (TensorRT >= 10.15, 11, TensorRT-RTX), which
have rotary embedding, KV-cache update and attention as layers, and *classic* (8.5 … 10.14), which spells them in
primitive layers and our CqilKvCache plugin. Networks are strongly typed where TensorRT can do that (10 and later); 8.5
is told the type of every layer. Collectives are our plugins, or TensorRT's own collective layer (NCCL).

The residual stream is a matrix [N, H] here, N = B * T, so that every projection is one matrix product. Weights are
inputs of the network, not constants: an engine is as small and as quick to build whatever the model's size, both
profiles share them, and they go from the safetensors file to the GPU as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cqil_trt.config import EngineConfig
from cqil_trt.network.decoder import decode
from cqil_trt.network.ops import Ops
from cqil_trt.network.rotary import rotary_tables
from cqil_trt.shard import LayerShard, RankPlan

Tensor = Any  # an ITensor of whichever package provides TensorRT

_PLUGIN_NAMESPACE, _PLUGIN_VERSION = "cqil_trt", "1"
_PLUGIN_DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}  # cqil_dtype
# A key the query does not see; finite, as 0 * infinity is not a number.
_MASKED = -1e30
# The fewest cached tokens a decode step attends to in the classic lowering, where the cache's length is dynamic.
MIN_CACHE_LENGTH = 256


@dataclass(frozen=True)
class Lowering:
    """Which layers a network may have. `native`, `typed`: see above; `plugins`: whether it takes plugins."""

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
class Positions:
    """Positions of the new tokens and what they see, made once for all layers.

    Native: `index` int64 [B, T] and `mask`, bool [B, 1, T, S]. Classic: `cos` and `sin` [B, 1, T, D / 2], and `mask` to
    be added to scores, float32 [B, 1, T, S].
    """

    mask: Tensor
    index: Tensor = None
    cos: Tensor = None
    sin: Tensor = None


class TensorRtOps(Ops[Tensor]):
    """Adds layers to `network`; the object must live until the engine is built, as TensorRT reads its arrays then.

    Args:
        trt: the package that made the network, tensorrt or tensorrt_rtx.
        rotary: inverse frequencies [head_dim / 2], radians per position.
        nccl: join ranks by TensorRT's collective layer instead of our plugins.
    """

    def __init__(
        self,
        trt: Any,
        network: Any,
        lowering: Lowering,
        plan: RankPlan,
        limits: EngineConfig,
        rotary: Sequence[float],
        nccl: bool,
    ):
        self.plan = plan
        self.outputs: dict[str, Tensor] = {}
        self._trt, self._network, self._lowering, self._limits, self._nccl = trt, network, lowering, limits, nccl
        self._dtype = getattr(trt, limits.dtype)
        # What every tensor holds, by name: a weakly typed network forgets until it is built.
        self._types: dict[str, Any] = {}
        self._kept: list[Any] = []
        self._weights: dict[str, Tensor] = {}
        self._masks: dict[int, Tensor] = {}
        self._shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
        if plan.shares_embedding:
            first, last = plan.vocabulary
            self._shapes["lm_head.weight"] = (last - first, plan.model.hidden_size)

        self.tokens = self._input("tokens", trt.int32, (-1, -1))
        self.past = self._input("past", trt.int32, (-1,))
        self._positions = self._input("positions", trt.int32, (-1, -1))
        self.select_rows = self._input("select", trt.int32, (-1,)) if plan.schedule.predicts else None
        joins = plan.schedule.all_reduces + plan.schedule.broadcasts > 0
        self._workspace = self._input("workspace", trt.int32, (1,)) if joins and not nccl else None
        # The native cache layer wants to know the length.
        capacity = limits.max_seq_len if lowering.native or not lowering.plugins else -1
        self._caches = {
            (index, part): self._input(
                f"cache.{index}.{part}", self._dtype, (-1, shard.num_kv_heads, capacity, plan.model.head_dim)
            )
            for index, shard in plan.layers.items()
            if shard.num_heads
            for part in ("key", "value")
        }
        shape = network.add_shape(self.tokens).get_output(0)
        self._shape_dtype = shape.dtype
        self._batch, self._length = (network.add_slice(shape, (i,), (1,), (1,)).get_output(0) for i in (0, 1))
        tables = (table.astype(self._numpy_dtype()) for table in rotary_tables(rotary, limits.max_seq_len))
        self._cos, self._sin = (self._cast(self._constant(table), self._dtype) for table in tables)

    # Small words for layers

    def _numpy_dtype(self) -> type:
        # numpy has no bfloat16: constants are cast in the network.
        return np.float16 if self._limits.dtype == "float16" else np.float32

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

    def _type(self, x: Tensor) -> Any:
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
        return self._out(self._network.add_elementwise(x, y, kind), self._type(x))

    def _unary(self, operation: str, x: Tensor) -> Tensor:
        return self._out(self._network.add_unary(x, getattr(self._trt.UnaryOperation, operation)), self._type(x))

    def _cast(self, x: Tensor, dtype: Any) -> Tensor:
        if self._type(x) == dtype:
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
        return self._out(layer, self._type(x))

    def _permute(self, x: Tensor, order: tuple[int, ...]) -> Tensor:
        layer = self._network.add_shuffle(x)
        layer.first_transpose = order
        return self._out(layer, self._type(x))

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
        return self._out(layer, self._type(x))

    def _gather(self, x: Tensor, indices: Tensor, axis: int) -> Tensor:
        return self._out(self._network.add_gather(x, indices, axis), self._type(x))

    def _matmul(self, x: Tensor, y: Tensor, transposed: bool) -> Tensor:
        kind = self._trt.MatrixOperation
        layer = self._network.add_matrix_multiply(x, kind.NONE, y, kind.TRANSPOSE if transposed else kind.NONE)
        return self._out(layer, self._type(x))

    def _scalar(self, value: float, rank: int, dtype: Any) -> Tensor:
        return self._cast(self._constant(np.full((1,) * rank, value, np.float32)), dtype)

    # Parameters and inputs

    def weight(self, name: str) -> Tensor:
        if name not in self._weights:
            self._weights[name] = self._input(name, self._dtype, self._shapes[name])
        return self._weights[name]

    def positions(self, tokens: Tensor, past: Tensor) -> Positions:
        trt, network = self._trt, self._network
        index = self._positions
        capacity = self._limits.max_seq_len
        keys = self._constant(np.arange(capacity, dtype=np.float32).reshape(1, 1, 1, -1))
        if self._caches and min(self._any_cache().shape[1:]) < 0:
            whole = network.add_shape(self._any_cache()).get_output(0)
            room = network.add_slice(whole, (2,), (1,), (1,)).get_output(0)
            layer = network.add_slice(keys, (0, 0, 0, 0), (1, 1, 1, 0), (1, 1, 1, 1))
            layer.set_input(2, self._dims(1, 1, 1, room))
            keys = self._out(layer, trt.float32)
        queries = self._reshape(self._cast(index, trt.float32), self._dims(self._batch, 1, self._length, 1))
        greater = network.add_elementwise(keys, queries, trt.ElementWiseOperation.GREATER)
        hidden = greater.get_output(0)
        self._types[hidden.name] = trt.bool
        if self._lowering.native:
            return Positions(self._unary("NOT", hidden), index=self._cast(index, trt.int64))
        chosen = network.add_select(hidden, self._scalar(_MASKED, 4, trt.float32), self._scalar(0.0, 4, trt.float32))
        mask = self._out(chosen, trt.float32)
        shape = self._dims(self._batch, 1, self._length, self.plan.model.head_dim // 2)
        cos, sin = (self._reshape(self._gather(table, index, 0), shape) for table in (self._cos, self._sin))
        return Positions(mask, cos=cos, sin=sin)

    def _any_cache(self) -> Tensor:
        return next(iter(self._caches.values()))

    # Arithmetic

    def embedding(self, tokens: Tensor, table: Tensor) -> Tensor:
        return self._gather(table, self._reshape(tokens, (-1,)), 0)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = self._matmul(x, weight, transposed=True)
        return out if bias is None else self.add(out, self._reshape(bias, (1, -1)))

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        rank, dtype, wide = len(x.shape), self._type(x), self._cast(x, self._trt.float32)
        square = self._elementwise("PROD", wide, wide)
        reduce = self._network.add_reduce(square, self._trt.ReduceOperation.AVG, 1 << (rank - 1), True)
        mean = self._out(reduce, self._trt.float32)
        shifted = self._elementwise("SUM", mean, self._scalar(self.plan.model.rms_norm_eps, rank, self._trt.float32))
        normed = self._elementwise("DIV", wide, self._unary("SQRT", shifted))
        return self._elementwise("PROD", self._cast(normed, dtype), self._reshape(weight, (1,) * (rank - 1) + (-1,)))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._elementwise("SUM", x, y)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        half = gate_up.shape[-1] // 2
        gate, up = self._span(gate_up, 1, 0, half), self._span(gate_up, 1, half, 2 * half)
        layer = self._network.add_activation(gate, self._trt.ActivationType.SIGMOID)
        sigmoid = self._out(layer, self._type(gate))
        return self._elementwise("PROD", self._elementwise("PROD", gate, sigmoid), up)

    def zeros_like(self, x: Tensor) -> Tensor:
        return self._elementwise("PROD", x, self._scalar(0.0, len(x.shape), self._type(x)))

    def select(self, x: Tensor, indices: Tensor) -> Tensor:
        """`indices` are those of `select_rows`: rows of the matrix."""
        return self._gather(x, indices, 0)

    # Attention

    def split_heads(self, qkv: Tensor, shard: LayerShard) -> tuple[Tensor, Tensor, Tensor]:
        ends = np.cumsum([0, shard.num_heads, shard.num_kv_heads, shard.num_kv_heads]).tolist()
        shape = self._dims(self._batch, self._length, ends[-1], self.plan.model.head_dim)
        heads = self._reshape(qkv, shape, then=(0, 2, 1, 3))
        q, k, v = (self._span(heads, 1, first, last) for first, last in zip(ends, ends[1:]))
        return q, k, v

    def rotary(self, x: Tensor, positions: Positions) -> Tensor:
        if self._lowering.native:
            layer = self._network.add_rotary_embedding(x, self._cos, self._sin, False, 0)
            layer.set_input(3, positions.index)
            return self._out(layer, self._type(x))
        dim = self.plan.model.head_dim
        first, second = self._span(x, 3, 0, dim // 2), self._span(x, 3, dim // 2, dim)

        def product(half: Tensor, table: Tensor) -> Tensor:
            return self._elementwise("PROD", half, table)

        cos, sin = positions.cos, positions.sin
        halves = [
            self._elementwise("SUB", product(first, cos), product(second, sin)),
            self._elementwise("SUM", product(second, cos), product(first, sin)),
        ]
        layer = self._network.add_concatenation(halves)
        layer.axis = 3
        return self._out(layer, self._type(x))

    def cached_attention(self, q: Tensor, k: Tensor, v: Tensor, positions: Positions, shard: LayerShard) -> Tensor:
        keys, values = self._update_cache(k, v, shard.index)
        q = self._elementwise("PROD", q, self._scalar(self.plan.model.head_dim**-0.5, 4, self._type(q)))
        if not shard.grouped:  # both forms take query heads in equal groups
            q = self._gather(q, self._constant(np.array(shard.query_slots, np.int32)), 1)
        attend = self._native_attention if self._lowering.native else self._classic_attention
        out = attend(q, keys, values, positions)
        if not shard.grouped:
            out = self._gather(out, self._constant(np.array(shard.slot_of, np.int32)), 1)
        return self._reshape(self._permute(out, (0, 2, 1, 3)), (-1, shard.num_heads * self.plan.model.head_dim))

    def _update_cache(self, k: Tensor, v: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """The caches with the new keys and values; the runtime binds them to the same memory, so nothing is copied."""
        caches = [self._caches[index, part] for part in ("key", "value")]
        if self._lowering.plugins and not self._lowering.native:
            updated = self._plugin("CqilKvCache", [*caches, k, v, self.past], 2)
        else:
            linear = self._trt.KVCacheMode.LINEAR
            updated = [
                self._out(self._network.add_kv_cache_update(cache, new, self.past, linear), self._dtype)
                for cache, new in zip(caches, (k, v))
            ]
        for part, cache in zip(("key", "value"), updated):
            self.outputs[f"cache.{index}.{part}.updated"] = cache
        return updated[0], updated[1]

    def _native_attention(self, q: Tensor, keys: Tensor, values: Tensor, positions: Positions) -> Tensor:
        trt = self._trt
        softmax, causal = trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE
        layer = self._network.add_attention_v2(q, keys, values, softmax, causal)
        layer.mask = positions.mask
        layer.decomposable = True
        return self._out(layer, self._type(q))

    def _classic_attention(self, q: Tensor, keys: Tensor, values: Tensor, positions: Positions) -> Tensor:
        """The query heads of one key/value head are the rows of one product with its keys: the cache is read once."""
        dim, heads, kv_heads = self.plan.model.head_dim, q.shape[1], keys.shape[1]
        group = heads // kv_heads
        if group not in self._masks:
            layer = self._network.add_concatenation([positions.mask] * group)
            layer.axis = 2
            self._masks[group] = self._out(layer, self._trt.float32)
        rows = self._reshape(q, (0, kv_heads, -1, dim))
        scores = self._cast(self._matmul(rows, keys, transposed=True), self._trt.float32)
        softmax = self._network.add_softmax(self._elementwise("SUM", scores, self._masks[group]))
        softmax.axes = 1 << 3
        weights = self._cast(self._out(softmax, self._trt.float32), self._type(q))
        return self._reshape(self._matmul(weights, values, transposed=False), (0, heads, -1, dim))

    # Collectives

    def _plugin(self, name: str, inputs: list[Tensor], outputs: int, **fields: int | float) -> list[Tensor]:
        trt = self._trt
        fields["dtype"] = _PLUGIN_DTYPES[self._limits.dtype]
        kinds = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}
        values = []
        for key, value in fields.items():
            dtype, kind = kinds[type(value)]
            values.append(trt.PluginField(key, np.array([value], dtype), kind))
        self._kept.append(values)
        registry = trt.get_plugin_registry()
        find = getattr(registry, "get_plugin_creator", None) or registry.get_creator
        creator = find(name, _PLUGIN_VERSION, _PLUGIN_NAMESPACE)
        plugin = creator.create_plugin(name, trt.PluginFieldCollection(values))
        layer = self._network.add_plugin_v2(inputs, plugin)
        # A precision would be asked of its integer inputs too; the plugin takes the type of its field and no other.
        found = [layer.get_output(i) for i in range(outputs)]
        self._types |= {tensor.name: self._dtype for tensor in found}
        return found

    def _collective(self, x: Tensor, operation: str, reduce: str = "NONE", root: int = -1) -> Tensor:
        trt = self._trt
        kind, reduction = getattr(trt.CollectiveOperation, operation), getattr(trt.ReduceOperation, reduce)
        layer = self._network.add_dist_collective(x, kind, reduction, root, [])
        layer.num_ranks = self.plan.world_size
        return self._out(layer, self._type(x))

    def all_reduce_residual(self, delta: Tensor, residual: Tensor) -> Tensor:
        if self._workspace is not None:
            [out] = self._plugin("CqilAllReduce", [delta, residual, self._workspace], 1, mode=1, eps=0.0)
        else:
            # In float32, as the definition asks; NCCL adds in an order of its own, the same on every rank.
            wide = self._collective(self._cast(delta, self._trt.float32), "ALL_REDUCE", "SUM")
            out = self._cast(self.add(wide, self._cast(residual, self._trt.float32)), self._type(residual))
        self.outputs["joined"] = out
        return out

    def all_reduce_residual_norm(self, delta: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        row_bytes = self.plan.model.hidden_size * (4 if self._limits.dtype == "float32" else 2)
        # What the fused kernel takes: cqil_all_reduce_residual_norm.
        if self._workspace is None or row_bytes % 16 or row_bytes > 32 << 10:
            return super().all_reduce_residual_norm(delta, residual, weight)
        inputs, eps = [delta, residual, weight, self._workspace], float(self.plan.model.rms_norm_eps)
        out, normed = self._plugin("CqilAllReduce", inputs, 2, mode=2, eps=eps)
        self.outputs["joined"] = out
        return out, normed

    def broadcast(self, x: Tensor | None, tokens: Tensor) -> Tensor:
        hidden = self.plan.model.hidden_size
        if self._workspace is not None:
            given = self._reshape(tokens, (-1,)) if x is None else x
            inputs = [given, self._workspace]
            return self._plugin("CqilBroadcast", inputs, 1, rank=self.plan.rank, hidden=hidden)[0]
        if x is None:  # something of the right shape and type to receive into
            zeros = self._constant(np.zeros((1, hidden), np.float32))
            rows = self._reshape(self._cast(tokens, self._trt.float32), (-1, 1))
            x = self._cast(self._elementwise("PROD", rows, zeros), self._dtype)
        return self._collective(x, "BROADCAST", root=0)

    def bypass(self, x: Tensor, d: int) -> Tensor:
        """On rank 0 zeros: a layer whose result nobody reads would be removed, and with it what it sends."""
        if self._workspace is not None:
            return self._plugin("CqilBypass", [x, self._workspace], 1, distance=d)[0]
        # There is no collective among some ranks only: all gather, each adds up what it needs.
        rank = self.plan.rank
        wide = self._reshape(self._cast(x, self._trt.float32), (1, -1, self.plan.model.hidden_size))
        parts = self._collective(wide, "ALL_GATHER")
        needed = [1.0 if rank - d <= source < rank else 0.0 for source in range(self.plan.world_size)]
        kept = self._elementwise("PROD", parts, self._constant(np.array(needed, np.float32).reshape(-1, 1, 1)))
        reduce = self._network.add_reduce(kept, self._trt.ReduceOperation.SUM, 1, False)
        return self._cast(self._out(reduce, self._trt.float32), self._type(x))


def define_network(
    trt: Any,
    network: Any,
    lowering: Lowering,
    plan: RankPlan,
    limits: EngineConfig,
    rotary: Sequence[float],
    nccl: bool,
) -> TensorRtOps:
    """Emits a rank's whole network; arguments as for `TensorRtOps`, which is returned to be kept until the build.

    Inputs: tokens and positions int32 [B, T], past int32 [B], select int32 [R] (rows b * T + t to predict from), for
    each layer of the rank cache.N.key and cache.N.value [B, key/value heads, S, head_dim], the rank's tensors under
    their names, and the plugins' workspace int32 [1]. Outputs: logits float32 [R, V] (where the rank predicts), joined
    [B * T, H] (the residual stream after the last all-reduce, where there is one), and every cache, updated in place.
    """
    ops = TensorRtOps(trt, network, lowering, plan, limits, rotary, nccl)
    out = decode(ops, ops.tokens, ops.past, ops.select_rows)
    outputs = dict(ops.outputs)
    if plan.schedule.predicts:
        outputs["logits"] = ops._cast(out, trt.float32)
    elif not outputs:  # a rank with nothing to do, which an engine must still show for
        outputs["idle"] = network.add_identity(out).get_output(0)
    for name, tensor in outputs.items():
        tensor.name = name
        network.mark_output(tensor)
    return ops


def add_profiles(trt: Any, builder: Any, config: Any, network: Any, limits: EngineConfig) -> None:
    """Two optimization profiles of one engine: 0 for prefill (up to prefill_chunk tokens), 1 for decode (one token)."""
    batch, chunk = limits.max_batch_size, min(limits.prefill_chunk, limits.max_seq_len)
    capacity = limits.max_seq_len
    for longest in (chunk, 1):
        usual = min(longest, 128)
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            shape, name = tuple(tensor.shape), tensor.name
            if -1 not in shape:
                continue
            if name in ("tokens", "positions"):
                ranges = (1, 1), (1, usual), (batch, longest)
            elif name == "past":
                ranges = (1,), (1,), (batch,)
            elif name == "select":
                ranges = (1,), (1,), (batch * longest,)
            else:
                _, heads, length, dim = shape
                lengths = (length,) * 3
                if length < 0:
                    lengths = min(MIN_CACHE_LENGTH, capacity), min(1024, capacity), capacity
                ranges = tuple((b, heads, s, dim) for b, s in zip((1, 1, batch), lengths))
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
