#!/usr/bin/env python
"""The matrix products of a decode step against cuBLAS, and all products of a model in sequence.

    python scripts/benchmark_linear.py --weights dense,fp8,int8,int4

LLaMA-7B shapes, float16. Matrices alternate, so that none stays in the L2 cache; times are medians of CUDA graphs. A
fraction is that of the speed at which the GPU reads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import installed  # noqa: F401
import numpy as np
import torch
from measuring import read_bandwidth

from cqil_trt.commands import Parser, check_file, numbers
from cqil_trt.errors import UserError
from cqil_trt.files import write_json
from cqil_trt.gpu import abi, cuda, kernel_library
from cqil_trt.gpu.packed import DeviceMatrix
from cqil_trt.job import command
from cqil_trt.table import table

HIDDEN, INNER, VOCABULARY, LAYERS = 4096, 11008, 32000, 32
# Outputs, inputs, whether gated; halves are the shares of two ranks.
SHAPES = {
    "qkv": (3 * HIDDEN, HIDDEN, False),
    "o": (HIDDEN, HIDDEN, False),
    "gate, up": (INNER, HIDDEN, True),
    "down": (HIDDEN, INNER, False),
    "qkv / 2": (3 * HIDDEN // 2, HIDDEN, False),
    "o / 2": (HIDDEN, HIDDEN // 2, False),
    "gate, up / 2": (INNER // 2, HIDDEN, True),
    "down / 2": (HIDDEN, INNER // 2, False),
    "lm_head": (VOCABULARY, HIDDEN, False),
}
KINDS = {"dense": "CQIL_DENSE", "fp8": "CQIL_FP8", "int8": "CQIL_INT8", "int4": "CQIL_INT4"}
GROUP = 128


@dataclass(frozen=True)
class Matrix:
    """W [2 * outputs if gated else outputs, inputs], in the memory that the kernels read."""

    memory: torch.Tensor
    stored: DeviceMatrix


class Kernels:
    def __init__(self) -> None:
        self._library = kernel_library.load()
        self._library.cqil_linear_library(0)  # with many rows, too
        self._scratch = torch.empty(0, dtype=torch.uint8, device="cuda")

    def packed_rows(self) -> int:
        return int(self._library.cqil_packed_rows())

    def matrix(self, kind: str, outputs: int, inputs: int, gated: bool) -> Matrix:
        """A random matrix."""
        rows, small = outputs * (1 + gated), kind == "int4"
        group = GROUP if small else 0
        stored = DeviceMatrix(
            parts=("codes", "scales", "zeros") if small else ("codes", "scales"),
            rows=rows,
            inputs=inputs,
            gated=gated,
            kind=int(getattr(abi.cqil_weights, KINDS[kind])),
            size=group,
            first=0,
            group=group,
            packed=kind != "dense",
            dtype="float16",
        )
        if not stored.packed:
            return Matrix(random(rows, inputs), stored)
        # No byte is a NaN of E4M3.
        codes = torch.randint(256, (rows, inputs // (1 + small)), dtype=torch.uint8, device="cuda") & 0xF7
        scales = torch.full((rows, inputs // GROUP if small else 1), 1e-3, device="cuda")
        zeros = torch.full(scales.shape, 8, dtype=torch.uint8, device="cuda")
        given = codes, scales.half() if small else scales, zeros
        memory = torch.empty(stored.nbytes(self._library), dtype=torch.uint8, device="cuda")
        parts = {name: tensor.data_ptr() for name, tensor in zip(stored.parts, given)}
        stored.load(self._library, parts, memory.data_ptr(), 0)
        torch.cuda.synchronize()
        return Matrix(memory, stored)

    def linear(self, x, weight: Matrix, out, norm=None, residual=None) -> None:
        shape = weight.stored.shape(len(x), eps=1e-5)
        size = self._library.cqil_linear_scratch_bytes(shape)
        if size > len(self._scratch):
            self._scratch = torch.empty(size, dtype=torch.uint8, device="cuda")
        given = [x, None, weight.memory, None, norm, residual, out, None, self._scratch]
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in given]
        if self._library.cqil_linear(shape, *pointers, torch.cuda.current_stream().cuda_stream):
            raise RuntimeError(self._library.cqil_last_error().decode())


def microseconds(calls: list[Callable[[], object]], replays: int = 12) -> float:
    """Median microseconds of all calls together, in one graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times = []
        for _ in range(replays):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            stream.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
    return float(np.median(times[2:]))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").mul_(0.02).half()


