"""TensorRT engines on GPUs, judged by the reference's answers that the builder stored. Skipped where there is no GPU.

TensorRT may live in another Python than this one (8.5.3.1 in a CPython 3.10 without PyTorch, say): CQIL_TENSORRT_PYTHON
names it.
"""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support import SEED, write_json
from support.cases import ARCHITECTURES, FAMILIES, QUANTIZED_SIZES, identifier, ranks_of
from support.chat_models import make_chat_model
from support.checkpoints import make_model
from support.processes import build, mpirun, run
from support.serving import ServerProcess
from support.validation import assert_valid, validate

import cqil_trt

PYTHON = os.environ.get("CQIL_TENSORRT_PYTHON", sys.executable)

# What an engine's runtime needs there: packages, and a kernel library that was built with this TensorRT's headers.
RUNTIME = """
import tensorrt
import cqil_trt.llm
from cqil_trt.gpu import cuda, tensorrt_plugins
cuda.use_device(0)
tensorrt_plugins.register(tensorrt)
"""


@pytest.fixture(scope="module", autouse=True)
def runtime():
    """Skips where an engine cannot run, with the reason."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    done = run(PYTHON, "-c", RUNTIME)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if last.startswith("ModuleNotFoundError") or "UserError" in last:
        pytest.skip(f"{PYTHON}: {last} (CQIL_TENSORRT_PYTHON names the Python with TensorRT)")
    assert done.returncode == 0, done.stderr


# Ranks share GPUs where there are fewer.
SHAPES = [
    {"p": 1},
    {"p": 2, "start": 1, "end": 5, "placement": "leader"},
    {"p": 2, "d": 1, "start": 1, "end": 5},
    {"p": 2, "placement": "tensor"},
    {"p": 4, "d": 1, "start": 1, "end": 5, "bypass": "residual"},
    {"p": 2, "ranks_per_layer": 2, "d": 1, "start": 1, "end": 5},
    {"p": 2, "ranks_per_layer": 2, "start": 2, "end": 6, "drop_attention_join": "0,2-3,5"},
]
CASES = [(name, {**SHAPES[i % len(SHAPES)], "dtype": "float16"}) for i, name in enumerate(ARCHITECTURES)]
CASES += [("llama-odd-heads", {**shape, "dtype": "float32"}) for shape in SHAPES]
# Families with more than LLaMA has, all of it in classic networks.
CASES += [
    ("gemma2", {**SHAPES[0], "dtype": "float32"}),
    ("gemma3", {**SHAPES[2], "dtype": "float32"}),
    ("olmo3", {**SHAPES[3], "dtype": "float32"}),
    ("granite", {**SHAPES[1], "dtype": "float16"}),
    ("phi3-partial", {**SHAPES[0], "dtype": "float16"}),
]
# Quantized weights, and caches in FP8.
CASES += [
    ("llama-gqa", {**SHAPES[0], "dtype": "float16", "quantize": "fp8"}),
    ("llama-gqa", {**SHAPES[0], "dtype": "float16", "quantize": "int8", "quantize_head": "int8"}),
    ("llama-gqa", {**SHAPES[2], "dtype": "float16", "quantize": "int4"}),
    ("llama-gqa", {**SHAPES[3], "dtype": "float16", "quantize": "int4g32"}),
    ("llama-gqa", {**SHAPES[5], "dtype": "float16", "quantize": "int4"}),
    ("llama-gqa", {**SHAPES[0], "dtype": "float16", "kv_dtype": "fp8"}),
    ("gemma3", {**SHAPES[2], "dtype": "float16", "quantize": "int8", "kv_dtype": "fp8"}),
]


@pytest.fixture(scope="module")
def verdict_of(request, tmp_path_factory):
    """A function that gives the file with a case's verdict: those of this run with as many ranks are one job."""
    root = tmp_path_factory.mktemp("verdicts")
    chosen = [item.callspec.params["number"] for item in request.session.items if "verdict_of" in item.fixturenames]

    def get(number):
        out, ranks, cases = root / f"verdict{number}", ranks_of(CASES[number][1]), []
        for i in (i for i in chosen if not out.exists() and ranks_of(CASES[i][1]) == ranks):
            name, shape = CASES[i]
            architecture, changes = {**ARCHITECTURES, **FAMILIES}[name]
            sizes = QUANTIZED_SIZES if "quantize" in shape or "kv_dtype" in shape else {}
            model = make_model(root / f"model{i}", architecture, seed=SEED, **{**changes, **sizes})
            limits = {"max_batch_size": 2, "max_seq_len": 96, "prefill_chunk": 16, "probes": "always"}
            cqil_trt.build(model=model, output=root / f"torch{i}", **limits, **shape)
            paths = {"source": root / f"torch{i}", "engine": root / f"engine{i}", "out": root / f"verdict{i}"}
            cases.append({"device": "cuda", **{key: str(path) for key, path in paths.items()}})
        validate(cases, ranks, root, PYTHON)
        return out

    return get


