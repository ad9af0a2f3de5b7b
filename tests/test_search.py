"""The search over groups, dropped joins and formats, against enumerations, float64 formulas and numpy; --config."""

import functools
import itertools
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import ROOT, SEED
from support.checkpoints import load_model, make_model
from support.formulas import Formulas
from support.made_tokenizers import save_byte_tokenizer
from support.processes import assert_user_error, build, mpirun, run

from cqil_trt import families
from cqil_trt.builder import BuildRequest, choose_cqil, prepare, read_config
from cqil_trt.config import CqilConfig
from cqil_trt.config_file import ConfigFile
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.latency import MACHINES, decode_seconds
from cqil_trt.quality import open_tokenizer
from cqil_trt.quality.search import BOTH, KINDS, Candidate, Quality, Search, Space, choose, spread

LAYERS = 6
COMPUTED = ("p", "d", "start", "end", "bypass", "drop_attention_join", "ranks_per_layer")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("search") / "model"
    make_model(directory, vocab_size=260, num_hidden_layers=LAYERS)
    save_byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def text(model):
    path = model.parent / "text.txt"
    path.write_text((ROOT / "README.md").read_text()[:4000])
    return path


def similarity(model, text, *arguments):
    common = ["--model", model, "--text", text, "--block", 32, "--text-tokens", 128]
    return run(sys.executable, "scripts/similarity.py", *common, *arguments)


def not_beaten(points):
    """The pairs (latency, cost) of which no other is at least as low in both and lower in one."""
    pairs = set(points)
    return {(x, y) for x, y in pairs if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in pairs)}


def enumerated(order, first, ps, ts, ds, weights, layers=LAYERS):
    """All configurations, as (weights, p, t, d, start, end, dropped); without groups p is the number of ranks."""
    found = {(stored, 1, 1, 0, 0, 0, ()) for stored in weights}
    for stored, p, t, d in itertools.product(weights, ps, ts, ds):
        if p * t > 8:
            continue
        shapes = {(p * t, 1, 0, 0, 0)}
        if d < p:
            shapes |= {(p, t, d, s, e) for s in range(first, layers) for e in range(s + p, layers + 1, p)}
        for shape in shapes:
            *_, start, end = shape
            joins, waiting = [], {}
            for layer in order:  # those of a group are due with the last of its layers
                group = (layer - start) // p
                if not start <= layer < end:
                    joins.append((layer,))
                elif t > 1 and d == 0:
                    waiting.setdefault(group, []).append(layer)
                    joins += [waiting[group]] * (len(waiting[group]) == p)
            for n in range(len(joins) + 1):
                found.add((stored, *shape, tuple(sorted(itertools.chain(*joins[:n])))))
    return found


def key(cqil, weights):
    shape = (cqil[name] for name in ("p", "ranks_per_layer", "d", "start", "end"))
    return weights, *shape, tuple(cqil["drop_attention_join"])


def output_of(cqil, weights):
    """What decides the output: the groups, and how many ranks share each layer whose join is dropped."""
    grouped = range(cqil["start"], cqil["end"])
    t, ranks = cqil["ranks_per_layer"], cqil["p"] * cqil["ranks_per_layer"]
    dropped = tuple((layer, t if layer in grouped else ranks) for layer in cqil["drop_attention_join"])
    return weights, (cqil["p"], cqil["d"], grouped) if grouped else (), dropped


def together(weights, head):
    """Both formats in one name: that of the layers alone where the last projection is dense."""
    return weights if head == "dense" else f"{weights}, head {head}"


def stored_as(candidate):
    return together(candidate.weights, candidate.head)


# The search itself, on made-up qualities


def quality_of(seed):
    """A cost for whatever changes the output: more groups, more dropped joins and fewer bits cost more, with noise."""

    def cost(candidate):
        output = output_of(candidate.cqil.to_dict(), stored_as(candidate))
        random = np.random.default_rng([seed, *repr(output).encode()])
        bits = {"dense": 0, "int8": 0.01, "int4": 0.2}
        changed = len(candidate.cqil.changed_layers)
        return (bits[candidate.weights] + bits[candidate.head] / 2 + 0.05 * changed) * random.uniform(0.5, 1.5)

    return cost


