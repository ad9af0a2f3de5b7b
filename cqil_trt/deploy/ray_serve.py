"""The Ray Serve application: `serve run cqil_trt.deploy.ray_serve:application engine=DIR replicas=2`.

A client's request goes from Ray's proxy to a `Gateway`, from there to the `Replica` that the router chose, and over a
Unix socket to its server. Every replica is an actor with the resources of all its ranks in one bundle, so on one host.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import aiohttp
import ray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from cqil_trt.deploy.exposition import merged
from cqil_trt.deploy.routing import beginnings
from cqil_trt.deploy.server import EngineServer, launcher
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.serving.metrics import CONTENT_TYPE
from cqil_trt.serving.refusals import Refused, error_body, error_response
from cqil_trt.serving.streams import event

# A request that no replica has begun to answer is sent to another one: how often, and after how long.
_PAUSES = (0.0, 0.2, 1.0, 2.0, 4.0)
# How long replicas may take to say how they are.
_STATUS_SECONDS = 5.0
# How often Ray asks a replica whether its server works.
_HEALTH_SECONDS = 1.0
# How long the load must be too high for another replica, or low enough for one less.
_SCALE_UP_SECONDS, _SCALE_DOWN_SECONDS = 10.0, 300.0
# Headers of one connection (RFC 9110, section 7.6.1), and those that the next hop writes itself.
_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host", "content-length"}


class Options(BaseModel):
    """The arguments of the application, in a config file's `args` or as `name=value`. Times in seconds."""

    model_config = ConfigDict(extra="forbid")

    engine: Path = Field(description="the engine directory, at the same path on every host")
    model_name: str | None = Field(None, description="default: the engine directory's name")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs if the cluster has any")
    replicas: int = Field(1, ge=1, description="how many replicas, or how many at first with max_replicas")
    min_replicas: int = Field(1, ge=1, description="how few autoscaling leaves")
    max_replicas: int | None = Field(None, ge=1, description="turns autoscaling on")
    target_requests: float | None = Field(None, gt=0, description="per replica, for autoscaling; default: max_running")
    max_running: int | None = Field(None, ge=1, description="sequences at a time in a replica; default: the engine's")
    max_waiting: int = Field(256, ge=0, description="requests that wait in each gateway; more get 429")
    gateways: int | None = Field(None, ge=1, description="at most, and by default, one for each host that there is")
    cpus_per_rank: float = Field(1.0, gt=0, description="CPUs that a rank takes, with or without a GPU")
    prefix_slack: int = Field(4, ge=0, description="how many more requests the replica with a prompt's prefix may have")
    api_key_file: Path | None = Field(None, description="on every host; also the variable CQIL_API_KEYS on every host")
    max_body_bytes: int = Field(4 << 20, ge=1)
    queue_timeout: float = Field(60.0, gt=0, description="until a request that no replica takes gets 503")
    start_timeout: float = Field(900.0, gt=0, description="until a replica is ready")
    drain_seconds: float = Field(60.0, ge=0, description="for running requests when a replica is replaced or removed")
    mpirun: str = Field("mpirun", description="how to start ranks, e.g. mpirun --bind-to none")
    flags: str = Field("", description="further flags of serve.py, e.g. --speculate ngram")


@dataclass(frozen=True)
class Call:
    """A client's request. `avoid`: the replicas that have failed it."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    beginnings: tuple[bytes, ...] = ()
    avoid: tuple[str, ...] = ()


@dataclass(frozen=True)
class Head:
    """How an answer begins.

    `events`: it is a stream of events. `failed`: the replica, not the request, is why it is an error.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    replica: str
    events: bool = False
    failed: bool = False


