"""How an engine stores weights: the tensors of a projection, and how they are made of the checkpoint's.

A projection is named (`layers.3.qkv`); its tensors are `NAME.weight`, `NAME.bias` and whatever else a format needs. The
decoder knows the name alone, so a new format is a class here and a product in each backend that takes it.
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

# Elements handled at a time: small enough that a block and its float32 copy stay in the caches while an adapter is
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
    """A tensor of a rank's engine, made of `pieces` stacked along the first axis. `dtype`: one of DTYPE_BYTES."""

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
    """A rank's share of a linear map, before it is decided how it is stored.

    Attributes:
        name: e.g. `layers.3.qkv`.
        outputs, inputs: rows and columns of the matrix.
        weight: what the matrix is made of; `bias`: likewise, empty without one.
    """

    name: str
    outputs: int
    inputs: int
    weight: tuple[Piece, ...]
    bias: tuple[Piece, ...] = ()


class WeightFormat(ABC):
    """How projections are stored. What is no projection (norms, the embedding table) is dense in every format."""

    @abstractmethod
    def tensors(self, projection: Projection) -> tuple[RankTensor, ...]:
        """The tensors of a projection, in the order in which they are read."""

    @abstractmethod
    def blocks(self, tensor: RankTensor, reader: WeightReader) -> Iterator[torch.Tensor]:
        """The elements of one of those tensors in order, in contiguous blocks of bounded size and the tensor's type."""


@dataclass(frozen=True)
class Dense(WeightFormat):
    """Matrices as they are, rounded to `dtype`."""

    dtype: str

    def tensors(self, projection: Projection) -> tuple[RankTensor, ...]:
        weight = self.tensor(f"{projection.name}.weight", (projection.outputs, projection.inputs), projection.weight)
        if not projection.bias:
            return (weight,)
        return weight, self.tensor(f"{projection.name}.bias", (projection.outputs,), projection.bias)

    def tensor(self, name: str, shape: tuple[int, ...], pieces: tuple[Piece, ...]) -> RankTensor:
        """A tensor that is no projection's: a norm's weights, the embedding table."""
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
