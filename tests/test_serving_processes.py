"""The processes of a server, each with stand-ins for the others."""

import asyncio
import contextlib
import fcntl
import gc
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import ROOT
from support.waiting import PATIENCE, until

from cqil_trt.sampling import Choice, SamplingConfig
from cqil_trt.scheduler import Outcome
from cqil_trt.session import Session

for name in ("uvicorn", "starlette", "pydantic", "prometheus_client"):
    pytest.importorskip(name)


# The HTTP process, and ranks that are not real


@contextlib.contextmanager
def http_process(loop, directory):
    """The HTTP process of a small engine: its process, rank 0's end of its socket, and where clients connect."""
    from support.chat_models import make_chat_model

    import cqil_trt
    from cqil_trt.serving import wire

    engine = cqil_trt.build(
        model=make_chat_model(directory / "model"), p=1, output=directory / "engine", probes="never"
    )
    ours, theirs = socket.socketpair()
    monitor, listener = socket.socket(socket.AF_UNIX), socket.create_server(("127.0.0.1", 0))
    monitor.bind(str(directory / "monitor"))
    monitor.listen()
    control = wire.Connection(ours, "it")
    control.send(wire.Setup(engine=str(engine.path), model_names=("m",), log_requests=False))
    control.send(wire.Ready(slots=4, rows=2, device="cpu"))
    numbers = [sock.fileno() for sock in (theirs, monitor, listener)]
    if loop == "uvloop":
        pytest.importorskip(loop)
    hidden = "" if loop == "uvloop" else "sys.modules['uvloop'] = None; "
    program = f"import runpy, sys; {hidden}runpy.run_module('cqil_trt.serving.frontend', run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, numbers)],
        pass_fds=numbers,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        yield process, control, listener.getsockname()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_what_rank_0_says_right_after_the_setup_is_not_lost(loop, tmp_path):
    with http_process(loop, tmp_path) as (process, _, _):
        assert "4 slots" in process.stdout.readline() and "serving at" in process.stdout.readline()
        # As many clients as the system allows.
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        soft, hard = re.search(r"Max open files +(\S+) +(\S+)", limits).groups()
        assert soft == hard


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_what_belongs_together_is_sent_at_once(loop, tmp_path):
    from cqil_trt.serving import wire

    with http_process(loop, tmp_path) as (process, control, place):
        assert "4 slots" in process.stdout.readline()
        client = socket.create_connection(place, timeout=PATIENCE)

        def ask(stream):
            body = b'{"prompt": [1, 2], "max_tokens": 3, "logprobs": 0, "stream": %s}' % stream
            head = b"POST /v1/completions HTTP/1.1\r\nHost: it\r\nContent-Type: application/json\r\n"
            client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            return control.receive().number

        def tell(number, *tokens, reason=""):
            choices = tuple(Choice(token, ((token, -1.0),)) for token in tokens)
            control.send(wire.Progress(news=(wire.News(number=number, choices=choices, finish_reason=reason),)))

        for _ in range(2):
            number = ask(b"true")
            tell(number, 5)
            first = client.recv(1 << 16)
            assert first.startswith(b"HTTP/1.1 200 ") and first.count(b"data: {") == 1
            tell(number, 6)
            assert client.recv(1 << 16).count(b"data: {") == 1
            tell(number, 7, reason="length")
            last = client.recv(1 << 16)
            assert last.count(b"data: {") == 1 and last.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            tell(ask(b"false"), 5, 6, 7, reason="length")
            whole = client.recv(1 << 16)
            assert whole.startswith(b"HTTP/1.1 200 ") and json.loads(whole.partition(b"\r\n\r\n")[2])["choices"]
        # A head without a body does not wait for one.
        client.sendall(b"HEAD /health HTTP/1.1\r\nHost: it\r\nConnection: close\r\n\r\n")
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ") and client.recv(1) == b""


