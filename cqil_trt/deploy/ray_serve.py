"""The Ray Serve application: `serve run cqil_trt.deploy.ray_serve:application engine=DIR replicas=2`.

Every `Replica` is an actor that starts a server with the resources of all its ranks in one bundle, so on one host. A
client's request goes from Ray's proxy to a `Gateway` (gateway.py), and from there to the server of the replica that the
router chose.
"""

from __future__ import annotations

import os
import shlex
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve.config import AutoscalingContext

from cqil_trt.deploy.gateway import Gateway
from cqil_trt.deploy.routing import State
from cqil_trt.deploy.server import EngineServer, launcher
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError

# How often Ray asks a replica whether its server works.
_HEALTH_SECONDS = 1.0
# How long the load must be too high for another replica, or low enough for one less.
_SCALE_UP_SECONDS, _SCALE_DOWN_SECONDS = 10.0, 300.0
# How long what a gateway has said counts.
_GATEWAY_SECONDS = 5.0
# The gateway runs in Ray's own event loop. In a separate thread, Ray's default, each request would pass there and back.
_GATEWAY_VARIABLES = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
# The metric by which replicas are added and removed.
_REQUESTS = "requests"


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
    gateways: int | None = Field(None, ge=1, description="default: one for each host, spread over them")
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
class _Load:
    """What a gateway said at `time`: its requests here, and this replica's share of those that wait there."""

    time: float
    running: int
    waiting: float


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
        flags += shlex.split(options.flags)
        host = ray.util.get_node_ip_address()
        self._loads: dict[str, _Load] = {}
        self._server = EngineServer(ranks, flags, environment, options.mpirun, host)
        await self._server.start(options.start_timeout)

    async def check_health(self) -> None:
        """Ray replaces the replica after this has raised a few times."""
        if self._server.failure is not None:
            raise RuntimeError(self._server.failure)
        if (status := await self._server.status()) in ("failed", "ended"):
            raise RuntimeError(f"the server has {status}")

    async def report(self, gateway: str, loads: Mapping[str, int], waiting: int) -> State:
        """Tells a gateway how this replica is. `loads`: how many requests each replica has from it."""
        self._loads[gateway] = _Load(time.monotonic(), loads.get(self._name, 0), waiting / max(1, len(loads)))
        others = sum(load.running for name, load in self._gateways().items() if name != gateway)
        return State(self._name, self._server.url, self._server.key, await self._server.status(), others)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `by_requests` scales by, asked for by Ray."""
        return {_REQUESTS: sum(load.running + load.waiting for load in self._gateways().values())}

    def _gateways(self) -> dict[str, _Load]:
        """What the gateways said that are still there."""
        oldest = time.monotonic() - _GATEWAY_SECONDS
        self._loads = {name: load for name, load in self._loads.items() if load.time > oldest}
        return self._loads

    async def __del__(self) -> None:
        if (server := getattr(self, "_server", None)) is not None:
            await server.stop(self._options.drain_seconds)


def by_requests(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Ray's autoscaling policy: as many replicas as the requests need that run in them or wait for them."""
    found = (context.aggregated_metrics or {}).get(_REQUESTS)
    if not found:
        return context.target_num_replicas, {}
    return sum(found.values()) / context.config.get_target_ongoing_requests(), {}


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
                "policy": {"policy_function": "cqil_trt.deploy.ray_serve:by_requests"},
                "look_back_period_s": _SCALE_UP_SECONDS,
                "upscale_delay_s": _SCALE_UP_SECONDS,
                "downscale_delay_s": _SCALE_DOWN_SECONDS,
            }
        }
    replica = serve.deployment(Replica).options(
        name="engine",
        **size,
        max_ongoing_requests=1000,  # reports to gateways, twice a second for each
        logging_config={"enable_access_log": False},
        ray_actor_options={"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0)},
        placement_group_bundles=[resources],
        placement_group_strategy="STRICT_PACK",
        health_check_period_s=_HEALTH_SECONDS,
        health_check_timeout_s=10.0,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=options.drain_seconds + 30.0,
    )
    gateway = serve.deployment(Gateway).options(
        name="gateway",
        num_replicas=options.gateways or hosts,
        max_ongoing_requests=options.max_waiting + 1000,
        # A proxy prefers the gateway of its own host, and Ray spreads only what takes a resource. Not at most one per
        # host: after the loss of a host, the application would wait for another one before it is updated.
        ray_actor_options={"num_cpus": 0, "memory": 1, "runtime_env": {"env_vars": _GATEWAY_VARIABLES}},
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=options.drain_seconds + 30.0,
    )
    keyed = bool(os.environ.get("CQIL_API_KEYS"))
    # What waits does so in a gateway, for whichever replica is free first.
    most = rows + 1
    return gateway.bind(
        replica.bind(options, ranks, device, keyed),
        most,
        options.prefix_slack,
        options.max_waiting,
        options.max_body_bytes,
        options.queue_timeout,
    )
