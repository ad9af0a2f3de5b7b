"""A GGUF model may be split into several files."""

from __future__ import annotations

import re
from pathlib import Path

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def gguf_parts(path: Path) -> list[Path]:
    """The files of a GGUF in order, by the name of any of them (NAME-00001-of-00003.gguf); alone where not split."""
    named = _PART.fullmatch(path.name)
    if named is None or int(named[3]) == 0:
        return [path]
    return [path.with_name(f"{named[1]}-{number:05}-of-{named[3]}.gguf") for number in range(1, int(named[3]) + 1)]
