"""runtime/serve.py, cqil-serve: an OpenAI-compatible server in front of an engine. Started by mpirun, on every rank."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cqil_trt import packages
from cqil_trt.backends import DEVICES
from cqil_trt.commands import RankParser, add_speculate_flag, check_at_least, run_ranks, started_by
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.files import write_file
from cqil_trt.job import Job
from cqil_trt.llm import newest_engine
from cqil_trt.scheduler import POLICIES
from cqil_trt.speculation import Speculation

# Tokens of a prompt between two decode steps on a CPU, where a longer chunk would hold up running sequences for long.
_CPU_CHUNK = 128
# Sequences that the KV cache remembers for each that runs, where memory suffices.
_SLOTS_PER_ROW = 4


def parser() -> RankParser:
    called = started_by("cqil-serve", "runtime/serve.py")
    p = RankParser(description=f"Serve an engine: mpirun -n P {called} [options]")
    p.add_argument("--engine", metavar="DIR", type=Path, help="default: the newest under engines/ that fits the ranks")
    p.add_argument("--device", choices=DEVICES, default="auto", help="where to compute (default: a GPU if available)")
    p.add_argument("--host", default="127.0.0.1", help="the address to listen on (default 127.0.0.1)")
    p.add_argument("--port", type=int, default=8000, help="0 for a free one (default 8000)")
    p.add_argument(
        "--unix-socket", metavar="F", type=Path, help="listen on this Unix socket instead, for this user only"
    )
    p.add_argument("--parent", metavar="PID", type=int, help="end when this process has ended")
    p.add_argument("--model-name", metavar="NAME", action="append", help="default: the engine directory's name")
    p.add_argument("--api-key-file", metavar="F", type=Path, help="one key per line; also the variable CQIL_API_KEYS")
    p.add_argument("--tls-certificate", metavar="F", type=Path, help="PEM file with the certificate chain")
    p.add_argument("--tls-key", metavar="F", type=Path, help="PEM file with its private key")
    p.add_argument(
        "--policy",
        choices=POLICIES,
        default="latency",
        help="latency: at most one chunk of a prompt between two tokens of running sequences (default); throughput: "
        "prompts first",
    )
    p.add_argument("--max-running", type=int, metavar="N", help="sequences at the same time (default: the engine's)")
    p.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help=f"sequences in the KV cache, running or remembered (default: {_SLOTS_PER_ROW} for each that runs, or what "
        "memory allows)",
    )
    p.add_argument(
        "--prefill-chunk",
        type=int,
        metavar="N",
        help=f"prompt tokens in one step (default: the engine's, on a CPU at most {_CPU_CHUNK})",
    )
    add_speculate_flag(p)
    p.add_argument("--max-waiting", type=int, default=256, metavar="N", help="requests in the queue; more get 429")
    p.add_argument("--max-body-bytes", type=int, default=4 << 20, metavar="N", help="larger requests get 413")
    p.add_argument("--queue-timeout", type=float, default=60.0, metavar="S", help="longer in the queue: 503")
    p.add_argument("--request-timeout", type=float, default=600.0, metavar="S", help="the longest that a request takes")
    p.add_argument("--drain-seconds", type=float, default=30.0, metavar="S", help="for running requests after SIGTERM")
    p.add_argument(
        "--step-timeout",
        type=float,
        metavar="S",
        help="a longer step means that it hangs (default: 4 on GPUs, 60 on CPUs)",
    )
    p.add_argument("--pid-file", metavar="F", type=Path, help="where to write the process that takes signals, rank 0's")
    p.add_argument("--address-file", metavar="F", type=Path, help="where to write the address that it listens on")
    p.add_argument("--log-text", action="store_true", help="also log the bodies of requests, with their prompts")
    p.add_argument("--no-log", action="store_true", help="do not log requests")
    return p


@dataclass(frozen=True)
class _Sockets:
    """What rank 0 opens before anything else: `listener` for clients, `rendezvous` for the ranks."""

    listener: socket.socket
    orders: socket.socket
    monitor: socket.socket
    rendezvous: Any


def main(arguments: Sequence[str] | None = None) -> None:
    run_ranks(parser, run, arguments)


def run(options: argparse.Namespace, job: Job) -> None:
    job.agree(lambda: check(options))
    path = job.share(lambda: options.engine or newest_engine(job.size, options.device))
    engine = job.agree(lambda: Engine.open(path))
    job.agree(lambda: _check_engine(engine, options, job))
    setup = job.agree(lambda: _setup(options, path) if job.rank == 0 else None)
    sockets = job.agree(lambda: _listen(options) if job.rank == 0 else None)
    try:
        job.agree(lambda: _write_files(options, sockets) if sockets is not None else None)
        _serve(options, job, engine, path, setup, sockets)
    finally:
        if sockets is not None:
            sockets.rendezvous.remove()
            for file in filter(None, (options.pid_file, options.address_file, options.unix_socket)):
                file.unlink(missing_ok=True)


def _serve(
    options: argparse.Namespace, job: Job, engine: Engine, path: Path, setup: Any, sockets: _Sockets | None
) -> None:
    directory = job.share(lambda: str(sockets.rendezvous.path))  # type: ignore[union-attr]

    from cqil_trt.serving import ranks, wire

    http = child = None
    if sockets is not None:
        http, child = _start_http(setup, sockets)
    pulse = ranks.Pulse(job.rank, Path(directory) / "monitor", child)
    followers: list[wire.Connection] = []
    orders: wire.Connection | None = None
    if sockets is not None:
        followers = [wire.Connection(sockets.orders.accept()[0], "another rank") for _ in range(job.size - 1)]
        sockets.rendezvous.remove()
    else:
        orders = wire.connect(Path(directory) / "orders", "rank 0")

    from cqil_trt.llm import Llm

    rows = options.max_running or engine.limits.max_batch_size

    def say(text: str) -> None:
        if job.rank == 0:
            print(text, flush=True)

    say(f"{path}: loading ...")
    try:
        slots = options.slots or _SLOTS_PER_ROW * rows
        llm = Llm(path, job, options.device, slots, Speculation.parse(options.speculate), wait=False)
        chunk = options.prefill_chunk or (None if llm.session.on_gpu else _CPU_CHUNK)
        chosen = ranks.Options(policy=options.policy, rows=rows, chunk=chunk)
        say("warming up ...")
        ranks.warm_up(llm, chosen)
        llm.wait()
    except UserError:
        if http is not None:
            with contextlib.suppress(wire.Closed):
                http.send(wire.GivenUp())
        raise
    say(f"loaded after {llm.startup}")
    if options.slots is not None and llm.session.slots < options.slots:
        say(f"--slots {options.slots}: {llm.session.slots} fit into the memory at hand")
    try:
        if http is None:
            ranks.ignore_signals()
            ranks.follow(llm, orders, pulse)  # type: ignore[arg-type]
        else:
            ranks.lead(llm, chosen, followers, http, pulse)
    except wire.Closed as closed:
        raise wire.Closed(f"rank {job.rank}: {closed}") from None
    pulse.end()
    ranks.agree_on_the_end(llm, job)
    if http is not None and child is not None:
        http.close()
        child.wait()
    say("stopped: all ranks hold identical bits")


def check(options: argparse.Namespace) -> None:
    """Raises UserError for options that cannot be, ModuleNotFoundError for a missing package."""
    packages.check("serve")
    check_at_least(options, 1, "max_running", "slots", "prefill_chunk", "max_body_bytes")
    check_at_least(options, 0, "max_waiting")
    if not options.drain_seconds >= 0:  # NaN is not
        raise UserError(f"--drain-seconds must be at least 0, found {options.drain_seconds:g}")
    for name in ("queue_timeout", "request_timeout", "step_timeout"):
        value = getattr(options, name)
        if value is not None and not value > 0:  # NaN is not
            raise UserError(f"--{name.replace('_', '-')} must be above 0, found {value:g}")
    check_at_least(options, 1, "parent")
    if options.parent is not None:
        try:
            os.close(os.pidfd_open(options.parent))
        except (ProcessLookupError, OverflowError):
            raise UserError(f"--parent {options.parent}: there is no such process") from None
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port must be from 0 to 65535, found {options.port}")
    if "" in (options.model_name or ()):
        raise UserError("--model-name is empty")
    if (options.tls_certificate is None) != (options.tls_key is None):
        raise UserError("--tls-certificate and --tls-key go together")
    Speculation.parse(options.speculate)


def _check_engine(engine: Engine, options: argparse.Namespace, job: Job) -> None:
    if engine.world_size != job.size:
        raise UserError(
            f"the engine needs {engine.world_size} MPI ranks, found {job.size}: start with mpirun -n "
            f"{engine.world_size} (one server is one replica)"
        )
    if engine.backend == "tensorrt-llm":
        raise UserError("an engine of backend tensorrt-llm is served by TensorRT-LLM's own trtllm-serve")
    if job.rank == 0:
        for name in engine.shared_files:  # the HTTP process reads the tokenizer
            engine.verify(name)
    limits = engine.limits
    for flag, wanted, most, decides in (
        ("--max-running", options.max_running, limits.max_batch_size, "--max-batch-size"),
        ("--prefill-chunk", options.prefill_chunk, limits.prefill_chunk, "--prefill-chunk"),
    ):
        if wanted is not None and wanted > most:
            raise UserError(f"{flag} {wanted}: {engine.path} was built for at most {most} (build.py {decides})")
    if options.max_running is not None and options.slots is not None and options.slots < options.max_running:
        raise UserError(f"--slots {options.slots}: too few for the sequences of --max-running {options.max_running}")


def _listen(options: argparse.Namespace) -> _Sockets:
    from cqil_trt.serving.wire import Rendezvous

    if options.tls_certificate is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.tls_certificate, options.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise UserError(
                f"--tls-certificate {options.tls_certificate}, --tls-key {options.tls_key}: cannot be used "
                f"({error.strerror or error})"
            ) from None
    with contextlib.ExitStack() as undo:
        try:
            rendezvous = Rendezvous()
            undo.callback(rendezvous.remove)
            orders, monitor = rendezvous.listen("orders"), rendezvous.listen("monitor")
        except OSError as error:
            raise UserError(
                f"no place for sockets in the directory for temporary files, which TMPDIR names "
                f"({error.strerror or error})"
            ) from None
        listener = _listen_for_clients(options)
        undo.pop_all()
    return _Sockets(listener, orders, monitor, rendezvous)


def _listen_for_clients(options: argparse.Namespace) -> socket.socket:
    if options.unix_socket is not None:
        _remove_abandoned(options.unix_socket)
        listener = socket.socket(socket.AF_UNIX)
        mask = os.umask(0o177)
        try:
            listener.bind(str(options.unix_socket))
            listener.listen(1024)
        except OSError as error:
            raise UserError(f"--unix-socket {options.unix_socket}: {error.strerror or error}") from None
        finally:
            os.umask(mask)
        return listener
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(f"--host {options.host} --port {options.port}: {error.strerror or error}") from None


def _remove_abandoned(path: Path) -> None:
    """Removes the socket of a server that was killed, on which nobody listens. Raises UserError for another file."""
    if os.path.lexists(path) and not path.is_socket():
        raise UserError(f"--unix-socket {path}: exists and is not a socket: name another, or remove it")
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):  # of which bind says more
            try:
                client.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()


def _setup(options: argparse.Namespace, path: Path) -> Any:
    from cqil_trt.serving.wire import Setup

    return Setup(
        engine=str(path),
        model_names=tuple(options.model_name or [path.resolve().name]),
        keys=_keys(options.api_key_file),
        gateway_key=os.environ.get("CQIL_GATEWAY_KEY") or None,
        certificate=None if options.tls_certificate is None else str(options.tls_certificate),
        key=None if options.tls_key is None else str(options.tls_key),
        max_waiting=options.max_waiting,
        max_body_bytes=options.max_body_bytes,
        queue_seconds=options.queue_timeout,
        request_seconds=options.request_timeout,
        drain_seconds=options.drain_seconds,
        step_seconds=options.step_timeout,
        log_text=options.log_text,
        log_requests=not options.no_log,
        parent=options.parent,
    )


def _write_files(options: argparse.Namespace, sockets: _Sockets) -> None:
    """What other programs need to know: the process and the address."""
    name = sockets.listener.getsockname()
    if isinstance(name, str):
        address = name
    else:
        address = f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
    for flag, path, text in (
        ("--pid-file", options.pid_file, str(os.getpid())),
        ("--address-file", options.address_file, address),
    ):
        if path is not None:
            write_file(path, f"{text}\n".encode(), flag)


def _keys(path: Path | None) -> tuple[str, ...]:
    """API keys of the file and of CQIL_API_KEYS. Raises UserError for a file without any."""
    given = os.environ.get("CQIL_API_KEYS", "")
    keys = [key.strip() for key in given.split(",") if key.strip()]
    if given and not keys:
        raise UserError("CQIL_API_KEYS is set, but has no key")
    if path is not None:
        try:
            found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except OSError as error:
            raise UserError(f"--api-key-file {path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise UserError(f"--api-key-file {path}: not UTF-8 text") from None
        if not found:
            raise UserError(f"--api-key-file {path}: has no key")
        keys += found
    return tuple(keys)


def _start_http(setup: Any, sockets: _Sockets) -> tuple[Any, subprocess.Popen[bytes]]:
    """Starts the HTTP process. It is in a session of its own: mpirun must not end it with the ranks."""
    from cqil_trt.serving.ranks import HTTP
    from cqil_trt.serving.wire import Connection

    ours, theirs = socket.socketpair()
    numbers = [sock.fileno() for sock in (theirs, sockets.monitor, sockets.listener)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI_", "PMIX"))}
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [environment.get("PYTHONPATH")])]
    child = subprocess.Popen(
        [sys.executable, "-m", "cqil_trt.serving.frontend", *map(str, numbers)],
        pass_fds=numbers,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
    )
    # Closed here, so that nobody connects to them once the HTTP process has ended.
    for sock in (theirs, sockets.monitor, sockets.listener):
        sock.close()
    http = Connection(ours, HTTP)
    http.send(setup)
    return http, child
