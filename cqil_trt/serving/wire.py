"""Messages between the processes of a server: pickled frames over Unix sockets. A frame costs a few microseconds.

The sockets are in a directory that only this user can enter, or were inherited, so frames are as trusted as the code.
"""

from __future__ import annotations

import contextlib
import pickle
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cqil_trt import cores
from cqil_trt.errors import JobError
from cqil_trt.files import HeldDirectory
from cqil_trt.sampling import Choice, SamplingConfig

_LENGTH = struct.Struct("<I")
# For so long after its last work a process that serves a GPU does not sleep: waking it would take part of every first
# token's time.
AWAKE_SECONDS = 1.0
# Room for what a step says while the reader is late; the system may allow less (net.core.wmem_max).
_BUFFER_BYTES = 8 << 20
# Read at a time. For much more the C library maps memory anew for each read, which takes longer than the read.
_READ_BYTES = 1 << 16
_READS = 16  # at most, of one poll


def has_cores(ranks: int) -> bool:
    """Whether this machine has cores to spare, so that nothing needs the one that a waiting process keeps.

    This process may be bound to one core, which says nothing.
    """
    return cores.of_machine() > 2 * ranks


class Closed(JobError):
    """The process at the other end is gone; the message names it."""


def pack(message: Any) -> bytes:
    """A frame: 4 bytes with the length, little-endian, and the pickled message."""
    body = pickle.dumps(message, protocol=5)
    return _LENGTH.pack(len(body)) + body


class Inbox:
    """The messages of frames that arrive in pieces: iterating takes those that are complete."""

    def __init__(self) -> None:
        self._received = bytearray()

    def add(self, data: bytes) -> None:
        self._received += data

    def __iter__(self) -> Iterator[Any]:
        while len(self._received) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._received)[0]
            if len(self._received) < end:
                return
            message = pickle.loads(self._received[_LENGTH.size : end])
            del self._received[:end]
            yield message


class Connection:
    """One end of a socket. `receive` waits; `poll` does not. `peer`: the other end, for messages."""

    def __init__(self, sock: socket.socket, peer: str):
        self.socket, self.peer = sock, peer
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        self._poll = select.poll()  # select.select knows the first 1,024 descriptors only
        self._poll.register(sock, select.POLLIN)
        self._inbox = Inbox()

    def send(self, message: Any) -> None:
        """Raises Closed if the other end is gone."""
        self.write(pack(message))

    def write(self, frame: bytes) -> None:
        """Sends a frame of `pack`, for messages that several get. Raises Closed if the other end is gone."""
        try:
            self.socket.sendall(frame)
        except OSError:
            raise self._closed() from None

    def receive(self, awake: float = 0.0) -> Any:
        """The next message. Raises Closed at the end.

        For `awake` seconds it looks again and again: a process that sleeps until a message comes starts later.
        """
        end = time.monotonic() + awake
        while True:
            for message in self._inbox:
                return message
            if time.monotonic() >= end or self._readable(0):
                self._read()

    def poll(self, seconds: float) -> list[Any]:
        """The messages that are there, after at most `seconds` if there is none. Raises Closed at the end."""
        messages = list(self._inbox)
        if self._readable(0 if messages else seconds):
            read, reads = self._read(), 1
            # A message may take several reads. Their number is limited for a sender that never pauses.
            with contextlib.suppress(Closed):  # after these messages, the next poll raises it
                while read == _READ_BYTES and reads < _READS and self._readable(0):
                    read, reads = self._read(), reads + 1
        return [*messages, *self._inbox]

    def _readable(self, seconds: float) -> bool:
        return bool(self._poll.poll(seconds * 1e3))

    def _read(self) -> int:
        """The number of bytes that were read."""
        try:
            found = self.socket.recv(_READ_BYTES)
        except OSError:
            raise self._closed() from None
        if not found:
            raise self._closed()
        self._inbox.add(found)
        return len(found)

    def _closed(self) -> Closed:
        return Closed(f"{self.peer} has ended")

    def close(self) -> None:
        self.socket.close()


