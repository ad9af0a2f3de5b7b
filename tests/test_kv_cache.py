"""A KV cache in FP8: engines on CPU ranks against float64, its bits and bytes, the scales that checkpoints carry."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import SEED, write_json
from support.cases import FAMILIES, relative
from support.checkpoints import load_model, make_model
from support.formulas import Formulas, fp8
from support.needs import need
from support.processes import build, mpirun

import cqil_trt
from cqil_trt import probes, reference
from cqil_trt.backends.torch.ops import TorchOps
from cqil_trt.checkpoint import Checkpoint
from cqil_trt.config import CqilConfig, EngineLimits
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.quality.measure import Measure
from cqil_trt.quality.perplexity import score_reference
from cqil_trt.scheduler import Request
from cqil_trt.shard import plan
from cqil_trt.validate import THRESHOLDS

LAYERS = 6
PROMPTS, STEPS = 8, 5
SHAPES = [{"p": 1}, {"p": 2, "start": 1, "end": 5}, {"p": 2, "d": 1, "start": 2, "end": 6}]
CASES = list(zip(SHAPES, (False, True, False)))  # and whether the checkpoint has scales


def add_tensors(directory, tensors):
    path = directory / "model.safetensors"
    save_file(load_file(path) | tensors, path, {"format": "pt"})


def scale_tensors(scales, keys="k_scale", values="v_scale", shape=(1,)):
    return {
        f"model.layers.{i}.self_attn.{name}": torch.tensor(number).reshape(shape)
        for i, pair in enumerate(scales)
        for name, number in zip((keys, values), pair)
    }


@pytest.fixture(scope="module")
def scales():
    """Small ones, so that some keys and values are larger than all codes."""
    drawn = np.random.default_rng(SEED).uniform(0.002, 0.01, (LAYERS, 2))
    return drawn.astype(np.float32).tolist()


@pytest.fixture(scope="module")
def models(tmp_path_factory, scales):
    """A checkpoint without scales and one with them, by whether it has them."""
    root = tmp_path_factory.mktemp("models")
    found = {scaled: make_model(root / f"{scaled}", seed=SEED) for scaled in (False, True)}
    add_tensors(found[True], scale_tensors(scales))
    return found


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    """What every rank computed, by case; and the prompts."""
    root, random = tmp_path_factory.mktemp("engines"), np.random.default_rng(SEED)
    prompts = [random.integers(3, 131, size=n).tolist() for n in random.integers(1, 12, PROMPTS)]
    batches = {}
    for i, (shape, scaled) in enumerate(CASES):
        engine = root / f"engine{i}"
        limits = {"max_seq_len": 32, "max_batch_size": PROMPTS, "prefill_chunk": 4, "probes": "never"}
        cqil_trt.build(model=models[scaled], output=engine, kv_dtype="fp8", **limits, **shape)
        case = {"engine": str(engine), "device": "cpu", "prompts": prompts, "steps": STEPS}
        batches.setdefault(shape["p"], []).append(case | {"out": str(root / f"out{i}")})
    for ranks, batch in batches.items():
        done = mpirun(ranks, write_json(root / f"cases{ranks}.json", batch), script="tests/support/mpi_worker.py")
        assert done.returncode == 0, done.stderr
    return root, prompts


@pytest.mark.parametrize("number", range(len(CASES)))
def test_engine_equals_formulas(number, models, scales, results):
    """A prompt and what decodes after it see keys and values rounded alike.

    Keys that differ in their last bit are rarely neighbours of a border between two codes, which the result then shows.
    """
    root, prompts = results
    shape, scaled = CASES[number]
    network = load_model(models[scaled])
    own = scales if scaled else [(1.0, 1.0)] * LAYERS
    rounded, exact = (Formulas(network.config, network.state_dict(), s) for s in (own, None))
    ranks = [np.load(f"{root}/out{number}-{rank}.npz") for rank in range(shape["p"])]
    for other in ranks[1:]:
        assert all(np.array_equal(ranks[0][key], other[key]) for key in ranks[0])
    errors, differences = [], []
    for i, prompt in enumerate(prompts):
        tokens = ranks[0]["tokens"][i].tolist()
        ids = torch.tensor([prompt + tokens[:-1]])
        wanted, unrounded = (formulas.logits(ids, **shape)[0].numpy() for formulas in (rounded, exact))
        found = np.concatenate((ranks[0][f"score{i}"][:-1], ranks[0]["logits"][i]))
        errors.append(relative(found, wanted))
        differences.append(relative(unrounded, wanted))
    assert max(errors) < THRESHOLDS["float16"].relative_l2
    assert np.sort(errors)[PROMPTS // 2] < 1e-5 and np.sort(differences)[PROMPTS // 2] > 1e-3


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "phi3-longrope"])
def test_the_reference_rounds_as_the_formulas(name, tmp_path):
    """Of every family, whichever attention function it has."""
    architecture, changes = FAMILIES[name]
    network = load_model(make_model(tmp_path, architecture, seed=SEED, **changes))
    own = tuple((0.01 * (i + 1), 0.02) for i in range(LAYERS))
    ids = torch.from_numpy(np.random.default_rng(SEED).integers(3, 131, size=(5, 12)))
    wanted = Formulas(network.config, network.state_dict(), own).logits(ids).numpy()
    reference.with_kv_cache(network, EngineLimits(kv_dtype="fp8", kv_scales=own))
    with torch.inference_mode():
        found = network(ids, use_cache=False).logits.numpy()
    assert np.median([relative(*pair) for pair in zip(found, wanted)]) < 1e-5


def test_a_search_measures_with_the_cache(models, scales):
    path, blocks = models[True], np.random.default_rng(SEED).integers(3, 131, size=(6, 12))
    checkpoint = Checkpoint(path, tokenizer=False)
    network = reference.from_reader(checkpoint.model, checkpoint.reader, pieces=False)
    measure = Measure(path, network, blocks, "float32", "perplexity", "fp8")
    rounded = measure._network("int8", "dense")
    for judged, scores in ((network, measure.unchanged), (rounded, score_reference(rounded, blocks))):
        formulas = Formulas(network.config, judged.state_dict(), scales)
        chances = formulas.logits(torch.from_numpy(blocks)).log_softmax(-1)[:, :-1]
        wanted = -chances.gather(-1, torch.from_numpy(blocks)[:, 1:, None])[..., 0].numpy()
        assert np.median(np.abs(scores.nll - wanted)) < 1e-5


def chunks(ops, shard, q, k, v, borders):
    """Attention of one sequence in slot 0 whose tokens come in chunks, and what the cache then holds."""
    found = []
    for first, last in zip(borders, borders[1:]):
        ops.begin([0], None)
        positions = ops.positions(torch.zeros(1, last - first, dtype=torch.long), torch.tensor([first]))
        found.append(ops.cached_attention(*(x[:, :, first:last] for x in (q, k, v)), positions, shard))
    codes = [part[0, :, : borders[-1]].view(torch.uint8).clone() for part in ops._cache[shard.index]]
    return torch.cat(found, 1), codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens_see_the_same_codes_however_they_come(dtype, models):
    """At once, in chunks, one by one: the cache has the same bits, and they are what attention reads."""
    checkpoint = Checkpoint(models[True])
    name = str(dtype).removeprefix("torch.")
    limits = EngineLimits(max_batch_size=2, max_seq_len=32, dtype=name, kv_dtype="fp8", kv_scales=checkpoint.kv_scales)
    [rank] = plan(checkpoint.model, CqilConfig(p=1), name)
    model, shard = checkpoint.model, rank.layers[2]
    ops = TorchOps(rank, {}, {}, limits, checkpoint.rotary)
    torch.manual_seed(SEED)
    q, k, v = (torch.randn(1, n, 19, 8).to(dtype) for n in (model.num_heads, model.num_kv_heads, model.num_kv_heads))
    k[0, 0, 3, 0], v[0, 1, 5, 1] = 60000, -60000
    whole, cached = chunks(ops, shard, q, k, v, (0, 19))
    scale = [torch.tensor(number) for number in limits.scales_of(2)]
    keys, values = (fp8(x.double(), number.double()) for x, number in zip((k, v), scale))
    for part, kept, number in zip((keys, values), cached, scale):
        assert torch.equal(kept.view(torch.float8_e4m3fn).double() * number.double(), part[0])
    group = model.group_size
    scores = q.double() @ keys.repeat_interleave(group, 1).transpose(2, 3) / 8**0.5
    seen = scores.masked_fill(torch.ones(19, 19).triu(1).bool(), -torch.inf).softmax(-1)
    wanted = (seen @ values.repeat_interleave(group, 1)).transpose(1, 2).flatten(2)
    for borders in ((0, 19), (0, 7, 19), (0, 1, 2, 18, 19), range(20)):
        found, codes = chunks(ops, shard, q, k, v, tuple(borders))
        assert all(torch.equal(one, other) for one, other in zip(codes, cached))
        assert relative(found.double().numpy(), wanted.numpy()) < {2: 2e-2, 4: 1e-5}[dtype.itemsize]
    # The beginning for another slot, as a prompt that shares it takes it.
    ops.copy_cache(0, 1, 11)
    for part, codes in zip(ops._cache[2], cached):
        assert torch.equal(part[1, :, :11].view(torch.uint8), codes[:, :11]) and not part[1, :, 11:].float().any()


def test_a_reused_beginning_changes_no_bit(models, tmp_path):
    """Logits after a prompt's last chunk, whose keys before it are reused, copied or computed."""
    limits = {"max_seq_len": 64, "max_batch_size": 2, "prefill_chunk": 8, "probes": "never"}
    cqil_trt.build(model=models[True], p=1, output=tmp_path / "engine", kv_dtype="fp8", **limits)
    random = np.random.default_rng(SEED)
    start = random.integers(3, 131, size=24).tolist()
    prompts = [start + random.integers(3, 131, size=5).tolist() for _ in range(3)]

    def answered(llm, prompt):
        request = Request(prompt=tuple(prompt), max_new_tokens=8, scored=len(start))
        number, events = llm.runner.scheduler.add(request), []
        while not (events and events[-1].finish_reason):
            events += [event for event in llm.runner.turn() if event.number == number]
        logits = [event.logits for event in events if event.logits is not None]
        return events[0].cached, logits, [choice.token for event in events for choice in event.choices]

    def load():
        return cqil_trt.load(tmp_path / "engine", device="cpu")

    one = load()
    for i, prompt in enumerate(prompts):
        (reused, logits, tokens), (_, alone, alone_tokens) = answered(one, prompt), answered(load(), prompt)
        assert reused == (24 if i else 0) and tokens == alone_tokens
        assert [part.tobytes() for part in logits] == [part.tobytes() for part in alone]


MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
ROUNDED = {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": True}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8}}},
    "kv_cache_scheme": ROUNDED,
}


@pytest.mark.parametrize(
    ("names", "shape", "config"),
    [
        (("k_scale", "v_scale"), (1,), COMPRESSED),
        (("k_proj.output_scale", "v_proj.output_scale"), (1,), COMPRESSED),
        (("k_proj.k_scale", "v_proj.v_scale"), (), MODELOPT),
        (("kv_scale", "kv_scale"), (), None),
        (("k_scale", "v_scale"), (1,), COMPRESSED | {"kv_cache_scheme": ROUNDED | {"type": "int"}}),
        (("k_proj.k_scale", "v_proj.v_scale"), (), MODELOPT | {"kv_cache_quant_algo": "INT8"}),
    ],
)
def test_scales_of_checkpoints(names, shape, config, scales, tmp_path):
    """Under the names that other tools write; those for integers are not those of an FP8 cache."""
    model = make_model(tmp_path / "model", seed=SEED)
    add_tensors(model, scale_tensors(scales, *names, shape))
    if config is not None:
        module = "model.layers.1.self_attn.k_proj"
        codes = load_file(model / "model.safetensors")[f"{module}.weight"].to(torch.float8_e4m3fn)
        add_tensors(model, {f"{module}.weight": codes, f"{module}.weight_scale": torch.ones(())})
        values = json.loads((model / "config.json").read_text()) | {"quantization_config": config}
        write_json(model / "config.json", values)
    fits = config in (None, COMPRESSED, MODELOPT)
    both = names[0] == names[1]  # the second of a pair was written last
    expected = tuple((v if both else k, v) for k, v in scales) if fits else ()
    assert Checkpoint(model).kv_scales == expected
    done = build("--model", model, "--p", 1, "--kv-dtype", "fp8", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"the scales of the KV cache are {'those of' if fits else '1, as'} the checkpoint" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.layers.3.self_attn.v_scale": None},
            "self_attn.v_scale is missing: an FP8 KV cache takes one number",
        ),
        (
            {"model.layers.2.self_attn.k_scale": None, "model.layers.2.self_attn.v_scale": None},
            "layer 2 has no scales of the KV cache, and others have them",
        ),
        ({"model.layers.0.self_attn.k_scale": torch.ones(2)}, r"k_scale has shape \(2,\): an FP8 KV cache takes one"),
        ({"model.layers.0.self_attn.k_scale": torch.zeros(1)}, "k_scale is 0.0: scales of a KV cache are above 0"),
        ({"model.layers.0.self_attn.v_scale": torch.tensor(torch.nan)}, "v_scale is nan: scales"),
    ],
)
def test_wrong_scales_are_named(change, message, models, tmp_path):
    tensors = load_file(models[True] / "model.safetensors") | change
    for path in models[True].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        cqil_trt.build(model=tmp_path, p=1, kv_dtype="fp8", output=tmp_path / "engine")
    cqil_trt.build(model=tmp_path, p=1, probes="never", output=tmp_path / "engine")  # does not need them


