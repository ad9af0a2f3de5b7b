"""Speculation: drafts of a sequence's next tokens, verified as rows of one step. Text that repeats itself takes fewer.

Exact: each token is chosen from its own logits with its own random number, as without drafts. A draft only decides
whether the next token is chosen in the same step. Ranks know the same costs (`Session.step_costs`), and nothing else
here depends on time, so they draft alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

from cqil_trt.errors import UserError

DEFAULT_TOKENS = 7
MAX_TOKENS = 15
# Tokens that must have occurred before, in this order, for what followed them to be drafted.
_NGRAM = 3
# Occurrences that are compared with the end of the text, the latest ones, and how far back.
_OCCURRENCES = 8
_COMPARED = 32
# Steps that a sequence may lose to drafts: at first, for each step, and the most that successes save up.
_START, _SHARE, _MOST = 0.5, 0.02, 2.0


class Drafter(Protocol):
    """Guesses how one sequence goes on: the seam for other kinds of drafts (a small model, heads of the model)."""

    def extend(self, tokens: Sequence[int]) -> None:
        """The sequence's next tokens, those of the prompt first."""

    def draft(self, most: int) -> Sequence[int]:
        """At most `most` tokens that may come next."""


class NgramDrafter:
    """Prompt lookup: the text goes on as it did where its last tokens occurred before.

    Of the latest occurrences the one that agrees furthest back counts, of several such the latest.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # by n-gram: the positions of its last token

    def extend(self, tokens: Sequence[int]) -> None:
        first = len(self._tokens)
        self._tokens += tokens
        for end in range(max(first, _NGRAM - 1), len(self._tokens)):
            self._ends.setdefault(tuple(self._tokens[end + 1 - _NGRAM : end + 1]), []).append(end)

    def draft(self, most: int) -> Sequence[int]:
        tokens = self._tokens
        last = len(tokens) - 1
        occurrences = self._ends.get(tuple(tokens[-_NGRAM:]), ())
        best, agreeing = -1, 0
        for end in reversed(occurrences[-_OCCURRENCES - 1 : -1]):  # the last one is the end of the text
            length = _NGRAM
            while length < min(_COMPARED, end + 1) and tokens[end - length] == tokens[last - length]:
                length += 1
            if length > agreeing:
                best, agreeing = end, length
        if best < 0:
            return ()
        # Where what followed runs into the end of the text, the text repeats itself with this period.
        period = last - best
        # The longer the agreement, the longer it is likely to last.
        return [tokens[best + 1 + i % period] for i in range(min(most, agreeing))]


DRAFTERS: dict[str, Callable[[], Drafter]] = {"ngram": NgramDrafter}


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """How tokens are drafted: by `DRAFTERS[method]`, at most `tokens` a step and sequence."""

    method: str
    tokens: int = DEFAULT_TOKENS

    @classmethod
    def parse(cls, text: str) -> Speculation | None:
        """From METHOD[:TOKENS]; None for "none". Raises UserError for other text."""
        if text == "none":
            return None
        method, colon, number = text.partition(":")
        known = ", ".join(DRAFTERS)
        if method not in DRAFTERS:
            raise UserError(f"--speculate must be none or METHOD[:TOKENS] with METHOD of {known}, found {text!r:.40}")
        if not colon:
            return cls(method=method)
        if not re.fullmatch("[0-9]{1,3}", number):
            raise UserError(f"--speculate {method}: tokens must be from 1 to {MAX_TOKENS}, found {number!r:.40}")
        return cls(method=method, tokens=int(number))

    def __post_init__(self) -> None:
        if self.method not in DRAFTERS:
            raise UserError(f"--speculate: method must be one of {', '.join(DRAFTERS)}, found {self.method!r:.40}")
        if not 1 <= self.tokens <= MAX_TOKENS:
            raise UserError(f"--speculate {self.method}: tokens must be from 1 to {MAX_TOKENS}, found {self.tokens}")


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """How long decode steps take, as parts of one with a single row.

    `steps`: those of 1, 2, 3, … rows, at least two, which never fall; more rows go on as the last two do. `wait`: until
    the next step begins where it is submitted only when the one before is collected.
    """

    steps: tuple[float, ...]
    wait: float = 0.0

    @classmethod
    def of(cls, times: Mapping[int, float], wait: float) -> StepCosts:
        """From measured times by their rows, of which 1 and another one must be there, and a wait, all in one unit.

        Straight lines lead from one to the next. More rows never take less: what was measured so is noise.
        """
        rows = sorted(times)
        steps = [1.0]
        rising = accumulate((times[count] / times[1] for count in rows), max)
        for (first, before), (last, after) in pairwise(zip(rows, rising)):
            steps += (before + (after - before) * i / (last - first) for i in range(1, last - first + 1))
        return cls(steps=tuple(steps), wait=wait / times[1])

    def step(self, rows: int) -> float:
        """A step of so many rows."""
        known = len(self.steps)
        if rows <= known:
            return self.steps[rows - 1]
        return self.steps[-1] + (rows - known) * (self.steps[-1] - self.steps[-2])

    def drafts(self, sequences: int, width: int) -> float:
        """What `width` rows for each of the sequences take more than one, and the wait: as a part of their step."""
        return (self.step(sequences * width) + self.wait) / self.step(sequences) - 1

    def waits(self, sequences: int) -> float:
        """A wait, as a part of the sequences' step."""
        return self.wait / self.step(sequences)


class Speculator:
    """The drafts of one sequence, and whether they are worth their price.

    All `sequences` in the step get as many rows as the longest draft has, of which `padded` makes those that are
    computed. So tokens that are drafted in vain cost each of them what such a step takes more, by `costs`. A step that
    waits for the one before, because tokens may be drafted, costs them the wait, and so does a step with drafts, for
    which the next one waits. A sequence may lose a small share of its steps in this way, and what its accepted drafts
    saved before. So there are short drafts, if any, where many sequences run.
    """

    def __init__(self, speculation: Speculation, costs: StepCosts, padded: Callable[[int], int] = lambda width: width):
        self._drafter = DRAFTERS[speculation.method]()
        self._tokens, self._costs, self._padded = speculation.tokens, costs, padded
        self._credit = _START

    def extend(self, tokens: Sequence[int]) -> None:
        self._drafter.extend(tokens)

    def draft(self, room: int, sequences: int) -> tuple[int, ...]:
        """Drafted tokens for the next step, at most `room`."""
        most = min(room, self._tokens)
        while most > 0 and self._cost(most, sequences) > self._credit:
            most -= 1
        return tuple(self._drafter.draft(most)) if most > 0 else ()

    def pays_to_wait(self, sequences: int) -> bool:
        """Whether the next step should wait for the one in flight, whose token may continue what occurred before.

        Then the wait is paid for.
        """
        cost = self._costs.waits(sequences) * sequences
        if cost + self._cost(1, sequences) > self._credit or not self._drafter.draft(1):
            return False
        self._credit -= cost
        return True

    def _cost(self, drafted: int, sequences: int) -> float:
        """Of a draft of so many tokens: steps that all of the sequences lose together if none is accepted."""
        return self._costs.drafts(sequences, self._padded(1 + drafted)) * sequences if drafted else 0.0

    def verified(self, drafted: int, accepted: int, sequences: int) -> None:
        """After each step: how many tokens were drafted for it, and how many of them were chosen."""
        saved = accepted - self._cost(drafted, sequences) + _SHARE
        self._credit = min(self._credit + saved, _MOST)
