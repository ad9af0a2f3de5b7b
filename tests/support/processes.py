"""Commands as users start them, MPI jobs, and what both must print."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from support import ROOT, THREADS
from support.interpreters import interpreter

# Open MPI asks before it runs as root or starts more ranks than cores, and would hold each of a few ranks to one core;
# other MPIs ignore these.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


# What users start.
SCRIPTS = [ROOT / name for name in ("builders", "runtime", "scripts")]


def environment() -> dict[str, str]:
    """What commands get: this process's, with this Python first on the PATH, and the checkout on Python's."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    inherited = {**os.environ, **OPEN_MPI, "PATH": path, "PYTHONPATH": os.pathsep.join(paths)}
    if THREADS is None:  # a command chooses for itself
        inherited.pop("OMP_NUM_THREADS", None)
    return inherited


@cache
def cannot_start(ranks: int) -> str | None:
    """Why mpirun cannot start so many ranks with mpi4py here; None when it can."""
    program = f"from mpi4py import MPI; raise SystemExit(MPI.COMM_WORLD.size != {ranks})"
    command = ("mpirun", "-n", str(ranks), sys.executable, "-c", program)
    try:
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"needs mpirun ({error})"
    if done.returncode == 0:
        return None
    said = " ".join((done.stderr or done.stdout).split())
    return f"needs an mpirun that fits mpi4py and starts {ranks} ranks here (exit code {done.returncode}: {said[:300]})"


def run(*command: Any, timeout: float = 900, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command from the checkout's root. Skips the test when it fails by mpirun, which starts nothing here.

    A script of the checkout runs in an interpreter that stays (`support.interpreters`) unless `options` ask for more
    than another working directory: `env={}` starts a process.
    """
    arguments = [str(part) for part in command]
    if arguments[0] == "mpirun" and shutil.which("mpirun", path=environment()["PATH"]) is None:
        pytest.skip("needs mpirun, which is not on the PATH")
    if not options.keys() - {"cwd"} and (done := run_script(arguments, options.get("cwd", ROOT), timeout)):
        return done
    inherited = environment()
    if any(part.startswith("tests/support/") for part in arguments):
        inherited.setdefault("OMP_NUM_THREADS", "1")  # as in conftest.py; ranks would each take all cores
    done = subprocess.run(
        arguments,
        cwd=options.pop("cwd", ROOT),
        env={**inherited, **options.pop("env", {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
    )
    if arguments[:2] == ["mpirun", "-n"] and done.returncode and (why := cannot_start(int(arguments[2]))):
        pytest.skip(why)
    return done


def run_script(arguments: list[str], directory: Path, timeout: float) -> subprocess.CompletedProcess[str] | None:
    """[mpirun -n RANKS] python SCRIPT … in an interpreter that stays; None for what is not that, or is for a GPU."""
    ranks, program = 0, arguments
    if arguments[:2] == ["mpirun", "-n"]:
        ranks, program = int(arguments[2]), arguments[3:]
    script = (ROOT / program[1]).resolve() if len(program) > 1 and program[0] == sys.executable else None
    if script is None or script.parent not in SCRIPTS or script.suffix != ".py" or "cuda" in program:
        return None
    python = interpreter(ranks, environment())
    if python is None:
        return None
    return subprocess.CompletedProcess(arguments, *python.run(script, program[2:], Path(directory), timeout))


def build(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs build.py; without --probes no reference answers are stored, which most tests have no use for."""
    probes = () if "--probes" in arguments else ("--probes", "never")
    return run(sys.executable, "builders/build.py", *arguments, *probes, **options)


def mpirun(ranks: int, *arguments: Any, script: str = "runtime/run.py", **options: Any):
    """Engines run on the CPU unless `arguments` say otherwise, on a host with GPUs too."""
    if script == "runtime/run.py" and "--device" not in arguments:
        arguments = (*arguments, "--device", "cpu")
    return run("mpirun", "-n", ranks, sys.executable, script, *arguments, **options)


def assert_user_error(done: subprocess.CompletedProcess[str], *fragments: str) -> None:
    """Exit code 2 and one line on standard error that holds every fragment, no traceback."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    # mpirun may add lines of its own about the exit codes of ranks; ours starts with "error: ".
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    for fragment in fragments:
        assert fragment in lines[0], (fragment, lines[0])


def assert_quiet(done: subprocess.CompletedProcess[str]) -> None:
    """It succeeded, and nothing is on standard error: no warning of a library that its user can do nothing about."""
    assert (done.returncode, done.stderr) == (0, ""), (done.returncode, done.stdout, done.stderr)