class FakeRanks:
    """An EngineClient, and this end of its sockets. Ranks are said to be a process that sleeps."""

    def __init__(self, tmp_path, monkeypatch, **setup):
        from cqil_trt.serving import client, wire
        from cqil_trt.serving.metrics import Metrics

        monkeypatch.setattr(client, "LINGER_SECONDS", 0.1)
        self.path = tmp_path / "monitor"
        control, theirs = socket.socketpair()
        monitor = socket.socket(socket.AF_UNIX)
        monitor.bind(str(self.path))
        monitor.listen()
        for sock in (theirs, monitor):
            sock.setblocking(False)
        self.control = wire.Connection(control, "it")
        values = wire.Setup(engine="", model_names=("m",), **setup)
        self.client = client.EngineClient(values, ("127.0.0.1", 0), theirs, monitor, Metrics("m"))
        self.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.ready = wire.Ready(slots=4, rows=2, device="cpu")

    def beat(self, connection, rank, busy_since=None):
        from cqil_trt.serving import wire

        doing = "" if busy_since is None else "a step"
        connection.send(wire.Beat(rank=rank, process=self.process.pid, busy_since=busy_since, doing=doing))

    async def start(self):
        """With a request, which hears of a failure however soon that comes."""
        await self.client.start()
        self.updates = asyncio.Queue()
        fields = {"prompt": (1,), "max_new_tokens": 1, "eos_token_ids": (), "sampling": None}
        self.client.submit(self.updates, 0, **fields)

    async def fails(self, *fragments):
        """The client finds the failure, tells the request, and ends the ranks; returns when it told that."""
        _, update = await asyncio.wait_for(self.updates.get(), PATIENCE)
        told = time.monotonic()
        assert update.finish_reason == "error"
        for fragment in fragments:
            assert fragment in update.error and fragment in self.client.failure
        await asyncio.wait_for(self.client.ended.wait(), PATIENCE)
        assert self.client.exit_code == 1
        return told

    def killed(self):
        return self.process.wait(PATIENCE) == -signal.SIGKILL


@pytest.fixture
def fake(tmp_path, monkeypatch):
    made = FakeRanks(tmp_path, monkeypatch, step_seconds=0.5)
    yield made
    made.process.kill()
    made.process.wait()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_connections_of_ranks_last(loop, fake):
    from cqil_trt.serving import wire

    run = pytest.importorskip(loop).run

    async def scenario():
        await fake.client.start()
        gc.collect()
        rank = wire.connect(fake.path, "it")
        await asyncio.sleep(0.05)
        gc.collect()
        fake.beat(rank, 0)
        assert await asyncio.to_thread(rank.receive) == wire.Heard()
        assert fake.client.failure is None

    run(scenario())


def test_a_step_that_does_not_end(fake):
    from cqil_trt.serving import wire

    async def scenario():
        await fake.start()
        fake.control.send(fake.ready)
        first, second = wire.connect(fake.path, "it"), wire.connect(fake.path, "it")
        fake.beat(first, 0)
        began = time.monotonic() - 0.2
        fake.beat(second, 1, began)
        told = await fake.fails("a step on rank 1", "has not ended for", f"process {fake.process.pid}")
        assert told - began > 0.5
        assert fake.killed()

    asyncio.run(scenario())


def test_a_request_comes_as_rank_0_ends(fake):
    """After the end of the connection, and before the failure that follows: it hears of the failure."""
    uvloop = pytest.importorskip("uvloop")  # raises for what is sent then; asyncio does not

    async def scenario():
        await fake.start()
        fake.control.close()
        await asyncio.sleep(0.2)  # less than it waits, while the engine loads, for rank 0 to say that it gives up
        assert fake.client.failure is None and fake.client._engine.transport.is_closing()
        fields = {"prompt": (1,), "max_new_tokens": 1, "eos_token_ids": (), "sampling": None}
        ticket = fake.client.submit(fake.updates, 1, **fields)
        fake.client.abort(ticket)
        fake.client.submit(fake.updates, 2, **fields)
        await fake.fails("rank 0 has ended")
        index, update = await asyncio.wait_for(fake.updates.get(), PATIENCE)
        assert index == 2 and update.finish_reason == "error"

    uvloop.run(scenario())


