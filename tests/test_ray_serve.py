"""Replicas on a Ray cluster of three nodes on this machine: failures, updates, routing, keys, metrics.

The model's answers are judged by transformers.
"""

import json
import os
import random
import signal
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import ROOT, SEED
from support.needs import need
from support.ports import free_port
from support.serving import processes
from support.waiting import PATIENCE, until

pytestmark = pytest.mark.slow

KEY = "a-key"
NEW_TOKENS, LONGEST = 12, 4096
REQUESTS = 500


class Fleet:
    """The cluster, the engines with the answers that are right, and clients."""

    def __init__(self, directory, port):
        from ray.cluster_utils import Cluster

        self.directory, self.url = directory, f"http://127.0.0.1:{port}"
        node = {"num_cpus": 2, "object_store_memory": 80 << 20}
        self.cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        self.nodes = [self.cluster.add_node(**node) for _ in range(2)]
        self.node = node

    def options(self, name, **options):
        from cqil_trt.deploy.ray_serve import Options

        values = {"replicas": 2, "model_name": "m", "device": "cpu", "drain_seconds": 20, "cpus_per_rank": 1}
        values["api_key_file"] = self.directory / "keys"
        return Options(engine=self.directory / name / "engine", **{**values, **options})

    def run(self, name, **options):
        from ray import serve

        from cqil_trt.deploy.ray_serve import application

        serve.run(application(self.options(name, **options)))

    def client(self):
        from openai import OpenAI

        return OpenAI(base_url=self.url + "/v1", api_key=KEY, max_retries=0, timeout=PATIENCE)

    def get(self, path, key=KEY):
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {key}"})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def wait_for_replicas(self, fit=lambda found: True):
        """The names of the two that are ready, once they fit: gateways hear of a change up to a report later."""

        def ready():
            status, text = self.get("/ready")
            replicas = json.loads(text).get("replicas", {}) if text.startswith("{") else {}
            fits = status == 200 and list(replicas.values()) == ["ready"] * 2 and fit(set(replicas))
            return set(replicas) if fits else None

        return until(ready, pause=0.3)

    def ranks(self):
        """Every rank of every replica, with the process that it belongs to."""
        marks = ("cqil_trt.commands.serve", str(self.directory))
        found = {pid: entry for pid, entry in processes().items() if all(mark in entry[1] for mark in marks)}
        return {pid: args.split("--parent ")[1].split()[0] for pid, (_, args) in found.items() if "mpirun" not in args}

    def left(self):
        return {
            pid: args for pid, (_, args) in processes().items() if str(self.directory) in args and pid != os.getpid()
        }


def right_answers(directory, count=4):
    """Prompts of token ids, and the text with which transformers continues them, where no token is nearly a tie."""
    import tokenizers
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    special = min(tokenizer.get_added_tokens_decoder())
    found = {}
    while len(found) < count:
        prompt = [random.randrange(3, special) for _ in range(9)]
        made = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        top = torch.stack(made.logits).topk(2).values
        ids = made.sequences[0, len(prompt) :].tolist()
        if (top[..., 0] - top[..., 1]).min() > 1e-3 and max(ids) < special:
            found[tuple(prompt)] = tokenizer.decode(ids)
    return found


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    need("uvicorn", "starlette", "pydantic", "prometheus_client", "llguidance", "openai", "aiohttp")
    need("ray")
    import ray
    from ray import serve
    from support.chat_models import make_chat_model

    import cqil_trt

    directory = tmp_path_factory.mktemp("fleet")
    answers = {}
    for index, name in enumerate(("old", "new")):
        model = make_chat_model(directory / name / "model", seed=SEED + index, max_position_embeddings=LONGEST)
        output = directory / name / "engine"
        # Without groups of layers the engine computes what transformers does.
        cqil_trt.build(model=model, p=2, placement="tensor", output=output, max_seq_len=LONGEST, probes="never")
        answers[name] = right_answers(model)
    (directory / "keys").write_text(KEY + "\n")
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        made = Fleet(directory, port)
        made.answers = answers
        try:
            ray.init(address=made.cluster.address, log_to_driver=False, logging_level="error")
            serve.start(http_options={"port": port, "location": "HeadOnly"})
            made.run("old")
            made.wait_for_replicas()
            yield made
        finally:
            serve.shutdown()
            ray.shutdown()
            made.cluster.shutdown()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    until(lambda: not made.left(), pause=0.2)


