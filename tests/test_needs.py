"""What a test needs and its machine lacks is a skip with the name of it, and no skip where all is there."""

import sys

import pytest
import torch
from support.checkpoints import make_adapter, make_model
from support.needs import missing, need, need_cuda_backend, need_plugins
from support.processes import cannot_start, mpirun, run

from cqil_trt.gpu import kernel_library

skipped = pytest.raises(pytest.skip.Exception, match="needs (peft|transformers|cmake|cuda-bindings|.*mpirun)")


def test_packages(monkeypatch, tmp_path):
    need("transformers>=5", "peft>=0.18", "packaging", "pytest")
    assert missing("transformers>=5,<5.0.1") and "is installed" in missing("transformers>=99")
    assert "ModuleNotFoundError" in missing("no-such-package")
    monkeypatch.setitem(sys.modules, "peft", None)
    with skipped:
        make_adapter(make_model(tmp_path / "model"), tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with skipped:
        make_model(tmp_path / "other")


def test_compilers_and_gpus(monkeypatch, tmp_path):
    kernel_library.load.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CQIL_TRT_PLUGINS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with skipped:
        need_plugins()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with skipped:
        need_cuda_backend()


def test_mpirun(monkeypatch, tmp_path):
    """Only one that cannot start anything is a reason to skip: what fails under a good one fails."""
    failing = tmp_path / "failing.py"
    failing.write_text("raise SystemExit(3)")
    for ranks in (1, 2, 3):
        assert mpirun(ranks, script=failing).returncode and cannot_start(ranks) is None
    for name in ("python", "mpirun"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 9\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with skipped:
        run("mpirun", "-n", 5, "true")
    (tmp_path / "mpirun").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with skipped:
        run("mpirun", "-n", 2, "true")
