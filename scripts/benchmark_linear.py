#!/usr/bin/env python
"""The matrix products of a decode step against cuBLAS, and all products of a model in sequence.

    python scripts/benchmark_linear.py

LLaMA-7B shapes, float16. Matrices alternate, so that none stays in the L2 cache; times are medians of CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import installed  # noqa: F401
import numpy as np
import torch

from cqil_trt.commands import Parser, check_file, numbers
from cqil_trt.gpu import abi, cuda, kernel_library
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


class Kernels:
    def __init__(self) -> None:
        self._library = kernel_library.load()
        self._library.cqil_linear_library(0)  # with many rows, too
        self._scratch = torch.empty(0, dtype=torch.uint8, device="cuda")

    def linear(self, x, weight, out, gated=False, norm=None, residual=None) -> None:
        shape = abi.cqil_linear_shape(
            rows=len(x),
            outputs=out.shape[1],
            inputs=x.shape[1],
            gated=gated,
            dtype=abi.dtype_code("float16"),
            eps=1e-5,
        )
        size = self._library.cqil_linear_scratch_bytes(shape)
        if size > len(self._scratch):
            self._scratch = torch.empty(size, dtype=torch.uint8, device="cuda")
        given = [x, None, weight, None, norm, residual, out, None, self._scratch]
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
    parser.add_argument("--json", metavar="F", type=Path)
    return parser


def run(options: argparse.Namespace) -> None:
    counts = numbers(options.rows, "--rows", 1, 1 << 14)
    check_file(options.json, "--json")
    cuda.use_device(0)
    kernels, results = Kernels(), {}
    for rows in counts:
        lines = []
        for name, (outputs, inputs, gated) in SHAPES.items():
            width = outputs * (1 + gated)
            size = 2 * width * inputs
            weights = [random(width, inputs) for _ in range(max(2, (1 << 30) // size))]
            x, whole, out = random(rows, inputs), random(rows, width), random(rows, outputs)
            theirs = microseconds([partial(torch.mm, x, w.T, out=whole) for w in weights]) / len(weights)
            ours = microseconds([partial(kernels.linear, x, w, out, gated) for w in weights]) / len(weights)
            results[f"{name}, {rows} rows"] = {"cublas_us": theirs, "ours_us": ours}
            cells = [f"{time:.1f} ({size / time / 1e6:.2f})" for time in (theirs, ours)]
            lines.append((f"{name}: {width} x {inputs}", *cells))
        print(table((f"{rows} rows", "cuBLAS, us (TB/s)", "ours"), lines), end="\n\n", flush=True)

    layers = [
        [random(3 * HIDDEN, HIDDEN), random(HIDDEN, HIDDEN), random(2 * INNER, HIDDEN), random(HIDDEN, INNER)]
        for _ in range(LAYERS)
    ]
    x, qkv, inner = random(1, HIDDEN), random(1, 3 * HIDDEN), random(1, INNER)
    norm = torch.ones(HIDDEN, device="cuda").half()

    def step() -> None:
        for to_qkv, to_o, to_gate_up, to_down in layers:
            kernels.linear(x, to_qkv, qkv, norm=norm)
            kernels.linear(qkv[:, :HIDDEN], to_o, x, residual=x)
            kernels.linear(x, to_gate_up, inner, gated=True, norm=norm)
            kernels.linear(inner, to_down, x, residual=x)

    time, size = microseconds([step]), sum(weight.nbytes for layer in layers for weight in layer)
    results["chain"] = {"ours_us": time, "bytes": size}
    print(f"the products of {LAYERS} layers in sequence: {time / 1e3:.3f} ms, {size / time / 1e6:.2f} TB/s")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
