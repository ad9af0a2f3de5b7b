"""What a server does when something breaks: a rank, a client, the HTTP process, its time or its place in the queue."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from support.checkpoints import make_model
from support.http_client import HttpConnection, ask, metric
from support.made_tokenizers import save_byte_tokenizer
from support.needs import need
from support.processes import assert_user_error, build, mpirun, run
from support.serving import ServerProcess, processes
from support.waiting import PATIENCE

pytestmark = pytest.mark.slow

# A failure shows within so many seconds, and all is over so many later.
RED, OVER = 5.0, 10.0
# Much less than ENDLESS takes, and much more than it takes to hear that its client has gone.
FREED = 2.0
WAITING = 40
ENDLESS = {"prompt": "hello", "max_tokens": 3900, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    need("uvicorn", "starlette", "pydantic", "prometheus_client", "llguidance")
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    model = make_model(tmp_path_factory.mktemp("model"), vocab_size=259, max_position_embeddings=4096, **sizes)
    save_byte_tokenizer(model)
    path = tmp_path_factory.mktemp("engines") / "engine"
    limits = ("--max-seq-len", 4096, "--max-batch-size", 4)
    done = build("--model", model, "--p", 2, "--d", 1, *limits, "--output", path)
    assert done.returncode == 0, done.stderr
    return path


@contextlib.contextmanager
def serving(engine, *flags):
    """A server of two ranks, of which nothing is left at the end."""
    server = ServerProcess(2, engine, "--device", "cpu", "--no-log", *flags)
    server.all, server.listener = [*server.ranks(), server.http()], listener(server)
    assert len(server.all) == 3 and server.listener is not None
    try:
        yield server
    finally:
        for process in left(server):
            os.kill(process, signal.SIGKILL)
        server.process.kill()
        server.process.wait()


def left(server):
    """The server's processes that still run."""
    running = processes()
    return [pid for pid in server.all if "serv" in running.get(pid, (0, ""))[1]]


@pytest.fixture(scope="module")
def shared(engine):
    """For tests that leave it as it was. Two requests run, WAITING others wait."""
    with serving(engine, "--max-running", 2, "--max-waiting", WAITING) as server:
        yield server
        assert server.stop() == 0, server.output
        assert "stopped: all ranks hold identical bits" in server.output


@pytest.fixture(scope="module")
def narrow(engine):
    """One request runs, one waits, and neither for long."""
    flags = ("--max-running", 1, "--max-waiting", 1, "--queue-timeout", 1, "--request-timeout", 3)
    with serving(engine, *flags) as server:
        yield server
        assert server.stop() == 0, server.output


class Stream:
    """A client that streams a completion: `events` that came, `status`, and whether the body was `complete`."""

    def __init__(self, server, **changes):
        self.server, self.values = server, {**ENDLESS, "stream": True, **changes}
        self.events = []
        self.status, self.headers, self.complete = 0, {}, False
        self.times = []
        self.task = asyncio.create_task(self._run())

    async def _run(self):
        async with await HttpConnection.open(self.server.url) as http:
            await http.send("POST", "/v1/completions", self.values)
            self.status = await http.head()
            self.headers = http.headers
            if self.status != 200:
                self.events.append(json.loads(await http.body()))
                return
            async for data in http.events():
                self.events.append(data if data == "[DONE]" else json.loads(data))
                self.times.append(time.monotonic())
            self.complete = True

    async def begun(self, events=1):
        await until(lambda: len(self.events) >= events or self.task.done())
        assert not self.task.done(), self.events

    @property
    def error(self):
        """The error that the client was told."""
        last = self.events[-1] if self.events else {}
        return last.get("error", {}).get("message") if isinstance(last, dict) else None


async def until(condition, seconds=PATIENCE):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen"
        await asyncio.sleep(0.01)


async def until_metric(server, name, value, seconds=PATIENCE):
    began = time.monotonic()
    while (found := await metric(server.url, name)) != value:
        assert time.monotonic() - began < seconds, f"{name} is {found}"
        await asyncio.sleep(0.02)


async def until_running(server, value):
    await until_metric(server, "vllm:num_requests_running", value, FREED)