@settings(max_examples=40)
@given(
    st.integers(0, 2**20),
    st.integers(16, 400),
    st.sampled_from([(2,), (2, 4), (3,), (2, 3, 4, 5, 6)]),
    st.sampled_from([(1,), (1, 2), (2,), (1, 3, 4)]),
    st.sampled_from([(0,), (0, 1), (0, 1, 2, 3)]),
    st.booleans(),
    st.sampled_from([("sharded", "leader"), ("sharded",)]),
    st.sampled_from([("dense",), ("dense", "int8"), ("dense", "int4", "int8")]),
)
# More kinds of groups than the budget has measurements.
@example(0, 16, (2, 3, 4, 5, 6), (1,), (0, 1, 2, 3), False, ("sharded", "leader"), ("dense", "int8"))
def test_search_keeps_its_budget_and_its_frontier_is_what_no_point_beats(
    seed, budget, ps, ts, ds, drops, placements, heads
):
    cost, seen = quality_of(seed), []

    def measure(candidate):
        seen.append(candidate)
        return Quality(cost=cost(candidate), values={})

    def seconds(candidate):
        cqil, matrices = candidate.cqil, {"dense": 4, "int8": 2, "int4": 1}
        slower = {"leader": 1.2, "sharded": 1.0, "tensor": 1.0}[cqil.placement] if cqil.p > 1 else 1.0
        joins = 2 * LAYERS - len(cqil.changed_layers)
        return slower * (joins + (matrices[candidate.weights] * LAYERS + matrices[candidate.head]) / cqil.ranks)

    weights = ("dense", "int8", "int4")
    stored = [together(*both) for both in itertools.product(weights, heads)]
    budget = max(budget, 3 * (len(stored) - 1))
    space = Space(
        num_layers=LAYERS,
        first=1,
        ps=ps,
        ranks_per_layer=ts,
        ds=ds,
        bypass="mlp",
        weights=weights,
        drops=drops,
        heads=heads,
    )
    task = Search(space, measure, seconds, placements, budget, math.inf, Quality(cost=0.0, values={}))
    planned = task.planned
    task.run()
    outputs = {output_of(candidate.cqil.to_dict(), stored_as(candidate)) for candidate in seen}
    assert len(seen) == len(outputs) == task.evaluations <= planned <= budget
    points = list(task.points.values())
    assert {stored_as(point.candidate) for point in points} == set(stored)
    for point in points:
        changed = stored_as(point.candidate) != "dense" or point.candidate.cqil.changed_layers
        assert point.quality.cost == (cost(point.candidate.computed) if changed else 0)
        assert point.seconds == seconds(point.candidate)
    numbers = sorted({p * t for p in ps for t in ts if p * t <= 8})
    assert space.ranks == numbers
    for ranks, kind in itertools.product(numbers, KINDS):
        allowed = [
            point
            for point in points
            if point.candidate.ranks <= ranks
            and (stored_as(point.candidate) == "dense" or "quantized" in kind)
            and (not point.candidate.cqil.drop_attention_join or "dropped" in kind)
        ]
        best = [(point.seconds, point.quality.cost) for point in task.frontier(ranks, kind)]
        assert best == sorted(not_beaten((point.seconds, point.quality.cost) for point in allowed))
    order = task.space.joins
    assert sorted(order) == (list(range(LAYERS)) if drops else [])
    every = enumerated(order, 1, ps, ts, ds, stored)
    found = {key(point.candidate.cqil.to_dict(), stored_as(point.candidate)) for point in points}
    single = {(each, numbers[-1], 1, 0, 0, 0, (layer,)) for each in stored for layer in range(LAYERS) if drops}
    assert len(space) == len(every)
    if task.exhaustive:
        assert task.evaluations == planned
        assert found == every | {one for one in single if one[0] == "dense"}
    assert found <= every | single


