"""What the decoder needs of a backend.

A value is whatever the backend computes with (a torch tensor, a TensorRT ITensor, an ONNX name); the decoder never
looks inside one. Weights are named as in `shard`: a projection `layers.3.qkv` has the tensors `layers.3.qkv.weight`,
`layers.3.qkv.bias` where there is one, and whatever else its format stores. Sizes: B sequences, T new tokens each, H
hidden, V vocabulary of this rank. The methods with a body are spelled in smaller operations; a backend with a fused
kernel overrides them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from cqil_trt.schedule import Peers
from cqil_trt.shard import LayerShard, RankPlan

V = TypeVar("V")


class Ops(ABC, Generic[V]):
    """Operations on one rank, whose plan is `plan`."""

    plan: RankPlan

    # Inputs

    @abstractmethod
    def positions(self, tokens: V, past: V) -> Any:
        """A handle on the positions of the new tokens, for `rotary` and `cached_attention`.

        Token t of sequence b (tokens: integers [B, T]) is at position past[b] + t (past: integers [B]).
        """

    def keep(self, x: V) -> V:
        """x, which is used more than once or leaves the network: a backend that defers operations computes it here."""
        return x

    # Arithmetic

    @abstractmethod
    def embedding(self, tokens: V) -> V:
        """The embedding table's rows [B, T, H] of `tokens` [B, T]."""

    @abstractmethod
    def project(self, x: V, name: str) -> V:
        """The projection `name`: x [..., in] @ weightᵀ [in, out] + bias → [..., out]."""

    @abstractmethod
    def rms_norm(self, x: V, name: str) -> V:
        """The RMSNorm `name` over the last axis: x / sqrt(mean(x²) + eps) in float32, rounded, times its weight."""

    @abstractmethod
    def add(self, x: V, y: V) -> V:
        """x + y, of one shape."""

    @abstractmethod
    def swiglu(self, gate_up: V) -> V:
        """silu(gate) * up, where the last axis holds gate and up one after the other."""

    @abstractmethod
    def zeros_like(self, x: V) -> V:
        """Zeros in the shape of x: the contribution of a rank with nothing to contribute."""

    @abstractmethod
    def select(self, x: V, indices: V) -> V:
        """Rows of x [B, T, H] by indices [B, K] → [B, K, H]."""

    # Attention

    @abstractmethod
    def split_heads(self, qkv: V, shard: LayerShard) -> tuple[V, V, V]:
        """qkv [B, T, (query + 2 key/value heads) * D] → q, k, v, each [B, heads, T, D]."""

    @abstractmethod
    def rotary(self, x: V, positions: Any) -> V:
        """Rotary position embedding of x [B, heads, T, D], halves rotated as Hugging Face does."""

    @abstractmethod
    def cached_attention(self, q: V, k: V, v: V, positions: Any, shard: LayerShard) -> V:
        """Appends k and v to the layer's KV cache and attends: → [B, T, heads * D].

        A query at position i sees the cached keys at positions 0 … i.
        """

    def attention(self, qkv: V, positions: Any, shard: LayerShard) -> V:
        """From the projected q, k, v to the input of the output projection: [B, T, heads * D]."""
        q, k, v = self.split_heads(qkv, shard)
        if self.plan.model.qk_norm:
            q = self.rms_norm(q, f"layers.{shard.index}.q_norm")
            k = self.rms_norm(k, f"layers.{shard.index}.k_norm")
        return self.cached_attention(self.rotary(q, positions), self.rotary(k, positions), v, positions, shard)

    # Collectives: sums run in rank order and in float32, so every rank holds the same bits

    @abstractmethod
    def all_reduce_residual(self, delta: V, residual: V, peers: Peers = Peers.ALL) -> V:
        """residual + the sum of the deltas of these ranks, summed in float32 and rounded once."""

    @abstractmethod
    def broadcast(self, x: V | None, tokens: V) -> V:
        """Rank 0's x on every rank; the others pass None and take the shape [B, T, H] from `tokens`."""

    @abstractmethod
    def bypass(self, x: V, d: int) -> V | None:
        """The sum of the x that the d layers of the group just before this one have, where there are as many.

        Among the ranks with the same part of their layers (`Peers.PART`); None, or zeros, in the first layer.
        """

    # Fused forms

    def residual_norm(self, delta: V, residual: V, norm: str) -> tuple[V, V]:
        """residual + delta, and its RMSNorm `norm`."""
        residual = self.add(residual, delta)
        return residual, self.rms_norm(residual, norm)

    def all_reduce_residual_norm(self, delta: V, residual: V, norm: str, peers: Peers = Peers.ALL) -> tuple[V, V]:
        """`all_reduce_residual`, and its RMSNorm `norm`."""
        residual = self.all_reduce_residual(delta, residual, peers)
        return residual, self.rms_norm(residual, norm)
