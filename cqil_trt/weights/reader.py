"""A checkpoint's tensors by name, read slice by slice from any kind of file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from cqil_trt.weights.quantized import QuantizedMatrix

Range = tuple[int, int] | None


class WeightReader(ABC):
    """Tensors by name, read on demand, by one thread at a time. `source` names the files in messages."""

    source: str
    # What the user should know about how the weights were stored.
    note = ""

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The type `read` returns for `name`."""

    @abstractmethod
    def read(self, name: str, rows: Range = None, columns: Range = None) -> torch.Tensor:
        """`tensor[rows, columns]` as a new tensor; half-open ranges, None for all.

        `columns` needs a matrix. Raises UserError when the file cannot be read.
        """

    @property
    def quantized_names(self) -> Set[str]:
        """The matrices that `quantized` gives."""
        return frozenset()

    def quantized(self, name: str) -> QuantizedMatrix | None:
        """The matrix as codes and scales, of which `read` gives the values; None if it is not quantized."""
        return None


def is_float(dtype: torch.dtype) -> bool:
    """Whether values of this type are weights by themselves: floats of at least 16 bits, not codes of 8."""
    return dtype.is_floating_point and dtype.itemsize > 1


def cut(tensor: torch.Tensor, rows: Range, columns: Range) -> torch.Tensor:
    """`tensor[rows, columns]`, a view."""
    if rows is not None:
        tensor = tensor[rows[0] : rows[1]]
    return tensor if columns is None else tensor[:, columns[0] : columns[1]]


class RenamedReader(WeightReader):
    """`base` with some tensors under other names: `stored` maps a name to the name in the file."""

    def __init__(self, base: WeightReader, stored: Mapping[str, str]):
        self.source, self.note = base.source, base.note
        self._base, self._stored = base, stored

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        given = {stored: name for name, stored in self._stored.items()}
        return {given.get(name, name): shape for name, shape in self._base.shapes().items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(self._stored.get(name, name))

    def read(self, name: str, rows: Range = None, columns: Range = None) -> torch.Tensor:
        return self._base.read(self._stored.get(name, name), rows, columns)

    @property
    def quantized_names(self) -> Set[str]:
        given = {stored: name for name, stored in self._stored.items()}
        return {given.get(name, name) for name in self._base.quantized_names}

    def quantized(self, name: str) -> QuantizedMatrix | None:
        return self._base.quantized(self._stored.get(name, name))
