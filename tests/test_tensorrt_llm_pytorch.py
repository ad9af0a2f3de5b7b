"""The export to TensorRT-LLM's PyTorch backend, as far as it goes without it: the model that the directory takes along
runs on stand-ins for TensorRT-LLM's modules and computes what the reference does."""

import importlib
import json
import runpy
import sys
import types
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, SEED, write_json
from support.cases import ARCHITECTURES, identifier
from support.checkpoints import load_model, make_model
from support.processes import mpirun
from support.trtllm_pytorch import API, Executor, install

import cqil_trt
from cqil_trt import backends, reference
from cqil_trt.engine import Engine

BEFORE, AFTER = "attention in modules", "attention in a package"
# Model, shape, where TensorRT-LLM has its attention, and what joins the ranks. Two ranks share 9 query heads, three
# share 2 key/value heads, and four share 6 query heads.
CASES = [
    (("llama-gqa", {"p": 1}), BEFORE, {}),
    (("llama-linear-rope", {"p": 2, "start": 1, "end": 5}), BEFORE, {"collective": "trtllm"}),
    (("llama-odd-heads", {"p": 2, "d": 1, "start": 2, "end": 6, "drop_attention_join": (0,)}), AFTER, {}),
    (("qwen2", {"p": 2, "d": 1, "start": 2, "end": 6}), AFTER, {"kernels": True}),
    (("phi3", {"p": 2, "start": 0, "end": 6}), AFTER, {}),
    (("qwen3", {"p": 3, "d": 2, "start": 3, "end": 6}), BEFORE, {}),
    (("qwen3", {"p": 2, "start": 2, "end": 4}), AFTER, {}),
    (("llama-tied-bias", {"p": 4, "d": 1, "start": 1, "end": 5, "bypass": "residual"}), AFTER, {}),
    (("llama-llama3-rope", {"p": 4, "placement": "tensor", "drop_attention_join": (1, 4)}), BEFORE, {}),
]
NAMES = [identifier(case) for case, _, _ in CASES]
PROMPTS, STEPS = [[5, 9, 77, 3, 40, 100, 12, 8, 8, 71, 33], [64], [120, 2, 2, 19, 7]], 6


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {}
    for (name, _), _, _ in CASES:
        if name not in made:
            architecture, changes = ARCHITECTURES[name]
            made[name] = make_model(root / name, architecture, SEED, **{**changes, "vocab_size": 132})
    return made


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """The directory of every case."""
    root = tmp_path_factory.mktemp("exported")
    options = {"backend": "tensorrt-llm", "target": "pytorch", "probes": "never"}
    made = {}
    for (name, shape), _, how in CASES:
        engine, collective = root / identifier((name, shape)), how.get("collective")
        cqil_trt.build(model=models[name], output=engine, collective=collective, **options, **shape)
        made[engine.name] = engine
    return made


@pytest.fixture(scope="module")
def executed(exported, tmp_path_factory):
    """What the ranks of every case computed, by case and rank."""
    root, ranks = tmp_path_factory.mktemp("executed"), max(case[0][1]["p"] for case in CASES)
    cases = [
        {
            "engine": str(exported[name]),
            "version": version,
            "kernels": how.get("kernels", False),
            "prompts": PROMPTS,
            "steps": STEPS,
            "out": str(root / name),
        }
        for name, (_, version, how) in zip(NAMES, CASES)
    ]
    done = mpirun(ranks, write_json(root / "cases.json", cases), script="tests/support/trtllm_pytorch_worker.py")
    assert done.returncode == 0, done.stderr
    return {
        name: [np.load(root / f"{name}-{rank}.npz") for rank in range(shape["p"])]
        for name, ((_, shape), _, _) in zip(NAMES, CASES)
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), zip(NAMES, CASES), ids=NAMES)
def test_the_model_computes_what_the_reference_does(name, case, executed, exported, models):
    """Prompts in one batch, then decoding with the paged cache: every logit, in float32."""
    ranks, engine = executed[name], Engine.open(exported[name])
    network = reference.with_cqil(load_model(models[case[0][0]]), engine.cqil)
    for i, prompt in enumerate(PROMPTS):
        tokens = ranks[0]["tokens"][:-1, i].tolist()
        expected = reference.score(network, prompt + tokens).numpy()
        found = np.concatenate([ranks[0][f"prompt{i}"], ranks[0]["steps"][:, i]])
        assert np.abs(found - expected).max() < 1e-4 and np.abs(expected).max() > 1
    for rank in ranks[1:]:
        assert np.array_equal(rank["hidden"], ranks[0]["hidden"])  # bit for bit, or ranks drift apart
    # What joins the ranks, a pass: the kernels of cqil-trt are stood in for where the case says so.
    calls, passes = json.loads(str(ranks[0]["calls"])), 1 + STEPS
    joins = engine.plan(0).schedule.all_reduces if len(ranks) > 1 else 0
    assert calls.get("AllReduceParams.__init__", 0) == (0 if case[2].get("kernels") else passes * joins)
    missing = str(ranks[0]["warnings"][0])
    expected = len(ranks) > 1 and not case[2]
    assert ("cqil-trt's all-reduce is not used (" in missing) is expected, missing


