#!/usr/bin/env python
"""Latency of a fleet of replicas under Poisson load, simulated from measured step times.

A replica executes one step at a time, as the server does: the prompt of a waiting request if there is room for it,
otherwise the next token of all running ones. The time of a step depends on how many there are (--steps), that of a
prompt on its tokens (--prefill). Requests arrive at random times, and each goes to the shorter of two random queues.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import installed  # noqa: F401
import numpy as np
import simpy
from plots import check_plot, pyplot
from tqdm import tqdm

from cqil_trt.commands import Parser, check_at_least, check_file, numbers
from cqil_trt.errors import UserError
from cqil_trt.files import write_json
from cqil_trt.job import command
from cqil_trt.table import table

# LLaMA-7B shapes, float16, p=2, `sharded`, two H200 (NVLink), milliseconds: docs/performance.md, "Batches and prompts",
# the first run.
_STEPS = "1:1.98,2:2.01,4:2.10,8:2.26,16:2.69"
_PREFILL = "20:3.23,128:3.76,1024:16.1"
# The load that is not given is this share of what replicas can do with all rows in use.
_UTILISATION = 0.7
# Requests before this share of the time are not counted: the fleet starts empty.
_WARM_UP = 0.4
PERCENTILES = (50, 90, 99, 99.9)


def parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--hosts", default="1,4,16,64,256,1024,2048", metavar="N,N", help="how many hosts, each simulated"
    )
    parser.add_argument("--replicas", type=int, default=4, metavar="N", help="per host (default 4: 8 GPUs, p=2)")
    parser.add_argument(
        "--rows", type=int, default=16, metavar="N", help="sequences at a time in a replica (default 16)"
    )
    parser.add_argument("--steps", default=_STEPS, metavar="N:MS,…", help=f"sequences and a step's time ({_STEPS})")
    parser.add_argument("--prefill", default=_PREFILL, metavar="N:MS,…", help=f"prompt's tokens and time ({_PREFILL})")
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="mean, exponential (default 512)")
    parser.add_argument("--new-tokens", type=int, default=256, metavar="N", help="mean, geometric (default 256)")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--rate", type=float, metavar="R", help="requests a second that the whole fleet gets")
    rate.add_argument(
        "--rate-per-host",
        type=float,
        metavar="R",
        help=f"the same for each host (default: {_UTILISATION:.0%}% of capacity)",  # argparse formats it
    )
    parser.add_argument("--requests", type=int, default=60, metavar="N", help="for each replica (default 60), at least")
    parser.add_argument(
        "--least-requests", type=int, default=20_000, metavar="N", help="…so many in all (default 20000)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="F", type=Path)
    parser.add_argument("--plot", metavar="F", type=Path, help="percentiles against the number of hosts")
    return parser


class Curve:
    """Milliseconds between measured points: linear between them, and beyond the last with its slope."""

    def __init__(self, text: str, flag: str):
        """Raises UserError for anything but ascending numbers, like 1:1.98,2:2.01."""
        try:
            points = [tuple(map(float, part.split(":"))) for part in text.split(",")]
            self._x, self._y = map(list, zip(*points, strict=True))
            good = all(a < b for a, b in zip(self._x, self._x[1:])) and min(self._y) >= 0 and np.isfinite(points).all()
        except (ValueError, TypeError):
            good = False
        if not good:
            raise UserError(f"{flag} {text}: expected ascending numbers with milliseconds, like 1:1.98,2:2.01")

    def __call__(self, x: float) -> float:
        if x > self._x[-1] and len(self._x) > 1:
            slope = (self._y[-1] - self._y[-2]) / (self._x[-1] - self._x[-2])
            return self._y[-1] + slope * (x - self._x[-1])
        return float(np.interp(x, self._x, self._y))


@dataclass(eq=False)
class Request:
    """Times in milliseconds of simulated time. `left`: tokens that are still to come."""

    arrived: float
    prompt: int
    tokens: int
    left: int = 0
    first: float = 0.0
    ended: float = 0.0


@dataclass
class Replica:
    environment: simpy.Environment
    steps: list[float]
    prefill: Curve
    rows: int
    done: Any
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._news = self.environment.event()
        self.environment.process(self._run())

    @property
    def length(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        if not self._news.triggered:
            self._news.succeed()

    def _run(self) -> Iterator[Any]:
        now = self.environment
        while True:
            self._news = now.event()
            if self.waiting and len(self.running) < self.rows:
                request = self.waiting.popleft()
                yield now.timeout(self.prefill(request.prompt))
                request.first, request.left = now.now, request.tokens - 1
                self.running.append(request)
            elif self.running:
                yield from self._decode()
            else:
                yield self._news
                continue
            for request in [request for request in self.running if request.left == 0]:
                self.running.remove(request)
                request.ended = now.now
                self.done(request)

    def _decode(self) -> Iterator[Any]:
        """Steps until the first sequence ends, or until the step in which a request arrives that there is room for."""
        now, began = self.environment, self.environment.now
        step, count = self.steps[len(self.running)], min(request.left for request in self.running)
        end = now.timeout(step * count)
        if len(self.running) < self.rows:
            yield end | self._news
            if not end.processed:
                count = min(count, int((now.now - began) / step) + 1)
                yield now.timeout(max(0.0, began + step * count - now.now))
        else:
            yield end
        for request in self.running:
            request.left -= count


@dataclass(frozen=True)
class Result:
    """Milliseconds by percentile; `between` is a request's mean time between tokens. `rows`: mean, in a replica."""

    hosts: int
    rate: float
    requests: int
    rows: float
    first: dict[str, float]
    between: dict[str, float]
    whole: dict[str, float]
    mean_wait: float


