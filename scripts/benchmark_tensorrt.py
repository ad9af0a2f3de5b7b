#!/usr/bin/env python
"""Decode latency of TensorRT engines in the shapes of a published model: all placements, in one run.

    python scripts/benchmark_tensorrt.py --preset llama-7b-p2-d0

Makes a checkpoint with random weights, builds torch engines of it (merged and sharded weights, and the float32
reference's answers to a few prompts), compiles each with TensorRT, validates it and measures it at batch 1, next to the
sequential engine on one GPU. TensorRT may be installed in another Python: --runtime-python names it. Needs a GPU per
rank, the built plugins, and 70 GB of disk for LLaMA-7B.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import installed  # noqa: F401
from synthetic import ROOT, SHAPES, check_space, make_checkpoint, model_config

from cqil_trt.commands import Parser, check_at_least, check_file, numbers
from cqil_trt.errors import UserError
from cqil_trt.gpu import cuda
from cqil_trt.job import command
from cqil_trt.presets import preset
from cqil_trt.table import table


def start_process(*parts: Any, **options: Any) -> subprocess.Popen:
    return subprocess.Popen([str(part) for part in parts], cwd=ROOT, **options)


def wait(process: subprocess.Popen, what: str) -> None:
    if process.wait():
        raise UserError(f"{what} failed")


def main() -> None:
    with command():
        run(parser().parse_args())


def parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="llama-7b-p2-d0", help="a published configuration (default %(default)s)")
    parser.add_argument("--layers", type=int, help="fewer for a quick look")
    parser.add_argument("--contexts", default="20,200,1000", help="prompt lengths in tokens (default %(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="decode steps per measurement")
    parser.add_argument("--max-seq-len", type=int, default=2048)
    parser.add_argument("--runtime-python", default=sys.executable, help="the Python that has TensorRT")
    parser.add_argument("--torch", action="store_true", help="also without TensorRT: the torch backend on CUDA")
    parser.add_argument(
        "--directory", type=Path, help="working directory, whose contents are reused (default: a temporary one)"
    )
    parser.add_argument(
        "--prepare", action="store_true", help="stop after writing checkpoint and torch engines to --directory"
    )
    parser.add_argument("--json", metavar="F", type=Path)
    return parser


def check(options: argparse.Namespace, model: str, gpus: int) -> None:
    """Checks the options: errors should be reported before gigabytes are written."""
    if options.prepare and not options.directory:
        raise UserError("--prepare needs --directory")
    check_at_least(options, 2, "max_seq_len")
    check_at_least(options, gpus, "layers")
    check_at_least(options, 1, "steps")
    positions = model_config(model).max_position
    if options.max_seq_len > positions:
        raise UserError(f"--max-seq-len {options.max_seq_len}: {model} has {positions} positions")
    numbers(options.contexts, "--contexts", 1, options.max_seq_len - 1)
    check_file(options.json, "--json")
    if not options.prepare:
        if cuda.device_count() < gpus:
            raise UserError(f"{options.preset} needs {gpus} GPUs, this host has {cuda.device_count()}")
        done = subprocess.run([options.runtime_python, "-c", "import tensorrt"], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"--runtime-python {options.runtime_python} cannot import tensorrt: {reason}")
    directory = options.directory or Path(tempfile.gettempdir())
    if not (directory / "model").exists():
        check_space(directory if directory.exists() else directory.parent, model, options.layers, 5.2)


def run(options: argparse.Namespace) -> None:
    cqil = preset(options.preset)
    model = next(name for name in SHAPES if options.preset.startswith(name))
    check(options, model, cqil.p)
    start, end = cqil.start, cqil.end
    if options.layers:
        start, end = 0, options.layers // cqil.p * cqil.p
    grouped = ["--p", cqil.p, "--d", cqil.d, "--start", start, "--end", end]
    shapes = {
        "sequential, 1 GPU": ["--p", 1],
        "leader": [*grouped, "--placement", "leader"],
        "sharded": [*grouped, "--placement", "sharded"],
        "tensor": ["--p", cqil.p, "--placement", "tensor"],
    }
    if options.directory:
        options.directory.mkdir(exist_ok=True)
        measured = benchmark(options, options.directory, model, shapes, cqil.p)
    else:
        with tempfile.TemporaryDirectory(prefix="benchmark-tensorrt-") as work:
            measured = benchmark(options, Path(work), model, shapes, cqil.p)
    if measured is None:
        return
    plans, results = measured
    print(describe(plans, results))
    if options.json:
        options.json.write_text(json.dumps({"plans": plans, "results": results}, indent=1) + "\n")


def benchmark(
    options: argparse.Namespace, root: Path, model: str, shapes: dict[str, list[Any]], gpus: int
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The plan of each build and the measurements of each engine; None with --prepare."""
    build, runtime = ROOT / "builders" / "build.py", ROOT / "runtime" / "run.py"
    checkpoint = root / "model"
    if not checkpoint.exists():
        make_checkpoint(root / "model.part", model, options.layers)
        (root / "model.part").rename(checkpoint)
    builds: list[tuple[str, int, subprocess.Popen | None]] = []
    for number, (name, shape) in enumerate(shapes.items()):
        if (root / f"torch{number}").exists():
            builds.append((name, number, None))
            continue
        # The reference runs on a GPU; builds on different GPUs run concurrently.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(number % gpus)}
        limits = ["--max-batch-size", 1, "--max-seq-len", options.max_seq_len, "--probes", "always", "--json"]
        arguments = [sys.executable, build, "--model", checkpoint, *shape, *limits]
        with open(root / f"{number}.json", "w") as plan:
            process = start_process(*arguments, "--output", root / f"torch{number}", env=environment, stdout=plan)
        builds.append((name, number, process))
    plans: dict[str, Any] = {}
    results: dict[str, Any] = {}
    try:
        for name, number, process in builds:
            if process is not None:
                wait(process, f"the build of {name}")
            plans[name] = json.loads((root / f"{number}.json").read_text())
    finally:
        for _, _, process in builds:  # those still running after one has failed
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait()
    if options.prepare:
        return None
    for name, number, _ in builds:
        ranks = plans[name]["cqil"]["p"]
        job = ["mpirun", "-n", ranks, options.runtime_python]
        weights, engine = root / f"torch{number}", root / f"engine{number}"
        compiling = [*job, build, "--model", weights, "--backend", "tensorrt", "--max-batch-size", 1, "--force"]
        wait(start_process(*compiling, "--output", engine), f"the compilation of {name}")
        measure = ["--validate", "--benchmark", "--contexts", options.contexts, "--max-new-tokens", options.steps]
        report = root / f"report{number}.json"
        process = start_process(*job, runtime, "--engine", engine, *measure, "--json", report)
        if process.wait() not in (0, 1):  # a failed validation is reported next to the times
            raise UserError(f"running {name} failed")
        results[name] = json.loads(report.read_text())
        if options.torch:
            kernels = ["mpirun", "-n", ranks, sys.executable, runtime, "--engine", weights, "--device", "cuda"]
            wait(start_process(*kernels, *measure[1:], "--json", report), f"running {name} without TensorRT")
            results[name]["torch"] = json.loads(report.read_text())["benchmark"]
    return plans, results


