"""The commands of the README on the real model, SmolLM2-135M-Instruct, fetched through pip."""

import json
import subprocess

import pytest
from support import ROOT
from support.processes import assert_quiet, build, mpirun, run

from cqil_trt.builder import BuildRequest, prepare
from cqil_trt.demo import demo_model
from cqil_trt.errors import UserError


@pytest.fixture(scope="module")
def model():
    try:
        return demo_model(ROOT / "models")
    except UserError as error:
        pytest.skip(f"the demo model cannot be fetched: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("p", [2, 4])
def test_the_commands_of_the_readme(p, model):
    """Literally: no flags but --p and --d, the default model, the newest engine."""
    command = f"python builders/build.py --p {p} --d 0 && mpirun -n {p} python runtime/run.py --validate"
    done = run("bash", "-c", command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validation passed" in done.stdout
    assert ("--lora none leaves it out" in done.stdout) == (p == 2)
    assert_quiet(done)


@pytest.mark.slow
def test_the_default_engine_answers_sensibly(model, tmp_path):
    """With the adapter that comes with the demo model; without it, half of its layers at once lose their sense."""
    engine = tmp_path / "engine"
    done = build("--model", model, "--p", 2, "--d", 0, "--output", engine)
    assert done.returncode == 0 and "adapters/demo" in done.stdout, done.stdout + done.stderr
    for question, word in {
        "What is the capital of France?": "Paris",
        "Explain in one sentence why the sky is blue.": "scattering",
    }.items():
        report = tmp_path / "answer.json"
        flags = ["--chat", "--prompt", question, "--max-new-tokens", 48, "--json", report]
        done = mpirun(2, "--engine", engine, *flags)
        assert done.returncode == 0, done.stderr
        [completion] = json.loads(report.read_text())["completions"]
        assert word in completion["text"] and completion["finish_reason"] == "eos"


@pytest.mark.parametrize(
    "flags, merged",
    [
        ({"p": 2}, True),
        ({"p": 2, "placement": "leader"}, True),
        ({"p": 2, "start": 12, "end": 28, "d": 0}, True),
        ({"p": 2, "lora": "none"}, False),
        ({"p": 2, "d": 1}, False),
        ({"p": 2, "start": 14}, False),
        ({"p": 4}, False),
        ({"p": 2, "placement": "tensor"}, False),
    ],
)
def test_the_demo_adapter_is_merged_where_it_was_trained_for(flags, merged, model):
    plan = prepare(BuildRequest.of(model=model, output="/nowhere/engine", **flags))
    assert (plan.source.lora is not None) == merged
    assert any("--lora none leaves it out" in note for note in plan.notes) == merged


# Each takes most of a minute; test_parity.py has all combinations, on small models.
SHAPES = [
    ("--p", 4, "--d", 1),
    ("--p", 4, "--d", 3, "--start", 14, "--end", 26, "--bypass", "residual", "--placement", "leader"),
]


def build_and_validate(model, shape, engine):
    # The reference itself judges: its stored answers would take as long again.
    assert build("--model", model, *shape, "--probes", "never", "--output", engine).returncode == 0
    done = mpirun(shape[1], "--engine", engine, "--validate", "--prompt", "The sea is", "--max-new-tokens", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validation passed" in done.stdout and "64/64" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=[" ".join(map(str, shape)) for shape in SHAPES])
def test_other_shapes_validate(shape, model, tmp_path):
    build_and_validate(model, shape, tmp_path / "engine")


@pytest.mark.slow
def test_the_unchanged_model_validates_and_gives_sensible_text(model, tmp_path):
    """On two ranks it answers a question that it knows."""
    build_and_validate(model, ("--p", 2, "--placement", "tensor"), tmp_path / "engine")
    question = ("--chat", "--prompt", "What is the capital of France?", "--max-new-tokens", 24)
    done = mpirun(2, "--engine", tmp_path / "engine", *question, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    [completion] = json.loads((tmp_path / "out.json").read_text())["completions"]
    assert "Paris" in completion["text"] and completion["finish_reason"] == "eos"


def test_a_damaged_demo_model_is_not_used(model, tmp_path, monkeypatch):
    def broken_pip(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "no network")

    (tmp_path / model.name).write_bytes(model.read_bytes()[:-1])
    monkeypatch.setattr(subprocess, "run", broken_pip)
    with pytest.raises(UserError, match="no network"):
        demo_model(tmp_path)
