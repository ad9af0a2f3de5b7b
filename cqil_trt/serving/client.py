"""The HTTP process's side of the engine: requests in flight, and what is known of the ranks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cqil_trt.sampling import Choice
from cqil_trt.serving import wire
from cqil_trt.serving.metrics import Metrics
from cqil_trt.table import counted

# A rank whose last sign of life is older is taken for stopped.
SILENCE_SECONDS = 3.0
# A step that takes longer hangs. On CPUs a chunk of a prompt may take seconds, with billions of weights or other work.
STEP_SECONDS = {"cuda": 4.0, "cpu": 60.0}
# While it loads: libraries are opened and CUDA is started in calls that let no other thread run.
_LOADING_SILENCE_SECONDS = 60.0
_WATCH_SECONDS = 0.1
# While the engine loads, rank 0's word that it gives up may come after the end of another rank.
_GIVING_UP_SECONDS = 2.0
# How long the server still answers after a failure, so that clients and probes see it.
LINGER_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Update:
    """Tokens of a request, and why it ended: "" while it runs, then eos, length or error.

    `status`: of an error, whether it is the request's (400) or the server's (503).
    """

    choices: tuple[Choice, ...] = ()
    finish_reason: str = ""
    error: str = ""
    status: int = 503
    cached: int = 0
    prompt_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(eq=False)
class Ticket:
    """A request at the engine. Its updates come through `updates`, which several may share, with its `index`.

    Times are those of time.monotonic().
    """

    number: int
    index: int
    prompt_tokens: int
    updates: asyncio.Queue[tuple[int, Update | None]]
    queued_at: float
    started_at: float | None = None
    first_at: float | None = None
    last_at: float | None = None

    def tell(self, update: Update) -> None:
        self.updates.put_nowait((self.index, update))


class _Frames(asyncio.Protocol):
    """One end of a socket: hands every message to `take`, with itself, as it arrives, and calls `lost` at the end."""

    transport: asyncio.WriteTransport

    def __init__(self, take: Callable[[_Frames, Any], None], lost: Callable[[_Frames], None]):
        self._take, self._lost = take, lost
        self._inbox = wire.Inbox()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(high=0)  # uvloop would write when the task that runs gives up its turn

    def data_received(self, data: bytes) -> None:
        self._inbox.add(data)
        for message in self._inbox:
            self._take(self, message)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost(self)

    def send(self, message: Any) -> None:
        """Does nothing once the other end is gone, of which `lost` hears: uvloop's transports raise then."""
        if not self.transport.is_closing():
            self.transport.write(wire.pack(message))


@dataclass
class RankState:
    seen: float
    process: int
    busy_since: float | None = None
    doing: str = ""


