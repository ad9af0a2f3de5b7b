"""GGUF files: a model may be split into several, and reading one's metadata takes seconds."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeVar

from cqil_trt.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader

P = TypeVar("P", bound=PurePath)
# More values than any vocabulary has; each costs the reader a microsecond, and memory.
_MOST_ELEMENTS = 1 << 22
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


@cache
def _bounded_reader() -> type[GGUFReader]:
    """The package's reader. Beyond the end of a file that finds empty values, and goes on with them without end."""
    from gguf import GGUFReader, GGUFValueType

    class Bounded(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, **options: Any) -> Any:
            found = super()._get(offset, dtype, count, **options)
            if len(found) < count:
                raise ValueError(f"it ends before byte {offset + count * found.itemsize}")
            return found

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == GGUFValueType.ARRAY:
                count = int(self._get(orig_offs + 4, "uint64")[0])
                if count > _MOST_ELEMENTS:
                    raise ValueError(f"an array of {count} values in its metadata")
            return super()._get_field_parts(orig_offs, raw_type)

    return Bounded


@lru_cache(maxsize=16)
def _open(path: str, modified: int, size: int) -> GGUFReader:
    try:
        return _bounded_reader()(path)
    except Exception as error:  # the gguf package raises numpy's and its own errors on a damaged file
        raise UserError(f"{path}: corrupt or truncated GGUF file ({error or type(error).__name__})") from None
