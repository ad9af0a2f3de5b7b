"""The interface of a communicator, and the one for a world of a single rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Communicator(ABC):
    """Collectives over `world_size` ranks; every rank calls them in the same order.

    Tensors have the same shape and type on all ranks. Results are bit-identical on all ranks: sums run in rank order,
    in float32, and are rounded once.
    """

    rank: int
    world_size: int

    @abstractmethod
    def all_reduce_residual(self, delta: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual + the deltas of all ranks."""

    @abstractmethod
    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the x of all ranks."""

    @abstractmethod
    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's x; the other ranks pass a tensor to receive into."""

    @abstractmethod
    def bypass(self, x: torch.Tensor, d: int) -> torch.Tensor | None:
        """The sum of the x of ranks max(0, rank - d) … rank - 1; None when there are none.

        A rank waits only for those it receives from.
        """

    @abstractmethod
    def argmax(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The index of the largest of all ranks' candidates (value float32 [B], index int64 [B]), [B].

        Ties go to the smallest index, as in an argmax over the whole.
        """

    @abstractmethod
    def gather_columns(self, x: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """The float32 matrices [rows, widths[rank]] of all ranks side by side, on every rank."""


class LocalCommunicator(Communicator):
    """A world of one rank: nothing is exchanged."""

    rank = 0
    world_size = 1

    def all_reduce_residual(self, delta: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual + delta

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def bypass(self, x: torch.Tensor, d: int) -> None:
        return None

    def argmax(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return indices

    def gather_columns(self, x: torch.Tensor, widths: list[int]) -> torch.Tensor:
        return x
