"""The communicators of the ranks that join within one engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cqil_trt.schedule import Peers, RankSchedule

if TYPE_CHECKING:
    from mpi4py import MPI


def split(comm: MPI.Comm, schedule: RankSchedule) -> dict[Peers, MPI.Comm]:
    """A communicator for each kind of peers that this rank has; kinds with the same ranks share one.

    `comm`: of all the engine's ranks, in rank order. All of them call it together.
    """
    found = {Peers.ALL: comm}
    for kind in (Peers.LAYER, Peers.PART):
        ranks = schedule.peers(kind)
        if len(ranks) == schedule.world_size:
            found[kind] = comm
        elif len(ranks) > 1:
            found[kind] = comm.Split(ranks[0], schedule.rank)
    return found
