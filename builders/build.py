#!/usr/bin/env python
"""Checkpoint (+ adapter) → engine directory. The command is cqil_trt/commands/build.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from cqil_trt.commands.build import main

if __name__ == "__main__":
    main()