@pytest.mark.parametrize("number", range(len(CASES)), ids=map(identifier, CASES))
def test_engines_answer_as_the_reference(number, verdict_of):
    shape = CASES[number][1]
    assert_valid(verdict_of(number), None if "kv_dtype" in shape else 1e-5 if shape["dtype"] == "float32" else 2e-2)


def test_a_batch_answers_as_each_prompt_alone(tmp_path):
    model = make_model(tmp_path / "model", seed=SEED)
    limits = ["--max-batch-size", 3, "--max-seq-len", 64, "--prefill-chunk", 8]
    assert build("--model", model, "--p", 2, *limits, "--output", tmp_path / "torch").returncode == 0
    compiling = ["--model", tmp_path / "torch", "--backend", "tensorrt", "--max-batch-size", 3]
    assert run(PYTHON, "builders/build.py", *compiling, "--output", tmp_path / "engine").returncode == 0
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([[5, 6, 7], list(range(20, 45)), [9]]))
    completions = {}
    for engine in ("torch", "engine"):
        report = tmp_path / f"{engine}.json"
        options = ["--engine", tmp_path / engine, "--token-ids", prompts, "--max-new-tokens", 16, "--json", report]
        start = mpirun(2, *options) if engine == "torch" else run("mpirun", "-n", 2, PYTHON, "runtime/run.py", *options)
        assert start.returncode == 0, start.stderr
        completions[engine] = [c["tokens"] for c in json.loads(report.read_text())["completions"]]
    assert completions["engine"] == completions["torch"]


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory):
    """A directory, flags to build an engine in it, a file of prompts, and a CPU's logits and completions for them."""
    root = tmp_path_factory.mktemp("rows")
    sizes = {"hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = make_model(root / "model", seed=SEED, **sizes, head_dim=64, max_position_embeddings=512)
    shape = ["--model", model, "--p", 2, "--start", 1, "--end", 3, "--max-seq-len", 400, "--prefill-chunk", 256]
    assert build(*shape, "--output", root / "reference").returncode == 0
    # A chunk is captured when its length comes again: the last two prompts are graphs.
    random = np.random.default_rng(SEED)
    file = write_json(root / "prompts.json", [random.integers(3, 131, size=n).tolist() for n in (300, 290, 297, 300)])
    return root, shape, file, answers_of(root / "reference", file, sys.executable, "--device", "cpu")


def answers_of(engine, prompts, python, *options):
    """An engine's logits of the first prompt, float64, and the tokens with which it continues each."""
    out, report = engine.with_suffix(".npy"), engine.with_suffix(".json")
    options += "--token-ids", prompts, "--max-new-tokens", 8, "--logits-out", out, "--json", report
    done = run("mpirun", "-n", 2, python, "runtime/run.py", "--engine", engine, *options)
    assert done.returncode == 0, done.stderr
    completions = json.loads(report.read_text())["completions"]
    return np.load(out).astype(np.float64), [completion["tokens"] for completion in completions]


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-4), ("float16", 2e-2)])
def test_prompts_of_many_rows(dtype, bound, many_rows):
    """Products by cuBLASLt where it is, attention in tiles, and chunks as graphs, padded: as a CPU in float32."""
    root, shape, prompts, (expected, continuations) = many_rows
    plain, engine = root / f"torch-{dtype}", root / f"engine-{dtype}"
    assert build(*shape, "--dtype", dtype, "--output", plain).returncode == 0
    compiling = ["--model", plain, "--backend", "tensorrt", "--output", engine]
    done = run("mpirun", "-n", 2, PYTHON, "builders/build.py", *compiling)
    assert done.returncode == 0, done.stderr
    logits, completions = answers_of(engine, prompts, PYTHON)
    assert np.linalg.norm(logits - expected) < bound * np.linalg.norm(expected)
    if dtype == "float32":  # whose rounding changes no token
        assert completions == continuations