def test_an_engine_records_its_cache(models, scales, tmp_path):
    for dtype, times in (("float32", 4), ("bfloat16", 2)):
        plans = []
        for kv_dtype in ("auto", "fp8"):
            flags = "--model", models[True], "--p", 2, "--start", 1, "--end", 5, "--dtype", dtype
            done = build(*flags, "--kv-dtype", kv_dtype, "--dry-run", "--json")
            assert done.returncode == 0, done.stderr
            plans.append(json.loads(done.stdout))
        [own, fp8_plan] = plans
        for rank, other in zip(own["ranks"], fp8_plan["ranks"]):
            assert rank["kv_cache_bytes_per_token"] == times * other["kv_cache_bytes_per_token"] > 0
        assert fp8_plan["output"] == f"{own['output']}-kv-fp8"
        assert any("scales of an FP8 KV cache are not used" in note for note in own["notes"])
    path = tmp_path / "engine"
    cqil_trt.build(model=models[True], p=1, kv_dtype="fp8", dtype="bfloat16", max_seq_len=32, output=path)
    limits = Engine.open(path).limits
    assert (limits.kv_dtype, limits.cache_dtype) == ("fp8", "float8_e4m3fn")
    assert limits.kv_scales == tuple(map(tuple, scales))
    done = mpirun(1, "--engine", path, "--validate")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "threshold for bfloat16 with a KV cache in fp8: relative L2 <= 0.1" in done.stdout
    # The answers that it stores are those of its cache.
    network = load_model(models[True])
    formulas = Formulas(network.config, network.state_dict(), scales)
    errors = [relative(p.logits, formulas.logits(torch.tensor([p.prompt]))[0].numpy()) for p in probes.load(path)]
    assert np.median(errors) < 1e-5
    with pytest.raises(UserError, match="an engine, which fixes --kv-dtype: omit it"):
        cqil_trt.build(model=path, backend="onnx", kv_dtype="fp8", output=tmp_path / "onnx")
    with pytest.raises(UserError, match="--kv-dtype must be one of auto, fp8, found e5m2"):
        cqil_trt.build(model=models[False], p=1, kv_dtype="e5m2", output=tmp_path / "other")


