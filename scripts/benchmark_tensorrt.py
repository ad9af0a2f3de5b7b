#!/usr/bin/env python
"""TensorRT engines beside the torch backend, in the shapes of a published model: every placement, in one run.

    python scripts/benchmark_tensorrt.py --preset llama-7b-p2-d0 --runtime-python PYTHON_WITH_TENSORRT

Needs a GPU per rank and the kernel library, built with TensorRT's headers. Each backend runs in a job of its own,
because TensorRT may live in another Python than PyTorch. Both fill the rank's tensors with the same random numbers, so
nothing is written but the compiled engines (a few megabytes), and their answers must agree. Decode is timed by CUDA
events, prefill is wall clock to the first token on the host.

    python scripts/benchmark_tensorrt.py --layers 8 --placements tensor --profile --runtime-python PYTHON_WITH_TENSORRT

--profile shows, for both, the nodes of the decode step's CUDA graph and how each follows the one before, and the times
of its kernels by CUPTI.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import installed  # noqa: F401
import numpy as np
from measuring import add_pause_flag, kernel_rows, kernel_shares, measure, profile
from synthetic import ROOT, SHAPES, engine_of, model_config, norm_weight
from tracing import Node, captured, find_cupti, kernel_times, node_rows

from cqil_trt import backends, formats
from cqil_trt.commands import Parser, RankParser, check_at_least, check_file, numbers, run_ranks
from cqil_trt.config import CqilConfig, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.files import write_json
from cqil_trt.formats import RankTensor
from cqil_trt.formats.quantized import MatrixPart
from cqil_trt.gpu import cuda, kernel_library
from cqil_trt.gpu.session import Phase
from cqil_trt.gpu.weights import DeviceWeights
from cqil_trt.job import Job, command
from cqil_trt.model import ModelConfig
from cqil_trt.network.rotary import inverse_frequencies
from cqil_trt.presets import preset
from cqil_trt.runner import Runner
from cqil_trt.scheduler import Circle
from cqil_trt.table import table
from cqil_trt.validate import answer

MEASURED = "torch", "tensorrt"
PLACEMENTS = "sequential", "leader", "sharded", "tensor"
DEVIATION = 0.02  # the standard deviation of random weights
# With these scales also that of random codes: the integers from -127 to 127, what `random_block` has of E4M3, and the
# integers from -7 to 7.
SCALES = {"int8": DEVIATION / 73.61, "fp8": DEVIATION / 68.51, "int4": DEVIATION / 4.32}
BLOCK = 15_999_872  # random numbers, of which a tensor takes what it needs, from a place of its own
COMPARED_TOKENS, COMPARED_STEPS = 200, 16
PROFILED_STEPS = 16
ROTARY = "rotary.json"  # computed with PyTorch, which the Python with TensorRT need not have


def parser() -> Parser:
    return add_flags(Parser(description=__doc__.split("\n")[0]))


def add_flags(parser: Any) -> Any:
    parser.add_argument("--preset", default="llama-7b-p2-d0", help="a published configuration (default %(default)s)")
    parser.add_argument("--layers", type=int, help="fewer for a quick look")
    parser.add_argument("--placements", default=",".join(PLACEMENTS), metavar="LIST", help="(default %(default)s)")
    parser.add_argument("--quantize", default=formats.DENSE, choices=[formats.DENSE, *formats.choices()], metavar="F")
    parser.add_argument("--contexts", default="20,200,1000", help="tokens before the measured decode steps")
    parser.add_argument("--batches", default="1,8", help="sequences that decode together, at --batch-context")
    parser.add_argument("--batch-context", type=int, default=200)
    parser.add_argument("--prefills", default="20,128,1000", help="prompt lengths in tokens")
    add_pause_flag(parser)
    parser.add_argument("--steps", type=int, default=64, help="decode steps per measurement")
    parser.add_argument("--profile", action="store_true", help="also show the graph and the kernels of a decode step")
    parser.add_argument("--runtime-python", default=sys.executable, help="the Python that has TensorRT")
    parser.add_argument("--only", choices=MEASURED, help="measure one of the two")
    parser.add_argument("--json", metavar="F", type=Path)
    # For the jobs that this script starts: where they write what they find.
    parser.add_argument("--measure", choices=MEASURED, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cupti", help=argparse.SUPPRESS)
    return parser


def configure(options: argparse.Namespace) -> tuple[CqilConfig, ModelConfig]:
    """The configuration and the model to measure; options that are lists become lists.

    Raises UserError for what cannot be measured.
    """
    cqil = preset(options.preset).cqil
    name = next(name for name in SHAPES if options.preset.startswith(name))
    check_at_least(options, cqil.p, "layers")
    check_at_least(options, 1, "batch_context")
    check_at_least(options, 2, "steps")
    check_at_least(options, 0, "pause")
    model = model_config(name, options.layers)
    longest = model.max_position - 2 * options.steps - 8
    for flag in ("contexts", "prefills"):
        given = getattr(options, flag)
        setattr(options, flag, numbers(given, f"--{flag}", 1, longest) if given else [])
    options.batches = numbers(options.batches, "--batches", 1, 1024) if options.batches else []
    options.drafts = []
    options.placements = options.placements.split(",")
    for placement in options.placements:
        if placement not in PLACEMENTS:
            raise UserError(f"--placements {placement}: expected some of {','.join(PLACEMENTS)}")
    check_file(options.json, "--json")
    if options.layers:
        cqil = replace(cqil, start=0, end=options.layers // cqil.p * cqil.p)
    return cqil, model


def main() -> None:
    if "--measure" in sys.argv:
        run_ranks(lambda: add_flags(RankParser()), measure_ranks)
        return
    with command():
        run(parser().parse_args())


# The jobs


def run(options: argparse.Namespace) -> None:
    cqil, model = configure(options)
    wanted = [options.only] if options.only else list(MEASURED)
    if cuda.device_count() < cqil.p:
        raise UserError(f"{options.preset} needs {cqil.p} GPUs, this host has {cuda.device_count()}")
    pythons = {"torch": sys.executable, "tensorrt": options.runtime_python}
    for backend in wanted:
        done = subprocess.run([pythons[backend], "-c", f"import {backend}"], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            flag = "--runtime-python " if backend == "tensorrt" else ""
            raise UserError(f"{flag}{pythons[backend]} cannot import {backend}: {reason}")
    # PyTorch's packages bring CUPTI and cuBLAS, which the Python with TensorRT does not see.
    package = importlib.util.find_spec("nvidia")
    theirs = [Path(place) for place in package.submodule_search_locations or ()] if package else []
    cupti = find_cupti(*theirs) if options.profile else None
    cublas = [path for place in theirs for path in sorted(place.glob("*/lib/libcublasLt.so.1[23]"))]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-tensorrt-") as directory:
        (Path(directory) / ROTARY).write_text(json.dumps(inverse_frequencies(model)))
        for backend in wanted:
            began = time.perf_counter()
            job = ["mpirun", "-n", str(cqil.p), pythons[backend], str(Path(__file__).resolve()), *sys.argv[1:]]
            job += ["--measure", backend, "--directory", directory, *(["--cupti", cupti] if cupti else [])]
            done = subprocess.run(job, env=environment(cublas if backend == "tensorrt" else []))
            if done.returncode:
                raise UserError(f"measuring {backend} failed")
            found[backend] = json.loads((Path(directory) / f"{backend}.json").read_text())
            found[backend]["seconds"] = time.perf_counter() - began
        agreement = compare(options, Path(directory)) if len(wanted) == 2 else {}
    print(describe(options, found, agreement))
    if options.json:
        report = {"preset": options.preset, "layers": options.layers, "weights": options.quantize}
        write_json(options.json, {**report, "agreement": agreement, "results": found})


def environment(cublas: list[Path]) -> dict[str, str]:
    """A job's environment: this checkout's package, ranks that launch from all cores, a cuBLASLt for the plugins."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Open MPI 4 and 5 would bind each rank to a core.
    free = {"OMPI_MCA_hwloc_base_binding_policy": "none", "PRTE_MCA_hwloc_default_binding_policy": "none"}
    library = {"CQIL_CUBLASLT": str(cublas[-1])} if cublas else {}
    return {**library, **os.environ, **free, "PYTHONPATH": os.pathsep.join(paths)}


