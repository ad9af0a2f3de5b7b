"""A quantized matrix in memory, whatever the checkpoint packs it in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from cqil_trt.weights.reader import Range, cut

# Matrices that a reader holds: a projection is made of up to three, whose codes, scales and zero points are read in
# turn.
HELD = 3
# Elements whose scales are spread out at a time.
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class QuantizedMatrix:
    """W [N, K] = (codes - zeros) * scales.

    Attributes:
        codes: int8, uint8 or float8_e4m3fn [N, K]. Those of 4 bits are unsigned.
        bits: of a code.
        scales: float32 [ceil(N / rows), G].
        zeros: of the codes' type, in the shape of the scales; None for 0.
        rows: consecutive rows that share their scales.
        group: int64 [K], which of the G scales of its row each column has.
    """

    codes: torch.Tensor
    bits: int
    scales: torch.Tensor
    zeros: torch.Tensor | None
    rows: int
    group: torch.Tensor

    @property
    def size(self) -> int | None:
        """Consecutive columns that form a group where each row has its own scales; 0: all; None: another order."""
        if self.rows != 1:
            return None
        if self.scales.shape[1] == 1:
            return 0
        size = int((self.group == 0).sum())
        return size if size and self.in_groups(size) else None

    def in_groups(self, size: int) -> bool:
        """Whether each row has its own scales, one for every `size` consecutive columns; 0: one for all."""
        width = len(self.group)
        return self.rows == 1 and torch.equal(self.group, even_groups(width, size or width, self.group.device))

    def by_row(self) -> QuantizedMatrix:
        """The same matrix with scales for each row, where all rows share one."""
        height = len(self.codes)
        if self.rows < height or len(self.scales) != 1:
            return self
        return replace(self, scales=self.scales.expand(height, -1), rows=1)

    def dequantize(self, rows: Range = None, columns: Range = None) -> torch.Tensor:
        """`W[rows, columns]`, float32: one subtraction, which is exact, and one product."""
        height, width = self.codes.shape
        first, last = rows or (0, height)
        begin, end = columns or (0, width)
        values = cut(self.codes, (first, last), (begin, end)).float()
        column = self.group[begin:end]
        step = max(1, _BLOCK_ELEMENTS // max(1, end - begin))
        for offset in range(0, last - first, step):
            block = values[offset : offset + step]
            row = torch.arange(first + offset, first + offset + len(block), device=column.device) // self.rows
            if self.zeros is not None:
                block -= self.zeros[row][:, column].float()
            block *= self.scales[row][:, column]
        return values


def hold(held: dict[str, QuantizedMatrix], name: str, make: Callable[[], QuantizedMatrix]) -> QuantizedMatrix:
    """The matrix `name` of those held, the one used last at the end; made if necessary, when another one goes."""
    if name not in held:
        while len(held) >= HELD:
            del held[next(iter(held))]
        held[name] = make()
    held[name] = held.pop(name)
    return held[name]


def even_groups(columns: int, size: int, device: torch.device | None = None) -> torch.Tensor:
    """The group of each column where `size` consecutive ones form a group."""
    return torch.arange(columns, device=device) // size
