"""What the quantized formats share: a matrix as codes, scales and perhaps zero points, W = (codes - zeros) * scales.

Codes are those of the whole matrix, whatever part of it a rank stores: an engine's weights do not depend on the number
of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cqil_trt.formats.format import BLOCK_ELEMENTS, Piece, Projection, RankTensor, WeightFormat, rounded

if TYPE_CHECKING:
    import torch

    from cqil_trt.weights import WeightReader
    from cqil_trt.weights.quantized import QuantizedMatrix


@dataclass(frozen=True, kw_only=True)
class MatrixPart(RankTensor):
    """The codes, scales or zero points of a projection.

    `group`: consecutive columns of the whole matrix with one scale in each row; 0: all of them. `inputs`: columns of
    the rank's matrix. `zeros`: whether there are zero points. `packed`: two codes of 4 bits in a byte, the lower half
    first.
    """

    part: str
    group: int
    inputs: int
    zeros: bool
    packed: bool = False

    @property
    def first(self) -> int:
        """The place within its group of the rank's first column."""
        columns = self.pieces[0].columns
        return columns[0] % self.group if self.group and columns else 0

    def blocks(self, reader: WeightReader) -> Iterator[torch.Tensor]:
        import torch

        for piece in self.pieces:
            part = self._of(reader.quantized(piece.source), piece)
            step = max(1, BLOCK_ELEMENTS // max(1, part[0].numel())) if len(part) else 1
            for row in range(0, len(part), step):
                found = part[row : row + step]
                if self.packed:
                    found = torch.nn.functional.pad(found, (0, found.shape[1] % 2))
                    found = found[:, ::2] | found[:, 1::2] << 4
                dtype = getattr(torch, self.dtype)
                if self.part == "scale":
                    found = rounded(found, dtype, f"{reader.source}: {piece.source}, in its scales,")
                # Flat, because a dimension of size 1 may have any stride.
                yield found.to(dtype).contiguous().view(-1)

    def _of(self, matrix: QuantizedMatrix | None, piece: Piece) -> torch.Tensor:
        if matrix is None or (matrix.zeros is not None) != self.zeros or not matrix.in_groups(self.group):
            raise RuntimeError(f"{piece.source} is not quantized as the engine stores it")
        height, width = matrix.codes.shape
        rows, columns = piece.rows or (0, height), piece.columns or (0, width)
        if self.part == "weight":
            return matrix.codes[rows[0] : rows[1], columns[0] : columns[1]]
        groups = (columns[0] // self.group, -(-columns[1] // self.group)) if self.group else (0, 1)
        found = matrix.scales if self.part == "scale" or matrix.zeros is None else matrix.zeros
        found = found[rows[0] : rows[1], groups[0] : groups[1]]
        return found if self.group else found[:, 0]


class QuantizedFormat(WeightFormat):
    """`NAME.weight`, the codes [outputs, inputs] (packed: [outputs, ceil(inputs / 2)]); `NAME.scale`; `NAME.zero` where
    there are zero points; `NAME.bias` where there is one. Scales and zero points are [outputs], or with groups
    [outputs, groups that the rank's columns touch].

    Attributes:
        codes: type of the codes.
        scales: type of the scales; None for the engine's.
        group: columns of a group; 0 for one scale for each row.
        zeros: whether there are zero points, uint8.
        packed: as in MatrixPart.
    """

    codes: str
    scales: str | None = "float32"
    zeros = False
    packed = False
    quantized = True

    def with_groups(self, size: int) -> WeightFormat:
        if not self.group:
            return super().with_groups(size)
        found = copy(self)
        found.group = size
        return found

    def tensors(self, projection: Projection, dtype: str) -> tuple[RankTensor, ...]:
        rows, columns = projection.outputs, projection.inputs
        span = projection.weight[0].columns or (0, columns)
        groups = -(-span[1] // self.group) - span[0] // self.group if self.group else 0
        small: tuple[int, ...] = (rows, groups) if self.group else (rows,)
        stored = rows, -(-columns // 2) if self.packed else columns
        kinds: dict[str, tuple[tuple[int, ...], str]] = {"weight": (stored, self.codes)}
        kinds["scale"] = small, self.scales or dtype
        if self.zeros:
            kinds["zero"] = small, "uint8"
        found: list[RankTensor] = [
            MatrixPart(
                name=f"{projection.name}.{part}",
                shape=shape,
                dtype=kind,
                pieces=projection.weight,
                part=part,
                group=self.group,
                inputs=columns,
                zeros=self.zeros,
                packed=self.packed and part == "weight",
            )
            for part, (shape, kind) in kinds.items()
        ]
        if projection.bias:
            name = f"{projection.name}.bias"
            found.append(RankTensor(name=name, shape=(rows,), dtype=dtype, pieces=projection.bias))
        return tuple(found)
