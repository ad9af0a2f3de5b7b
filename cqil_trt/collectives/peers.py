"""The communicators of the ranks that join within one engine, and their agreement on errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from cqil_trt.errors import UserError
from cqil_trt.schedule import Peers

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")


def split(comm: MPI.Comm, peers: Mapping[Peers, range]) -> dict[Peers, MPI.Comm]:
    """A communicator for each kind of peers (`RankPlan.peers`); kinds with the same ranks share one.

    `comm`: of all the engine's ranks, in rank order. All of them call it together.
    """
    everyone = len(peers[Peers.ALL])
    return {
        kind: comm if len(ranks) == everyone else comm.Split(ranks[0], comm.Get_rank()) for kind, ranks in peers.items()
    }


def agree(comm: MPI.Comm | None, make: Callable[[], T]) -> T:
    """Runs `make` on every rank; if any raises UserError, every rank raises the first one.

    For what may fail on some ranks only while the others go on to a collective. `comm`: None for one rank.
    """
    result: T | None = None
    failure = None
    try:
        result = make()
    except UserError as error:
        if comm is None:
            raise
        failure = str(error)
    if comm is not None:
        failure = next((text for text in comm.allgather(failure) if text is not None), None)
    if failure is not None:
        raise UserError(failure)
    return result  # type: ignore[return-value]
