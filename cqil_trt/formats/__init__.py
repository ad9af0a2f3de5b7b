"""How an engine stores the weights of its projections: a file per format.

A projection has a name (`layers.3.qkv`); its tensors are `NAME.weight`, `NAME.bias` and whatever else its format needs.
The decoder knows only the name, so a new format is a file here and a matrix product in each backend that supports it.
The folder is the registry: a format is called after its file, which defines `FORMAT`.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from cqil_trt.errors import UserError
from cqil_trt.formats.format import Piece, Projection, RankTensor, StoredTensor, WeightFormat

__all__ = [
    "DENSE",
    "Piece",
    "Projection",
    "RankTensor",
    "StoredTensor",
    "WeightFormat",
    "base",
    "choices",
    "load",
    "names",
]

DENSE = "dense"


@cache
def names() -> tuple[str, ...]:
    """The formats' names."""
    return tuple(sorted(found.name for found in iter_modules(__path__) if found.name not in ("format", "quantized")))


def base(name: str) -> str:
    """The format's name without the size of its groups: int4 of int4g32."""
    return name.partition("g")[0] if re.fullmatch(r"[a-z]+[0-9]g[1-9][0-9]*", name) else name


def choices() -> tuple[str, ...]:
    """What `--quantize` offers: the quantized formats, and some sizes of groups."""
    return tuple(name for name in names() if name != DENSE) + ("int4g64", "int4g32")


@cache
def load(name: str) -> WeightFormat:
    """The format of that name, like int8 or int4, or int4g32 for groups of 32. Raises UserError for an unknown one."""
    known = base(name)
    if known not in names():
        raise UserError(f"--quantize must be one of {', '.join((DENSE, *choices()))}, found {name}")
    found: WeightFormat = import_module(f"{__name__}.{known}").FORMAT
    return found if known == name else found.with_groups(int(name.rpartition("g")[2]))
