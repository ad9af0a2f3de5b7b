#!/usr/bin/env python
"""Which layers of a model can run concurrently: how similar their inputs are, and what each choice saves and costs.

    python scripts/similarity.py --model path/to/model --text text.txt --plot similarity.png
    python scripts/similarity.py --model path/to/model --text text.txt --joins
    python scripts/similarity.py --model path/to/model --text text.txt --search --plot search.png --write best.json

Without --search, ranges are recommended by similarity, the paper's criterion. With it, quality is measured: of groups,
dropped joins and quantized weights together.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import installed  # noqa: F401
import numpy as np
from plots import check_plot, pyplot
from tqdm import tqdm

from cqil_trt import formats
from cqil_trt.commands import Parser, check_at_least, check_file, check_texts, chosen_model, numbers
from cqil_trt.config import AUTO, BYPASSES, DTYPES, KV_DTYPES, MAX_RANKS, CqilConfig, layer_list
from cqil_trt.config_file import ConfigFile
from cqil_trt.errors import UserError
from cqil_trt.files import write_json
from cqil_trt.job import command
from cqil_trt.latency import MACHINES, SHORT, critical_bytes, decode_seconds
from cqil_trt.model import ModelConfig
from cqil_trt.quality.perplexity import Scores
from cqil_trt.quality.search import BOTH, KINDS, MEASURES, Candidate, Point, Quality, Search, Space, choose
from cqil_trt.table import size, table

if TYPE_CHECKING:
    from cqil_trt.quality.measure import Measure

# The authors' published ranges begin at 38% of the layers or later; the last layers differ most from each other.
FIRST = 0.375
REPORTED = 10  # configurations per line of progress, without a terminal
# What a configuration may cost before an adapter is trained, which recovers most of it: times the unchanged perplexity.
WITHIN = 2.25
LEAST_EVALUATIONS = 16
# Values of --placement, and of --quantize and --quantize-head.
FASTEST, NONE = "fastest", "none"
# The flags that only --search takes, and what they are by default.
SEARCH = {
    "evaluations": 128,
    "measure": "perplexity",
    "d": "0",
    "bypass": "mlp",
    "placement": FASTEST,
    "quantize": "int8,int4",
    "quantize_head": NONE,
    "within": None,
    "at_most": None,
    "write": None,
}


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
    p.add_argument("--p", metavar="P,P", default="2,4", help="group sizes (default %(default)s)")
    p.add_argument(
        "--ranks-per-layer",
        metavar="T,T",
        default="1",
        help="numbers of ranks that share each layer of a group: engines have p times as many, with each p for which "
        f"that is at most {MAX_RANKS} (default %(default)s)",
    )
    p.add_argument(
        "--threshold",
        type=float,
        default=0.8,
        help="lowest similarity of a layer's input to its group's (default %(default)s)",
    )
    p.add_argument(
        "--first", metavar="LAYER", type=int, help="the first layer of all ranges (default: 3/8 of the layers)"
    )
    p.add_argument("--dtype", choices=DTYPES, default="float16", help="the engine's type (default %(default)s)")
    p.add_argument(
        "--gpu",
        choices=tuple(MACHINES),
        default="h200",
        help="GPUs that latency is predicted for (default %(default)s)",
    )
    p.add_argument(
        "--context",
        metavar="N",
        type=int,
        default=SHORT,
        help="tokens in the KV cache for which latency is predicted (default %(default)s)",
    )
    p.add_argument(
        "--kv-dtype",
        choices=KV_DTYPES,
        default=AUTO,
        help="type of the KV cache, as build.py takes it: in predictions, and in what --search measures",
    )
    p.add_argument(
        "--joins",
        action=argparse.BooleanOptionalAction,
        help="measure what each layer loses without the all-reduce after attention (build.py --drop-attention-join); "
        "--no-joins: --search drops none",
    )
    known = ", ".join(formats.choices())
    search = p.add_argument_group("search")
    search.add_argument(
        "--search",
        action="store_true",
        help="find the configurations that no other one beats in both measured quality and predicted latency",
    )
    search.add_argument(
        "--evaluations",
        metavar="N",
        type=int,
        help=f"measure the quality of at most N configurations (default {SEARCH['evaluations']}, at least "
        f"{LEAST_EVALUATIONS}, and three for each pair of formats)",
    )
    search.add_argument("--measure", choices=MEASURES, help=f"quality (default {SEARCH['measure']})")
    search.add_argument("--d", metavar="D,D", help=f"bypass distances to measure (default {SEARCH['d']})")
    search.add_argument(
        "--bypass", choices=BYPASSES, help=f"where the bypass goes when d > 0 (default {SEARCH['bypass']})"
    )
    search.add_argument(
        "--placement",
        choices=(FASTEST, "sharded", "leader"),
        help="how the ranks run the other layers (default: in the way that is predicted to be fastest)",
    )
    search.add_argument(
        "--quantize",
        metavar="FORMAT,…",
        help=f"also with the layers' matrices in these formats: {known}, or {NONE} (default {SEARCH['quantize']})",
    )
    search.add_argument(
        "--quantize-head",
        metavar="FORMAT,…",
        help="also with the last projection in these formats, next to each format of the layers (default "
        f"{SEARCH['quantize_head']})",
    )
    limit = search.add_mutually_exclusive_group()
    limit.add_argument(
        "--within",
        metavar="FACTOR",
        type=float,
        help="choose the fastest configuration with at most FACTOR times the unchanged perplexity, or with this e^KL "
        f"(default {WITHIN})",
    )
    limit.add_argument(
        "--at-most", metavar="MS", type=float, help="choose the best configuration of at most MS predicted milliseconds"
    )
    search.add_argument(
        "--write", metavar="F.json", type=Path, help="write the chosen configuration, for --config of other commands"
    )
    p.add_argument("--plot", metavar="F.png", type=Path, help="heat map of similarities, or what the search found")
    p.add_argument("--json", metavar="F", type=Path, help="write all measurements to this file")
    return p


def main() -> None:
    with command():
        run(parser().parse_args())


def run(options: argparse.Namespace) -> None:
    from cqil_trt import reference
    from cqil_trt.checkpoint import Checkpoint
    from cqil_trt.quality import open_tokenizer, text_blocks
    from cqil_trt.quality.measure import Measure
    from cqil_trt.quality.perplexity import score_reference
    from cqil_trt.quality.similarity import input_similarity

    check(options)
    ps, shared = sizes(options)
    ds = numbers(options.d, "--d", 0, max(ps) - 1)
    found = chosen_model(options.model)
    path = found.path
    checkpoint = Checkpoint(path, tokenizer=False)
    model = checkpoint.model
    if options.joins and model.post_norms:
        raise UserError(
            f"--joins: {model.architecture} normalises attention outputs before they are added: no join can be dropped"
        )
    first = math.ceil(FIRST * model.num_layers) if options.first is None else options.first
    if not 0 <= first < model.num_layers:
        raise UserError(f"--first {first}: the model has layers 0 to {model.num_layers - 1}")
    if options.context > max(SHORT, model.max_position):
        raise UserError(f"--context {options.context}: the model has {model.max_position} positions")
    length = min(options.block, model.max_position)
    blocks = text_blocks(options.text, open_tokenizer(path), model, length, options.text_tokens, options.column)
    network = reference.from_reader(model, checkpoint.reader)
    similarity = input_similarity(network, blocks, sys.stderr.isatty())
    result: dict[str, Any] = {"model": found.name, "tokens": blocks.size, "similarity": similarity.tolist()}
    print(f"{found.stem}, {model.num_layers} layers, {blocks.size} tokens of text\n")
    print(neighbours(similarity))
    result["recommended"] = recommend(similarity, model, ps, shared, first, options)
    if options.joins:
        counts = sorted({p * t for p in ps for t in shared if p * t <= MAX_RANKS})
        result["joins"] = joins(network, model, blocks, score_reference(network, blocks), counts)
    if options.search:
        space = Space(
            num_layers=model.num_layers,
            first=first,
            ps=tuple(ps),
            ranks_per_layer=tuple(shared),
            ds=tuple(dict.fromkeys(ds)),
            bypass=options.bypass,
            weights=(formats.DENSE, *quantized_formats(options.quantize, "--quantize")),
            heads=(formats.DENSE, *quantized_formats(options.quantize_head, "--quantize-head")),
            drops=options.joins is not False and options.placement != "leader" and not model.post_norms,
        )
        measure = Measure(path, network, blocks, options.dtype, options.measure, options.kv_dtype)
        del network  # of a large one, `measure` keeps one format at a time
        result["search"] = search(measure, found.name, model, space, options)
    if options.json is not None:
        write_json(options.json, result)
    if options.plot is not None and options.search:
        plot_search(result["search"], options.plot, found.stem)
    elif options.plot is not None:
        plot_similarity(similarity, options.plot, found.stem)
    for path in filter(None, (options.json, options.plot)):
        print(f"wrote {path}")


def check(options: argparse.Namespace) -> None:
    """Checks the options, and fills in the search's: errors should be reported before a long search, not after."""
    for name, default in SEARCH.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif not options.search:
            raise UserError(f"--{name.replace('_', '-')} needs --search")
    if options.joins is False and not options.search:
        raise UserError("--no-joins needs --search")
    check_at_least(options, 2, "block", "text_tokens")
    check_at_least(options, 1, "context")
    if not -1 <= options.threshold <= 1:  # NaN is not
        raise UserError(f"--threshold is a cosine, from -1 to 1, found {options.threshold:g}")
    check_file(options.json, "--json")
    check_file(options.write, "--write")
    check_plot(options.plot)
    check_texts(options.text, "--text")
    weights, heads = (
        1 + len(quantized_formats(getattr(options, name), f"--{name.replace('_', '-')}"))
        for name in ("quantize", "quantize_head")
    )
    # A third of the measurements is for what is not dense.
    check_at_least(options, max(LEAST_EVALUATIONS, 3 * (weights * heads - 1)), "evaluations")
    if options.within is not None and not 1 <= options.within < math.inf:
        raise UserError(f"--within must be a factor from 1 on, found {options.within:g}")
    if options.at_most is not None and not 0 < options.at_most < math.inf:
        raise UserError(f"--at-most must be above 0, found {options.at_most:g}")


