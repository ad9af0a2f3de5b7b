"""Thousands of requests at once, good and bad: none is lost, none gets another one's answer, nothing grows."""

import asyncio
import json
import random
import string
from collections import Counter
from pathlib import Path

import pytest
from support import SEED, write_json
from support.checkpoints import make_model
from support.http_client import HttpConnection, metric
from support.made_tokenizers import save_byte_tokenizer
from support.needs import need
from support.processes import build, mpirun
from support.serving import ServerProcess

pytestmark = pytest.mark.slow

REQUESTS, CLIENTS = 2000, 64
LENGTH = 160
ROOMS = (1, 3, 8, 20)
BODY_BYTES = 1 << 16


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    need("uvicorn", "starlette", "pydantic", "prometheus_client", "llguidance")
    # Always the same model: another one might find two tokens as likely, and choose by the sequences beside.
    sizes = {"num_hidden_layers": 4, "vocab_size": 259, "max_position_embeddings": 256}
    model = make_model(tmp_path_factory.mktemp("model"), seed=1, **sizes)
    save_byte_tokenizer(model)
    path = tmp_path_factory.mktemp("engines") / "engine"
    done = build("--model", model, "--p", 2, "--max-seq-len", LENGTH, "--max-batch-size", 8, "--output", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def expected(engine, tmp_path_factory):
    """By prompt and room: the completion that `Llm.generate` gives. Many prompts begin alike."""
    rng = random.Random(2)
    beginnings = ["".join(rng.choices(string.ascii_letters, k=size)) for size in (0, 30, 60, 100)]
    prompts = [rng.choice(beginnings) + "".join(rng.choices("abc xyz", k=rng.randint(1, 30))) for _ in range(60)]
    directory = tmp_path_factory.mktemp("expected")
    found = {}
    for room in ROOMS:
        out = directory / f"{room}.json"
        asked = ("--prompt-file", write_json(directory / "prompts.json", prompts), "--max-new-tokens", room)
        done = mpirun(2, "--engine", engine, *asked, "--json", out)
        assert done.returncode == 0, done.stderr
        for prompt, completion in zip(prompts, json.loads(out.read_text())["completions"]):
            reason = "length" if completion["finish_reason"] == "length" else "stop"
            found[prompt, room] = completion["text"], reason, len(completion["tokens"])
    longest = {text for (_, room), (text, _, _) in found.items() if room == ROOMS[-1]}
    assert len(longest) > len(prompts) // 2  # so that a wrong answer shows
    return found


def resident(pid):
    """Bytes of memory that a process uses."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


class Client:
    """One of those that ask at the same time, over a connection that is kept alive."""

    def __init__(self, server, expected, seen):
        self.server, self.expected, self.seen = server, expected, seen
        self.http = None

    async def ask(self, number):
        rng = random.Random(SEED + number)
        if self.http is None:
            self.http = await HttpConnection.open(self.server.url)
        prompt, room = rng.choice(list(self.expected))
        body = {"prompt": prompt, "max_tokens": room, "temperature": 0}
        kind = number % 20
        if kind in (0, 10):
            await self.go(body, rng)
        elif kind == 5:
            await self.wrong(rng)
        else:
            await self.right(body, rng.random() < 0.5, 2 if rng.random() < 0.1 else 1)

    async def send(self, body):
        await self.http.send("POST", "/v1/completions", body)
        return await self.http.head()

    def close(self):
        if self.http is not None:
            self.http.abort()
        self.http = None

    async def right(self, body, stream, choices):
        """A request that must get its own answer."""
        status = await self.send({**body, "n": choices, "stream": stream})
        assert status == 200, await self.http.body()
        wanted = self.expected[body["prompt"], body["max_tokens"]]
        if stream:
            events = [event async for event in self.http.events()]
            assert events[-1] == "[DONE]"
            given = [json.loads(event)["choices"][0] for event in events[:-1]]
            for index in range(choices):
                mine = [choice for choice in given if choice["index"] == index]
                text = "".join(choice["text"] for choice in mine)
                reasons = [choice["finish_reason"] for choice in mine if choice["finish_reason"]]
                assert (text, reasons) == (wanted[0], [wanted[1]]), body
        else:
            answer = json.loads(await self.http.body())
            for index, choice in enumerate(answer["choices"]):
                assert (choice["index"], choice["text"], choice["finish_reason"]) == (index, *wanted[:2]), body
            assert len(answer["choices"]) == choices
            assert answer["usage"]["completion_tokens"] == choices * wanted[2]
            assert answer["usage"]["prompt_tokens"] == len(body["prompt"])
        self.seen["right"] += 1

    async def go(self, body, rng):
        """A request whose client goes before its answer is complete."""
        body = {**body, "max_tokens": 100, "ignore_eos": True, "stream": rng.random() < 0.5}
        body["prompt"] = body["prompt"][:50]
        if body["stream"]:
            assert await self.send(body) == 200
            wanted = rng.randint(1, 5)
            async for _ in self.http.events():
                wanted -= 1
                if not wanted:
                    break
        else:
            await self.http.send("POST", "/v1/completions", body)
            await asyncio.sleep(rng.random() * 0.2)
        self.close()
        self.seen["gone"] += 1

    async def wrong(self, rng):
        """A request that cannot be answered."""
        body, wanted = rng.choice(
            [
                (b'{"prompt": ', 400),
                ({"prompt": "a", "max_tokens": -1}, 400),
                ({"prompt": "a", "no_such_field": 1}, 400),
                ({"prompt": "a" * (LENGTH + 1)}, 400),
                ({"prompt": [999]}, 400),
                ({"prompt": "a", "model": "other"}, 404),
                ({"prompt": "a" * BODY_BYTES}, 413),
            ]
        )
        assert await self.send(body) == wanted
        answer = json.loads(await self.http.body())
        assert answer["error"]["message"]
        if wanted == 413:  # the rest of the body may be left unread
            self.close()
        self.seen["wrong"] += 1


async def run(server, expected, numbers):
    """All requests, by clients that each take the next one when they are done; what came of them."""
    seen = Counter()
    left = iter(numbers)

    async def work():
        client = Client(server, expected, seen)
        for number in left:
            await asyncio.wait_for(client.ask(number), 90)
        client.close()

    await asyncio.gather(*(work() for _ in range(CLIENTS)))
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        for _ in range(1000):
            if (found := await metric(server.url, name)) == 0:
                break
            await asyncio.sleep(0.02)
        assert found == 0, name
    return seen


def soak(server, expected, numbers):
    seen = asyncio.run(run(server, expected, numbers))
    assert sum(seen.values()) == len(numbers)
    assert seen["gone"] == len(numbers) // 10
    return [resident(pid) for pid in [*server.ranks(), server.http()]]


def test_thousands_of_requests(engine, expected):
    server = ServerProcess(2, engine, "--device", "cpu", "--no-log", "--max-body-bytes", BODY_BYTES)
    try:
        before = soak(server, expected, range(REQUESTS // 4))
        after = soak(server, expected, range(REQUESTS // 4, REQUESTS))
        for old, new in zip(before, after):
            assert new < max(1.1 * old, old + (30 << 20)), (before, after)
        assert server.status("/health") == 200
    finally:
        code = server.stop()
    assert code == 0, server.output
    assert "stopped: all ranks hold identical bits" in server.output
    assert "error" not in server.output.lower() and "Traceback" not in server.output, server.output