def test_a_step_may_take_long_while_the_engine_loads(fake):
    from cqil_trt.serving import wire

    async def scenario():
        await fake.start()
        connection = wire.connect(fake.path, "it")
        fake.beat(connection, 0, time.monotonic() - 100)
        await asyncio.sleep(0.4)
        assert fake.client.failure is None
        fake.control.send(fake.ready)
        await fake.fails("a step on rank 0")

    asyncio.run(scenario())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_cpu_has_more_time_for_a_step(device, fake):
    """By default: a chunk of a prompt takes it seconds, where the weights are billions."""
    from cqil_trt.serving import wire

    async def scenario():
        fake.client.setup = replace(fake.client.setup, step_seconds=None)
        await fake.start()
        fake.control.send(replace(fake.ready, device=device))
        connection = wire.connect(fake.path, "it")
        fake.beat(connection, 0, time.monotonic() - 20)
        if device == "cuda":
            await fake.fails("a step on rank 0")
        await asyncio.sleep(0.3)
        assert (fake.client.failure is None) == (device == "cpu")

    asyncio.run(scenario())


def test_a_rank_is_silent(fake, monkeypatch):
    from cqil_trt.serving import client, wire

    # More than this process may be held up, which `_watch` does not blame on ranks.
    monkeypatch.setattr(client, "SILENCE_SECONDS", 1.5)

    async def scenario():
        await fake.start()
        fake.control.send(fake.ready)
        first, second = wire.connect(fake.path, "it"), wire.connect(fake.path, "it")
        fake.beat(second, 1)

        async def beats():
            while True:
                fake.beat(first, 0)
                await asyncio.sleep(0.1)

        beating = asyncio.create_task(beats())
        await fake.fails("rank 1", "silent")
        beating.cancel()
        assert fake.killed()

    asyncio.run(scenario())


def test_ranks_are_not_blamed_while_this_process_is_held_up(fake, monkeypatch):
    from cqil_trt.serving import client, wire

    monkeypatch.setattr(client, "SILENCE_SECONDS", 1.4)

    async def scenario():
        await fake.client.start()
        fake.control.send(fake.ready)
        connection = wire.connect(fake.path, "it")
        fake.beat(connection, 0)
        assert await asyncio.to_thread(connection.receive) == wire.Heard()
        time.sleep(1.5)  # noqa: ASYNC251
        await asyncio.sleep(0.3)  # another second would be a hold-up too
        assert fake.client.failure is None

    asyncio.run(scenario())


@pytest.mark.parametrize("end", ["monitor", "control"])
def test_a_connection_ends(end, fake):
    from cqil_trt.serving import wire

    async def scenario():
        await fake.start()
        fake.control.send(fake.ready)
        connection = wire.connect(fake.path, "it")
        fake.beat(connection, 1)
        assert await asyncio.to_thread(connection.receive) == wire.Heard()
        if end == "monitor":
            connection.close()
            await fake.fails("rank 1", "has ended")
        else:
            fake.control.close()
            await fake.fails("rank 0 has ended")
        assert fake.killed()

    asyncio.run(scenario())


class FakeSession:
    """A session that runs a step ahead, as those on GPUs do."""

    ahead, slots, reuses, on_gpu = 1, 2, True, False
    circle = None
    draft_width, padded_width, padded_chunk = Session.draft_width, Session.padded_width, Session.padded_chunk
    limits = SimpleNamespace(max_batch_size=2, max_seq_len=10**6, prefill_chunk=8)

    def __init__(self):
        self.outcomes, self.collected = [], []

    def submit(self, step):
        token = len(self.outcomes) + len(self.collected)
        scored = step.chunk is not None and step.chunk.scored
        logits = np.zeros((step.chunk.predict, 8), np.float32) if scored else None
        self.outcomes.append(Outcome(choices={slot: [Choice(token)] for slot in step.choosing}, logits=logits))
        time.sleep(0.002)

    def choose(self, masks):
        pass

    def collect(self):
        self.collected.append(self.outcomes.pop(0))
        return self.collected[-1]


