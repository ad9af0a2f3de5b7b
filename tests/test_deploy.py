"""What a replica and the gateway are made of, without a cluster."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import ROOT
from support.needs import need
from support.serving import processes
from support.waiting import PATIENCE, until

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


# Which replica takes a request


def router(most=3, max_waiting=2, slack=1, **loads):
    """A router that knows these replicas, with as many requests from other gateways."""
    need("starlette")
    from cqil_trt.deploy.routing import Router, State

    made = Router(most, max_waiting, slack)
    made.update(State(name, f"http://{name}", "key", "ready", others) for name, others in loads.items())
    return made


def taken(replicas, *requests, avoid=(), seconds=1.0):
    async def scenario():
        return [(await replicas.take(digests, avoid, seconds)).state.name for digests in requests]

    return asyncio.run(scenario())


def test_the_preferred_replica_takes_a_request_unless_it_has_much_more_to_do():
    replicas = router(a=0, b=0, most=9)
    [first] = taken(replicas, [b"1", b"2"])
    assert taken(replicas, [b"1", b"2", b"3"]) == [first]  # one more than the other, as much as may be
    [other] = {"a", "b"} - {first}
    assert taken(replicas, [b"1"]) == [other]
    assert taken(replicas, [b"1"], avoid=[other]) == [first]
    assert taken(router(a=2), [b"1"], avoid=["a"]) == ["a"]  # there is no other


def test_what_other_gateways_have_there_counts():
    assert taken(router(a=3, b=2), ()) == ["b"]
    # The better of two at random is never the worst of three.
    assert {taken(router(a=1, b=0, c=2), ())[0] for _ in range(50)} <= {"a", "b"}


def test_requests_wait_in_turn_and_not_for_ever():
    need("starlette")
    from cqil_trt.deploy.routing import State
    from cqil_trt.serving.refusals import Refused

    async def scenario():
        replicas, order = router(a=0, most=1), []

        async def ask(name, seconds=5.0):
            replica = await replicas.take((), (), seconds)
            order.append(name)
            return replica

        first = await ask("first")
        second, third = asyncio.create_task(ask("second")), asyncio.create_task(ask("third"))
        await asyncio.sleep(0)
        assert replicas.waiting == 2
        with pytest.raises(Refused, match="too many requests are waiting") as refused:
            await ask("fourth")
        assert refused.value.status == 429
        replicas.release(first)
        replicas.release(await second)
        replicas.release(await third)
        assert order == ["first", "second", "third"] and replicas.waiting == 0

        # A server that has not answered gets nothing until it says how it is.
        replicas.release(await ask("fifth"), reachable=False)
        with pytest.raises(Refused, match=r"no replica was free within 0\.05 s") as refused:
            await ask("sixth", 0.05)
        assert refused.value.status == 503 and refused.value.retry and replicas.waiting == 0
        waiting = asyncio.create_task(ask("seventh"))
        await asyncio.sleep(0)
        replicas.update([State("a", "http://a", "key", "loading")])
        assert not waiting.done() and replicas.waiting == 1
        replicas.update([State("a", "http://a", "key", "ready")])
        held = await waiting

        # A client that goes away just when its turn comes leaves no request behind.
        gone = asyncio.create_task(ask("eighth"))
        await asyncio.sleep(0)
        replicas.release(held)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert held.own == 0 and replicas.waiting == 0

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


def test_as_many_replicas_as_the_requests_need():
    need("ray")
    from cqil_trt.deploy.ray_serve import by_requests

    context = SimpleNamespace(
        aggregated_metrics={"requests": {"a": 9.0, "b": 7.5}},
        config=SimpleNamespace(get_target_ongoing_requests=lambda: 4),
        target_num_replicas=2,
    )
    assert by_requests(context)[0] == pytest.approx(16.5 / 4)
    context.aggregated_metrics = {}
    assert by_requests(context)[0] == 2  # nobody has said anything


# What gateways pass on


def passed_on(first, second):
    """What a client gets, and who was asked, of two servers with these handlers; None for one that has ended."""
    need("ray")
    from aiohttp import web

    from cqil_trt.deploy.gateway import Call, Gateway, session
    from cqil_trt.deploy.routing import Router, State

    async def scenario():
        states, runners, asked, sent = [], [], [], []

        def app(name, handler):
            async def answer(request):
                assert request.headers["X-CQIL-Gateway"] == f"key of {name}" and request.headers["a"] == "b"
                assert await request.read() == b"body"
                asked.append(name)
                return await handler(request)

            made = web.Application()
            made.router.add_post("/path", answer)
            return made

        for name, handler in (("first", first), ("second", second)):
            if handler is None:
                place = ended.getsockname()
            else:
                runner = web.AppRunner(app(name, handler))
                await runner.setup()
                await web.TCPSite(runner, "127.0.0.1", 0).start()
                place = runner.addresses[0]
                runners.append(runner)
            # The second one is busier.
            states.append(State(name, "http://{}:{}".format(*place), f"key of {name}", "ready", others=len(states)))

        async def send(message):
            sent.append(message)

        router = Router(9, 9, 9)
        router.update(states)
        gateway = SimpleNamespace(_router=router, _session=session(), _patience=5.0)
        failure = await Gateway._answer(gateway, Call("POST", "/path", (("a", "b"),), b"body"), send)
        if failure is not None:
            await failure({"type": "http"}, None, send)
        assert all(replica.own == 0 for replica in router.replicas.values())
        await gateway._session.close()
        for runner in runners:
            await runner.cleanup()
        headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], headers, b"".join(message["body"] for message in sent[1:]), asked

    with socket.socket() as ended:  # on whose port nobody listens, and nobody else can
        ended.bind(("127.0.0.1", 0))
        return asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


def answering(status, body, **headers):
    from aiohttp import web

    async def answer(request):
        return web.Response(status=status, body=body, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return answer


def test_another_replica_answers_for_one_that_cannot():
    fine = answering(200, b"fine", X_Request_Id="7")
    for cannot, asked in (
        (None, ["second"]),
        (answering(503, b"drains", Retry_After="2"), ["first", "second"]),
    ):
        status, headers, body, found = passed_on(cannot, fine)
        assert (status, body, found) == (200, b"fine", asked)
        assert (headers["x-request-id"], headers["content-length"]) == ("7", "4")


def test_a_request_that_took_too_long_is_not_tried_elsewhere():
    """Only the missing Retry-After tells."""
    status, _, body, asked = passed_on(answering(503, b"too long"), answering(200, b"fine"))
    assert (status, body, asked) == (503, b"too long", ["first"])
    assert passed_on(answering(429, b"full", Retry_After="1"), answering(200, b"fine"))[0] == 429


def test_an_answer_that_breaks_off():
    """A stream of events ends with an error event; what has not begun for the client comes from another replica."""
    need("aiohttp")
    from aiohttp import web

    def broken(kind):
        async def answer(request):
            response = web.StreamResponse(headers={"Content-Type": kind})
            await response.prepare(request)
            await response.write(b"data: 1\n\n")
            await asyncio.sleep(0.05)
            request.transport.abort()
            return response

        return answer

    status, _, body, asked = passed_on(broken("text/event-stream"), answering(200, b"fine"))
    first, last = body.split(b"\n\n", 1)
    assert (status, first, asked) == (200, b"data: 1", ["first"])
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert error["code"] == 503 and "the replica failed" in error["message"]
    status, _, body, asked = passed_on(broken("application/json"), answering(200, b"fine"))
    assert (status, body, asked) == (200, b"fine", ["first", "second"])


# A server of one replica


def of_engine(path):
    return [pid for pid, (_, args) in processes().items() if str(path) in args and "cqil_trt" in args]


def assert_gone(path):
    """Soon: what was killed has not always ended yet."""
    until(lambda: not of_engine(path), pause=0.1)


@pytest.mark.slow
def test_a_server_answers_its_gateway_drains_and_leaves_nothing(engine):
    import aiohttp

    from cqil_trt.deploy.server import EngineServer

    async def scenario():
        server = EngineServer(2, ["--engine", str(engine), "--device", "cpu"], {"OMP_NUM_THREADS": "1"}, "mpirun")
        await server.start(PATIENCE)
        asked = {"prompt": "hello", "max_tokens": 400, "ignore_eos": True, "stream": True}
        async with aiohttp.ClientSession(server.url) as session:
            for headers in ({}, {"X-CQIL-Gateway": "wrong"}):
                for path in ("/health", "/v1/models"):
                    async with session.get(path, headers=headers) as answer:
                        assert answer.status == 403 and "gateway" in (await answer.json())["error"]["message"]
            headers = {"X-CQIL-Gateway": server.key}
            async with session.post("/v1/completions", json=asked, headers=headers) as answer:
                await answer.content.readline()
                stopping = asyncio.create_task(server.stop(PATIENCE))
                rest = await answer.read()
        assert rest.rstrip().endswith(b"data: [DONE]")
        await stopping
        assert server.failure is None and not server._directory.path.exists()

    asyncio.run(scenario())
    assert_gone(engine)


def test_directories_of_killed_processes_are_removed(tmp_path, monkeypatch):
    """Also those of processes whose ids mean nothing here; one that is held or young stays."""
    need("aiohttp")
    from cqil_trt.deploy.server import EngineServer

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    first = EngineServer(1, [], {}, sys.executable)
    [held] = tmp_path.iterdir()
    old, young = tmp_path / "cqil-replica-1-old", tmp_path / "cqil-replica-young"
    for directory in (old, young):
        directory.mkdir()
    for directory in (old, held):
        os.utime(directory, (0, 0))
    second = EngineServer(1, [], {}, sys.executable)
    assert set(tmp_path.iterdir()) == {first._directory.path, young, second._directory.path}


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(engine, tmp_path):
    from cqil_trt.deploy.server import EngineServer

    async def scenario():
        server = EngineServer(2, ["--engine", str(tmp_path)], {}, "mpirun")
        with pytest.raises(RuntimeError, match=r"exit code 2 \(--engine .*: not an engine directory"):
            await server.start(PATIENCE)
        assert not server._directory.path.exists()

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_server_ends_with_the_process_that_started_it(engine):
    program = f"""
import asyncio, time
from cqil_trt.deploy.server import EngineServer
async def main():
    server = EngineServer(2, ["--engine", {str(engine)!r}, "--device", "cpu"], {{"OMP_NUM_THREADS": "1"}}, "mpirun")
    await server.start({PATIENCE})
    print("ready", flush=True)
    time.sleep({2 * PATIENCE})
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert any(line == "ready\n" for line in parent.stdout)
        assert len(of_engine(engine)) >= 4  # the parent, mpirun, two ranks, and soon the check of grammars
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert_gone(engine)