@pytest.mark.parametrize("ts, gpu", [((1, 2), "h200"), ((2, 1, 4), "h100")])
def test_frontier_over_ranks_per_layer_equals_brute_force(ts, gpu):
    sys.path.insert(0, str(ROOT / "scripts"))
    from synthetic import model_config

    config = model_config("llama-7b", LAYERS)
    cost, seen = quality_of(SEED), []

    def measure(candidate):
        seen.append(output_of(candidate.cqil.to_dict(), candidate.weights))
        return Quality(cost=cost(candidate), values={})

    @functools.cache
    def seconds(candidate):
        return decode_seconds(config, candidate.cqil, "float16", MACHINES[gpu], candidate.weights)

    space = Space(
        num_layers=LAYERS,
        first=1,
        ps=(2, 4),
        ranks_per_layer=ts,
        ds=(0, 1),
        bypass="mlp",
        weights=("dense", "int8"),
        drops=True,
    )
    unchanged = Quality(cost=0.0, values={})
    task = Search(space, measure, seconds, ("sharded", "leader"), 10_000, math.inf, unchanged)
    task.run()
    most = max(p * t for p in (2, 4) for t in ts if p * t <= 8)
    alone = {
        layer: cost(Candidate(CqilConfig(p=most, placement="tensor", drop_attention_join=(layer,))))
        for layer in range(LAYERS)
    }
    order = sorted(alone, key=alone.get)
    singles = {("dense", most, 1, 0, 0, 0, (layer,)) for layer in order}
    every, outputs = {}, set()
    for weights, p, t, d, start, end, dropped in enumerated(order, 1, (2, 4), ts, (0, 1), space.weights) | singles:
        shape = {"p": p, "ranks_per_layer": t, "d": d, "start": start, "end": end, "drop_attention_join": dropped}
        outputs.add(output_of(shape, weights))
        ways = ["sharded", "leader"] if start < end and t == 1 and not dropped else ["sharded"]
        fastest = min(seconds(Candidate(CqilConfig(**shape, placement=way), weights)) for way in ways)
        kind = (weights != "dense", bool(dropped))
        same = Candidate(CqilConfig(**shape), weights)
        every.setdefault((p * t, kind), []).append(
            (fastest, 0.0 if kind == (False, False) and start == end else cost(same))
        )
    assert sorted(map(repr, seen)) == sorted(map(repr, outputs - {("dense", (), ())}))
    for ranks, kind in itertools.product(space.ranks, KINDS):
        allowed = [
            point
            for (count, (quantized, drops)), points in every.items()
            if count <= ranks and (not quantized or "quantized" in kind) and (not drops or "dropped" in kind)
            for point in points
        ]
        assert [(p.seconds, p.quality.cost) for p in task.frontier(ranks, kind)] == sorted(not_beaten(allowed))


@given(st.lists(st.integers()), st.integers(0, 40))
def test_spread_keeps_order_and_both_ends(items, count):
    found = spread(list(enumerate(items)), count)
    assert len(found) == min(count, len(items)) and found == sorted(set(found))
    if count > 1 and items:
        assert (found[0][0], found[-1][0]) == (0, len(items) - 1)


# The command


@pytest.fixture(scope="module")
def searched(model, text, tmp_path_factory):
    """What a whole search reports, and the files that it wrote."""
    directory = tmp_path_factory.mktemp("found")
    flags = ["--search", "--p", "2", "--d", "0,1", "--ranks-per-layer", "1,2", "--first", 3, "--quantize", "int8"]
    flags += ["--quantize-head", "int8", "--within", 3, "--evaluations", 400]
    files = ["--json", directory / "s.json", "--plot", directory / "s.png", "--write", directory / "best.json"]
    done = similarity(model, text, *flags, *files)
    assert done.returncode == 0, done.stderr
    return done, json.loads((directory / "s.json").read_text())["search"], directory


def rounded(state, *parts):
    """The matrices of these parts in int8: one scale for each output channel, the largest magnitude over 127."""
    found = dict(state)
    for name, weight in state.items():
        if any(part in name for part in parts) and weight.ndim == 2:
            scale = weight.abs().amax(1, keepdim=True) / 127
            found[name] = (weight / scale).round() * scale
    return found


