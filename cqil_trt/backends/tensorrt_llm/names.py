"""A rank's tensors under the names that TensorRT-LLM's layers expect, and where each is in ours.

Names: models/llama in TensorRT-LLM 0.17 and its `LLaMAForCausalLM` since. Its gated MLP calls the matrix that the
activation follows `fc` (gate_proj in checkpoints) and the other one `gate` (up_proj).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cqil_trt.formats import StoredTensor
from cqil_trt.shard import RankPlan


@dataclass(frozen=True, kw_only=True)
class Part(StoredTensor):
    """A tensor of the checkpoint: elements of our tensor `source`, from `first` on. `source` None: zeros."""

    source: str | None
    first: int = 0


def parts(plan: RankPlan) -> Iterator[Part]:
    """The checkpoint of one rank, in the order of the file."""
    model, shapes, hidden = plan.model, plan.shapes, plan.model.hidden_size

    def part(name: str, source: str | None, shape: tuple[int, ...] | None = None, first: int = 0) -> Part:
        """All of `source`, or as much of it as `shape` says."""
        return Part(name=name, shape=shape or shapes[str(source)], dtype=plan.dtype, source=source, first=first)

    yield part("transformer.vocab_embedding.weight", "embedding.weight")
    for place, step in enumerate(plan.schedule.layers):
        shard, ours, theirs = plan.layers[step.index], f"layers.{step.index}", f"transformer.layers.{place}"
        yield part(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight")
        yield part(f"{theirs}.attention.qkv.weight", f"{ours}.qkv.weight")
        yield part(f"{theirs}.attention.dense.weight", f"{ours}.o.weight")
        yield part(f"{theirs}.post_layernorm.weight", f"{ours}.mlp_norm.weight")
        neurons = shard.num_neurons
        for name, first in (("fc", 0), ("gate", neurons)):
            yield part(f"{theirs}.mlp.{name}.weight", f"{ours}.gate_up.weight", (neurons, hidden), first * hidden)
        yield part(f"{theirs}.mlp.proj.weight", f"{ours}.down.weight")
        if model.qkv_bias:
            yield part(f"{theirs}.attention.qkv.bias", f"{ours}.qkv.bias")
        if model.mlp_bias:
            for name, first in (("fc", 0), ("gate", neurons)):
                yield part(f"{theirs}.mlp.{name}.bias", f"{ours}.gate_up.bias", (neurons,), first)
        # Every rank adds one; those of split layers are added up, so only one rank may have it.
        for given, their_name, our_name in (
            (model.o_bias, "attention.dense", "o"),
            (model.mlp_bias, "mlp.proj", "down"),
        ):
            if given:
                source = f"{ours}.{our_name}.bias" if shard.adds_bias else None
                yield part(f"{theirs}.{their_name}.bias", source, (hidden,))
    yield part("transformer.ln_f.weight", "final_norm.weight")
    if plan.shares_embedding:
        first, last = plan.vocabulary
        yield part("lm_head.weight", "embedding.weight", (last - first, hidden), first * hidden)
    else:
        yield part("lm_head.weight", "lm_head.weight")
