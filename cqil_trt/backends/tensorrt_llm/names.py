"""A rank's tensors under the names that TensorRT-LLM's layers expect, and where each is in ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from cqil_trt.errors import UserError
from cqil_trt.formats import StoredTensor
from cqil_trt.shard import RankPlan

# Where our tensors are in a file: offset and length in bytes, by name.
Spans = Mapping[str, tuple[int, int]]
_COPY_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Part(StoredTensor):
    """A tensor of the checkpoint: elements of our tensor `source`, from `first` on. `source` None: zeros."""

    source: str | None
    first: int = 0

    def blocks(self, file: BinaryIO, spans: Spans) -> Iterator[bytes]:
        """Its bytes, from the file that the builder wrote."""
        if self.source is not None:
            file.seek(spans[self.source][0] + self.first * self.nbytes // self.elements)
        left = self.nbytes
        while left:
            length = min(left, _COPY_BYTES)
            yield bytes(length) if self.source is None else read(file, length)
            left -= length


def read(file: BinaryIO, length: int) -> bytes:
    """So many bytes. Raises UserError where the file ends before."""
    block = file.read(length)
    if len(block) != length:
        raise UserError(f"{file.name}: truncated")
    return block


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

    def matrix(
        self, plan: RankPlan, layer: int, name: str, ours: str, first: int, shape: tuple[int, int]
    ) -> Iterator[Part]:
        """The tensors of a projection of model layer `layer`: `shape` of our `ours`, from row `first` on."""
        yield Part(
            name=f"{name}.weight", shape=shape, dtype=plan.dtype, source=f"{ours}.weight", first=first * shape[1]
        )


def tensors(plan: RankPlan, names: Names) -> Iterator[Part]:
    """The checkpoint of one rank, in the order of the file."""
    hidden = plan.model.hidden_size
    yield _part(plan, f"{names.embedding}.weight", "embedding.weight")
    for place, step in enumerate(plan.schedule.layers):
        yield from _layer(plan, names, names.layer.format(rank=plan.rank, place=place), step.index)
    yield _part(plan, f"{names.final_norm}.weight", "final_norm.weight")
    if plan.shares_embedding:
        first, last = plan.vocabulary
        yield _part(plan, f"{names.lm_head}.weight", "embedding.weight", (last - first, hidden), first * hidden)
    else:
        yield _part(plan, f"{names.lm_head}.weight", "lm_head.weight")


def _layer(plan: RankPlan, names: Names, theirs: str, index: int) -> Iterator[Part]:
    """The tensors of model layer `index`, whose modules are in `theirs`."""
    model, shard, ours, hidden = plan.model, plan.layers[index], f"layers.{index}", plan.model.hidden_size
    q, kv, neurons = shard.num_heads * model.head_dim, shard.num_kv_heads * model.head_dim, shard.num_neurons

    def stacked(modules: tuple[str, ...], source: str, rows: tuple[int, ...], bias: bool) -> Iterator[Part]:
        """The modules that make up one of our matrices, of so many rows each."""
        first = 0
        for module, count in zip(modules, rows, strict=True):
            name = f"{theirs}.{module}"
            yield from names.matrix(plan, index, name, f"{ours}.{source}", first, (count, hidden))
            if bias:
                yield _part(plan, f"{name}.bias", f"{ours}.{source}.bias", (count,), first)
            first += count

    yield _part(plan, f"{theirs}.{names.attention_norm}.weight", f"{ours}.attention_norm.weight")
    yield from stacked(names.qkv, "qkv", (q, kv, kv) if len(names.qkv) == 3 else (q + 2 * kv,), model.qkv_bias)
    if model.qk_norm:
        yield _part(plan, f"{theirs}.{names.q_norm}.weight", f"{ours}.q_norm.weight")
        yield _part(plan, f"{theirs}.{names.k_norm}.weight", f"{ours}.k_norm.weight")
    yield _part(plan, f"{theirs}.{names.mlp_norm}.weight", f"{ours}.mlp_norm.weight")
    yield from stacked((names.gate, names.up), "gate_up", (neurons, neurons), model.mlp_bias)
    for module, source, width, bias in (
        (names.o, "o", q, model.o_bias),
        (names.down, "down", neurons, model.mlp_bias),
    ):
        name = f"{theirs}.{module}"
        yield from names.matrix(plan, index, name, f"{ours}.{source}", 0, (hidden, width))
        if bias:  # Every rank adds one; those of split layers are added up, so only one rank may have it.
            yield _part(plan, f"{name}.bias", f"{ours}.{source}.bias" if shard.adds_bias else None, (hidden,))


def _part(plan: RankPlan, name: str, source: str | None, shape: tuple[int, ...] | None = None, first: int = 0) -> Part:
    """All of `source`, or as much of it as `shape` says."""
    name = name.format(rank=plan.rank)
    return Part(name=name, shape=shape or plan.shapes[str(source)], dtype=plan.dtype, source=source, first=first)