def describe(plans: dict[str, Any], results: dict[str, Any]) -> str:
    """The table: weights read, milliseconds per token by context, compared with sequential, and parity."""
    contexts = [m["prompt_tokens"] for m in _decode(results["sequential, 1 GPU"]["benchmark"])]
    rows, first = [], None
    for name, result in results.items():
        times = [measured["median_ms"] for measured in _decode(result["benchmark"])]
        first = first or times
        read = plans[name]["bytes_per_token_critical_path"]
        cells = [f"{t:.3f} ({t / base - 1:+.1%})" for t, base in zip(times, first)]
        worst = max(prompt["relative_l2"] for prompt in result["validation"]["prompts"])
        equal = min(prompt["equal_tokens"] for prompt in result["validation"]["prompts"])
        verdict = "pass" if result["validation"]["passed"] else "FAIL"
        rows.append((name, f"{read / 1e9:.2f}", *cells, f"{read / times[0] / 1e9:.2f}", f"{worst:.1e}", equal, verdict))
        if "torch" in result:
            without = [measured["median_ms"] for measured in _decode(result["torch"])]
            cells = [f"{t:.3f} ({t / base - 1:+.1%})" for t, base in zip(without, first)]
            rows.append(("  without TensorRT", "", *cells, f"{read / without[0] / 1e9:.2f}", "", "", ""))
    header = ["", "GB read", *(f"ms at {context}" for context in contexts)]
    return table([*header, "TB/s", "relative L2", "equal tokens", "validation"], rows)


def _decode(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [m for m in measured if m["step"] == "decode"]


if __name__ == "__main__":
    main()
