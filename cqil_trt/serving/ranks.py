"""What the ranks of a server do: rank 0 schedules and reports to the HTTP process, the others follow its orders."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cqil_trt.errors import UserError
from cqil_trt.job import HEARD_SECONDS, Job
from cqil_trt.llm import Llm
from cqil_trt.runner import Follower, Order, Runner
from cqil_trt.sampling import log_probabilities
from cqil_trt.scheduler import Event, Matcher, Request
from cqil_trt.serving.wire import (
    Abort,
    Add,
    Beat,
    Closed,
    Connection,
    Draining,
    News,
    Progress,
    Ready,
    Stop,
    connect,
)

HTTP = "the HTTP process"
ENDING = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
# A rank says this often that it lives.
BEAT_SECONDS = 0.5
# How long rank 0 waits for requests before it looks whether it was told to end.
_IDLE_SECONDS = 0.5


class Pulse:
    """Tells the HTTP process that this rank lives, and since when it has been doing what it does.

    A thread of its own says it, so that a rank that computes for long is not taken for one that is stopped.
    """

    def __init__(self, rank: int, path: Path):
        self._rank, self._connection = rank, connect(path, HTTP)
        self._busy: tuple[float, str] | None = None
        self._ended = False
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    @contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        self._busy = time.monotonic(), doing
        yield
        self._busy = None

    def end(self) -> None:
        """From now on the HTTP process may end."""
        self._ended = True

    def _run(self) -> None:
        while True:
            busy = self._busy
            since, doing = (None, "") if busy is None else busy
            try:
                self._connection.send(Beat(rank=self._rank, process=os.getpid(), busy_since=since, doing=doing))
            except Closed as closed:
                if not self._ended:
                    # Without the HTTP process nobody can ask for anything; the rank may be waiting for another one.
                    print(f"error: rank {self._rank}: {closed}", file=sys.stderr, flush=True)
                    time.sleep(HEARD_SECONDS)
                    os._exit(1)
                return
            time.sleep(BEAT_SECONDS)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the engine is served; `policy`, `rows` and `chunk` as in `Scheduler`."""

    policy: str
    rows: int | None
    chunk: int | None


def warm_up(llm: Llm, options: Options) -> None:
    """Runs what the first requests would otherwise wait for, on all ranks together."""
    session = llm.session
    rows = min(options.rows or session.limits.max_batch_size, session.slots)
    chunk = min(options.chunk or session.limits.prefill_chunk, session.limits.prefill_chunk)
    room = session.limits.max_seq_len - 1
    for length in sorted({1, min(chunk, room), min(chunk + 1, room)}):
        session.load([0] * max(length, 1))
    session.warm_up(rows)


