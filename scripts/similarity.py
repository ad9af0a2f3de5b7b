#!/usr/bin/env python
"""Which layers of a model can run concurrently: how similar their inputs are, and what each choice saves and costs.

    python scripts/similarity.py --model path/to/model --text text.txt --plot similarity.png
    python scripts/similarity.py --model path/to/model --text text.txt --search --plot search.png
    python scripts/similarity.py --model path/to/model --text text.txt --joins

Without --search, ranges are recommended by similarity, the paper's criterion; with it, by measured perplexity.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import installed  # noqa: F401
import numpy as np
from plots import check_plot, pyplot
from tqdm import tqdm

from cqil_trt import formats
from cqil_trt.commands import Parser, check_at_least, check_file, check_texts, chosen_model, numbers
from cqil_trt.config import BYPASSES, DTYPES, MAX_RANKS, CqilConfig, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.job import command
from cqil_trt.latency import critical_bytes, decode_seconds
from cqil_trt.model import ModelConfig
from cqil_trt.quality.perplexity import Scores
from cqil_trt.table import size, table

# The authors' published ranges begin at 38% of the layers or later; the last layers differ most from each other.
FIRST = 0.375
REPORTED = 10  # configurations per line of progress, without a terminal


def parser() -> Parser:
    p = Parser(prog="similarity.py", description=__doc__.split("\n")[0])
    p.add_argument(
        "--model", metavar="PATH", help="Hugging Face directory, GGUF file, or org/name[@revision] (default: the demo)"
    )
    p.add_argument(
        "--text", metavar="PATH", type=Path, nargs="+", required=True, help="text files, .jsonl, directories"
    )
    p.add_argument("--column", default="text", help="field of .jsonl and datasets that holds the text")
    p.add_argument(
        "--text-tokens",
        metavar="N",
        type=int,
        default=8192,
        help="at most N tokens of the text, in whole blocks (default %(default)s)",
    )
    p.add_argument("--block", metavar="N", type=int, default=1024, help="tokens per forward pass (default %(default)s)")
    p.add_argument("--p", metavar="P,P", default="2,4", help="group sizes, and numbers of ranks (default %(default)s)")
    p.add_argument(
        "--threshold",
        type=float,
        default=0.8,
        help="lowest similarity of a layer's input to its group's (default %(default)s)",
    )
    p.add_argument(
        "--first", metavar="LAYER", type=int, help="the first layer of all ranges (default: 3/8 of the layers)"
    )
    p.add_argument("--dtype", choices=DTYPES, default="float16", help="type of weights, for predicted latency")
    p.add_argument(
        "--joins",
        action="store_true",
        help="measure what each layer loses without the all-reduce after attention (build.py --drop-attention-join)",
    )
    search = p.add_argument_group("search")
    search.add_argument("--search", action="store_true", help="measure perplexity with every range from --first on")
    search.add_argument("--d", metavar="D,D", default="0", help="bypass distances to measure (default %(default)s)")
    search.add_argument("--bypass", choices=BYPASSES, default="mlp", help="where the bypass goes when d > 0")
    search.add_argument(
        "--quantize",
        metavar="FORMAT,…",
        help=f"also measure with the layers' matrices in these formats ({', '.join(formats.choices())})",
    )
    search.add_argument(
        "--tolerance",
        type=float,
        default=0.8,
        help="log-perplexity that a recommended range may cost before training (default %(default)s)",
    )
    p.add_argument("--plot", metavar="F.png", type=Path, help="heat map of similarities, or the search's frontier")
    p.add_argument("--json", metavar="F", type=Path, help="write all measurements to this file")
    return p


def main() -> None:
    with command():
        run(parser().parse_args())


def run(options: argparse.Namespace) -> None:
    from cqil_trt import reference
    from cqil_trt.checkpoint import Checkpoint
    from cqil_trt.quality import open_tokenizer, text_blocks
    from cqil_trt.quality.perplexity import score_reference
    from cqil_trt.quality.similarity import input_similarity

    check_at_least(options, 2, "block", "text_tokens")
    check_file(options.json, "--json")
    check_plot(options.plot)
    check_texts(options.text, "--text")
    ps = numbers(options.p, "--p", 2, MAX_RANKS)
    ds = numbers(options.d, "--d", 0, max(ps) - 1)
    quantized = options.quantize.split(",") if options.quantize else []
    for stored in quantized:
        formats.load(stored)
    found = chosen_model(options.model)
    path = found.path
    checkpoint = Checkpoint(path, tokenizer=False)
    model = checkpoint.model
    first = math.ceil(FIRST * model.num_layers) if options.first is None else options.first
    if not 0 <= first < model.num_layers:
        raise UserError(f"--first {first}: the model has layers 0 to {model.num_layers - 1}")
    length = min(options.block, model.max_position)
    blocks = text_blocks(options.text, open_tokenizer(path), model, length, options.text_tokens, options.column)
    network = reference.from_reader(model, checkpoint.reader)
    similarity = input_similarity(network, blocks, sys.stderr.isatty())
    result: dict[str, Any] = {"model": found.name, "tokens": blocks.size, "similarity": similarity.tolist()}
    print(f"{found.stem}, {model.num_layers} layers, {blocks.size} tokens of text\n")
    print(neighbours(similarity))
    result["recommended"] = recommend(similarity, model, ps, first, options)
    if options.search or options.joins:
        unchanged = score_reference(network, blocks)
    if options.joins:
        result["joins"] = joins(network, model, blocks, unchanged, ps)
    if options.search:
        result["search"] = search(network, model, similarity, blocks, unchanged, ps, ds, first, options)
        for stored in quantized:
            del network
            rounded = Checkpoint(path, tokenizer=False)
            rounded.quantize(EngineLimits(dtype=options.dtype, weights=stored))
            network = reference.from_reader(model, rounded.reader, pieces=False)
            more = search(network, model, similarity, blocks, unchanged, ps, ds, first, options, stored)
            for name in ("points", "recommended"):
                result["search"][name] += more[name]
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot is not None and options.search:
        plot_search(result["search"], options.plot, found.stem)
    elif options.plot is not None:
        plot_similarity(similarity, options.plot, found.stem)


def neighbours(similarity: np.ndarray) -> str:
    """Similarity of each layer's input to those of the layers just before it."""
    layers = len(similarity)
    rows = [
        (layer, *(f"{similarity[layer, layer - back]:.3f}" if layer >= back else "" for back in (1, 2, 3)))
        for layer in range(1, layers)
    ]
    return table(("layer", "to 1 before", "to 2 before", "to 3 before"), rows)


