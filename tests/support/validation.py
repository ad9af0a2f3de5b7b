"""Engines that are validated in one job: a process that uses a GPU takes longer to start than small models to run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from support import write_json
from support.processes import run


def validate(cases: list[dict[str, Any]], ranks: int, directory: Path, python: str = sys.executable) -> None:
    """Validates engines, generates and measures with them. What came of a case is then in its file `out`.

    Args:
        cases: {engine, device, out} and perhaps `source`, the engine of backend torch that TensorRT compiles first, and
            `prompts` of token ids to validate with instead of the built-in ones.
        ranks: of every engine.
        directory: for the list of the cases.
        python: the interpreter of the ranks.
    """
    left = cases
    while left:
        file = write_json(directory / f"cases{ranks}.json", left)
        job = ("mpirun", "-n", ranks, python, "tests/support/validation_worker.py", file)
        try:
            done = run(*job, timeout=120 + 30 * len(left))
            said = f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
        except subprocess.TimeoutExpired as error:
            said = f"{error}\n{(error.stderr or b'').decode(errors='replace')}"
        left = [case for case in left if not Path(case["out"]).exists()]
        if left:  # the first of them ended the job
            write_json(Path(left[0]["out"]), {"error": said})
            left = left[1:]


def assert_valid(out: Path, relative_l2: float | None = None) -> None:
    """The engine passed validation, and no prompt's error was above `relative_l2`."""
    found = json.loads(out.read_text())
    assert "error" not in found, found["error"]
    assert found["passed"], found["prompts"]
    assert relative_l2 is None or max(p["relative_l2"] for p in found["prompts"]) < relative_l2, found["prompts"]
