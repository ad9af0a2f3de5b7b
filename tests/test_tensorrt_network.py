"""The TensorRT network: what it computes (in numpy, as no GPU is needed), and what TensorRT-RTX builds from it."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import SEED, write_json
from support.cases import ARCHITECTURES, FAMILIES, identifier, ranks_of, relative
from support.checkpoints import load_model, make_model, rank_weights
from support.processes import assert_user_error, build, mpirun, run
from support.tensorrt_evaluator import NetworkEvaluator, Recorder, evaluate

import cqil_trt
from cqil_trt.backends.tensorrt.network import Lowering, add_profiles, define_network
from cqil_trt.checkpoint import Checkpoint
from cqil_trt.config import DTYPES, PLACEMENTS, CqilConfig, EngineLimits
from cqil_trt.demo import demo_model
from cqil_trt.engine import fingerprint
from cqil_trt.errors import UserError
from cqil_trt.reference import CqilModel, from_reader
from cqil_trt.schedule import Group
from cqil_trt.shard import plan
from cqil_trt.validate import THRESHOLDS

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
LOGGER = trt.Logger(trt.Logger.ERROR)

BATCH, LENGTH, CHUNK, STEPS = 2, 16, 5, 4
GROUPS = [{}, {"d": 1}, {"d": 1, "bypass": "residual"}]
SHAPES = [{"p": 1}]
SHAPES += [
    {"p": p, **groups, "start": 1, "end": 5, "placement": placement}
    for p in (2, 4)
    for placement in ("sharded", "leader")
    for groups in GROUPS
]
SHAPES += [{"p": p, "placement": "tensor"} for p in (2, 4)]
CASES = [(name, shape) for name in ARCHITECTURES for shape in SHAPES]
# Attention passed further on, other ranges, joins left out, and a rank with nothing to do.
CASES += [
    ("llama-gqa", {"p": 4, "d": 3, "start": 2, "end": 6}),
    ("qwen3", {"p": 3, "d": 2, "start": 0, "end": 6, "bypass": "residual", "placement": "leader"}),
    ("llama-tied-bias", {"p": 2, "start": 2, "end": 4, "drop_attention_join": (0, 5)}),
    ("llama-odd-heads", {"p": 2, "ranks_per_layer": 2, "d": 1, "start": 1, "end": 5}),
    ("llama-tied-bias", {"p": 2, "ranks_per_layer": 2, "start": 2, "end": 4, "drop_attention_join": (0, 2, 3)}),
    ("qwen2", {"p": 2, "start": 3, "end": 3, "placement": "leader"}),
]
# Every architecture, and every shape at some of them.
HALF = [
    (name, {**SHAPES[(4 * i + j) % len(SHAPES)], "dtype": dtype})
    for i, name in enumerate(ARCHITECTURES)
    for j, dtype in enumerate(("float16", "bfloat16"))
]
# Families with more than LLaMA has: TensorRT's attention has no caps of scores.
NATIVE = [name for name in FAMILIES if name != "gemma2"]
MORE = [
    (name, {**shape, "dtype": dtype})
    for i, name in enumerate(NATIVE)
    for shape, dtype in (
        ({"p": 2, "d": i % 2, "start": 1, "end": 5, "placement": PLACEMENTS[i % 2]}, "float32"),
        ({"p": 4 if i % 2 else 3, "placement": "tensor"}, ("float32", "float16", "bfloat16")[i % 3]),
    )
]
SHARED = {"p": 2, "ranks_per_layer": 2, "start": 1, "end": 5, "dtype": "float32"}
MORE += [("gemma3", {**SHARED, "d": 1}), ("olmo2", {**SHARED, "d": 1, "bypass": "residual"})]
BUILDS = [
    (name, {**SHAPES[(4 * i + j) % len(SHAPES)], "dtype": DTYPES[(i + j) % 3]})
    for i, name in enumerate(ARCHITECTURES)
    for j in ([0, 2] if i < 5 else [0])
]
BUILDS += [("qwen2", {**CASES[-1][1], "dtype": "float32"}), MORE[0], MORE[8]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    # An epsilon whose absence shows.
    return {
        name: make_model(root / name, architecture, seed=SEED + i, rms_norm_eps=1e-2, **changes)
        for i, (name, (architecture, changes)) in enumerate({**ARCHITECTURES, **FAMILIES}.items())
    }


class Definition:
    """A rank's network. Holds what TensorRT needs alive: the builder, and the arrays of constants."""

    def __init__(self, rank, limits, rotary):
        self.plan = rank
        self.builder = trt.Builder(LOGGER)
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = Recorder(self.builder.create_network(flags))
        self.ops = define_network(trt, self.network, Lowering.of(trt), rank, limits, rotary, nccl=True)

    @property
    def inputs(self):
        return [self.network.get_input(i) for i in range(self.network.num_inputs)]

    @property
    def outputs(self):
        return [self.network.get_output(i) for i in range(self.network.num_outputs)]