async def until_waiting(server, value):
    await until_metric(server, "vllm:num_requests_waiting", value, FREED)


async def until_red(server):
    """Waits until /health says that the server failed; returns its reason."""
    began = time.monotonic()
    while True:
        try:
            status, _, said = await asyncio.wait_for(ask(server.url, "GET", "/health"), RED)
        except OSError as error:
            raise AssertionError(f"/health was never red: {error!r}, {server.output}") from None
        if status == 503:
            assert time.monotonic() - began < RED
            return said["reason"]
        assert status == 200
        assert time.monotonic() - began < RED, "/health stayed green"
        await asyncio.sleep(0.03)


def assert_over(server, *fragments):
    """The server has ended with an error, says why, and has left no process and no port."""
    code = server.wait(OVER)
    assert code != 0, server.output
    assert_all_ended(server)
    said = [line for line in server.output.splitlines() if line.startswith("error: ")]
    for fragment in fragments:
        assert any(fragment in line for line in said), (fragment, server.output)
    assert "Traceback" not in server.output, server.output
    assert "stopped: all ranks" not in server.output


def assert_all_ended(server):
    """No process is left, and nobody listens. Of those that were killed some may need a moment."""
    end = time.monotonic() + OVER
    while (left(server) or listener(server) == server.listener) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left(server), [processes().get(pid) for pid in left(server)]
    assert listener(server) != server.listener, "the port is still in use"


def listener(server):
    """The number of the socket that listens where the server does or did, which may be another's; None without one."""
    host, port = server.url.split("//")[1].split(":")
    address = f"{socket.inet_aton(host)[::-1].hex().upper()}:{int(port):04X}"
    for _, local, _, state, *rest in map(str.split, Path("/proc/net/tcp").read_text().splitlines()[1:]):
        if (local, state) == (address, "0A"):
            return int(rest[5])
    return None


async def assert_told(streams):
    """Every client hears that its request failed: an error event at the end of a stream, or a status."""
    for stream in streams:
        await asyncio.wait_for(stream.task, RED)
        assert stream.status in (200, 503)
        assert stream.error is not None, stream.events[-1:]
        assert "[DONE]" not in stream.events
        if stream.status == 200:
            assert stream.complete and stream.error.startswith("the engine failed: ")


# Ranks


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed(rank, engine):
    async def scenario():
        streams = [Stream(server) for _ in range(3)]
        for stream in streams:
            await stream.begun(3)
        streams.append(Stream(server))  # in the queue
        await until_metric(server, "vllm:num_requests_waiting", 1)
        os.kill(server.all[rank], signal.SIGKILL)
        reason, _ = await asyncio.gather(until_red(server), assert_told(streams))
        assert f"rank {rank}" in reason and "has ended" in reason
        assert streams[3].status == 503

    with serving(engine, "--max-running", 3) as server:
        asyncio.run(scenario())
        assert_over(server, f"rank {rank}", "has ended")