def costs(model: ModelConfig, cqil: CqilConfig, dtype: str, weights: str = formats.DENSE) -> dict[str, float]:
    """Bytes read and predicted milliseconds per token of a configuration, by placement."""
    how: dict[str, Any] = {"dtype": dtype, "weights": weights}
    leader = CqilConfig(p=cqil.p, d=cqil.d, start=cqil.start, end=cqil.end, bypass=cqil.bypass, placement="leader")
    tensor = CqilConfig(p=cqil.p, placement="tensor")
    return {
        "leader_bytes_per_token": critical_bytes(model, leader, **how),
        "sharded_bytes_per_token": critical_bytes(model, cqil, **how),
        "sequential_ms": decode_seconds(model, CqilConfig(p=1), **how) * 1e3,
        "leader_ms": decode_seconds(model, leader, **how) * 1e3,
        "sharded_ms": decode_seconds(model, cqil, **how) * 1e3,
        "tensor_ms": decode_seconds(model, tensor, **how) * 1e3,
    }


def cost_cells(found: dict[str, Any]) -> tuple[str, ...]:
    """The result of `costs` as cells under COSTS."""
    times = (f"{found[f'{name}_ms']:.3f}" for name in ("sequential", "leader", "tensor", "sharded"))
    return size(found["leader_bytes_per_token"]), *times


