"""The kernels of a decode step on a GPU against float64, on random shapes. Skipped where there is no GPU."""

import sys

import pytest
import torch
from support import SEED
from support.needs import need_plugins
from support.processes import run


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_every_kernel_agrees_with_float64():
    need_plugins()
    done = run(sys.executable, "tests/support/cuda_kernels_worker.py", SEED % 100_000, 50)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "50 cases of each kernel and type agree with float64" in done.stdout
