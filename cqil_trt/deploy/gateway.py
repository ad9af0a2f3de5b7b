"""What the clients of several replicas talk to: it chooses a replica for each request, and passes the answer on.

Requests and tokens go from the gateway to a replica's server over HTTP, not through Ray: one call of a Ray Serve handle
takes two to three milliseconds, several decode steps of a small model. What gateways and replicas say of themselves
goes through Ray, twice a second.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import aiohttp
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cqil_trt.deploy.exposition import merged
from cqil_trt.deploy.routing import Destination, Router, State, beginnings
from cqil_trt.serving.metrics import CONTENT_TYPE
from cqil_trt.serving.refusals import Refused, error_body, error_response
from cqil_trt.serving.streams import Gone, event, unless_gone
from cqil_trt.serving.wire import GATEWAY_HEADER

# A request that no replica has begun to answer is sent to another one: how often, and after how long.
_PAUSES = (0.0, 0.2, 1.0, 2.0, 4.0)
# How often replicas report their state: once one is ready, and before that.
_REPORT_SECONDS, _UNREADY_SECONDS = 0.5, 0.1
# How long a report may take, and how long it remains valid.
_ANSWER_SECONDS, _HOLDS_SECONDS = 5.0, 15.0
# How long a connection to a server may take, and after how long without a sign of life its host is taken for lost.
_CONNECT_SECONDS, _LOST_SECONDS = 3.0, 10
# Headers of one connection (RFC 9110, section 7.6.1), and those that the next hop writes itself; of requests also what
# asks for leave to send a body, and the gateway's own.
_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host", "content-length"}
_DROPPED = _HOP | {"expect", GATEWAY_HEADER}

Send = Callable[[Any], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Call:
    """A client's request, from its path on."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