def lead_and_follow(client):
    """Runs the loops of two ranks while `client(http)` acts as the HTTP process; returns their sessions."""
    from cqil_trt.serving import ranks, wire

    http, theirs = (wire.Connection(sock, "it") for sock in socket.socketpair())
    orders, mine = (wire.Connection(sock, "it") for sock in socket.socketpair())
    sessions = FakeSession(), FakeSession()
    first, second = (SimpleNamespace(session=s, tokenizer=None, speculation=None) for s in sessions)
    pulse = SimpleNamespace(busy=lambda doing: contextlib.nullcontext())
    threads = [
        threading.Thread(target=client, args=(theirs,), daemon=True),
        threading.Thread(target=ranks.follow, args=(second, orders, pulse), daemon=True),
    ]
    for thread in threads:
        thread.start()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ranks.lead(first, ranks.Options(policy="latency", rows=None, chunk=None), [mine], http, pulse)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    return sessions


def add(number):
    from cqil_trt.serving import wire

    fields = {"max_new_tokens": 10**6, "eos_token_ids": (), "sampling": SamplingConfig()}
    return wire.Add(number=number, prompt=(1, 2, 3), **fields)


def progress(http, condition):
    """Reads what rank 0 tells until the condition holds; returns that."""
    from cqil_trt.serving import wire

    while not (isinstance(message := http.receive(), wire.Progress) and condition(message)):
        pass
    return message


def test_ranks_agree_when_they_are_stopped_in_a_step():
    from cqil_trt.serving import wire

    def client(http):
        http.send(add(1))
        progress(http, lambda told: told.running == 1 and told.tokens)
        http.send(wire.Stop())

    first, second = lead_and_follow(client)
    assert first.collected == second.collected and not first.outcomes and not second.outcomes


def test_a_grammar_that_takes_long_holds_nobody_up(monkeypatch):
    from cqil_trt.errors import UserError
    from cqil_trt.serving import ranks, wire

    class Anything:
        failure = ""

        def mask(self):
            return np.full(4, 0xFFFFFFFF, np.uint32)

        def advance(self, token):
            pass

    compiled, go = [], threading.Event()

    def matcher(grammar):
        compiled.append(grammar)
        if grammar == "wrong":
            raise UserError("it is wrong")
        assert go.wait(PATIENCE)
        return Anything()

    monkeypatch.setattr(ranks, "matchers", lambda llm: matcher)
    guided = SamplingConfig(guided=True)

    def client(http):
        http.send(add(1))
        progress(http, lambda told: told.running == 1 and told.tokens)
        for number, grammar in ((2, "long"), (3, "given up"), (4, "wrong")):
            http.send(replace(add(number), sampling=guided, grammar=grammar))
        progress(http, lambda told: told.waiting == 3)
        for _ in range(20):
            progress(http, lambda told: told.tokens and [news.number for news in told.news] == [1])
        http.send(wire.Abort(numbers=(3,)))
        progress(http, lambda told: told.waiting == 2)
        go.set()
        progress(http, lambda told: [news.error for news in told.news if news.number == 4] == ["it is wrong"])
        progress(http, lambda told: {news.number for news in told.news if news.choices} == {1, 2})
        http.send(wire.Stop())

    first, second = lead_and_follow(client)
    assert first.collected == second.collected
    assert compiled == ["long", "wrong"]


def test_a_prompt_that_is_scored_holds_nobody_up(monkeypatch):
    """Its news waits for the log-probabilities of its prompt, in order; nobody else's does."""
    from cqil_trt.serving import ranks, wire

    go, news = threading.Event(), []

    def log_probabilities(row, token, count):
        assert go.wait(PATIENCE)
        return ((token, -1.0),)

    monkeypatch.setattr(ranks, "log_probabilities", log_probabilities)
    prompt = tuple(range(1, 12))  # two chunks

    def client(http):
        http.send(add(1))
        progress(http, lambda told: told.running == 1 and told.tokens)
        for number in (2, 3):
            scored = SamplingConfig(logprobs=0)
            http.send(replace(add(number), prompt=prompt, scored=0, max_new_tokens=2, sampling=scored))
        for _ in range(30):
            told = progress(http, lambda told: any(found.choices for found in told.news))
            assert {found.number for found in told.news if found.choices or found.prompt_logprobs} == {1}
        http.send(wire.Abort(numbers=(3,)))
        for _ in range(10):  # until rank 0 has read that
            progress(http, lambda told: any(found.choices for found in told.news))
        go.set()
        while not (news and news[-1].finish_reason):
            told = progress(http, lambda told: told.news).news
            news.extend(found for found in told if found.number != 1 and found != wire.News(number=found.number))
        http.send(wire.Stop())

    first, second = lead_and_follow(client)
    assert len(first.collected) == len(second.collected)
    assert {found.number for found in news} == {2}
    # Every token but the first has a log-probability, and all of them come before the first choice.
    assert [pairs[0][0] for found in news for pairs in found.prompt_logprobs] == list(prompt[1:])
    kinds = ["prompt" if found.prompt_logprobs and not found.choices else "choice" for found in news]
    assert kinds == sorted(kinds, reverse=True)
    assert [len(found.choices) for found in news if found.choices] == [1, 1]
    assert [found.finish_reason for found in news] == [""] * (len(news) - 1) + ["length"]


