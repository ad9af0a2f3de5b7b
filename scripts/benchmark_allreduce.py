#!/usr/bin/env python
"""The all-reduce by size: ours compared with NCCL and torch symmetric memory, in one run, in CUDA graphs.

    mpirun -n 2 python scripts/benchmark_allreduce.py

Each figure is the median time of one call in a graph of many, in microseconds, on the slowest rank. The fused kernel
(all-reduce + residual add + RMSNorm) is compared with separate kernels, and with the measured one-way latency of the
link, a lower bound for all of them. float16; needs one GPU per rank, torch, and the built plugins.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import installed  # noqa: F401
import torch
import torch.distributed as dist
import torch.nn.functional as F
from measuring import use_device
from mpi4py import MPI
from plots import check_plot, pyplot

from cqil_trt.commands import RankParser, check_file, run_ranks
from cqil_trt.errors import UserError
from cqil_trt.files import write_json
from cqil_trt.gpu.workspace import CudaCommunicator
from cqil_trt.job import Job
from cqil_trt.table import table

SIZES = [4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10]
SIZES += [1 << 20, 2 << 20, 4 << 20, 8 << 20, 16 << 20]
HIDDEN = 4096
WIDEST_ONE_SHOT = 4 << 20


def time_in_graph(call: Callable[[], Any], comm: MPI.Comm, calls: int, replays: int = 21) -> float:
    """Median microseconds of `call` among `calls` in one graph; the maximum over ranks."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        comm.Barrier()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(calls):
                call()
        graph.replay()
        stream.synchronize()
        times = []
        for _ in range(replays):
            comm.Barrier()
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            graph.replay()
            ended.record()
            stream.synchronize()
            times.append(began.elapsed_time(ended) * 1e3 / calls)
    return comm.allreduce(statistics.median(times), MPI.MAX)


