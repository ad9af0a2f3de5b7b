"""CqilConfig x depth → the steps of each rank. Pure Python: no tensor, no backend."""

from __future__ import annotations

from dataclasses import dataclass

from cqil_trt.config import CqilConfig


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
    """`layers` run concurrently, one per rank; this rank runs layer `index`, which is `layers[rank]`."""

    layers: tuple[int, ...]
    index: int

    @property
    def all_reduces(self) -> int:
        return 1


Step = Receive | Layer | Group


@dataclass(frozen=True, kw_only=True)
class RankSchedule:
    """What one rank does per token.

    `embeds` / `predicts`: whether the rank starts from the token embedding, and whether it ends in (its slice of)
    the vocabulary. `split_vocabulary`: the last projection's rows are spread over the ranks.
    """

    rank: int
    world_size: int
    steps: tuple[Step, ...]
    embeds: bool
    predicts: bool
    split_vocabulary: bool

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
    return tuple(_rank_schedule(cqil, num_layers, rank) for rank in range(cqil.p))


def _rank_schedule(cqil: CqilConfig, num_layers: int, rank: int) -> RankSchedule:
    groups = tuple(Group(layers, layers[rank]) for layers in cqil.groups)
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

    split = cqil.p > 1
    ordinary = {i: Layer(i, split, i in cqil.drop_attention_join) for i in (*before, *after)}
    steps = (*(ordinary[i] for i in before), *groups, *(ordinary[i] for i in after))
    return RankSchedule(rank=rank, world_size=cqil.p, steps=steps, embeds=True, predicts=True, split_vocabulary=split)