def main() -> None:
    with command():
        run(parser().parse_args())


def parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="1,2,4,8,16,64,512", help="rows of x, i.e. sequences or prompt tokens")
    parser.add_argument("--weights", default="dense", metavar="LIST", help=f"some of {','.join(KINDS)} (default dense)")
    parser.add_argument("--json", metavar="F", type=Path)
    return parser


def run(options: argparse.Namespace) -> None:
    counts = numbers(options.rows, "--rows", 1, 1 << 14)
    kinds = options.weights.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"--weights {unknown[0]}: expected some of {','.join(KINDS)}")
    check_file(options.json, "--json")
    cuda.use_device(0)
    kernels, bandwidth = Kernels(), read_bandwidth()
    results: dict[str, dict[str, float]] = {"read": {"tb_s": bandwidth}}
    print(f"{cuda.device_name()} reads {bandwidth:.2f} TB/s\n")

    def measured(line: str, kind: str, products: list[Callable[[], object]], size: int) -> str:
        """Also notes the microseconds of a product that reads `size` bytes."""
        time = microseconds(products) / len(products)
        results.setdefault(line, {})[f"{kind}_us"] = time
        return f"{time:.1f} ({size / time / 1e6 / bandwidth:.0%})"

    lines: dict[int, list[tuple[str, ...]]] = {rows: [] for rows in counts}
    for name, (outputs, inputs, gated) in SHAPES.items():
        width = outputs * (1 + gated)
        dense = 2 * width * inputs
        copies = max(2, (1 << 30) // dense)
        given = {rows: (random(rows, inputs), random(rows, width), random(rows, outputs)) for rows in counts}
        cells: dict[int, list[str]] = {rows: [f"{name}: {width} x {inputs}"] for rows in counts}
        for kind in ("cublas", *kinds):
            stored = "dense" if kind == "cublas" else kind
            matrices = [kernels.matrix(stored, outputs, inputs, gated) for _ in range(copies)]
            for rows, (x, whole, out) in given.items():
                if kind == "cublas":
                    products = [partial(torch.mm, x, w.memory.T, out=whole) for w in matrices]
                elif kind == "dense" or rows <= kernels.packed_rows():
                    products = [partial(kernels.linear, x, w, out) for w in matrices]
                else:
                    cells[rows].append("")
                    continue
                size = matrices[0].memory.nbytes
                cells[rows].append(measured(f"{name}, {rows} rows", kind, products, size))
        for rows in counts:
            lines[rows].append(tuple(cells[rows]))
    for rows in counts:
        header = (f"{rows} rows, us (of reading)", "cuBLAS, dense", *(f"ours, {kind}" for kind in kinds))
        print(table(header, lines[rows]), end="\n\n", flush=True)

    shapes = [SHAPES[name] for name in ("qkv", "o", "gate, up", "down")]
    layers = [[kernels.matrix("dense", *shape) for shape in shapes] for _ in range(LAYERS)]
    x, qkv, inner = random(1, HIDDEN), random(1, 3 * HIDDEN), random(1, INNER)
    norm = torch.ones(HIDDEN, device="cuda").half()

    def step() -> None:
        for to_qkv, to_o, to_gate_up, to_down in layers:
            kernels.linear(x, to_qkv, qkv, norm=norm)
            kernels.linear(qkv[:, :HIDDEN], to_o, x, residual=x)
            kernels.linear(x, to_gate_up, inner, norm=norm)
            kernels.linear(inner, to_down, x, residual=x)

    time, size = microseconds([step]), sum(weight.memory.nbytes for layer in layers for weight in layer)
    results["chain"] = {"ours_us": time, "bytes": size}
    print(f"the products of {LAYERS} layers in sequence: {time / 1e3:.3f} ms, {size / time / 1e6:.2f} TB/s")
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
