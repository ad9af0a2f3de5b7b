#!/usr/bin/env python
"""Latency of the torch backend's CUDA kernels in every placement, side by side, with parity, in one run.

    mpirun -n 2 python scripts/benchmark.py --preset llama-7b-p2-d0 --synthetic

Rank 0 also runs the sequential model on its GPU alone. Weights are random in the model's shapes and generated on the
GPUs; the float32 reference has the same. Decode is timed by CUDA events; a step is the network, the choice of the token
and the next step's input. Prefill is wall clock to the first token on the host.

    python scripts/benchmark.py --preset llama-7b-p4-d0 --synthetic --alone

On one GPU: rank 0's share, which is the slowest rank's. Its collectives have no peers, so their time comes on top, and
the result is not the model's.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import installed  # noqa: F401
import numpy as np
import torch
from measuring import add_pause_flag, kernel_rows, measure, profile, read_bandwidth, use_device
from mpi4py import MPI
from plots import check_plot, pyplot
from synthetic import SHAPES, engine_of, model_config, norm_weight

from cqil_trt import formats, reference
from cqil_trt.backends.torch.gpu_session import TorchCudaSession
from cqil_trt.commands import RankParser, check_at_least, check_file, numbers, run_ranks
from cqil_trt.config import AUTO, KV_DTYPES, CqilConfig, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.families.layout import checkpoint_shapes, layer_matrices
from cqil_trt.files import write_json
from cqil_trt.formats import RankTensor
from cqil_trt.gpu import cuda, kernel_library
from cqil_trt.gpu.weights import DeviceWeights
from cqil_trt.job import Job
from cqil_trt.model import ModelConfig
from cqil_trt.network.rotary import inverse_frequencies
from cqil_trt.presets import PRESETS, preset
from cqil_trt.runner import Runner
from cqil_trt.scheduler import Circle, Step
from cqil_trt.shard import plan
from cqil_trt.speculation import MAX_TOKENS as MAX_DRAFTED
from cqil_trt.table import table
from cqil_trt.validate import answer, compare, threshold_of
from cqil_trt.weights import WeightReader, cut
from cqil_trt.weights.quantized import QuantizingReader

COMM = MPI.COMM_WORLD
RANK = COMM.Get_rank()
MAX_TOKENS = 1 << 17
PEER_TOKENS = 1024  # the longest context of peers, some of which recompute it for every token
PARITY_PROMPTS = 20, 200  # tokens in each
STEPS = 32  # greedy tokens after them that are compared with the reference


class SyntheticReader(WeightReader):
    """Random tensors on this process's GPU, the same on every rank."""

    source = "random weights"

    def __init__(self, model: ModelConfig):
        self._shapes, self._norm = checkpoint_shapes(model), norm_weight(model)
        self._last: tuple[str, torch.Tensor] | None = None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        return torch.float16

    def read(self, name: str, rows: Any = None, columns: Any = None) -> torch.Tensor:
        if self._last is None or self._last[0] != name:
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
            generator = torch.Generator("cuda").manual_seed(seed)
            shape = self._shapes[name]
            values = torch.randn(shape, generator=generator, device="cuda", dtype=torch.float16).mul_(0.02)
            self._last = name, torch.full_like(values, self._norm) if "norm" in name else values
        return cut(self._last[1], rows, columns)


class SyntheticWeights(DeviceWeights):
    """Weights from a reader instead of an engine directory."""

    def __init__(self, engine: Any, rank: int, device: int, reader: WeightReader):
        self._reader = reader
        super().__init__(engine, rank, device, kernel_library.load())

    def _copy(self, stream: Any) -> None:
        use_device(self._device)  # PyTorch's, in this thread
        with saying_when_memory_is_full():
            for place in self._places:
                made = whole(place.tensor, self._reader)
                torch.cuda.synchronize()
                cuda.copy(place.address, made.data_ptr(), made.nbytes, stream)
                self._complete(place, stream)
                cuda.call("StreamSynchronize", stream)


