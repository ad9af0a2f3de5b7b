"""Quantizes matrices as they are read."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch

from cqil_trt.errors import UserError
from cqil_trt.weights.quantized.matrix import QuantizedMatrix, hold
from cqil_trt.weights.quantized.rounding import quantize
from cqil_trt.weights.reader import Range, WeightReader

# Elements that are quantized at a time.
_BLOCK_ELEMENTS = 1 << 22


class QuantizingReader(WeightReader):
    """`base` with some matrices quantized; `read` gives their dequantized values, float32.

    `stored`: the format of each of these matrices, by name. `dtype`: the engine's type. `copies`: those that are a
    quantized copy of another matrix of `base`, and its name. A few matrices stay in memory (`HELD`).
    """

    def __init__(
        self, base: WeightReader, stored: Mapping[str, str], dtype: str, copies: Mapping[str, str] | None = None
    ):
        self.source, self.note, self._base = base.source, base.note, base
        self._stored, self._dtype, self._copies = dict(stored), getattr(torch, dtype), copies or {}
        self._held: dict[str, QuantizedMatrix] = {}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes = self._base.shapes()
        return {**shapes, **{name: shapes[source] for name, source in self._copies.items()}}

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._stored else self._base.dtype(name)

    def read(self, name: str, rows: Range = None, columns: Range = None) -> torch.Tensor:
        matrix = self.quantized(name) if name in self._stored else None
        return self._base.read(name, rows, columns) if matrix is None else matrix.dequantize(rows, columns)

    @property
    def quantized_names(self) -> Set[str]:
        return self._stored.keys() | self._base.quantized_names

    def quantized(self, name: str) -> QuantizedMatrix | None:
        if name not in self._stored:
            return self._base.quantized(name)
        return hold(self._held, name, lambda: self._quantize(name))

    def _quantize(self, name: str) -> QuantizedMatrix:
        height, width = self.shapes()[name]
        step = max(1, _BLOCK_ELEMENTS // width)
        parts = []
        for row in range(0, height, step):
            block = self._base.read(self._copies.get(name, name), (row, min(row + step, height))).float()
            if not torch.isfinite(block).all():
                raise UserError(f"{self.source}: {name} holds a value that is not finite, which cannot be quantized")
            parts.append(quantize(block, self._stored[name], self._dtype))
        zeros = [part.zeros for part in parts if part.zeros is not None]
        return QuantizedMatrix(
            codes=torch.cat([part.codes for part in parts]),
            scales=torch.cat([part.scales for part in parts]),
            zeros=torch.cat(zeros) if zeros else None,
            bits=parts[0].bits,
            rows=1,
            group=parts[0].group,
        )