def compare(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """How far the answers of the two backends are apart, by placement."""
    found = {}
    for placement in options.placements:
        logits, tokens = zip(*(load_answers(directory / f"{backend}-{placement}.npz") for backend in MEASURED))
        distance = np.linalg.norm(logits[1] - logits[0]) / np.linalg.norm(logits[0])
        differing = np.nonzero(tokens[0] != tokens[1])[0]
        equal = int(differing[0]) if differing.size else len(tokens[0])
        found[placement] = {"relative_l2": float(distance), "equal_tokens": equal, "tokens": len(tokens[0])}
    return found


def load_answers(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as stored:
        return stored["logits"].astype(np.float64), stored["tokens"]


def describe(options: argparse.Namespace, found: dict[str, Any], agreement: dict[str, Any]) -> str:
    """The table of times, and with --profile those of nodes and kernels."""
    kinds = (
        ("decode", "contexts", "decode at {}"),
        ("batch", "batches", "batch {}"),
        ("prefill", "prefills", "prefill {}"),
    )
    columns = [(kind, str(size), what.format(size)) for kind, flag, what in kinds for size in getattr(options, flag)]
    rows = []
    for placement in options.placements:
        first: dict[tuple[str, str], float] = {}
        for backend, job in found.items():
            result = job["results"][placement]
            cells = []
            for kind, size, _ in columns:
                median = float(np.median(result[kind][size]))
                base = first.setdefault((kind, size), median)
                cells.append(f"{median:.3f}" + ("" if backend == next(iter(found)) else f" ({median / base - 1:+.0%})"))
            close = agreement.get(placement) if backend == "tensorrt" else None
            cells.append(f"{close['relative_l2']:.1e}, {close['equal_tokens']}/{close['tokens']}" if close else "")
            cells.append(f"{result['build_seconds']:.1f}" if "build_seconds" in result else "")
            rows.append((placement, backend, *cells))
    header = ["", "", *(name for _, _, name in columns), "relative L2, tokens", "build s"]
    gpus = next(iter(found.values()))["gpu"]
    seconds = ", ".join(f"{backend} {job['seconds']:.0f} s" for backend, job in found.items())
    lines = [f"{options.preset}, {gpus}; medians, milliseconds; the jobs took {seconds}\n", table(header, rows)]
    if "tensorrt" in found and not found["tensorrt"]["library"]:
        lines.append("the plugins found no cuBLASLt (CQIL_CUBLASLT names one): our kernels multiplied many rows")
    for placement in options.placements if options.profile else ():
        for backend, job in found.items():
            result = job["results"][placement]
            title = f"{placement}, {backend}, rank 0"
            nodes = [Node(**node) for node in result["nodes"]]
            lines += ["", table([f"{title}: after", "the node", "which", "times"], node_rows(nodes))]
            if result["kernels"]:
                header = [title, "per step", "µs each", "µs per step", "share"]
                lines += ["", table(header, kernel_rows(result["kernels"]))]
            else:
                lines += ["", f"{title}: no times of kernels: {result['no_kernels']}"]
    return "\n".join(lines)


# A rank of a job


def random_block(stored: str, size: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Numbers for matrices, float16, and bytes for codes of the format `stored`.

    The mean of what codes stand for is 0: that of a matrix of thousands of columns would add up from layer to layer
    until float16 is too small.
    """
    random = np.random.default_rng(0)
    values = (random.standard_normal(size, np.float32) * DEVIATION).astype(np.float16)
    if stored == "int4":  # two codes, around 8
        low, high = random.integers(1, 16, size=(2, 2 * size), dtype=np.uint8)
        return values, high << 4 | low
    if stored == "int8":
        return values, random.integers(-127, 128, size=2 * size, dtype=np.int8).view(np.uint8)
    return values, random.integers(256, size=2 * size, dtype=np.uint8) & 0xF7  # without the NaNs of E4M3


class RandomWeights(DeviceWeights):
    """Random numbers, the same ones in every backend."""

    def _copy(self, stream: Any) -> None:
        values, codes = random_block(formats.base(self._plan.weights))
        room = cuda.Arena(2 * values.nbytes + 2 * codes.nbytes, "random numbers")
        try:
            blocks = []
            for array in (values, codes):
                twice = np.concatenate([array, array])  # so that any place in the first half has a whole block after it
                blocks.append(room.take(twice.nbytes))
                cuda.upload(blocks[-1], twice, stream)
                cuda.call("StreamSynchronize", stream)
            for number, place in enumerate(self._places):
                self._fill(place.tensor, number, *blocks, place.address, stream)
                self._complete(place, stream)
                cuda.call("StreamSynchronize", stream)
        finally:
            room.free()

    def _fill(self, tensor: RankTensor, number: int, values: int, codes: int, address: int, stream: Any) -> None:
        source, constant = values, None
        if isinstance(tensor, MatrixPart):
            source = codes
            if tensor.part != "weight":
                constant = 8 if tensor.part == "zero" else SCALES[formats.base(self._plan.weights)]
        elif "norm" in tensor.name:
            constant = norm_weight(self._plan.model)
        if constant is not None:
            constants = np.full(tensor.shape, constant, tensor.dtype)
            cuda.upload(address, constants, stream)
            cuda.call("StreamSynchronize", stream)
            return
        size = 2 * BLOCK
        start = source + (number * 7_919_008 * 2) % size
        for offset in range(0, tensor.nbytes, size):
            cuda.copy(address + offset, start, min(size, tensor.nbytes - offset), stream)


def measure_ranks(options: argparse.Namespace, job: Job) -> None:
    """Measures one backend on every rank; rank 0 writes what it finds to --directory."""
    cqil, model = configure(options)
    shapes = {
        "sequential": CqilConfig(p=1),
        "leader": replace(cqil, placement="leader"),
        "sharded": replace(cqil, placement="sharded"),
        "tensor": CqilConfig(p=cqil.p, placement="tensor"),
    }
    longest = max([COMPARED_TOKENS, options.batch_context, *options.contexts, *options.prefills])
    limits = EngineLimits(
        max_batch_size=max([1, *options.batches]),
        max_seq_len=longest + 2 * options.steps + COMPARED_STEPS + 8,
        dtype="float16",
        weights=options.quantize,
        prefill_chunk=1024,
    )
    results, library = {}, 0
    for name in options.placements:
        shape = shapes[name]
        comm = None if shape.p == 1 else job.comm
        idle = comm is None and job.rank > 0

        def opened(shape: CqilConfig = shape, comm: Any = comm, idle: bool = idle) -> tuple[Any, dict[str, Any]] | None:
            return None if idle else open_session(options, limits, model, shape, comm, job)

        made = job.agree(opened)
        job.agree(lambda m=made: None if m is None else m[0].wait())
        if made is not None:
            session, found = made
            library = session._library.cqil_linear_library(-1)
            title = f"{options.measure}, {name}" if job.rank == 0 else None
            found |= measure(session, model, options, title)
            prompt = np.random.default_rng(1).integers(model.vocab_size, size=COMPARED_TOKENS).tolist()
            logits, tokens = answer(Runner.of(session, "latency"), prompt, COMPARED_STEPS)
            if options.profile:
                found |= traced(options, session, prompt)
            if job.rank == 0:
                np.savez(options.directory / f"{options.measure}-{name}.npz", logits=logits, tokens=tokens)
                results[name] = found
            session.close()
        job.wait()
    if job.rank == 0:
        report = {"gpu": f"{cqil.p} x {cuda.device_name()}", "library": library, "results": results}
        (options.directory / f"{options.measure}.json").write_text(json.dumps(report))


def open_session(
    options: argparse.Namespace, limits: EngineLimits, model: ModelConfig, shape: CqilConfig, comm: Any, job: Job
) -> tuple[Any, dict[str, Any]]:
    """A session of one placement on this rank's GPU, and what its making took."""
    engine = engine_of(model, shape, limits, json.loads((options.directory / ROTARY).read_text()))
    ranks = tuple(engine.plan(rank) for rank in range(engine.world_size))
    backend = backends.load(options.measure)
    description = backend.describe(limits, {}, ranks)
    if description.circles:
        limits = engine.limits = replace(limits, circle=Circle.length_for(model.sliding_window, limits))
    found: dict[str, Any] = {"bytes": max(rank.bytes_per_token for rank in ranks)}
    if options.measure == "torch":
        from cqil_trt.backends.torch.gpu_session import TorchCudaSession

        rank = 0 if comm is None else comm.Get_rank()
        weights = RandomWeights(engine, rank, job.rank, kernel_library.load())
        return TorchCudaSession(engine, comm, job.rank, limits.max_batch_size, weights), found
    from cqil_trt.backends.tensorrt.session import TensorRtSession

    class RandomSession(TensorRtSession):
        _weights_type = RandomWeights

    rank = 0 if comm is None else comm.Get_rank()
    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        backend.compile(
            backends.Compilation(
                directory=Path(directory),
                plan=ranks[rank],
                limits=limits,
                rotary=engine.rotary,
                description=description,
                options={"verbose": rank == 0},
                progress=False,
            )
        )
        found["build_seconds"] = time.perf_counter() - began
        engine.backend_version, engine.build = description.version, description.build
        engine.architecture = description.architecture
        engine.rank_file = lambda rank, suffix: Path(directory) / f"rank{rank}.{suffix}"
        return RandomSession(engine, comm, job.rank), found


def traced(options: argparse.Namespace, session: Any, prompt: list[int]) -> dict[str, Any]:
    """The nodes of a decode step's graph without the choice of the token, and the times of its kernels.

    All ranks call it together.
    """
    session.load(prompt)
    session.time_decode((0,), 4)
    nodes = captured(session._stream, lambda: session._execute(Phase.DECODE, 1, 1, 1))
    found: dict[str, Any] = {"nodes": [vars(node) for node in nodes], "kernels": [], "no_kernels": ""}
    if options.measure == "torch":
        return found | {"kernels": profile(session, prompt, PROFILED_STEPS)}
    if options.cupti is None:
        return found | {"no_kernels": "there is no libcupti"}
    try:
        with kernel_times(options.cupti) as events:
            session.time_decode((0,), PROFILED_STEPS)
    except UserError as error:
        return found | {"no_kernels": str(error)}
    return found | {"kernels": kernel_shares(events, PROFILED_STEPS)}


if __name__ == "__main__":
    main()
