"""Speculation: drafts of a sequence's next tokens, verified as rows of one step. Text that repeats itself takes fewer.

Exact: each token is chosen from its own logits with its own random number, as without drafts. A draft only decides
whether the next token is chosen in the same step. Nothing here depends on time, so ranks draft alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


class Speculator:
    """The drafts of one sequence, and whether they are worth their price.

    A row for a token that is drafted in vain costs each of the `sequences` in the step `row_cost` of it: they all get
    as many rows as the longest draft has, of which `padded` makes those that are computed. A step that waits for the
    one before, because tokens may be drafted, costs them `wait_cost`, and so does a step with drafts, for which the
    next one waits. A sequence may lose a small share of its steps in this way, and what its accepted drafts saved
    before. So there are short drafts, if any, where many sequences run.
    """

    def __init__(
        self,
        speculation: Speculation,
        row_cost: float,
        wait_cost: float = 0.0,
        padded: Callable[[int], int] = lambda width: width,
    ):
        self._drafter = DRAFTERS[speculation.method]()
        self._tokens, self._row_cost, self._wait_cost = speculation.tokens, row_cost, wait_cost
        self._padded = padded
        self._credit = _START

    def extend(self, tokens: Sequence[int]) -> None:
        self._drafter.extend(tokens)

    def draft(self, room: int, sequences: int) -> tuple[int, ...]:
        """Drafted tokens for the next step, at most `room`."""
        most = min(room, self._affordable(sequences))
        return tuple(self._drafter.draft(most)) if most > 0 else ()

    def pays_to_wait(self, sequences: int) -> bool:
        """Whether the next step should wait for the one in flight, whose token may continue what occurred before.

        Then the wait is paid for.
        """
        cost = self._wait_cost * sequences
        if self._affordable(sequences, cost) < 1 or not self._drafter.draft(1):
            return False
        self._credit -= cost
        return True

    def _affordable(self, sequences: int, spent: float = 0.0) -> int:
        """How many tokens may be drafted when `spent` of the credit is gone."""
        most = self._tokens
        while most > 0 and self._cost(most) * sequences > self._credit - spent:
            most -= 1
        return most

    def _cost(self, drafted: int) -> float:
        """Of a step with a draft of so many tokens, for each of its sequences."""
        return self._row_cost * (self._padded(1 + drafted) - 1) + self._wait_cost if drafted else 0.0

    def verified(self, drafted: int, accepted: int, sequences: int) -> None:
        """After each step: how many tokens were drafted for it, and how many of them were chosen."""
        saved = accepted - self._cost(drafted) * sequences + _SHARE
        self._credit = min(self._credit + saved, _MOST)
