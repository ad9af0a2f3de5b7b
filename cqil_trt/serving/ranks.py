"""What the ranks of a server do: rank 0 schedules and reports to the HTTP process, the others follow its orders."""

from __future__ import annotations

import gc
import hashlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
from cqil_trt.serving.grammars import Grammars
from cqil_trt.serving.wire import (
    AWAKE_SECONDS,
    Abort,
    Add,
    Beat,
    Closed,
    Connection,
    Drafts,
    Draining,
    News,
    Progress,
    Ready,
    Stop,
    connect,
    has_cores,
    pack,
    say,
)

HTTP = "the HTTP process"
ENDING = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
# Between two signs of life of a rank.
BEAT_SECONDS = 0.5
# An HTTP process that answers no sign of life for so long is taken for stopped.
DEAF_SECONDS = 30.0
# Of the thread that compiles grammars. Those that nest deeply recurse, and the HTTP process has checked them with less.
GRAMMAR_STACK = 64 << 20
# How often rank 0 looks for a compiled grammar, or log-probabilities of a prompt, while it has nothing else to do.
_AWAITING_SECONDS = 0.001
# Chunks of prompts whose log-probabilities are computed or wait for that. Their logits are hundreds of megabytes each.
_MOST_SCORING = 2
# How long rank 0 waits for requests before it looks whether it was told to end.
_IDLE_SECONDS = 0.5


