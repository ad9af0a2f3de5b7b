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
        x = ops.embedding(tokens)
        normed = ops.rms_norm(x, norms[0])

    for step, norm in zip(plan.schedule.steps, norms[1:]):
        if isinstance(step, Receive):
            x = ops.broadcast(x, tokens)
            # On rank 0 too, which has it: what follows must depend on the broadcast, or a compiler may reorder
            # collectives on that rank alone.
            normed = ops.rms_norm(x, norm)
            continue
        shard = plan.layers[step.index]
        if isinstance(step, Layer):
            x, normed = _layer(ops, step, shard, x, normed, norm, positions)
        else:
            x, normed = _group(ops, step, shard, x, normed, norm, positions)

    if not plan.schedule.predicts:
        return ops.keep(x) if x is not None else tokens
    return ops.keep(ops.project(ops.select(normed, select), "lm_head"))


def _input_norms(ops: Ops[V]) -> list[str]:
    """The RMSNorm of each step's input, then that of the last projection.

    A rank that predicts nothing needs no norm after its last step, but all ranks must call the same collective there,
    so it passes one of its own.
    """
    schedule = ops.plan.schedule
    last = schedule.layers[-1].index if schedule.layers else 0
    names = ["final_norm" if schedule.predicts else f"layers.{last}.mlp_norm"]
    for step in reversed(schedule.steps):
        # What is received is the input of the layer that follows.
        names.append(names[-1] if isinstance(step, Receive) else f"layers.{step.index}.attention_norm")
    return names[::-1]


def _layer(ops: Ops[V], step: Layer, shard: LayerShard, x: V, normed: V, norm: str, positions: Any) -> tuple[V, V]:
    """An ordinary decoder layer: attention then MLP, alone or split over the ranks."""
    if step.drops_join:
        return ops.all_reduce_residual_norm(_own_change(ops, shard, x, normed, positions), x, norm)
    join = ops.all_reduce_residual_norm if step.split else ops.residual_norm
    x, normed = join(_attention(ops, shard, normed, positions), x, f"layers.{shard.index}.mlp_norm")
    return join(_mlp(ops, shard, normed), x, norm)


def _group(ops: Ops[V], step: Group, shard: LayerShard, x: V, normed: V, norm: str, positions: Any) -> tuple[V, V]:
    """This rank's layer of a concurrent group, or its share of that; one all-reduce joins the group."""
    joins = step.parts > 1 and not step.drops_join
    change = _own_change(ops, shard, x, normed, positions, ops.plan.cqil.d, joins)
    return ops.all_reduce_residual_norm(change, x, norm)


def _own_change(ops: Ops[V], shard: LayerShard, x: V, normed: V, positions: Any, d: int = 0, joins: bool = False) -> V:
    """The change that this rank's layer, or its share of one, makes to x before all ranks join.

    `d`: how many layers' attention outputs the bypass adds to its own. `joins`: the ranks that share the layer add up
    their attention for the MLP.
    """
    a = ops.keep(_attention(ops, shard, normed, positions))
    b = ops.bypass(a, d) if d else None
    attended = a if b is None else ops.add(a, b)
    mlp_norm = f"layers.{shard.index}.mlp_norm"
    if joins:  # shares of the bypass add up too
        _, normed = ops.all_reduce_residual_norm(attended, x, mlp_norm, Peers.LAYER)
    else:
        _, normed = ops.residual_norm(attended, x, mlp_norm)
    return ops.add(attended if ops.plan.cqil.bypass == "residual" else a, _mlp(ops, shard, normed))


def _attention(ops: Ops[V], shard: LayerShard, normed: V, positions: Any) -> V:
    if not shard.num_heads:
        return ops.zeros_like(normed)
    qkv = ops.project(normed, f"layers.{shard.index}.qkv")
    return ops.project(ops.attention(qkv, positions, shard), f"layers.{shard.index}.o")


def _mlp(ops: Ops[V], shard: LayerShard, normed: V) -> V:
    if not shard.num_neurons:
        return ops.zeros_like(normed)
    gate_up = ops.project(normed, f"layers.{shard.index}.gate_up")
    return ops.project(ops.swiglu(gate_up), f"layers.{shard.index}.down")
