"""scripts/benchmark_cpu.py: its parts are the whole."""

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
