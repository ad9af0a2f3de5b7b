"""Collectives over MPI for tensors in host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cqil_trt.collectives.base import Communicator

if TYPE_CHECKING:
    import numpy as np
    import torch
    from mpi4py import MPI


class HostCommunicator(Communicator):
    """Every rank gathers all parts and adds them itself, in rank order: no reduction order is left to MPI."""

    def __init__(self, comm: MPI.Comm):
        self._comm = comm
        self.rank: int = comm.Get_rank()
        self.world_size: int = comm.Get_size()

    def all_reduce_residual(self, delta: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return (self._sum(delta) + residual.float()).to(delta.dtype)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self._sum(x).to(x.dtype)

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x in float32."""
        parts = x.new_empty(self.world_size, *x.shape)
        self._comm.Allgather(_bytes(x), _bytes(parts))
        return _ordered_sum(parts)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        self._comm.Bcast(_bytes(x), root=0)
        return x

    def bypass(self, x: torch.Tensor, d: int) -> torch.Tensor | None:
        x = x.contiguous()
        sources = range(max(0, self.rank - d), self.rank)
        targets = range(self.rank + 1, min(self.rank + d + 1, self.world_size))
        parts = x.new_empty(len(sources), *x.shape)
        receives = [self._comm.Irecv(_bytes(part), source) for part, source in zip(parts, sources)]
        sends = [self._comm.Isend(_bytes(x), target) for target in targets]
        for request in receives + sends:
            request.Wait()
        return _ordered_sum(parts).to(x.dtype) if len(sources) else None

    def argmax(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        import torch

        # Index and value as one float64 pair: token ids are exact in it.
        mine = torch.stack((values.double(), -indices.double()))
        parts = mine.new_empty(self.world_size, *mine.shape)
        self._comm.Allgather(_bytes(mine), _bytes(parts))
        best = parts[0]
        for part in parts[1:]:
            better = (part[0] > best[0]) | ((part[0] == best[0]) & (part[1] > best[1]))
            best = torch.where(better, part, best)
        return (-best[1]).long()

    def gather_columns(self, x: torch.Tensor, widths: list[int]) -> torch.Tensor:
        rows = x.shape[0]
        parts = x.new_empty(rows * sum(widths))
        counts = [rows * width * x.element_size() for width in widths]
        self._comm.Allgatherv(_bytes(x), (_bytes(parts), counts))
        import torch

        columns = parts.split([rows * width for width in widths])
        return torch.cat([part.view(rows, width) for part, width in zip(columns, widths)], dim=1)


def _ordered_sum(parts: torch.Tensor) -> torch.Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as bytes, because MPI lacks some of the types."""
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy()
