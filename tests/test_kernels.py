"""The CUDA kernels on GPUs: the workers in tests/support. Most are skipped where there is no GPU."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from support import ROOT, SEED
from support.needs import need_plugins
from support.processes import mpirun

from cqil_trt.gpu import kernel_library

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


@pytest.fixture(scope="module")
def library():
    need_plugins()


@pytest.fixture(scope="module")
def delays(tmp_path_factory):
    """The environment in which the kernels are those of a library whose blocks can be delayed."""
    if shutil.which("nvcc") is None or shutil.which("cmake") is None:
        pytest.skip("needs cmake and nvcc to build the kernels with delays")
    path = tmp_path_factory.mktemp("delays") / kernel_library.LIBRARY
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    build = [sys.executable, "-m", "cqil_trt.kernels", "build", "--architectures", capability, "--output", path]
    subprocess.run(build, cwd=ROOT, env={**os.environ, "CQIL_TEST_DELAYS": "ON"}, check=True)
    return {"CQIL_TRT_PLUGINS": str(path)}


@pytest.mark.slow
@needs_gpu
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "ranks, shared, operations, replays",
    [
        (1, 1, 100, 100),
        (2, 1, 400, 10_000),
        (3, 1, 60, 50),
        (4, 1, 60, 50),
        (8, 1, 20, 10),
        (4, 2, 60, 10_000),
        (6, 3, 40, 50),
        (8, 2, 20, 10),
        (8, 4, 20, 10),
    ],
)
def test_sums_order_and_bits(ranks, shared, operations, replays):
    """`shared`: how many ranks share a layer of a group; then fewer ranks join too."""
    if ranks <= torch.cuda.device_count() and ranks > 1:
        operations, replays = 400, 10_000
    done = mpirun(ranks, SEED % 100_000, operations, replays, shared, script="tests/support/cuda_worker.py")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@needs_gpu
@pytest.mark.parametrize("ranks, shared", [(2, 1), (3, 1), (4, 2)])
def test_delayed_blocks_change_no_sum(ranks, shared, delays):
    done = mpirun(ranks, SEED % 100_000, 60, 20, shared, script="tests/support/cuda_worker.py", env=delays)
    assert done.returncode == 0, done.stdout + done.stderr


def kernels(*arguments, env=None, timeout=300):
    """Runs cuda_kernels_worker.py. A kernel that spins for ever ends with its process, after the time limit."""
    command = [sys.executable, "tests/support/cuda_kernels_worker.py", *map(str, arguments)]
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@needs_gpu
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "check, cases", [("kernels", 50), ("rows", 20), ("packed", 30), ("gates", 4), ("cache", 12), ("forms", 40)]
)
def test_kernels_agree_with_float64(check, cases):
    """The checks of cuda_kernels_worker.py, which says what each is."""
    assert "agree with float64" in kernels(SEED % 100_000, cases, check)


@pytest.mark.slow
@needs_gpu
@pytest.mark.parametrize("check", ["joins", "overlap", "repeat"])
def test_kernels_that_overlap(check, delays):
    assert "agree with float64" in kernels(SEED % 100_000, 5, check, env=delays, timeout=120)


@pytest.mark.slow
@needs_gpu
def test_attention_gives_up_with_a_reason(delays):
    assert "the limit ends the wait and is named" in kernels(SEED % 100_000, 1, "limit", env=delays, timeout=60)


@pytest.mark.slow
@needs_nvcc
def test_the_directed_sender_acquires_a_slot(tmp_path):
    """The loads of an acknowledgement are acquires: nothing on a GPU at hand would show that they are not."""
    ptx = tmp_path / "collectives.ptx"
    command = ["nvcc", "-std=c++17", "-ptx", "-arch=sm_90", "-o", ptx, ROOT / "plugins" / "collectives.cu"]
    subprocess.run(command, check=True)
    directed = [part for part in re.split(r"\.entry", ptx.read_text()) if "directed_kernel" in part.split("(")[0]]
    assert len(directed) == 3
    assert all("ld.acquire.sys.global" in part for part in directed)


@pytest.mark.slow
@needs_gpu
@pytest.mark.usefixtures("library")
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