def nearly_a_tie(logits):
    """Where float32's rounding decides which token is the likeliest."""
    first, second = logits.topk(2).values.unbind(-1)
    return first - second < 1e-5


def test_search_measures_everything_that_the_budget_allows(model, text, searched):
    done, found, directory = searched
    stored = {
        "dense": (),
        "int8": ("layers",),
        "dense, head int8": ("lm_head",),
        "int8, head int8": ("layers", "lm_head"),
    }
    points = {key(point["cqil"], together(point["weights"], point["head"])): point for point in found["points"]}
    single = {("dense", 4, 1, 0, 0, 0, (layer,)) for layer in range(LAYERS)}
    assert points.keys() == enumerated(found["joins"], 3, (2,), (1, 2), (0, 1), stored) | single
    outputs = {output_of(point["cqil"], together(point["weights"], point["head"])) for point in found["points"]}
    assert found["evaluations"] == len(outputs) - 1 and f"{len(outputs) - 1} measurements" in done.stdout
    assert found["configurations"] == len(points.keys() - single) + 1  # the cheapest join alone is among them
    by_itself = [points["dense", 4, 1, 0, 0, 0, (layer,)]["log_cost"] for layer in found["joins"]]
    assert by_itself == sorted(by_itself) and len(by_itself) == LAYERS
    assert (directory / "s.png").read_bytes()[:4] == b"\x89PNG"
    # Some of them, computed in float64.
    network = load_model(model)
    ids = torch.tensor(open_tokenizer(model).pieces([text.read_text()])[0][:128]).view(-1, 32)
    state = network.state_dict()
    formulas = {name: Formulas(network.config, rounded(state, *parts)) for name, parts in stored.items()}
    unchanged = formulas["dense"].logits(ids)[:, :-1]
    for i in np.random.default_rng(SEED).choice(len(points), 8, replace=False):
        point = found["points"][i]
        logits = formulas[together(point["weights"], point["head"])].logits(
            ids, **{name: point["cqil"][name] for name in COMPUTED}
        )[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:]).item()
        assert point["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        equal = logits.argmax(-1) == unchanged.argmax(-1)
        unsure = nearly_a_tie(logits) | nearly_a_tie(unchanged)
        assert (equal & ~unsure).sum() <= round(point["top1_equal"] * equal.numel()) <= (equal | unsure).sum()
    # No other placement of theirs is faster, and the frontiers are what no point beats.
    config = families.read_config(model / "config.json")
    for point in found["points"]:
        cqil = CqilConfig(**point["cqil"])
        whole = not cqil.drop_attention_join and cqil.ranks_per_layer == 1
        placements = ["sharded"] + ["leader"] * whole if cqil.groups else [cqil.placement]
        kinds = {"weights": point["weights"], "head": point["head"]}
        found_ms = [
            1e3 * decode_seconds(config, replace(cqil, placement=name), "float16", **kinds) for name in placements
        ]
        assert point["predicted_ms"] == pytest.approx(min(found_ms))
    for (ranks, best_of), kind in itertools.product(found["frontiers"].items(), KINDS):
        best = best_of[kind]
        allowed = [
            (point["predicted_ms"], point["log_cost"])
            for point in found["points"]
            if point["ranks"] <= int(ranks)
            and (point["weights"] == point["head"] == "dense" or "quantized" in kind)
            and (not point["cqil"]["drop_attention_join"] or "dropped" in kind)
        ]
        pairs = [(found["points"][i]["predicted_ms"], found["points"][i]["log_cost"]) for i in best]
        assert pairs == sorted(not_beaten(allowed))
    chosen = found["points"][found["chosen"]]
    fitting = [p["predicted_ms"] for p in found["points"] if p["log_cost"] <= math.log(3)]
    assert chosen["predicted_ms"] == min(fitting) and "<- chosen" in done.stdout
    for name in ("s.json", "s.png", "best.json"):
        assert f"wrote {directory / name}" in done.stdout.splitlines()


def test_search_by_divergence_within_a_budget(model, text, tmp_path):
    report, best = tmp_path / "s.json", tmp_path / "best.json"
    flags = ["--search", "--measure", "divergence", "--evaluations", 18, "--p", "2", "--first", 1, "--gpu", "h100"]
    slowest = 1e3 * decode_seconds(families.read_config(model / "config.json"), CqilConfig(p=1), "float16")
    files = ["--json", report, "--write", best, "--at-most", slowest]
    done = similarity(model, text, *flags, *files)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())["search"]
    assert found["evaluations"] <= 18 and "greedily: at most 18 measurements of divergence" in done.stdout
    network = load_model(model)
    ids = torch.tensor(open_tokenizer(model).pieces([text.read_text()])[0][:128]).view(-1, 32)
    formulas = Formulas(network.config, network.state_dict())
    base = formulas.logits(ids)[:, :-1].log_softmax(-1)
    for point in [point for point in found["points"] if point["kind"] == "dropped joins"][:3]:
        mine = formulas.logits(ids, **{name: point["cqil"][name] for name in COMPUTED})[:, :-1].log_softmax(-1)
        divergence = (base.exp() * (base - mine)).sum(-1).mean().item()
        assert point["log_cost"] == point["divergence"] == pytest.approx(divergence, rel=1e-3, abs=1e-6)
    assert {point["log_cost"] for point in found["points"] if point["cqil"]["p"] == 1 and point["kind"] == "dense"} == {
        0
    }
    written = json.loads(best.read_text())
    fitting = [point["log_cost"] for point in found["points"] if point["predicted_ms"] <= slowest]
    assert written["found"]["divergence"] == min(fitting) and written["found"]["gpu"] == "h100"


