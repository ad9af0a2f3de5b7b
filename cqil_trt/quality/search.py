"""Which configurations of a model no other one beats in both quality and predicted latency.

A configuration is groups of layers (p, d, start, end), ranks per layer, layers without the all-reduce after
attention, and the formats of the layers' matrices and of the last projection. Quality is measured, at most as often as
a budget says; latency is predicted. No tensors here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Any, TypeVar

from cqil_trt.config import MAX_RANKS, CqilConfig
from cqil_trt.errors import UserError
from cqil_trt.formats import DENSE
from cqil_trt.quality.similarity import frontier, ranges

T = TypeVar("T")

# What a configuration's cost is: the rise of log-perplexity, or the divergence from the unchanged model.
MEASURES = ("perplexity", "divergence")
# The kinds of configurations; a kind's frontier is over the kinds that it names here.
PLAIN, JOINS, QUANTIZED, BOTH = "dense", "dropped joins", "quantized", "quantized, dropped joins"
KINDS: Mapping[str, tuple[str, ...]] = {
    PLAIN: (PLAIN,),
    JOINS: (PLAIN, JOINS),
    QUANTIZED: (PLAIN, QUANTIZED),
    BOTH: (PLAIN, JOINS, QUANTIZED, BOTH),
}
# A greedy step drops the joins of a twelfth of the layers: those of two of 32 layers.
_STEPS = 12


@dataclass(frozen=True)
class Candidate:
    """A configuration, the format of its layers' matrices, and that of its last projection."""

    cqil: CqilConfig
    weights: str = DENSE
    head: str = DENSE

    @property
    def kind(self) -> str:
        dropped = bool(self.cqil.drop_attention_join)
        quantized = {self.weights, self.head} != {DENSE}
        return (BOTH if dropped else QUANTIZED) if quantized else JOINS if dropped else PLAIN

    @property
    def ranks(self) -> int:
        return self.cqil.ranks

    @property
    def computed(self) -> Candidate:
        """The candidate that stands for all that compute the same: only its quality is measured.

        The placement never matters. The number of ranks that share a layer matters only where a join is dropped.
        """
        if not self.cqil.changed_layers:
            return replace(self, cqil=CqilConfig(p=1))
        shared = self.cqil.ranks_per_layer if self.cqil.drop_attention_join else 1
        placement = "sharded" if self.cqil.groups else "tensor"
        return replace(self, cqil=replace(self.cqil, placement=placement, ranks_per_layer=shared))

    def placed(self, placements: Collection[str]) -> tuple[Candidate, ...]:
        """The candidates that compute this, in those of the `placements` that they can have.

        Placement leader has no joins after attention, and a rank for each layer of a group. Without groups, or on one
        rank, there is nothing to choose.
        """
        if not self.cqil.groups:
            return (self,)
        splits = self.cqil.drop_attention_join or self.cqil.ranks_per_layer > 1
        fitting = [name for name in placements if name == "sharded" or not splits]
        return tuple(replace(self, cqil=replace(self.cqil, placement=name)) for name in fitting)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """`cost`: what a configuration loses, in nats per token. `values`: the measurements, by name."""

    cost: float
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """A measured candidate, in its fastest placement. `seconds`: predicted, per token."""

    candidate: Candidate
    seconds: float
    quality: Quality

    def to_dict(self) -> dict[str, Any]:
        candidate = self.candidate
        described = {"cqil": candidate.cqil.to_dict(), "weights": candidate.weights, "head": candidate.head}
        described["kind"] = candidate.kind
        found = {"log_cost": self.quality.cost, **self.quality.values, "predicted_ms": self.seconds * 1e3}
        return {**described, "ranks": candidate.ranks, **found}