def simulate(options: argparse.Namespace, hosts: int, steps: Curve, prefill: Curve) -> Result:
    """One fleet. `options` as the parser gives them."""
    random = np.random.default_rng([options.seed, hosts])
    replicas = hosts * options.replicas
    count = max(options.requests * replicas, options.least_requests)
    rate = options.rate or hosts * (options.rate_per_host or _UTILISATION * capacity(options, steps, prefill))
    arrivals = np.cumsum(random.exponential(1e3 / rate, count)).tolist()
    prompts = np.maximum(1, random.exponential(options.prompt_tokens, count)).astype(int).tolist()
    tokens = random.geometric(1 / options.new_tokens, count).tolist()
    first_choice, second_choice = random.integers(replicas, size=(2, count)).tolist()
    environment = simpy.Environment()
    bar = tqdm(total=count, desc=f"{hosts} hosts", disable=not sys.stderr.isatty(), leave=False)
    ended: list[Request] = []

    def done(request: Request) -> None:
        ended.append(request)
        if len(ended) % 1000 == 0:
            bar.update(1000)

    times = [0.0, *(steps(number) for number in range(1, options.rows + 1))]
    fleet = [Replica(environment, times, prefill, options.rows, done) for _ in range(replicas)]

    def clients() -> Iterator[Any]:
        for arrival, prompt, number, one, two in zip(arrivals, prompts, tokens, first_choice, second_choice):
            yield environment.timeout(arrival - environment.now)
            chosen = min(fleet[one], fleet[two], key=lambda replica: replica.length)
            chosen.add(Request(environment.now, prompt, number))

    environment.process(clients())
    environment.run()
    bar.close()
    counted = [request for request in ended if request.arrived >= _WARM_UP * arrivals[-1]]

    def percentiles(values: list[float]) -> dict[str, float]:
        return {str(q): float(np.percentile(values, q)) for q in PERCENTILES} if values else {}

    return Result(
        hosts=hosts,
        rate=rate,
        requests=len(ended),
        rows=sum(request.ended - request.first for request in counted) / (replicas * (1 - _WARM_UP) * arrivals[-1]),
        first=percentiles([request.first - request.arrived for request in counted]),
        between=percentiles([(r.ended - r.first) / (r.tokens - 1) for r in counted if r.tokens > 1]),
        whole=percentiles([request.ended - request.arrived for request in counted]),
        mean_wait=float(np.mean([r.first - r.arrived - prefill(r.prompt) for r in counted])),
    )


def capacity(options: argparse.Namespace, steps: Curve, prefill: Curve) -> float:
    """Requests a second of one host whose replicas have all rows in use: a token costs step / rows, a prompt a step."""
    alone = prefill(options.prompt_tokens) + (options.new_tokens - 1) * steps(options.rows) / options.rows
    return options.replicas * 1e3 / alone


def plot(results: list[Result], path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    for axis, name, title in zip(axes, ("first", "between", "whole"), ("first token", "between tokens", "request")):
        for q in map(str, PERCENTILES):
            axis.plot([r.hosts for r in results], [getattr(r, name)[q] for r in results], marker="o", label=f"p{q}")
        axis.set(xscale="log", yscale="log", xlabel="hosts", ylabel="ms", title=title)
        axis.grid(alpha=0.3)
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def run(options: argparse.Namespace) -> None:
    check_at_least(options, 1, "replicas", "rows", "prompt_tokens", "requests", "least_requests")
    check_at_least(options, 2, "new_tokens")
    for name in ("rate", "rate_per_host"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be above 0, found {value:g}")
    hosts = numbers(options.hosts, "--hosts", 1, 100_000)
    steps, prefill = Curve(options.steps, "--steps"), Curve(options.prefill, "--prefill")
    check_file(options.json, "--json")
    check_plot(options.plot)
    results = [simulate(options, count, steps, prefill) for count in hosts]
    rows = []
    for r in results:
        times = [f"{value[q]:.{digits}f}" for value, digits in ((r.first, 1), (r.between, 2)) for q in ("50", "99")]
        whole = [f"{r.whole[q] / 1e3:.2f}" for q in ("50", "99")]
        rows.append((r.hosts, r.hosts * options.replicas, f"{r.rate:.0f}", f"{r.rows:.1f}", *times, *whole))
    header = (
        "hosts",
        "replicas",
        "requests/s",
        "rows",
        "first ms p50",
        "p99",
        "between ms p50",
        "p99",
        "whole s p50",
        "p99",
    )
    print(table(header, rows))
    if options.json:
        write_json(options.json, [vars(result) for result in results])
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    with command():
        run(parser().parse_args())