def test_flags_of_the_search_that_are_refused(model, text, tmp_path):
    for flags, message in (
        (
            ["--search", "--quantize", "int3"],
            "--quantize must be none or some of fp8, int4, int8, int4g64, int4g32, found",
        ),
        (["--search", "--quantize-head", "int8,"], "--quantize-head must be none or some of"),
        (["--search", "--within", 0.9], "--within must be a factor from 1 on"),
        (["--search", "--at-most", -1], "--at-most must be above 0"),
        (["--search", "--within", 2, "--at-most", 1], "not allowed with argument"),
        (["--write", tmp_path / "b.json"], "--write needs --search"),
        (["--evaluations", 128], "--evaluations needs --search"),
        (["--d", "0"], "--d needs --search"),
        (["--bypass", "mlp"], "--bypass needs --search"),
        (["--placement", "sharded"], "--placement needs --search"),
        (["--quantize", "int8"], "--quantize needs --search"),
        (["--quantize-head", "int8"], "--quantize-head needs --search"),
        (["--measure", "perplexity"], "--measure needs --search"),
        (["--at-most", 1], "--at-most needs --search"),
        (["--no-joins"], "--no-joins needs --search"),
        (["--threshold", "nan"], "--threshold is a cosine, from -1 to 1, found nan"),
        (["--context", 0], "--context must be at least 1"),
        (["--context", 1000], "--context 1000: the model has 128 positions"),
        (["--search", "--write", tmp_path / "none" / "b.json"], "its directory does not exist"),
        (["--search", "--evaluations", 2], "--evaluations must be at least"),
        (
            ["--search", "--evaluations", 16, "--quantize-head", "int8,fp8"],
            "--evaluations must be at least 24, found 16",
        ),
        (["--search", "--gpu", "abacus"], "--gpu"),
        (["--ranks-per-layer", "0"], "--ranks-per-layer 0: expected numbers from 1 to 8"),
        (["--ranks-per-layer", "1,4", "--p", "4"], "--p 4 times --ranks-per-layer 4 is 16 ranks: at most 8"),
        (["--search", "--placement", "leader", "--ranks-per-layer", "1,2"], "--ranks-per-layer 2: placement leader"),
    ):
        assert_user_error(similarity(model, text, *flags), message)
    done = similarity(model, text, "--search", "--no-joins", "--quantize", "none", "--p", 2, "--at-most", 1e-6)
    assert_user_error(done, "--at-most 1e-06: the fastest configuration found takes")


