"""The export to TensorRT-LLM, as far as it goes without it: the checkpoint is Hugging Face's tensors, bit for bit."""

import json
import os
import sys
import types
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, SEED
from support.cases import relative
from support.checkpoints import load_model, make_adapter, make_model
from support.processes import assert_user_error, build, environment, mpirun, run
from support.trtllm_contract import API, Contract, Value, load_model_file

import cqil_trt
from cqil_trt import reference
from cqil_trt.backends.tensorrt_llm import COLLECTIVES
from cqil_trt.backends.tensorrt_llm.engine import MODEL_FILE, build_command
from cqil_trt.backends.tensorrt_llm.versions import check, default_target, installed
from cqil_trt.config import CqilConfig, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.weights.quantized.rounding import to_int4

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 132, "num_hidden_layers": 9}
MODELS = {
    "llama": ("LlamaForCausalLM", {}),
    "biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 8}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2ForCausalLM", {}),
}
SHAPES = [
    {"p": 2, "start": 2, "end": 8},
    {"p": 4, "start": 1, "end": 9, "d": 1},
    {"p": 2, "placement": "tensor", "drop_attention_join": (1, 8)},
    {"p": 1},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        name: make_model(root / name, architecture, SEED + i, **{**SIZES, **changes})
        for i, (name, (architecture, changes)) in enumerate(MODELS.items())
    }


