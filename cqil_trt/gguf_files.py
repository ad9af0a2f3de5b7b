"""GGUF files: a model may be split into several, and reading one's metadata takes seconds."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, TypeVar

from cqil_trt.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader

P = TypeVar("P", bound=PurePath)
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def gguf_parts(path: P) -> list[P]:
    """All files of a split GGUF in order, from the name of any of them (NAME-00001-of-00003.gguf); else just `path`."""
    named = PART.fullmatch(path.name)
    if named is None or int(named["count"]) == 0:
        return [path]
    stem, count = named["stem"], named["count"]
    return [path.with_name(f"{stem}-{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1)]


def open_gguf(path: Path) -> GGUFReader:
    """The file as the gguf package reads it, cached until it changes. Raises UserError if damaged."""
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return _open(str(path), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=16)
def _open(path: str, modified: int, size: int) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as error:  # the gguf package raises numpy's and its own errors on a damaged file
        raise UserError(f"{path}: corrupt or truncated GGUF file ({error or type(error).__name__})") from None