def define(directory, shape, limits):
    checkpoint = Checkpoint(directory, None)
    checkpoint.quantize(limits)
    ranks = plan(checkpoint.model, CqilConfig(**shape), limits.dtype, limits.weights)
    return checkpoint, [Definition(rank, limits, checkpoint.rotary) for rank in ranks]


def rank_arrays(rank, reader, dtype):
    """The rank's tensors as numpy arrays."""
    return {name: values.numpy().astype(dtype) for name, values in rank_weights(rank, reader, dtype).items()}


class Ranks:
    """All ranks of a model in one process. A pass is given what backends/tensorrt_session.py binds to the engine."""

    def __init__(self, directory, shape, dtype, weights="dense"):
        sizes = {"max_batch_size": BATCH, "max_seq_len": LENGTH, "prefill_chunk": CHUNK}
        limits = EngineLimits(**sizes, dtype=dtype, weights=weights)
        checkpoint, self.definitions = define(directory, shape, limits)
        self.plans = [definition.plan for definition in self.definitions]
        self.evaluators = [NetworkEvaluator(trt, definition.network) for definition in self.definitions]
        # As the session gives them to the engine: quantized ones dequantized.
        dense = plan(checkpoint.model, CqilConfig(**shape), dtype)
        self.weights = [rank_arrays(rank, checkpoint.reader, dtype) for rank in dense]
        self.reader = checkpoint.reader
        self.dtype = dtype
        self.caches = []

    def start(self, batch):
        """Caches hold what a batch before left: a query must never see it."""
        random = np.random.default_rng(SEED)
        self.caches = [
            {
                f"cache.{index}.{part}": random.normal(
                    scale=10, size=(batch, shard.num_kv_heads, LENGTH, rank.model.head_dim)
                ).astype(self.dtype)
                for index, shard in rank.layers.items()
                if shard.num_heads
                for part in ("key", "value")
            }
            for rank in self.plans
        ]

    def forward(self, tokens, past, select):
        """Logits [B, K, vocabulary] of tokens [B, T] after `past` [B], at select [B, K]."""
        batch, length = tokens.shape
        positions = np.minimum(past[:, None] + np.arange(length), LENGTH - 1)
        rows = (np.arange(batch)[:, None] * length + select).reshape(-1)
        inputs = {"tokens": tokens, "positions": positions, "past": past, "select": rows}
        inputs = {name: array.astype(np.int32) for name, array in inputs.items()}
        given = []
        for rank, weights, caches in zip(self.plans, self.weights, self.caches):
            own = inputs if rank.schedule.predicts else {n: array for n, array in inputs.items() if n != "select"}
            given.append({**own, **weights, **caches})
        outputs = evaluate(self.evaluators, given)

        joined = [out["joined"] for out in outputs if "joined" in out]
        assert len(joined) == (len(outputs) if self.plans[0].schedule.all_reduces else 0)
        assert all(np.array_equal(joined[0], other) for other in joined[1:])  # bit for bit
        for out, caches in zip(outputs, self.caches):
            assert all(out[f"{name}.updated"] is cache for name, cache in caches.items())
        logits = np.concatenate([out["logits"] for out in outputs if "logits" in out], axis=1)
        return logits.reshape(*select.shape, -1)

    def prefill(self, prompts):
        """The next-token logits of every prompt, which are padded on the right and taken in chunks."""
        self.start(len(prompts))
        lengths = np.array([len(prompt) for prompt in prompts])
        tokens = np.zeros((len(prompts), lengths.max()), np.int64)
        for row, prompt in zip(tokens, prompts):
            row[: len(prompt)] = prompt
        found = [None] * len(prompts)
        for first in range(0, lengths.max(), CHUNK):
            part = tokens[:, first : first + CHUNK]
            select = np.clip(lengths - 1 - first, 0, part.shape[1] - 1)[:, None]
            logits = self.forward(part, np.full(len(prompts), first), select)
            for i in np.flatnonzero((lengths > first) & (lengths <= first + CHUNK)):
                found[i] = logits[i]
        return np.stack(found)[:, 0]


