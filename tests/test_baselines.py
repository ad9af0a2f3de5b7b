"""What the benchmark compares with computes the same model, or its times would say nothing."""

import pytest
from support import ROOT, SEED
from support.checkpoints import make_model
from support.processes import environment, mpirun

pytestmark = pytest.mark.slow


def test_baselines_compute_what_the_reference_does(tmp_path):
    # An even vocabulary: the tensor-parallel baseline gathers equal parts.
    model = make_model(tmp_path / "model", seed=SEED, vocab_size=132)
    scripts = {"PYTHONPATH": f"{environment()['PYTHONPATH']}:{ROOT / 'scripts'}"}
    done = mpirun(2, model, 1, 5, script="tests/support/baselines_worker.py", env=scripts)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compute what the reference does" in done.stdout