class Gateway:
    """A Ray Serve deployment in front of the deployment `engine`, whose replicas answer `report`."""

    async def __init__(  # type: ignore[misc]
        self, engine: DeploymentHandle, most: int, slack: int, max_waiting: int, max_body_bytes: int, patience: float
    ):
        """Awaited by Ray. Args: those of `Router`; the longest body; seconds until a request that no replica takes
        is refused."""
        self._engine, self._limit, self._patience = engine, max_body_bytes, patience
        self._router = Router(most, max_waiting, slack)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._session = session()
        self._informed = 0.0
        self._informing = asyncio.create_task(self._keep_informed())

    async def check_health(self) -> None:
        """Ray replaces the gateway after this has raised a few times."""
        if self._informing.done():
            raise RuntimeError(f"the gateway asks no replica any more: {self._informing.exception()!r}")

    async def __call__(self, request: Request) -> Response:
        path = request.url.path
        if request.method in ("GET", "HEAD"):
            if path in ("/health", "/ready"):
                return self._status(path)
            if path == "/metrics":
                return await self._metrics(request)
        return _Live(self._serve)

    async def __del__(self) -> None:
        if (informing := getattr(self, "_informing", None)) is not None:
            informing.cancel()
            await self._session.close()

    async def _keep_informed(self) -> None:
        while True:
            replicas = self._router.replicas
            loads = {name: replica.own for name, replica in replicas.items()}
            try:
                asked = self._engine.broadcast("report", self._name, loads, self._router.waiting)
                answers = await asked.results_async(timeout_s=_ANSWER_SECONDS, return_exceptions=True)
            except (RayError, RayServeException, TimeoutError):
                pass  # no replica yet, or one that hangs until Ray replaces it
            else:
                self._informed = time.monotonic()
                self._router.update(answer for answer in answers if isinstance(answer, State))
            ready = any(replica.takes_requests for replica in self._router.replicas.values())
            await asyncio.sleep(_REPORT_SECONDS if ready else _UNREADY_SECONDS)

    async def _serve(self, request: Request, send: Send) -> None:
        """Reads the request and answers it, unless the client goes away."""
        body = bytearray()
        while (message := await request.receive())["type"] != "http.disconnect":
            body += message.get("body", b"")
            if len(body) > self._limit:
                refused = Refused(413, f"the body is larger than {self._limit} bytes")
                return await error_response(refused)(request.scope, request.receive, send)
            if not message.get("more_body", False):
                break
        else:
            return
        headers = tuple((k, v) for k, v in request.headers.items() if k not in _DROPPED)
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        try:
            failure = await unless_gone(request, self._answer(Call(request.method, target, headers, bytes(body)), send))
        except Gone:
            return
        if failure is not None:
            await failure(request.scope, request.receive, send)

    async def _answer(self, call: Call, send: Send) -> Response | None:
        """Passes on the first answer of a replica that works; otherwise returns the last one's failure, a 503."""
        failure: Response = error_response(Refused(503, "no replica has answered", retry=1))
        digests = beginnings(call.body)
        avoid: list[str] = []
        for pause in _PAUSES:
            await asyncio.sleep(pause)
            try:
                replica = await self._router.take(digests, avoid, self._patience)
            except Refused as refused:
                return error_response(refused)
            reachable = True
            try:
                async with self._session.request(
                    call.method,
                    replica.state.url + call.path,
                    headers=(*call.headers, (GATEWAY_HEADER, replica.state.key)),
                    data=call.body,
                    allow_redirects=False,
                ) as answer:
                    # 503 is the server's word for an engine that has failed, loads or drains, and for a full queue. A
                    # request that took too long has it too, but no Retry-After: it would take as long elsewhere.
                    if answer.status != 503 or "Retry-After" not in answer.headers:
                        reachable = await _pass_on(answer, send)
                        return None
                    failure = Response(await answer.read(), answer.status, dict(_kept(answer)))
            except (aiohttp.ClientError, asyncio.TimeoutError) as error:
                reachable = False
                failure = error_response(Refused(503, f"the replica failed: {type(error).__name__}", retry=1))
            finally:
                self._router.release(replica, reachable)
            avoid.append(replica.state.name)
        return failure

    def _status(self, path: str) -> Response:
        """200 if any replica is as it should be."""
        good = {"ready"} if path == "/ready" else {"ready", "draining"}
        known = self._router.replicas if time.monotonic() - self._informed < _HOLDS_SECONDS else {}
        found = {name: each.state.status if each.reachable else "unreachable" for name, each in known.items()}
        fine = any(status in good for status in found.values())
        word = ("ready" if path == "/ready" else "ok") if fine else "failed"
        return JSONResponse({"status": word, "replicas": found}, 200 if fine else 503, headers={"Retry-After": "1"})

    async def _metrics(self, request: Request) -> Response:
        headers = {k: v for k, v in request.headers.items() if k == "authorization"}
        known = self._router.replicas
        answers = await asyncio.gather(*(self._page(replica, headers) for replica in known.values()))
        if any(status == 401 for status, _ in answers):
            return error_response(Refused(401, "a valid API key is needed: Authorization: Bearer KEY"))
        pages = {name: page for name, (status, page) in zip(known, answers) if status == 200}
        return Response(await asyncio.to_thread(merged, pages), headers={"Content-Type": CONTENT_TYPE})

    async def _page(self, replica: Destination, headers: dict[str, str]) -> tuple[int, str]:
        try:
            async with self._session.get(
                f"{replica.state.url}/metrics",
                headers={**headers, GATEWAY_HEADER: replica.state.key},
                timeout=aiohttp.ClientTimeout(total=_ANSWER_SECONDS),
            ) as answer:
                return answer.status, await answer.text()
        except (aiohttp.ClientError, asyncio.TimeoutError):
            return 503, ""


class _Live(Response):
    """A response that does all its work while it is sent, so nothing is left when its client has gone before."""

    def __init__(self, work: Callable[[Request, Send], Coroutine[Any, Any, None]]):
        super().__init__()
        self._work = work

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._work(Request(scope, receive), send)


def session() -> aiohttp.ClientSession:
    """For requests to servers on any host of the cluster."""

    def connected(address: Any) -> socket.socket:
        family, kind, protocol, *_ = address
        made = socket.socket(family, kind, protocol)
        # A host that is gone without a word ends a connection on which nothing is sent.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _LOST_SECONDS // 2)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _LOST_SECONDS // 2)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _LOST_SECONDS)
        return made

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, socket_factory=connected),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
    )


def _kept(answer: aiohttp.ClientResponse) -> list[tuple[str, str]]:
    return [(k, v) for k, v in answer.headers.items() if k.lower() not in _HOP]


async def _pass_on(answer: aiohttp.ClientResponse, send: Send) -> bool:
    """Sends an answer as it comes. If the replica is lost, a stream of events ends with an error event.

    Returns whether the answer was complete.
    """
    headers = [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in _kept(answer)]
    complete, rest = True, b""
    if answer.content_type == "text/event-stream":
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        try:
            async for piece in answer.content.iter_any():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            complete = False
            rest = event(error_body(Refused(503, f"the replica failed: {type(error).__name__}", retry=1)))
    else:
        # Read first, so that an answer that breaks off can still come from another replica.
        rest = await answer.read()
        headers.append((b"content-length", str(len(rest)).encode()))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": rest, "more_body": False})
    return complete
