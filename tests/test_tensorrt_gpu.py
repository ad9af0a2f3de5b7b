"""TensorRT engines on GPUs, judged by the reference's answers that the builder stored. Skipped where there is no GPU.

TensorRT may live in another Python than this one (8.5.3.1 in a CPython 3.10 without PyTorch, say): CQIL_TENSORRT_PYTHON
names it.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from support import SEED
from support.cases import ARCHITECTURES
from support.checkpoints import make_model
from support.processes import build, mpirun, run

PYTHON = os.environ.get("CQIL_TENSORRT_PYTHON", sys.executable)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and subprocess.run([PYTHON, "-c", "import tensorrt"], capture_output=True).returncode,
        reason=f"{PYTHON} has no tensorrt (CQIL_TENSORRT_PYTHON names one that has)",
    ),
]

SHAPES = [
    ["--p", 1],
    ["--p", 2, "--start", 1, "--end", 5, "--placement", "leader"],
    ["--p", 2, "--d", 1, "--start", 1, "--end", 5],
    ["--p", 2, "--placement", "tensor"],
    ["--p", 4, "--d", 1, "--start", 1, "--end", 5, "--bypass", "residual"],
]
CASES = [(name, SHAPES[i % len(SHAPES)], "float16") for i, name in enumerate(ARCHITECTURES)]
CASES += [("llama-odd-heads", shape, "float32") for shape in SHAPES]


@pytest.mark.parametrize("name, shape, dtype", CASES, ids=[f"{n}-{'-'.join(map(str, s))}-{d}" for n, s, d in CASES])
def test_engines_answer_as_the_reference(name, shape, dtype, tmp_path):
    architecture, changes = ARCHITECTURES[name]
    model = make_model(tmp_path / "model", architecture, seed=SEED, **changes)
    limits = ["--max-batch-size", 2, "--max-seq-len", 96, "--prefill-chunk", 16, "--dtype", dtype]
    limits += ["--probes", "always"]
    assert build("--model", model, *shape, *limits, "--output", tmp_path / "torch").returncode == 0
    ranks = shape[1]
    compiling = ["--model", tmp_path / "torch", "--backend", "tensorrt", "--output", tmp_path / "engine"]
    done = run("mpirun", "-n", ranks, PYTHON, "builders/build.py", *compiling)
    assert done.returncode == 0, done.stderr
    report = tmp_path / "report.json"
    done = run(
        *("mpirun", "-n", ranks, PYTHON, "runtime/run.py", "--engine", tmp_path / "engine"),
        *("--validate", "--benchmark", "--json", report),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads(report.read_text())["validation"]
    assert verdict["passed"] and max(p["relative_l2"] for p in verdict["prompts"]) < (
        1e-5 if dtype == "float32" else 2e-2
    )


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


@pytest.mark.parametrize("ranks", [2, 4])
def test_plugins_inside_an_engine(ranks):
    """The plugin library must have been compiled with the headers of this TensorRT (docs/tensorrt.md)."""
    worker = "tests/support/tensorrt_plugin_worker.py"
    done = run("mpirun", "-n", ranks, PYTHON, worker, SEED % 100_000)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{ranks} ranks: relative error" in done.stdout