NUMBERS = [  # in the fast run those of few ranks
    pytest.param(i, id=identifier(case), marks=() if ranks_of(case[1]) < 3 else pytest.mark.slow)
    for i, case in enumerate(CASES + HALF + MORE)
]


@pytest.mark.parametrize("number", NUMBERS)
def test_it_computes_what_the_reference_does(number, models):
    name, shape = (CASES + HALF + MORE)[number]
    shape = dict(shape)
    dtype = shape.pop("dtype", "float32")
    random = np.random.default_rng([SEED, number])
    lengths = random.choice(np.arange(1, LENGTH - STEPS + 1), BATCH, replace=False)
    sequences = [random.integers(131, size=length + STEPS) for length in lengths]
    reference = load_model(models[name])
    if shape.get("placement") != "tensor":  # which is the unchanged model
        reference = CqilModel(reference, **{key: value for key, value in shape.items() if key != "placement"})
    with torch.inference_mode():
        expected = [reference(torch.tensor(s[None]), use_cache=False).logits[0].numpy() for s in sequences]

    ranks, allowed = Ranks(models[name], shape, dtype), THRESHOLDS[dtype].relative_l2
    # Scoring: one sequence, predicted from at every token.
    sequence = sequences[0]
    ranks.start(1)
    scored = ranks.forward(sequence[None], np.zeros(1, np.int64), np.arange(len(sequence))[None])
    assert relative(scored[0], expected[0]) < allowed
    # Generation: prompts of different lengths, then one token of each at a time.
    logits = [ranks.prefill([sequence[:length] for sequence, length in zip(sequences, lengths)])]
    for step in range(STEPS):
        tokens = np.array([[sequence[length + step]] for sequence, length in zip(sequences, lengths)])
        logits.append(ranks.forward(tokens, lengths + step, np.zeros((BATCH, 1), np.int64))[:, 0])
    for i, length in enumerate(lengths):
        assert relative(np.stack(logits)[:, i], expected[i][length - 1 :]) < allowed


@pytest.mark.parametrize("weights", ["int8", "int4g32"])
def test_quantized_weights_are_dequantized_when_the_engine_is_loaded(weights, models):
    shape = {"p": 2, "start": 1, "end": 5}
    ranks = Ranks(models["llama-tied-bias"], shape, "float32", weights)
    model = ranks.plans[0].model
    reference = CqilModel(from_reader(model, ranks.reader), **shape)
    tokens = np.random.default_rng([SEED, 7]).integers(131, size=11)
    with torch.inference_mode():
        expected = reference(torch.tensor(tokens[None]), use_cache=False).logits[0].numpy()
        unchanged = CqilModel(load_model(models["llama-tied-bias"]), **shape)(torch.tensor(tokens[None])).logits[0]
    ranks.start(1)
    scored = ranks.forward(tokens[None], np.zeros(1, np.int64), np.arange(11)[None])
    assert relative(scored[0], expected) < THRESHOLDS["float32"].relative_l2 < relative(unchanged.numpy(), expected)


