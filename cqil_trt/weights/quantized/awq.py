"""AWQ, as AutoAWQ's version "gemm" stores it.

`qweight` int32 [K, N / 8], `qzeros` int32 [K / g, N / 8], `scales` [K / g, N]. The i-th 4 bits of a word, the lowest
first, belong to column 0, 2, 4, 6, 1, 3, 5, 7 of its eight. W = (q - z) * s, transposed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cqil_trt.json_fields import Fields
from cqil_trt.weights.quantized.matrix import QuantizedMatrix, even_groups
from cqil_trt.weights.quantized.packing import unpack
from cqil_trt.weights.quantized.scheme import Module, Scheme, matrices
from cqil_trt.weights.reader import WeightReader

# The place within a word of each of its eight columns.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class Awq(Scheme):
    def __init__(self, config: Fields):
        super().__init__(config)
        bits = config.integer("bits", config.values.get("w_bit", 4), high=32)
        version = config.text("version", "gemm").lower()
        if bits != 4 or version != "gemm":
            raise self.fail(f"AWQ of {bits} bits, version {version!r:.40}, is not supported (4 bits, gemm is)")
        config.boolean("zero_point", True)  # zero points are stored either way
        self._size = config.integer("group_size", config.values.get("q_group_size", 128), low=-1)

    def describe(self) -> str:
        return "awq, 4 bits"

    def shapes(self, reader: WeightReader) -> dict[str, tuple[int, int]]:
        found = matrices(reader.shapes(), "qweight")
        return {name: (columns * 8, rows) for name, (rows, columns) in found.items()}

    def parts(self) -> Iterable[str]:
        return "qweight", "qzeros", "scales"

    def load(self, module: Module, shape: tuple[int, int]) -> QuantizedMatrix:
        height, width = shape
        size = width if self._size < 1 else self._size
        groups = -(-width // size)
        scales = module.scales("scales", (groups, height)).T
        codes = _in_order(module.words("qweight", (width, height // 8))).T
        zeros = _in_order(module.words("qzeros", (groups, height // 8))).T
        return QuantizedMatrix(codes=codes, bits=4, scales=scales, zeros=zeros, rows=1, group=even_groups(width, size))


def _in_order(words: torch.Tensor) -> torch.Tensor:
    return unpack(words, 4, 1).unflatten(1, (-1, 8))[:, :, list(_PLACES)].flatten(1)


SCHEME = Awq
