#!/usr/bin/env python
"""Checkpoint (+ adapter) → engine directory. The command is cqil_trt/commands/build.py."""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends imports without a traceback

try:
    from cqil_trt.commands.build import main
except ModuleNotFoundError as error:
    print(f"error: {error.name} is not installed here: is .venv activated?", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    main()