@pytest.mark.slow
def test_an_engine_with_quantized_weights_is_built(models, tmp_path):
    engine = cqil_trt.build(
        model=models["qwen3"],
        backend="tensorrt",
        target="12.0",
        output=tmp_path / "engine",
        p=2,
        dtype="float16",
        quantize="fp8",
        max_seq_len=LENGTH,
        probes="never",
        save_network_json=True,
    )
    stored = {tensor.name: tensor.dtype for tensor in engine.plan(0).tensors}
    assert stored["layers.0.qkv.weight"] == "float8_e4m3fn" and engine.files["rank0.engine"]["size"] > 0
    layers = json.loads(engine.rank_file(0, "network.json").read_text())
    read = {tensor["name"]: tensor["dtype"] for layer in layers for tensor in layer["inputs"] if tensor}
    assert read["layers.0.qkv.weight"] == "HALF" and "layers.0.qkv.scale" not in read


@pytest.mark.parametrize("number", NUMBERS[: len(CASES)])
def test_inputs_outputs_and_collectives(number, models):
    name, shape = CASES[number]
    dtype = DTYPES[number % 3]
    _, definitions = define(
        models[name], shape, EngineLimits(max_batch_size=BATCH, max_seq_len=LENGTH, dtype=dtype, prefill_chunk=CHUNK)
    )
    for definition in definitions:
        rank, network = definition.plan, definition.network
        model, predicts = rank.model, rank.schedule.predicts
        width = rank.vocabulary[1] - rank.vocabulary[0]
        kind, integer = getattr(trt, dtype), trt.int32
        caches = {
            f"cache.{index}.{part}": ((-1, shard.num_kv_heads, LENGTH, model.head_dim), kind)
            for index, shard in rank.layers.items()
            if shard.num_heads
            for part in ("key", "value")
        }
        weights = {tensor.name: (tensor.shape, kind) for tensor in rank.tensors}
        if rank.shares_embedding:
            weights["lm_head.weight"] = (width, model.hidden_size), kind
        inputs = {"tokens": ((-1, -1), integer), "positions": ((-1, -1), integer), "past": ((-1,), integer)}
        inputs |= ({"select": ((-1,), integer)} if predicts else {}) | caches | weights
        assert {tensor.name: (tuple(tensor.shape), tensor.dtype) for tensor in definition.inputs} == inputs

        outputs = {f"{cache}.updated": value for cache, value in caches.items()}
        if predicts:
            outputs["logits"] = (-1, width), kind
        if rank.schedule.all_reduces:
            outputs["joined"] = (-1, model.hidden_size), kind
        assert {tensor.name: (tuple(tensor.shape), tensor.dtype) for tensor in definition.outputs} == (
            outputs or {"idle": ((-1, -1), integer)}
        )
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        read = {layer.get_input(j).name for layer in layers for j in range(layer.num_inputs) if layer.get_input(j)}
        assert weights.keys() | caches.keys() <= read

        collectives = [operation for operation, _, _ in network.collectives.values()]
        assert collectives.count("ALL_REDUCE") == rank.schedule.all_reduces - joins_of_layers(rank)
        assert collectives.count("BROADCAST") == rank.schedule.broadcasts
        assert len(collectives) == expected_collectives(rank)


def joins_of_layers(rank):
    """All-reduces of the ranks that share a layer of a group: TensorRT's layer has none for a part of the ranks."""
    return sum(step.all_reduces - 1 for step in rank.schedule.layers if isinstance(step, Group))


def expected_collectives(rank):
    bypasses = len(rank.cqil.groups) if rank.cqil.d else 0
    return rank.all_reduces + rank.schedule.broadcasts + bypasses