def receive_one(sock: socket.socket) -> Any:
    """The next message, and not a byte of what follows it, which somebody else is to read. Raises Closed at the end."""
    size = _LENGTH.size
    header = sock.recv(size, socket.MSG_WAITALL)
    body = b""
    if len(header) == size:
        [size] = _LENGTH.unpack(header)
        body = sock.recv(size, socket.MSG_WAITALL)
    if len(body) != size:
        raise Closed("the sender has ended")
    return pickle.loads(body)


def say(*lines: str) -> None:
    """Prints to standard error, whose reader may be gone: that must not keep anything from going on."""
    with contextlib.suppress(OSError, ValueError):
        print(*lines, sep="\n", file=sys.stderr, flush=True)


class Rendezvous(HeldDirectory):
    """Sockets in a directory of their own, where the processes of a server find each other while it starts."""

    def __init__(self) -> None:
        super().__init__("cqil-serve-")

    def listen(self, name: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.path / name))
        listener.listen(64)
        return listener


def connect(path: Path, peer: str) -> Connection:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(path))
    return Connection(sock, peer)


# From the HTTP process to rank 0


@dataclass(frozen=True, kw_only=True)
class Add:
    """A request. `number` names it; `grammar`: what its answer must follow, in llguidance's form."""

    number: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    sampling: SamplingConfig
    scored: int | None = None
    grammar: str | None = None


@dataclass(frozen=True, kw_only=True)
class Abort:
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Stop:
    """End the job, with exit code 0 if all ranks hold the same."""


# From rank 0 to the HTTP process


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The engine is loaded and warm.

    `slots`: sequences in the KV cache, `rows`: sequences at the same time, `device`: "cuda" or "cpu".
    """

    slots: int
    rows: int
    device: str


@dataclass(frozen=True)
class GivenUp:
    """The engine cannot be loaded, which rank 0 reports itself."""


@dataclass(frozen=True)
class Draining:
    """Rank 0 was told to end (SIGTERM). `now`: for the second time."""

    now: bool


@dataclass(frozen=True, kw_only=True)
class News:
    """What happened to a request.

    The first one says nothing else: the request has left the queue. `finish_reason`: "", eos, length, or error with
    `error` saying why. `cached`: prompt tokens that were reused. `prompt_logprobs`: of each prompt token from
    `Add.scored` + 1 on, as in `Choice.logprobs`.
    """

    number: int
    choices: tuple[Choice, ...] = ()
    finish_reason: str = ""
    cached: int = 0
    error: str = ""
    prompt_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Drafts:
    """How many sequences of a step had drafts, how many tokens those were, and how many of them were chosen."""

    number: int = 0
    tokens: int = 0
    accepted: int = 0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a turn of the loop gave, and the state after it.

    `step_seconds`: time since the turn before if both decoded. `usage`: the part of the KV cache in use.
    """

    news: tuple[News, ...] = ()
    running: int = 0
    waiting: int = 0
    usage: float = 0.0
    step_seconds: float | None = None
    tokens: int = 0
    drafts: Drafts = Drafts()


# From every rank to the HTTP process


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A sign of life. `busy_since`: CLOCK_MONOTONIC when what the rank is doing began, None if it waits for work."""

    rank: int
    process: int
    busy_since: float | None
    doing: str = ""


# From the HTTP process to every rank


@dataclass(frozen=True)
class Heard:
    """The answer to a Beat."""


# The header with which a gateway shows that it is one.
GATEWAY_HEADER = "x-cqil-gateway"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the HTTP process needs to know, sent first. Times in seconds, sizes in bytes.

    `keys`: API keys, none for no check. `gateway_key`: what every request must have in GATEWAY_HEADER, None for no
    check. `certificate`, `key`: files for TLS. `step_seconds`: None for the limit of the device (client.STEP_SECONDS).
    `parent`: the process without which the server ends.
    """

    engine: str
    model_names: tuple[str, ...]
    keys: tuple[str, ...] = ()
    gateway_key: str | None = None
    certificate: str | None = None
    key: str | None = None
    max_waiting: int = 256
    max_body_bytes: int = 4 << 20
    queue_seconds: float = 60.0
    request_seconds: float = 600.0
    drain_seconds: float = 30.0
    step_seconds: float | None = None
    log_text: bool = False
    log_requests: bool = True
    parent: int | None = None
