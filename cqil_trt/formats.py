"""How an engine stores weights: the tensors of a projection, and how they are made from the checkpoint's.

A projection has a name (`layers.3.qkv`); its tensors are `NAME.weight`, `NAME.bias` and whatever else a format needs.
The decoder knows only the name, so a new format is a class here and a matrix product in each backend that supports it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from cqil_trt.config import DTYPE_BYTES

if TYPE_CHECKING:
    import torch

    from cqil_trt.weights import WeightReader

# Elements per block: small enough that a block and its float32 copy stay in the caches while an adapter is
# merged, large enough that a block's matrix product is efficient.
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Piece:
    """Rows and columns of a checkpoint tensor; None means all of them."""

    source: str
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class RankTensor:
    """A tensor of a rank's engine: `pieces` stacked along the first axis. `dtype`: one of DTYPE_BYTES."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A rank's share of a linear map, regardless of how it is stored.

    Attributes:
        name: e.g. `layers.3.qkv`.
        outputs, inputs: rows and columns of the matrix.
        weight, bias: the pieces of the matrix and of the bias; empty without a bias.
    """

    name: str
    outputs: int
    inputs: int
    weight: tuple[Piece, ...]
    bias: tuple[Piece, ...] = ()


class WeightFormat(ABC):
    """How projections are stored. Other tensors (norms, the embedding table) are dense in every format."""

    @abstractmethod
    def tensors(self, projection: Projection) -> tuple[RankTensor, ...]:
        """The tensors of a projection, in the order in which they are read."""

    @abstractmethod
    def blocks(self, tensor: RankTensor, reader: WeightReader) -> Iterator[torch.Tensor]:
        """The elements of one of those tensors in order, in contiguous blocks of bounded size and the tensor's type."""


@dataclass(frozen=True)
class Dense(WeightFormat):
    """Plain matrices, rounded to `dtype`."""

    dtype: str

    def tensors(self, projection: Projection) -> tuple[RankTensor, ...]:
        weight = self.tensor(f"{projection.name}.weight", (projection.outputs, projection.inputs), projection.weight)
        if not projection.bias:
            return (weight,)
        return weight, self.tensor(f"{projection.name}.bias", (projection.outputs,), projection.bias)

    def tensor(self, name: str, shape: tuple[int, ...], pieces: tuple[Piece, ...]) -> RankTensor:
        """A plain tensor, e.g. a norm's weights or the embedding table."""
        return RankTensor(name=name, shape=shape, dtype=self.dtype, pieces=pieces)

    def blocks(self, tensor: RankTensor, reader: WeightReader) -> Iterator[torch.Tensor]:
        import torch

        dtype = getattr(torch, tensor.dtype)
        for piece in tensor.pieces:
            shape = reader.shapes()[piece.source]
            first, last = piece.rows or (0, shape[0])
            step = max(1, _BLOCK_ELEMENTS // (shape[1] if len(shape) > 1 else 1))
            for row in range(first, last, step):
                block = reader.read(piece.source, (row, min(row + step, last)), piece.columns)
                yield block.to(dtype).contiguous()
