"""KV caches that are circles: engines far past their windows against transformers, what is reused of them, their sizes.

Windows are 9 tokens, chunks 8, so a circle has 64 positions, and sequences go round it several times.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import SEED, noisy_drafts, write_json
from support.batches import Batch, score
from support.cases import FAMILIES, relative
from support.checkpoints import load_model, make_model
from support.formulas import Formulas
from support.needs import need, need_cuda_backend
from support.noisy_drafts import Noisy
from support.processes import build, mpirun

import cqil_trt
from cqil_trt.config import EngineLimits
from cqil_trt.engine import Engine, write_config
from cqil_trt.generate import GenerationConfig, generate
from cqil_trt.gpu import abi
from cqil_trt.llm import Llm
from cqil_trt.runner import Runner
from cqil_trt.scheduler import Circle, Request
from cqil_trt.session import cache_bytes
from cqil_trt.validate import THRESHOLDS

WINDOWED = [name for name, (_, changes) in FAMILIES.items() if "sliding_window" in changes]
LENGTH, CIRCLE, WINDOW = 256, 64, 9
LIMITS = {"max_seq_len": LENGTH, "prefill_chunk": 8, "max_batch_size": 4, "probes": "never"}


def family(directory, name, **changes):
    """A random model with these windows, whose norms and sizes keep rounding small."""
    architecture, its = FAMILIES[name]
    its = {**its, "rms_norm_eps": 1e-2, "max_position_embeddings": LENGTH, **changes}
    return make_model(directory, architecture, **its)


def judged(network, tokens):
    """transformers' logits after each token, in one pass without a cache."""
    with torch.inference_mode():
        return network(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """A function that gives an engine of one rank of a family, and transformers' model."""
    root, made = tmp_path_factory.mktemp("circles"), {}

    def get(name):
        if name not in made:
            model = family(root / name, name)
            engine = cqil_trt.build(model=model, p=1, output=root / f"{name}-engine", **LIMITS)
            assert engine.limits.circle == CIRCLE
            made[name] = engine, load_model(model)
        return made[name]

    return get


def random_tokens(random, count):
    return random.integers(3, 131, size=count).tolist()


@pytest.fixture
def load():
    """A function that loads an engine on a device, until the test ends."""
    loaded = []

    def get(engine, device, **options):
        if device == "cuda":
            need_cuda_backend()
        loaded.append(Llm(engine.path, device=device, **options))
        return loaded[-1]

    yield get
    for llm in loaded:
        llm.close()


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.slow)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", WINDOWED)
def test_far_past_the_window(name, device, engines, load):
    """Prompts in chunks, then a batch whose sequences have gone round the circle differently often."""
    engine, network = engines(name)
    session = load(engine, device).session
    random = np.random.default_rng(SEED)
    prompts = [random_tokens(random, n) for n in (200, 5, 61, 122)]
    for prompt in prompts:
        assert relative(score(session, prompt), judged(network, prompt)) < 1e-5
    batch, found = Batch(session, prompts), []
    fed = [random_tokens(random, 50) for _ in prompts]
    for step in zip(*fed):
        batch.decode(step)
        found.append(batch.logits)
    for i, (prompt, tokens) in enumerate(zip(prompts, fed)):
        expected = judged(network, prompt + tokens)[len(prompt) :]
        assert relative(np.stack([logits[i] for logits in found]), expected) < 1e-5


