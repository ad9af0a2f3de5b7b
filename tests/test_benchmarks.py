"""The scripts/benchmark*.py: what they refuse; of the one for CPUs, that its parts are the whole."""

import json
import sys

import pytest
from conftest import make_model, mpirun, run

import cqil_trt


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_parts_of_a_step_add_up(ranks, tmp_path):
    make_model(tmp_path / "model")
    shape = {"p": ranks, "start": 0, "end": 6} if ranks > 1 else {"p": 1}
    cqil_trt.build(model=tmp_path / "model", output=tmp_path / "engine", max_seq_len=64, probes="never", **shape)
    flags = ("--engine", tmp_path / "engine", "--context", 7, "--steps", 9, "--json", tmp_path / "found.json")
    script = "scripts/benchmark_cpu.py"
    done = mpirun(ranks, *flags, script=script) if ranks > 1 else run(sys.executable, script, *flags)
    assert done.returncode == 0, done.stderr
    step = json.loads((tmp_path / "found.json").read_text())["milliseconds"]
    assert all(step[name] > 0 for name in ("matrix products", "attention", "MPI", "the rest"))
    assert sum(step.values()) - step["total"] == pytest.approx(step["total"], rel=0.5)  # medians, each its own
    assert "matrix products" in done.stdout


@pytest.mark.parametrize(
    "line, said",
    [
        ("benchmark.py --synthetic", "llama-7b-p2-d0 with 1 ranks: mpirun -n 2, or --alone"),
        ("benchmark.py --synthetic --alone --preset llama-7b-p2-d1", "--alone takes neither bypassing"),
        ("benchmark_allreduce.py", "mpirun -n 2"),
        ("benchmark_linear.py --rows 0", "--rows 0: expected numbers"),
        ("benchmark_tensorrt.py --preset llama-7b", "--preset llama-7b: unknown"),
        ("benchmark_build.py --layers 1000", "GB of disk are free"),
        ("benchmark_cpu.py --engine nowhere", "nowhere: not an engine directory"),
    ],
)
def test_refusals_are_one_line(line, said):
    script, *flags = line.split()
    done = run(sys.executable, f"scripts/{script}", *flags)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