def test_prompts_wait_while_the_log_probabilities_of_others_are_computed(monkeypatch):
    """As their logits take up memory; who asks for none goes on."""
    from cqil_trt.serving import ranks, wire

    go, read, done = threading.Event(), [], set()
    submit = FakeSession.submit

    def noting(session, step):
        read.append(step.chunk is not None and step.chunk.scored)
        submit(session, step)

    def log_probabilities(row, token, count):
        assert go.wait(PATIENCE)
        return ((token, -1.0),)

    monkeypatch.setattr(FakeSession, "submit", noting)
    monkeypatch.setattr(ranks, "log_probabilities", log_probabilities)

    def client(http):
        http.send(add(1))
        progress(http, lambda told: told.running == 1 and told.tokens)
        scored = {"scored": 0, "max_new_tokens": 1, "sampling": SamplingConfig(logprobs=0)}
        for number in range(2, 10):
            http.send(replace(add(number), prompt=tuple(range(1, 41)), **scored))  # five chunks each
        progress(http, lambda told: told.running + told.waiting == 9)  # what came before was not read yet
        for _ in range(60):
            progress(http, lambda told: told.tokens)
        assert 2 <= sum(read) <= 2 * 4  # of two sessions: computed, waiting, and in flight
        http.send(wire.Abort(numbers=(1, 9)))
        time.sleep(0.05)  # with nothing else to do
        go.set()
        while len(done) < 7:
            told = progress(http, lambda told: told.news)
            done.update(news.number for news in told.news if news.finish_reason == "length")
        http.send(wire.Stop())

    first, second = lead_and_follow(client)
    assert len(first.collected) == len(second.collected) and done == set(range(2, 9))


def test_rank_0_tells_that_a_request_is_gone():
    from cqil_trt.serving import wire

    def client(http):
        for number in (1, 2, 3):
            http.send(add(number))
        progress(http, lambda told: (told.running, told.waiting) == (2, 1))
        http.send(wire.Abort(numbers=(3, 99)))
        progress(http, lambda told: (told.running, told.waiting) == (2, 0))
        http.send(wire.Abort(numbers=(1, 2)))
        progress(http, lambda told: (told.running, told.waiting, told.usage) == (0, 0, 0))
        http.send(add(4))
        progress(http, lambda told: told.running == 1 and told.tokens)
        http.send(wire.Stop())

    first, second = lead_and_follow(client)
    assert first.collected == second.collected


# Clients