@dataclass(frozen=True, kw_only=True)
class Space:
    """The configurations that are searched.

    Attributes:
        num_layers: of the model.
        first: the first layer that may be in a group.
        ps: group sizes.
        ranks_per_layer: how many ranks may share each layer of a group.
        ds, bypass: bypass distances, and where the bypass goes.
        weights: formats of the layers' matrices; the first is dense.
        heads: formats of the last projection, each with every one of the layers' matrices; the first is dense.
        drops: whether joins may be dropped.
        joins: the layers in the order in which their joins are dropped.
    """

    num_layers: int
    first: int
    ps: tuple[int, ...]
    ranks_per_layer: tuple[int, ...]
    ds: tuple[int, ...]
    bypass: str
    weights: tuple[str, ...]
    drops: bool
    heads: tuple[str, ...] = (DENSE,)
    joins: tuple[int, ...] = ()

    @property
    def formats(self) -> list[tuple[str, str]]:
        """The formats of the layers' matrices and of the last projection, together; the first are dense."""
        return list(product(self.weights, self.heads))

    def __len__(self) -> int:
        return len(self.formats) * sum(1 + self._droppable(cqil) for cqil in self._joined())

    @property
    def computations(self) -> int:
        """How many candidates with the same formats differ in what they compute."""
        joined = list(self._joined())
        return len({Candidate(cqil).computed for cqil in joined}) + sum(map(self._droppable, joined))

    def _droppable(self, cqil: CqilConfig) -> int:
        """How many joins may be dropped."""
        return len(self.joins_of(cqil)) if self.drops else 0

    def __iter__(self) -> Iterator[Candidate]:
        """Every candidate, format by format: of the joins in the order `joins`, the first 0, 1, 2, … are dropped."""
        for weights, head in self.formats:
            for cqil in self._joined():
                counts = range(self._droppable(cqil) + 1)
                yield from (Candidate(self.dropping(cqil, count), weights, head) for count in counts)

    def _joined(self) -> Iterator[CqilConfig]:
        """The configurations that drop no join."""
        yield from self.unchanged
        for p, d in self.groups:
            for start, end in ranges(self.first, self.num_layers, p):
                yield from self.shared(self.grouped(p, d, start, end))

    @property
    def ranks(self) -> list[int]:
        """The numbers of ranks, in ascending order."""
        return sorted({p * t for p in self.ps for t in self.ranks_per_layer if p * t <= MAX_RANKS})

    @property
    def unchanged(self) -> list[CqilConfig]:
        """The model as it is, on one rank and on each number of ranks."""
        return [CqilConfig(p=1), *(CqilConfig(p=ranks, placement="tensor") for ranks in self.ranks)]

    @property
    def groups(self) -> list[tuple[int, int]]:
        """The kinds of groups, as p and d."""
        return [(p, d) for p in self.ps for d in self.ds if d < p and p * min(self.ranks_per_layer) <= MAX_RANKS]

    def grouped(self, p: int, d: int, start: int, end: int) -> CqilConfig:
        return CqilConfig(p=p, d=d, start=start, end=end, bypass=self.bypass if d else "mlp")

    def shared(self, cqil: CqilConfig) -> list[CqilConfig]:
        """The configuration with each number of ranks per layer."""
        return [replace(cqil, ranks_per_layer=t) for t in self.ranks_per_layer if cqil.p * t <= MAX_RANKS]

    def joins_of(self, cqil: CqilConfig) -> list[tuple[int, ...]]:
        """The joins that can be dropped: the layers of each.

        The layers of a group drop theirs together: they wait for each other at its end, so one alone saves nothing.
        """
        groups = cqil.groups if cqil.ranks_per_layer > 1 and not cqil.d else ()
        return [*((layer,) for layer in cqil.split_layers(self.num_layers)), *groups]

    def dropping(self, cqil: CqilConfig, count: int) -> CqilConfig:
        """The configuration without the first `count` of its joins in the order `joins`.

        A group's join has the place of the last of its layers. SmolLM2's layers lose about half as much on two ranks
        as on four (docs/quality.md), so the two layers of a group lose about as much as one that four ranks share.
        """
        ordered = sorted(self.joins_of(cqil), key=lambda layers: max(map(self.joins.index, layers))) if count else []
        return cqil.dropping(chain.from_iterable(ordered[:count]), self.num_layers)


