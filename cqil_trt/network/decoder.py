"""The decoder, written once against `Ops`: this is the network definition of every backend.

Between steps it carries the residual stream x and its normalised form, because a layer's last addition and the next
layer's RMSNorm are one kernel where a backend has it.
"""

from __future__ import annotations

from typing import TypeVar

from cqil_trt.network.ops import Ops
from cqil_trt.schedule import Group, Layer, Receive
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
    x = normed = None
    if plan.schedule.embeds:
        x = ops.embedding(tokens, ops.weight("embedding.weight"))
        normed = ops.rms_norm(x, norms[0])

    for step, norm in zip(plan.schedule.steps, norms[1:]):
        if isinstance(step, Receive):
            x = ops.broadcast(x, tokens)
            # On rank 0 too, which has it: what comes behind must depend on the broadcast, or a compiler may reorder
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
    return ops.keep(ops.linear(ops.select(normed, select), ops.weight("lm_head.weight")))


def _input_norms(ops: Ops[V]) -> list[V | None]:
    """The RMSNorm weight of each step's input, then that of the last projection (None where there is none)."""
    schedule = ops.plan.schedule
    names: list[str | None] = ["final_norm.weight" if schedule.predicts else None]
    for step in reversed(schedule.steps):
        # What is received is what the layer behind it starts from.
        names.append(names[-1] if isinstance(step, Receive) else f"layers.{step.index}.attention_norm.weight")
    return [None if name is None else ops.weight(name) for name in reversed(names)]


def _layer(ops: Ops[V], step: Layer, shard: LayerShard, x: V, normed: V, norm: V, positions: V) -> tuple[V, V]:
    """An ordinary decoder layer: attention then MLP, alone or split over the ranks."""
    join = ops.all_reduce_residual_norm if step.split else ops.residual_norm
    mlp_norm = ops.weight(f"layers.{shard.index}.mlp_norm.weight")
    x, normed = join(_attention(ops, shard, normed, positions), x, mlp_norm)
    return join(_mlp(ops, shard, normed), x, norm)


def _group(ops: Ops[V], step: Group, shard: LayerShard, x: V, normed: V, norm: V | None, positions: V):
    """This rank's layer of a concurrent group; one all-reduce joins the group."""
    cqil = ops.plan.cqil
    a = ops.keep(_attention(ops, shard, normed, positions))
    b = ops.bypass(a, cqil.d) if cqil.d else None
    attended = a if b is None else ops.add(a, b)
    _, normed = ops.residual_norm(attended, x, ops.weight(f"layers.{shard.index}.mlp_norm.weight"))
    delta = ops.add(attended if cqil.bypass == "residual" else a, _mlp(ops, shard, normed))
    if norm is None:
        # The last thing this rank does: it needs no norm, but all ranks must call the same collective.
        norm = ops.weight(f"layers.{shard.index}.mlp_norm.weight")
    return ops.all_reduce_residual_norm(delta, x, norm)


def _attention(ops: Ops[V], shard: LayerShard, normed: V, positions: V) -> V:
    if not shard.num_heads:
        return ops.zeros_like(normed)
    model, name = ops.plan.model, f"layers.{shard.index}"
    qkv_bias = ops.weight(f"{name}.qkv.bias") if model.qkv_bias else None
    o_bias = ops.weight(f"{name}.o.bias") if model.o_bias and shard.adds_bias else None
    qkv = ops.linear(normed, ops.weight(f"{name}.qkv.weight"), qkv_bias)
    return ops.linear(ops.attention(qkv, positions, shard), ops.weight(f"{name}.o.weight"), o_bias)


def _mlp(ops: Ops[V], shard: LayerShard, normed: V) -> V:
    if not shard.num_neurons:
        return ops.zeros_like(normed)
    model, name = ops.plan.model, f"layers.{shard.index}"
    gate_up_bias = ops.weight(f"{name}.gate_up.bias") if model.mlp_bias else None
    down_bias = ops.weight(f"{name}.down.bias") if model.mlp_bias and shard.adds_bias else None
    gate_up = ops.linear(normed, ops.weight(f"{name}.gate_up.weight"), gate_up_bias)
    return ops.linear(ops.swiglu(gate_up), ops.weight(f"{name}.down.weight"), down_bias)