def test_a_connection_may_have_any_descriptor():
    import resource

    from cqil_trt.serving import wire

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 2048:
        pytest.skip("no more than 1,024 files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 2048), before[1]))
    try:
        ours, theirs = socket.socketpair()
        with ours, theirs, socket.socket(fileno=fcntl.fcntl(ours, fcntl.F_DUPFD, 1500)) as high:
            connection = wire.Connection(high, "it")
            assert connection.poll(0) == []
            theirs.sendall(wire.pack("x"))
            assert connection.receive() == "x"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("size", [1, 1 << 16, 150_000])
def test_a_poll_takes_a_large_message_whole(size):
    """And what arrived before the other end went is there before the end is."""
    from cqil_trt.serving import wire

    ours, theirs = (wire.Connection(sock, "it") for sock in socket.socketpair())
    sent = [bytes(size), wire.Abort(numbers=(1,))]
    for message in sent:
        theirs.send(message)
    theirs.close()
    assert ours.poll(5) == sent
    with pytest.raises(wire.Closed):
        ours.poll(5)


def test_a_client_that_takes_nothing_for_long_is_given_up(monkeypatch):
    from cqil_trt.serving import streams

    monkeypatch.setattr(streams, "_STALLED_SECONDS", 0.1)
    closed = []

    async def events():
        while True:
            yield b"data: more\n\n", True

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    response = streams.EventStream(events(), lambda: closed.append(True))
    asyncio.run(asyncio.wait_for(response({"type": "http"}, receive, send), PATIENCE))
    assert closed == [True]


@pytest.mark.parametrize("swallowed", [0, 1, 3])
def test_a_task_that_overhears_its_cancellation_ends(swallowed):
    """As those do until Python 3.12 that wait with `asyncio.wait_for`."""
    from cqil_trt.serving.streams import ended

    async def scenario():
        heard = 0

        async def work():
            nonlocal heard
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    heard += 1
                    if heard > swallowed:
                        raise

        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        await asyncio.wait_for(ended(task), PATIENCE)
        assert task.cancelled() and heard == swallowed + 1

    asyncio.run(scenario())


# What every request passes, without a server


def in_no_time(scenario):
    """Runs it in a loop whose time passes while all of it waits, and only then, however slow the machine is."""
    now = 0.0

    class Selector(selectors.DefaultSelector):
        def select(self, timeout=None):
            nonlocal now
            now += timeout or 0.0
            return super().select(None if timeout is None else 0)

    loop = asyncio.SelectorEventLoop(Selector())
    loop.time = lambda: now
    try:
        loop.run_until_complete(scenario)
    finally:
        loop.close()


def through_gate(messages, headers=(), method="POST", pause=0.0):
    """The status of a request whose body comes in `messages`, the last of which is `pause` seconds late."""
    from cqil_trt.serving import gate, wire
    from cqil_trt.serving.metrics import Metrics

    statuses = []

    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        await asyncio.sleep(2 * gate.BODY_SECONDS)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def scenario():
        left = list(messages)

        async def receive():
            if len(left) == 1:
                await asyncio.sleep(pause)
            return left.pop(0)

        async def send(message):
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        setup = wire.Setup(engine="", model_names=("m",), log_requests=False)
        scope = {"type": "http", "method": method, "path": "/v1/completions", "headers": list(headers)}
        await gate.Gate(app, setup, Metrics("m", 8))(scope, receive, send)

    in_no_time(scenario())
    [status] = statuses
    return status


JSON = [(b"content-type", b"application/json")]
PARTS = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.request", "body": b"}"}]


def test_a_body_that_does_not_come():
    from cqil_trt.serving.gate import BODY_SECONDS

    assert through_gate(PARTS, JSON) == 200
    assert through_gate(PARTS, JSON, pause=0.9 * BODY_SECONDS) == 200
    assert through_gate(PARTS, JSON, pause=1.1 * BODY_SECONDS) == 408


def test_bodies_that_any_page_may_send():
    for kind in (b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x", b""):
        assert through_gate(PARTS, [(b"content-type", kind)]) == 415
    assert through_gate(PARTS) == 415
    assert through_gate(PARTS[1:], method="GET") == 200


def test_heads_of_requests_are_bounded_in_length_and_time(monkeypatch):
    import uvicorn

    from cqil_trt.serving import frontend

    monkeypatch.setattr(frontend, "_HEAD_SECONDS", 1.5)

    async def app(scope, receive, send):
        await asyncio.sleep(2)  # longer than a head may take
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def ask(place, *parts):
        reader, writer = await asyncio.open_connection(*place)
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.01)
        try:
            return await asyncio.wait_for(reader.read(), PATIENCE)
        except ConnectionError:
            return b"reset"  # closed before all was read
        finally:
            writer.close()

    async def scenario():
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(app, http=frontend._Protocol, lifespan="off", log_level="error")
        server = frontend._Uvicorn(config)
        serving = asyncio.create_task(server.serve([listener]))
        place, line = listener.getsockname(), b"GET / HTTP/1.1\r\nConnection: close\r\n"
        fine, long, late = (b"HTTP/1.1 200 ",), (b"HTTP/1.1 431 ", b"reset"), (b"HTTP/1.1 408 ",)
        asked = [
            (fine, (line, b"A: b\r\n\r\n")),
            (fine, (line, b"A: " + b"a" * 60_000, b"\r\n\r\n")),
            *((long, (line, piece, piece, piece)) for piece in (b"A: " + b"a" * 40_000, b"A: b\r\n" * 6_000)),
            *((late, (part,)) for part in (b"", b"GET", line)),
            # The head of a second request comes while the first is answered.
            (fine, (b"GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n",)),
        ]
        answers = await asyncio.gather(*(ask(place, *parts) for _, parts in asked))
        for (starts, parts), answer in zip(asked, answers):
            assert answer.startswith(starts), (parts, answer)
        assert b"HTTP/1.1 408 " in answers[-1]
        server.should_exit = True
        await serving

    asyncio.run(scenario())


def runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("answers", [True, False])
def test_an_http_process_that_does_not_answer(answers, tmp_path):
    from cqil_trt.serving import wire

    path = tmp_path / "monitor"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    program = f"""
import subprocess, sys, time
from pathlib import Path
from cqil_trt.serving import ranks
ranks.DEAF_SECONDS, ranks.BEAT_SECONDS = 1.2, 0.05
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
ranks.Pulse(3, Path({str(path)!r}), child)
time.sleep({2.5 if answers else PATIENCE})
child.kill()
"""
    rank = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    connection = wire.Connection(listener.accept()[0], "the rank")
    with contextlib.suppress(wire.Closed):
        for _ in range(1000 if answers else 1):
            assert isinstance(connection.receive(), wire.Beat)
            connection.send(wire.Heard())
    said, error = rank.communicate(timeout=2 * PATIENCE)
    assert rank.returncode == (0 if answers else 1)
    assert error == ("" if answers else "error: rank 3: the HTTP process has not answered for 1.2 s\n")
    until(lambda: not runs(int(said)))  # the child has ended too


# What servers that were killed left


def test_the_socket_of_a_server_that_was_killed_is_replaced(tmp_path):
    from cqil_trt.commands.serve import _listen_for_clients
    from cqil_trt.errors import UserError

    options = SimpleNamespace(unix_socket=tmp_path / "socket")
    with _listen_for_clients(options):
        with pytest.raises(UserError, match="in use"):  # it is alive
            _listen_for_clients(options)
    with _listen_for_clients(options), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(options.unix_socket))
    options.unix_socket = tmp_path / "file"
    options.unix_socket.write_text("something else")
    with pytest.raises(UserError, match="--unix-socket .*file: exists and is not a socket"):
        _listen_for_clients(options)
    assert options.unix_socket.read_text() == "something else"


def test_old_directories_of_servers_are_removed(tmp_path, monkeypatch):
    from cqil_trt.serving import wire

    program = "import os; from cqil_trt.serving.wire import Rendezvous; Rendezvous().listen('orders'); os._exit(1)"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    [abandoned] = tmp_path.iterdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    other = wire.Rendezvous()
    assert set(tmp_path.iterdir()) == {abandoned, other.path}  # it could be one that is being made
    for directory in (abandoned, other.path):
        os.utime(directory, (0, 0))
    own = wire.Rendezvous()
    assert set(tmp_path.iterdir()) == {other.path, own.path}
    for _ in range(2):
        own.remove()
    assert set(tmp_path.iterdir()) == {other.path}


def test_a_refused_request_leaves_no_timer():
    from cqil_trt.serving import api, app, refusals

    async def scenario():
        server = app.Server.__new__(app.Server)
        ready, model = SimpleNamespace(rows=2), SimpleNamespace(vocab_size=8)
        server.client = SimpleNamespace(failure=None, draining=False, ready=ready, active=0)
        server.setup = SimpleNamespace(max_waiting=8, request_seconds=600.0, queue_seconds=60.0)
        server.engine, server.tokenizer, server.ends = SimpleNamespace(model=model), None, ()
        body = api.CompletionBody(prompt=[1], logit_bias={"9": 1})
        with pytest.raises(refusals.Refused, match="not a token id"):
            await server._ask(body, [[1]], [4], None)
        assert not asyncio.get_running_loop()._scheduled

    asyncio.run(scenario())
