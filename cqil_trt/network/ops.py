"""What the decoder needs of a backend.

A value is whatever the backend computes with (a torch tensor, a TensorRT ITensor, an ONNX name); the decoder never
looks inside one. Weights are named as in `shard`: a projection `layers.3.qkv` has the tensors `layers.3.qkv.weight`,
`layers.3.qkv.bias` where there is one, and whatever else its format stores. Sizes: B sequences, T new tokens each, H
hidden, V vocabulary of this rank. The methods with a body are spelled in smaller operations; a backend with a fused
kernel overrides them. Operations that only some families need raise NotImplementedError here: a backend without one
does not list its `Feature`, so models that need it are refused.
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

    def share(self, x: V) -> V:
        """x, which is added to a residual and used again after that."""
        return self.keep(x)

    # Arithmetic

    @abstractmethod
    def embedding(self, tokens: V) -> V:
        """The embedding table's rows [B, T, H] of `tokens` [B, T]."""

    @abstractmethod
    def project(self, x: V, name: str) -> V:
        """The projection `name`: x [..., in] @ weightᵀ [in, out] + bias → [..., out]."""

    @abstractmethod
    def rms_norm(self, x: V, name: str) -> V:
        """The RMSNorm `name` over the last axis: x / sqrt(mean(x²) + eps) in float32, rounded, times its weight.

        With `ModelConfig.offset_norms` times 1 + weight, with `wide_norms` rounded after that.
        """

    @abstractmethod
    def add(self, x: V, y: V) -> V:
        """x + y, of one shape."""

    @abstractmethod
    def swiglu(self, gate_up: V) -> V:
        """silu(gate) * up, where the last axis holds gate and up one after the other."""

    def geglu(self, gate_up: V) -> V:
        """As `swiglu` with GELU in place of SiLU, in its form with tanh (arXiv 1606.08415)."""
        raise NotImplementedError("GELU")

    def scale(self, x: V, factor: float) -> V:
        """x * factor."""
        raise NotImplementedError("a product with a number")

    def soft_cap(self, x: V, cap: float) -> V:
        """cap * tanh(x / cap)."""
        raise NotImplementedError("a soft cap")

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

    def head_squares(self, q: V | None, k: V | None, like: V, shard: LayerShard) -> V:
        """The sums of q² and of k² over heads and D, float32 [B, 1, T, 2]; of k only of heads that `shard` owns.

        q and k: as from `split_heads`, None on a rank without heads, which has zeros; like: [B, T, more than 1].
        """
        raise NotImplementedError("norms over all heads")

    def zeros_after(self, x: V, squares: V) -> V:
        """Zeros in the shape of x [B, T, H] that depend on `squares`, so no compiler leaves out their all-reduce."""
        raise NotImplementedError("norms over all heads")

    def scale_heads(self, x: V, squares: V, which: int, name: str) -> V:
        """x [B, heads, T, D] / sqrt(squares[..., which] / count + eps) times the rank's part of the weight `name`.

        count: elements of all heads of the model.
        """
        raise NotImplementedError("norms over all heads")

    @abstractmethod
    def rotary(self, x: V, positions: Any, which: int) -> V:
        """Rotary position embedding `which` of `ModelConfig.ropes`, of x [B, heads, T, D].

        The halves of each head's first `rotary_dim` elements are rotated against each other, as Hugging Face does.
        """

    @abstractmethod
    def cached_attention(self, q: V, k: V, v: V, positions: Any, shard: LayerShard) -> V:
        """Appends k and v to the layer's KV cache and attends: → [B, T, heads * D].

        A query at position i sees the cached keys at positions 0 … i, the last `ModelConfig.window_of` of them.
        """

    def attention(self, qkv: V, positions: Any, shard: LayerShard) -> V:
        """From the projected q, k, v to the input of the output projection: [B, T, heads * D]."""
        model, layer = self.plan.model, f"layers.{shard.index}"
        q, k, v = self.split_heads(qkv, shard)
        if model.joint_qk_norm:
            squares = self.head_squares(q, k, qkv, shard)
            if shard.parts > 1:
                squares = self.all_reduce_squares(squares, self.sharing(shard))
            q = self.scale_heads(q, squares, 0, f"{layer}.q_norm")
            k = self.scale_heads(k, squares, 1, f"{layer}.k_norm")
        elif model.qk_norm:
            q, k = self.rms_norm(q, f"{layer}.q_norm"), self.rms_norm(k, f"{layer}.k_norm")
        which = model.rope_of(shard.index)
        if which is not None:
            q, k = self.rotary(q, positions, which), self.rotary(k, positions, which)
        return self.cached_attention(q, k, v, positions, shard)

    def sharing(self, shard: LayerShard) -> Peers:
        """The ranks that share a split layer."""
        return Peers.ALL if shard.parts == self.plan.world_size else Peers.LAYER

    # Collectives: sums run in rank order and in float32, so every rank holds the same bits

    @abstractmethod
    def all_reduce_residual(self, delta: V, residual: V, peers: Peers = Peers.ALL) -> V:
        """residual + the sum of the deltas of these ranks, summed in float32 and rounded once."""

    def all_reduce(self, x: V, peers: Peers = Peers.ALL) -> V:
        """The sum of the x [B, T, H] of these ranks, in float32 and rounded once."""
        raise NotImplementedError("an all-reduce without a residual")

    def all_reduce_squares(self, x: V, peers: Peers) -> V:
        """The sum of the `head_squares` of these ranks, the same bits on all."""
        raise NotImplementedError("norms over all heads")

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
