"""Python scripts in interpreters that stay: commands start by the dozen, and each would import PyTorch again.

A script runs as `__main__` with its arguments, working directory and output, as in a process of its own. A test that is
about processes (other environments, kills, time limits, GPUs, or that a command works when started as users start it)
passes `env`, which may be empty, and gets them. CQIL_TEST_PROCESSES=1 starts one for every command.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from support import ROOT

# What differs from test to test without a meaning for commands.
PASSING = ("PYTEST_CURRENT_TEST", "PYTEST_VERSION")


class Gone(Exception):
    """The interpreter ended before it answered."""


class Interpreter:
    """`ranks` interpreters under one mpirun, or one without it for 0 ranks; started here."""

    def __init__(self, ranks: int, environment: dict[str, str]) -> None:
        self.ranks, self.environment = ranks, environment
        self.directory = Path(tempfile.mkdtemp(prefix="cqil-interpreter-"))
        program = [sys.executable, str(ROOT / "tests" / "support" / "warm_interpreter.py"), str(self.directory)]
        self.process = subprocess.Popen(
            ["mpirun", "-n", str(ranks), *program] if ranks else program,
            cwd=ROOT,
            env={"OMP_NUM_THREADS": "1", **environment},  # as in conftest.py
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # with the processes that it starts
        )
        self._answer(600)

    def run(self, script: Path, arguments: list[str], directory: Path, timeout: float) -> tuple[int, str, str]:
        """The exit code, standard output and standard error. Raises TimeoutExpired after killing the interpreter."""
        line = json.dumps([str(script), arguments, str(directory)])
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            code = int(self._answer(timeout))
        except (Gone, BrokenPipeError):
            code = self.process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            self.close()
            raise
        files = [[self.directory / f"{rank}.{name}" for rank in range(max(1, self.ranks))] for name in ("out", "err")]
        out, err = ("".join(file.read_text() for file in named if file.exists()) for named in files)
        return code, out, err

    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """Ends it: idle, when its input ends; otherwise by a signal."""
        with suppress(OSError):
            self.process.stdin.close()
        for end in (None, signal.SIGTERM, signal.SIGKILL):
            with suppress(subprocess.TimeoutExpired, ProcessLookupError):
                if end is not None:
                    os.killpg(self.process.pid, end)
                self.process.wait(timeout=5)
                break
        shutil.rmtree(self.directory, ignore_errors=True)

    def _answer(self, timeout: float) -> str:
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout):
                raise subprocess.TimeoutExpired(self.process.args, timeout)
        line = self.process.stdout.readline()
        if not line:
            raise Gone
        return line


_started: dict[int, Interpreter] = {}
_unusable: set[int] = set()


def interpreter(ranks: int, environment: dict[str, str]) -> Interpreter | None:
    """The interpreters for this number of ranks; None where they would not see this environment, or do not start."""
    environment = {name: value for name, value in environment.items() if name not in PASSING}
    if os.environ.get("CQIL_TEST_PROCESSES") or ranks in _unusable:
        return None
    found = _started.get(ranks)
    if found is None or not found.alive():
        if found is not None:
            found.close()
        try:
            found = _started[ranks] = Interpreter(ranks, environment)
        except (OSError, Gone, subprocess.TimeoutExpired):
            _unusable.add(ranks)
            return None
    return found if found.environment == environment else None


@atexit.register
def close() -> None:
    """Ends all interpreters."""
    while _started:
        _started.popitem()[1].close()