class Replica:
    """One server with its ranks."""

    async def __init__(self, options: Options, ranks: int, device: str, keyed: bool):  # type: ignore[misc]
        """Awaited by Ray, which sends requests once the server is ready.

        `keyed`: whether the application was built where CQIL_API_KEYS is set, and so must be set here.
        """
        if keyed and not os.environ.get("CQIL_API_KEYS"):
            raise UserError(f"CQIL_API_KEYS is set where the application was built, and not on {socket.gethostname()}")
        self._options = options
        self._name = serve.get_replica_context().replica_id.unique_id
        flags = ["--engine", str(options.engine), "--device", device, "--drain-seconds", str(options.drain_seconds)]
        flags += ["--model-name", options.model_name or options.engine.resolve().name]
        flags += ["--max-body-bytes", str(options.max_body_bytes), "--queue-timeout", str(options.queue_timeout)]
        if options.max_running is not None:
            flags += ["--max-running", str(options.max_running)]
        if options.api_key_file is not None:
            flags += ["--api-key-file", str(options.api_key_file)]
        # Ray sets it to the CPUs of the whole replica.
        environment = {"OMP_NUM_THREADS": str(max(1, int(options.cpus_per_rank)))}
        self._server = EngineServer(ranks, [*flags, *shlex.split(options.flags)], environment, options.mpirun)
        await self._server.start(options.start_timeout)

    async def check_health(self) -> None:
        """Ray replaces the replica after this has raised a few times."""
        if self._server.failure is not None:
            raise RuntimeError(self._server.failure)
        if (status := await self._server.status()) in ("failed", "ended"):
            raise RuntimeError(f"the server has {status}")

    async def forward(self, call: Call) -> AsyncIterator[str | Head | bytes]:
        """This replica's name at once, then the head of an answer, and its body in pieces."""
        yield self._name
        begun, events = False, False
        try:
            async with self._server.session.request(
                call.method, f"http://replica{call.path}", headers=call.headers, data=call.body, allow_redirects=False
            ) as answer:
                headers = tuple((k, v) for k, v in answer.headers.items() if k.lower() not in _HOP)
                events = answer.content_type == "text/event-stream"
                # 503 is the server's word for an engine that has failed, loads or drains, and one with a full queue. A
                # request that took too long has it too, but no Retry-After: it would take as long elsewhere.
                failed = answer.status == 503 and "Retry-After" in answer.headers
                yield Head(answer.status, headers, self._name, events, failed=failed)
                begun = True
                async for piece in answer.content.iter_any():
                    yield piece
        except aiohttp.ClientError as error:
            failure = self._server.failure or f"{type(error).__name__}"
            refused = Refused(503, f"the replica failed: {failure}", retry=1)
            if not begun:
                yield Head(503, (("content-type", "application/json"), ("retry-after", "1")), self._name, failed=True)
                yield bytes(error_response(refused).body)
            elif events:
                yield event(error_body(refused))
            else:
                raise

    async def status(self) -> tuple[str, str]:
        """This replica's name, and what its server says."""
        return self._name, await self._server.status()

    async def metrics(self, headers: tuple[tuple[str, str], ...]) -> tuple[str, int, bytes]:
        """This replica's name, and the status and the body of its /metrics."""
        try:
            async with self._server.session.get("http://replica/metrics", headers=headers) as answer:
                return self._name, answer.status, await answer.read()
        except aiohttp.ClientError:
            return self._name, 503, b""

    async def __del__(self) -> None:
        if (server := getattr(self, "_server", None)) is not None:
            await server.stop(self._options.drain_seconds)


class Gateway:
    """What clients talk to. It reads a request, asks for a replica, and passes the answer on as it comes."""

    def __init__(self, engine: DeploymentHandle, max_body_bytes: int, queue_timeout: float):
        self._engine = engine
        self._forward = engine.options(stream=True, method_name="forward")
        self._limit, self._patience = max_body_bytes, queue_timeout

    async def __call__(self, request: Request) -> Response:
        path = request.url.path
        if request.method in ("GET", "HEAD"):
            if path in ("/health", "/ready"):
                return await self._status(path)
            if path == "/metrics":
                return await self._metrics(request)
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self._limit:
                return error_response(Refused(413, f"the body is larger than {self._limit} bytes"))
        headers = tuple((k, v) for k, v in request.headers.items() if k not in _HOP)
        target = path + (f"?{request.url.query}" if request.url.query else "")
        given = bytes(body)
        return await self._answer(Call(request.method, target, headers, given, beginnings(given)))

    async def _answer(self, call: Call) -> Response:
        """The first answer of a replica that works, otherwise the last one's failure, as a 503."""
        failure: Response = error_response(Refused(503, "no replica has answered", retry=1))
        for pause in _PAUSES:
            await asyncio.sleep(pause)
            stream = self._forward.remote(call)
            try:
                await asyncio.wait_for(anext(stream), self._patience)  # a replica has it
                head = await anext(stream)
            except (TimeoutError, asyncio.TimeoutError):  # two classes until Python 3.11
                stream.cancel()
                return error_response(Refused(503, f"no replica was free within {self._patience:g} s", retry=5))
            except BackPressureError:
                return error_response(Refused(429, "too many requests are waiting, no more are taken", retry=1))
            except (RayError, RayServeException, StopAsyncIteration) as error:
                failure = error_response(Refused(503, f"the replica failed: {type(error).__name__}", retry=1))
                continue
            except asyncio.CancelledError:
                stream.cancel()
                raise
            if not head.failed:
                body = _passed_on(stream, head)
                return _with_headers(StreamingResponse(body, head.status), head.headers)
            pieces = [piece async for piece in _passed_on(stream, head)]
            failure = _with_headers(Response(b"".join(pieces), head.status), head.headers)
            call = replace(call, avoid=(*call.avoid, head.replica))
        return failure

    async def _status(self, path: str) -> Response:
        """200 if any replica is as it should be."""
        good = {"ready"} if path == "/ready" else {"ready", "draining"}
        found = dict(await self._ask_all("status"))
        fine = any(status in good for status in found.values())
        word = ("ready" if path == "/ready" else "ok") if fine else "failed"
        return JSONResponse({"status": word, "replicas": found}, 200 if fine else 503, headers={"Retry-After": "1"})

    async def _metrics(self, request: Request) -> Response:
        headers = tuple((k, v) for k, v in request.headers.items() if k == "authorization")
        answers = await self._ask_all("metrics", headers)
        if any(status == 401 for _, status, _ in answers):
            return error_response(Refused(401, "a valid API key is needed: Authorization: Bearer KEY"))
        pages = {name: body.decode() for name, status, body in answers if status == 200}
        return Response(await asyncio.to_thread(merged, pages), headers={"Content-Type": CONTENT_TYPE})

    async def _ask_all(self, method: str, *arguments: Any) -> list[Any]:
        """What the replicas say that answer in time."""
        try:
            asked = self._engine.broadcast(method, *arguments)
            answers = await asked.results_async(timeout_s=_STATUS_SECONDS, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError):
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]