RANKS = [
    ("gemma3", {"p": 2, "start": 1, "end": 5}, "auto"),
    ("ministral", {"p": 2, "placement": "tensor"}, "auto"),
    ("olmo3", {"p": 2, "start": 1, "end": 5, "d": 1}, "fp8"),
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What two ranks computed of each of RANKS: prompts, a batch, each sequence alone, in slots that have been used."""
    root, random, cases = tmp_path_factory.mktemp("ranks"), np.random.default_rng(SEED), []
    prompts = [random_tokens(random, n) for n in (150, 7, 66)]
    for i, (name, shape, kv_dtype) in enumerate(RANKS):
        model = family(root / f"model{i}", name)
        engine = cqil_trt.build(model=model, output=root / f"engine{i}", kv_dtype=kv_dtype, **LIMITS, **shape)
        assert engine.limits.circle == CIRCLE
        case = {"engine": str(engine.path), "device": "cpu", "prompts": prompts, "steps": 12}
        cases.append(case | {"out": str(root / f"out{i}")})
    done = mpirun(2, write_json(root / "cases.json", cases), script="tests/support/mpi_worker.py")
    assert done.returncode == 0, done.stderr
    return root, prompts


@pytest.mark.parametrize("number", range(len(RANKS)), ids=lambda i: RANKS[i][0])
def test_two_ranks_compute_the_definition(number, ran):
    (root, prompts), (_, shape, kv_dtype) = ran, RANKS[number]
    ranks = [np.load(root / f"out{number}-{rank}.npz") for rank in range(2)]
    assert all(np.array_equal(ranks[0][key], ranks[1][key]) for key in ranks[0])
    network = load_model(root / f"model{number}")
    formulas = Formulas(network.config, network.state_dict(), None if kv_dtype == "auto" else [(1.0, 1.0)] * 6)
    for i, prompt in enumerate(prompts):
        tokens = ranks[0]["tokens"][i].tolist()
        expected = formulas.logits(torch.tensor([prompt + tokens[:-1]]), **shape)[0].numpy()
        errors = [relative(ranks[0][f"score{i}"], expected[: len(prompt)])]
        errors += [relative(ranks[0]["logits"][i], expected[len(prompt) - 1 :])]
        # Of so many keys in FP8 some are neighbours of a border between two codes.
        assert max(errors) < (1e-5 if kv_dtype == "auto" else THRESHOLDS["float16"].relative_l2)


def likeliest(network, prompt, tokens):
    """By how much each token falls short of the likeliest one after those before it."""
    logits = judged(network, [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
    return logits.max(-1) - logits[np.arange(len(tokens)), tokens]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["gemma3", "mistral-windows"])
def test_refused_drafts_leave_the_window(name, device, engines, load, monkeypatch):
    engine, network = engines(name)
    session = load(engine, device).session
    random = np.random.default_rng(SEED)
    prompts = [random_tokens(random, n) for n in (4, 100, 57)]

    def answers(**options):
        config = GenerationConfig(max_new_tokens=150)
        return generate(Runner.of(session, "latency", **options), prompts, config)

    plain = answers()
    speculation = noisy_drafts.noisy(monkeypatch.setattr, SEED, vocabulary=131, tokens=15)
    Noisy.answers = tuple(completion.prompt + completion.tokens for completion in plain)
    for completion in (*plain, *(drafted := answers(speculation=speculation))):
        assert len(completion.tokens) == 150
        assert likeliest(network, completion.prompt, completion.tokens).max() < 1e-3
    accepted, made = (sum(getattr(c, name) for c in drafted) for name in ("accepted", "drafted"))
    assert 30 < accepted < made - 30


@pytest.mark.parametrize("device", DEVICES)
def test_beginnings_are_reused_where_the_window_is(device, engines, load):
    """`kept` tokens of another sequence, of which 159 positions were written."""
    engine, network = engines("mistral-windows")
    random = np.random.default_rng(SEED)
    first = random_tokens(random, 100)
    for kept, reused, slots in ((103, 103, 1), (102, 0, 1), (130, 130, 4), (102, 0, 4), (159, 159, 1)):
        llm = load(engine, device, slots=slots)
        answer = llm.generate([first], 60, ignore_eos=True)[0].tokens
        prompt = [*(first + answer)[:kept], *random_tokens(random, 20)]
        for _ in range(2):  # then what it has left
            found, cached = scored(llm.runner, prompt, kept)
            assert cached == reused
            assert relative(found, judged(network, prompt)[kept:]) < 1e-5
            reused = kept


def scored(runner, prompt, first):
    """The logits after the tokens from `first` on, and how many tokens before were reused."""
    number, parts, cached = runner.scheduler.add(Request(prompt=tuple(prompt), max_new_tokens=0, scored=first)), [], 0
    while not runner.scheduler.idle:
        for event in runner.turn():
            assert event.number == number
            cached = event.cached
            parts += [] if event.logits is None else [event.logits]
    return np.concatenate(parts), cached


@pytest.mark.parametrize("device", DEVICES)
def test_a_running_sequence_is_copied_from(device, engines, load):
    engine, network = engines("gemma3")
    runner = load(engine, device).runner
    random = np.random.default_rng(SEED)
    first = random_tokens(random, 150)
    number = runner.scheduler.add(Request(prompt=tuple(first), max_new_tokens=60))
    tokens = []

    def take(events):
        for event in events:
            if event.number == number:
                tokens.extend(choice.token for choice in event.choices)

    while len(tokens) < 5:
        take(runner.turn())
    prompt, cached, parts = [*first[:140], *random_tokens(random, 30)], 0, []
    other = runner.scheduler.add(Request(prompt=tuple(prompt), max_new_tokens=0, scored=140))
    while not runner.scheduler.idle:
        events = runner.turn()
        take(events)
        cached = max([cached, *(event.cached for event in events if event.number == other)])
        parts += [event.logits for event in events if event.number == other and event.logits is not None]
    assert cached == 140 and len(tokens) == 60
    assert relative(np.concatenate(parts), judged(network, prompt)[140:]) < 1e-5
    assert likeliest(network, first, tokens).max() < 1e-3


def test_a_circle_is_no_longer_than_it_must_be():
    limits = EngineLimits(max_seq_len=8192, prefill_chunk=512)
    assert Circle.length_for(1024, limits) == 1536
    assert Circle.length_for(1000, limits) == 1536  # a multiple of 64
    assert Circle.length_for(7680, limits) is None  # all positions
    assert Circle.length_for(None, limits) is None
    assert Circle.length_for(100, EngineLimits(max_seq_len=8192, prefill_chunk=1)) == 128
    assert abi.CQIL_CIRCLE_STEP == 64


def test_sizes_count_the_shorter_caches(tmp_path, load):
    """The plan, the engine, its caches in memory, and the slots that fit."""
    model = family(tmp_path / "model", "gemma3")  # four of six layers have the window
    flags = "--model", model, "--p", 1, "--max-seq-len", LENGTH, "--prefill-chunk", 8, "--probes", "never"
    done = build(*flags, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    [rank] = json.loads(done.stdout)["ranks"]
    each = 2 * 12 * 4  # keys and values of one head, float32
    assert rank["kv_cache_bytes_per_token"] == 6 * each
    assert rank["kv_cache_bytes_per_sequence"] == (2 * LENGTH + 4 * CIRCLE) * each
    done = build(*flags, "--output", tmp_path / "engine")
    assert f"KV cache   {CIRCLE} of {LENGTH} positions in layers with a window" in done.stdout
    assert "KV/sequence" in done.stdout and done.returncode == 0
    engine = Engine.open(tmp_path / "engine")
    assert cache_bytes(engine, 0) == rank["kv_cache_bytes_per_sequence"]
    session = load(engine, "cpu", slots=3).session
    parts = [part for pair in session._ops._cache.values() for part in pair]
    assert sum(part.nbytes for part in parts) == 3 * cache_bytes(engine, 0)


def test_an_engine_that_was_built_before_keeps_whole_caches(engines, tmp_path):
    engine, network = engines("gemma2")
    shutil.copytree(engine.path, tmp_path / "engine")
    config = json.loads((tmp_path / "engine/config.json").read_text())
    assert config["limits"].pop("circle") == CIRCLE
    for name in ("format", "format_version", "digest"):
        del config[name]
    write_config(tmp_path / "engine", config)
    old = cqil_trt.load(tmp_path / "engine", device="cpu")
    assert old.engine.limits.circle is None
    assert cache_bytes(old.engine, 0) == LENGTH * old.engine.plan(0).cache_bytes_per_token("float32")
    prompt = random_tokens(np.random.default_rng(SEED), 100)
    assert relative(score(old.session, prompt), judged(network, prompt)) < 1e-5


def test_backends_that_write_positions_in_a_line_keep_whole_caches(engines, tmp_path):
    engine, network = engines("gemma3")
    onnx = cqil_trt.build(model=engine.path, backend="onnx", output=tmp_path / "onnx")
    assert onnx.limits == replace(engine.limits, circle=None)
    prompt = random_tokens(np.random.default_rng(SEED), 30)
    assert relative(score(cqil_trt.load(onnx.path).session, prompt), judged(network, prompt)) < 1e-5
    need("tensorrt_rtx")
    done = build("--model", engine.path, "--backend", "tensorrt", "--target", "8.6", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["limits"]["circle"] is None


def test_another_chunk_makes_another_circle(engines, tmp_path):
    engine, _ = engines("gemma3")
    for chunk, circle in ((100, 128), (250, None)):
        done = build(
            "--model", engine.path, "--prefill-chunk", chunk, "--output", tmp_path / "new", "--dry-run", "--json"
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["limits"]["circle"] == circle