def sizes(options: argparse.Namespace) -> tuple[list[int], list[int]]:
    """The group sizes of --p and the ranks of --ranks-per-layer, each once.

    Raises UserError for one that no value of the other flag goes with.
    """
    ps = list(dict.fromkeys(numbers(options.p, "--p", 2, MAX_RANKS)))
    shared = list(dict.fromkeys(numbers(options.ranks_per_layer, "--ranks-per-layer", 1, MAX_RANKS)))
    for p, t in ((max(ps), min(shared)), (min(ps), max(shared))):
        CqilConfig(p=p, ranks_per_layer=t, placement="leader" if options.placement == "leader" else "sharded")
    return ps, shared


def quantized_formats(text: str, flag: str) -> list[str]:
    """The formats in a list like `int8,int4`, each once. Raises UserError, naming the flag, for an unknown one."""
    if text == NONE:
        return []
    found = list(dict.fromkeys(text.split(",")))
    for name in found:
        if name not in formats.choices():
            raise UserError(f"{flag} must be {NONE} or some of {', '.join(formats.choices())}, found {name!r:.60}")
    return found


def neighbours(similarity: np.ndarray) -> str:
    """Similarity of each layer's input to those of the layers just before it."""
    layers = len(similarity)
    rows = [
        (layer, *(f"{similarity[layer, layer - back]:.3f}" if layer >= back else "" for back in (1, 2, 3)))
        for layer in range(1, layers)
    ]
    return table(("layer", "to 1 before", "to 2 before", "to 3 before"), rows)


