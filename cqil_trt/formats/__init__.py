"""How an engine stores the weights of its projections: a file per format.

A projection has a name (`layers.3.qkv`); its tensors are `NAME.weight`, `NAME.bias` and whatever else its format needs.
The decoder knows only the name, so a new format is a file here and a matrix product in each backend that supports it.
The folder is the registry: a format is called after its file, which defines `FORMAT`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from cqil_trt.errors import UserError
from cqil_trt.formats.format import Piece, Projection, RankTensor, StoredTensor, WeightFormat

__all__ = ["DENSE", "Piece", "Projection", "RankTensor", "StoredTensor", "WeightFormat", "load", "names"]

DENSE = "dense"


@cache
def names() -> tuple[str, ...]:
    """The formats' names."""
    return tuple(sorted(found.name for found in iter_modules(__path__) if found.name not in ("format", "quantized")))


def load(name: str) -> WeightFormat:
    """The format of that name. Raises UserError for one that does not exist."""
    if name not in names():
        raise UserError(f"--quantize must be one of {', '.join(names())}, found {name}")
    return import_module(f"{__name__}.{name}").FORMAT
