"""Fixtures and hooks; everything else that tests share is in support/."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess

import hypothesis
import pytest
from support import ROOT, SEED
from support.processes import assert_user_error

from cqil_trt.job import command

# Hugging Face must not look for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# For random models this small, a second thread costs several times what it computes. PyTorch is not imported yet.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The workers of pytest-xdist inherit it.
os.environ.setdefault("CQIL_TEST_SEED", str(SEED))
# An example takes longer than the usual 0.2 s whenever the machine does something else.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


def pytest_report_header() -> str:
    return f"CQIL_TEST_SEED={SEED} (set it to repeat this run's random models)"


@pytest.fixture
def refused(monkeypatch, capfd):
    """What a script says to wrong arguments, without a process of its own, which would only import PyTorch again."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.chdir(ROOT)
    handler = signal.getsignal(signal.SIGTERM)

    def check(name, call, arguments, message):
        module = importlib.import_module(name)
        with pytest.raises(SystemExit) as ended, command():
            call(module, module.parser().parse_args([str(part) for part in arguments]))
        assert_user_error(subprocess.CompletedProcess(name, ended.value.code, *capfd.readouterr()), message)

    yield check
    signal.signal(signal.SIGTERM, handler)