@pytest.mark.parametrize("loaded", [False, True], ids=["idle", "under load"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_stopped(rank, loaded, engine):
    async def scenario():
        streams = [Stream(server) for _ in range(2 * loaded)]
        for stream in streams:
            await stream.begun(3)
        os.kill(server.all[rank], signal.SIGSTOP)
        if not loaded:  # it still takes requests, which hear of the failure
            streams.append(Stream(server))
        reason, _ = await asyncio.gather(until_red(server), assert_told(streams))
        assert f"rank {rank}" in reason and "silent" in reason
        assert (await ask(server.url, "POST", "/v1/completions", ENDLESS))[0] == 503
        assert (await ask(server.url, "GET", "/ready"))[0] == 503

    with serving(engine) as server:
        asyncio.run(scenario())
        assert_over(server, f"rank {rank}", "silent")


def test_a_step_takes_too_long(engine):
    """Prompts of thousands of tokens in one step each, and a limit that is too short for it."""

    async def scenario():
        # A fast machine does the first ones between two signs of life.
        prompts = [[3 + (1 + i) * step % 200 for i in range(4000)] for step in range(1, 25)]
        streams = [Stream(server, prompt=prompt) for prompt in prompts]
        reason, _ = await asyncio.gather(until_red(server), assert_told(streams[-1:]))
        assert "a step on rank" in reason and "has not ended for" in reason

    with serving(engine, "--prefill-chunk", 512, "--step-timeout", 0.05) as server:
        asyncio.run(scenario())
        assert_over(server, "a step on rank", "has not ended for")


def test_the_http_process_is_killed(engine):
    async def scenario():
        stream = Stream(server)
        await stream.begun(3)
        os.kill(server.all[2], signal.SIGKILL)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await asyncio.wait_for(stream.task, PATIENCE)
        assert "[DONE]" not in stream.events and not stream.complete

    with serving(engine) as server:
        asyncio.run(scenario())
        assert_over(server, "the HTTP process has ended")


def test_the_http_process_of_an_idle_server_is_killed(engine):
    with serving(engine) as server:
        os.kill(server.all[2], signal.SIGKILL)
        assert_over(server, "the HTTP process has ended")


# Clients


def test_a_streaming_client_goes(shared):
    async def scenario():
        async with await HttpConnection.open(shared.url) as http:
            await http.send("POST", "/v1/completions", {**ENDLESS, "stream": True})
            assert await http.head() == 200
            async for _ in http.events():
                break
            await until_running(shared, 1)
        await until_running(shared, 0)
        assert await metric(shared.url, "vllm:kv_cache_usage_perc") == 0
        await answers(shared)

    asyncio.run(scenario())


def test_a_client_goes_that_does_not_stream(shared):
    async def scenario():
        async with await HttpConnection.open(shared.url) as http:
            await http.send("POST", "/v1/completions", ENDLESS)
            await until_running(shared, 1)
        await until_running(shared, 0)
        await answers(shared)

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_goes_that_waits_in_the_queue(stream, shared):
    async def scenario():
        running = [Stream(shared) for _ in range(2)]
        for other in running:
            await other.begun()
        async with await HttpConnection.open(shared.url) as http:
            await http.send("POST", "/v1/completions", {**ENDLESS, "stream": stream})
            await until_waiting(shared, 1)
        await until_waiting(shared, 0)
        assert await metric(shared.url, "vllm:num_requests_running") == 2
        running.pop().task.cancel()
        await until_running(shared, 1)
        await answers(shared)  # in the slot that is free now
        running.pop().task.cancel()
        await until_running(shared, 0)

    asyncio.run(scenario())


def test_many_clients_come_and_go_at_once(shared):
    async def scenario():
        streams = [Stream(shared) for _ in range(WAITING)]
        await asyncio.sleep(0.7)
        for stream in streams:
            stream.task.cancel()
        await until_running(shared, 0)
        await until_waiting(shared, 0)
        await answers(shared)

    asyncio.run(scenario())


def test_clients_go_at_any_moment(shared):
    async def scenario():
        for pause in range(15):
            async with await HttpConnection.open(shared.url) as http:
                await http.send("POST", "/v1/completions", {**ENDLESS, "stream": pause % 3 > 0})
                await asyncio.sleep(0.05 + 0.003 * pause)
            await until_running(shared, 0)
        await asyncio.sleep(0.3)  # a gauge may be late
        await until_running(shared, 0)
        await answers(shared)

    asyncio.run(scenario())


async def answers(server):
    """A normal request is answered."""
    body = {"prompt": "hello", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    status, _, answer = await asyncio.wait_for(ask(server.url, "POST", "/v1/completions", body), PATIENCE)
    assert status == 200 and answer["usage"]["completion_tokens"] == 3


def test_a_client_that_reads_nothing_slows_nobody(shared):
    async def rate():
        """Seconds for 60 tokens of a client that reads."""
        stream = Stream(shared, max_tokens=60)
        began = time.monotonic()
        await asyncio.wait_for(stream.task, PATIENCE)
        assert stream.events[-1] == "[DONE]"
        return time.monotonic() - began

    async def scenario():
        beside = Stream(shared, logprobs=20)
        await beside.begun()
        usual = await rate()
        beside.task.cancel()
        await until_running(shared, 0)
        async with await HttpConnection.open(shared.url, receive_buffer=4096) as slow:
            await slow.send("POST", "/v1/completions", {**ENDLESS, "stream": True, "logprobs": 20})
            await until_running(shared, 1)
            assert await rate() < 3 * usual + 1
            assert await rate() < 3 * usual + 1
            await until_running(shared, 1)
        await until_running(shared, 0)
        await answers(shared)

    asyncio.run(scenario())


# The queue


def test_the_queue_is_full(shared):
    async def scenario():
        streams = [Stream(shared) for _ in range(2 + WAITING)]
        await until_waiting(shared, WAITING)
        for stream in (False, True):
            status, headers, answer = await ask(shared.url, "POST", "/v1/completions", {**ENDLESS, "stream": stream})
            assert status == 429 and int(headers["retry-after"]) >= 1
            assert answer["error"]["type"] == "rate_limit_error"
        assert (await ask(shared.url, "GET", "/health"))[0] == 200
        for stream in streams:
            stream.task.cancel()
        await until_running(shared, 0)
        await answers(shared)

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_in_the_queue(stream, narrow):
    async def scenario():
        running = Stream(narrow)
        await running.begun()
        began = time.monotonic()
        status, headers, answer = await ask(narrow.url, "POST", "/v1/completions", {**ENDLESS, "stream": stream})
        assert status == 503 and 0.9 < time.monotonic() - began < 2.5
        assert int(headers["retry-after"]) >= 1 and "waited too long" in answer["error"]["message"]
        await until_waiting(narrow, 0)
        running.task.cancel()
        await until_running(narrow, 0)

    asyncio.run(scenario())


def test_a_request_takes_too_long(narrow):
    async def scenario():
        began = time.monotonic()
        stream = Stream(narrow)
        await asyncio.wait_for(stream.task, 10)
        assert 2.9 < time.monotonic() - began < 5
        assert stream.status == 200 and "longer than 3 s" in stream.error and "[DONE]" not in stream.events
        await until_running(narrow, 0)
        status, _, answer = await ask(narrow.url, "POST", "/v1/completions", ENDLESS)
        assert status == 503 and "longer than 3 s" in answer["error"]["message"]
        await until_running(narrow, 0)
        await answers(narrow)

    asyncio.run(scenario())


# The end


def terminate(server):
    server.process.send_signal(signal.SIGTERM)


async def until_draining(server):
    began = time.monotonic()
    while (await ask(server.url, "GET", "/ready"))[2] != {"status": "draining"}:
        assert time.monotonic() - began < 2
        await asyncio.sleep(0.02)


def assert_stopped(server):
    assert server.wait(5) == 0, server.output
    assert "stopped: all ranks hold identical bits" in server.output
    assert "error" not in server.output and "Traceback" not in server.output, server.output
    assert_all_ended(server)


def test_sigterm_lets_running_requests_finish(engine):
    async def scenario():
        streams = [Stream(server, max_tokens=250) for _ in range(3)]  # one of them waits
        whole = asyncio.create_task(ask(server.url, "POST", "/v1/completions", {**ENDLESS, "max_tokens": 150}))
        await streams[0].begun(5)
        terminate(server)
        await until_draining(server)
        status, headers, _ = await ask(server.url, "POST", "/v1/completions", ENDLESS)
        assert status == 503 and int(headers["retry-after"]) >= 1
        assert (await ask(server.url, "GET", "/ready"))[0] == 503
        assert (await ask(server.url, "GET", "/health"))[0] == 200
        for stream in streams:
            await asyncio.wait_for(stream.task, PATIENCE)
            assert stream.events[-1] == "[DONE]"
            assert stream.events[-2]["choices"][0]["finish_reason"] == "length"
        status, _, answer = await whole
        assert status == 200 and answer["usage"]["completion_tokens"] == 150

    with serving(engine, "--max-running", 2, "--drain-seconds", PATIENCE) as server:
        asyncio.run(scenario())
        assert_stopped(server)


def test_sigterm_and_requests_that_take_too_long(engine):
    async def scenario():
        streams = [Stream(server) for _ in range(3)]
        whole = asyncio.create_task(ask(server.url, "POST", "/v1/completions", ENDLESS))
        await streams[0].begun(5)
        terminate(server)
        for stream in streams:
            await asyncio.wait_for(stream.task, 4)
            assert "shutting down" in stream.error and "[DONE]" not in stream.events
        status, _, answer = await whole
        assert status == 503 and "shutting down" in answer["error"]["message"]

    with serving(engine, "--max-running", 2, "--drain-seconds", 1) as server:
        asyncio.run(scenario())
        assert_stopped(server)


def test_sigterm_twice(engine):
    async def scenario():
        stream = Stream(server)
        await stream.begun(5)
        terminate(server)
        await until_draining(server)
        assert not stream.task.done()
        terminate(server)
        await asyncio.wait_for(stream.task, 2)
        assert "shutting down" in stream.error

    with serving(engine, "--drain-seconds", 60) as server:
        asyncio.run(scenario())
        assert_stopped(server)


def test_a_signal_to_the_process_in_the_pid_file(engine, tmp_path):
    """As mpirun does not hand signals on with every launcher."""
    file = tmp_path / "pid"

    async def scenario():
        stream = Stream(server, max_tokens=1000)  # so many that the server is seen to drain
        await stream.begun(5)
        os.kill(int(file.read_text()), signal.SIGTERM)
        await until_draining(server)
        await asyncio.wait_for(stream.task, PATIENCE)
        assert stream.events[-1] == "[DONE]"

    with serving(engine, "--pid-file", file, "--drain-seconds", PATIENCE) as server:
        assert int(file.read_text()) in server.ranks()
        asyncio.run(scenario())
        assert_stopped(server)
        assert not file.exists()


def test_a_directory_for_temporary_files_that_takes_no_sockets(engine, tmp_path):
    long = tmp_path / ("long" * 30)  # a socket's path has at most 107 bytes
    long.mkdir()
    server = [sys.executable, "runtime/serve.py", "--engine", engine, "--port", 0]
    assert_user_error(run("mpirun", "-n", 2, "env", f"TMPDIR={long}", *server), "TMPDIR", "too long")
    assert not list(long.glob("cqil-*"))


def test_a_pid_file_that_cannot_be_written(engine, tmp_path):
    """Neither its socket nor the directory in which its ranks meet is left."""
    flags = ("--engine", engine, "--pid-file", tmp_path / "missing" / "pid")
    with tempfile.TemporaryDirectory() as directory:  # a path that is short enough for a socket
        flags = (*flags, "--unix-socket", Path(directory) / "socket")
        done = mpirun(2, *flags, script="runtime/serve.py", env={"TMPDIR": directory})
        assert_user_error(done, "--pid-file", "missing/pid")
        assert not [path for path in Path(directory).iterdir() if path.name.startswith(("cqil", "socket"))]


def test_sigterm_and_a_rank_that_is_stopped(engine):
    with serving(engine) as server:
        os.kill(server.all[1], signal.SIGSTOP)
        terminate(server)
        assert_over(server, "rank 1", "silent")


def test_sigterm_with_a_client_that_reads_nothing(engine):
    async def scenario():
        async with await HttpConnection.open(server.url, receive_buffer=4096) as slow:
            await slow.send("POST", "/v1/completions", {**ENDLESS, "stream": True, "logprobs": 20})
            await until_running(server, 1)
            await asyncio.sleep(2)
            terminate(server)
            await until(lambda: server.process.poll() is not None, 8)

    with serving(engine, "--drain-seconds", 1) as server:
        asyncio.run(scenario())
        assert_stopped(server)


# Starting


def refuses(engine, *flags, ranks=2, fragments):
    done = mpirun(ranks, "--engine", engine, "--port", 0, *flags, script="runtime/serve.py")
    assert_user_error(done, *fragments)


def test_what_the_command_refuses(engine, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refuses(engine, "--port", port, fragments=[f"--port {port}", "in use"])
    refuses(engine, ranks=1, fragments=["needs 2 MPI ranks", "found 1", "mpirun -n 2"])
    refuses(engine, ranks=4, fragments=["needs 2 MPI ranks", "found 4"])
    refuses(tmp_path / "none", fragments=["none"])
    refuses(tmp_path, fragments=["not an engine directory"])
    refuses(engine, "--no-such-flag", fragments=["--no-such-flag"])
    refuses(engine, "--port", 70000, fragments=["--port", "65535"])
    refuses(engine, "--port", "http", fragments=["--port"])
    refuses(engine, "--host", "256.0.0.1", fragments=["--host 256.0.0.1"])
    refuses(engine, "--policy", "fast", fragments=["--policy"])
    refuses(engine, "--max-running", 0, fragments=["--max-running"])
    refuses(engine, "--max-running", 5, fragments=["--max-running 5", f"{engine} was built for at most 4"])
    refuses(engine, "--prefill-chunk", 513, fragments=["--prefill-chunk 513", "at most 512"])
    refuses(engine, "--slots", 1, "--max-running", 2, fragments=["--slots 1", "--max-running 2"])
    refuses(engine, "--model-name", "", fragments=["--model-name is empty"])
    with subprocess.Popen(["true"]) as over:
        pass
    refuses(engine, "--parent", over.pid, fragments=[f"--parent {over.pid}: there is no such process"])
    damaged = shutil.copytree(engine, tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{")
    refuses(damaged, fragments=[f"{damaged}/tokenizer.json: 1 byte"])
    refuses(engine, "--max-waiting", -1, fragments=["--max-waiting"])
    refuses(engine, "--slots", 0, fragments=["--slots"])
    refuses(engine, "--prefill-chunk", 0, fragments=["--prefill-chunk"])
    refuses(engine, "--step-timeout", 0, fragments=["--step-timeout"])
    refuses(engine, "--queue-timeout", "nan", fragments=["--queue-timeout"])
    refuses(engine, "--drain-seconds", "nan", fragments=["--drain-seconds"])
    refuses(engine, "--drain-seconds", -1, fragments=["--drain-seconds"])


def test_files_that_the_command_refuses(engine, tmp_path):
    file = tmp_path / "file"
    file.write_text("no certificate")
    refuses(engine, "--tls-certificate", file, fragments=["--tls-certificate", "--tls-key", "together"])
    refuses(engine, "--tls-certificate", file, "--tls-key", file, fragments=[f"--tls-certificate {file}"])
    missing = tmp_path / "missing"
    refuses(engine, "--tls-certificate", missing, "--tls-key", file, fragments=["missing"])
    refuses(
        engine,
        "--api-key-file",
        missing,
        fragments=[f"--api-key-file {missing}: cannot be read (No such file or directory)"],
    )
    file.write_text("\n \n")
    refuses(engine, "--api-key-file", file, fragments=["--api-key-file", "no key"])
    file.write_bytes(b"\xff\xfe")
    refuses(engine, "--api-key-file", file, fragments=[f"--api-key-file {file}: not UTF-8 text"])


def test_tls(engine, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, to make a certificate")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    options = (
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=test",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    )
    made = ("openssl", "req", "-x509", *options, "-keyout", str(key), "-out", str(certificate))
    subprocess.run(made, check=True, capture_output=True)
    trusts = ssl.create_default_context(cafile=str(certificate))

    async def scenario():
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
        status, _, answer = await ask(server.url, "POST", "/v1/chat/completions", body, tls=trusts)
        assert status == 200 and answer["object"] == "chat.completion"
        with pytest.raises(ssl.SSLError):  # nobody that this client trusts
            await ask(server.url, "GET", "/health", tls=ssl.create_default_context())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            plain = server.url.replace("https", "http")
            assert (await asyncio.wait_for(ask(plain, "GET", "/health"), PATIENCE))[0] >= 400
        assert (await ask(server.url, "GET", "/health", tls=trusts))[0] == 200

    with serving(engine, "--tls-certificate", certificate, "--tls-key", key) as server:
        assert server.url.startswith("https://")
        asyncio.run(scenario())
        assert server.stop() == 0, server.output
