"""Tensors of a merged model, computed slice by slice in float32: the original tensor and the adapter's changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from cqil_trt.weights import Range, WeightReader, cut

# Elements of a matrix in memory at a time while its norms are computed.
_BLOCK_ELEMENTS = 1 << 20

# Reads rows and columns of a weight before a change, float32.
Before = Callable[[Range, Range], torch.Tensor]


@dataclass(kw_only=True)
class LowRank:
    """W + scaling * b @ a: rows of `b` (out, r), columns of `a` (r, in)."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    def apply(self, before: Before, rows: Range, columns: Range) -> torch.Tensor:
        return torch.addmm(
            before(rows, columns), cut(self.b, rows, None), cut(self.a, None, columns), alpha=self.scaling
        )


@dataclass(kw_only=True)
class Dora(LowRank):
    """The low-rank sum with every row (of an embedding, every column) scaled to the norm in `magnitude`.

    DoRA (arXiv 2402.09353, equation 5), with PEFT's choice of direction. Norms are of whole rows or columns: they are
    computed in blocks at the first slice, and kept.
    """

    magnitude: torch.Tensor
    by_column: bool
    _factor: torch.Tensor | None = field(default=None, init=False)

    def apply(self, before: Before, rows: Range, columns: Range) -> torch.Tensor:
        if self._factor is None:
            self._factor = self.magnitude / self._norms(before)
        factor = cut(self._factor, columns if self.by_column else rows, None)
        return super().apply(before, rows, columns) * (factor if self.by_column else factor[:, None])

    def _norms(self, before: Before) -> torch.Tensor:
        added, height, width = super().apply, self.b.shape[0], self.a.shape[1]
        step = max(1, _BLOCK_ELEMENTS // width)
        ranges = [(row, min(row + step, height)) for row in range(0, height, step)]
        blocks = (added(before, rows, None).double().square() for rows in ranges)
        if self.by_column:
            return sum(block.sum(dim=0) for block in blocks).sqrt().float()
        return torch.cat([block.sum(dim=1) for block in blocks]).sqrt().float()


@dataclass
class Rows:
    """The rows at `indices` replaced."""

    indices: torch.Tensor
    values: torch.Tensor

    def apply(self, before: Before, rows: Range, columns: Range) -> torch.Tensor:
        tensor = before(rows, columns)
        first = rows[0] if rows else 0
        inside = (self.indices >= first) & (self.indices < first + tensor.shape[0])
        return tensor.index_copy(0, self.indices[inside] - first, cut(self.values[inside], None, columns))


@dataclass
class Added:
    """A vector added to a bias."""

    values: torch.Tensor

    def apply(self, before: Before, rows: Range, columns: Range) -> torch.Tensor:
        return before(rows, columns) + cut(self.values, rows, None)


Change = LowRank | Rows | Added


@dataclass(kw_only=True)
class MergedTensor:
    """A tensor of the merged model: the original, and the changes to it in order."""

    reader: WeightReader
    key: str
    shape: tuple[int, ...]
    changes: list[Change]

    def read(self, rows: Range, columns: Range) -> torch.Tensor:
        return self._after(len(self.changes), rows, columns)

    def _after(self, count: int, rows: Range, columns: Range) -> torch.Tensor:
        if not count:
            tensor = self.reader.read(self.key, rows or (0, self.shape[0]), columns)
            return tensor.float() if self.changes else tensor
        return self.changes[count - 1].apply(lambda *part: self._after(count - 1, *part), rows, columns)
