#!/usr/bin/env python
"""Serve an engine over HTTP; started by mpirun. The command is cqil_trt/commands/serve.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from cqil_trt.commands.serve import main

if __name__ == "__main__":
    main()
