#!/usr/bin/env python
"""Engine directory → text, parity, latency; started by mpirun. The command is cqil_trt/commands/run.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

try:
    from cqil_trt.commands.run import main
except ModuleNotFoundError as error:
    print(f"error: {error.name} is not installed here: is .venv activated?", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    main()