def costs(model: ModelConfig, cqil: CqilConfig, options: argparse.Namespace) -> dict[str, float]:
    """Bytes read and predicted milliseconds per token of a configuration, by placement.

    `tensor` is for as many ranks as the configuration has. Placement leader has one rank per layer.
    """
    placed = {"sharded": cqil, "tensor": CqilConfig(p=cqil.ranks, placement="tensor")}
    if cqil.ranks_per_layer == 1:
        placed["leader"] = replace(cqil, placement="leader")
    read = {f"{name}_bytes_per_token": critical_bytes(model, each, options.dtype) for name, each in placed.items()}
    placed["sequential"] = CqilConfig(p=1)
    return read | {f"{name}_ms": seconds(model, Candidate(each), options) * 1e3 for name, each in placed.items()}


def seconds(model: ModelConfig, candidate: Candidate, options: argparse.Namespace) -> float:
    """What is predicted for a configuration on the GPUs and with the KV cache that the options name."""
    stored = {"weights": candidate.weights, "head": candidate.head, "kv_dtype": options.kv_dtype}
    machine = MACHINES[options.gpu]
    return decode_seconds(model, candidate.cqil, options.dtype, machine, context=options.context, **stored)


def cost_cells(found: dict[str, Any]) -> tuple[str, ...]:
    """The result of `costs` as cells under COSTS."""
    shown = ("sequential", "leader", "tensor", "sharded")
    times = (f"{found[f'{name}_ms']:.3f}" if f"{name}_ms" in found else "" for name in shown)
    return size(found["sharded_bytes_per_token"]), *times


