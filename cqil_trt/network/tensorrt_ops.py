"""Emits the decoder into a TensorRT network definition, one call a layer or a few.

This is the native lowering: TensorRT >= 10.15, 11 and TensorRT-RTX, which have rotary embedding, KV-cache update and
attention as layers, and strong typing. Collectives are `add_dist_collective` (NCCL at run time).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cqil_trt.config import EngineConfig
from cqil_trt.network.decoder import decode
from cqil_trt.network.ops import Ops
from cqil_trt.shard import LayerShard, RankPlan

Tensor = Any  # an ITensor of whichever package provides TensorRT


@dataclass(frozen=True)
class Positions:
    """Positions of the new tokens, int64 [B, T]; where they begin, int32 [B]; which keys they see, [B, 1, T, S]."""

    index: Tensor
    past: Tensor
    mask: Tensor


class TensorRtOps(Ops[Tensor]):
    """Adds layers to `network`. `trt` is the package that made it: tensorrt or tensorrt_rtx.

    Args:
        weights: the rank's tensors by name, as numpy arrays of the engine's type. They, and this object, must live
            until the engine is built: TensorRT reads them then.
        rotary: cos and sin, [max_seq_len, head_dim / 2].
    """

    def __init__(
        self,
        trt: Any,
        network: Any,
        plan: RankPlan,
        weights: Mapping[str, np.ndarray],
        rotary: tuple[np.ndarray, np.ndarray],
        limits: EngineConfig,
    ):
        self.plan = plan
        self.outputs: dict[str, Tensor] = {}
        self._trt, self._network, self._limits = trt, network, limits
        self._arrays, self._constants = dict(weights), {}
        self._kept: list[np.ndarray] = []
        self._dtype = getattr(trt, limits.dtype)
        self._cos, self._sin = (self._constant(table.astype(limits.dtype)) for table in rotary)
        dim = plan.model.head_dim
        self._caches = {
            (index, part): network.add_input(
                f"cache.{index}.{part}", self._dtype, (-1, shard.num_kv_heads, limits.max_seq_len, dim)
            )
            for index, shard in plan.layers.items()
            if shard.num_heads
            for part in ("key", "value")
        }

    # Small words for layers

    def _constant(self, array: np.ndarray) -> Tensor:
        array = np.array(array, order="C")
        self._kept.append(array)
        values = self._trt.Weights(array.reshape(1) if array.ndim == 0 else array)
        return self._network.add_constant(self._trt.Dims(array.shape), values).get_output(0)

    def _elementwise(self, operation: str, x: Tensor, y: Tensor) -> Tensor:
        kind = getattr(self._trt.ElementWiseOperation, operation)
        return self._network.add_elementwise(x, y, kind).get_output(0)

    def _unary(self, operation: str, x: Tensor) -> Tensor:
        return self._network.add_unary(x, getattr(self._trt.UnaryOperation, operation)).get_output(0)

    def _cast(self, x: Tensor, dtype: Any) -> Tensor:
        return x if x.dtype == dtype else self._network.add_cast(x, dtype).get_output(0)

    def _reshape(self, x: Tensor, dims: tuple[int, ...], then: tuple[int, ...] | None = None) -> Tensor:
        """0 keeps a dimension, -1 infers one; `then` permutes the result."""
        layer = self._network.add_shuffle(x)
        layer.reshape_dims = dims
        if then is not None:
            layer.second_transpose = then
        return layer.get_output(0)

    def _permute(self, x: Tensor, order: tuple[int, ...]) -> Tensor:
        layer = self._network.add_shuffle(x)
        layer.first_transpose = order
        return layer.get_output(0)

    def _span(self, x: Tensor, axis: int, first: int, last: int) -> Tensor:
        """x[..., first:last, ...] along `axis`, whose size is known; the other axes keep theirs."""
        rank = len(x.shape)
        shape = self._network.add_shape(x).get_output(0)
        known = np.array([axis == i for i in range(rank)])
        sizes = np.where(known, last - first, 0).astype(np.int64)
        # shape * unknown + size of the span: slice sizes as a tensor, as batch and length are dynamic.
        size = self._elementwise("PROD", shape, self._constant((~known).astype(np.int64)))
        size = self._elementwise("SUM", size, self._constant(sizes))
        start = tuple(first if i == axis else 0 for i in range(rank))
        layer = self._network.add_slice(x, start, (0,) * rank, (1,) * rank)
        layer.set_input(2, size)
        return layer.get_output(0)

    def _scalar(self, value: float, rank: int, dtype: Any) -> Tensor:
        return self._cast(self._constant(np.full((1,) * rank, value, np.float32)), dtype)

    # Parameters and inputs

    def weight(self, name: str) -> Tensor:
        if name not in self._constants:
            self._constants[name] = self._constant(self._arrays.pop(name))
        return self._constants[name]

    def positions(self, tokens: Tensor, past: Tensor) -> Positions:
        trt, network = self._trt, self._network
        shape = network.add_shape(tokens).get_output(0)
        length = network.add_slice(shape, (1,), (1,), (1,)).get_output(0)
        fill = network.add_fill((1,), trt.FillOperation.LINSPACE, trt.int32)
        fill.set_input(0, length)
        fill.set_input(1, self._constant(np.array(0, np.int32)))
        fill.set_input(2, self._constant(np.array([1], np.int32)))
        steps = self._reshape(fill.get_output(0), (1, -1))
        index = self._elementwise("SUM", steps, self._reshape(past, (-1, 1)))
        keys = self._constant(np.arange(self._limits.max_seq_len, dtype=np.int32).reshape(1, 1, 1, -1))
        hidden = self._elementwise("GREATER", keys, self._permute(self._reshape(index, (0, 0, 1, 1)), (0, 2, 1, 3)))
        return Positions(self._cast(index, trt.int64), past, self._unary("NOT", hidden))

    # Arithmetic

    def embedding(self, tokens: Tensor, table: Tensor) -> Tensor:
        return self._network.add_gather(table, tokens, 0).get_output(0)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        matrix = self._trt.MatrixOperation
        weight = self._reshape(weight, (1, *weight.shape))
        out = self._network.add_matrix_multiply(x, matrix.NONE, weight, matrix.TRANSPOSE).get_output(0)
        return out if bias is None else self.add(out, self._reshape(bias, (1, 1, -1)))

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        rank, wide = len(x.shape), self._cast(x, self._trt.float32)
        square = self._elementwise("PROD", wide, wide)
        mean = self._network.add_reduce(square, self._trt.ReduceOperation.AVG, 1 << (rank - 1), True).get_output(0)
        shifted = self._elementwise("SUM", mean, self._scalar(self.plan.model.rms_norm_eps, rank, self._trt.float32))
        normed = self._elementwise("DIV", wide, self._unary("SQRT", shifted))
        return self._elementwise("PROD", self._cast(normed, x.dtype), self._reshape(weight, (1,) * (rank - 1) + (-1,)))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._elementwise("SUM", x, y)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        half = gate_up.shape[-1] // 2
        gate, up = self._span(gate_up, 2, 0, half), self._span(gate_up, 2, half, 2 * half)
        sigmoid = self._network.add_activation(gate, self._trt.ActivationType.SIGMOID).get_output(0)
        return self._elementwise("PROD", self._elementwise("PROD", gate, sigmoid), up)

    def zeros_like(self, x: Tensor) -> Tensor:
        return self._elementwise("PROD", x, self._scalar(0.0, len(x.shape), x.dtype))

    def select(self, x: Tensor, indices: Tensor) -> Tensor:
        layer = self._network.add_gather(x, indices, 1)
        layer.num_elementwise_dims = 1
        return layer.get_output(0)

    # Attention

    def split_heads(self, qkv: Tensor, shard: LayerShard) -> tuple[Tensor, Tensor, Tensor]:
        heads = self._reshape(qkv, (0, 0, -1, self.plan.model.head_dim), then=(0, 2, 1, 3))
        ends = np.cumsum([0, shard.num_heads, shard.num_kv_heads, shard.num_kv_heads]).tolist()
        q, k, v = (self._span(heads, 1, first, last) for first, last in zip(ends, ends[1:]))
        return q, k, v

    def rotary(self, x: Tensor, positions: Positions) -> Tensor:
        layer = self._network.add_rotary_embedding(x, self._cos, self._sin, False, 0)
        layer.set_input(3, positions.index)
        return layer.get_output(0)

    def cached_attention(self, q: Tensor, k: Tensor, v: Tensor, positions: Positions, shard: LayerShard) -> Tensor:
        trt, index = self._trt, shard.index
        cached = []
        for part, new in (("key", k), ("value", v)):
            cache = self._caches[index, part]
            layer = self._network.add_kv_cache_update(cache, new, positions.past, trt.KVCacheMode.LINEAR)
            # The runtime binds it to the memory of the input: the cache is updated in place.
            self.outputs[f"cache.{index}.{part}.updated"] = layer.get_output(0)
            cached.append(layer.get_output(0))
        keys, values = (self._heads_for_queries(x, shard) for x in cached)
        scale = self._scalar(self.plan.model.head_dim**-0.5, 4, q.dtype)
        layer = self._network.add_attention_v2(
            self._elementwise("PROD", q, scale),
            keys,
            values,
            trt.AttentionNormalizationOp.SOFTMAX,
            trt.CausalMaskKind.NONE,
        )
        layer.mask = positions.mask
        layer.decomposable = True
        return self._reshape(self._permute(layer.get_output(0), (0, 2, 1, 3)), (0, 0, -1))

    def _heads_for_queries(self, x: Tensor, shard: LayerShard) -> Tensor:
        """The layer takes grouped heads in equal groups; other splits repeat the key/value heads."""
        if shard.grouped:
            return x
        return self._network.add_gather(x, self._constant(np.array(shard.kv_index, np.int32)), 1).get_output(0)

    # Collectives

    def _collective(self, x: Tensor, operation: str, reduce: str = "NONE", root: int = -1) -> Tensor:
        trt = self._trt
        kind, reduction = getattr(trt.CollectiveOperation, operation), getattr(trt.ReduceOperation, reduce)
        layer = self._network.add_dist_collective(x, kind, reduction, root, [])
        layer.num_ranks = self.plan.world_size
        return layer.get_output(0)

    def all_reduce_residual(self, delta: Tensor, residual: Tensor) -> Tensor:
        # In float32, as the definition asks; NCCL adds in an order of its own, the same on every rank.
        wide = self._collective(self._cast(delta, self._trt.float32), "ALL_REDUCE", "SUM")
        return self._cast(self.add(wide, self._cast(residual, self._trt.float32)), residual.dtype)

    def broadcast(self, x: Tensor | None, tokens: Tensor) -> Tensor:
        if x is None:  # something of the right shape and type to receive into
            zeros = self._constant(np.zeros((1, 1, self.plan.model.hidden_size), np.float32))
            shape = self._reshape(self._cast(tokens, self._trt.float32), (0, 0, 1))
            x = self._cast(self._elementwise("PROD", shape, zeros), self._dtype)
        return self._collective(x, "BROADCAST", root=0)

    def bypass(self, x: Tensor, d: int) -> Tensor:
        # There is no collective among some ranks only: all gather, each adds up what it needs, rank 0 nothing.
        rank = self.plan.rank
        wide = self._reshape(self._cast(x, self._trt.float32), (0, 0, 0, 1), then=(3, 0, 1, 2))
        parts = self._collective(wide, "ALL_GATHER")
        needed = [1.0 if rank - d <= source < rank else 0.0 for source in range(self.plan.world_size)]
        weights = self._constant(np.array(needed, np.float32).reshape(-1, 1, 1, 1))
        kept = self._elementwise("PROD", parts, weights)
        total = self._network.add_reduce(kept, self._trt.ReduceOperation.SUM, 1, False).get_output(0)
        return self._cast(total, x.dtype)


def define_network(
    trt: Any,
    network: Any,
    plan: RankPlan,
    weights: Mapping[str, np.ndarray],
    rotary: tuple[np.ndarray, np.ndarray],
    limits: EngineConfig,
) -> TensorRtOps:
    """Emits a rank's whole network; arguments as for `TensorRtOps`, which is returned to be kept until the build.

    Inputs: tokens int32 [B, T], past int32 [B], select int32 [B, K], and for each layer of the rank cache.N.key and
    cache.N.value [B, key/value heads, max_seq_len, head_dim]. Outputs: logits (or hidden) and every cache, updated.
    """
    tokens = network.add_input("tokens", trt.int32, (-1, -1))
    past = network.add_input("past", trt.int32, (-1,))
    select = network.add_input("select", trt.int32, (-1, -1)) if plan.schedule.predicts else None
    ops = TensorRtOps(trt, network, plan, weights, rotary, limits)
    out = decode(ops, tokens, past, select)
    outputs = {"logits" if plan.schedule.predicts else "hidden": out, **ops.outputs}
    for name, tensor in outputs.items():
        tensor.name = name
        network.mark_output(tensor)
    return ops


def add_profiles(trt: Any, builder: Any, config: Any, network: Any, limits: EngineConfig) -> None:
    """Two optimization profiles of one engine: 0 for prefill (any length), 1 for decode (one token)."""
    batch, length = limits.max_batch_size, limits.max_seq_len
    for longest in (length, 1):
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            # [B], [B, T or K], or a cache, of which only the batch varies
            rest = (longest,) if len(tensor.shape) == 2 else tuple(tensor.shape)[1:]
            least = (1,) if len(tensor.shape) == 2 else rest
            profile.set_shape(tensor.name, (1, *least), (1, *rest), (batch, *rest))
        config.add_optimization_profile(profile)