def test_both_known_layouts_of_tensorrt_llm_are_covered():
    assert {version for _, version, _ in CASES} == API.keys()


@pytest.mark.slow
def test_a_rank_has_the_cache_of_its_own_heads(executed):
    """SmolLM2's ratio of heads, on two ranks: whole layers have 3 key/value heads, shares 2."""
    [name] = [name for name in NAMES if name.startswith("llama-odd-heads")]
    for rank in executed[name]:
        assert rank["heads"].tolist() == [2, 2, 3, 3]


# Phi-3's own checkpoints have other modules.
UNFUSED = [(name, case) for name, case in zip(NAMES, CASES) if case[0][0] != "phi3"]


@pytest.mark.parametrize(("name", "case"), UNFUSED, ids=[name for name, _ in UNFUSED])
def test_the_tensors_of_all_ranks_are_the_models(name, case, exported, models):
    """Bit for bit: a layer of a group is whole on its rank, and the shares of the others add up."""
    engine = Engine.open(exported[name])
    expected = load_model(models[case[0][0]]).state_dict()
    files = [load_file(engine.path / "checkpoint" / f"rank{rank}.safetensors") for rank in range(engine.world_size)]
    ranks = [
        {key.removeprefix(f"rank{rank}."): tensor for key, tensor in file.items()} for rank, file in enumerate(files)
    ]
    assert torch.equal(torch.cat([rank["lm_head.weight"] for rank in ranks]), expected["lm_head.weight"])
    for rank in ranks:
        for key in ("model.embed_tokens.weight", "model.norm.weight"):
            assert torch.equal(rank[key], expected[key])
    schedules = [engine.plan(rank).schedule.layers for rank in range(engine.world_size)]
    for place, steps in enumerate(zip(*schedules, strict=True)):
        whole = len({step.index for step in steps}) > 1 or engine.world_size == 1
        modules = {key.split(".", 3)[3] for key in ranks[0] if key.startswith(f"model.layers.{place}.")}
        for module in modules:
            pieces = [rank[f"model.layers.{place}.{module}"] for rank in ranks]
            wanted = [expected[f"model.layers.{step.index}.{module}"] for step in steps]
            if whole or "norm" in module:
                assert all(torch.equal(*pair) for pair in zip(pieces, wanted, strict=True))
            elif module in ("self_attn.o_proj.bias", "mlp.down_proj.bias"):  # which only one rank adds
                assert torch.equal(torch.stack(pieces).sum(0), wanted[0])
            elif module.startswith(("self_attn.k_proj", "self_attn.v_proj")):  # which two ranks may have
                rows = {row.numpy().tobytes() for piece in pieces for row in piece}
                assert rows == {row.numpy().tobytes() for row in wanted[0]}
            else:
                columns = module in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
                assert torch.equal(torch.cat(pieces, dim=int(columns)), wanted[0])