def test_onnx_files_round_alike(models, tmp_path):
    source = cqil_trt.build(model=models[True], p=1, output=tmp_path / "torch", kv_dtype="fp8", max_seq_len=16)
    engine = cqil_trt.build(model=source.path, backend="onnx", output=tmp_path / "onnx")
    assert engine.limits == source.limits
    random, errors = np.random.default_rng(SEED), []
    loaded = [cqil_trt.load(path).runner for path in (engine.path, source.path)]
    for _ in range(5):
        prompt = random.integers(3, 131, size=9).tolist()
        found, expected = (runner.score(prompt) for runner in loaded)
        errors.append(relative(found, expected))
    assert np.median(errors) < 1e-5


def test_backends_without_such_a_cache_name_it(models, tmp_path):
    with pytest.raises(
        UserError, match="--kv-dtype fp8: TensorRT-LLM's executor owns the KV cache.* use backend torch or"
    ):
        cqil_trt.build(model=models[False], p=1, kv_dtype="fp8", backend="tensorrt-llm", output=tmp_path / "engine")


def test_layers_without_such_a_cache_are_named(models, tmp_path):
    need("tensorrt_rtx")
    options = {"backend": "tensorrt", "target": "8.6", "dtype": "float16", "output": tmp_path / "engine"}
    with pytest.raises(UserError, match="--kv-dtype fp8: attention of tensorrt_rtx .* takes a KV cache of"):
        cqil_trt.build(model=models[False], p=1, kv_dtype="fp8", **options)