COSTS = ("read/token, sharded", "sequential ms", "leader", "tensor", "sharded")


def recommend(
    similarity: np.ndarray,
    model: ModelConfig,
    ps: list[int],
    shared: list[int],
    first: int,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    from cqil_trt.quality.similarity import recommend as longest

    rows, found = [], []
    for p in ps:
        choice = longest(similarity, p, options.threshold, first)
        if choice is None:
            rows.append((p, *[""] * 2, "none", *[""] * (1 + len(COSTS))))
            continue
        for t in (t for t in shared if p * t <= MAX_RANKS):
            cqil = replace(choice.cqil, ranks_per_layer=t)
            values = costs(model, cqil, options)
            span = f"[{cqil.start}, {cqil.end})"
            rows.append((p, t, cqil.ranks, span, f"{choice.similarity:.3f}", *cost_cells(values)))
            found.append({"cqil": cqil.to_dict(), "lowest_similarity": choice.similarity, **values})
    print(f"\nlongest ranges from layer {first} with a similarity of at least {options.threshold:g} in every group")
    gpus = options.gpu.upper()
    print(f"(--search measures their perplexity; latency is predicted for batch 1 on {gpus}s, see cqil_trt/latency.py)")
    print(table(("p", "ranks per layer", "GPUs", "[start, end)", "lowest similarity", *COSTS), rows))
    return found


def joins(
    network: Any, model: ModelConfig, blocks: np.ndarray, unchanged: Scores, counts: list[int]
) -> dict[int, list[float]]:
    """What dropping each layer's attention join costs in log-perplexity, without groups, by the number of ranks."""
    from cqil_trt import reference
    from cqil_trt.quality.perplexity import score_reference

    layers, found = model.num_layers, {}
    for ranks in counts:
        tensor = CqilConfig(p=ranks, placement="tensor")
        networks = (reference.with_cqil(network, tensor.dropping([layer], layers)) for layer in range(layers))
        scores = (score_reference(each, blocks) for each in networks)
        bar = tqdm(scores, total=layers, desc=f"joins, {ranks} ranks", disable=not sys.stderr.isatty(), leave=False)
        found[ranks] = [each.log_perplexity - unchanged.log_perplexity for each in bar]
    print(f"\nlog-perplexity that a dropped attention join costs in each layer (unchanged: {unchanged.perplexity:.3f})")
    rows = [(layer, *(f"{found[ranks][layer]:+.4f}" for ranks in counts)) for layer in range(layers)]
    print(table(("layer", *(f"{ranks} ranks" for ranks in counts)), rows))
    return found


def search(
    measure: Measure, name: str, model: ModelConfig, space: Space, options: argparse.Namespace
) -> dict[str, Any]:
    """Searches the space, prints the frontiers, writes the chosen configuration; returns all points."""
    limit = math.log(options.within or WITHIN)
    unchanged = measure.quality(measure.unchanged)
    seen = sys.stderr.isatty()
    with tqdm(desc="searching", disable=not seen, leave=False) as bar:

        def judge(candidate: Candidate) -> Quality:
            found = measure(candidate)
            bar.update()
            if not seen and (task.evaluations + 1) % REPORTED == 0:
                print(f"{task.evaluations + 1} of {task.planned} measured", flush=True)
            return found

        placements = ("sharded", "leader") if options.placement == FASTEST else (options.placement,)
        expanded = math.inf if options.at_most is not None else limit
        predict = partial(seconds, model, options=options)
        task = Search(space, judge, predict, placements, options.evaluations, expanded, unchanged)
        bar.reset(task.planned)
        how, whole = "all" if task.exhaustive else "greedily", duration(task.planned * measure.seconds)
        print(
            f"\nsearching {len(space):,} configurations, {how}: at most {task.planned} measurements of "
            f"{options.measure}, {measure.seconds:.2g} s each, about {whole} in all\n"
            "(fewer: --evaluations, --text-tokens, --no-joins, --quantize, --quantize-head)"
        )
        task.run()
    factor = f"{options.within or WITHIN:g}"
    goal = f"at most {factor} times the unchanged perplexity" if options.measure == "perplexity" else f"e^KL {factor}"
    if options.at_most is not None:
        goal = f"at most {options.at_most:g} ms"
    print(f"{task.evaluations} measured; the unchanged perplexity is {measure.unchanged.perplexity:.3f}")
    points = list(task.points.values())
    frontiers = {ranks: {kind: task.frontier(ranks, kind) for kind in KINDS} for ranks in space.ranks}
    within, at_most = (limit, None) if options.at_most is None else (None, options.at_most / 1e3)
    chosen = choose(frontiers[max(space.ranks)][BOTH], within, at_most)
    for ranks, found in frontiers.items():
        print(f"\non up to {ranks} GPUs no other configuration is both faster and better than these")
        print(point_table(found[BOTH], chosen))
    print(f"\n{'best' if options.at_most else 'fastest'} of each kind, {goal}")
    print(point_table(best_of_kinds(frontiers[max(space.ranks)], within, at_most), chosen))
    if options.write is not None:
        write(options, name, model, chosen)
    return {
        "measure": options.measure,
        "gpu": options.gpu,
        "dtype": options.dtype,
        "kv_dtype": options.kv_dtype,
        "context": options.context,
        "configurations": len(space),
        "evaluations": task.evaluations,
        "joins": list(task.space.joins),
        "perplexity": measure.unchanged.perplexity,
        "points": [point.to_dict() for point in points],
        "frontiers": {
            ranks: {kind: [points.index(point) for point in best] for kind, best in found.items()}
            for ranks, found in frontiers.items()
        },
        "chosen": points.index(chosen),
    }


def best_of_kinds(found: Mapping[str, Sequence[Point]], within: float | None, at_most: float | None) -> list[Point]:
    """What `choose` takes from the frontier of each kind, each point once."""
    best: list[Point] = []
    for points in found.values():
        try:
            best.append(choose(points, within, at_most))
        except UserError:
            continue  # of this kind nothing is fast enough
    return list(dict.fromkeys(best))


def point_table(points: Sequence[Point], chosen: Point) -> str:
    divergence = any("divergence" in point.quality.values for point in points)
    heads = any(point.candidate.head != formats.DENSE for point in points)
    rows = []
    for point in points:
        candidate, values = point.candidate, point.quality.values
        how = f"{values['divergence']:.4f}" if divergence else f"{point.quality.cost:+.4f}"
        rows.append(
            (
                title(candidate) + (" <- chosen" if point is chosen else ""),
                candidate.ranks,
                candidate.kind,
                candidate.weights,
                *([candidate.head] if heads else []),
                f"{values['perplexity']:.3f}",
                how,
                f"{values['top1_equal']:.1%}",
                candidate.cqil.placement if candidate.ranks > 1 else "",
                f"{point.seconds * 1e3:.3f}",
            )
        )
    stored = ("weights", "head") if heads else ("weights",)
    measured = ("perplexity", "KL" if divergence else "log cost", "top-1 equal")
    return table(("configuration", "GPUs", "kind", *stored, *measured, "placement", "ms"), rows)


def title(candidate: Candidate) -> str:
    cqil = candidate.cqil
    if cqil.groups:
        return cqil.summary
    dropped = f", attention joins dropped in {layer_list(drop)}" if (drop := cqil.drop_attention_join) else ""
    return f"no groups{dropped}"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def write(options: argparse.Namespace, name: str, model: ModelConfig, chosen: Point) -> None:
    found = chosen.to_dict()
    how = {key: found[key] for key in found if key not in ("cqil", "weights", "head", "kind", "ranks")}
    ConfigFile(
        model=name,
        layers=model.num_layers,
        cqil=chosen.candidate.cqil,
        weights=chosen.candidate.weights,
        head=chosen.candidate.head,
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
        found={"gpu": options.gpu, "context": options.context, "measure": options.measure, **how},
    ).write(options.write)
    print(f"\nwrote {options.write}\nbuild it: python builders/build.py --model {name} --config {options.write}")


def plot_similarity(similarity: np.ndarray, path: Path, title: str) -> None:
    figure, axes = pyplot().subplots(figsize=(6.5, 5.5))
    image = axes.imshow(similarity, vmin=0, vmax=1, origin="lower")
    axes.set(xlabel="layer", ylabel="layer", title=f"cosine similarity of layers' inputs\n{title}")
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def plot_search(found: dict[str, Any], path: Path, title: str) -> None:
    """Every measured configuration by its kind, and the frontier of each kind on the most GPUs."""
    figure, axes = pyplot().subplots(figsize=(7.5, 5))
    points, markers = found["points"], dict(zip((1, *found["frontiers"]), "x^osDPv*"))
    by_kl = found["measure"] == "divergence"

    def quality(point: dict[str, Any]) -> float:
        return math.exp(point["divergence"]) if by_kl else point["perplexity"]

    highest = 0.0
    for kind, color in zip(KINDS, ("tab:blue", "tab:orange", "tab:green", "tab:red")):
        best = [points[i] for i in found["frontiers"][max(found["frontiers"])][kind]]
        highest = max(highest, *map(quality, best))
        x, y = [point["predicted_ms"] for point in best], [quality(point) for point in best]
        axes.step(x, y, where="post", color=color, alpha=0.6, linewidth=1)
        for ranks, marker in markers.items():
            mine = [point for point in points if (point["kind"], point["ranks"]) == (kind, ranks)]
            label = f"{kind}, {ranks} GPU{'s' if ranks > 1 else ''}"
            if mine:
                x, y = [point["predicted_ms"] for point in mine], [quality(point) for point in mine]
                axes.scatter(x, y, s=14, marker=marker, color=color, alpha=0.7, label=label)
    base = 1.0 if by_kl else found["perplexity"]
    axes.axhline(base, color="grey", linestyle="--", label="unchanged")
    # Points far above every frontier would compress the rest.
    axes.set(
        xlabel=f"predicted ms per token, {found['gpu'].upper()}, {found['dtype']}",
        ylabel="e^KL from the unchanged model" if by_kl else "perplexity",
        yscale="log",
        ylim=(0.95 * base, 1.2 * highest),
        title=title,
    )
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