def test_the_directory_is_complete_without_this_package(models, tmp_path):
    """TensorRT-LLM's server finds the tokenizer, the ends of texts and the model; transformers reads config.json."""
    from support.made_tokenizers import save_byte_tokenizer
    from transformers import AutoConfig, AutoTokenizer

    source = make_model(tmp_path / "source", vocab_size=400)
    tokenizer = save_byte_tokenizer(source)
    engine = cqil_trt.build(model=source, output=tmp_path / "engine", backend="tensorrt-llm", target="pytorch", p=2)
    checkpoint = engine.path / "checkpoint"
    text = "Ça va? 12 tokens"
    assert AutoTokenizer.from_pretrained(checkpoint)(text).input_ids == tokenizer(text).input_ids
    assert json.loads((checkpoint / "generation_config.json").read_text()) == {"eos_token_id": [2]}
    config = AutoConfig.from_pretrained(checkpoint)
    assert config.architectures == ["CqilForCausalLM"] and config.cqil["p"] == 2 and config.head_dim == 8
    sources = ROOT / "cqil_trt" / "backends" / "tensorrt_llm" / "pytorch"
    for path in [*(sources / "modeling_cqil").glob("*.py"), sources / "serve.py"]:
        assert (engine.path / path.relative_to(sources)).read_text() == path.read_text()


REFUSED = [
    ({"p": 5}, "vocabulary of 131 is not a multiple of 5"),
    ({"p": 4, "placement": "leader"}, "same attention layers"),
    ({"p": 8, "placement": "tensor", "vocab_size": 136}, "6 query heads leave some of 8 ranks without any"),
    ({"p": 2, "vocab_size": 132, "collective": "nccl"}, "--collective must be one of plugin, trtllm"),
    ({"p": 2, "vocab_size": 132, "quantize": "int8"}, "--quantize int8: TensorRT-LLM rounds"),
]


LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.5] * 4, "long_factor": [4.0] * 4}
FOREIGN = [
    ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}}, "yarn rope"),
    ("Phi3ForCausalLM", {"rope_parameters": LONG, "original_max_position_embeddings": 64}, "longrope rope"),
    ("Gemma2ForCausalLM", {}, "Gemma2ForCausalLM has .*: not computed there"),
]


@pytest.mark.parametrize("target", ["engine", "pytorch"])
@pytest.mark.parametrize(("architecture", "changes", "message"), FOREIGN, ids=[case[2][:6] for case in FOREIGN])
def test_models_that_tensorrt_llms_modules_do_not_compute_are_refused(architecture, changes, message, target, tmp_path):
    model = make_model(tmp_path / "model", architecture, **{"vocab_size": 132, **changes})
    with pytest.raises(cqil_trt.UserError, match=message):
        options = {"backend": "tensorrt-llm", "target": target, "max_seq_len": 48}
        cqil_trt.build(model=model, output=tmp_path / "no", p=2, **options)


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_what_cannot_be_exported_is_refused(options, message, tmp_path):
    sizes = {"vocab_size": options.pop("vocab_size", 131), "num_hidden_layers": 10}
    model = make_model(tmp_path / "model", **sizes)
    with pytest.raises(cqil_trt.UserError, match=message):
        cqil_trt.build(model=model, output=tmp_path / "no", backend="tensorrt-llm", target="pytorch", **options)
    assert not (tmp_path / "no").exists()


def test_the_engine_target_names_the_one_that_can(models, tmp_path):
    for name, message in (("qwen3", "head norms"), ("llama-odd-heads", "9 query heads")):
        with pytest.raises(cqil_trt.UserError, match=f"{message}.*--target pytorch"):
            cqil_trt.build(model=models[name], output=tmp_path / "no", backend="tensorrt-llm", target="engine", p=2)


def test_an_engine_cannot_be_opened_here_and_the_error_says_what_serves_it(exported):
    engine = Engine.open(exported[NAMES[1]])
    with pytest.raises(cqil_trt.UserError, match=r"run by TensorRT-LLM .*serve.py .*--tp_size 2 .*--max_seq_len \d+$"):
        backends.load("tensorrt-llm").open_session(engine, None, "auto", 0, 1)


class Alone:
    """A communicator of one rank."""

    def Get_size(self):
        return 1


@pytest.fixture
def stand_ins():
    """TensorRT-LLM's modules in this process, as long as a test runs."""
    before = set(sys.modules)
    yield lambda version=AFTER: install(version, Alone())
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("tensorrt_llm", "modeling_cqil"):
            del sys.modules[name]


@contextmanager
def importable(directory):
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))