class SyntheticSession(TorchCudaSession):
    """A session with such weights."""

    def __init__(self, engine: Any, comm: Any, reader: WeightReader):
        weights = SyntheticWeights(engine, 0 if comm is None else comm.Get_rank(), RANK, reader)
        super().__init__(engine, comm, RANK, engine.limits.max_batch_size, weights)


def whole(tensor: RankTensor, reader: WeightReader) -> torch.Tensor:
    """The elements of a rank's tensor, in its shape, on this process's GPU."""
    return torch.cat([block.reshape(-1).cuda() for block in tensor.blocks(reader)]).view(tensor.shape)


def parser() -> RankParser:
    parser = RankParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="llama-7b-p2-d0", choices=sorted(PRESETS), metavar="NAME")
    parser.add_argument(
        "--synthetic", action="store_true", required=True, help="random weights (required: there are no others)"
    )
    parser.add_argument("--shapes", choices=sorted(SHAPES), help="shapes of another model; needs --start and --end")
    parser.add_argument("--start", type=int, help="a different range of layers than the preset's")
    parser.add_argument("--end", type=int)
    parser.add_argument("--layers", type=int, help="fewer for a quick look")
    parser.add_argument(
        "--ranks-per-layer",
        type=int,
        default=1,
        metavar="T",
        help="ranks that share each layer of a group; from 2 on, groups with a layer for each rank are measured too, "
        "and leader is not",
    )
    parser.add_argument(
        "--drop-attention-join",
        metavar="LAYERS",
        help="also measure sharded and tensor without the all-reduce after attention in these layers, as build.py "
        "takes them; all: in every layer that is split",
    )
    parser.add_argument(
        "--quantize",
        default=formats.DENSE,
        choices=[formats.DENSE, *formats.choices()],
        metavar="F",
        help="the format of the weights (default dense)",
    )
    parser.add_argument(
        "--kv-dtype", choices=KV_DTYPES, default=AUTO, help="as build.py takes it (default %(default)s)"
    )
    parser.add_argument("--contexts", default="128,200,1024,4096", help="tokens before the measured decode steps")
    parser.add_argument("--prefills", default="20,128,1024,4096", help="prompt lengths in tokens")
    add_pause_flag(parser)
    parser.add_argument("--batches", default="1,4,8", help="sequences that decode together, at --batch-context")
    parser.add_argument("--batch-context", type=int, default=200)
    parser.add_argument("--drafts", default="", help="tokens drafted for one sequence in a step, at --batch-context")
    parser.add_argument("--steps", type=int, default=64, help="decode steps per measurement")
    parser.add_argument("--alone", action="store_true", help="rank 0's share of every placement, without the others")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="then generate N tokens, watching for drift")
    parser.add_argument("--profile", action="store_true", help="also time the kernels of a decode step")
    parser.add_argument("--peers", action="store_true", help="also measure alternatives (scripts/baselines)")
    parser.add_argument("--json", metavar="F", type=Path)
    parser.add_argument("--plot", metavar="F.png", type=Path)
    return parser


def model_name(options: argparse.Namespace) -> str:
    return options.shapes or next(name for name in SHAPES if options.preset.startswith(name))


