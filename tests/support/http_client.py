"""A small HTTP client on asyncio that does what good clients do not: goes away, reads nothing, sends nonsense."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit


class HttpConnection:
    """A connection for one request at a time. Not closed by errors: `async with`, or `close`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str):
        self._reader, self._writer, self._host = reader, writer, host
        self.status = 0
        self.headers: dict[str, str] = {}

    @classmethod
    async def open(cls, url: str, tls: ssl.SSLContext | None = None, receive_buffer: int | None = None) -> Any:
        parts = urlsplit(url)
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        assert parts.hostname == "127.0.0.1" and parts.port is not None
        try:
            await asyncio.get_running_loop().sock_connect(sock, (parts.hostname, parts.port))
            name = parts.hostname if tls is not None else None
            limit = 1 << 16 if receive_buffer is None else receive_buffer
            reader, writer = await asyncio.open_connection(sock=sock, ssl=tls, server_hostname=name, limit=limit)
        except BaseException:
            sock.close()
            raise
        return cls(reader, writer, parts.netloc)

    async def __aenter__(self) -> HttpConnection:
        return self

    async def __aexit__(self, *error: Any) -> None:
        self.abort()

    def abort(self) -> None:
        """Goes away without a word."""
        self._writer.transport.abort()

    async def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> None:
        """`body`: bytes, or a value to be sent as JSON."""
        raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"Host": self._host, "Content-Length": str(len(raw)), "Content-Type": "application/json"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in (fields | (headers or {})).items())
        self._writer.write(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + raw)
        await self._writer.drain()

    async def head(self) -> int:
        """Reads the status and the headers; returns the status."""
        text = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *rest = text.splitlines()
        self.status = int(first.split()[1])
        self.headers = {n.lower(): v.strip() for n, v in (line.split(":", 1) for line in rest if line)}
        return self.status

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises IncompleteReadError if it ends too early."""
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(await self._reader.readuntil(b"\r\n"), 16):
                yield (await self._reader.readexactly(size + 2))[:-2]
            await self._reader.readexactly(2)
        elif length := int(self.headers.get("content-length", 0)):
            yield await self._reader.readexactly(length)

    async def body(self) -> bytes:
        return b"".join([part async for part in self.parts()])

    async def events(self) -> AsyncIterator[str]:
        """The data of server-sent events."""
        buffer = b""
        async for part in self.parts():
            buffer += part
            *whole, buffer = buffer.split(b"\n\n")
            for event in whole:
                assert event.startswith(b"data: ")
                yield event[6:].decode()
        assert not buffer

    async def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """The answer's JSON; `status` and `headers` are set."""
        await self.send(method, path, body, headers)
        await self.head()
        return json.loads(await self.body())


async def ask(url: str, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, dict[str, str], Any]:
    """One request on a connection of its own: status, headers and JSON of the answer."""
    async with await HttpConnection.open(url, **options) as http:
        answer = await http.ask(method, path, body)
        return http.status, http.headers, answer


async def metric(url: str, name: str) -> float:
    """The value of a metric that has one series."""
    async with await HttpConnection.open(url) as http:
        await http.send("GET", "/metrics")
        await http.head()
        lines = (await http.body()).decode().splitlines()
    [value] = [line.split()[-1] for line in lines if line.startswith(name + "{")]
    return float(value)
