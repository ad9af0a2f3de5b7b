"""The onnx backend: what the files hold, that checkers and parsers take them, and that they compute the reference."""

import json
import os
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file
from support import SEED, write_json
from support.cases import ARCHITECTURES, FAMILIES, identifier, ranks_of, relative
from support.checkpoints import load_model, make_model
from support.draws import assert_likeliest, assert_same_choices, assert_same_draws
from support.processes import build, mpirun, run

import cqil_trt
from cqil_trt.errors import UserError
from cqil_trt.reference import CqilModel
from cqil_trt.validate import THRESHOLDS

STEPS = 4
SHAPES = [
    {"p": 1},
    {"p": 2, "start": 1, "end": 5},
    {"p": 2, "d": 1, "start": 2, "end": 6, "placement": "leader"},
    {"p": 2, "d": 1, "start": 0, "end": 4, "bypass": "residual", "drop_attention_join": (5,)},
    {"p": 2, "placement": "tensor"},
    {"p": 4, "d": 1, "start": 1, "end": 5, "drop_attention_join": (0,)},
    {"p": 4, "start": 2, "end": 6, "placement": "leader"},
    {"p": 4, "placement": "tensor"},
    {"p": 2, "ranks_per_layer": 2, "d": 1, "start": 1, "end": 5},
]
CASES = [(name, SHAPES[(3 * i + j) % len(SHAPES)]) for i, name in enumerate(ARCHITECTURES) for j in (0, 4)]
CASES += [("llama-odd-heads", shape) for shape in SHAPES if ("llama-odd-heads", shape) not in CASES]
# Tied embeddings of which each rank predicts a part, and a rank with nothing to do.
CASES += [("llama-tied-bias", SHAPES[5]), ("qwen2", {"p": 2, "start": 3, "end": 3, "placement": "leader"})]
# Families with more than LLaMA has.
CASES += [("gemma2", SHAPES[1]), ("gemma3", SHAPES[2]), ("smollm3", SHAPES[4]), ("granite", SHAPES[1])]
CASES += [("olmo3", SHAPES[1]), ("olmo2", SHAPES[7]), ("phi3-longrope", SHAPES[2])]
CASES += [("gemma3", {**SHAPES[1], "dtype": "bfloat16"})]
CASES += [("qwen3", {**SHAPES[2], "dtype": dtype}) for dtype in ("float16", "bfloat16")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        name: make_model(root / name, architecture, seed=SEED + i, **changes)
        for i, (name, (architecture, changes)) in enumerate({**ARCHITECTURES, **FAMILIES}.items())
    }