@pytest.mark.parametrize("change", [{"tp_size": 2, "world_size": 2}, {"pp_size": 2, "world_size": 2}])
def test_another_parallelism_than_the_checkpoints_is_refused(change, exported, stand_ins):
    from support.trtllm_pytorch import Mapping, ModelConfig
    from transformers import AutoConfig

    [engine] = [exported[name] for name in NAMES if name.endswith("p1")]
    found = stand_ins()
    with importable(engine):
        importlib.import_module("modeling_cqil")
    config = ModelConfig(AutoConfig.from_pretrained(engine / "checkpoint"), Mapping(**change))
    with pytest.raises(ValueError, match="for tensor_parallel_size 1, and for no other parallelism"):
        found.models["CqilForCausalLM"](config)


def test_adapters_at_run_time_are_refused(exported, stand_ins):
    [engine] = [exported[name] for name in NAMES if name.endswith("p1")]
    found = stand_ins()
    with importable(engine):
        importlib.import_module("modeling_cqil")
    model = Executor(engine / "checkpoint", found, 0, 1).model
    with pytest.raises(ValueError, match="adapters are merged"):
        model.model(attn_metadata=None, input_ids=torch.tensor([1]), lora_params={"rank": 8})


@pytest.mark.parametrize(("name", "serves"), [("__main__", [True]), ("__worker__", [])])
def test_serve_py_registers_the_model_where_workers_run_it_too(name, serves, exported, stand_ins):
    """mpi4py gives the main program to the processes of a pool, under the second name."""
    [engine] = [exported[name] for name in NAMES if name.endswith("p1")]
    found, called = stand_ins(), []
    sys.modules["tensorrt_llm.commands.serve"] = types.SimpleNamespace(main=lambda: called.append(True))
    sys.modules["tensorrt_llm.commands"] = types.ModuleType("tensorrt_llm.commands")
    before = list(sys.path)
    try:
        runpy.run_path(str(engine / "serve.py"), run_name=name)
    finally:
        sys.path[:] = before
    assert list(found.models) == ["CqilForCausalLM"] and called == serves


def test_a_release_that_keeps_its_modules_elsewhere_is_named(exported, stand_ins):
    [engine] = [exported[name] for name in NAMES if name.endswith("p1")]
    found = stand_ins()
    del sys.modules[found.contract.modules_of["Attention"]]
    with importable(engine), pytest.raises(ImportError, match="cqil-trt does not know it"):
        importlib.import_module("modeling_cqil")


def test_collector_reads_sources_of_the_pytorch_backend(tmp_path):
    """From a tree with both runtimes, like 1.2.1, or only this one; what moved is found at the newer place first."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import collect_trtllm_api as collector

    package = tmp_path / "tensorrt_llm"
    for places, symbols in collector.PYTORCH.items():
        lines = []
        for symbol in symbols:
            kind, _, method = symbol.partition(".")
            decorator = "@dataclass(kw_only=True)\n" if kind == "PositionalEmbeddingParams" else ""
            if decorator:
                lines.append(f"{decorator}class {kind}:\n    type: int\n    rope: object = None\n")
            elif method:
                static = "    @staticmethod\n" if method == "from_config" else ""
                own = "config" if static else "self, a, *, b=1, **c"
                lines.append(f"class {kind}:\n{static}    def {method}({own}): ...\n")
            else:
                lines.append(f"def {kind}(a, b=1): ...\n")
        path = package / places[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))
    (package / "version.py").write_text('__version__ = "9.9"\n')
    version, entry = collector.collect_pytorch(package)
    assert version == "9.9" and entry["modules"]["Attention"] == "tensorrt_llm._torch.modules.attention"
    assert entry["symbols"]["Attention.forward"] == {
        "positional": ["a"],
        "keyword": ["b"],
        "required": ["a"],
        "any_keyword": True,
    }
    assert entry["symbols"]["RopeParams.from_config"]["positional"] == ["config"]
    assert entry["symbols"]["PositionalEmbeddingParams.__init__"]["required"] == ["type"]
    newer = package / "_torch" / "attention" / "attention.py"
    newer.parent.mkdir()
    (package / "_torch" / "modules" / "attention.py").rename(newer)
    _, entry = collector.collect_pytorch(package)
    assert entry["modules"]["Attention"] == "tensorrt_llm._torch.attention.attention"