def _with_headers(response: Response, headers: tuple[tuple[str, str], ...]) -> Response:
    for name, value in headers:
        response.headers[name] = value
    return response


async def _passed_on(stream: Any, head: Head) -> AsyncIterator[bytes]:
    """The pieces of an answer. If the replica is lost, a stream of events ends with an error event."""
    try:
        async for piece in stream:
            yield piece
    except (RayError, RayServeException) as error:
        if not head.events:
            raise
        yield event(error_body(Refused(503, f"the replica failed: {type(error).__name__}", retry=1)))
    finally:
        with contextlib.suppress(RayError, RayServeException):
            stream.cancel()


def application(arguments: Options | dict[str, Any]) -> serve.Application:
    """What `serve run` and a config file's `import_path` name, with what follows there as `arguments`.

    Raises UserError for an engine that cannot be opened or served, and for wrong arguments.
    """
    try:
        options = Options.model_validate(arguments)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    options = options.model_copy(update={"engine": options.engine.resolve()})
    engine = Engine.open(options.engine)
    if engine.backend == "tensorrt-llm":
        raise UserError("an engine of backend tensorrt-llm is served by TensorRT-LLM's own trtllm-serve")
    if options.max_replicas is not None and options.max_replicas < max(options.min_replicas, options.replicas):
        raise UserError(f"max_replicas must be at least min_replicas and replicas, found {options.max_replicas}")
    launcher(options.mpirun)
    ranks, device = engine.world_size, options.device
    hosts = sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1
    if device == "auto":
        device = "cuda" if ray.is_initialized() and ray.cluster_resources().get("GPU") else "cpu"
    batch = engine.limits.max_batch_size
    if options.max_running is not None and options.max_running > batch:
        raise UserError(f"max_running {options.max_running}: {engine.path} was built for at most {batch}")
    rows = options.max_running or batch
    resources = {"CPU": options.cpus_per_rank * ranks} | ({"GPU": ranks} if device == "cuda" else {})
    if options.max_replicas is None:
        size: dict[str, Any] = {"num_replicas": options.replicas}
    else:
        size = {
            "autoscaling_config": {
                "min_replicas": options.min_replicas,
                "initial_replicas": options.replicas,
                "max_replicas": options.max_replicas,
                "target_ongoing_requests": options.target_requests or rows,
                "look_back_period_s": _SCALE_UP_SECONDS,
                "upscale_delay_s": _SCALE_UP_SECONDS,
                "downscale_delay_s": _SCALE_DOWN_SECONDS,
            }
        }
    replica = serve.deployment(Replica).options(
        name="engine",
        **size,
        # What waits does so in the gateway, for whichever replica is free first.
        max_ongoing_requests=rows + 1,
        max_queued_requests=options.max_waiting,
        ray_actor_options={"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0)},
        placement_group_bundles=[resources],
        placement_group_strategy="STRICT_PACK",
        health_check_period_s=_HEALTH_SECONDS,
        health_check_timeout_s=10.0,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=options.drain_seconds + 30.0,
        request_router_config=RequestRouterConfig(
            request_router_class="cqil_trt.deploy.routing:PrefixRouter",
            request_router_kwargs={"slack": options.prefix_slack},
        ),
    )
    gateway = serve.deployment(Gateway).options(
        name="gateway",
        num_replicas=options.gateways or hosts,
        max_replicas_per_node=1,  # a proxy prefers the gateway of its own host
        max_ongoing_requests=options.max_waiting + 1000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=options.drain_seconds + 30.0,
    )
    keyed = bool(os.environ.get("CQIL_API_KEYS"))
    return gateway.bind(replica.bind(options, ranks, device, keyed), options.max_body_bytes, options.queue_timeout)
