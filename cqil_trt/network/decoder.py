"""The decoder, written once against `Ops`: the network definition of every backend that has an `Ops`.

Between steps it carries the residual stream x and its normalised form, because a layer's last addition and the next
layer's RMSNorm are one kernel where a backend has it. Weights are named, never held: how a projection is stored is the
backend's matter.
"""

from __future__ import annotations

from typing import Any, TypeVar

from cqil_trt.network.ops import Ops
from cqil_trt.schedule import Group, Layer, Peers, Receive
from cqil_trt.shard import LayerShard

V = TypeVar("V")


def decode(ops: Ops[V], tokens: V, past: V, select: V) -> V:
    """One forward pass of a rank.

    Args:
        tokens: new token ids [B, T].
        past: how many tokens of each sequence the KV cache holds [B].
        select: for each sequence, which of its T tokens to predict from [B, K].

    Returns:
        The logits [B, K, V] of the rank's slice of the vocabulary, or, on a rank that predicts nothing, the residual
        stream after its last step.
    """
    plan = ops.plan
    positions = ops.positions(tokens, past)
    norms = _input_norms(ops)
    x: Any = None  # until the rank has it
    normed: Any = None
    if plan.schedule.embeds:
        x = _scaled(ops, ops.embedding(tokens), plan.model.embedding_scale)
        normed = _normed(ops, x, norms[0])

    for step, norm in zip(plan.schedule.steps, norms[1:]):
        if isinstance(step, Receive):
            x = ops.broadcast(x, tokens)
            # On rank 0 too, which has it: what follows must depend on the broadcast, or a compiler may reorder
            # collectives on that rank alone.
            normed = _normed(ops, x, norm)
            continue
        shard = plan.layers[step.index]
        if isinstance(step, Layer):
            x, normed = _layer(ops, step, shard, x, normed, norm, positions)
        else:
            x, normed = _group(ops, step, shard, x, normed, norm, positions)

    if not plan.schedule.predicts:
        return ops.keep(x) if x is not None else tokens
    logits = _scaled(ops, ops.project(ops.select(normed, select), "lm_head"), plan.model.logits_scale)
    if plan.model.logits_cap is not None:
        logits = ops.soft_cap(logits, plan.model.logits_cap)
    return ops.keep(logits)


def _input_norms(ops: Ops[V]) -> list[str | None]:
    """The RMSNorm of each step's input (None: it has none), then that of the last projection.

    A rank that predicts nothing needs no norm after its last step, but all ranks must call the same collective there,
    so it passes one of its own.
    """
    schedule, model = ops.plan.schedule, ops.plan.model
    last = schedule.layers[-1].index if schedule.layers else 0
    own = f"layers.{last}.{'mlp_norm' if model.pre_norms else 'mlp_post_norm'}"
    names: list[str | None] = ["final_norm" if schedule.predicts else own]
    for step in reversed(schedule.steps):
        # What is received is the input of the layer that follows.
        names.append(names[-1] if isinstance(step, Receive) else _input_norm(ops, step.index, "attention"))
    return names[::-1]


def _input_norm(ops: Ops[V], layer: int, part: str) -> str | None:
    """The RMSNorm of the input of a layer's attention or MLP; None in a model without such norms."""
    return f"layers.{layer}.{part}_norm" if ops.plan.model.pre_norms else None


def _normed(ops: Ops[V], x: V, norm: str | None) -> V:
    return x if norm is None else ops.rms_norm(x, norm)


def _scaled(ops: Ops[V], x: V, factor: float) -> V:
    return x if factor == 1 else ops.scale(x, factor)


def _join(ops: Ops[V], delta: V, x: V, norm: str | None, peers: Peers | None) -> tuple[V, V]:
    """x + delta, or + the sum of the delta of the ranks `peers`; and its RMSNorm `norm`."""
    if norm is None:
        x = ops.keep(ops.add(x, delta) if peers is None else ops.all_reduce_residual(delta, x, peers))
        return x, x
    if peers is None:
        return ops.residual_norm(delta, x, norm)
    return ops.all_reduce_residual_norm(delta, x, norm, peers)


