"""CqilConfig x depth → the steps of each rank. Pure Python: no tensor, no backend."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cqil_trt.config import CqilConfig


class Peers(Enum):
    """Which ranks take part in a collective.

    With t ranks per layer, rank j * t + u runs part u of layer j of each group.
    """

    ALL = "all"
    LAYER = "layer"  # those that share this rank's layer of a group
    PART = "part"  # those with the same part of the group's other layers


@dataclass(frozen=True)
class Receive:
    """Placement `leader`: rank 0 broadcasts the residual stream, the others receive it."""


@dataclass(frozen=True)
class Layer:
    """An ordinary layer. `split`: all ranks run it together, tensor-parallel; otherwise this rank runs it alone.

    `drops_join`: a split layer without the all-reduce after attention. Its MLP sees this rank's part of the attention.
    """

    index: int
    split: bool
    drops_join: bool = False

    @property
    def all_reduces(self) -> int:
        return self.split * (2 - self.drops_join)


@dataclass(frozen=True)
class Group:
    """`layers` run concurrently; this rank runs part `part` of `parts` of layer `index`.

    `drops_join`: the ranks that share the layer do without the all-reduce after attention.
    """

    layers: tuple[int, ...]
    index: int
    part: int = 0
    parts: int = 1
    drops_join: bool = False

    @property
    def all_reduces(self) -> int:
        return 1 + (self.parts > 1 and not self.drops_join)


Step = Receive | Layer | Group


@dataclass(frozen=True, kw_only=True)
class RankSchedule:
    """What one rank does per token.

    `embeds` / `predicts`: whether the rank starts from the token embedding, and whether it ends in (its slice of)
    the vocabulary. `split_vocabulary`: the last projection's rows are spread over the ranks. `ranks_per_layer`: how
    many ranks share a layer of a group.
    """

    rank: int
    world_size: int
    steps: tuple[Step, ...]
    embeds: bool
    predicts: bool
    split_vocabulary: bool
    ranks_per_layer: int = 1

    def peers(self, kind: Peers) -> range:
        """The ranks, this one included, with which it joins in collectives of this kind; ascending."""
        t = self.ranks_per_layer
        if kind is Peers.LAYER:
            first = self.rank // t * t
            return range(first, first + t)
        if kind is Peers.PART:
            return range(self.rank % t, self.world_size, t)
        return range(self.world_size)

    @property
    def layers(self) -> tuple[Layer | Group, ...]:
        """The steps that run a layer, in order: each has its own KV cache on this rank."""
        return tuple(step for step in self.steps if not isinstance(step, Receive))

    @property
    def all_reduces(self) -> int:
        """This rank's all-reduces per forward pass."""
        return sum(step.all_reduces for step in self.layers)

    @property
    def broadcasts(self) -> int:
        return sum(isinstance(step, Receive) for step in self.steps)


def schedule(cqil: CqilConfig, num_layers: int) -> tuple[RankSchedule, ...]:
    """The schedule of every rank for a model of `num_layers` layers.

    Every rank lists its collectives in the same order, so a run in lockstep cannot deadlock. Raises UserError when
    a layer of the configuration is beyond the model.
    """
    cqil.check_depth(num_layers)
    return tuple(_rank_schedule(cqil, num_layers, rank) for rank in range(cqil.ranks))


def _rank_schedule(cqil: CqilConfig, num_layers: int, rank: int) -> RankSchedule:
    member, part = divmod(rank, cqil.ranks_per_layer)
    dropped = cqil.drop_attention_join
    groups = tuple(
        Group(layers, layers[member], part, cqil.ranks_per_layer, layers[member] in dropped) for layers in cqil.groups
    )
    before, after = range(cqil.start), range(cqil.end, num_layers)
    if not groups:
        before, after = range(num_layers), range(0)

    if cqil.placement == "leader":
        leads = rank == 0
        receive = (Receive(),) if groups and cqil.p > 1 else ()
        steps: tuple[Step, ...] = (*receive, *groups)
        if leads:
            steps = (*(Layer(i, False) for i in before), *steps, *(Layer(i, False) for i in after))
        return RankSchedule(
            rank=rank, world_size=cqil.p, steps=steps, embeds=leads, predicts=leads, split_vocabulary=False
        )

    split = cqil.ranks > 1
    ordinary = {i: Layer(i, split, i in dropped) for i in (*before, *after)}
    steps = (*(ordinary[i] for i in before), *groups, *(ordinary[i] for i in after))
    return RankSchedule(
        rank=rank,
        world_size=cqil.ranks,
        steps=steps,
        embeds=True,
        predicts=True,
        split_vocabulary=split,
        ranks_per_layer=cqil.ranks_per_layer,
    )