@pytest.fixture(scope="module")
def engines(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("engines")
    # Up to 16 tokens longrope does not depend on the length.
    limits = {"max_seq_len": 16, "max_batch_size": 2, "prefill_chunk": 5, "probes": "never"}
    return [
        cqil_trt.build(model=models[name], output=root / str(i), backend="onnx", **limits, **shape)
        for i, (name, shape) in enumerate(CASES)
    ]


@pytest.fixture(scope="module")
def results(engines, tmp_path_factory):
    """One mpirun for each number of ranks runs the engines it fits."""
    root = tmp_path_factory.mktemp("results")
    random = np.random.default_rng(SEED)
    prompts = [[random.integers(3, 131, size=length).tolist() for length in (9, 2)] for _ in CASES]
    for ranks in {engine.world_size for engine in engines}:
        cases = [
            {
                "engine": str(engine.path),
                "device": "cpu",
                "prompts": prompts[i],
                "steps": STEPS,
                "out": str(root / str(i)),
            }
            for i, engine in enumerate(engines)
            if engine.world_size == ranks
        ]
        cases_file = write_json(root / f"cases{ranks}.json", cases)
        done = mpirun(ranks, cases_file, script="tests/support/mpi_worker.py", env={"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr, done.stderr
    return root, prompts


@pytest.mark.parametrize("number", range(len(CASES)), ids=[identifier(case) for case in CASES])
def test_every_rank_has_a_file_that_the_checker_takes(number, engines):
    engine = engines[number]
    for rank in range(engine.world_size):
        plan, path = engine.plan(rank), engine.rank_file(rank, "onnx")
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert {entry.domain: entry.version for entry in model.opset_import} == {"": 24, "cqil_trt": 1}
        nodes = Counter(node.op_type for node in model.graph.node if node.domain == "cqil_trt")
        expected = {
            "CqilAllReduce": plan.all_reduces,
            "CqilBroadcast": plan.schedule.broadcasts,
            "CqilBypass": len(engine.cqil.groups) if engine.cqil.d else 0,
        }
        assert nodes == Counter(expected), nodes
        assert sum(node.op_type.startswith("Cqil") for node in model.graph.node) == nodes.total()

        caches = {f"cache.{i}.{part}" for i, s in plan.layers.items() if s.num_heads for part in ("key", "value")}
        predicts, joins = plan.schedule.predicts, nodes.total() > 0
        inputs = {"tokens", "past"} | ({"select"} if predicts else set()) | ({"workspace"} if joins else set())
        inputs |= {"workspace.layer", "workspace.part"} if engine.cqil.ranks_per_layer > 1 else set()
        assert {value.name for value in model.graph.input} == inputs | caches
        outputs = {"logits" if predicts else "hidden"} | ({"joined"} if nodes["CqilAllReduce"] else set())
        assert {value.name for value in model.graph.output} == outputs | {f"{cache}.updated" for cache in caches}

        stored = load_file(engine.rank_file(rank))
        external = {t.name: t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        assert external.keys() == stored.keys()
        for name, tensor in external.items():
            found = onnx.numpy_helper.to_array(tensor, str(engine.path))
            assert found.dtype == stored[name].dtype and np.array_equal(found, stored[name]), name
        # All of them are read, and nothing but small constants is stored in the file.
        assert external.keys() <= {name for node in model.graph.node for name in node.input}
        assert path.stat().st_size < 200_000


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=[identifier(case) for case in CASES])
def test_it_computes_what_the_reference_does(number, models, engines, results):
    root, prompts = results
    name, shape = CASES[number]
    dtype = engines[number].limits.dtype
    allowed = THRESHOLDS[dtype].relative_l2
    ranks = [np.load(root / f"{number}-{rank}.npz") for rank in range(ranks_of(shape))]
    for other in ranks[1:]:  # bit for bit
        assert all(np.array_equal(ranks[0][key], other[key]) for key in ranks[0])
    found = ranks[0]
    assert (found["joined"].size > 0) == (engines[number].plan(0).schedule.all_reduces > 0)

    network = load_model(models[name])
    if shape.get("placement") != "tensor":
        choice = {key: value for key, value in shape.items() if key not in ("placement", "dtype")}
        network = CqilModel(network, **choice)

    def logits_of(tokens):
        with torch.inference_mode():
            return network(torch.tensor([tokens]), use_cache=False).logits[0].numpy()

    for i, prompt in enumerate(prompts[number]):
        tokens = found["tokens"][i].tolist()
        full = logits_of(prompt + tokens[:-1])
        assert relative(found[f"score{i}"], full[: len(prompt)]) < allowed
        assert relative(found["logits"][i], full[len(prompt) - 1 :]) < allowed
        if dtype == "float32":
            assert_likeliest(tokens, full[len(prompt) - 1 :])
            assert_same_choices(tokens, found[f"alone{i}"].tolist(), prompt, logits_of)
            drawn = (found[f"{name}{i}"].tolist() for name in ("sampled", "sampled_alone"))
            assert_same_draws(*drawn, prompt, logits_of)


@pytest.mark.slow
def test_commands_build_and_validate(models, tmp_path):
    limits = ("--max-seq-len", 16, "--p", 2, "--start", 1, "--end", 5, "--d", 1, "--backend", "onnx")
    done = build("--model", models["llama-tied-bias"], *limits, "--output", tmp_path / "engine")
    assert done.returncode == 0, done.stderr
    assert "backend onnx" in done.stdout
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert {"rank0.onnx", "rank1.onnx"} <= config["files"].keys()
    assert config["backend_version"] == f"onnx {onnx.__version__}" and config["architecture"] == "any"
    done = mpirun(2, "--engine", tmp_path / "engine", "--validate", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_engine_of_backend_torch_is_compiled(models, tmp_path):
    """Its weights come as a hard link, which ONNX does not open."""
    source = cqil_trt.build(model=models["llama-gqa"], p=1, output=tmp_path / "torch", max_seq_len=24)
    engine = cqil_trt.build(model=source.path, backend="onnx", output=tmp_path / "onnx")
    assert engine.rank_file(0).read_bytes() == source.rank_file(0).read_bytes()
    prompt = list(range(3, 12))
    found, expected = (cqil_trt.load(path).runner.score(prompt) for path in (engine.path, source.path))
    assert relative(found, expected) < 1e-5
    os.link(engine.rank_file(0), tmp_path / "second name")
    with pytest.raises(UserError, match="rank0.onnx: cannot be loaded .*hard links"):
        cqil_trt.load(engine.path)


# What validates, generates and serves compiled engines; the packages below are missing where only those run.
WITHOUT_TORCH = """
import sys
for missing in ("torch", "transformers", "peft", "safetensors", "accelerate"):
    sys.modules[missing] = None
import cqil_trt.backends.onnx.network, cqil_trt.backends.onnx.session
import cqil_trt.backends.tensorrt.compiler, cqil_trt.backends.tensorrt.network, cqil_trt.backends.tensorrt.nccl
import cqil_trt.backends.tensorrt.session
import cqil_trt.builder, cqil_trt.generate, cqil_trt.llm, cqil_trt.probes, cqil_trt.validate
import cqil_trt.commands.build, cqil_trt.commands.run
llm = cqil_trt.load(sys.argv[1], device="cpu")
assert len(llm.generate([[1, 2, 3]], max_new_tokens=4)[0].tokens) == 4
"""


def test_it_needs_no_torch(models, tmp_path):
    limits = {"max_seq_len": 24, "probes": "never"}
    engine = cqil_trt.build(model=models["qwen3"], p=1, output=tmp_path / "engine", backend="onnx", **limits)
    done = run(sys.executable, "-c", WITHOUT_TORCH, engine.path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llama-tied-bias", "llama-odd-heads", "qwen3"])
def test_tensorrt_parses_the_file_of_a_rank_alone(name, dtype, models, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    limits = {"max_seq_len": 24, "probes": "never", "dtype": dtype}
    engine = cqil_trt.build(model=models[name], p=1, output=tmp_path / "engine", backend="onnx", **limits)
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(engine.rank_file(0, "onnx")))
    assert parsed, [str(parser.get_error(i)) for i in range(parser.num_errors)]
    kinds = Counter(network.get_layer(i).type for i in range(network.num_layers))
    layers = engine.model.num_layers
    assert kinds[trt.LayerType.KV_CACHE_UPDATE] == 2 * layers and kinds[trt.LayerType.ROTARY_EMBEDDING] == 2 * layers
