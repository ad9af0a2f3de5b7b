"""Combines the decoder's operations into the fused kernels of plugins/linear.cu, for any GPU backend.

A matrix product can include the RMSNorm of its input, and the gating of its result, a factor or an addition; an
addition to the residual stream can include the norm of what is added, and the next one. The decoder calls these one by
one. So `project`, `scale`, `rms_norm` and `residual_norm` only record what is wanted. The kernel is called when
something else needs the value: by then it is known what can be fused.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from cqil_trt.config import AUTO, EngineLimits
from cqil_trt.gpu import abi
from cqil_trt.model import ModelConfig
from cqil_trt.network.ops import Ops
from cqil_trt.schedule import Peers
from cqil_trt.shard import LayerShard

V = TypeVar("V")

# The rows of a step with drafts at most: what products take whose rows do not depend on each other.
DRAFT_ROWS = 16


def attention_fields(model: ModelConfig, shard: LayerShard, limits: EngineLimits, slots: int) -> dict[str, int | float]:
    """The fields of cqil_attention_shape and of CqilAttention that describe a rank's share of a layer.

    `slots`: sequences that the KV cache holds.
    """
    window = model.window_of(shard.index)
    key_scale, value_scale = limits.scales_of(shard.index)
    return {
        "heads": shard.num_heads,
        "kv_heads": shard.num_kv_heads,
        "head_dim": model.head_dim,
        "capacity": limits.cache_length(window),
        "positions": limits.max_seq_len,
        "max_batch": slots,
        "group": model.group_size,
        "first": shard.first_in_group(model.group_size),
        "eps": model.rms_norm_eps,
        "window": 0 if window is None or window >= limits.max_seq_len else window,
        "rotary": model.rotary_dim,
        "norm": norm_kind(model),
        "scale": float(model.query_scale or 0),
        "cap": float(model.attention_cap or 0),
        "cache": int(abi.cqil_cache.CQIL_CACHE_PLAIN if limits.kv_dtype == AUTO else abi.cqil_cache.CQIL_CACHE_FP8),
        "key_scale": key_scale,
        "value_scale": value_scale,
    }


def too_large(model: ModelConfig) -> str | None:
    """What of a model the kernels have no room for; None if they take it."""
    most: int = abi.CQIL_MAX_HEAD_DIM
    return None if model.head_dim <= most else f"heads of {model.head_dim} elements, our kernels take up to {most}"


def norm_kind(model: ModelConfig) -> int:
    """The cqil_norm of a model's norms."""
    kinds = abi.cqil_norm
    if not model.wide_norms:
        return int(kinds.CQIL_NORM_ROUNDED)
    return int(kinds.CQIL_NORM_OFFSET if model.offset_norms else kinds.CQIL_NORM_WIDE)


def gating(activation: str | None) -> int:
    """The cqil_gating of a gated projection with that `ModelConfig.activation`; None: of one that is not gated."""
    kinds = abi.cqil_gating
    known = {None: kinds.CQIL_UNGATED, "silu": kinds.CQIL_SWIGLU, "gelu_tanh": kinds.CQIL_GEGLU}
    return int(known[activation])


def rotary_names(which: int) -> tuple[str, str]:
    """The names of the tables, cos and sin, of one of `ModelConfig.ropes`."""
    name = "rotary.local" if which else "rotary"
    return f"{name}.cos", f"{name}.sin"


def square_fields(model: ModelConfig, shard: LayerShard) -> dict[str, int | float]:
    """The arguments of cqil_head_squares, and fields of CqilHeadSquares, that describe a rank's share of a layer."""
    first, last = shard.owned_kv_heads(model.group_size) if shard.num_heads else (0, 0)
    return {
        "heads": shard.num_heads,
        "kv_heads": shard.num_kv_heads,
        "head_dim": model.head_dim,
        "first_key": first,
        "last_key": last,
        "query_factor": 1 / (model.num_heads * model.head_dim),
        "key_factor": 1 / (model.num_kv_heads * model.head_dim),
    }


@dataclass(eq=False, kw_only=True)
class _Deferred(Generic[V]):
    """`value`: the result, once it is computed."""

    value: V | None = None


@dataclass(eq=False, kw_only=True)
class _Sum(_Deferred[V]):
    x: V
    y: V


