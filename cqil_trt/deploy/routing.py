"""Which replica a request goes to: one that has its beginning in the cache, unless others have much less to do.

Ray's own PrefixCacheAffinityRouter keeps the prompts in one actor: each request waits for calls to it, and all of them
fail when its node is lost. Here each gateway remembers where it sent which beginnings. Beginnings that it does not know
go where rendezvous hashing of their first block says, which is the same replica in every gateway.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

# Beginnings are compared in blocks of so many characters, or token ids.
BLOCK = 128
# How many of a prompt's blocks are looked at.
_MOST_BLOCKS = 256
# How many blocks a gateway remembers: a few megabytes.
_REMEMBERED = 100_000


def beginnings(body: bytes) -> tuple[bytes, ...]:
    """Digests of a request's first block, its first two blocks, … ; none if it has no prompt of one block."""
    try:
        found = json.loads(body)
        given = found.get("messages") or found.get("prompt")
    except (ValueError, AttributeError):
        return ()
    if isinstance(given, list) and given and isinstance(given[0], int):
        blocks = [json.dumps(given[first : first + BLOCK]) for first in range(0, len(given) - BLOCK + 1, BLOCK)]
    elif given:
        # What the template makes of tools comes first.
        text = given if isinstance(given, str) else json.dumps([found.get("tools"), given])
        blocks = [text[first : first + BLOCK] for first in range(0, len(text) - BLOCK + 1, BLOCK)]
    else:
        blocks = []
    digests = []
    state = hashlib.blake2b(digest_size=8)
    for block in blocks[:_MOST_BLOCKS]:
        state.update(block.encode(errors="replace"))
        digests.append(state.copy().digest())
    return tuple(digests)


class Memory:
    """Which replica has seen which beginnings last; the least recently used ones are forgotten."""

    def __init__(self, size: int = _REMEMBERED):
        self._size = size
        self._replicas: OrderedDict[bytes, str] = OrderedDict()

    def note(self, digests: Sequence[bytes], replica: str) -> None:
        for digest in digests:
            self._replicas[digest] = replica
            self._replicas.move_to_end(digest)
        while len(self._replicas) > self._size:
            self._replicas.popitem(last=False)

    def find(self, digests: Sequence[bytes], among: Sequence[str]) -> str | None:
        """The replica, one of `among`, that has seen the longest beginning."""
        for digest in reversed(digests):
            if (replica := self._replicas.get(digest)) in among:
                return replica
        return None


def appointed(digest: bytes, among: Sequence[str]) -> str:
    """The replica of `among` for an unknown beginning: rendezvous hashing (Thaler and Ravishankar, 1998)."""
    return max(among, key=lambda replica: hashlib.blake2b(replica.encode(), key=digest, digest_size=8).digest())


class PrefixRouter(RequestRouter):
    """Prefers the replica that has seen a prompt's beginning, then the shorter of two random queues.

    The request's first argument has `beginnings`, and `avoid`, the replicas that have failed it.
    """

    def initialize_state(self, slack: int = 4, **kwargs: Any) -> None:
        """`slack`: how many more requests than the replica with the fewest the preferred one may have."""
        self._slack = slack
        self._memory = Memory()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        call = pending_request.args[0] if pending_request is not None and pending_request.args else None
        avoided = getattr(call, "avoid", ())
        candidates = [r for r in candidate_replicas if r.replica_id.unique_id not in avoided] or candidate_replicas
        others = random.sample(candidates, min(2, len(candidates)))
        digests = getattr(call, "beginnings", ())
        if not digests or not candidates:
            return [others, candidates]
        names = {r.replica_id.unique_id: r for r in candidates}
        found = names[self._memory.find(digests, list(names)) or appointed(digests[0], list(names))]
        if self._behind(found, candidates) > self._slack:
            return [others, candidates]
        return [[found], others, candidates]

    def _behind(self, replica: RunningReplica, candidates: list[RunningReplica]) -> int:
        """How many more requests a replica has than the one with the fewest, as far as is known here."""
        lengths = {r.replica_id: self.replica_queue_len_cache.get(r.replica_id) or 0 for r in candidates}
        return lengths[replica.replica_id] - min(lengths.values())

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        if pending_request.args:
            self._memory.note(getattr(pending_request.args[0], "beginnings", ()), replica_id.unique_id)