@pytest.mark.parametrize("chunk", [CHUNK, 10 * LENGTH])
def test_two_profiles_have_room_for_every_pass(chunk, models):
    limits = EngineLimits(max_batch_size=BATCH, max_seq_len=LENGTH, dtype="float16", prefill_chunk=chunk)
    _, definitions = define(models["llama-odd-heads"], {"p": 2, "d": 1, "start": 1, "end": 5}, limits)
    for definition in definitions:
        made = []

        def make(builder=definition.builder, made=made):
            made.append(builder.create_optimization_profile())
            return made[-1]

        config = definition.builder.create_builder_config()
        recording = SimpleNamespace(create_optimization_profile=make)
        add_profiles(trt, recording, config, definition.network, limits)
        assert config.num_optimization_profiles == len(made) == 2 and all(made)
        for profile, batch, longest in zip(made, (1, BATCH), (min(chunk, LENGTH), 1)):
            for tensor in definition.inputs:
                shape = tuple(tensor.shape)
                if -1 not in shape:
                    continue
                low, usual, high = (tuple(sizes) for sizes in profile.get_shape(tensor.name))
                assert all(a <= b <= c for a, b, c in zip(low, usual, high))
                expected = {
                    "tokens": (batch, longest),
                    "positions": (batch, longest),
                    "past": (batch,),
                    "select": (batch * longest,),
                }
                assert high == expected.get(tensor.name, (batch, *shape[1:]))
                assert low == tuple(1 if size < 0 else size for size in shape)


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_plugins_have_a_profile_for_drafts(batch):
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network, config, made = builder.create_network(), builder.create_builder_config(), []
    for name, dims in (("tokens", 2), ("past", 2), ("slots", 2), ("select", 1)):
        network.add_input(name, trt.int32, (-1,) * dims)

    def make():
        made.append(builder.create_optimization_profile())
        return made[-1]

    recording = SimpleNamespace(create_optimization_profile=make)
    add_profiles(trt, recording, config, network, EngineLimits(max_batch_size=batch, max_seq_len=LENGTH))
    assert config.num_optimization_profiles == 3
    sequences = min(batch, 8)
    for name, (low, high) in {
        "tokens": ((1, 2), (sequences, 16)),
        "past": ((1, 2), (sequences, 16)),
        "slots": ((1, 2), (sequences, 16)),
        "select": ((1,), (16 * sequences,)),
    }.items():
        found, usual, most = (tuple(sizes) for sizes in made[2].get_shape(name))
        assert (found, most) == (low, high) and all(a <= b <= c for a, b, c in zip(low, usual, high)), name
    for profile in made[:2]:
        assert [tuple(sizes)[1] for sizes in profile.get_shape("past")] == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name, shape", BUILDS, ids=map(identifier, BUILDS))
def test_engines_of_every_rank_are_built(name, shape, models, tmp_path):
    engine = cqil_trt.build(
        model=models[name],
        backend="tensorrt",
        target="8.6, 12.0",
        output=tmp_path / "engine",
        max_batch_size=BATCH,
        max_seq_len=LENGTH,
        prefill_chunk=CHUNK,
        probes="never",
        save_network_json=True,
        **shape,
    )
    assert (engine.backend_version, engine.architecture) == (f"tensorrt_rtx {trt.__version__}", "8.6, 12.0")
    assert engine.build == {"collective": "nccl"}
    written = {path.name for path in engine.path.iterdir()} - {"config.json"}
    assert written == engine.files.keys()
    _, definitions = define(models[name], {k: v for k, v in shape.items() if k != "dtype"}, engine.limits)
    for definition in definitions:
        rank = definition.plan
        path = engine.rank_file(rank.rank, "engine")
        assert engine.files[path.name] == fingerprint(path) and engine.files[path.name]["size"] > 0
        # TensorRT reads an engine back only where there is a GPU; the names stand in the file as they are.
        serialized = path.read_bytes()
        for tensor in [*definition.inputs, *definition.outputs]:
            assert tensor.name.encode() in serialized, tensor.name

        layers = json.loads(engine.rank_file(rank.rank, "network.json").read_text())
        assert [layer["type"] for layer in layers].count("DIST_COLLECTIVE") == expected_collectives(rank)
        network = definition.network
        assert [layer["name"] for layer in layers] == [network.get_layer(i).name for i in range(network.num_layers)]
        named = {tensor["name"]: tensor for layer in layers for tensor in layer["outputs"]}
        for tensor in definition.outputs:
            assert named[tensor.name]["shape"] == list(tensor.shape)
            assert named[tensor.name]["dtype"] == tensor.dtype.name