def lead(llm: Llm, options: Options, followers: list[Connection], http: Connection, pulse: Pulse) -> None:
    """Rank 0: runs requests until the HTTP process says stop."""

    def send(order: Order) -> None:
        for follower in followers:
            follower.send(order)

    runner = Runner.of(llm.session, options.policy, options.rows, options.chunk, send)
    matchers = _matchers(llm)
    scheduler = runner.scheduler
    http.send(
        Ready(
            slots=llm.session.slots,
            rows=scheduler.rows,
            max_seq_len=llm.session.limits.max_seq_len,
            device="cuda" if llm.session.on_gpu else "cpu",
        )
    )
    signals = _Signals(http)
    numbers: dict[int, int] = {}  # the HTTP process's numbers to the scheduler's
    names: dict[int, int] = {}  # and back
    wants_prompt: dict[int, Add] = {}
    last_decode: float | None = None
    told = 0, 0  # requests running and waiting, as the HTTP process knows
    while True:
        news: list[News] = []
        for message in http.poll(0 if not scheduler.idle else _IDLE_SECONDS):
            if isinstance(message, Stop):
                send_stop(followers)
                runner.finish()
                return
            if isinstance(message, Abort):
                for number in message.numbers:
                    if number in numbers:
                        names.pop(scheduler_number := numbers.pop(number), None)
                        scheduler.abort(scheduler_number)
                        wants_prompt.pop(number, None)
            if isinstance(message, Add):
                try:
                    matcher = None if message.grammar is None else matchers(message.grammar)
                except UserError as error:
                    news.append(News(number=message.number, finish_reason="error", error=str(error)))
                    continue
                added = scheduler.add(
                    Request(
                        prompt=message.prompt,
                        max_new_tokens=message.max_new_tokens,
                        eos_token_ids=message.eos_token_ids,
                        sampling=message.sampling,
                        scored=message.scored,
                        matcher=matcher,
                    )
                )
                numbers[message.number], names[added] = added, message.number
                if message.scored is not None:
                    wants_prompt[message.number] = message
        signals.check()
        if scheduler.idle:
            last_decode = None
            if news or told != (0, 0):
                http.send(Progress(news=tuple(news)))
                told = 0, 0
            continue
        with pulse.busy("a step"):
            events = runner.turn()
        now = time.monotonic()
        tokens = sum(len(event.choices) for event in events)
        news += [News(number=names[started]) for started in scheduler.started() if started in names]
        for event in events:
            if event.number not in names:
                continue
            number = names[event.number]
            news.append(_news(event, number, wants_prompt.get(number)))
            if event.finish_reason:
                names.pop(event.number), numbers.pop(number), wants_prompt.pop(number, None)
        # A turn whose step only read a prompt is no decode step.
        seconds = now - last_decode if tokens and last_decode is not None else None
        last_decode = now if tokens else None
        # A request that its client gave up gives no news.
        state = scheduler.running, scheduler.waiting
        if news or tokens or told != state:
            told = state
            http.send(
                Progress(
                    news=tuple(news),
                    running=scheduler.running,
                    waiting=scheduler.waiting,
                    usage=scheduler.usage,
                    step_seconds=seconds,
                    tokens=tokens,
                )
            )


def send_stop(followers: list[Connection]) -> None:
    for follower in followers:
        follower.send(Stop())


def follow(llm: Llm, orders: Connection, pulse: Pulse) -> None:
    """Every other rank: executes rank 0's orders until it says stop."""
    follower = Follower(llm.session)
    while True:
        order = orders.receive()
        if isinstance(order, Stop):
            with pulse.busy("the end"):
                follower.finish()
            return
        with pulse.busy("a step"):
            follower.follow(order)


def agree_on_the_end(llm: Llm, job: Job) -> None:
    """Raises RuntimeError on every rank unless all hold the same residual stream and chose the same tokens."""
    state = hashlib.sha256(llm.session.joined())
    state.update(str(llm.session.digest).encode())
    if len(set(job.gather(state.hexdigest()))) > 1:
        raise RuntimeError("the ranks do not hold the same bits: their residual streams or tokens differ")


def _news(event: Event, number: int, scored: Add | None) -> News:
    prompt: list[tuple[tuple[int, float], ...]] = []
    if scored is not None and event.logits is not None:
        # Row i predicts the token after it; the last one of the prompt predicts a token that is not there.
        wanted = scored.sampling.logprobs or 0
        for offset, row in enumerate(event.logits):
            following = event.first + offset + 1
            if following < len(scored.prompt):
                prompt.append(log_probabilities(row, scored.prompt[following], wanted))
    return News(
        number=number,
        choices=event.choices,
        finish_reason=event.finish_reason,
        cached=event.cached,
        prompt_logprobs=tuple(prompt),
    )


def _matchers(llm: Llm) -> Callable[[str], Matcher]:
    if llm.tokenizer is None:
        return lambda grammar: _refuse()
    from cqil_trt.serving.grammars import Grammars

    return Grammars(llm.tokenizer, llm.engine.model.vocab_size, llm.ends).matcher


def _refuse() -> Any:
    raise UserError("this engine has no tokenizer, which grammars need")


class _Signals:
    """Signals that end the server, passed on to the HTTP process: the first means drain, the second end now.

    Open MPI's mpirun ends the ranks when it gets SIGTERM or SIGINT, but hands SIGUSR1 on.
    """

    def __init__(self, http: Connection):
        self._http, self._came, self._told = http, 0, 0
        for number in ENDING:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._came += 1

    def check(self) -> None:
        while self._told < self._came:
            self._told += 1
            self._http.send(Draining(now=self._told > 1))


def ignore_signals() -> None:
    """On the other ranks: mpirun passes signals to all ranks, and rank 0 decides."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
