"""A rank's tensors under the names that TensorRT-LLM's layers expect, and where each lies in ours.

Names: models/llama in TensorRT-LLM 0.17 and its `LLaMAForCausalLM` since. Its gated MLP calls the matrix that the
activation follows `fc` (gate_proj in checkpoints) and the other one `gate` (up_proj).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from cqil_trt.config import DTYPE_BYTES
from cqil_trt.shard import RankPlan


@dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint: elements `first` … of our tensor `source`; zeros where there is none."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: str | None
    first: int = 0

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]


def parts(plan: RankPlan) -> Iterator[Part]:
    """The checkpoint of one rank, in the order of the file."""
    model, shapes, dtype = plan.model, plan.shapes, plan.dtype
    hidden = model.hidden_size

    def whole(theirs: str, ours: str) -> Part:
        return Part(theirs, shapes[ours], dtype, ours)

    yield whole("transformer.vocab_embedding.weight", "embedding.weight")
    for place, step in enumerate(plan.schedule.layers):
        shard, ours, theirs = plan.layers[step.index], f"layers.{step.index}", f"transformer.layers.{place}"
        yield whole(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight")
        yield whole(f"{theirs}.attention.qkv.weight", f"{ours}.qkv.weight")
        yield whole(f"{theirs}.attention.dense.weight", f"{ours}.o.weight")
        yield whole(f"{theirs}.post_layernorm.weight", f"{ours}.mlp_norm.weight")
        half = shard.num_neurons * hidden
        for name, first in (("fc", 0), ("gate", half)):
            yield Part(
                f"{theirs}.mlp.{name}.weight", (shard.num_neurons, hidden), dtype, f"{ours}.gate_up.weight", first
            )
        yield whole(f"{theirs}.mlp.proj.weight", f"{ours}.down.weight")
        if model.qkv_bias:
            yield whole(f"{theirs}.attention.qkv.bias", f"{ours}.qkv.bias")
        if model.mlp_bias:
            for name, first in (("fc", 0), ("gate", shard.num_neurons)):
                yield Part(f"{theirs}.mlp.{name}.bias", (shard.num_neurons,), dtype, f"{ours}.gate_up.bias", first)
        # Every rank adds one; those of split layers are added up, so that only one rank may have it.
        for given, theirs_name, ours_name in (
            (model.o_bias, "attention.dense", "o"),
            (model.mlp_bias, "mlp.proj", "down"),
        ):
            if given:
                source = f"{ours}.{ours_name}.bias" if shard.adds_bias else None
                yield Part(f"{theirs}.{theirs_name}.bias", (hidden,), dtype, source)
    yield whole("transformer.ln_f.weight", "final_norm.weight")
    first, last = plan.vocabulary
    if plan.shares_embedding:
        yield Part("lm_head.weight", (last - first, hidden), dtype, "embedding.weight", first * hidden)
    else:
        yield whole("lm_head.weight", "lm_head.weight")
