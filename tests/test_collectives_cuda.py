"""The CUDA collectives on GPUs: cuda_worker.py and cuda_failure.py under mpirun. Skipped where there is no GPU."""

import subprocess
import sys

import pytest
import torch
from support import ROOT, SEED
from support.needs import need_plugins
from support.processes import mpirun

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module", autouse=True)
def library():
    need_plugins()


@pytest.mark.parametrize(
    "ranks, operations, replays", [(1, 100, 100), (2, 400, 10_000), (3, 60, 50), (4, 60, 50), (8, 20, 10)]
)
def test_sums_order_and_bits(ranks, operations, replays):
    if ranks <= torch.cuda.device_count() and ranks > 1:
        operations, replays = 400, 10_000
    done = mpirun(ranks, SEED % 100_000, operations, replays, script="tests/support/cuda_worker.py")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_killed_rank_is_named(tmp_path):
    command = [sys.executable, "tests/support/cuda_failure.py"]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said, _ = ranks[0].communicate(timeout=60)
    ranks[1].wait(timeout=60)
    assert ranks[0].returncode == 3 and ranks[1].returncode == -9
    assert "rank 0 gave up waiting for rank 1 in all_reduce number 100" in said