def ask(client, prompt):
    """The text of a streamed answer."""
    stream = client.completions.create(
        model="m",
        prompt=list(prompt),
        max_tokens=NEW_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def clear(error):
    """Whether a client can tell from this error that it may ask again: 503, before the answer or as its last event."""
    from openai import APIError, APIStatusError

    if isinstance(error, APIStatusError):
        return error.status_code == 503 and "retry-after" in error.response.headers and bool(error.message)
    return isinstance(error, APIError) and str(error.code) == "503"


class Load:
    """Clients that ask one request after another until they are stopped."""

    def __init__(self, fleet, prompts, clients=4):
        self.texts, self.errors, self._stopped = [], [], threading.Event()
        self._fleet, self._prompts = fleet, list(prompts)
        self._pool = ThreadPoolExecutor(clients)
        self._clients = [self._pool.submit(self._run) for _ in range(clients)]

    def _run(self):
        client = self._fleet.client()
        while not self._stopped.is_set():
            prompt = random.choice(self._prompts)
            try:
                self.texts.append((prompt, ask(client, prompt)))
            except Exception as error:
                self.errors.append(error)

    @property
    def over(self):
        return len(self.texts) + len(self.errors)

    def wait_for(self, more):
        """Until so many more requests are over than now."""
        count = self.over + more
        until(lambda: self.over >= count)

    def finish(self):
        """Stops; every request that has begun ends."""
        self._stopped.set()
        for client in self._clients:
            client.result(timeout=PATIENCE)
        self._pool.shutdown()


def test_keys_and_errors_are_the_servers(fleet):
    assert fleet.get("/ready", key="wrong")[0] == fleet.get("/health", key="wrong")[0] == 200
    for path in ("/v1/models", "/metrics"):
        status, text = fleet.get(path, key="wrong")
        assert status == 401 and "API key" in json.loads(text)["error"]["message"]
    assert [model.id for model in fleet.client().models.list().data] == ["m"]
    assert fleet.get("/no/such/path")[0] == 404


def test_every_host_has_a_gateway(fleet):
    parents = [parent for parent, args in processes().values() if args.startswith("ray::ServeReplica:default:gateway")]
    assert len(set(parents)) == len(parents) == 1 + len(fleet.nodes)


def test_a_conversation_stays_where_its_beginning_is_cached(fleet):
    client = fleet.client()
    for _ in range(6):
        text = "".join(random.choices("abcdefgh ", k=300))
        messages = [{"role": "user", "content": text}]
        answer = client.chat.completions.create(model="m", messages=messages, max_tokens=4, temperature=0)
        messages += [{"role": "assistant", "content": answer.choices[0].message.content}]
        messages += [{"role": "user", "content": "more"}]
        again = client.chat.completions.create(model="m", messages=messages, max_tokens=4, temperature=0)
        assert again.usage.prompt_tokens_details.cached_tokens >= answer.usage.prompt_tokens - 8


def test_metrics_are_those_of_all_replicas(fleet):
    client = fleet.client()
    with ThreadPoolExecutor(16) as pool:
        prompts = random.choices(list(fleet.answers["old"]), k=32)
        assert all(pool.map(lambda prompt: ask(client, prompt), prompts))
    status, text = fleet.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    tokens = {sample.labels["replica"]: sample.value for sample in families["vllm:generation_tokens"].samples}
    assert status == 200 and tokens.keys() == fleet.wait_for_replicas()
    assert sum(tokens.values()) >= 32 * NEW_TOKENS and all(tokens.values())


def test_a_client_that_goes_away_frees_its_place(fleet):
    def aborted():
        families = {family.name: family for family in text_string_to_metric_families(fleet.get("/metrics")[1])}
        samples = families["vllm:request_success"].samples
        return sum(sample.value for sample in samples if sample.labels["finished_reason"] == "abort")

    before = aborted()
    asked = {"model": "m", "prompt": [3, 4, 5], "stream": True, "extra_body": {"ignore_eos": True}}
    stream = fleet.client().completions.create(**asked, max_tokens=LONGEST - 3)
    next(iter(stream))
    stream.close()
    until(lambda: aborted() != before, pause=0.1)
    assert aborted() == before + 1


def test_a_rank_and_a_node_are_killed_under_load(fleet):
    before = fleet.wait_for_replicas()
    load = Load(fleet, fleet.answers["old"])
    load.wait_for(50)
    os.kill(random.choice(list(fleet.ranks())), signal.SIGKILL)
    load.wait_for(50)
    after = fleet.wait_for_replicas(lambda found: found != before)
    assert len(before & after) == 1
    load.wait_for(50)
    owners = set(fleet.ranks().values())
    node = next(node for node in fleet.nodes if owners & workers_of(node))
    fleet.cluster.remove_node(node, allow_graceful=False)
    fleet.nodes.remove(node)
    fleet.nodes.append(fleet.cluster.add_node(**fleet.node))
    load.wait_for(50)
    fleet.wait_for_replicas(lambda found: found != after)
    load.wait_for(max(50, REQUESTS - load.over))
    load.finish()
    assert all(text == fleet.answers["old"][prompt] for prompt, text in load.texts)
    assert all(map(clear, load.errors)), load.errors
    assert len(load.errors) <= 8  # what four clients had under way, twice
    until(lambda: len(fleet.ranks()) == 4, pause=0.2)


def workers_of(node):
    """The process ids of a node's workers, as the ranks' arguments have them."""
    raylet = node.all_processes["raylet"][0].process.pid
    return {str(pid) for pid, (parent, _) in processes().items() if parent == raylet}


def test_a_rolling_update_fails_no_request(fleet):
    prompts = [prompt for name in ("old", "new") for prompt in fleet.answers[name]]
    load = Load(fleet, prompts, clients=3)
    load.wait_for(20)
    before = fleet.wait_for_replicas()
    # More gateways than hosts: as many as there were before one was lost.
    fleet.run("new", gateways=len(fleet.nodes) + 2)
    fleet.wait_for_replicas(lambda found: not found & before)
    load.wait_for(20)
    load.finish()
    assert not load.errors
    client = fleet.client()
    for prompt, text in fleet.answers["new"].items():
        assert ask(client, prompt) == text
