#!/usr/bin/env python
"""Where the seconds of a server's start go, against a plain copy of the same bytes: mpirun -n P … --engine DIR.

Each rank does what serve.py does before /ready is 200, and says how long each part took; the slowest counts. A copy
is every rank reading its files into memory, all at the same time. All of it is from the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import installed  # noqa: F401

from cqil_trt import backends
from cqil_trt.commands import RankParser, check_at_least, check_file, run_ranks
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.job import Job
from cqil_trt.table import table

_BLOCK = 1 << 20
# Tokens of a prompt in one step, and slots for each row, as in serve.py on a CPU.
_CHUNK, _SLOTS_PER_ROW = 128, 4


def parser() -> RankParser:
    parser = RankParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="copies and verifications (default 3)")
    parser.add_argument("--json", metavar="F", type=Path)
    return parser


def since_start() -> float:
    """Seconds since this process began (proc(5): field 22 of stat is in clock ticks since boot)."""
    ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def copy(paths: list[Path]) -> None:
    """Reads the files into memory that was not used before."""
    for path in paths:
        target = memoryview(bytearray(path.stat().st_size))
        with open(path, "rb", buffering=0) as file:
            while target:
                target = target[file.readinto(target[:_BLOCK]) :]


def run(options: argparse.Namespace, job: Job) -> None:
    began = since_start()
    check_at_least(options, 1, "rounds")
    job.agree(lambda: check_file(options.json, "--json"))
    engine = job.agree(lambda: Engine.open(options.engine))
    if engine.world_size != job.size:
        raise UserError(f"the engine needs {engine.world_size} MPI ranks: start with mpirun -n {engine.world_size}")
    comm, rank, _ = job.group(engine.world_size)
    backend = backends.load(engine.backend)
    needed = backend.rank_files(rank)
    paths = [engine.path / name for name in engine.files_of(rank, needed)]

    def timed(work: Callable[[], object]) -> float:
        """Seconds until the slowest rank is through."""
        job.wait()
        started = time.perf_counter()
        work()
        return max(job.gather(time.perf_counter() - started))

    copy(paths)  # into the page cache
    copies = sorted(timed(lambda: copy(paths)) for _ in range(options.rounds))
    checks = sorted(timed(lambda: engine.verify_rank(rank, needed)) for _ in range(options.rounds))
    parts = {"copy": copies[len(copies) // 2], "interpreter": max(job.gather(began))}
    parts["verification"] = checks[len(checks) // 2]
    sessions = []

    def open_session() -> None:
        slots = _SLOTS_PER_ROW * engine.limits.max_batch_size
        sessions.append(backend.open_session(engine, comm, options.device, job.rank, slots))

    parts["session"] = timed(open_session)
    [session] = sessions

    def warm_up() -> None:
        from cqil_trt.serving import ranks

        chunk = None if session.on_gpu else _CHUNK
        ranks.warm_up_session(session, ranks.Options(policy="latency", rows=None, chunk=chunk))

    parts["warm-up"] = timed(warm_up)
    if job.rank:
        return
    size = sum(entry["size"] for entry in engine.files.values())
    weights = parts["verification"] + parts["session"]
    rows = [(name, f"{seconds:.2f}", f"{size / 1e9 / seconds:.2f}") for name, seconds in parts.items()]
    print(table(("part", "seconds", "GB/s"), rows))
    print(f"{size / 1e9:.2f} GB; verification and session: {weights / parts['copy']:.2f} times the copy")
    if options.json:
        options.json.write_text(json.dumps({"bytes": size, "seconds": parts}, indent=1) + "\n")


if __name__ == "__main__":
    run_ranks(parser, run)
