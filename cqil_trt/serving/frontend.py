"""The HTTP process: `python -m cqil_trt.serving.frontend CONTROL MONITOR LISTEN`, file descriptors that it inherits.

CONTROL is connected to rank 0, which sends a `wire.Setup` first; every rank connects to MONITOR; clients to LISTEN.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cqil_trt.engine import Engine
from cqil_trt.llm import end_tokens
from cqil_trt.serving import wire
from cqil_trt.serving.app import Server
from cqil_trt.serving.client import EngineClient
from cqil_trt.serving.gate import Gate
from cqil_trt.serving.metrics import Metrics
from cqil_trt.serving.streams import Joined
from cqil_trt.tokenizer import Tokenizer, has_tokenizer

try:
    from uvloop import new_event_loop
except ModuleNotFoundError:  # slower, and otherwise the same
    from asyncio import new_event_loop


# What a request may have before its body (request line and headers), and how long that may take to arrive.
_HEAD_BYTES = 64 << 10
_HEAD_SECONDS = 60.0


class _Protocol(HttpToolsProtocol):
    """A client's connection. Uvicorn takes a head of any length, in any time, before anybody looks for a key."""

    _heading, _head = False, 0  # whether one has begun and is not complete, and the bytes of it
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(Joined(transport))  # type: ignore[arg-type]
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._heading:
            self._head += len(data)
            if self._head > _HEAD_BYTES:
                self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._heading, self._head = True, 0
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._heading = False
        self._stop_timer()
        super().on_headers_complete()

    def _expect_head(self) -> None:
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(_HEAD_SECONDS, self._expire)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._expect_head()  # the request before is still being answered
        else:
            self._refuse(b"408 Request Timeout")

    def _refuse(self, status: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()


class _Uvicorn(uvicorn.Server):
    """Signals are rank 0's matter."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(setup: wire.Setup, control: socket.socket, monitor: socket.socket, listener: socket.socket) -> int:
    """Serves until the engine ends; returns the exit code."""
    path = Path(setup.engine)
    engine = Engine.open(path)
    tokenizer = Tokenizer(path) if has_tokenizer(path) else None
    metrics = Metrics(setup.model_names[0], engine.limits.max_seq_len)
    address = listener.getsockname()
    client = EngineClient(setup, address if isinstance(address, str) else address[:2], control, monitor, metrics)
    await client.start()
    if setup.parent is not None:
        client.end_with(setup.parent)
    server = Server(client, engine, tokenizer, end_tokens(engine, tokenizer))
    if server.grammars is not None:
        server.grammars.start()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, client.drain)
    gate = Gate(server, setup, metrics)
    config = uvicorn.Config(
        gate,
        http=_Protocol,
        log_level="error",
        access_log=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,  # nothing asks who the client is
        timeout_keep_alive=75,
        timeout_graceful_shutdown=2,
        ssl_certfile=setup.certificate,
        ssl_keyfile=setup.key,
        server_header=False,
        date_header=False,
    )
    http = _Uvicorn(config)
    gc.collect()  # what lives as long as the server need not be walked again
    gc.freeze()
    serving = asyncio.create_task(http.serve([listener]))
    ending = asyncio.create_task(client.ended.wait())
    await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        client.fail(f"the HTTP server has ended ({serving.exception()})")
        await ending
    http.should_exit = True
    with contextlib.suppress(Exception):  # it was told
        await serving
    gate.write_log()
    return client.exit_code


def main(arguments: list[str]) -> int:
    control, monitor, listener = (socket.socket(fileno=int(number)) for number in arguments)
    try:
        setup: Any = wire.receive_one(control)
    except wire.Closed:
        return 1
    # The rank that started this process may be bound to one core, which it keeps busy.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    # Each client takes a descriptor; the usual limit of 1,024 is for programs that call select.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for sock in (control, monitor, listener):
        sock.setblocking(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not asyncio.run: it would cancel what listens to the ranks, and wait for threads.
    return new_event_loop().run_until_complete(serve(setup, control, monitor, listener))


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
