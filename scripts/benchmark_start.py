#!/usr/bin/env python
"""How long a server's start takes, against a plain copy of the same bytes: mpirun -n P … --engine DIR.

Each rank does what serve.py does before /ready is 200, and says how long each part took; the slowest counts. (serve.py
starts its HTTP process meanwhile.) Afterwards, in the same processes, every rank copies its files in a plain loop, all
at the same time: on GPUs from the page cache into a page-locked buffer and from there to the GPU, on CPUs into memory.
All of it is from the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import installed  # noqa: F401

from cqil_trt.commands import RankParser, check_at_least, check_file, run_ranks
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.files import write_json
from cqil_trt.job import Job
from cqil_trt.startup import since_start
from cqil_trt.table import table

_BLOCK = 64 << 20
# Tokens of a prompt in one step, and slots for each row, as in serve.py on a CPU.
_CHUNK, _SLOTS_PER_ROW = 128, 4


def parser() -> RankParser:
    parser = RankParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="copies, of which the median (default 3)")
    parser.add_argument("--json", metavar="F", type=Path)
    return parser


def copy_to_memory(paths: list[Path]) -> None:
    """Reads the files into memory that was not used before."""
    for path in paths:
        target = memoryview(bytearray(path.stat().st_size))
        with open(path, "rb", buffering=0) as file:
            while target:
                target = target[file.readinto(target[:_BLOCK]) :]


class GpuCopy:
    """Copies files to this rank's GPU, one block after the other, as a loop without threads does."""

    def __init__(self) -> None:
        from cqil_trt.gpu import cuda

        self._cuda = cuda
        self._block, self._target = cuda.pinned((_BLOCK,), "uint8"), cuda.Arena(_BLOCK, "the copy")
        self._stream = cuda.new_stream()

    def __call__(self, paths: list[Path]) -> None:
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(self._block.data):
                    self._cuda.upload(self._target.address, self._block[:count], self._stream)
                    self._cuda.call("StreamSynchronize", self._stream)


def slowest(job: Job, seconds: dict[str, float]) -> dict[str, float]:
    """By part, the seconds of the rank that took longest."""
    found = job.gather(seconds)
    return {part: max(each.get(part, 0.0) for each in found) for part in found[0]}


def run(options: argparse.Namespace, job: Job) -> None:
    began = since_start()
    check_at_least(options, 1, "rounds")
    job.agree(lambda: check_file(options.json, "--json"))
    engine = job.agree(lambda: Engine.open(options.engine))
    if engine.world_size != job.size:
        raise UserError(f"the engine needs {engine.world_size} MPI ranks: start with mpirun -n {engine.world_size}")
    names = [*engine.files_of(job.rank), *(engine.shared_files if job.rank == 0 else ())]
    paths = [engine.path / name for name in names]
    for path in paths:
        with open(path, "rb", buffering=0) as file:  # into the page cache
            while file.read(_BLOCK):
                pass
    job.wait()

    started = time.perf_counter()
    from cqil_trt.llm import Llm
    from cqil_trt.serving import ranks

    imported = time.perf_counter() - started
    llm = Llm(options.engine, job, options.device, _SLOTS_PER_ROW * engine.limits.max_batch_size, wait=False)
    ranks.warm_up(llm, ranks.Options(policy="latency", rows=None, chunk=None if llm.session.on_gpu else _CHUNK))
    llm.wait()
    if job.rank == 0:
        ranks.matchers(llm)
    llm.startup.end("grammars")
    total = max(job.gather(began + time.perf_counter() - started))
    parts = slowest(job, {**llm.startup.parts, "process": began + imported})
    within = {part: slowest(job, seconds) for part, seconds in llm.startup.within.items()}

    copy = GpuCopy() if llm.session.on_gpu else copy_to_memory
    copies = []
    for _ in range(options.rounds):
        job.wait()
        began = time.perf_counter()
        copy(paths)
        copies.append(max(job.gather(time.perf_counter() - began)))
    if job.rank:
        return
    plain, size = statistics.median(copies), sum(entry["size"] for entry in engine.files.values())
    rows: list[tuple[Any, ...]] = [("plain copy", f"{plain:.2f}", f"{size / 1e9 / plain:.2f}")]
    for part, seconds in parts.items():
        rows.append((part, f"{seconds:.2f}", ""))
        rows += [(f"  {name}", f"{each:.2f}", "") for name, each in within.get(part, {}).items()]
    rows.append(("start to ready", f"{total:.2f}", f"{size / 1e9 / total:.2f}"))
    print(table(("part", "seconds", "GB/s"), rows))
    print(f"{size / 1e9:.2f} GB; start to ready: {total / plain:.2f} times the plain copy")
    if options.json:
        seconds = {"copy": plain, "start": total, "parts": parts, "within": within}
        found = {"bytes": size, "ranks": job.size, "on_gpu": llm.session.on_gpu, "seconds": seconds}
        write_json(options.json, {**found, "ratio": total / plain})


if __name__ == "__main__":
    run_ranks(parser, run)