class EngineClient:
    """Sends requests to rank 0 and hands out what comes back. Lives in one event loop.

    `address`: where clients connect, a Unix socket's path or a host and a port. `failure`: why the server cannot go on.
    `exit_code`: once it has `ended`.
    """

    def __init__(
        self,
        setup: wire.Setup,
        address: str | tuple[str, int],
        control: socket.socket,
        monitor: socket.socket,
        metrics: Metrics,
    ):
        self.setup, self.address, self.metrics = setup, address, metrics
        self.ready: wire.Ready | None = None
        self.draining = False
        self.failure: str | None = None
        self.ended = asyncio.Event()
        self.exit_code = 0
        self.running, self.waiting, self.usage = 0, 0, 0.0
        self._control, self._monitor = control, monitor
        self._ranks: dict[int, RankState] = {}
        self._numbers: dict[_Frames, int] = {}  # the ranks at the other ends
        # Of the ranks' processes: a process id may soon be another's.
        self._handles: dict[int, int] = {}
        self._tickets: dict[int, Ticket] = {}
        self._number = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = False
        # Until when the loop does not sleep, None while it may.
        self._awake: float | None = None
        self._may_stay_awake = False

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        _, self._engine = await loop.create_unix_connection(
            lambda: _Frames(self._take, self._engine_lost), sock=self._control
        )
        # Held, as uvloop closes a server that nobody holds.
        self._server = await loop.create_unix_server(
            lambda: _Frames(self._take_beat, self._rank_lost), sock=self._monitor
        )
        self._spawn(self._watch())

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Requests

    @property
    def active(self) -> int:
        return len(self._tickets)

    def submit(self, updates: asyncio.Queue[tuple[int, Update | None]], index: int, **fields: Any) -> Ticket:
        """Sends a request; `fields` as in `wire.Add`, but the number."""
        self._number += 1
        ticket = Ticket(self._number, index, len(fields["prompt"]), updates, time.monotonic())
        self._tickets[ticket.number] = ticket
        self._engine.send(wire.Add(number=ticket.number, **fields))
        self.metrics.request_started(ticket.prompt_tokens)
        if self._may_stay_awake and self._awake is None:
            self._awake = ticket.queued_at + wire.AWAKE_SECONDS
            self._stay_awake()
        return ticket

    def _stay_awake(self) -> None:
        """Keeps the loop looking for messages while requests run, and for a while after that."""
        now = time.monotonic()
        if self._tickets:
            self._awake = now + wire.AWAKE_SECONDS
        if self._awake is not None and now < self._awake:
            asyncio.get_running_loop().call_soon(self._stay_awake)
        else:
            self._awake = None

    def abort(self, ticket: Ticket) -> None:
        """Ends a request that nobody waits for. One that is over stays so."""
        if self._tickets.pop(ticket.number, None) is not None:
            self._engine.send(wire.Abort(numbers=(ticket.number,)))

    # What comes from the ranks

    def _take(self, engine: _Frames, message: Any) -> None:
        if isinstance(message, wire.Ready):
            self.ready = message
            self._may_stay_awake = message.device == "cuda" and wire.has_cores(len(self._ranks))
            with contextlib.suppress(OSError):  # nobody may read it
                print(
                    f"{self.setup.engine}: {counted(message.slots, 'slot')}, "
                    f"{counted(message.rows, 'sequence')} at a time, on {message.device}\nserving at {self._url()}",
                    flush=True,
                )
        elif isinstance(message, wire.GivenUp):
            self._stopping = True
        elif isinstance(message, wire.Draining):
            if message.now:
                self.end_now()
            else:
                self.drain()
        elif isinstance(message, wire.Progress):
            self.running, self.waiting, self.usage = message.running, message.waiting, message.usage
            counts: list[Callable[[], None]] = [partial(self.metrics.step, message.tokens, message.step_seconds)]
            if message.drafts.number:
                drafts = message.drafts
                counts.append(partial(self.metrics.drafts, drafts.number, drafts.tokens, drafts.accepted))
            now = time.monotonic()
            for news in message.news:
                self._tell(news, now, counts)
            # After the tasks that send the tokens on.
            asyncio.get_running_loop().call_soon(self._count, counts)

    def _url(self) -> str:
        if isinstance(self.address, str):
            return f"unix:{self.address}"
        host, port = self.address
        scheme = "http" if self.setup.certificate is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def _count(self, counts: list[Callable[[], None]]) -> None:
        for count in counts:
            count()

    def _tell(self, news: wire.News, now: float, counts: list[Callable[[], None]]) -> None:
        ticket = self._tickets.get(news.number)
        if ticket is None:
            return
        if ticket.started_at is None:
            ticket.started_at = now
            counts.append(partial(self.metrics.queued, now - ticket.queued_at))
        if ticket.first_at is None and news.choices:
            ticket.first_at = now
            counts.append(partial(self.metrics.first_token, now - ticket.queued_at))
            counts.append(partial(self.metrics.prefix, ticket.prompt_tokens, news.cached))
            counts.append(partial(self.metrics.tokens, [0.0] * (len(news.choices) - 1)))
        elif news.choices and ticket.last_at is not None:
            each = (now - ticket.last_at) / len(news.choices)
            counts.append(partial(self.metrics.tokens, [each] * len(news.choices)))
        ticket.last_at = now if news.choices else ticket.last_at
        if news.finish_reason:
            del self._tickets[news.number]
        if news.choices or news.finish_reason or news.prompt_logprobs:
            ticket.tell(
                Update(
                    choices=news.choices,
                    finish_reason=news.finish_reason,
                    error=news.error,
                    status=400,  # rank 0 refuses or gives up a request for its grammar only
                    cached=news.cached,
                    prompt_logprobs=news.prompt_logprobs,
                )
            )

    def _take_beat(self, rank: _Frames, beat: Any) -> None:
        self._numbers[rank] = beat.rank
        self._ranks[beat.rank] = RankState(time.monotonic(), beat.process, beat.busy_since, beat.doing)
        if beat.rank not in self._handles:
            self._handles[beat.rank] = os.pidfd_open(beat.process)
        self.metrics.rank_seen(beat.rank)
        rank.send(wire.Heard())

    def _engine_lost(self, engine: _Frames) -> None:
        async def end() -> None:
            await self._lost("rank 0 has ended")
            if self._stopping:
                self.ended.set()

        self._spawn(end())

    def _rank_lost(self, rank: _Frames) -> None:
        number = self._numbers.pop(rank, None)
        if number is not None:
            process = self._ranks.pop(number).process
            self._spawn(self._lost(f"rank {number} (process {process}) has ended"))

    async def _watch(self) -> None:
        """Finds ranks that are stopped and steps that do not end."""
        late = time.monotonic()
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            now = time.monotonic()
            # If this process itself was stopped, ranks are not to blame for what it has not read yet.
            stalled, late = now - late > 1.0, now
            if stalled:
                for state in self._ranks.values():
                    state.seen = now
            silence = _LOADING_SILENCE_SECONDS if self.ready is None else SILENCE_SECONDS
            for rank, state in self._ranks.items():
                if now - state.seen > silence:
                    self.fail(f"rank {rank} (process {state.process}) has been silent for {now - state.seen:.1f} s")
                elif self.ready is not None and state.busy_since is not None:
                    seconds = now - state.busy_since
                    if seconds > (self.setup.step_seconds or STEP_SECONDS[self.ready.device]):
                        self.fail(
                            f"{state.doing} on rank {rank} (process {state.process}) has not ended for {seconds:.1f} s"
                        )
            self.metrics.gauges(self.running, self.waiting, self.usage, healthy=self.failure is None)

    # The end

    def end_with(self, process: int) -> None:
        """Ends the engine when this process has ended, or if there is no such process."""
        reason = f"process {process}, which the server belongs to, has ended"
        try:
            handle = os.pidfd_open(process)
        except ProcessLookupError:
            self.fail(reason)
            return
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(handle)
            os.close(handle)
            self.fail(reason)

        loop.add_reader(handle, ended)

    async def _lost(self, reason: str) -> None:
        if self.ready is None:
            await asyncio.sleep(_GIVING_UP_SECONDS)
        if not self._stopping:
            self.fail(reason)

    def fail(self, reason: str) -> None:
        """The engine cannot go on: tells every client, then ends all ranks and the server with exit code 1."""
        if self.failure is not None:
            return
        self.failure = reason
        for ticket in list(self._tickets.values()):
            ticket.tell(Update(finish_reason="error", error=f"the engine failed: {reason}"))
        self._tickets.clear()
        self._spawn(self._linger())
        wire.say(f"error: {reason}: ending the job")

    async def _linger(self) -> None:
        await asyncio.sleep(LINGER_SECONDS)
        self.exit_code = 1
        try:
            self.kill()
        finally:
            self.ended.set()

    def kill(self) -> None:
        """Ends every rank at once."""
        for handle in self._handles.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)

    def drain(self) -> None:
        """Lets running requests finish, takes no new ones, then stops the ranks."""
        if not self.draining:
            self.draining = True
            self._spawn(self._drain())

    async def _drain(self) -> None:
        end = time.monotonic() + self.setup.drain_seconds
        while self._tickets and time.monotonic() < end and self.failure is None:
            await asyncio.sleep(0.02)
        if self.failure is None:
            self.end_now()

    def end_now(self) -> None:
        """Stops the ranks; requests that still run end with an error."""
        self.draining = True
        if self._stopping:
            return
        for ticket in list(self._tickets.values()):
            ticket.tell(Update(finish_reason="error", error="the server is shutting down"))
        self._tickets.clear()
        self._stopping = True
        self._engine.send(wire.Stop())
