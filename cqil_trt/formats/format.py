"""Tensors of an engine, and the interface of the formats that they are stored in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from cqil_trt.config import DTYPE_BYTES
from cqil_trt.errors import UserError

if TYPE_CHECKING:
    import torch

    from cqil_trt.weights import WeightReader

# Elements per block: small enough that a block and its float32 copy stay in the caches while an adapter is
# merged, large enough that a block's matrix product is efficient.
BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Piece:
    """Rows and columns of a checkpoint tensor; None means all of them."""

    source: str
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a safetensors file. `dtype`: one of DTYPE_BYTES."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class RankTensor(StoredTensor):
    """A tensor of a rank's engine: `pieces` stacked along the first axis and rounded.

    A format whose tensors are made in another way derives a class from this one.
    """

    pieces: tuple[Piece, ...]

    def blocks(self, reader: WeightReader) -> Iterator[torch.Tensor]:
        """The elements in order, in contiguous blocks of bounded size and of type `dtype`.

        Raises UserError for a value that is not finite, or that `dtype` cannot hold.
        """
        import torch

        dtype = getattr(torch, self.dtype)
        for piece in self.pieces:
            shape = reader.shapes()[piece.source]
            first, last = piece.rows or (0, shape[0])
            step = max(1, BLOCK_ELEMENTS // (shape[1] if len(shape) > 1 else 1))
            for row in range(first, last, step):
                block = reader.read(piece.source, (row, min(row + step, last)), piece.columns)
                yield rounded(block, dtype, f"{reader.source}: {piece.source}")


def rounded(block: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The block, of floats of tensor `name`, in type `dtype`, contiguous.

    Raises UserError for a value that is not finite, or that `dtype` cannot hold.
    """
    found = block.to(dtype).contiguous()
    if _is_finite(found):
        return found
    if not block.isfinite().all():
        raise UserError(f"{name} holds a value that is not finite")
    value = block.flatten()[block.abs().argmax()]
    kinds = {"bfloat16": value.bfloat16(), "float32": value.float()}
    wider = [f": use --dtype {kind}" for kind, cast in kinds.items() if cast.isfinite()]
    raise UserError(
        f"{name} holds {value:.6g}, which {str(dtype).removeprefix('torch.')} cannot hold{''.join(wider[:1])}"
    )


def _is_finite(block: torch.Tensor) -> bool:
    """Whether all values of a contiguous block, in memory or on a GPU, are finite.

    In memory: the bits of numbers of one sign are integers in the same order, with infinities and NaNs at the end;
    numbers below zero are those whose highest bit is set. Two maxima need no memory, and `torch.isfinite` takes many
    times as long.
    """
    import torch

    if not block.is_cpu:
        return bool(block.isfinite().all())
    signed, unsigned, width = (torch.int16, "u2", 16) if block.dtype.itemsize == 2 else (torch.int32, "u4", 32)
    infinity = int(torch.tensor(torch.inf, dtype=block.dtype).view(signed))
    bits = block.view(signed).numpy()
    return not bits.size or bool(bits.max() < infinity and bits.view(unsigned).max() < infinity + (1 << width - 1))


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
    """How the projections of layers are stored.

    Everything else is dense in every format: norms, the embedding table, and the last projection, which may be a view
    of that table. `group`: columns of a row that share a scale, 0 where the format has no groups. `quantized`: whether
    the matrices must be quantized when they are read (`WeightReader.quantized`).
    """

    quantized = False
    group = 0

    def with_groups(self, size: int) -> WeightFormat:
        """The format with groups of so many columns. Raises UserError for one without groups."""
        raise UserError(f"weights in groups of {size}: this format has no groups")

    @abstractmethod
    def tensors(self, projection: Projection, dtype: str) -> tuple[RankTensor, ...]:
        """The tensors of a projection, in the order in which the network reads them. `dtype`: the engine's."""
