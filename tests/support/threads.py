"""Ranks as threads of this process, joined by what `HostCommunicator` calls of mpi4py."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np


class Comm:
    """One rank's end. Ranks meet at a barrier, where each sees what the others brought."""

    def __init__(self, rank, board, barrier, mail):
        self.rank, self.board, self.barrier, self.mail = rank, board, barrier, mail

    def Get_rank(self):  # noqa: N802
        return self.rank

    def Get_size(self):  # noqa: N802
        return len(self.board)

    def exchange(self, value):
        self.board[self.rank] = value
        self.barrier.wait(600)
        found = list(self.board)
        self.barrier.wait(600)
        return found

    def Split(self, color, key):  # noqa: N802
        found = self.exchange((color, key))
        members = sorted((rank for rank in range(len(found)) if found[rank][0] == color), key=lambda r: found[r][1])
        made = self.exchange(shared(len(members)))[members[0]]
        return Comm(members.index(self.rank), *made)

    def Allgather(self, mine, everyone):  # noqa: N802
        everyone[:] = np.concatenate(self.exchange(np.array(mine)))

    def Bcast(self, array, root=0):  # noqa: N802
        array[:] = self.exchange(np.array(array))[root]

    def Isend(self, array, target):  # noqa: N802
        with self.mail:
            self.mail.sent[self.rank, target] = np.array(array)
            self.mail.notify_all()
        return Request(lambda: None)

    def Irecv(self, array, source):  # noqa: N802
        def take():
            with self.mail:
                assert self.mail.wait_for(lambda: (source, self.rank) in self.mail.sent, 600)
                array[:] = self.mail.sent.pop((source, self.rank))

        return Request(take)


class Request:
    def __init__(self, wait):
        self.Wait = wait


def shared(ranks):
    """What the ends of a communicator share."""
    mail = threading.Condition()
    mail.sent = {}
    return [None] * ranks, threading.Barrier(ranks), mail


def together(ranks, work):
    """work(comm, rank) of every rank at once; the results in rank order."""
    board, barrier, mail = shared(ranks)

    def run(rank):
        try:
            return work(Comm(rank, board, barrier, mail), rank)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(run, rank) for rank in range(ranks)]
    errors = [error for error in (future.exception() for future in futures) if error]
    if errors:
        # A rank whose peer has failed finds a broken barrier: the peer's own error says what happened.
        raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))
    return [future.result() for future in futures]