# --config


def test_found_configuration_is_built_and_validates(model, searched, tmp_path):
    _, found, directory = searched
    chosen = found["points"][found["chosen"]]
    done = build("--model", model, "--config", directory / "best.json", "--output", tmp_path / "engine", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["cqil"] == chosen["cqil"]
    limits = plan["limits"]
    assert (limits["weights"], limits["head"], limits["dtype"]) == (chosen["weights"], chosen["head"], "float16")
    done = mpirun(chosen["ranks"], "--engine", tmp_path / "engine", "--validate")
    assert done.returncode == 0, done.stdout + done.stderr
    # The same in an engine in which little is rounded, flags win.
    flags = ["--dtype", "float32", "--quantize", "dense", "--quantize-head", "dense"]
    flags += ["--output", tmp_path / "exact", "--json"]
    done = build("--model", model, "--config", directory / "best.json", *flags)
    limits = json.loads(done.stdout)["limits"]
    assert (limits["weights"], limits["head"], limits["dtype"]) == ("dense", "dense", "float32")


def test_found_ranks_per_layer_are_built(model, text, tmp_path):
    best, report = tmp_path / "best.json", tmp_path / "s.json"
    flags = ["--search", "--p", "2", "--ranks-per-layer", "2", "--first", 0, "--quantize", "none", "--within", 1e6]
    done = similarity(model, text, *flags, "--threshold", -1, "--write", best, "--json", report)
    assert done.returncode == 0, done.stderr
    result = json.loads(report.read_text())
    # The fastest: two layers take the time of one, on half the bytes, and no group waits for its attention.
    shape = {"p": 2, "ranks_per_layer": 2, "start": 0, "end": LAYERS, "drop_attention_join": list(range(LAYERS))}
    summary = "p=2x2 d=0 [0, 6), attention joins dropped in 0-5"
    assert shape.items() <= json.loads(best.read_text())["cqil"].items()
    assert f"{summary} <- chosen" in done.stdout and "on up to 4 GPUs" in done.stdout
    chosen = result["search"]["points"][result["search"]["chosen"]]
    network = load_model(model)
    ids = torch.tensor(open_tokenizer(model).pieces([text.read_text()])[0][:128]).view(-1, 32)
    logits = Formulas(network.config, network.state_dict()).logits(ids, **shape)[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:]).item()
    assert chosen["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    config = families.read_config(model / "config.json")
    [recommended] = result["recommended"]
    tensor = decode_seconds(config, CqilConfig(p=4, placement="tensor"), "float16")
    assert recommended["tensor_ms"] == pytest.approx(1e3 * tensor) and "leader_ms" not in recommended
    done = build("--model", model, "--config", best, "--output", tmp_path / "engine")
    assert done.returncode == 0 and "mpirun -n 4" in done.stdout, done.stdout + done.stderr
    assert Engine.open(tmp_path / "engine").cqil.summary == summary


VALUES = {
    "layers": LAYERS,
    "cqil": {"p": 2, "d": 0, "start": 2, "end": 4, "placement": "sharded", "drop_attention_join": [4, 5]},
    "weights": "int8",
    "head": "fp8",
    "dtype": "bfloat16",
}


def written(path, **changes):
    """A file with VALUES changed; `cqil` changes within."""
    inner = (
        {**VALUES["cqil"], **changes.pop("cqil", {})} if isinstance(changes.get("cqil", {}), dict) else changes["cqil"]
    )
    path.write_text(json.dumps({**VALUES, **changes, **({"cqil": inner} if "cqil" not in changes else {})}))
    return path


def test_flags_override_the_file_which_overrides_the_adapter(model, tmp_path):
    path = written(tmp_path / "best.json")
    plan = prepare(BuildRequest(model=model, config=path, output=tmp_path / "e"))
    dropped = CqilConfig(p=2, start=2, end=4, drop_attention_join=(4, 5))
    limits = plan.limits
    assert (plan.cqil, limits.weights, limits.head, limits.dtype) == (dropped, "int8", "fp8", "bfloat16")
    assert not [note for note in plan.notes if "--config" in note]
    given = {"drop_attention_join": "none", "end": 6, "quantize": "int4g32", "dtype": "float16"}
    given["quantize_head"] = "int8"
    plan = prepare(BuildRequest(model=model, config=path, output=tmp_path / "e", **given))
    assert plan.cqil == CqilConfig(p=2, start=2, end=6)
    assert (plan.limits.weights, plan.limits.head, plan.limits.dtype) == ("int4g32", "int8", "float16")
    assert "attention joins dropped in 4-5" in " ".join(plan.notes) and "[2, 6)" in " ".join(plan.notes)
    plan = prepare(BuildRequest(model=model, config=path, keep="layers.0", output=tmp_path / "e"))
    assert plan.limits.keep == (0,) and (plan.limits.head, plan.limits.kv_dtype) == ("fp8", "auto")
    plan = prepare(BuildRequest(model=model, config=path, keep="lm_head", output=tmp_path / "e"))
    assert (plan.limits.weights, plan.limits.head) == ("int8", "dense")
    cached = written(tmp_path / "cached.json", kv_dtype="fp8")
    for given, kv_dtype in (({}, "fp8"), ({"kv_dtype": "auto"}, "auto")):
        plan = prepare(BuildRequest(model=model, config=cached, output=tmp_path / "e", **given))
        assert plan.limits.kv_dtype == kv_dtype
    config, notes = families.read_config(model / "config.json"), []
    found = choose_cqil(config, {}, notes, CqilConfig(p=3, start=0, end=3), read_config(path, config, None))
    assert found == dropped and "the adapter was trained for p=3" in notes[0]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "best.json: not valid JSON"),
        ("[]", "expected a JSON object"),
        ({"layers": 7}, "layers is 7, and the model has 6"),
        ({"layers": "6"}, "layers must be an integer"),
        ({"weights": "int3"}, "weights must be one of"),
        ({"head": "int3"}, "head must be one of dense, fp8, int4, int8, int4g64, int4g32, found"),
        ({"dtype": "int8"}, "dtype must be one of float32, float16, bfloat16"),
        ({"kv_dtype": "int8"}, "kv_dtype must be one of auto, fp8"),
        ({"cqil": 3}, "cqil must be an object"),
        ({"speed": 1}, "unknown field speed"),
        ({"cqil": {"ends": 4}}, "cqil: unknown field ends"),
        ({"cqil": {"p": "2"}}, "cqil: p must be an integer"),
        ({"cqil": {"p": None}}, "cqil: p must be an integer"),
        ({"cqil": {"p": 9}}, "cqil: --p must be from 1 to 8"),
        ({"cqil": {"end": 5}}, "cqil: --p 2 does not divide"),
        ({"cqil": {"ranks_per_layer": 5}}, "cqil: --p 2 times --ranks-per-layer 5 is 10 ranks"),
        ({"cqil": {"end": 8, "drop_attention_join": []}}, "cqil: --end 8 is beyond the model"),
        ({"cqil": {"drop_attention_join": [3]}}, "layer 3 is in a group"),
        ({"cqil": {"drop_attention_join": [6]}}, "layer 6 is beyond the model"),
        ({"cqil": {"drop_attention_join": ["4"]}}, "drop_attention_join must be a layer"),
        ({"cqil": {"placement": "fast"}}, "--placement must be one of"),
        ({"cqil": {"placement": "leader"}}, "--placement leader no layer is split"),
    ],
)
def test_wrong_files_are_named(tmp_path, content, message):
    path = tmp_path / "best.json"
    if isinstance(content, str):
        path.write_text(content)
    else:
        written(path, **json.loads(json.dumps(content)))
    with pytest.raises(UserError) as error:
        ConfigFile.read(path, LAYERS)
    assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_commands_refuse_wrong_files_in_one_line(model, text, tmp_path):
    path, other = written(tmp_path / "best.json", layers=9), written(tmp_path / "right.json")
    output = tmp_path / "output"
    commands = {
        "builders/build.py": ["--output", output],
        "scripts/finetune.py": ["--text", text, "--output", output],
        "scripts/evaluate.py": ["--text", text],
    }
    for script, flags in commands.items():
        done = run(sys.executable, script, "--model", model, "--config", path, *flags)
        assert_user_error(done, f"{path}: layers is 9, and the model has {LAYERS}")
    done = build("--model", model, "--config", other, "--preset", "llama-7b-p2-d0", "--output", output)
    assert_user_error(done, "--config and --preset both choose")
    assert_user_error(build("--model", model, "--config", tmp_path / "none.json"), "none.json: no such file")
    assert not output.exists()


