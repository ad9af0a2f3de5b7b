"""The loop of an engine: the scheduler plans steps, the session executes them. All that runs an engine uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cqil_trt.errors import UserError
from cqil_trt.sampling import SamplingConfig
from cqil_trt.scheduler import Event, Request, Scheduler, Step
from cqil_trt.session import Session
from cqil_trt.speculation import Speculation, Speculator

# What a rank must do next: a step, or the masks that the step before waits for.
Order = Step | Mapping[int, np.ndarray]


class Runner:
    """Runs requests through a session.

    Either every rank makes the same calls, or rank 0 alone has a runner and passes its orders on: `send` is then called
    with each order just before rank 0 executes it, and the other ranks give it to `follow`.
    """

    def __init__(self, session: Session, scheduler: Scheduler, send: Callable[[Order], None] | None = None):
        self.session, self.scheduler = session, scheduler
        self._send = send or (lambda order: None)

    @classmethod
    def of(
        cls,
        session: Session,
        policy: str,
        rows: int | None = None,
        chunk: int | None = None,
        send: Callable[[Order], None] | None = None,
        speculation: Speculation | None = None,
    ) -> Runner:
        """A runner whose scheduler knows of nothing in the session's cache; arguments as in `Scheduler`.

        `rows` and `chunk` are by default, and at most, what the engine was built for. Raises UserError for
        `speculation` on a session that cannot verify drafts.
        """
        limits = session.limits
        if speculation is not None and session.step_costs is None:
            raise UserError("--speculate: this backend does not verify drafts; torch, onnx and tensorrt's plugins do")

        def speculator(sampling: SamplingConfig) -> Speculator | None:
            if speculation is None or session.step_costs is None:
                return None
            if sampling.penalizes and not session.drafts_penalized:
                return None
            # The costs may have been measured since the runner was made.
            return Speculator(speculation, session.step_costs, session.padded_width)

        scheduler = Scheduler(
            slots=session.slots,
            rows=min(rows or limits.max_batch_size, limits.max_batch_size),
            max_seq_len=limits.max_seq_len,
            chunk=min(chunk or limits.prefill_chunk, limits.prefill_chunk),
            policy=policy,
            reuse=session.reuses,
            speculator=speculator,
            draft_width=session.draft_width,
            circle=session.circle,
            padded_width=session.padded_width,
            padded_chunk=session.padded_chunk,
        )
        return cls(session, scheduler, send)

    def turn(self) -> list[Event]:
        """Submits the next step, then waits for the oldest one if no more can be submitted. Returns what is new."""
        step = self.scheduler.plan()
        events: list[Event] = []
        if step is not None:
            self._send(step)
            self.session.submit(step)
            if step.guided:
                # What is allowed next depends on the tokens before.
                while self.scheduler.in_flight > 1:
                    events += self._collect()
                masks = self.scheduler.masks(step)
                self._send(masks)
                self.session.choose(masks)
        if self.scheduler.in_flight > (self.session.ahead if step is not None else 0):
            events += self._collect()
        return events

    def _collect(self) -> list[Event]:
        return self.scheduler.apply(self.session.collect())

    def finish(self) -> None:
        """Waits for the steps in flight; their events are lost."""
        while self.scheduler.in_flight:
            self._collect()

    def score(self, prompt: Sequence[int], first: int = 0) -> np.ndarray:
        """The logits after every token of a prompt from `first` on, float32 [tokens - first, vocabulary].

        Other requests go on meanwhile, but their events are lost: there should be none.
        """
        number = self.scheduler.add(Request(prompt=tuple(prompt), max_new_tokens=0, scored=first))
        parts: list[np.ndarray] = []
        while True:
            for event in self.turn():
                if event.number == number and event.logits is not None:
                    parts.append(event.logits)
                if event.number == number and event.finish_reason:
                    return np.concatenate(parts)


class Follower:
    """A rank that executes rank 0's orders."""

    def __init__(self, session: Session):
        self._session = session
        self._in_flight = 0

    def follow(self, order: Order) -> None:
        """Executes an order, and collects the outcomes that are due by now."""
        if not isinstance(order, Step):
            self._session.choose(order)
            return
        self._session.submit(order)
        self._in_flight += 1
        while self._in_flight > self._session.ahead + 1:
            self._collect()

    def finish(self) -> None:
        """Collects the remaining outcomes."""
        while self._in_flight:
            self._collect()

    def _collect(self) -> None:
        self._session.collect()
        self._in_flight -= 1
