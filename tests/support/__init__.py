"""What tests share: random models, commands and their output, stand-ins, and the programs that mpirun starts.

Packages that a machine may lack are imported where they are used, so that a test skips by their name (`needs`).
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("support.processes")

ROOT = Path(__file__).resolve().parents[2]
THREADS = os.environ.get("OMP_NUM_THREADS")  # as the user wants it; conftest.py sets it for this process
SEED = int(os.environ.get("CQIL_TEST_SEED", random.SystemRandom().randrange(2**31)))


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path
