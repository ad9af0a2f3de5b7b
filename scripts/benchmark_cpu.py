#!/usr/bin/env python
"""The time of a decode step on the CPU by part: matrix products, attention, MPI, and everything else.

    python scripts/benchmark_cpu.py --engine engines/ENGINE
    mpirun -n 2 python scripts/benchmark_cpu.py --engine engines/ENGINE

Rank 0 reports the step of median length, at a context of --context tokens. OMP_NUM_THREADS sets the threads per rank.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import installed  # noqa: F401
import numpy as np
import torch

from cqil_trt import backends
from cqil_trt.commands import RankParser, check_at_least, check_file, run_ranks
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.files import write_json
from cqil_trt.job import Job
from cqil_trt.llm import Llm
from cqil_trt.scheduler import Step
from cqil_trt.table import table


def parser() -> RankParser:
    parser = RankParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--context", type=int, default=200, help="tokens before the measured steps")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", metavar="F", type=Path)
    return parser


def run(options: argparse.Namespace, job: Job) -> None:
    job.share(lambda: check(options))
    llm = Llm(options.engine, job, "cpu")
    job.agree(lambda: check_engine(options, llm.engine))
    prompt = np.random.default_rng(0).integers(3, llm.engine.model.vocab_size, size=options.context).tolist()
    llm.session.load(prompt)
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **keywords)
            spent[name] += time.perf_counter() - began
            return result

        return call

    functional = torch.nn.functional
    functional.linear = timed("matrix products", functional.linear)
    functional.scaled_dot_product_attention = timed("attention", functional.scaled_dot_product_attention)
    for communicator in llm.session.communicators.values():
        for name in ("all_reduce_residual", "all_reduce", "broadcast", "bypass", "argmax"):
            setattr(communicator, name, timed("MPI", getattr(communicator, name)))

    samples = []
    for _ in range(options.steps):
        spent.clear()
        began = time.perf_counter()
        llm.session.submit(Step(decode=(0,)))
        llm.session.collect()
        total = time.perf_counter() - began
        samples.append({**spent, "the rest": total - sum(spent.values()), "total": total})
    if job.rank:
        return
    median = sorted(samples, key=lambda sample: sample["total"])[len(samples) // 2]
    step = {name: seconds * 1e3 for name, seconds in median.items()}
    rows = [(name, f"{ms:.2f}", f"{ms / step['total']:.1%}") for name, ms in step.items()]
    print(table(["the median decode step", "ms", "share"], rows))
    if options.json:
        write_json(options.json, {"milliseconds": step, "threads": torch.get_num_threads()})


def check_engine(options: argparse.Namespace, engine: Engine) -> None:
    if engine.backend != backends.PLAIN:
        raise UserError(
            f"--engine {options.engine}: of backend {engine.backend}, only {backends.PLAIN} can be measured"
        )
    tokens = options.context + options.steps
    if tokens > engine.limits.max_seq_len:
        raise UserError(f"--context and --steps: {tokens} tokens, the engine holds {engine.limits.max_seq_len}")


def check(options: argparse.Namespace) -> None:
    check_at_least(options, 1, "context", "steps")
    check_file(options.json, "--json")


if __name__ == "__main__":
    run_ranks(parser, run)
