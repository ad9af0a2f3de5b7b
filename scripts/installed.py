"""Imported by every script: says in one line what to do where the package is missing."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("cqil_trt") is None:
    root = Path(__file__).resolve().parent.parent
    print(
        f"error: cqil_trt is not installed: source {root}/scripts/environment.sh, or set PYTHONPATH={root}",
        file=sys.stderr,
    )
    sys.exit(2)