class Pulse:
    """Tells the HTTP process that this rank lives, and since when it has been doing what it does.

    A thread of its own says it, so that a rank that computes for long is not taken for one that is stopped. It ends the
    rank when the HTTP process, `child` on rank 0, ends or does not answer.
    """

    def __init__(self, rank: int, path: Path, child: subprocess.Popen[bytes] | None = None):
        self._rank, self._connection, self._child = rank, connect(path, HTTP), child
        self._busy: tuple[float, str] | None = None
        self._ended = False
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    @contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        self._busy = time.monotonic(), doing
        try:
            yield
        finally:
            self._busy = None

    def end(self) -> None:
        """From now on the HTTP process may end."""
        self._ended = True

    def _run(self) -> None:
        # Beats without an answer, counted from the first answer on: it may take long to start. Counted, as time says
        # nothing when the whole machine was held up.
        unheard: int | None = None
        while True:
            busy = self._busy
            since, doing = (None, "") if busy is None else busy
            try:
                self._connection.send(Beat(rank=self._rank, process=os.getpid(), busy_since=since, doing=doing))
                time.sleep(BEAT_SECONDS)
                if self._connection.poll(0):
                    unheard = 0
                elif unheard is not None:
                    unheard += 1
            except Closed as closed:
                self._give_up(str(closed))
                return
            if unheard is not None and unheard * BEAT_SECONDS > DEAF_SECONDS:
                if self._child is not None:
                    self._child.kill()
                self._give_up(f"{HTTP} has not answered for {DEAF_SECONDS:g} s")
                return

    def _give_up(self, reason: str) -> None:
        """Without the HTTP process nobody can ask for anything; the rank may be waiting for another one."""
        if not self._ended:
            say(f"error: rank {self._rank}: {reason}")
            time.sleep(HEARD_SECONDS)
            os._exit(1)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the engine is served; `policy`, `rows` and `chunk` as in `Scheduler`."""

    policy: str
    rows: int | None
    chunk: int | None


def warm_up(llm: Llm, options: Options) -> None:
    """Runs what the first requests would otherwise wait for, on all ranks together; the weights may be loaded later."""
    session = llm.session
    rows = min(options.rows or session.limits.max_batch_size, session.slots)
    chunk = min(options.chunk or session.limits.prefill_chunk, session.limits.prefill_chunk)
    room = session.limits.max_seq_len - 1
    # On a CPU, that is reading the weights, which are mapped; a longer prompt would take longer and gain nothing.
    lengths = {1, min(chunk, room), min(chunk + 1, room)} if session.on_gpu else {1}
    for length in sorted(lengths):
        session.load([0] * max(length, 1))
    llm.startup.end("first passes")
    within = session.warm_up(rows, chunk, llm.speculation is not None)
    llm.startup.end("graphs", within)


def lead(llm: Llm, options: Options, followers: list[Connection], http: Connection, pulse: Pulse) -> None:
    """Rank 0: runs requests until the HTTP process says stop."""
    _Leader(llm, options, followers, http).run(pulse)


class _Leader:
    """Requests come from the HTTP process, with its numbers; the scheduler has numbers of its own."""

    def __init__(self, llm: Llm, options: Options, followers: list[Connection], http: Connection):
        self._followers, self._http = followers, http
        self._runner = Runner.of(llm.session, options.policy, options.rows, options.chunk, self._send, llm.speculation)
        self._scheduler = self._runner.scheduler
        self._matchers = matchers(llm)
        # Grammars are compiled beside the loop, one after the other: some take seconds.
        self._compiling: dict[int, tuple[Add, Future[Matcher]]] = {}  # by their numbers
        self._grammars: queue.SimpleQueue[tuple[str, Future[Matcher]]] = queue.SimpleQueue()
        before = threading.stack_size(GRAMMAR_STACK)
        threading.Thread(target=self._compile, name="grammars", daemon=True).start()
        threading.stack_size(before)
        # The log-probabilities of a prompt are computed beside the loop too. What comes of its request meanwhile waits.
        self._scoring = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scores")
        self._late: dict[int, deque[News | Future[News]]] = {}  # by their numbers
        self._unscored: deque[Future[News]] = deque()  # in the order in which they are computed
        self._numbers: dict[int, int] = {}  # theirs to ours
        self._requests: dict[int, Add] = {}  # by our numbers
        self._last: float | None = None  # when the last turn ended, if it gave tokens
        self._awake = _awake(llm)
        self._told = 0, 0  # requests running and waiting, as the HTTP process knows
        self._signals = _Signals(http)
        _settle()
        session = llm.session
        http.send(
            Ready(
                slots=session.slots,
                rows=self._scheduler.rows,
                device="cuda" if session.on_gpu else "cpu",
            )
        )

    def _send(self, order: Order | Stop) -> None:
        if self._followers:
            frame = pack(order)
            for follower in self._followers:
                follower.write(frame)

    def run(self, pulse: Pulse) -> None:
        worked, stuck = time.monotonic(), False
        while True:
            news: list[News] = []
            if not self._scheduler.idle and not stuck:
                worked, wait = time.monotonic(), 0.0
            elif self._compiling or self._late or stuck:
                wait = _AWAITING_SECONDS  # their threads need this one's core
            elif time.monotonic() - worked < self._awake:
                wait = 0.0
            else:
                wait = _IDLE_SECONDS
            for message in self._http.poll(wait):
                if isinstance(message, Stop):
                    self._send(message)
                    self._runner.finish()
                    self._scoring.shutdown(wait=False, cancel_futures=True)
                    return
                if isinstance(message, Abort):
                    self._abort(message)
                elif isinstance(message, Add):
                    news += self._add(message)
            for message, matcher in list(self._compiling.values()):
                if matcher.done():
                    del self._compiling[message.number]
                    news += self._begin(message, matcher.result)
            self._signals.check()
            tokens, seconds = 0, None
            drafts, stuck = Drafts(), False
            while self._unscored and self._unscored[0].done():
                self._unscored.popleft()
            self._scheduler.scoring_waits = len(self._unscored) >= _MOST_SCORING
            if self._scheduler.idle:
                self._last = None
            else:
                with pulse.busy("a step"):
                    events = self._runner.turn()
                stuck = not events and not self._scheduler.in_flight
                tokens, seconds = self._time(events)
                drafts = _drafts(events)
                news += self._news(events)
            news += self._scored()
            self._tell(news, tokens, seconds, drafts)

    def _add(self, message: Add) -> list[News]:
        if message.grammar is None:
            return self._begin(message, lambda: None)
        matcher: Future[Matcher] = Future()
        self._compiling[message.number] = message, matcher
        self._grammars.put((message.grammar, matcher))
        return []

    def _compile(self) -> None:
        while True:
            grammar, matcher = self._grammars.get()
            if matcher.set_running_or_notify_cancel():
                try:
                    matcher.set_result(self._matchers(grammar))
                except UserError as error:
                    matcher.set_exception(error)
                except BaseException as error:  # llguidance's panics are not Exceptions
                    matcher.set_exception(UserError(f"the grammar cannot be compiled ({type(error).__name__})"))

    def _begin(self, message: Add, get_matcher: Callable[[], Matcher | None]) -> list[News]:
        try:
            matcher = get_matcher()
        except UserError as error:
            return [News(number=message.number, finish_reason="error", error=str(error))]
        request = Request(
            prompt=message.prompt,
            max_new_tokens=message.max_new_tokens,
            eos_token_ids=message.eos_token_ids,
            sampling=message.sampling,
            scored=message.scored,
            matcher=matcher,
        )
        number = self._scheduler.add(request)
        self._numbers[message.number], self._requests[number] = number, message
        return []

    def _abort(self, message: Abort) -> None:
        for theirs in message.numbers:
            if theirs in self._compiling:
                self._compiling.pop(theirs)[1].cancel()
            for late in self._late.pop(theirs, ()):
                if isinstance(late, Future):
                    late.cancel()
            number = self._numbers.pop(theirs, None)
            if number is not None:
                del self._requests[number]
                self._scheduler.abort(number)

    def _time(self, events: list[Event]) -> tuple[int, float | None]:
        """The tokens of a turn, and the seconds since the turn before if both gave some."""
        now, last = time.monotonic(), self._last
        tokens = sum(len(event.choices) for event in events)
        self._last = now if tokens else None
        return tokens, now - last if tokens and last is not None else None

    def _news(self, events: list[Event]) -> list[News]:
        started = (self._requests.get(number) for number in self._scheduler.started())
        news = [News(number=request.number) for request in started if request is not None]
        for event in events:
            request = self._requests.get(event.number)
            if request is None:
                continue
            if event.logits is not None:
                scored = self._scoring.submit(_news, event, request)
                self._unscored.append(scored)
                self._late.setdefault(request.number, deque()).append(scored)
            elif request.number in self._late:
                self._late[request.number].append(_news(event, request))
            else:
                news.append(_news(event, request))
            if event.finish_reason:
                del self._requests[event.number], self._numbers[request.number]
        return news

    def _scored(self) -> list[News]:
        """What waited for log-probabilities that are there now, in its order."""
        news = []
        for theirs, late in list(self._late.items()):
            while late and (isinstance(late[0], News) or late[0].done()):
                first = late.popleft()
                news.append(first if isinstance(first, News) else first.result())
            if not late:
                del self._late[theirs]
        return news

    def _tell(self, news: list[News], tokens: int, seconds: float | None, drafts: Drafts) -> None:
        """Also without news if what runs and waits has changed: a request that its client gave up gives none."""
        state = self._scheduler.running, self._scheduler.waiting + len(self._compiling)
        if not news and not tokens and state == self._told:
            return
        self._told = state
        self._http.send(
            Progress(
                news=tuple(news),
                running=state[0],
                waiting=state[1],
                usage=self._scheduler.usage,
                step_seconds=seconds,
                tokens=tokens,
                drafts=drafts,
            )
        )


def _awake(llm: Llm) -> float:
    """For how many seconds after its last work this rank does not sleep."""
    return AWAKE_SECONDS if llm.session.on_gpu and has_cores(llm.job.size) else 0.0


def _settle() -> None:
    """What lives as long as the server: collections, which stop a step, need not walk it."""
    gc.collect()
    gc.freeze()


def follow(llm: Llm, orders: Connection, pulse: Pulse) -> None:
    """Every other rank: executes rank 0's orders until it says stop."""
    follower = Follower(llm.session)
    awake = _awake(llm)
    _settle()
    while True:
        order = orders.receive(awake)
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


def _drafts(events: list[Event]) -> Drafts:
    drafted = [event for event in events if event.drafted]
    return Drafts(
        number=len(drafted),
        tokens=sum(event.drafted for event in drafted),
        accepted=sum(event.accepted for event in drafted),
    )


def _news(event: Event, request: Add) -> News:
    prompt: list[tuple[tuple[int, float], ...]] = []
    if event.logits is not None:
        # Row i predicts the token after it; the last one of the prompt predicts a token that is not there.
        for offset, row in enumerate(event.logits):
            following = event.first + offset + 1
            if following < len(request.prompt):
                prompt.append(log_probabilities(row, request.prompt[following], request.sampling.logprobs or 0))
    return News(
        number=request.number,
        choices=event.choices,
        finish_reason=event.finish_reason,
        cached=event.cached,
        error=event.error,
        prompt_logprobs=tuple(prompt),
    )


def matchers(llm: Llm) -> Callable[[str], Matcher]:
    if llm.tokenizer is None:
        return _no_grammars
    grammars = Grammars(llm.tokenizer, llm.engine.model.vocab_size, llm.ends)
    grammars.prepare()
    return grammars.matcher


def _no_grammars(grammar: str) -> Matcher:
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