class Search:
    """Measures candidates of a space and keeps them as `points`.

    `measure`: the quality of a candidate. `seconds`: its predicted seconds per token, in its placement. `placements`:
    those to choose the fastest from. `budget`: how often `measure` may be called, at least three times for each pair of
    formats except the dense one. `limit`: the cost from which on a candidate leads to no others. `unchanged`: the
    quality of the unchanged model, whose measurement is not counted.
    """

    def __init__(
        self,
        space: Space,
        measure: Callable[[Candidate], Quality],
        seconds: Callable[[Candidate], float],
        placements: Collection[str],
        budget: int,
        limit: float,
        unchanged: Quality,
    ):
        self.space, self.budget, self.points = space, budget, dict[Candidate, Point]()
        self._measure, self._seconds, self._placements, self._limit = measure, seconds, placements, limit
        self._qualities = {Candidate(CqilConfig(p=1)): unchanged}
        self._first_groups: dict[tuple[int, int], list[int]] = {}

    @property
    def evaluations(self) -> int:
        """How often quality has been measured."""
        return len(self._qualities) - 1

    @property
    def planned(self) -> int:
        """How often it will be measured at most."""
        return min(self.budget, self._whole)

    @property
    def exhaustive(self) -> bool:
        """Whether the budget is enough for the whole space."""
        return self._whole <= self.budget

    @property
    def _whole(self) -> int:
        """Measurements of the whole space, in which the unchanged model is known, and of each join by itself for their
        order; the cheapest is in the space."""
        space = self.space
        return len(space.formats) * space.computations - 1 + (space.num_layers - 1 if space.drops else 0)

    def run(self) -> None:
        self._take(Candidate(cqil) for cqil in self.space.unchanged)
        if self.exhaustive:
            if self.space.drops:
                self._order_joins(self.space.num_layers)
            self._take(self.space)
        else:
            self._greedily()

    def frontier(self, ranks: int, kind: str) -> list[Point]:
        """The points on at most `ranks` ranks that no other of them beats, in order of latency.

        `kind`: the kind that they may have, besides those that need less (`KINDS`).
        """
        fitting = [p for p in self.points.values() if p.candidate.ranks <= ranks and p.candidate.kind in KINDS[kind]]
        return self._best(fitting)

    @staticmethod
    def _best(points: Sequence[Point]) -> list[Point]:
        return [points[i] for i in frontier([p.seconds for p in points], [p.quality.cost for p in points])]

    def _take(self, candidates: Iterable[Candidate]) -> None:
        """Adds the candidates to the points, as long as the budget lasts."""
        for candidate in candidates:
            if candidate in self.points:
                continue
            computed, cqil = candidate.computed, candidate.cqil
            if computed not in self._qualities:
                if self.evaluations == self.budget:
                    continue
                self._qualities[computed] = self._measure(computed)
            # The other numbers of ranks per layer come with it where they compute the same.
            alike = self.space.shared(cqil) if cqil.groups and not cqil.drop_attention_join else [cqil]
            for each in alike:
                self._add(replace(candidate, cqil=each), self._qualities[computed])

    def _add(self, candidate: Candidate, quality: Quality) -> None:
        placed = [(self._seconds(each), each) for each in candidate.placed(self._placements)]
        if placed:
            seconds, fastest = min(placed, key=lambda found: found[0])
            self.points[candidate] = Point(candidate=fastest, seconds=seconds, quality=quality)

    def _order_joins(self, count: int) -> None:
        """Orders the joins by what each costs by itself, on the most ranks; `count` of them are measured.

        A layer between two measured ones counts as the nearer.
        """
        layers, shared = self.space.num_layers, CqilConfig(p=max(self.space.ranks), placement="tensor")
        single = {layer: Candidate(shared.dropping([layer], layers)) for layer in spread(range(layers), count)}
        self._take(single.values())
        costs = {layer: self.points[one].quality.cost for layer, one in single.items()}
        nearest = {layer: min(costs, key=lambda other: abs(other - layer)) for layer in range(layers)}
        order = sorted(range(layers), key=lambda layer: (costs[nearest[layer]], layer))
        self.space = replace(self.space, joins=tuple(order))

    def _find_first_groups(self, p: int, d: int, count: int) -> None:
        """The best place of a single group for each remainder of its first layer by p; `count` are measured."""
        starts = range(self.space.first, self.space.num_layers - p + 1)
        single = {
            start: Candidate(self.space.shared(self.space.grouped(p, d, start, start + p))[0])
            for start in spread(starts, count)
        }
        self._take(single.values())
        measured = [start for start in single if single[start] in self.points]
        by_cost = sorted(measured, key=lambda start: self.points[single[start]].quality.cost)
        self._first_groups[p, d] = list({start % p: start for start in reversed(by_cost)}.values())

    def _greedily(self) -> None:
        """Two thirds of the budget look at dense matrices, a third measures what was found in the other formats.

        Of the two thirds, at most half find single joins and groups that cost little; the rest grows configurations.
        """
        space, others = self.space, self.space.formats[1:]
        dense = self.budget * 2 // 3 if others else self.budget
        sizes = {pd: max(0, space.num_layers - pd[0] + 1 - space.first) for pd in space.groups}
        joins = space.num_layers if space.drops else 0
        share = min(1.0, dense / 2 / (joins + sum(sizes.values())))
        if joins:
            self._order_joins(max(1, int(share * joins)))
        for (p, d), size in sizes.items():
            # With more kinds of groups than measurements, some are left out: the other formats need theirs.
            if size > 0 and self.evaluations < dense:
                self._find_first_groups(p, d, max(1, int(share * size)))
        while self.evaluations < dense:
            steps = (step for point in self._growing() for step in self._steps(point) if step not in self.points)
            differing = {step.computed: step for step in steps}
            if not differing:
                break
            self._take(spread(list(differing.values()), dense - self.evaluations))
        for number, stored in enumerate(others):
            count = (self.budget - self.evaluations) // (len(others) - number)
            best = sorted(self._growing(), key=lambda point: point.seconds)
            found = [self._key(point.candidate.cqil, *stored) for point in best if point.candidate.cqil.changed_layers]
            differing = {candidate.computed: candidate for candidate in found}
            unchanged = [Candidate(cqil, *stored) for cqil in space.unchanged]
            self._take((*unchanged, *spread(list(differing.values()), count - 1)))

    @staticmethod
    def _key(cqil: CqilConfig, weights: str = DENSE, head: str = DENSE) -> Candidate:
        """The candidate under which a configuration is kept, whatever its placement."""
        return Candidate(replace(cqil, placement="sharded" if cqil.groups else cqil.placement), weights, head)

    def _growing(self) -> list[Point]:
        """The dense points that may lead to better ones: on each number of ranks the frontiers without and with dropped
        joins, up to the limit."""
        found: dict[Point, None] = {}
        for ranks in self.space.ranks:
            for kind in (PLAIN, JOINS):
                mine = [
                    p for p in self.points.values() if p.candidate.ranks == ranks and p.candidate.kind in KINDS[kind]
                ]
                found |= dict.fromkeys(point for point in self._best(mine) if point.quality.cost <= self._limit)
        return list(found)

    def _steps(self, point: Point) -> Iterator[Candidate]:
        """The candidates one step faster: a group more at either end of the range, a few joins fewer."""
        space, cqil = self.space, point.candidate.cqil
        dropped = sum(layers[0] in cqil.drop_attention_join for layers in space.joins_of(cqil))
        if cqil.groups:
            spans = [(cqil.p, cqil.d, cqil.start - cqil.p, cqil.end), (cqil.p, cqil.d, cqil.start, cqil.end + cqil.p)]
        else:
            spans = [(p, d, s, s + p) for (p, d), starts in self._first_groups.items() for s in starts]
        for p, d, start, end in spans:
            if space.first <= start and end <= space.num_layers:
                grouped = space.shared(space.grouped(p, d, start, end))
                same = (each for each in grouped if each.ranks == cqil.ranks)
                yield from (Candidate(space.dropping(each, dropped)) for each in same)
        if space.drops and cqil.ranks > 1:
            joined = replace(self._key(cqil).cqil, drop_attention_join=())
            yield Candidate(space.dropping(joined, dropped + max(1, space.num_layers // _STEPS)))


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, at even distances; the first and the last are among them if two or more are."""
    if count >= len(items):
        return list(items)
    if count < 2:
        return list(items[len(items) // 2 :][:count])
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def choose(points: Collection[Point], within: float | None, at_most: float | None) -> Point:
    """The fastest point that costs at most `within` nats per token; or of the points that take at most `at_most`
    seconds the one that costs least.

    Exactly one limit is given. Raises UserError where no point keeps to it.
    """
    if at_most is None:
        fitting = [point for point in points if within is not None and point.quality.cost <= within]
        return min(fitting, key=lambda point: (point.seconds, point.quality.cost))
    fitting = [point for point in points if point.seconds <= at_most]
    if not fitting:
        fastest = min(point.seconds for point in points) * 1e3
        raise UserError(f"--at-most {at_most * 1e3:g}: the fastest configuration found takes {fastest:.3f} ms")
    return min(fitting, key=lambda point: (point.quality.cost, point.seconds))