def put_together(checkpoint, config, layers):
    """Hugging Face's tensors from those of all ranks. `layers`: for each place the layers that ranks have there."""
    p, dim = config["mapping"]["world_size"], config["head_size"]
    ranks = [load_file(checkpoint / f"rank{rank}.safetensors") for rank in range(p)]
    names = {name for rank in ranks for name in rank}
    found = {
        "model.embed_tokens.weight": ranks[0].pop("transformer.vocab_embedding.weight"),
        "model.norm.weight": ranks[0].pop("transformer.ln_f.weight"),
        "lm_head.weight": torch.cat([rank.pop("lm_head.weight") for rank in ranks]),
    }
    for place, own in enumerate(layers):
        whole = config["cqil"]["grouped"][place]
        for index in sorted(set(own)):
            # A layer that one rank has whole, or the parts of all.
            parts = [ranks[own.index(index)]] if whole else ranks

            def take(name, parts=parts, place=place):
                return [rank[f"transformer.layers.{place}.{name}"] for rank in parts]

            prefix = f"model.layers.{index}"
            found[f"{prefix}.input_layernorm.weight"] = take("input_layernorm.weight")[0]
            found[f"{prefix}.post_attention_layernorm.weight"] = take("post_layernorm.weight")[0]
            for kind in ("weight", "bias"):
                if f"transformer.layers.{place}.attention.qkv.{kind}" in names:
                    heads = config["num_attention_heads"] // len(parts) * dim
                    each = [t.split([heads, *[(len(t) - heads) // 2] * 2]) for t in take(f"attention.qkv.{kind}")]
                    for name, pieces in zip("qkv", zip(*each)):
                        joined = torch.cat(pieces)
                        if name != "q":  # a key/value head that several ranks read is on each of them
                            rows = config["num_key_value_heads"] * dim
                            joined = torch.cat(pieces[:: len(joined) // rows])
                        found[f"{prefix}.self_attn.{name}_proj.{kind}"] = joined
                for theirs, ours in (("gate_proj", "fc"), ("up_proj", "gate")):
                    if f"transformer.layers.{place}.mlp.{ours}.{kind}" in names:
                        found[f"{prefix}.mlp.{theirs}.{kind}"] = torch.cat(take(f"mlp.{ours}.{kind}"))
            for theirs, ours in (("self_attn.o_proj", "attention.dense"), ("mlp.down_proj", "mlp.proj")):
                found[f"{prefix}.{theirs}.weight"] = torch.cat(take(f"{ours}.weight"), dim=1)
                if f"transformer.layers.{place}.{ours}.bias" in names:
                    biases = torch.stack(take(f"{ours}.bias"))
                    assert (biases != 0).any(1).sum() == 1  # every rank adds its own
                    found[f"{prefix}.{theirs}.bias"] = biases.sum(0)
    return found


def places(shape, depth):
    p = shape["p"]
    if p == 1 or shape.get("placement") == "tensor":
        return [[i] * p for i in range(depth)]
    groups = [list(range(first, first + p)) for first in range(shape["start"], shape["end"], p)]
    ordinary = [[i] * p for i in range(depth) if not shape["start"] <= i < shape["end"]]
    return sorted(groups + ordinary)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(f"{k}{v}" for k, v in shape.items()))
@pytest.mark.parametrize("name", MODELS)
def test_the_checkpoint_put_back_together_is_the_model(name, shape, models, tmp_path):
    engine = tmp_path / "engine"
    cqil_trt.build(model=models[name], backend="tensorrt-llm", output=engine, probes="never", **shape)
    config = json.loads((engine / "checkpoint" / "config.json").read_text())
    layers = places(shape, SIZES["num_hidden_layers"])
    assert config["num_hidden_layers"] == len(layers) == len(config["num_kv_heads_per_layer"])
    dropped, grouped = shape.get("drop_attention_join", ()), config["cqil"]["grouped"]
    assert config["cqil"]["one_join"] == [whole or own[0] in dropped for whole, own in zip(grouped, layers)]
    found = put_together(engine / "checkpoint", config, layers)
    expected = load_model(models[name]).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    # What the runtime computes from the list is what the matrices have.
    for rank in range(shape["p"]):
        tensors = load_file(engine / "checkpoint" / f"rank{rank}.safetensors")
        for place, heads in enumerate(config["num_kv_heads_per_layer"]):
            mine = config["num_attention_heads"] // (1 if config["cqil"]["grouped"][place] else shape["p"])
            rows = (mine + 2 * -(-heads // shape["p"])) * config["head_size"]
            assert tensors[f"transformer.layers.{place}.attention.qkv.weight"].shape == (rows, config["hidden_size"])


def test_an_adapter_is_merged_first(models, tmp_path):
    from peft import PeftModel

    adapter = make_adapter(models["llama"], tmp_path / "adapter")
    engine = tmp_path / "engine"
    shape = {"p": 2, "start": 2, "end": 8}
    cqil_trt.build(model=models["llama"], lora=adapter, backend="tensorrt-llm", output=engine, probes="never", **shape)
    config = json.loads((engine / "checkpoint" / "config.json").read_text())
    found = put_together(engine / "checkpoint", config, places(shape, SIZES["num_hidden_layers"]))
    merged = PeftModel.from_pretrained(load_model(models["llama"]), adapter).merge_and_unload().state_dict()
    for key, expected in merged.items():
        torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-6)
    plain = load_model(models["llama"]).state_dict()
    assert any(not torch.equal(found[key], plain[key]) for key in plain)


WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "num_attention_heads": 8, "num_hidden_layers": 6}


def unpacked(tensors, name, group):
    """The matrix that TensorRT-LLM's kernels multiply with, from ModelOpt's layout of 4-bit codes."""
    packed = tensors[f"{name}.weight"]
    assert packed.dtype == torch.int8
    # Two rows in a byte, signed: the even one is the lower half.
    codes = torch.stack([packed << 4 >> 4, packed >> 4], 1).flatten(0, 1).float()
    scales, zeros = (tensors[f"{name}.{part}"].float() for part in ("weights_scaling_factor", "zero"))
    return codes * scales.repeat_interleave(group, 1) + zeros.T.repeat_interleave(group, 1)


@pytest.mark.parametrize(("dtype", "quantize", "shape"), [
    ("float16", "int4g64", {"p": 2, "start": 2, "end": 4}),
    ("bfloat16", "int4", {"p": 2, "start": 1, "end": 5, "keep": "layers.0"}),
    ("float16", "int4g64", {"p": 4, "placement": "tensor"}),
])  # fmt: skip
def test_4_bit_weights_are_stored_as_tensorrt_llms_layers_take_them(dtype, quantize, shape, tmp_path):
    model = make_model(tmp_path / "model", **{**SIZES, **WIDE})
    options = {"backend": "tensorrt-llm", "dtype": dtype, "quantize": quantize, "probes": "never"}
    engine = cqil_trt.build(model=model, output=tmp_path / "engine", **options, **shape)
    config = json.loads((engine.path / "checkpoint" / "config.json").read_text())
    quantization, group = config["quantization"], 64 if quantize == "int4g64" else 128
    assert quantization["quant_algo"] == "W4A16_AWQ" and quantization["group_size"] == group
    assert quantization["has_zero_point"] is True and quantization["pre_quant_scale"] is False
    excluded = [name for name in quantization["exclude_modules"] if "layers" in name]
    assert excluded == (["transformer.layers.0.*"] if "keep" in shape else [])
    expected = load_model(model).state_dict()
    for rank in range(engine.world_size):
        tensors, plan = load_file(engine.path / "checkpoint" / f"rank{rank}.safetensors"), engine.plan(rank)
        for place, step in enumerate(plan.schedule.layers):
            shard, dim = plan.layers[step.index], config["head_size"]
            q, kv = (slice(heads[0] * dim, heads[1] * dim) for heads in (shard.heads, shard.kv_heads))
            neurons = slice(*shard.neurons)

            def theirs(module, rows=slice(None), columns=slice(None), index=step.index):
                return expected[f"model.layers.{index}.{module}_proj.weight"][rows, columns]

            whole = {
                "attention.qkv": torch.cat([theirs(f"self_attn.{part}", r) for part, r in zip("qkv", (q, kv, kv))]),
                "attention.dense": theirs("self_attn.o", columns=q),
                "mlp.fc": theirs("mlp.gate", neurons),
                "mlp.gate": theirs("mlp.up", neurons),
                "mlp.proj": theirs("mlp.down", columns=neurons),
            }
            for module, weight in whole.items():
                name = f"transformer.layers.{place}.{module}"
                if "keep" in shape and step.index == 0:
                    assert tensors[f"{name}.weight"].dtype == torch.bfloat16
                    continue
                found = unpacked(tensors, name, group)
                # 4 bits hold a normal distribution to about a tenth; any other order of codes is off by more than 1.
                assert relative(found.numpy(), weight.numpy()) < 0.15
                rounded = to_int4(weight, getattr(torch, dtype), group).dequantize()
                assert relative(found.numpy(), rounded.numpy()) < (2e-3 if dtype == "float16" else 2e-2)


QUANTIZED = [
    ({"quantize": "int8"}, "int8: TensorRT-LLM rounds 8-bit integers itself"),
    ({"quantize": "fp8"}, "fp8: TensorRT-LLM's FP8 layers round activations too"),
    ({"quantize": "int4g32"}, "groups of 64 or 128"),
    ({"quantize": "int4", "dtype": "float32"}, "float16 or bfloat16"),
    ({"quantize": "int4", "attention_bias": True}, "drops biases"),
    ({"quantize": "int4", "intermediate_size": 640}, "fill up 640 MLP neurons to a multiple of 256"),
    ({"quantize": "int4", "keep": "layers.2"}, "--keep whole groups"),
    ({"kv_dtype": "fp8"}, "--kv-dtype fp8: TensorRT-LLM's executor owns the KV cache"),
    ({"quantize": "int4", "target": "pytorch"}, "--target pytorch has dense weights only"),
]


@pytest.mark.parametrize(("changes", "message"), QUANTIZED, ids=[message[:24] for _, message in QUANTIZED])
def test_formats_that_its_layers_do_not_take_are_refused_with_the_reason(changes, message, tmp_path):
    sizes = {key: changes.pop(key) for key in ("attention_bias", "intermediate_size") if key in changes}
    model = make_model(tmp_path / "model", **{**SIZES, **WIDE, **sizes})
    options = {"dtype": "float16", "p": 2, "start": 2, "end": 4, **changes}
    with pytest.raises(UserError, match=message):
        cqil_trt.build(model=model, output=tmp_path / "no", backend="tensorrt-llm", **options)


@pytest.mark.slow
def test_what_cannot_be_exported_is_refused(models, tmp_path):
    def refused(*flags, **options):
        arguments = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
        return build(
            "--model", models["llama"], "--backend", "tensorrt-llm", "--output", tmp_path / "no", *flags, *arguments
        )

    assert_user_error(refused(placement="leader"), "same attention layers")
    assert_user_error(refused(p=3, start=3, end=9), "8 query heads", "3 ranks")
    assert_user_error(refused(p=2, d=1, collective="trtllm"), "bypass")
    assert_user_error(refused(collective="nccl"), "plugin, trtllm")
    assert_user_error(refused(target="8.6"), "engine, pytorch", "8.6")
    assert_user_error(refused(target="pytorch", placement="leader"), "same attention layers")
    assert_user_error(refused("--verbose"), "--verbose")
    assert not (tmp_path / "no").exists()


VERSIONS = [("0.20.0", "engine"), ("1.1.0rc2", "engine"), ("1.2.1", "engine"), ("1.2.1", "pytorch"), ("1.4", "pytorch")]


@pytest.mark.parametrize(("version", "target"), VERSIONS)
def test_versions_that_have_the_targets_runtime_are_taken(version, target):
    check(version, target)


WRONG_VERSIONS = [
    ("0.19.0", "engine", "too old"),
    ("1.3.0rc1", "engine", "removed .* --target pytorch"),
    ("2.0", "engine", "removed"),
    ("1.1.0", "pytorch", "too old for --target pytorch"),
]


@pytest.mark.parametrize(("version", "target", "reason"), WRONG_VERSIONS)
def test_other_versions_are_refused_with_the_reason(version, target, reason):
    with pytest.raises(UserError, match=reason):
        check(version, target)


def test_the_default_target_is_an_engine_wherever_one_can_be_built():
    found = [default_target(version) for version in (None, "0.21.0", "1.2.1", "1.3.0", "2.0")]
    assert found == ["engine", "engine", "engine", "pytorch", "pytorch"]


@pytest.mark.parametrize("collective", ["plugin", "trtllm"])
@pytest.mark.parametrize("name", MODELS)
def test_tensorrt_llms_own_code_emits_the_network(name, collective, models, tmp_path):
    """Its Python, our model class, TensorRT-RTX as `tensorrt`; plugins alone are stood in for."""
    sources, package = os.environ.get("TRTLLM_SOURCE"), os.environ.get("TRTLLM_TENSORRT")
    if not sources or not package:
        pytest.skip("TRTLLM_SOURCE and TRTLLM_TENSORRT are not set (docs/tensorrt-llm.md)")
    engine, shape = tmp_path / "engine", {"p": 2, "start": 2, "end": 8, "drop_attention_join": (1,)}
    options = {"collective": collective, "dtype": "float16", "probes": "never"}
    cqil_trt.build(model=models[name], backend="tensorrt-llm", output=engine, **options, **shape)
    config = json.loads((engine / "checkpoint" / "config.json").read_text())
    for rank in range(2):
        checkpoint = engine / "checkpoint"
        done = run(
            sys.executable,
            *("tests/support/tensorrt_llm_emission.py", sources, checkpoint, rank),
            env={"PYTHONPATH": f"{package}:{environment()['PYTHONPATH']}"},
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        stored = {name: list(t.shape) for name, t in load_file(checkpoint / f"rank{rank}.safetensors").items()}
        constants = found["parameters"].keys() - stored.keys()  # rotary tables, which its code makes
        assert stored.items() <= found["parameters"].items() and all(
            "embed_pos" in n or "rotary" in n for n in constants
        )
        assert found["outputs"] == {"logits": [-1, config["vocab_size"]]} and found["built_bytes"] > 0

        by_name = {}
        for plugin in found["plugins"]:
            by_name.setdefault(plugin["plugin"], []).append({k: v[0] for k, v in plugin["fields"].items()})
        grouped = config["cqil"]["grouped"]
        joins = by_name.pop("CqilAllReduce" if collective == "plugin" else "AllReduce")
        assert len(joins) == sum(1 if once else 2 for once in config["cqil"]["one_join"])
        for place, (fields, whole) in enumerate(zip(by_name.pop("GPTAttention"), grouped, strict=True)):
            ranks = 1 if whole else 2
            assert fields["layer_idx"] == place and fields["tp_size"] == ranks
            assert fields["num_heads"] == config["num_attention_heads"] // ranks
            assert fields["num_kv_heads"] == config["num_key_value_heads"] // ranks
        assert by_name.keys() == {"AllGather"}  # of the logits


def test_collector_reads_a_documentation_page_as_the_source_it_shows(tmp_path):
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    sys.path.insert(0, str(ROOT / "scripts"))
    import collect_trtllm_api as collector

    # As Sphinx makes them: a link in front of each definition.
    source = (ROOT / "cqil_trt" / "reference.py").read_text()
    page = highlight(source, PythonLexer(), HtmlFormatter())
    page = page.replace(
        '<span class="k">def</span>', '<a class="viewcode-back" href="x">[docs]</a><span class="k">def</span>'
    )
    assert (
        "[docs]" in page
        and collector.source_of_page(f"<h1>Source &amp; more</h1>{page}</html>").strip() == source.strip()
    )


def needs_tensorrt_llm(target):
    """Skips unless this host can run the target."""
    if find_spec("tensorrt_llm") is None or torch.cuda.device_count() < 2:
        pytest.skip("needs tensorrt_llm and two GPUs")
    try:
        check(installed(), target)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_whole_path_with_tensorrt_llm(collective, tmp_path):
    """build.py builds the engines, run.py validates and measures them, and TensorRT-LLM's own runner gives the same."""
    needs_tensorrt_llm("engine")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4}
    model = make_model(tmp_path / "model", **{**SIZES, **sizes, "save_dtype": torch.float16})
    made, shape = tmp_path / "engine", ["--p", 2, "--start", 2, "--end", 8]
    options = ["--backend", "tensorrt-llm", "--target", "engine", "--dtype", "float16", "--max-seq-len", 96]
    options += ["--collective", collective]
    done = build("--model", model, *shape, *options, "--output", made)
    assert done.returncode == 0, done.stderr
    report, prompt = tmp_path / "report.json", tmp_path / "prompt.json"
    prompt.write_text("[5, 9, 77]")
    for flags in (["--validate", "--benchmark"], ["--token-ids", prompt, "--max-new-tokens", 8]):
        done = mpirun(2, "--engine", made, "--device", "cuda", *flags, "--json", report)
        assert done.returncode == 0, done.stdout + done.stderr
    ours = json.loads(report.read_text())["completions"][0]["tokens"]
    if collective == "trtllm":  # whose engines need nothing of ours
        done = mpirun(2, made / "trtllm", prompt, 8, script="tests/support/tensorrt_llm_runner.py")
        assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1]) == ours, done.stderr


@pytest.mark.parametrize(("collective", "d"), [("trtllm", 0), ("plugin", 0), ("trtllm", 1), ("plugin", 1)])
def test_whole_path_with_the_pytorch_backend(collective, d, tmp_path):
    """TensorRT-LLM's LLM class loads what build.py wrote, and computes what the reference does."""
    needs_tensorrt_llm("pytorch")
    # As SmolLM2's, query heads cannot be shared out evenly.
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "head_dim": 64, "num_attention_heads": 9}
    sizes |= {"num_key_value_heads": 3, "save_dtype": torch.float16}
    model = make_model(tmp_path / "model", **{**SIZES, **sizes})
    made, cqil = tmp_path / "engine", CqilConfig(p=2, d=d, start=2, end=8)
    options = {"backend": "tensorrt-llm", "target": "pytorch", "dtype": "float16", "collective": collective}
    cqil_trt.build(model=model, output=made, max_seq_len=96, p=2, d=d, start=2, end=8, **options)
    prompt, found = [5, 9, 77, 100, 3, 8], tmp_path / "found.json"
    (tmp_path / "prompt.json").write_text(json.dumps(prompt))
    script = "tests/support/trtllm_pytorch_llm.py"
    done = run(sys.executable, script, made, tmp_path / "prompt.json", 8, 2, found, env={})
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(found.read_text())
    network = reference.with_cqil(load_model(model), cqil)
    logits = reference.score(network, prompt + result["tokens"])
    assert relative(np.array(result["logits"]), logits[: len(prompt)].numpy()) < 1e-2
    for token, row in zip(result["tokens"], logits[len(prompt) - 1 :]):
        assert row.max() - row[token] < 0.02 * row.abs().max()  # the largest, or as good as


class Runner:
    """What the session asks of ModelRunnerCpp, computed by the Hugging Face model."""

    def __init__(self, network, longest):
        self.network, self.longest, self.calls = network, longest, []

    def generate(self, batch_input_ids, *, max_new_tokens, end_id, pad_id, return_dict, **options):
        given = dict(max_new_tokens=max_new_tokens, end_id=end_id, pad_id=pad_id, return_dict=return_dict, **options)
        for version in API:
            Contract(version).bind("ModelRunnerCpp.generate", batch_input_ids, **given)
        rows = [ids.tolist() for ids in batch_input_ids]
        assert max(map(len, rows)) + max_new_tokens <= self.longest  # or it raises RuntimeError
        self.calls.append((len(rows), max_new_tokens))
        logits = [self.network(torch.tensor([ids])).logits[0] for ids in rows]
        words = options.get("stop_words_list", [[]] * len(rows))
        for ids, stops in zip(rows, words):
            for _ in range(max_new_tokens):
                ids.append(int(self.network(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == end_id or [ids[-1]] in stops:
                    break
        padded = [[ids + [end_id] * (self.longest - len(ids))] for ids in rows]
        sizes = torch.tensor([[len(ids)] for ids in rows])
        return {"output_ids": torch.tensor(padded), "sequence_lengths": sizes, "context_logits": logits}


def test_the_session_asks_the_runner_for_what_generation_and_validation_need(models, tmp_path, monkeypatch):
    from cqil_trt.gpu import cuda
    from cqil_trt.validate import answer

    engine = tmp_path / "engine"
    network = load_model(models["llama"])
    cqil_trt.build(model=models["llama"], backend="tensorrt-llm", output=engine, probes="never", p=1, max_seq_len=48)
    (engine / "trtllm").mkdir()
    (engine / "trtllm" / "config.json").write_text("{}")
    loaded = {}

    def from_dir(directory, **options):
        for version in API:
            Contract(version).bind("ModelRunnerCpp.from_dir", directory, **options)
        loaded.update(options, directory=directory)
        loaded["runner"] = Runner(network, 48)
        return loaded["runner"]

    runtime = types.SimpleNamespace(ModelRunnerCpp=types.SimpleNamespace(from_dir=from_dir))
    monkeypatch.setitem(sys.modules, "tensorrt_llm", types.ModuleType("tensorrt_llm"))
    monkeypatch.setitem(sys.modules, "tensorrt_llm.runtime", runtime)
    monkeypatch.setattr(cuda, "use_device", lambda number: None)
    monkeypatch.setattr("cqil_trt.backends.tensorrt_llm.versions.installed", lambda: "1.2.1")
    llm = cqil_trt.load(engine, device="cuda")
    assert loaded["directory"] == str(engine / "trtllm")

    prompts = [[5, 9, 77], [100], [8] * 20]
    with torch.inference_mode():
        network.get_output_embeddings().weight[0] *= 3  # token 0, which is no end, comes up
        free = llm.generate(prompts, 12, ignore_eos=True)
        for prompt, completion in zip(prompts, free):
            expected = network.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
            assert completion.tokens == expected[0, len(prompt) :].tolist()
            logits, tokens = answer(llm.runner, prompt, 5)
            torch.testing.assert_close(torch.tensor(logits), network(torch.tensor([prompt])).logits[0])
            assert tokens == completion.tokens[:5]
        # Sequences that end early, by either of two ends, among others that do not.
        ends = free[0].tokens[2], free[1].tokens[5]
        object.__setattr__(llm.engine.model, "eos_token_ids", ends)
        for before, completion in zip(free, llm.generate(prompts, 12)):
            cut = min([before.tokens.index(end) + 1 for end in ends if end in before.tokens], default=12)
            assert completion.tokens == before.tokens[:cut]
        # One that is full ends, and the other one goes on.
        loaded["runner"].calls.clear()
        full, other = llm.generate([[8] * 45, [5, 9, 77]], 12, ignore_eos=True)
        assert len(full.tokens) == 3 and full.finish_reason == "length" and other.tokens == free[0].tokens
        assert loaded["runner"].calls == [(1, 3), (1, 12)]
        # A measured step is a share of a completion's time, less that of one token.
        loaded["runner"].calls.clear()
        assert llm.session.load([5, 9, 77]) == free[0].tokens[0]
        loaded["runner"].calls.clear()
        assert len(llm.session.time_decode((0,), 6)) == 6 and loaded["runner"].calls == [(1, 1), (1, 7)]
        llm.session.load([8] * 45)
        loaded["runner"].calls.clear()
        assert len(llm.session.time_decode((0,), 6)) == 6 and loaded["runner"].calls == [(1, 1), (1, 3)]
    with pytest.raises(UserError, match="takes 47"):
        llm.generate([[5] * 48], 1)


@pytest.mark.parametrize("collective", ["plugin", "trtllm"])
@pytest.mark.parametrize("version", API)
def test_what_the_model_calls_is_what_each_version_takes(version, collective, models, tmp_path, monkeypatch):
    engine, shape = tmp_path / "engine", {"p": 2, "start": 2, "end": 8, "d": 1 if collective == "plugin" else 0}
    shape["drop_attention_join"] = (0,)
    options = {"collective": collective, "probes": "never"}
    cqil_trt.build(model=models["biases"], backend="tensorrt-llm", output=engine, **options, **shape)
    values = json.loads((engine / "checkpoint" / "config.json").read_text())
    contract = Contract(version)
    contract.bind("LLaMAConfig.__init__", **values)
    mapping = types.SimpleNamespace(**values["mapping"], cp_size=1, tp_group=[0, 1], tp_rank=0)
    config = types.SimpleNamespace(**{**values, "mapping": mapping}, quant_mode=None)
    model = load_model_file(MODEL_FILE, contract, monkeypatch).CqilForCausalLM(config)
    model.transformer.forward(Value(), position_ids=Value(), use_cache=True)
    required = contract.symbols["GenerationMixin.prepare_attention_inputs"]["required"]
    given = model.prepare_attention_inputs(**dict.fromkeys(required))
    assert given["num_kv_heads_per_layer"] == values["num_kv_heads_per_layer"]
    assert {"Attention.__init__", "Attention.forward", "GatedMLP.forward", "Linear.__init__"} <= contract.called.keys()
    # Of three split layers, two join twice; the three groups have a bypass each.
    joins = 2 + 2 + 1 + 3
    expected = {"trtllm": (joins, 0), "plugin": (0, joins + 3)}[collective]
    assert (contract.called["allreduce"], contract.called["default_trtnet"]) == expected

    flags = {flag for flag in build_command(tmp_path, tmp_path, EngineLimits(dtype="float16")) if flag.startswith("--")}
    assert flags <= set(contract.symbols["trtllm-build"]["flags"])
