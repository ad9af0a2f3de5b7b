"""Decides which sequences run in which forward pass, and in which slots of the KV cache. No tensors, no MPI.

A step is one forward pass: a chunk of one prompt, or one token of every sequence whose prompt is done, and the drafted
ones after it. Decisions depend only on the calls made, so ranks that make the same calls decide the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cqil_trt.errors import UserError
from cqil_trt.sampling import Choice, SamplingConfig
from cqil_trt.speculation import MAX_TOKENS, Speculator

if TYPE_CHECKING:
    from cqil_trt.config import EngineLimits

POLICIES = ("latency", "throughput")
# Tokens that must be cached in another slot for a copy to pay: a copy waits for the slot it comes from.
_COPIED = 16
# A slot's tokens are compared with a prompt if so many at the beginning are equal, or all of the prompt that the slot
# holds, if that is shorter. Fewer would save no time, and a first token waits for every comparison.
_HEAD = 8
# A circle has a multiple of this many positions, as kernels read them (CQIL_CIRCLE_STEP in plugins/cqil_trt.h).
_CIRCLE_STEP = 64


@dataclass(frozen=True, kw_only=True)
class Circle:
    """The KV cache of layers whose tokens see `window` tokens, their own included: of the positions written, the last
    `length`. Position p is at p % length.

    It holds a window and what a step may write beyond it: the longest chunk of a prompt, the most drafts. So the step's
    first token sees its whole window, and a draft that is refused has overwritten nothing that is still seen.
    """

    length: int
    window: int

    @classmethod
    def length_for(cls, window: int | None, limits: EngineLimits) -> int | None:
        """`EngineLimits.circle` for an engine of these limits; None where it would save nothing."""
        if window is None:
            return None
        length = window + max(limits.prefill_chunk, 1 + MAX_TOKENS)
        length += -length % _CIRCLE_STEP
        return length if length < limits.max_seq_len else None

    @classmethod
    def of(cls, window: int | None, limits: EngineLimits) -> Circle | None:
        """That of an engine's caches; None where they hold all positions."""
        return None if window is None or limits.circle is None else cls(length=limits.circle, window=window)

    def keeps(self, tokens: int, written: int) -> bool:
        """Whether it has what the token after the first `tokens` sees, once positions up to `written` were written."""
        return max(tokens + 1 - self.window, 0) >= written - self.length