@dataclass(eq=False, kw_only=True)
class _Joined(_Deferred[V]):
    """The sum of the x of the ranks `peers`."""

    x: V
    peers: Peers


@dataclass(eq=False, kw_only=True)
class _Norm(_Deferred[V]):
    """The RMSNorm of x, or of x + delta."""

    x: V | _Joined[V]
    delta: V | None = None
    name: str


@dataclass(eq=False, kw_only=True)
class _Product(_Deferred[V]):
    """The projection `name` of x, times `scale`. `shared`: it is used again after something was added to it."""

    x: V | _Norm[V]
    name: str
    scale: float = 1.0
    shared: bool = False


class FusedOps(Ops[V]):
    """For backends that have these kernels. Values are the backend's or deferred; `keep` computes deferred ones.

    Must precede the class that implements collectives in a backend's bases, because it wraps them.
    """

    @abstractmethod
    def fused_project(
        self,
        x: V,
        name: str,
        norm: str | None = None,
        delta: V | None = None,
        residual: V | None = None,
        gated: str | None = None,
        scale: float = 1.0,
    ) -> V:
        """The projection `name` of RMSNorm(x + delta), as cqil_linear; without `norm`, of x.

        It is gated with the activation `gated` (as in `ModelConfig`), or times `scale` and added to `residual`.
        """

    @abstractmethod
    def project_and_add(self, x: V, name: str, residual: V, scale: float) -> tuple[V, V]:
        """The projection `name` of x, times `scale`, and that + residual, as cqil_linear with `sum`."""

    @abstractmethod
    def fused_norm(self, x: V, delta: V | None, name: str) -> V:
        """The RMSNorm `name` of x + delta."""

    @abstractmethod
    def fused_post_norm(self, delta: V, name: str, residual: V, following: str | None) -> tuple[V, V]:
        """residual + the RMSNorm `name` of delta, and the RMSNorm `following` of that; without one, the sum twice."""

    def fused_join_norm(self, delta: V, peers: Peers, name: str, residual: V, following: str | None) -> tuple[V, V]:
        """As `fused_post_norm`, of the sum of these ranks' delta."""
        whole: V = super().all_reduce(delta, peers)
        return self.fused_post_norm(whole, name, residual, following)

    @abstractmethod
    def fused_add(self, x: V, y: V) -> V:
        """x + y."""

    @abstractmethod
    def fused_scale(self, x: V, factor: float, cap: float | None) -> V:
        """x * factor, and of that the soft cap."""

    @abstractmethod
    def rows(self, x: V, indices: V) -> V:
        """`select`, of a value."""

    @abstractmethod
    def attention(self, qkv: Any, positions: V, shard: LayerShard) -> V:
        """As `Ops.attention`, one kernel."""

    def positions(self, tokens: V, past: V) -> Any:
        """That kernel counts from `past`."""

    def split_heads(self, qkv: Any, shard: LayerShard) -> Any:
        raise NotImplementedError("attention is one kernel")

    def rotary(self, x: Any, positions: Any, which: int) -> Any:
        raise NotImplementedError("attention is one kernel")

    def cached_attention(self, q: Any, k: Any, v: Any, positions: Any, shard: LayerShard) -> Any:
        raise NotImplementedError("attention is one kernel")

    def head_norms(self, shard: LayerShard) -> list[str]:
        """The tensors of the layer's query and key norms; none in a model that has no such norms."""
        names = ("q_norm", "k_norm") if self.plan.model.qk_norm else ()
        return [f"layers.{shard.index}.{name}.weight" for name in names]

    def share(self, x: Any) -> Any:
        if isinstance(x, _Product) and x.value is None and not isinstance(x.x, _Norm):
            x.shared = True
            return x
        return self.keep(x)

    def keep(self, x: Any) -> Any:
        if not isinstance(x, _Deferred):
            return x
        if x.value is None:
            if isinstance(x, _Sum):
                x.value = self.fused_add(x.x, x.y)
            elif isinstance(x, _Joined):
                x.value = super().all_reduce(x.x, x.peers)
            elif isinstance(x, _Norm):
                x.value = self.fused_norm(self.keep(x.x), x.delta, x.name)
            elif isinstance(x, _Product):
                x.value = self._multiply(x)
        return x.value

    def _multiply(self, product: _Product[V], **fused: Any) -> V:
        x: Any = product.x
        if product.scale != 1:
            fused["scale"] = product.scale
        # The products' norms round before they multiply by the weight.
        if isinstance(x, _Norm) and x.value is None and not self.plan.model.wide_norms:
            source: Any = self.keep(x.x)
            return self.fused_project(source, product.name, norm=x.name, delta=x.delta, **fused)
        return self.fused_project(self.keep(x), product.name, **fused)

    def project(self, x: Any, name: str) -> Any:
        return _Product(x=x if isinstance(x, _Norm) else self.keep(x), name=name)

    def swiglu(self, gate_up: Any) -> Any:
        return self._gated(gate_up, "silu")

    def geglu(self, gate_up: Any) -> Any:
        return self._gated(gate_up, "gelu_tanh")

    def _gated(self, gate_up: Any, activation: str) -> Any:
        if not isinstance(gate_up, _Product) or gate_up.value is not None:
            raise TypeError("only a projection that nothing else uses can be gated")
        return self._multiply(gate_up, gated=activation)

    def scale(self, x: Any, factor: float) -> Any:
        if isinstance(x, _Product) and x.value is None:
            return replace(x, scale=x.scale * factor)
        return self.fused_scale(self.keep(x), factor, None)

    def soft_cap(self, x: Any, cap: float) -> Any:
        return self.fused_scale(self.keep(x), 1.0, cap)

    def add(self, x: Any, y: Any) -> Any:
        for product, other in ((x, y), (y, x)):
            if isinstance(product, _Product) and product.value is None:
                if not product.shared:
                    return self._multiply(product, residual=self.keep(other))
                x = self.keep(product.x)
                product.value, total = self.project_and_add(x, product.name, self.keep(other), product.scale)
                return total
        for normed, other in ((x, y), (y, x)):
            if isinstance(normed, _Norm) and normed.value is None and normed.delta is None:
                return self._post_norm(normed, self.keep(other), None)[0]
        return self.fused_add(self.keep(x), self.keep(y))

    def _post_norm(self, added: _Norm[V], residual: V, following: str | None) -> tuple[V, V]:
        if isinstance(added.x, _Joined) and added.x.value is None:
            return self.fused_join_norm(added.x.x, added.x.peers, added.name, residual, following)
        return self.fused_post_norm(self.keep(added.x), added.name, residual, following)

    def rms_norm(self, x: Any, name: str) -> Any:
        return _Norm(x=x if isinstance(x, _Joined) else self.keep(x), name=name)

    def residual_norm(self, delta: Any, residual: Any, norm: str) -> Any:
        if isinstance(delta, _Product) and delta.value is None:
            total = self.add(delta, residual)
            return total, _Norm(x=total, name=norm)
        if isinstance(delta, _Norm) and delta.value is None and delta.delta is None:
            return self._post_norm(delta, self.keep(residual), norm)
        # The sum may never be needed.
        total = _Sum(x=self.keep(residual), y=self.keep(delta))
        return total, _Norm(x=total.x, delta=total.y, name=norm)

    def select(self, x: Any, indices: V) -> Any:
        if isinstance(x, _Norm) and x.value is None and x.delta is None:
            return _Norm(x=self.rows(self.keep(x.x), indices), name=x.name)
        return self.rows(self.keep(x), indices)

    # Collectives take values, not deferred ones. The class that implements them is among the bases.

    def all_reduce(self, x: Any, peers: Peers = Peers.ALL) -> Any:
        """Its result is used before the next collective, so that their order is the same on all ranks."""
        return _Joined(x=self.keep(x), peers=peers)

    def all_reduce_residual(self, delta: Any, residual: Any, peers: Peers = Peers.ALL) -> Any:
        return super().all_reduce_residual(self.keep(delta), self.keep(residual), peers)  # type: ignore[safe-super]

    def all_reduce_residual_norm(self, delta: Any, residual: Any, norm: str, peers: Peers = Peers.ALL) -> Any:
        return super().all_reduce_residual_norm(self.keep(delta), self.keep(residual), norm, peers)

    def broadcast(self, x: Any, tokens: V) -> Any:
        return super().broadcast(None if x is None else self.keep(x), tokens)  # type: ignore[safe-super]