def symmetric_memory(group: str, size: int) -> dict[str, Callable[[], Any]]:
    """torch's own one-shot and two-shot all-reduce on symmetric memory."""
    import torch.distributed._symmetric_memory as symm

    # These do not support float16; bfloat16 has the same size.
    buffer = symm.empty(size // 2, dtype=torch.bfloat16, device="cuda")
    buffer.fill_(0.0)
    symm.rendezvous(buffer, group)
    return {
        "torch one-shot": lambda: torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", group),
        "torch two-shot": lambda: torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", group),
    }


def bare(communicator: CudaCommunicator, wide: CudaCommunicator, comm: MPI.Comm, nccl: bool) -> list[dict[str, Any]]:
    rows = []
    for size in SIZES:
        calls = 200 if size <= 256 << 10 else 40
        x = torch.zeros(size // 2, dtype=torch.float16, device="cuda").uniform_(-1, 1)
        # NCCL and torch reduce in place; zeros keep repeated sums finite.
        ways: dict[str, Callable[[], Any]] = {"ours": lambda x=x: communicator.all_reduce(x)}
        row: dict[str, Any] = {"bytes": size}
        if nccl:
            y = torch.zeros_like(x)
            ways["NCCL"] = lambda y=y: dist.all_reduce(y)
            ways |= symmetric_memory(dist.group.WORLD.group_name, size)
        for name, call in ways.items():
            row[name] = time_in_graph(call, comm, calls)
        # Both of our protocols, regardless of the size: the library's default is where they cross.
        for name, limit in (("ours one-shot", 0), ("ours two-shot", 16)):
            if size <= WIDEST_ONE_SHOT or limit:
                wide.workspace.call("workspace_tune", 0, 0, limit, 1)
                row[name] = time_in_graph(lambda x=x: wide.all_reduce(x), comm, calls)
        rows.append(row)
    return rows


def fused(communicator: CudaCommunicator, comm: MPI.Comm, nccl: bool) -> list[dict[str, Any]]:
    rows = []
    weight = torch.ones(HIDDEN, dtype=torch.float16, device="cuda")
    for tokens in (1, 2, 4, 8, 16, 32, 64, 256):
        x = torch.zeros(tokens, HIDDEN, dtype=torch.float16, device="cuda").uniform_(-1, 1)
        residual = torch.zeros_like(x).uniform_(-1, 1)
        zeros = torch.zeros_like(x)

        def separate(reduce: Callable[[], torch.Tensor], residual: torch.Tensor = residual) -> None:
            total = residual + reduce()
            F.rms_norm(total, (HIDDEN,), weight, 1e-5)

        def ours(x: torch.Tensor = x, residual: torch.Tensor = residual) -> None:
            communicator.all_reduce_residual_norm(x, residual, weight, 1e-5)

        ways = {"ours fused": ours, "ours + add + norm": lambda x=x: separate(lambda: communicator.all_reduce(x))}
        if nccl:

            def reduce_nccl(zeros: torch.Tensor = zeros) -> torch.Tensor:
                dist.all_reduce(zeros)
                return zeros

            ways["NCCL + add + norm"] = lambda: separate(reduce_nccl)
        row: dict[str, Any] = {"tokens": tokens, "bytes": x.numel() * 2}
        row |= {name: time_in_graph(call, comm, 200) for name, call in ways.items()}
        communicator.workspace.call("workspace_tune", 0, 0, 0, 0)
        row["ours fused, no overlap"] = time_in_graph(ours, comm, 200)
        communicator.workspace.call("workspace_tune", 0, 0, 0, 1)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    names = [name for name in rows[0] if name != "bytes"]
    names += [name for row in rows for name in row if name not in names and name != "bytes"]
    names = list(dict.fromkeys(names))

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    cells = [[f"{row['bytes'] / 1024:g} KB", *(cell(row.get(name)) for name in names)] for row in rows]
    return table(["size", *names], cells)


def plot(result: dict[str, Any], path: Path) -> None:
    figure, axes = pyplot().subplots(1, 2, figsize=(12, 4.5))
    for axis, key, title in (
        (axes[0], "all_reduce", "all-reduce"),
        (axes[1], "fused", "all-reduce + residual + RMSNorm"),
    ):
        rows = result[key]
        for name in dict.fromkeys(name for row in rows for name in row if name not in ("bytes", "tokens")):
            points = [(row["bytes"] / 1024, row[name]) for row in rows if name in row]
            axis.plot(*zip(*points), marker="o", markersize=3, label=name)
        axis.set(
            xscale="log", yscale="log", xlabel="KB", ylabel="µs per call", title=f"{title}, {result['ranks']} ranks"
        )
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parser() -> RankParser:
    parser = RankParser(description=__doc__.split("\n")[0])
    parser.add_argument("--no-peers", action="store_true", help="ours only")
    parser.add_argument("--json", metavar="F", type=Path)
    parser.add_argument("--plot", metavar="F.png", type=Path)
    return parser


def check(options: argparse.Namespace, ranks: int) -> None:
    check_file(options.json, "--json")
    check_plot(options.plot)
    if ranks < 2:
        raise UserError("one rank has no peers: use mpirun -n 2 (or more)")


def run(options: argparse.Namespace, job: Job) -> None:
    job.agree(lambda: check(options, job.size))
    comm = MPI.COMM_WORLD
    rank, ranks = job.rank, job.size
    job.agree(lambda: use_device(rank))
    nccl = not options.no_peers and ranks <= torch.cuda.device_count()
    if nccl:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29517")
        dist.init_process_group(
            "nccl", rank=rank, world_size=ranks, device_id=torch.device("cuda", torch.cuda.current_device())
        )
        dist.all_reduce(torch.zeros(1, device="cuda"))
    communicator = CudaCommunicator(comm)
    wide = CudaCommunicator(comm, one_shot_bytes=WIDEST_ONE_SHOT)
    ping = ctypes.c_double()
    comm.Barrier()
    communicator.workspace.call("ping", 2000, ctypes.byref(ping), torch.cuda.current_stream().cuda_stream)
    result = {
        "ranks": ranks,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "one_way_us": ping.value / 2e3,
        "all_reduce": bare(communicator, wide, comm, nccl),
        "fused": fused(communicator, comm, nccl),
    }
    empty = torch.zeros(1, device="cuda")
    result["empty_kernel_us"] = time_in_graph(lambda: empty.add_(1), comm, 200)
    if rank == 0:
        gpus = f"{torch.cuda.device_count()} x {result['gpu']}"
        print(f"{ranks} ranks on {gpus}, torch {torch.__version__}, float16, µs per call")
        print(f"\none word over the link, one way: {result['one_way_us']:.2f} µs")
        print(f"an empty kernel, in a graph: {result['empty_kernel_us']:.2f} µs")
        print("\nall-reduce\n" + show(result["all_reduce"]))
        print(f"\nall-reduce + residual add + RMSNorm, hidden {HIDDEN}\n" + show(result["fused"]))
        if options.json:
            write_json(options.json, result)
        if options.plot:
            plot(result, options.plot)
    communicator.workspace.close()
    wide.workspace.close()
    if nccl:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_ranks(parser, run)