class Matcher(Protocol):
    """The tokens that a grammar allows next. `mask`: uint32 [ceil(vocabulary / 32)], bit t of word t // 32.

    `failure`: why it cannot go on, "" while it can.
    """

    failure: str

    def mask(self) -> np.ndarray: ...

    def advance(self, token: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a sequence is to become. Tokens after one of `eos_token_ids` are not generated.

    `max_new_tokens` 0 only reads the prompt. `scored`: the first prompt token after which logits are wanted, None for
    no logits. `matcher`: limits the tokens; it must be given if and only if `sampling.guided`.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    scored: int | None = None
    matcher: Matcher | None = None


@dataclass(frozen=True, kw_only=True)
class Start:
    """A sequence takes a slot. The first `cached` tokens of its prompt are in slot `source`, which may be the same.

    `room`: the most tokens that it will generate. `ends`: the tokens that end it.
    """

    slot: int
    prompt: tuple[int, ...]
    sampling: SamplingConfig
    room: int
    ends: tuple[int, ...] = ()
    source: int = 0
    cached: int = 0


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Tokens of a prompt after `past` cached ones. The logits after the last `predict` tokens are computed.

    `scored`: they are part of the outcome. `choose`: the next token is chosen. `length`: of the whole prompt.
    """

    slot: int
    tokens: tuple[int, ...]
    past: int
    length: int
    predict: int = 1
    scored: bool = False
    choose: bool = False

    @property
    def ends(self) -> bool:
        """Whether the prompt ends here."""
        return self.past + len(self.tokens) == self.length

    @property
    def first(self) -> int:
        """The position of the first token whose logits are computed."""
        return self.past + len(self.tokens) - self.predict


@dataclass(frozen=True, kw_only=True)
class Step:
    """One forward pass: `chunk`, or the next token of the sequences in the slots `decode`.

    `drafts`: the tokens drafted for each of them, () if nothing was drafted. Tokens are chosen up to the first that
    differs from its draft. `guided`: slots whose choice waits for masks (`Session.choose`). `given`: tokens to append
    instead of those that were chosen, for measurements.
    """

    starts: tuple[Start, ...] = ()
    chunk: Chunk | None = None
    decode: tuple[int, ...] = ()
    drafts: tuple[tuple[int, ...], ...] = ()
    guided: tuple[int, ...] = ()
    given: tuple[int, ...] = ()

    @classmethod
    def of(cls, slots: Sequence[int], drafted: int = 0) -> Step:
        """A decode step for measurements: the sequences in `slots`, for each of which token 0 is drafted so often."""
        return cls(decode=tuple(slots), drafts=((0,) * drafted,) * len(slots) if drafted else ())

    @property
    def width(self) -> int:
        """Tokens that a decode step feeds to each sequence."""
        return 1 + max(map(len, self.drafts), default=0)

    @property
    def choosing(self) -> tuple[int, ...]:
        """The slots that a token is chosen for, in the order of the pass's rows."""
        if self.chunk is not None:
            return (self.chunk.slot,) if self.chunk.choose else ()
        return self.decode


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a step gave: the choices of each slot, and the logits float32 [predict, vocabulary] of a scored chunk."""

    choices: dict[int, list[Choice]] = field(default_factory=dict)
    logits: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Event:
    """News of a sequence.

    `logits`: after the prompt tokens from number `first` on. `finish_reason`: "" while it runs, then eos, length, or
    error with `error` saying why. `cached`: prompt tokens that were reused. `drafted`: tokens drafted for the step.
    """

    number: int
    choices: tuple[Choice, ...] = ()
    logits: np.ndarray | None = None
    first: int = 0
    finish_reason: str = ""
    cached: int = 0
    error: str = ""
    drafted: int = 0

    @property
    def accepted(self) -> int:
        """How many of the drafted tokens were chosen."""
        return max(len(self.choices) - 1, 0)


class _Sequence:
    """`done`: prompt tokens in the cache, `fed`: tokens in the cache, `chosen`: choices planned; all after the steps
    planned so far, as if no draft of those in flight were accepted."""

    def __init__(self, number: int, request: Request, slot: int, cached: int, room: int, speculator: Speculator | None):
        self.number, self.request, self.slot = number, request, slot
        self.cached = self.done = self.fed = cached
        self.chosen, self.room = 0, room
        self.tokens = list(request.prompt)
        self.speculator = speculator
        self.finished = False

    @property
    def reading(self) -> bool:
        return self.done < len(self.request.prompt)

    @property
    def known(self) -> int:
        """Tokens in the cache whose ids are known."""
        return min(self.fed, len(self.tokens))


class _Slot:
    """A place in the KV cache: the tokens that it holds, and when it was last used. `row`: where they are kept.

    `head`: the first tokens of the prompt whose tokens it holds, some of which may not be there yet. `written`: the
    steps planned since its first token was read write positions before it only.
    """

    def __init__(self, row: np.ndarray) -> None:
        self._row, self._size = row, 0
        self.sequence: _Sequence | None = None
        self.head: tuple[int, ...] = ()
        self.used = self.written = 0

    def begin(self, sequence: _Sequence, written: int) -> None:
        self.sequence, self._size, self.written = sequence, 0, written
        self.head = sequence.request.prompt[:_HEAD]

    def end(self, longest: int) -> None:
        """Its sequence has ended; at most `longest` tokens of it stay."""
        self._size = min(self.size(), longest)
        self.sequence = None

    def size(self) -> int:
        """How many tokens it holds; `row` has them then."""
        if self.sequence is not None:
            size, known = self._size, self.sequence.known
            self._row[size:known] = self.sequence.tokens[size:known]
            self._size = known
        return self._size

    def held(self) -> np.ndarray:
        return self._row[: self.size()]


class Scheduler:
    """Plans steps for requests that come and go.

    Args:
        slots: sequences that the KV cache holds, running or remembered.
        rows: sequences that run at the same time.
        max_seq_len: tokens that a slot holds.
        chunk: the most prompt tokens in one step.
        policy: "latency" reads at most one chunk between two decode steps; "throughput" reads all prompts first.
        reuse: whether a prompt that begins like an earlier one takes its part of the cache.
        speculator: makes what drafts tokens of a sequence, None for one without drafts. Tokens are drafted while no
            step is in flight.
        draft_width: the most tokens of each of so many sequences that a decode step takes.
        circle: of layers with a window, if their caches are circles. A slot's beginning is reused only if these still
            have what its next token sees.
        padded_width, padded_chunk: as `Session`'s: what is written of a decode step, and of a chunk.
    """

    def __init__(
        self,
        *,
        slots: int,
        rows: int,
        max_seq_len: int,
        chunk: int,
        policy: str = "latency",
        reuse: bool = True,
        speculator: Callable[[SamplingConfig], Speculator | None] = lambda sampling: None,
        draft_width: Callable[[int], int] = lambda sequences: 1,
        circle: Circle | None = None,
        padded_width: Callable[[int], int] = lambda width: width,
        padded_chunk: Callable[[int, int], int] = lambda count, past: count,
    ):
        if policy not in POLICIES:
            raise UserError(f"--policy must be one of {', '.join(POLICIES)}, found {policy}")
        self._tokens = np.zeros((slots, max_seq_len), np.int64)
        self._slots = [_Slot(row) for row in self._tokens]
        self._rows, self._max_seq_len, self._chunk = min(rows, slots), max_seq_len, chunk
        self._policy, self._reuse = policy, reuse
        self._speculator, self._draft_width = speculator, draft_width
        self._circle, self._padded_width, self._padded_chunk = circle, padded_width, padded_chunk
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: dict[int, _Sequence] = {}
        # For each step in flight, the sequences that it chooses tokens for, by slot, and the one whose chunk it reads.
        self._flying: deque[tuple[Step, dict[int, _Sequence]]] = deque()
        self._number, self._clock = 0, 0
        self._started: list[int] = []
        self._read_last = False
        # While it is set, prompts whose logits are wanted are not read: those that there are take up memory.
        self.scoring_waits = False

    # What the caller says

    def add(self, request: Request) -> int:
        """Queues a request; returns the number that names it in events. Raises ValueError for one that does not fit."""
        if not 0 < len(request.prompt) <= self._max_seq_len:
            raise ValueError(f"a prompt of {len(request.prompt)} tokens, a slot holds {self._max_seq_len}")
        self._number += 1
        self._waiting.append((self._number, request))
        return self._number

    def abort(self, number: int) -> None:
        """Ends a request, waiting or running; it gives no more events. Unknown numbers are ignored: it may be over."""
        if number in self._running:
            self._finish(self._running[number])
        else:
            self._waiting = deque(item for item in self._waiting if item[0] != number)

    # What it tells

    def started(self) -> list[int]:
        """The requests that took a slot since the last call."""
        started, self._started = self._started, []
        return started

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def rows(self) -> int:
        """The most sequences that run at the same time."""
        return self._rows

    @property
    def in_flight(self) -> int:
        """Steps planned whose outcome has not been applied."""
        return len(self._flying)

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running and not self._flying

    @property
    def usage(self) -> float:
        """The part of the KV cache that running sequences occupy, from 0 to 1."""
        used = sum(sequence.fed for sequence in self._running.values())
        return used / (len(self._slots) * self._max_seq_len)

    # Planning

    def plan(self) -> Step | None:
        """The next step; None when there is nothing to do before an outcome is applied or a request comes.

        After None, an outcome must be applied before the next call where a step is in flight: to wait has its price.
        """
        if any(step.drafts for step, _ in self._flying):
            return None  # how far its sequences get is not known
        starts = tuple(self._admit())
        reading = next((s for s in self._running.values() if s.reading and not self._must_wait(s.request)), None)
        ready = sorted((s for s in self._running.values() if not s.reading and s.chosen < s.room), key=lambda s: s.slot)
        if reading is not None and (self._policy == "throughput" or not self._read_last or not ready):
            self._read_last = True
            return self._read(reading, starts)
        if not ready or (self._flying and not starts and self._waits(ready)):
            return None
        self._read_last = False
        guided = tuple(s.slot for s in ready if s.request.sampling.guided)
        drafts = () if self._flying else self._draft(ready)
        step = Step(starts=starts, decode=tuple(s.slot for s in ready), drafts=drafts, guided=guided)
        for sequence in ready:
            self._writes(sequence, self._padded_width(step.width))
            sequence.chosen += 1
            sequence.fed += 1
        self._flying.append((step, {s.slot: s for s in ready}))
        return step

    def _writes(self, sequence: _Sequence, count: int) -> None:
        """The next step writes this many positions of a sequence."""
        slot = self._slots[sequence.slot]
        slot.written = max(slot.written, min(sequence.fed + count, self._max_seq_len))

    def _waits(self, ready: Sequence[_Sequence]) -> bool:
        """Whether tokens should be drafted once nothing is in flight."""
        if self._draft_space(ready) < 1:
            return False
        drafted = (s.speculator for s in ready if s.speculator is not None and s.room - s.chosen > 1)
        return any(speculator.pays_to_wait(len(ready)) for speculator in drafted)

    def _draft_space(self, ready: Sequence[_Sequence]) -> int:
        """How many tokens there is room for after the next one, in the step and in the slot that has the least."""
        return min(self._max_seq_len - max(s.fed for s in ready), self._draft_width(len(ready))) - 1

    def _draft(self, ready: Sequence[_Sequence]) -> tuple[tuple[int, ...], ...]:
        """The drafts of sequences that decode. All of them must have room for the longest in their slots."""
        space = self._draft_space(ready)
        drafts = tuple(
            s.speculator.draft(min(space, s.room - s.chosen - 1), len(ready)) if s.speculator is not None else ()
            for s in ready
        )
        return drafts if any(drafts) else ()

    def _admit(self) -> Iterator[Start]:
        """Gives slots to waiting requests, in the order in which they came."""
        while self._waiting and len(self._running) < self._rows:
            # One at a time reads its prompt, so that the next one finds what this one leaves in the cache.
            if any(s.reading for s in self._running.values()):
                return
            if self._must_wait(self._waiting[0][1]):
                return
            number, request = self._waiting.popleft()
            slot, source, cached = self._place(request)
            room = min(request.max_new_tokens, self._max_seq_len + 1 - len(request.prompt))
            # A grammar's mask depends on the tokens before it, so nothing is drafted for guided sequences.
            speculator = None
            if room > 1 and not request.sampling.guided:
                speculator = self._speculator(request.sampling)
            sequence = _Sequence(number, request, slot, cached, room, speculator)
            # A copied cache is as its source is: what was overwritten there is missing here.
            self._slots[slot].begin(sequence, self._slots[source].written if cached else 0)
            self._running[number] = sequence
            self._started.append(number)
            yield Start(
                slot=slot,
                prompt=request.prompt,
                sampling=request.sampling,
                room=room,
                ends=request.eos_token_ids,
                source=source,
                cached=cached,
            )

    def _must_wait(self, request: Request) -> bool:
        return self.scoring_waits and request.scored is not None

    def _place(self, request: Request) -> tuple[int, int, int]:
        """The slot for a request, the slot that holds the longest beginning of its prompt, and how much of it."""
        self._clock += 1
        free = [i for i, slot in enumerate(self._slots) if slot.sequence is None]
        oldest = min(free, key=lambda i: self._slots[i].used)
        # The last token is always computed: the next one is predicted from it. So are those with logits.
        limit = len(request.prompt) - 1 if request.scored is None else min(request.scored, len(request.prompt) - 1)
        found = self._beginning(request.prompt, limit) if self._reuse and limit > 0 else None
        source, cached = found or (oldest, 0)
        # A slot that mostly holds this prompt is continued; another one keeps what it has and is copied from.
        if self._slots[source].sequence is None and 2 * cached >= self._slots[source].size():
            target = source
        else:
            target = oldest
        if source != target and cached < _COPIED:
            source, cached = target, 0
        self._slots[target].used = self._slots[source].used = self._clock
        return target, source, cached

    def _beginning(self, prompt: tuple[int, ...], limit: int) -> tuple[int, int] | None:
        """The slot that holds the longest beginning of a prompt, and how many tokens of it, at most `limit`.

        Of equal ones it is a free slot. None: no slot is worth a comparison.
        """
        head = prompt[:_HEAD]
        alike = [i for i, slot in enumerate(self._slots) if slot.head and slot.head == head[: len(slot.head)]]
        if not alike:
            return None
        sizes = [min(self._slots[i].size(), limit) for i in alike]
        longest = max(sizes)
        # A column more than is compared, so that every row has a difference.
        differs = np.ones((len(alike), longest + 1), bool)
        np.not_equal(self._tokens[alike, :longest], prompt[:longest], out=differs[:, :longest])
        common = dict(zip(alike, np.minimum(differs.argmax(1), sizes).tolist()))
        if (circle := self._circle) is not None:
            common = {i: n if circle.keeps(n, self._slots[i].written) else 0 for i, n in common.items()}
        source = max(alike, key=lambda i: (common[i], self._slots[i].sequence is None))
        return source, common[source]

    def _read(self, sequence: _Sequence, starts: tuple[Start, ...]) -> Step:
        """The next chunk of a prompt."""
        request = sequence.request
        first = sequence.done
        last = min(first + self._chunk, len(request.prompt))
        scored = request.scored is not None and request.scored < last
        predict = last - max(first, request.scored or 0) if scored else 1
        ends = last == len(request.prompt)
        choose = ends and sequence.room > 0
        if sequence.speculator is not None:
            sequence.speculator.extend(request.prompt[first if first > sequence.cached else 0 : last])
        self._writes(sequence, self._padded_chunk(last - first, first))
        sequence.done = sequence.fed = last
        sequence.chosen += choose
        chunk = Chunk(
            slot=sequence.slot,
            tokens=request.prompt[first:last],
            past=first,
            length=len(request.prompt),
            predict=predict,
            scored=scored,
            choose=choose,
        )
        guided = (sequence.slot,) if choose and request.sampling.guided else ()
        step = Step(starts=starts, chunk=chunk, guided=guided)
        self._flying.append((step, {sequence.slot: sequence}))
        return step

    # What came of it

    def masks(self, step: Step) -> dict[int, np.ndarray]:
        """The masks of the guided sequences of the step planned last, once all earlier outcomes are applied."""
        _, sequences = self._flying[-1]
        masks = {}
        for slot in step.guided:
            matcher = sequences[slot].request.matcher
            if matcher is not None and not sequences[slot].finished:
                masks[slot] = matcher.mask()
        return masks

    def apply(self, outcome: Outcome) -> list[Event]:
        """Takes in the outcome of the oldest step in flight. Choices of a sequence that has ended are dropped."""
        step, sequences = self._flying.popleft()
        drafted = {slot: len(draft) for slot, draft in zip(step.decode, step.drafts)}
        events = []
        for slot, sequence in sequences.items():
            if sequence.finished:
                continue
            taken: list[Choice] = []
            reason = error = ""
            request = sequence.request
            choices, speculator = outcome.choices.get(slot, ()), sequence.speculator
            if speculator is not None:
                speculator.extend([choice.token for choice in choices])
            if step.chunk is None:
                accepted = len(choices) - 1
                sequence.chosen += accepted
                sequence.fed += accepted
                if speculator is not None:
                    speculator.verified(drafted.get(slot, 0), accepted, len(step.decode))
            for choice in choices:
                taken.append(choice)
                sequence.tokens.append(choice.token)
                if request.matcher is not None:
                    request.matcher.advance(choice.token)
                    error = request.matcher.failure
                if error:
                    reason = "error"
                elif choice.token in request.eos_token_ids:
                    reason = "eos"
                elif len(sequence.tokens) - len(request.prompt) == sequence.room:
                    reason = "length"
                if reason:
                    break
            if sequence.room == 0 and step.chunk is not None and step.chunk.ends:
                reason = "length"
            if reason:
                self._finish(sequence)
            if taken or reason or outcome.logits is not None:
                events.append(
                    Event(
                        number=sequence.number,
                        choices=tuple(taken),
                        logits=outcome.logits,
                        first=0 if step.chunk is None else step.chunk.first,
                        finish_reason=reason,
                        cached=sequence.cached,
                        error=error,
                        drafted=drafted.get(slot, 0),
                    )
                )
        return events

    def _finish(self, sequence: _Sequence) -> None:
        sequence.finished = True
        slot = self._slots[sequence.slot]
        # A step in flight may write one more token, and at the end of a full slot it overwrites the last.
        slot.end(self._max_seq_len - 1)
        slot.used = self._clock
        del self._running[sequence.number]


def check_prompt(prompt: Sequence[int], name: str, vocab_size: int, max_seq_len: int) -> None:
    """Raises UserError for token ids that an engine does not accept as a prompt; `name` names them in the message."""
    if not prompt:
        raise UserError(f"{name} is empty")
    if len(prompt) > max_seq_len:
        raise UserError(f"{name} has {len(prompt)} tokens, the engine takes {max_seq_len} (build with --max-seq-len)")
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise UserError(f"{name}: {token!r:.40} is not a token id from 0 to {vocab_size - 1}")