@pytest.fixture(scope="module", params=[1, 2], ids=lambda ranks: f"p{ranks}")
def engines(request, tmp_path_factory):
    """An engine of backend torch and what TensorRT compiled from it, in float32, whose rounding changes no token."""
    root, ranks = tmp_path_factory.mktemp("engines"), request.param
    model = make_chat_model(root / "model")
    shape = ["--p", 1] if ranks == 1 else ["--p", 2, "--start", 1, "--end", 3]
    limits = ["--max-batch-size", 8, "--max-seq-len", 96, "--prefill-chunk", 8]
    assert build("--model", model, *shape, *limits, "--output", root / "torch").returncode == 0
    compiling = ["--model", root / "torch", "--backend", "tensorrt", "--max-batch-size", 8]
    done = run("mpirun", "-n", ranks, PYTHON, "builders/build.py", *compiling, "--output", root / "tensorrt")
    assert done.returncode == 0, done.stderr
    return ranks, root


def test_slots_are_those_of_the_torch_backend(engines):
    """Together, joining, leaving, reusing prefixes, sampled, guided, by orders: the tokens that a CPU gives."""
    ranks, root = engines
    found = {}
    for backend, python, device in (("torch", sys.executable, "cpu"), ("tensorrt", PYTHON, "cuda")):
        case = {"engine": str(root / backend), "device": device, "seed": SEED, "out": str(root / f"{backend}-slots")}
        worker = "tests/support/slots_worker.py", write_json(root / f"{backend}.json", case)
        done = run("mpirun", "-n", ranks, python, *worker)
        assert done.returncode == 0, done.stderr
        found[backend] = [json.loads((root / f"{backend}-slots-{rank}.json").read_text()) for rank in range(ranks)]
    assert all(other == found["tensorrt"][0] for other in found["tensorrt"])
    torch_, tensorrt = found["torch"][0], found["tensorrt"][0]
    assert tensorrt["together"] == tensorrt["alone"] == torch_["together"]
    for name in ("joining", "few rows", "sampled", "guided", "logprobs"):
        assert [s["tokens"] for s in tensorrt[name]] == [s["tokens"] for s in torch_[name]], name
    reused = [[s["tokens"] for s in results["reused"]["found"]] for results in (torch_, tensorrt)]
    assert reused[0] == reused[1]
    assert sum(s["cached"] for s in tensorrt["reused"]["found"]) > 60


def test_a_server_answers_as_run_does(engines):
    ranks, root = engines
    found = subprocess.run([PYTHON, "-c", "import uvicorn, starlette, pydantic, llguidance"], capture_output=True)
    if found.returncode:
        pytest.skip(f"{PYTHON} has not what the server needs ({found.stderr.decode().splitlines()[-1]})")
    prompts = [[5, 6, 7], list(range(20, 45)), [9], [5, 6, 8, 11], list(range(20, 40)), [30, 31], [8] * 17, [12, 3]]
    file, report = root / "prompts.json", root / "served.json"
    file.write_text(json.dumps(prompts))
    options = ["--engine", root / "tensorrt", "--token-ids", file, "--max-new-tokens", 12, "--json", report]
    done = run("mpirun", "-n", ranks, PYTHON, "runtime/run.py", *options)
    assert done.returncode == 0, done.stderr
    texts = [completion["text"] for completion in json.loads(report.read_text())["completions"]]
    pid_file = root / "pid"
    server = ServerProcess(ranks, root / "tensorrt", "--no-log", "--pid-file", pid_file, python=PYTHON)

    def ask(prompt):
        body = json.dumps({"prompt": prompt, "max_tokens": 12, "temperature": 0}).encode()
        request = urllib.request.Request(server.url + "/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["choices"][0]["text"]

    try:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, prompts)) == texts
        assert [ask(prompt) for prompt in prompts] == texts
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
        assert server.wait() == 0, server.output
    finally:
        server.process.kill()
    assert "stopped: all ranks hold identical bits" in server.output


@pytest.mark.parametrize("ranks", [2, 4])
def test_plugins_inside_an_engine(ranks):
    """The plugin library must have been compiled with the headers of this TensorRT (docs/tensorrt.md)."""
    worker = "tests/support/tensorrt_plugin_worker.py"
    done = run("mpirun", "-n", ranks, PYTHON, worker, SEED % 100_000)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{ranks} ranks: relative error" in done.stdout
