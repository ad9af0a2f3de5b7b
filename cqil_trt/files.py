"""Files that commands write for their users, and locks."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from cqil_trt.errors import UserError


def write_file(path: Path, content: bytes, flag: str = "") -> None:
    """Writes a file whole or not at all: a full disk leaves what was there, and nobody reads half of it.

    A sibling takes its place, with its mode; a link stays one. What is no file, such as a pipe, or is in a directory
    that takes no sibling, is written in place.

    Raises UserError, with the `flag` that named the file, where it cannot be written.
    """
    target = path.resolve()
    beside = target.with_name(f".writing-{os.getpid()}")
    try:
        if path.exists() and not (path.is_file() and os.access(target.parent, os.W_OK)):
            path.write_bytes(content)
            return
        try:
            beside.write_bytes(content)
            if path.exists():
                shutil.copymode(target, beside)
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror})".lstrip()) from None


def lock(path: Path, flags: int) -> int:
    """Opens and locks a file or directory for the life of the process. Raises OSError if another one holds it."""
    descriptor = os.open(path, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file, like `write_file`."""
    write_file(path, (json.dumps(values, indent=1) + "\n").encode())