def configure(options: argparse.Namespace, ranks: int) -> tuple[CqilConfig, ModelConfig]:
    """The configuration and the model to measure; --contexts, --prefills and --batches become lists.

    Raises UserError for what cannot be measured.
    """
    options.contexts = numbers(options.contexts, "--contexts", 1, MAX_TOKENS)
    options.prefills = numbers(options.prefills, "--prefills", 1, MAX_TOKENS) if options.prefills else []
    options.batches = numbers(options.batches, "--batches", 1, 1024) if options.batches else []
    options.drafts = numbers(options.drafts, "--drafts", 1, MAX_DRAFTED) if options.drafts else []
    check_at_least(options, 1, "batch_context")
    check_at_least(options, 2, "steps")
    check_at_least(options, 0, "pause")
    check_at_least(options, 0, "soak")
    check_file(options.json, "--json")
    check_plot(options.plot)
    cqil = replace(preset(options.preset).cqil, ranks_per_layer=options.ranks_per_layer)
    check_at_least(options, cqil.p, "layers")
    if ranks != (1 if options.alone else cqil.ranks):
        advice = "--alone is one process" if options.alone else f"mpirun -n {cqil.ranks}, or --alone on one GPU"
        raise UserError(f"{options.preset} with {ranks} ranks: {advice}")
    if options.alone and (cqil.d or options.soak or options.peers):
        raise UserError("--alone takes neither bypassing, --soak nor --peers: they need the other ranks")
    if options.shapes and not options.layers and (options.start is None or options.end is None):
        raise UserError("--shapes needs --start and --end")
    if options.layers and (options.start is not None or options.end is not None):
        raise UserError("--layers groups all layers: it takes neither --start nor --end")
    if options.peers and cqil.ranks_per_layer > 1:
        raise UserError("--peers have one rank per layer")
    if options.peers and options.quantize != formats.DENSE:
        raise UserError("--peers have no quantized weights")
    if options.peers and options.kv_dtype != AUTO:
        raise UserError(f"--peers have no KV cache in {options.kv_dtype}")
    if options.peers and min(options.contexts) > PEER_TOKENS:
        raise UserError(f"--peers are measured at --contexts up to {PEER_TOKENS}")
    if options.start is not None or options.end is not None:
        start, end = (
            given if given is not None else its for given, its in ((options.start, cqil.start), (options.end, cqil.end))
        )
        cqil = replace(cqil, start=start, end=end)
    if options.layers:
        cqil = replace(cqil, start=0, end=options.layers // cqil.p * cqil.p)
    model = model_config(model_name(options), options.layers)
    cqil.check_depth(model.num_layers)
    if not cqil.groups:
        raise UserError(f"no layers run concurrently in [{cqil.start}, {cqil.end})")
    return cqil, model


def measured(options: argparse.Namespace, cqil: CqilConfig, num_layers: int) -> dict[str, CqilConfig]:
    """What is measured, by name: one rank, every placement, and with --drop-attention-join those with fewer joins.

    With several ranks per layer, also groups of as many layers as there are ranks, in as much of the same range.
    """
    found: dict[str, CqilConfig] = {"sequential": CqilConfig(p=1)}
    if cqil.ranks_per_layer == 1:
        found["leader"] = replace(cqil, placement="leader")
    else:
        end = cqil.end - (cqil.end - cqil.start) % cqil.ranks
        if end > cqil.start:
            found[f"sharded, p={cqil.ranks}"] = replace(cqil, p=cqil.ranks, ranks_per_layer=1, end=end)
    found["sharded"] = replace(cqil, placement="sharded")
    found["tensor"] = CqilConfig(p=cqil.p, ranks_per_layer=cqil.ranks_per_layer, placement="tensor")
    if (wanted := options.drop_attention_join) is not None:
        for name in ("sharded", "tensor"):
            layers = found[name].split_layers(num_layers) if wanted == "all" else wanted
            found[f"{name}, dropped"] = found[name].dropping(layers, num_layers)
    return found


@contextmanager
def saying_when_memory_is_full() -> Iterator[None]:
    """Turns PyTorch's out-of-memory error into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        free, size = torch.cuda.mem_get_info()
        raise UserError(
            f"rank {RANK}: the GPU's memory is full ({free / 1e9:.0f} of {size / 1e9:.0f} GB are free): measure fewer "
            "--layers"
        ) from None


def run(options: argparse.Namespace, job: Job) -> None:
    cqil, model = job.agree(lambda: configure(options, job.size))
    placements = job.agree(lambda: measured(options, cqil, model.num_layers))
    job.agree(lambda: use_device(RANK))
    reader: WeightReader = SyntheticReader(model)
    if options.quantize != formats.DENSE:
        reader = QuantizingReader(reader, {name: options.quantize for _, name in layer_matrices(model)}, "float16")
    longest = max(options.contexts + [options.batch_context, *options.prefills]) + 2 * options.steps + 8 + MAX_DRAFTED
    longest = max(longest, max(PARITY_PROMPTS) + STEPS)
    limits = EngineLimits(
        max_batch_size=max(options.batches + [1]),
        max_seq_len=max(longest, options.soak + 64),
        dtype="float16",
        weights=options.quantize,
        kv_dtype=options.kv_dtype,
        prefill_chunk=1024,
    )
    limits = replace(limits, circle=Circle.length_for(model.sliding_window, limits))

    def bandwidth_of_reading() -> float:
        with saying_when_memory_is_full():
            return read_bandwidth()

    bandwidth = job.agree(bandwidth_of_reading)
    prompts = [
        np.random.default_rng(i).integers(model.vocab_size, size=n).tolist() for i, n in enumerate(PARITY_PROMPTS)
    ]
    judged = {"sequential": placements["sequential"]} if options.alone else placements
    probes = job.agree(lambda: reference_answers(model, reader, limits, judged, prompts) if RANK == 0 else {})
    results = {}
    for name, shape in placements.items():
        engine = engine_of(model, shape, limits)
        comm = None if shape.ranks == 1 else MPI.COMM_SELF if options.alone else COMM
        session = job.agree(
            lambda e=engine, c=comm: SyntheticSession(e, c, reader) if c is not None or RANK == 0 else None
        )
        job.agree(lambda s=session: None if s is None else s.wait())
        if session is None:
            job.wait()
            continue
        found = measure(session, model, options, name if RANK == 0 else None)
        found["parity"] = parity(session, prompts, probes.get(name)) if name in judged else []
        ranks = plan(model, shape, limits.dtype, limits.weights)
        found["bytes"] = max(rank.bytes_per_token for rank in ranks)
        found["collectives"] = ranks[0].collectives
        if options.soak and name == "sharded":
            found["soak"] = soak(session, prompts[0], options.soak)
        if options.profile:
            found["profile"] = profile(session, prompts[-1])
        results[name] = found
        session.close()
        if shape.ranks == 1:
            job.wait()
    report = {
        "model": model_name(options),
        "layers": model.num_layers,
        "cqil": cqil.to_dict(),
        "weights": options.quantize,
        "kv_dtype": options.kv_dtype,
        "alone": options.alone,
        "gpu": cuda.device_name(),
        "read_tb_s": bandwidth,
        "results": results,
    }

    def save() -> None:
        if options.json:
            write_json(options.json, report)

    title = f"{model_name(options)}, {model.num_layers} layers, groups of {cqil.p} in [{cqil.start}, {cqil.end})"
    if options.alone:
        title += ", rank 0's share without its peers"
    if RANK == 0:
        gpus = f"{COMM.Get_size()} x {cuda.device_name()} (reads {bandwidth:.2f} TB/s)"
        cache = "" if options.kv_dtype == AUTO else f", KV cache {options.kv_dtype}"
        print(f"{title}, float16, {options.quantize} weights{cache}, {gpus}; milliseconds, median [10%, 90%]\n")
        print(describe(results, options, bandwidth), flush=True)
        save()
        if options.plot:
            plot(results, options, title)
    for name, times in measure_peers(model, reader, placements, options) if options.peers else ():
        if RANK == 0:  # some take minutes to compile
            report.setdefault("peers", {})[name] = times
            print("\n" + describe_peers({name: times}, results, options), flush=True)
            save()


def reference_answers(
    model: ModelConfig,
    reader: WeightReader,
    limits: EngineLimits,
    placements: Mapping[str, CqilConfig],
    prompts: list[list[int]],
) -> dict[str, Any]:
    """The float32 reference's answers for each placement; placements that compute the same share them."""

    def computes(shape: CqilConfig) -> tuple[Any, ...]:
        return shape.groups, shape.drop_attention_join, bool(shape.drop_attention_join) and shape.ranks

    answers: dict[str, Any] = {}
    with saying_when_memory_is_full():
        network = reference.with_kv_cache(reference.from_reader(model, reader), limits)
        for name, shape in placements.items():
            alike = next((other for other in answers if computes(placements[other]) == computes(shape)), None)
            answers[name] = answers.get(alike) or reference.probe(
                reference.with_cqil(network, shape), prompts, [STEPS] * len(prompts), False
            )
    del network
    torch.cuda.empty_cache()
    return answers


def parity(session: Any, prompts: list[list[int]], probes: list[Any] | None) -> list[dict[str, Any]]:
    """The engine against the reference's answers (None on ranks that have none)."""
    found = []
    for i, prompt in enumerate(prompts):
        logits, tokens = answer(Runner.of(session, "latency"), prompt, STEPS)
        if probes is not None:
            found.append(compare(logits, tokens, probes[i], threshold_of(session.limits)).to_dict())
    return found


def soak(session: Any, prompt: list[int], count: int) -> dict[str, Any]:
    """Generates `count` tokens; counts steps with equal residual streams on all ranks, and memory growth in bytes."""
    session.load(prompt)
    session.time_decode((0,), 1)
    before, equal = torch.cuda.mem_get_info()[0], 0
    for _ in range(count):
        session.submit(Step(decode=(0,)))
        [choice] = session.collect().choices[0]
        states = COMM.allgather((hashlib.sha256(session.joined()).hexdigest(), choice.token))
        equal += len(set(states)) == 1
    return {"tokens": count, "equal": equal, "grown_bytes": before - torch.cuda.mem_get_info()[0]}


def measure_peers(
    model: ModelConfig, reader: WeightReader, placements: Mapping[str, CqilConfig], options: argparse.Namespace
) -> Iterator[tuple[str, dict[int, float]]]:
    """Peers, and the median milliseconds of their decode step by context, wall clock; meaningful on rank 0."""
    import torch.distributed as dist
    from baselines.compiled import TensorParallelDecoder
    from baselines.published import PublishedCqil

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29518")
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", rank=RANK, world_size=COMM.Get_size(), device_id=device)
    contexts, steps = [context for context in options.contexts if context <= PEER_TOKENS], 16
    prompt = np.random.default_rng(0).integers(model.vocab_size, size=max(contexts) + steps).tolist()

    def timed(step: Callable[[int], Any]) -> float:
        """The median milliseconds of `step`, called with its number."""
        times = []
        for i in range(steps):
            torch.cuda.synchronize()
            began = time.perf_counter()
            step(i)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - began) * 1e3)
        return float(np.median(times[3:]))

    network = reference.from_reader(model, reader, torch.float16)
    if RANK == 0:
        yield "Hugging Face generate, one GPU", {c: generate_time(network, prompt[:c], steps) for c in contexts}
    if placements["leader"].d == 0:
        COMM.Barrier()
        published = PublishedCqil(network, placements["leader"])
        yield (
            "published wrapper's method",
            {c: timed(lambda i, c=c: published.next_token(prompt[: c + i])) for c in contexts},
        )
        del published
    del network
    torch.cuda.empty_cache()
    for name, shape in (("torch.compile, one GPU", "sequential"), ("torch.compile tensor parallel", "tensor")):
        if RANK and placements[shape].p == 1:
            COMM.Barrier()
            continue
        mine = plan(model, placements[shape], "float16")[RANK]
        weights = {tensor.name: whole(tensor, reader) for tensor in mine.tensors}
        rotary = torch.tensor(inverse_frequencies(model))
        decoder = TensorParallelDecoder(mine, weights, rotary, max(contexts) + steps)
        compiled = torch.compile(decoder, mode="reduce-overhead", fullgraph=True)
        token, position = torch.tensor([5], device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda")

        def step(i: int, context: int, compiled=compiled, token=token, position=position) -> None:
            position.fill_(context + i)
            token.copy_(compiled(token, position).argmax().reshape(1))

        with torch.inference_mode():
            for i in range(4):
                step(i, 0)
            times = {c: timed(lambda i, c=c, step=step: step(i, c)) for c in contexts}
        yield name, times
        if placements[shape].p == 1:
            COMM.Barrier()
    # NCCL waits for the graphs that use it.
    del step, compiled, decoder
    torch.compiler.reset()
    gc.collect()
    dist.destroy_process_group()


def generate_time(network: Any, prompt: list[int], steps: int) -> float:
    """Milliseconds per token of greedy generation with a cache, after the prompt."""
    ids = torch.tensor([prompt], device="cuda")
    times = []
    for count in (1, 1 + steps, 1, 1 + steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        network.generate(ids, min_new_tokens=count, max_new_tokens=count, do_sample=False, pad_token_id=0)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return (times[3] - times[2]) / steps


def describe_peers(peers: dict[str, Any], results: dict[str, Any], options: argparse.Namespace) -> str:
    """Peers compared with ours: how many times longer than `sharded` each takes."""
    contexts = [context for context in options.contexts if context <= PEER_TOKENS]
    rows = []
    for name, times in peers.items():
        ours = [float(np.median(results["sharded"]["decode"][context])) for context in contexts]
        rows.append((name, *(f"{times[c]:.2f} ({times[c] / mine:.1f} x)" for c, mine in zip(contexts, ours))))
    return table(["ms per token (ratio to sharded)", *(f"at {context}" for context in contexts)], rows)


def describe(results: dict[str, Any], options: argparse.Namespace, bandwidth: float) -> str:
    """Tables: decode by context with bandwidth and parity, decode by batch, prefill."""
    first = results["sequential"]

    def cell(kind: str, name: str, size: int) -> str:
        median, base = np.median(results[name][kind][size]), np.median(first[kind][size])
        low, high = np.percentile(results[name][kind][size], (10, 90))
        change = "" if name == "sequential" else f" {median / base - 1:+.1%}"
        return f"{median:.3f}{change} [{low:.3f}, {high:.3f}]"

    lines, rows = [], []
    for name, found in results.items():
        read = found["bytes"] / np.median(found["decode"][options.contexts[0]]) / 1e9
        parity = "-", "-", "not judged"
        if found["parity"]:
            worst = max(p["relative_l2"] for p in found["parity"])
            equal = min(p["equal_tokens"] for p in found["parity"])
            passed = all(p["passed"] for p in found["parity"])
            parity = f"{worst:.1e}", f"{equal}/{STEPS}", "pass" if passed else "FAIL"
        cells = [cell("decode", name, context) for context in options.contexts]
        of = f"{read:.2f} ({read / bandwidth:.0%})"
        collectives = str(found["collectives"])
        rows.append((name, f"{found['bytes'] / 1e9:.2f}", collectives, *cells, of, *parity))
    contexts = [f"decode at {context}" for context in options.contexts]
    lines.append(table(["", "GB/GPU", "collectives", *contexts, "TB/s", "relative L2", "tokens", "parity"], rows))
    for kind, sizes, what in (
        ("batch", options.batches, f"decode at {options.batch_context}, batch {{}}"),
        ("drafts", options.drafts, f"decode at {options.batch_context}, {{}} drafted"),
        ("prefill", options.prefills, "prefill {}"),
    ):
        if sizes:
            rows = [(name, *(cell(kind, name, size) for size in sizes)) for name in results]
            lines += ["", table(["", *(what.format(size) for size in sizes)], rows)]
    for name, found in results.items():
        if "profile" in found:
            rows = kernel_rows(found["profile"])
            header = [f"{name}, rank 0", "per step", "µs each", "µs per step", "share"]
            lines += ["", table(header, rows)]
        if "soak" in found:
            s = found["soak"]
            lines += [
                "",
                f"{name}: {s['equal']} of {s['tokens']} steps equal on all ranks, memory +{s['grown_bytes']} B",
            ]
    return "\n".join(lines)


def plot(results: dict[str, Any], options: argparse.Namespace, title: str) -> None:
    figure, axes = pyplot().subplots(figsize=(7, 4))
    for name, found in results.items():
        axes.plot(options.contexts, [np.median(found["decode"][c]) for c in options.contexts], marker="o", label=name)
    axes.set(xlabel="context, tokens", ylabel="ms per token", ylim=(0, None))
    axes.set_title(f"{title}, batch 1", fontsize=8)
    axes.legend()
    figure.tight_layout()
    figure.savefig(options.plot, dpi=150)


if __name__ == "__main__":
    run_ranks(parser, run)
