"""Which replica a request goes to: one that has its beginning in the cache, unless others have much less to do.

Each gateway remembers where it sent which beginnings. Beginnings that it does not know go where rendezvous hashing of
their first block says, which is the same replica in every gateway.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cqil_trt.serving.refusals import Refused

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


@dataclass(frozen=True)
class State:
    """What a replica says of itself.

    `url`: where its server listens, without a path. `key`: what the server wants from gateways. `status`: "ready", or
    why it takes no requests. `others`: how many requests it has from other gateways.
    """

    name: str
    url: str
    key: str
    status: str
    others: int = 0


@dataclass(eq=False)
class Destination:
    """A replica as a gateway knows it. `own`: how many requests it has from this gateway."""

    state: State
    own: int = 0
    reachable: bool = True

    @property
    def load(self) -> int:
        return self.own + self.state.others

    @property
    def takes_requests(self) -> bool:
        return self.reachable and self.state.status == "ready"


@dataclass(eq=False)
class _Waiting:
    digests: Sequence[bytes]
    avoid: Sequence[str]
    found: asyncio.Future[Destination] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Router:
    """The replicas that a gateway knows, and the requests that wait for one of them, first come, first served."""

    def __init__(self, most: int, max_waiting: int, slack: int):
        """Args: `most` requests at a time in a replica; at most `max_waiting` requests wait here; `slack`: how many
        more requests than the replica with the fewest one may have that is preferred for a prompt's beginning."""
        self._most, self._max_waiting, self._slack = most, max_waiting, slack
        self._memory = Memory()
        self._waiting: deque[_Waiting] = deque()
        self.replicas: dict[str, Destination] = {}

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def update(self, states: Iterable[State]) -> None:
        """Takes in what all the replicas that there are have just said."""
        found = {}
        for state in states:
            replica = found[state.name] = self.replicas.get(state.name) or Destination(state)
            replica.state, replica.reachable = state, True
        self.replicas = found
        self._serve_waiting()

    async def take(self, digests: Sequence[bytes], avoid: Sequence[str], seconds: float) -> Destination:
        """The replica for a request with these beginnings, preferably none of `avoid`, which has it until `release`.

        Raises Refused: 429 if too many requests wait, 503 if none was free within `seconds`.
        """
        if not self._waiting and (replica := self._choose(digests, avoid)):
            return self._begin(replica, digests)
        if len(self._waiting) >= self._max_waiting:
            raise Refused(429, "too many requests are waiting, no more are taken", retry=1)
        entry = _Waiting(digests, avoid)
        self._waiting.append(entry)
        timer = asyncio.get_running_loop().call_later(seconds, self._expire, entry, seconds)
        try:
            return await entry.found
        except asyncio.CancelledError:
            if entry.found.done() and not entry.found.cancelled() and entry.found.exception() is None:
                self.release(entry.found.result())
            raise
        finally:
            timer.cancel()
            if entry in self._waiting:
                self._waiting.remove(entry)

    def release(self, replica: Destination, reachable: bool = True) -> None:
        """`reachable`: whether the replica's server answered; otherwise it gets no requests until it says how it is."""
        replica.own -= 1
        replica.reachable &= reachable
        self._serve_waiting()

    def _expire(self, entry: _Waiting, seconds: float) -> None:
        if not entry.found.done():
            entry.found.set_exception(Refused(503, f"no replica was free within {seconds:g} s", retry=5))

    def _serve_waiting(self) -> None:
        while self._waiting:
            entry = self._waiting[0]
            if not entry.found.done():
                replica = self._choose(entry.digests, entry.avoid)
                if replica is None:
                    return
                entry.found.set_result(self._begin(replica, entry.digests))
            self._waiting.popleft()

    def _begin(self, replica: Destination, digests: Sequence[bytes]) -> Destination:
        replica.own += 1
        self._memory.note(digests, replica.state.name)
        return replica

    def _choose(self, digests: Sequence[bytes], avoid: Sequence[str]) -> Destination | None:
        able = {name: replica for name, replica in self.replicas.items() if replica.takes_requests}
        able = {name: replica for name, replica in able.items() if name not in avoid} or able
        free = [replica for replica in able.values() if replica.load < self._most]
        if not free:
            return None
        if digests:
            names = list(able)
            preferred = able[self._memory.find(digests, names) or appointed(digests[0], names)]
            fewest = min(replica.load for replica in free)
            if preferred.load < self._most and preferred.load - fewest <= self._slack:
                return preferred
        # The others' requests are known with a delay: gateways that all took the shortest queue would fill it at once.
        return min(random.sample(free, min(2, len(free))), key=lambda replica: replica.load)