def _layer(
    ops: Ops[V], step: Layer, shard: LayerShard, x: V, normed: V, norm: str | None, positions: Any
) -> tuple[V, V]:
    """An ordinary decoder layer: attention then MLP, alone or split over the ranks."""
    if step.drops_join:
        return _join(ops, _own_change(ops, shard, x, normed, positions), x, norm, Peers.ALL)
    peers = Peers.ALL if step.split else None
    a, split = _whole(ops, _attention(ops, shard, normed, positions), shard, "attention", peers)
    x, normed = _join(ops, a, x, _input_norm(ops, shard.index, "mlp"), split)
    m, split = _whole(ops, _mlp(ops, shard, normed), shard, "mlp", peers)
    return _join(ops, m, x, norm, split)


def _whole(ops: Ops[V], delta: V, shard: LayerShard, part: str, peers: Peers | None) -> tuple[V, Peers | None]:
    """What is added of a sub-layer's output `delta`, and the ranks over which it is still to be summed.

    `peers`: those that the output is split over; None: it is whole. A norm needs the whole output, so these ranks are
    joined before it.
    """
    if not ops.plan.model.post_norms:
        return delta, peers
    whole = delta if peers is None else ops.all_reduce(delta, peers)
    return ops.rms_norm(whole, f"layers.{shard.index}.{part}_post_norm"), None


def _group(
    ops: Ops[V], step: Group, shard: LayerShard, x: V, normed: V, norm: str | None, positions: Any
) -> tuple[V, V]:
    """This rank's layer of a concurrent group, or its share of that; one all-reduce joins the group."""
    peers = Peers.LAYER if step.parts > 1 and not step.drops_join else None
    return _join(ops, _own_change(ops, shard, x, normed, positions, ops.plan.cqil.d, peers), x, norm, Peers.ALL)


def _own_change(
    ops: Ops[V], shard: LayerShard, x: V, normed: V, positions: Any, d: int = 0, peers: Peers | None = None
) -> V:
    """The change that this rank's layer, or its share of one, makes to x before all ranks join.

    `d`: how many layers' attention outputs the bypass adds to its own. `peers`: the ranks that share the layer and add
    up their attention for the MLP.
    """
    attended, split = _whole(ops, _attention(ops, shard, normed, positions), shard, "attention", peers)
    a = ops.keep(attended) if d else ops.share(attended)
    b = ops.bypass(a, d) if d else None
    attended = a if b is None else ops.add(a, b)
    _, normed = _join(ops, attended, x, _input_norm(ops, shard.index, "mlp"), split)  # shares of the bypass add up too
    m, split = _whole(ops, _mlp(ops, shard, normed), shard, "mlp", peers)
    change = ops.add(attended if ops.plan.cqil.bypass == "residual" else a, m)
    # Where each of these ranks has the whole change, one of them adds it.
    return change if split is peers or shard.adds_bias else ops.scale(change, 0.0)


def _attention(ops: Ops[V], shard: LayerShard, normed: V, positions: Any) -> V:
    model = ops.plan.model
    if not shard.num_heads:
        if model.joint_qk_norm:  # the other ranks need this one for the norms of their heads
            squares = ops.head_squares(None, None, normed, shard)
            return ops.zeros_after(normed, ops.all_reduce_squares(squares, ops.sharing(shard)))
        return ops.zeros_like(normed)
    qkv = ops.project(normed, f"layers.{shard.index}.qkv")
    out = ops.project(ops.attention(qkv, positions, shard), f"layers.{shard.index}.o")
    return _scaled(ops, out, model.residual_scale)


def _mlp(ops: Ops[V], shard: LayerShard, normed: V) -> V:
    model = ops.plan.model
    if not shard.num_neurons:
        return ops.zeros_like(normed)
    gate_up = ops.project(normed, f"layers.{shard.index}.gate_up")
    gated = ops.swiglu(gate_up) if model.activation == "silu" else ops.geglu(gate_up)
    return _scaled(ops, ops.project(gated, f"layers.{shard.index}.down"), model.residual_scale)
