"""A rank's tensors under the names that TensorRT-LLM's layers expect, and where each is in ours."""

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


@dataclass(frozen=True, kw_only=True)
class Names:
    """A target's names of modules; `{rank}` and `{place}` (in the rank's list of layers) are filled in.

    `qkv`: the module of all three projections, or one of each. The others are the parts of a layer.
    """

    embedding: str
    final_norm: str
    lm_head: str
    layer: str
    attention_norm: str
    qkv: tuple[str, ...]
    q_norm: str
    k_norm: str
    o: str
    mlp_norm: str
    gate: str
    up: str
    down: str


def tensors(plan: RankPlan, names: Names) -> Iterator[Part]:
    """The checkpoint of one rank, in the order of the file."""
    model, shapes, hidden = plan.model, plan.shapes, plan.model.hidden_size

    def part(name: str, source: str | None, shape: tuple[int, ...] | None = None, first: int = 0) -> Part:
        """All of `source`, or as much of it as `shape` says."""
        name = name.format(rank=plan.rank)
        return Part(name=name, shape=shape or shapes[str(source)], dtype=plan.dtype, source=source, first=first)

    def stacked(theirs: str, modules: tuple[str, ...], ours: str, rows: tuple[int, ...], bias: bool) -> Iterator[Part]:
        """The modules that make up one of our matrices, of so many rows each."""
        for kind, width in (("weight", hidden), ("bias", 1)):
            if kind == "bias" and not bias:
                continue
            first = 0
            for module, count in zip(modules, rows, strict=True):
                shape = (count, hidden) if kind == "weight" else (count,)
                yield part(f"{theirs}.{module}.{kind}", f"{ours}.{kind}", shape, first * width)
                first += count

    yield part(f"{names.embedding}.weight", "embedding.weight")
    for place, step in enumerate(plan.schedule.layers):
        shard, ours = plan.layers[step.index], f"layers.{step.index}"
        theirs = names.layer.replace("{place}", str(place))
        q, kv = shard.num_heads * model.head_dim, shard.num_kv_heads * model.head_dim
        rows = (q, kv, kv) if len(names.qkv) == 3 else (q + 2 * kv,)
        yield part(f"{theirs}.{names.attention_norm}.weight", f"{ours}.attention_norm.weight")
        yield from stacked(theirs, names.qkv, f"{ours}.qkv", rows, model.qkv_bias)
        if model.qk_norm:
            yield part(f"{theirs}.{names.q_norm}.weight", f"{ours}.q_norm.weight")
            yield part(f"{theirs}.{names.k_norm}.weight", f"{ours}.k_norm.weight")
        yield part(f"{theirs}.{names.o}.weight", f"{ours}.o.weight")
        yield part(f"{theirs}.{names.mlp_norm}.weight", f"{ours}.mlp_norm.weight")
        neurons = (shard.num_neurons, shard.num_neurons)
        yield from stacked(theirs, (names.gate, names.up), f"{ours}.gate_up", neurons, model.mlp_bias)
        yield part(f"{theirs}.{names.down}.weight", f"{ours}.down.weight")
        # Every rank adds one; those of split layers are added up, so only one rank may have it.
        for given, module, our_name in ((model.o_bias, names.o, "o"), (model.mlp_bias, names.down, "down")):
            if given:
                source = f"{ours}.{our_name}.bias" if shard.adds_bias else None
                yield part(f"{theirs}.{module}.bias", source, (hidden,))
    yield part(f"{names.final_norm}.weight", "final_norm.weight")
    if plan.shares_embedding:
        first, last = plan.vocabulary
        yield part(f"{names.lm_head}.weight", "embedding.weight", (last - first, hidden), first * hidden)
    else:
        yield part(f"{names.lm_head}.weight", "lm_head.weight")
