#!/usr/bin/env python
"""Latency at the clients of cqil-serve, beside the engine's own steps, measured one after the other.

Starts run.py --benchmark and then serve.py on the engine, and streams completions of random prompts of token ids, which
share no beginning. A client's interval is the time between two events that carry tokens.

With --url it measures servers that run already instead, each beside the first, e.g. a gateway beside the bare server of
the same engine. An API key is taken from CQIL_API_KEY.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import installed  # noqa: F401
import numpy as np
from tqdm import tqdm

from cqil_trt.commands import Parser, check_at_least, check_file, numbers
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.files import write_json
from cqil_trt.job import command
from cqil_trt.table import table

ROOT = Path(__file__).resolve().parent.parent
# No event comes later than this, and the server has started and ended by then; otherwise something hangs.
_PATIENCE = 120.0
PERCENTILES = (1, 10, 25, 50, 75, 90, 95, 99, 99.9)
# The server's log says how many seconds after a request came the engine was asked for it, had begun it, gave a token.
STAGES = "asked", "begun", "first_token"


def parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--url", action="append", metavar="URL", help="a server to measure; repeat it to compare")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--concurrency", default="1,4,8", metavar="N,N")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="requests of each client (default 6)")
    parser.add_argument("--mpirun", default="mpirun", help='how to start ranks, e.g. "mpirun --bind-to none"')
    parser.add_argument("--json", metavar="F", type=Path)
    return parser


@dataclass
class Served:
    """Milliseconds to the first token of each request, and between tokens."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