def test_the_builds_cover_what_there_is():
    assert {name for name, _ in BUILDS} == {*ARCHITECTURES, NATIVE[0], NATIVE[4]}
    assert {(s["p"], s.get("placement", PLACEMENTS[0])) for _, s in BUILDS} >= {
        (1, "sharded"),
        *((p, placement) for p in (2, 4) for placement in PLACEMENTS),
    }
    assert {(s["p"], s.get("d", 0)) for _, s in BUILDS} >= {(p, d) for p in (2, 4) for d in (0, 1)}
    assert {s["dtype"] for _, s in BUILDS} == set(DTYPES)


@pytest.mark.slow
def test_an_engine_holds_no_weights(tmp_path):
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "head_dim": 64}
    directory = make_model(tmp_path / "model", num_hidden_layers=2, **sizes)
    engine = cqil_trt.build(
        model=directory, p=1, backend="tensorrt", target="8.9", output=tmp_path / "engine", probes="never"
    )
    assert engine.files["rank0.safetensors"]["size"] > 60e6 > 6 * engine.files["rank0.engine"]["size"]


@pytest.mark.slow
def test_the_demo_model_is_compiled(tmp_path):
    try:
        model = demo_model()
    except UserError as error:
        pytest.skip(f"the demo model cannot be fetched: {error}")
    engine = cqil_trt.build(
        model=model, p=2, d=1, dtype="float16", backend="tensorrt", target="8.9", output=tmp_path / "engine"
    )
    for rank in range(2):
        engine.verify_rank(rank)
        sizes = [engine.files[f"rank{rank}.{suffix}"]["size"] for suffix in ("engine", "safetensors")]
        assert 4 * sizes[0] < sizes[1], sizes


@pytest.mark.slow
def test_an_engine_of_backend_torch_is_compiled(models, tmp_path):
    """Its weights are taken as they are; what it fixes cannot be chosen again."""
    limits = {"max_batch_size": BATCH, "max_seq_len": LENGTH}
    source = cqil_trt.build(
        model=models["llama-odd-heads"], p=2, d=1, start=1, end=5, dtype="float16", output=tmp_path / "torch", **limits
    )
    compile_it = {"model": source.path, "backend": "tensorrt", "target": "portable", **limits}
    engine = cqil_trt.build(output=tmp_path / "rtx", **compile_it)
    assert engine.architecture == "8.0, 8.6, 8.9, 12.0"
    assert (engine.cqil, engine.source, engine.rotary) == (source.cqil, source.source, source.rotary)
    assert engine.limits.dtype == "float16"
    for name in ("rank0.safetensors", "rank1.safetensors", "reference.npz"):
        assert engine.files[name] == source.files[name]
        engine.verify(name)

    decided = {
        "lora": "adapter",
        "preset": "llama-7b",
        "p": 2,
        "d": 0,
        "start": 1,
        "end": 5,
        "bypass": "mlp",
        "placement": "sharded",
        "dtype": "float16",
    }
    for flag, value in decided.items():
        with pytest.raises(UserError, match=f"which fixes --{flag}: omit it"):
            cqil_trt.build(output=tmp_path / "other", **compile_it, **{flag: value})
    with pytest.raises(UserError, match="backend tensorrt; only one of backend torch"):
        cqil_trt.build(output=tmp_path / "other", **{**compile_it, "model": engine.path})
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["beside", "named", "elsewhere"])
def test_timings_are_kept_for_the_next_build(place, models, tmp_path):
    directory, name = {
        "beside": (tmp_path / "engines", None),
        "named": (tmp_path / "engines", "timings"),
        "elsewhere": (tmp_path, str(tmp_path / "timings")),
    }[place]
    shape = {"model": models["llama-few-heads"], "p": 2, "placement": "tensor", "max_seq_len": LENGTH}
    options = {"backend": "tensorrt", "target": "8.6", "timing_cache": name, "probes": "never"}

    def caches():
        prefix = f".timing-tensorrt_rtx{trt.__version__}-8.6" if name is None else "timings"
        return sorted(directory.glob(f"{prefix}.rank*"))

    cqil_trt.build(output=tmp_path / "engines" / "first", **shape, **options)
    assert [path.suffix for path in caches()] == [".rank0", ".rank1"]
    kept = [path.read_bytes() for path in caches()]
    # A rank without timings looks at another's; a damaged file counts for nothing.
    caches()[0].unlink()
    caches()[0].write_bytes(b"no timings")
    cqil_trt.build(output=tmp_path / "engines" / "second", **shape, **options)
    assert [path.read_bytes() for path in caches()] == kept


