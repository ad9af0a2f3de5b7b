"""What a replica and the gateway are made of, without a cluster."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import ROOT
from support.needs import need
from support.serving import processes

for name in ("aiohttp", "uvicorn", "starlette", "pydantic", "prometheus_client"):
    pytest.importorskip(name)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    from support.chat_models import make_chat_model

    import cqil_trt

    need("llguidance")
    model = make_chat_model(tmp_path_factory.mktemp("model"))
    return cqil_trt.build(model=model, p=2, output=tmp_path_factory.mktemp("engines") / "engine", probes="never").path


# The metrics


def test_the_pages_of_replicas_become_one():
    from cqil_trt.deploy.exposition import merged
    from cqil_trt.serving.metrics import Metrics

    pages, tokens = {}, {}
    for replica in ("one", "two"):
        metrics = Metrics('a "name"', 64)
        tokens[replica] = random.randrange(1, 50)
        for _ in range(tokens[replica]):
            metrics.token(random.random())
        metrics.refused("queue_full")
        metrics.rank_seen(1)
        pages[replica] = metrics.exposition()[0].decode()
    families = {family.name: family for family in text_string_to_metric_families(merged(pages).decode())}
    original = {family.name: family for family in text_string_to_metric_families(pages["one"])}
    assert families.keys() == original.keys()
    for name, family in families.items():
        assert (family.type, family.documentation) == (original[name].type, original[name].documentation)
        assert len(family.samples) == 2 * len(original[name].samples)
        assert {sample.labels["replica"] for sample in family.samples} == {"one", "two"}
        assert {sample.labels["model_name"] for sample in family.samples} == {'a "name"'}
    found = {sample.labels["replica"]: sample.value for sample in families["vllm:generation_tokens"].samples}
    assert found == tokens


def test_no_replica_has_no_metrics():
    from cqil_trt.deploy.exposition import merged

    assert merged({}) == b""


# Where a request goes


def body(**fields):
    return json.dumps(fields).encode()


def common(first, second):
    from cqil_trt.deploy.routing import beginnings

    one, two = beginnings(body(**first)), beginnings(body(**second))
    return sum(a == b for a, b in zip(one, two)), len(one), len(two)


def test_requests_share_the_blocks_that_their_prompts_share():
    need("ray")
    text, more, other = ("".join(random.choices("abcdefgh ", k=500)) for _ in range(3))
    assert common({"prompt": text}, {"prompt": text + more}) == (3, 3, 7)
    assert common({"prompt": text}, {"prompt": "x" + text})[0] == 0
    turn = [{"role": "user", "content": text}]
    next_turn = [*turn, {"role": "assistant", "content": more}, {"role": "user", "content": other}]
    shared, whole, _ = common({"messages": turn}, {"messages": next_turn})
    assert shared >= whole - 1 >= 3
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert common({"messages": turn}, {"messages": turn, "tools": tools})[0] == 0
    ids = random.choices(range(10**5), k=300)
    assert common({"prompt": ids}, {"prompt": [*ids, 1, 2]}) == (2, 2, 2)
    assert common({"prompt": ids}, {"prompt": [ids[0] + 1, *ids[1:]]})[0] == 0


@pytest.mark.parametrize("wrong", [b"", b"{", b"[]", b"1", b'{"prompt": 7}', b'{"messages": "short"}', b"\xff"])
def test_what_has_no_prompt_has_no_beginning(wrong):
    need("ray")
    from cqil_trt.deploy.routing import beginnings

    assert beginnings(wrong) == ()


def test_the_longest_beginning_counts_and_old_ones_are_forgotten():
    need("ray")
    from cqil_trt.deploy.routing import Memory

    memory = Memory(size=5)
    memory.note([b"1"], "a")
    memory.note([b"1", b"2", b"3"], "b")
    memory.note([b"1"], "c")
    assert memory.find([b"1", b"2", b"3", b"4"], ["a", "b", "c"]) == "b"
    assert memory.find([b"1", b"2", b"3", b"4"], ["a", "c"]) == "c"
    assert memory.find([b"1"], ["a", "b"]) is None
    memory.note([b"5", b"6", b"7"], "d")
    assert memory.find([b"2"], ["b"]) is None  # the least recently noted
    assert memory.find([b"3"], ["b"]) == "b"


def test_unknown_beginnings_are_spread_and_stay_when_replicas_come_and_go():
    need("ray")
    from cqil_trt.deploy.routing import appointed

    digests = [random.randbytes(8) for _ in range(900)]
    names = [f"replica{index}" for index in range(3)]
    before = [appointed(digest, names) for digest in digests]
    assert before == [appointed(digest, names[::-1]) for digest in digests]
    assert all(200 < before.count(name) < 400 for name in names)
    fewer = [appointed(digest, names[:2]) for digest in digests]
    assert all(new == old for new, old in zip(fewer, before) if old in names[:2])


# What is refused


def test_options_are_checked(engine, tmp_path):
    need("ray")
    from cqil_trt.deploy.ray_serve import Options, application
    from cqil_trt.errors import UserError

    with pytest.raises(UserError, match="not an engine directory"):
        application(Options(engine=tmp_path))
    with pytest.raises(UserError, match="max_replicas must be at least"):
        application(Options(engine=engine, replicas=3, max_replicas=2))
    with pytest.raises(UserError, match=f"^max_running 99: {engine} was built for at most "):
        application(Options(engine=engine, max_running=99))
    with pytest.raises(UserError, match="no-such-mpirun is neither next to"):
        application(Options(engine=engine, mpirun="no-such-mpirun --x"))
    # As `serve run` and config files give them.
    with pytest.raises(UserError, match="^replica_count: Extra inputs are not permitted$"):
        application({"engine": str(engine), "replica_count": 3})
    with pytest.raises(UserError, match="^replicas: Input should be greater than or equal to 1$"):
        application({"engine": str(engine), "replicas": "0"})
    with pytest.raises(UserError, match="^engine: Field required$"):
        application({})


def test_a_host_without_the_keys_does_not_serve(engine, monkeypatch):
    need("ray")
    from cqil_trt.deploy.ray_serve import Options, Replica
    from cqil_trt.errors import UserError

    monkeypatch.delenv("CQIL_API_KEYS", raising=False)
    with pytest.raises(UserError, match="CQIL_API_KEYS is set where the application was built, and not on"):
        asyncio.run(Replica.__init__(SimpleNamespace(), Options(engine=engine), 2, "cpu", True))


def test_a_replica_has_all_its_ranks_on_one_host(engine):
    need("ray")
    from cqil_trt.deploy.ray_serve import Options, application

    def deployment(**options):
        return application(Options(engine=engine, **options))._bound_deployment.init_args[0]._bound_deployment

    found = deployment(device="cuda", replicas=3, cpus_per_rank=2)
    config = found._replica_config
    assert config.placement_group_bundles == [{"CPU": 4, "GPU": 2}]
    assert config.placement_group_strategy == "STRICT_PACK"
    assert (config.ray_actor_options["num_gpus"], found.num_replicas) == (2, 3)
    scaled = deployment(device="cpu", min_replicas=2, replicas=2, max_replicas=9)._deployment_config.autoscaling_config
    assert (scaled.min_replicas, scaled.max_replicas, scaled.target_ongoing_requests) == (2, 9, 8)


@pytest.mark.parametrize("status, headers, failed", [
    (503, {"Retry-After": "2"}, True),
    (503, {}, False),
    (429, {"Retry-After": "1"}, False),
    (200, {}, False),
])  # fmt: skip
def test_what_another_replica_may_answer_better(status, headers, failed, tmp_path):
    """Not a request that took too long, of which only the missing Retry-After tells."""
    need("ray")
    import aiohttp
    from aiohttp import web

    from cqil_trt.deploy.ray_serve import Call, Head, Replica

    async def scenario():
        app = web.Application()
        app.router.add_post("/", lambda request: asyncio.sleep(0, web.Response(status=status, headers=headers)))
        runner = web.AppRunner(app)
        await runner.setup()
        place = str(tmp_path / "socket")
        await web.UnixSite(runner, place).start()
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(place)) as session:
            replica = SimpleNamespace(_name="it", _server=SimpleNamespace(session=session, failure=None))
            found = [part async for part in Replica.forward(replica, Call("POST", "/", (), b""))]
        await runner.cleanup()
        return next(part for part in found if isinstance(part, Head))

    head = asyncio.run(scenario())
    assert (head.status, head.failed) == (status, failed)


def test_a_request_that_no_replica_takes_does_not_wait_for_ever():
    need("ray")
    from cqil_trt.deploy.ray_serve import Call, Gateway

    class Nobody:
        """A handle of a deployment without replicas: what is sent to it stays in its queue."""

        cancelled = 0

        def options(self, **options):
            return self

        def remote(self, call):
            return self

        async def __anext__(self):
            await asyncio.Event().wait()

        def cancel(self):
            self.cancelled += 1

    handle = Nobody()
    gateway = Gateway(handle, 1000, 0.1)
    answer = asyncio.run(asyncio.wait_for(gateway._answer(Call("POST", "/v1/completions", (), b"{}")), 5))
    assert answer.status_code == 503 and "retry-after" in answer.headers and handle.cancelled == 1
    assert "no replica was free within 0.1 s" in json.loads(answer.body)["error"]["message"]


# A server behind a Unix socket


def of_engine(path):
    return [pid for pid, (_, args) in processes().items() if str(path) in args and "cqil_trt" in args]


def gone(path, seconds):
    end = time.monotonic() + seconds
    while (left := of_engine(path)) and time.monotonic() < end:
        time.sleep(0.1)
    return not left


@pytest.mark.slow
def test_a_server_answers_drains_and_leaves_nothing(engine):
    from cqil_trt.deploy.server import EngineServer

    async def scenario():
        server = EngineServer(2, ["--engine", str(engine), "--device", "cpu"], {"OMP_NUM_THREADS": "1"}, "mpirun")
        await server.start(60)
        [place] = server._directory.glob("socket")
        assert place.stat().st_mode & 0o777 == 0o600
        asked = {"prompt": "hello", "max_tokens": 400, "ignore_eos": True}
        async with server.session.post("http://x/v1/completions", json={**asked, "stream": True}) as answer:
            await answer.content.readline()
            stopping = asyncio.create_task(server.stop(30))
            rest = await answer.read()
        assert rest.rstrip().endswith(b"data: [DONE]")
        await stopping
        assert server.failure is None and not server._directory.exists()

    asyncio.run(scenario())
    assert gone(engine, 0)


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(engine, tmp_path):
    from cqil_trt.deploy.server import EngineServer

    async def scenario():
        server = EngineServer(2, ["--engine", str(tmp_path)], {}, "mpirun")
        with pytest.raises(RuntimeError, match=r"exit code 2 \(--engine .*: not an engine directory"):
            await server.start(60)
        assert not server._directory.exists()

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_server_ends_with_the_process_that_started_it(engine):
    program = f"""
import asyncio, time
from cqil_trt.deploy.server import EngineServer
async def main():
    server = EngineServer(2, ["--engine", {str(engine)!r}, "--device", "cpu"], {{"OMP_NUM_THREADS": "1"}}, "mpirun")
    await server.start(60)
    print("ready", flush=True)
    time.sleep(60)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert any(line == "ready\n" for line in parent.stdout)
        assert len(of_engine(engine)) == 4  # the parent, mpirun and two ranks
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert gone(engine, 10)
    assert not os.path.exists(f"/proc/{parent.pid}")