def engine_alone(options: argparse.Namespace, ranks: int, batches: list[int]) -> list[dict[str, Any]]:
    """What run.py measures: the prompt, and decode steps of as many sequences as there are clients."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        flags = ["--benchmark", "--contexts", options.prompt_tokens, "--batches", ",".join(map(str, batches))]
        arguments = ["runtime/run.py", "--engine", options.engine, "--device", options.device, *flags]
        arguments += ["--max-new-tokens", options.new_tokens, "--json", report]
        try:
            done = subprocess.run(
                _mpirun(options, ranks, arguments), cwd=ROOT, stdout=subprocess.DEVNULL, timeout=_PATIENCE, check=False
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"run.py has not ended after {_PATIENCE:g} s") from None
        if done.returncode:
            raise UserError(f"run.py ended with exit code {done.returncode}")
        return json.loads(report.read_text())["benchmark"]


def _mpirun(options: argparse.Namespace, ranks: int, arguments: list[Any]) -> list[str]:
    return [*shlex.split(options.mpirun), "-n", str(ranks), sys.executable, *map(str, arguments)]


class Log:
    """What a server writes to standard error: the lines about requests are kept, the others passed on."""

    def __init__(self, stream: IO[str]):
        self._lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            if line.startswith("{"):
                self._lines.put(json.loads(line))
            else:
                sys.stderr.write(line)

    def stages(self, requests: int) -> dict[str, list[float]]:
        """Milliseconds until each of STAGES, for so many requests, the next ones."""
        try:
            lines = [self._lines.get(timeout=_PATIENCE) for _ in range(requests)]
        except queue.Empty:
            raise UserError("the server has not logged all requests") from None
        return {name: [line[f"{name}_seconds"] * 1e3 for line in lines] for name in STAGES}


def start(options: argparse.Namespace, ranks: int, pid_file: Path) -> tuple[subprocess.Popen[str], int, Log]:
    """The server, its port and its log."""
    arguments = ["runtime/serve.py", "--engine", options.engine, "--device", options.device, "--port", 0]
    arguments += ["--pid-file", pid_file]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(_mpirun(options, ranks, arguments), cwd=ROOT, text=True, **pipes)
    assert process.stderr is not None
    log = Log(process.stderr)
    late = threading.Timer(_PATIENCE, process.kill)
    late.start()
    try:
        for line in process.stdout or ():
            if found := re.search(r"serving at http://\S+:(\d+)", line):
                return process, int(found[1]), log
    except BaseException:
        process.kill()
        raise
    finally:
        late.cancel()
    raise UserError(f"serve.py ended with exit code {process.wait()} before it took requests")


def stop(process: subprocess.Popen[str], pid_file: Path) -> int:
    """Ends the server; returns its exit code."""
    with contextlib.suppress(OSError, ValueError):  # it has ended
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
    try:
        return process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


class Client:
    """A connection that stays, and as little else as can be measured with."""

    def __init__(self, place: tuple[str, int]):
        self._host = f"{place[0]}:{place[1]}"
        self._socket = socket.create_connection(place, timeout=_PATIENCE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = self._socket.makefile("rb")

    def complete(self, prompt: list[int], count: int, served: Served) -> None:
        """Streams one completion."""
        wanted = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "stream": True}
        wanted["stream_options"] = {"include_usage": False, "continuous_usage_stats": True}
        body = json.dumps(wanted).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        if key := os.environ.get("CQIL_API_KEY"):
            head += f"Authorization: Bearer {key}\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        began = last = time.perf_counter()
        self._socket.sendall(request)
        status = self._line()
        if b" 200 " not in status:
            raise UserError(f"the server answered {status.decode().strip()}")
        while self._line().strip():  # the other headers
            pass
        tokens, received = 0, b""
        for piece in self._chunks():
            now = time.perf_counter()
            *events, received = (received + piece).split(b"\n\n")
            for text in events:
                if not text.startswith(b"data: {"):
                    continue
                event = json.loads(text[6:])
                if "error" in event:
                    raise UserError(event["error"]["message"])
                new = event["usage"]["completion_tokens"] - tokens
                tokens += new
                if tokens == new:
                    served.first.append((now - began) * 1e3)
                else:
                    served.between += [(now - last) * 1e3 / new] * new
                last = now
        if tokens != count:
            raise UserError(f"{tokens} of {count} tokens came")

    def _chunks(self) -> Iterator[bytes]:
        """The pieces of the answer's body, which a proxy may cut anywhere."""
        while size := int(self._line(), 16):
            yield self._lines.read(size)
            self._line()
        self._line()

    def _line(self) -> bytes:
        line = self._lines.readline()
        if not line:
            raise UserError("the server closed the connection")
        return line

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def load(place: tuple[str, int], options: argparse.Namespace, clients: int, vocabulary: int, random: Any) -> Served:
    """What `clients` see that each send one request after another."""
    served, failures = [Served() for _ in range(clients)], []
    prompts = random.integers(vocabulary, size=(clients, options.rounds, options.prompt_tokens)).tolist()

    def run(number: int) -> None:
        try:
            with contextlib.closing(Client(place)) as client:
                for prompt in prompts[number]:
                    client.complete(prompt, options.new_tokens, served[number])
        except (UserError, OSError, ValueError, KeyError) as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise UserError(f"a client: {failures[0]!r}")
    return Served([t for one in served for t in one.first], [t for one in served for t in one.between])


def _place(url: str) -> tuple[str, int]:
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
            raise ValueError
        return parts.hostname, parts.port or 80
    except ValueError:
        raise UserError(f"--url {url}: expected http://host:port") from None


def compare(options: argparse.Namespace, clients: list[int], vocabulary: int) -> None:
    """Measures the servers in turns, round by round, so that what else the machine does meets all of them."""
    places = [_place(url) for url in options.url]
    random = np.random.default_rng(0)
    found = {(count, url): Served() for count in clients for url in options.url}
    rounds, options.rounds = options.rounds, 1
    for place in places:
        load(place, options, 1, vocabulary, random)  # warm up
    bar = tqdm(total=rounds * len(found), desc="rounds", disable=not sys.stderr.isatty(), leave=False)
    for count in clients:
        for _ in range(rounds):
            for url, place in zip(options.url, places):
                served = load(place, options, count, vocabulary, random)
                found[count, url].first += served.first
                found[count, url].between += served.between
                bar.update()
    bar.close()
    rows, report = [], []
    for (count, url), served in found.items():
        base = found[count, options.url[0]]
        first, first_base = np.median(served.first), np.median(base.first)
        (p50, p99), p50_base = np.percentile(served.between, (50, 99)), np.median(base.between)
        row = (count, url, f"{first:.2f}", f"{first - first_base:+.2f}", f"{p50:.3f}", f"{p50 / p50_base - 1:+.1%}")
        rows.append((*row, f"{p99:.3f}"))
        between = {str(q): float(np.percentile(served.between, q)) for q in PERCENTILES}
        report.append({"clients": count, "url": url, "first_token_ms": served.first, "between_tokens_ms": between})
    print(table(("clients", "url", "first token ms", "", "between tokens ms", "", "p99 ms"), rows))
    if options.json:
        write_json(options.json, report)