REFUSED = [
    ({"target": "9.9"}, "--target 9.9: TensorRT-RTX builds for portable or a list of 7.5, "),
    ({"target": "8.6,"}, "--target : "),
    ({"target": "8.6", "collective": "plugin"}, "--collective plugin: .* takes no plugins: use nccl"),
    ({"target": "8.6", "collective": "mpi"}, "--collective must be one of plugin, nccl, found mpi"),
    (
        {"backend": "torch", "target": "8.6"},
        "--target: only backends tensorrt and tensorrt-llm take it, found backend torch",
    ),
    ({"backend": "torch", "collective": "nccl"}, "--collective: only backends tensorrt and tensorrt-llm take it"),
    ({"backend": "onnx", "timing_cache": "x"}, "--timing-cache: only backend tensorrt .* found backend onnx"),
    ({"backend": "torch", "save_network_json": True}, "--save-network-json: only backend tensorrt"),
    ({"backend": "torch", "verbose": True}, "--verbose: only backend tensorrt"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=["-".join(map(str, o.values())) for o, _ in REFUSED])
def test_what_cannot_be_built_is_refused(options, message, models, tmp_path):
    with pytest.raises(UserError, match=message):
        cqil_trt.build(model=models["llama"], output=tmp_path / "engine", **{"backend": "tensorrt", **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_failed_compilation_says_why_and_leaves_nothing(models, tmp_path):
    """Compute capability 7.5 has no bfloat16, which only TensorRT's compiler says."""
    arguments = ("--model", models["llama"], "--backend", "tensorrt", "--target", "7.5", "--dtype", "bfloat16")
    done = build(*arguments, "--max-seq-len", LENGTH, "--output", tmp_path / "engine")
    assert_user_error(done, "TensorRT could not build rank 0: ", "sm75")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("p", [1, 2])
def test_running_needs_a_gpu(p, models, tmp_path):
    cqil_trt.build(
        model=models["llama"],
        p=p,
        backend="tensorrt",
        target="8.6",
        max_seq_len=LENGTH,
        probes="never",
        output=tmp_path / "engine",
    )
    arguments = ("--engine", tmp_path / "engine", "--token-ids", write_json(tmp_path / "ids.json", [3, 4, 5]))
    done = mpirun(p, *arguments, "--device", "auto") if p > 1 else run(sys.executable, "runtime/run.py", *arguments)
    assert_user_error(done, "a TensorRT engine runs on a GPU, and there is none here")
    assert_user_error(mpirun(p, *arguments, "--device", "cpu"), "--device cpu: a TensorRT engine runs on a GPU")