def test_adapter_and_evaluation_for_a_found_configuration(model, text, tmp_path):
    path, output = written(tmp_path / "best.json", head="int8"), tmp_path / "adapter"
    small = ["--sequence-length", 16, "--batch-size", 2, "--steps", 1, "--lora-rank", 2, "--precision", "fp32"]
    flags = ["--text", text, "--output", output, *small]
    done = run(sys.executable, "scripts/finetune.py", "--model", model, "--config", path, *flags)
    assert done.returncode == 0, done.stderr
    assert "int8 is for build.py" in done.stdout
    trained = CqilConfig.of_adapter(output)
    assert trained == CqilConfig(p=2, start=2, end=4, drop_attention_join=(4, 5))
    report = tmp_path / "e.json"
    flags = ["--text", text, "--text-tokens", 128, "--block", 32, "--json", report]
    done = run(sys.executable, "scripts/evaluate.py", "--model", model, "--config", path, *flags)
    assert done.returncode == 0, done.stderr
    network = load_model(model)
    ids = torch.tensor(open_tokenizer(model).pieces([text.read_text()])[0][:128]).view(-1, 32)
    formulas = Formulas(network.config, rounded(network.state_dict(), "layers", "lm_head"))
    for column, shape in zip(json.loads(report.read_text())["columns"], ({}, VALUES["cqil"])):
        logits = formulas.logits(ids, **shape)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:]).item()
        assert column["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_choice_keeps_to_its_limit(model):
    space = Space(
        num_layers=4, first=0, ps=(2,), ranks_per_layer=(1,), ds=(0,), bypass="mlp", weights=("dense",), drops=False
    )
    config = families.read_config(model / "config.json")

    def seconds(candidate):
        return decode_seconds(config, candidate.cqil, "float16", MACHINES["h200"], candidate.weights)

    def measure(candidate):
        return Quality(cost=0.3 * len(candidate.cqil.groups), values={})

    task = Search(space, measure, seconds, ("leader",), 100, 1.0, Quality(cost=0.0, values={}))
    task.run()
    best = task.frontier(2, BOTH)
    assert [point.quality.cost for point in best] == sorted({0.0, 0.3, 0.6}, reverse=True)
    assert choose(best, 0.5, None).quality.cost == 0.3 and choose(best, 0.0, None).quality.cost == 0
    assert choose(best, None, best[1].seconds).quality.cost == 0.3
    with pytest.raises(UserError, match="--at-most"):
        choose(best, None, best[0].seconds / 2)


def test_models_whose_norms_follow_attention_have_no_joins_to_search(text, tmp_path):
    directory = make_model(tmp_path / "model", "Olmo2ForCausalLM", vocab_size=260, num_hidden_layers=LAYERS)
    save_byte_tokenizer(directory)
    done = similarity(directory, text, "--search", "--p", 2, "--quantize", "none", "--json", tmp_path / "s.json")
    assert done.returncode == 0, done.stderr
    points = json.loads((tmp_path / "s.json").read_text())["search"]["points"]
    assert len(points) > 1 and not any(point["cqil"]["drop_attention_join"] for point in points)
    assert_user_error(similarity(directory, text, "--joins"), "--joins: Olmo2ForCausalLM normalises")
