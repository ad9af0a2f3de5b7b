"""Responses that last: server-sent events, and what happens when a client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

# A client that takes nothing for so long is given up.
_STALLED_SECONDS = 60.0


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


class Gone(Exception):
    """The client closed its connection."""


async def read_body(request: Request) -> bytes:
    """Raises Gone."""
    parts = []
    while (message := await request.receive())["type"] != "http.disconnect":
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
    raise Gone


async def unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled when the client closes its connection. Raises Gone then."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(disconnected())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        await ended(task, gone)


async def ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancels tasks and waits for their end.

    Until Python 3.12 `asyncio.wait_for` swallows a cancellation that comes just when what it waits for is done, so one
    is not enough.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=0.01)
    await asyncio.gather(*tasks, return_exceptions=True)


class Joined:
    """The transport of a client's connection, on which the head of a response leaves with the body's first part.

    Each write takes as long as making an event, and wakes the client.
    """

    def __init__(self, transport: asyncio.Transport):
        self._transport, self._head = transport, b""

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/"):
            self._head = data
            asyncio.get_running_loop().call_soon(self._flush)  # a body may be empty, or come later
            return
        self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._head and not self._transport.is_closing():
            self._transport.write(self._head)
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class EventStream(Response):
    """Server-sent events. Ends when the client has gone or takes nothing for long; `close` is called in any case.

    `events`: of each write, and whether more follow. The response begins with the first: what `events` raises before
    it, and Gone, are raised.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[tuple[bytes, bool]], close: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        sending: float | None = None  # since when the client takes nothing
        begun = False

        async def write() -> None:
            nonlocal sending, begun
            async for body, more in self._events:
                sending = time.monotonic()
                if not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": body, "more_body": more})
                sending = None

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        async def stalled() -> None:
            while sending is None or time.monotonic() - sending < _STALLED_SECONDS:
                await asyncio.sleep(_STALLED_SECONDS / 10)

        tasks = [asyncio.create_task(work()) for work in (write, gone, stalled)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                with contextlib.suppress(OSError):
                    tasks[0].result()
            elif not begun:
                raise Gone
        finally:
            self._close()
            await ended(*tasks)