COSTS = ("read/token, leader", "sequential ms", "leader", "tensor", "sharded")


def recommend(
    similarity: np.ndarray, model: ModelConfig, ps: list[int], first: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    from cqil_trt.quality.similarity import recommend as longest

    rows, found = [], []
    for p in ps:
        choice = longest(similarity, p, options.threshold, first)
        if choice is None:
            rows.append((p, "none", "", "", "", "", "", ""))
            continue
        values = costs(model, choice.cqil, options.dtype)
        span = f"[{choice.cqil.start}, {choice.cqil.end})"
        rows.append((p, span, f"{choice.similarity:.3f}", *cost_cells(values)))
        found.append({"cqil": choice.cqil.to_dict(), "lowest_similarity": choice.similarity, **values})
    print(f"\nlongest ranges from layer {first} with a similarity of at least {options.threshold:g} in every group")
    print("(--search measures their perplexity; latency is predicted for batch 1 on H200s, see cqil_trt/latency.py)")
    print(table(("p", "[start, end)", "lowest similarity", *COSTS), rows))
    return found


def joins(
    network: Any, model: ModelConfig, blocks: np.ndarray, unchanged: Scores, ps: list[int]
) -> dict[int, list[float]]:
    """What dropping each layer's attention join costs in log-perplexity, without groups, by the number of ranks."""
    from cqil_trt import reference
    from cqil_trt.quality.perplexity import score_reference

    layers, found = model.num_layers, {}
    for p in ps:
        tensor = CqilConfig(p=p, placement="tensor")
        networks = (reference.with_cqil(network, tensor.dropping([layer], layers)) for layer in range(layers))
        scores = (score_reference(each, blocks) for each in networks)
        bar = tqdm(scores, total=layers, desc=f"joins, p={p}", disable=not sys.stderr.isatty(), leave=False)
        found[p] = [each.log_perplexity - unchanged.log_perplexity for each in bar]
    print(f"\nlog-perplexity that a dropped attention join costs in each layer (unchanged: {unchanged.perplexity:.3f})")
    rows = [(layer, *(f"{found[p][layer]:+.4f}" for p in ps)) for layer in range(layers)]
    print(table(("layer", *(f"p={p}" for p in ps)), rows))
    return found


def search(
    network: Any,
    model: ModelConfig,
    similarity: np.ndarray,
    blocks: np.ndarray,
    unchanged: Scores,
    ps: list[int],
    ds: list[int],
    first: int,
    options: argparse.Namespace,
    weights: str = formats.DENSE,
) -> dict[str, Any]:
    """Perplexity of every configuration, and those that no other one beats in both latency and perplexity.

    `unchanged`: the scores to compare with, of the unchanged model. `weights`: the format that the network's matrices
    were rounded to.
    """
    from cqil_trt import reference
    from cqil_trt.quality.perplexity import score_reference
    from cqil_trt.quality.similarity import frontier, lowest_in_groups, ranges

    own = unchanged if weights == formats.DENSE else score_reference(network, blocks)
    candidates = [
        CqilConfig(p=p, d=d, start=start, end=end, bypass=options.bypass if d else "mlp")
        for p in ps
        for d in ds
        for start, end in ranges(first, model.num_layers, p)
        if d < p
    ]
    rounded = "" if weights == formats.DENSE else f", matrices in {weights}"
    print(f"\nsearching {len(candidates)} configurations{rounded} (fewer: a later --first, fewer --text-tokens)")
    points: list[dict[str, Any]] = []
    seen = sys.stderr.isatty()
    for cqil in tqdm(candidates, desc="searching", disable=not seen, leave=False):
        scores = score_reference(reference.with_cqil(network, cqil), blocks)
        points.append(
            {
                "cqil": cqil.to_dict(),
                "weights": weights,
                "lowest_similarity": lowest_in_groups(similarity, cqil),
                **scores.to_dict(unchanged),
                "log_cost": scores.log_perplexity - unchanged.log_perplexity,
                **costs(model, cqil, options.dtype, weights),
            }
        )
        if not seen and len(points) % REPORTED == 0:
            print(f"{len(points)} of {len(candidates)} searched")
    print(f"without CQIL, the perplexity is {own.perplexity:.3f}")
    fastest = []
    for p in ps:
        for d in sorted({d for d in ds if d < p}):
            mine = [point for point in points if (point["cqil"]["p"], point["cqil"]["d"]) == (p, d)]
            best = [mine[i] for i in frontier([m["sharded_ms"] for m in mine], [m["perplexity"] for m in mine])]
            rows = []
            # The fastest one within the tolerance: the one to train.
            chosen = next((point for point in best if point["log_cost"] <= options.tolerance), None)
            for point in best:
                cqil = CqilConfig(**point["cqil"])
                mark = " <- recommended" if point is chosen else ""
                cost = f"{point['perplexity']:.3f}", f"{point['log_cost']:+.3f}", f"{point['top1_equal']:.1%}"
                rows.append((f"[{cqil.start}, {cqil.end}){mark}", *cost, *cost_cells(point)))
            bypass = f" {options.bypass}" if d else ""
            print(f"\np={p} d={d}{bypass}{rounded}: no other range is both faster and better than these")
            print(table(("[start, end)", "perplexity", "log cost", "top-1 equal", *COSTS), rows))
            if chosen is not None:
                fastest.append(chosen)
    return {"perplexity": unchanged.perplexity, "points": points, "recommended": fastest}


def plot_similarity(similarity: np.ndarray, path: Path, title: str) -> None:
    figure, axes = pyplot().subplots(figsize=(6.5, 5.5))
    image = axes.imshow(similarity, vmin=0, vmax=1, origin="lower")
    axes.set(xlabel="layer", ylabel="layer", title=f"cosine similarity of layers' inputs\n{title}")
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def plot_search(found: dict[str, Any], path: Path, title: str) -> None:
    """Every configuration, and the frontier of each p and d, against bytes read and predicted latency."""
    from cqil_trt.quality.similarity import frontier

    figure, panels = pyplot().subplots(1, 2, figsize=(12, 4.5), sharey=True)

    def kind(point: dict[str, Any]) -> tuple[str, int, int]:
        return point["weights"], point["cqil"]["p"], point["cqil"]["d"]

    def label_of(weights: str, p: int, d: int) -> str:
        return f"p={p} d={d}" + ("" if weights == formats.DENSE else f" {weights}")

    kinds = list(dict.fromkeys(map(kind, found["points"])))
    columns = (
        ("leader_bytes_per_token", 1e-6, "MB of weights read per token, placement leader"),
        ("sharded_ms", 1.0, "predicted ms per token, placement sharded"),
    )
    highest = 0.0
    for axes, (field, scale, label) in zip(panels, columns):
        for weights, p, d in kinds:
            mine = [point for point in found["points"] if kind(point) == (weights, p, d)]
            x, y = [point[field] * scale for point in mine], [point["perplexity"] for point in mine]
            best = frontier(x, y)
            highest = max(highest, *(y[i] for i in best))
            (line,) = axes.plot([x[i] for i in best], [y[i] for i in best], marker="o", label=label_of(weights, p, d))
            axes.scatter(x, y, s=6, alpha=0.35, color=line.get_color())
        axes.axhline(found["perplexity"], color="grey", linestyle="--", label="unchanged")
        axes.set(xlabel=label, yscale="log")
    # Points far above every frontier would compress the rest.
    panels[0].set(ylabel="perplexity", ylim=(0.9 * found["perplexity"], 1.5 * highest))
    panels[0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
