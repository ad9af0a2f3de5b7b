"""Files that commands write for their users, locks, and directories that do not outlive their process for long."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cqil_trt.errors import UserError

# How young a directory may be that nobody holds yet.
_YOUNG_SECONDS = 60.0


def write_file(path: Path, content: bytes, flag: str = "") -> None:
    """Writes a file whole or not at all: a full disk leaves what was there, and nobody reads half of it.

    A temporary file next to it takes its place and its mode; a symbolic link remains one. Anything that is not a
    regular file, such as a pipe, and any file in a directory that cannot be written, is written in place.

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


class HeldDirectory:
    """A new directory for this process, next to those that the system has for temporary files.

    If the process is killed, the next one that makes a directory with this prefix removes it.
    """

    def __init__(self, prefix: str):
        for other in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            # A lock, because process ids mean nothing where containers share the directory.
            with contextlib.suppress(OSError):
                if time.time() - other.stat().st_mtime > _YOUNG_SECONDS:
                    os.close(lock(other, os.O_RDONLY))
                    shutil.rmtree(other, ignore_errors=True)
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        self._lock: int | None = lock(self.path, os.O_RDONLY)

    def remove(self) -> None:
        """Removes the directory, if it is still there."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def write_json(path: Path, values: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Writes a JSON file, like `write_file`. `default`: what replaces a value that JSON does not have."""
    write_file(path, (json.dumps(values, indent=1, default=default) + "\n").encode())