def run(options: argparse.Namespace) -> None:
    check_at_least(options, 1, "prompt_tokens", "rounds")
    check_at_least(options, 2, "new_tokens")
    check_file(options.json, "--json")
    options.engine = options.engine.resolve()
    engine = Engine.open(options.engine)
    clients = numbers(options.concurrency, "--concurrency", 1, engine.limits.max_batch_size)
    if options.prompt_tokens + options.new_tokens > engine.limits.max_seq_len:
        raise UserError(f"--prompt-tokens and --new-tokens: the engine holds {engine.limits.max_seq_len}")
    if options.url:
        compare(options, clients, engine.model.vocab_size)
        return
    print("measuring the engine ...", file=sys.stderr)
    alone = engine_alone(options, engine.world_size, clients)
    print("measuring the server ...", file=sys.stderr)
    random = np.random.default_rng(0)
    found: dict[int, Served] = {}
    stages: dict[int, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        pid_file = Path(directory) / "pid"
        process, port, log = start(options, engine.world_size, pid_file)
        try:
            load(("127.0.0.1", port), options, 1, engine.model.vocab_size, random)  # warm up
            log.stages(options.rounds)
            for count in tqdm(clients, desc="clients", disable=not sys.stderr.isatty(), leave=False):
                found[count] = load(("127.0.0.1", port), options, count, engine.model.vocab_size, random)
                stages[count] = log.stages(count * options.rounds)
        finally:
            code = stop(process, pid_file)
    prefill, amid = (
        next(m["median_ms"] for m in alone if m["step"] == step) for step in ("prefill", "prefill amid decode")
    )
    steps = {m["batch"]: m["median_ms"] for m in alone if m["step"] == "decode"}
    rows, report = [], []
    for count, served in found.items():
        p50, p99 = np.percentile(served.between, (50, 99))
        first = float(np.median(served.first))
        rows.append(
            (
                count,
                f"{steps[count]:.3f}",
                f"{p50:.3f}",
                f"{p50 / steps[count] - 1:+.1%}",
                f"{p99:.3f}",
                f"{p99 / steps[count] - 1:+.1%}",
                f"{prefill:.2f}",
                f"{amid:.2f}",
                f"{first:.2f}",
            )
        )
        report.append(
            {
                "clients": count,
                "engine_step_ms": steps[count],
                "between_tokens_ms": {str(q): float(np.percentile(served.between, q)) for q in PERCENTILES},
                "engine_prefill_ms": prefill,
                "engine_prefill_amid_decode_ms": amid,
                "first_token_ms": served.first,
                "stages_ms": stages[count],
            }
        )
    header = ("clients", "engine's step ms", "median ms", "", "p99 ms", "")
    header += ("engine's prefill ms", "amid decode ms", "first token ms")
    print(table(header, rows))
    print()
    parts = [
        (count, *(f"{np.median(stages[count][name]):.2f}" for name in STAGES), f"{np.median(served.first):.2f}")
        for count, served in found.items()
    ]
    said = "ms until", "the engine was asked", "it had begun", "it gave a token", "the client had it"
    print(table(said, parts))
    if options.json:
        write_json(options.json, report)
    if code:
        raise UserError(f"serve.py ended with exit code {code}")


if __name__ == "__main__":
    with command():
        run(parser().parse_args())
