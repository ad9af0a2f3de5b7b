"""The merge against PEFT's own (load the adapter again, merge_and_unload), and adapters that must be refused."""

import copy
import json
import random
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import SEED, write_json
from support.checkpoints import load_model, make_adapter, make_model, rank_weights
from support.processes import build, mpirun

from cqil_trt import peft_config
from cqil_trt.checkpoint import Checkpoint
from cqil_trt.config import CqilConfig
from cqil_trt.errors import UserError
from cqil_trt.families.layout import checkpoint_shapes
from cqil_trt.lora import LoraReader
from cqil_trt.reference import from_reader, load_hugging_face
from cqil_trt.shard import plan
from cqil_trt.weights import open_checkpoint

FULL_NAMES = [f"model.layers.{i}.{m}" for i in (0, 3) for m in ("self_attn.q_proj", "mlp.down_proj")]
BOTH = ["embed_tokens", "lm_head"]
PATTERNS = {
    "rank_pattern": {"q_proj": 7, r"model\.layers\.[12]\.mlp\.up_proj": 2},
    "alpha_pattern": {"down_proj": 11, "layers.3.self_attn.v_proj": 3},
}
SAVED = {"save": {"save_embedding_layers": True}}
# What LoraConfig takes and, besides: `tied` and `bias` of the model, `vocabulary` and `save` of the adapter.
VARIANTS = {
    "plain": {},
    "rank one": {"r": 1},
    "rslora": {"use_rslora": True},
    "rank and alpha patterns": PATTERNS,
    "full names": {"target_modules": FULL_NAMES},
    "one pattern": {"target_modules": r".*layers\.[024].*_proj"},
    "all linear": {"target_modules": "all-linear"},
    "all linear, tied": {"target_modules": "all-linear", "tied": True},
    "excluded": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["model.layers.1.mlp.up_proj"]},
    "excluded by a pattern": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.[02]\.mlp.*"},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 4]},
    "one layer, by pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": 2,
        "layers_pattern": ["h", "layers"],
    },
    "a full name and some layers": {
        "target_modules": ["model.layers.0.mlp.up_proj", "q_proj"],
        "layers_to_transform": [3],
    },
    "fan in fan out": {"fan_in_fan_out": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "MiCA": {"init_lora_weights": "mica"},
    "VeLoRA": {"velora_config": {"num_groups": 4}},
    "norms saved": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "every norm saved": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "an MLP saved": {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["layers.1.mlp"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "embedding by a pattern": {"target_modules": r".*(embed_tokens|lm_head|q_proj)"},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding and head": {"modules_to_save": BOTH},
    "saved embedding and head, twice": {"modules_to_save": BOTH, **SAVED},
    "saved embedding, and the rest": {"modules_to_save": ["embed_tokens"], **SAVED},
    "unchanged embeddings": SAVED,
    "biases of adapted layers": {"bias": "lora_only"},
    "all biases": {"bias": "all", "target_modules": ["up_proj", "q_proj"]},
    "all biases, a layer saved": {
        "bias": "all",
        "target_modules": ["up_proj"],
        "modules_to_save": ["1.self_attn.q_proj"],
    },
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "k_proj"], "qkv_bias": True, "use_rslora": True},
    "lora_bias and biases": {"lora_bias": True, "target_modules": ["v_proj"], "bias": "lora_only"},
    "DoRA": {"use_dora": True},
    "DoRA, rslora and patterns": {"use_dora": True, "use_rslora": True, **PATTERNS},
    "DoRA on everything": {"use_dora": True, "target_modules": ["q_proj", "down_proj", *BOTH]},
    "DoRA on everything, tied": {"use_dora": True, "target_modules": ["q_proj", "o_proj", *BOTH], "tied": True},
    "tokens": {"trainable_token_indices": [3, 130, 7]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [3, 130], "lm_head": [5]}},
    "tokens, tied": {"trainable_token_indices": [3, 130, 7], "tied": True},
    "tokens of both, tied": {"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [3, 9]}, "tied": True},
    "other tokens of both, tied": {"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [3]}, "tied": True},
    "tokens of the head, tied": {"trainable_token_indices": {"lm_head": [5]}, "tied": True},
    "tokens, and the rest": {"trainable_token_indices": [4], "tied": True, **SAVED},
    "tied": {"tied": True},
    "saved embedding and head, tied": {"modules_to_save": BOTH, "tied": True},
    "saved embedding, tied": {"modules_to_save": ["embed_tokens"], "tied": True},
    "saved embedding, and the rest, tied": {"modules_to_save": ["embed_tokens"], "tied": True, **SAVED},
    "saved head, tied": {"modules_to_save": ["lm_head"], "tied": True},
    "saved as one, tied": {"modules_to_save": BOTH, "ensure_weight_tying": True, "tied": True},
    "saved as one by the head, tied": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True, "tied": True},
    "saved as one of two": {"modules_to_save": BOTH, "ensure_weight_tying": True},
    "unchanged embeddings, tied": {"tied": True, **SAVED},
    "embedding, tied": {"target_modules": ["embed_tokens", "v_proj"], "tied": True},
    "head, tied": {"target_modules": ["lm_head", "v_proj"], "tied": True},
    "embedding and head, tied": {"target_modules": ["v_proj", *BOTH], "tied": True},
    "adapted as one, tied": {"target_modules": ["lm_head", "v_proj"], "ensure_weight_tying": True, "tied": True},
    "adapted as one with another rank, tied": {
        "target_modules": ["lm_head", "v_proj"],
        "rank_pattern": {"embed_tokens": 2},
        "ensure_weight_tying": True,
        "tied": True,
    },
    "saved head, adapted embedding, tied": {
        "target_modules": ["embed_tokens"],
        "modules_to_save": ["lm_head"],
        "tied": True,
    },
    "grown": {"vocabulary": 140},
    "grown, tied": {"vocabulary": 140, "tied": True},
    "grown, saved": {"vocabulary": 140, "modules_to_save": BOTH},
    "grown, saved, tied": {"vocabulary": 140, "modules_to_save": BOTH, "tied": True},
    "grown, saved embedding, tied": {"vocabulary": 140, "modules_to_save": ["embed_tokens"], "tied": True},
    "grown, saved as one": {"vocabulary": 140, "modules_to_save": BOTH, "ensure_weight_tying": True, "tied": True},
    "grown, adapted": {"vocabulary": 140, "target_modules": ["q_proj", *BOTH]},
    "grown, adapted, tied": {"vocabulary": 140, "target_modules": ["q_proj", "embed_tokens"], "tied": True},
    "grown, DoRA, tied": {"vocabulary": 140, "target_modules": BOTH, "use_dora": True, "tied": True},
    "grown, tokens": {"vocabulary": 140, "trainable_token_indices": [3, 138, 139]},
    "grown, tokens, tied": {"vocabulary": 140, "trainable_token_indices": [3, 138, 139], "tied": True},
    "shrunk": {"vocabulary": 120},
    "shrunk, saved head, tied": {"vocabulary": 120, "modules_to_save": ["lm_head"], "tied": True},
    "shrunk, adapted embedding": {"vocabulary": 120, "target_modules": ["embed_tokens"]},
}


def made(tmp_path, options):
    """A model and an adapter for it, from an entry of VARIANTS."""
    options = copy.deepcopy(options)  # PEFT changes lists that it is given
    tied = options.pop("tied", False)
    biased = bool(options.pop("qkv_bias", False) or "bias" in options)
    model = make_model(
        tmp_path / "model", "Qwen2ForCausalLM" if biased else "LlamaForCausalLM", tie_word_embeddings=tied,
        num_hidden_layers=5,
    )  # fmt: skip
    return model, make_adapter(model, tmp_path / "adapter", **options)


def merged_by_peft(model, adapter, vocabulary=None):
    from peft import PeftModel

    base = load_model(model)
    if vocabulary is not None:
        base.resize_token_embeddings(vocabulary, mean_resizing=False)
    return PeftModel.from_pretrained(base, adapter).merge_and_unload()


def assert_merged(reader, expected):
    """Whole tensors, and slices of random rows and columns in random order; the same model, tied or not."""
    weights = expected.state_dict()
    assert reader.model.vocab_size == expected.config.vocab_size
    assert reader.model.tie_embeddings == (expected.lm_head.weight is expected.model.embed_tokens.weight)
    generator = random.Random(SEED)
    for name, shape in checkpoint_shapes(reader.model).items():
        assert reader.shapes()[name] == shape == tuple(weights[name].shape)
        reads = [(None, None), (sorted(generator.sample(range(shape[0] + 1), 2)), None)]
        if len(shape) == 2:
            reads.append((None, sorted(generator.sample(range(shape[1] + 1), 2))))
            reads.append(tuple(sorted(generator.sample(range(size + 1), 2)) for size in shape))
        for rows, columns in generator.sample(reads, len(reads)):
            part = weights[name][slice(*(rows or (None,)))]
            part = part if columns is None else part[:, slice(*columns)]
            found = reader.read(name, rows and tuple(rows), columns and tuple(columns))
            assert found.dtype == reader.dtype(name)
            torch.testing.assert_close(found, part, rtol=1e-6, atol=1e-6)


def opened(model, adapter):
    config, base = open_checkpoint(model)
    return LoraReader(base, adapter, config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merge_equals_peft(variant, tmp_path):
    model, adapter = made(tmp_path, VARIANTS[variant])
    reader = opened(model, adapter)
    assert reader.merged
    assert_merged(reader, merged_by_peft(model, adapter, VARIANTS[variant].get("vocabulary")))


@pytest.mark.parametrize("variant", ["plain", "DoRA", "saved as one, tied"])
def test_a_half_precision_checkpoint_is_merged_in_float32_and_rounded_once(variant, tmp_path):
    options = copy.deepcopy(VARIANTS[variant])
    model = make_model(tmp_path / "model", save_dtype=torch.float16, tie_word_embeddings=options.pop("tied", False))
    adapter = make_adapter(model, tmp_path / "adapter", **options)
    reader = opened(model, adapter)
    # transformers loads float32, so PEFT merges in it.
    expected = merged_by_peft(model, adapter).state_dict()
    for name in checkpoint_shapes(reader.model):
        torch.testing.assert_close(reader.read(name).float(), expected[name], rtol=1e-6, atol=1e-6)


def test_norms_of_dora_are_of_whole_tensors_computed_in_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr("cqil_trt.merging._BLOCK_ELEMENTS", 7 * 48)  # blocks of a few rows
    model, adapter = made(tmp_path, VARIANTS["DoRA on everything, tied"])
    assert_merged(opened(model, adapter), merged_by_peft(model, adapter))


def rename(adapter, change, file="adapter_model.safetensors"):
    """Writes the adapter again with other keys; those that `change` gives None are left out."""
    tensors = {change(key): tensor for key, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    tensors.pop(None, None)
    (adapter / "adapter_model.safetensors").unlink()
    (torch.save if file.endswith(".bin") else save_file)(tensors, adapter / file)


def named(adapter_name):
    """PEFT's keys as they are in memory, where an adapter's name stands in them."""

    def change(key):
        key = re.sub(r"\.(lora_[AB])\.", rf".\1.{adapter_name}.", key)
        key = re.sub(r"\.(lora_embedding_[AB]|trainable_tokens_delta)$", rf".\1.{adapter_name}", key)
        return re.sub(r"\.lora_magnitude_vector$", rf".lora_magnitude_vector.{adapter_name}.weight", key)

    return change


def saved_as_of_old(infix):
    def change(key):
        if ".original_module." in key or ".modules_to_save." in key:
            return None
        if ".lora_" in key:
            return key
        return re.sub(r"\.(embed_tokens|lm_head|mlp)\.(?!base)", rf".\1.{infix}", key)

    return change


# What writers of adapters besides today's save_pretrained, and that of older PEFT, call the same tensors.
SPELLINGS = {
    "default in keys": (named("default"), "DoRA on everything, tied"),
    "another name in keys": (named("my-adapter_2"), "lora_bias"),
    "a name in keys of tokens": (named("adapter"), "tokens, tied"),
    "a name in keys of an embedding": (named("lora"), "embedding, tied"),
    "modules_to_save with a name": (saved_as_of_old("modules_to_save.default."), "saved embedding and head, tied"),
    "modules_to_save with another name": (saved_as_of_old("modules_to_save.mine."), "grown, saved"),
    "modules_to_save without a name": (saved_as_of_old("modules_to_save."), "saved head"),
    "modules_to_save of several tensors": (saved_as_of_old("modules_to_save.default."), "an MLP saved"),
    "biases without base_layer": (lambda key: key.replace(".base_layer.", "."), "biases of adapted layers"),
}


@pytest.mark.slow
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_of_the_same_adapter(spelling, file, tmp_path):
    change, variant = SPELLINGS[spelling]
    model, adapter = made(tmp_path, VARIANTS[variant])
    expected = merged_by_peft(model, adapter, VARIANTS[variant].get("vocabulary"))
    rename(adapter, change, file)
    assert_merged(opened(model, adapter), expected)
    judge = load_hugging_face(str(model), str(adapter)).state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(judge[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith(("grown", "shrunk"))])
def test_a_vocabulary_of_another_size_on_either_base(variant, tmp_path):
    """The judge of --validate resizes the original base; on the resized base there is nothing to resize."""
    model, adapter = made(tmp_path, VARIANTS[variant])
    expected = merged_by_peft(model, adapter, VARIANTS[variant]["vocabulary"])
    judge = load_hugging_face(str(model), str(adapter)).state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(judge[name], tensor, rtol=1e-6, atol=1e-6)
    resized = load_model(model)
    resized.resize_token_embeddings(VARIANTS[variant]["vocabulary"], mean_resizing=False)
    resized.save_pretrained(tmp_path / "resized")
    assert_merged(opened(tmp_path / "resized", adapter), merged_by_peft(tmp_path / "resized", adapter))


def configure(adapter, **changes):
    path = adapter / "adapter_config.json"
    values = json.loads(path.read_text()) | changes
    write_json(path, {name: value for name, value in values.items() if value is not ...})


HARMLESS = {
    "some_new_kind": None,
    "another_new_kind": {},
    "a_new_list": [],
    "a_new_switch": False,
    "use_qalora": False,
    "target_parameters": [],
    "eva_config": {"rho": 2.0},
    "loftq_config": {"loftq_bits": 4},
    "layer_replication": None,
    "trainable_token_indices": [],
    "r": ...,
    "lora_alpha": ...,
    "use_rslora": ...,
    "modules_to_save": [],
    "layers_to_transform": [],
    "init_lora_weights": ...,
}


def test_fields_that_change_nothing_are_harmless(tmp_path):
    model = make_model(tmp_path / "model")
    adapter = make_adapter(model, tmp_path / "adapter", r=8, lora_alpha=8)
    expected = merged_by_peft(model, adapter)
    configure(adapter, **HARMLESS)
    assert_merged(opened(model, adapter), expected)
    configure(adapter, target_modules="All-Linear")
    assert_merged(opened(model, adapter), expected)


def test_fields_at_the_default_of_the_installed_peft_are_harmless(monkeypatch, tmp_path):
    """Of fields that are not known here: two that are stand for them."""
    monkeypatch.setattr(peft_config, "_KNOWN", peft_config._KNOWN - {"megatron_core", "qalora_group_size"})
    model = make_model(tmp_path / "model", num_hidden_layers=2)
    adapter = make_adapter(model, tmp_path / "adapter")
    assert opened(model, adapter).merged
    configure(adapter, qalora_group_size=17)
    with pytest.raises(UserError, match="qalora_group_size is set"):
        opened(model, adapter)


@pytest.mark.parametrize("targets", [None, ...])
def test_an_adapter_that_does_not_say_what_it_targets(targets, tmp_path):
    model = make_model(tmp_path / "model", num_hidden_layers=2)
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    configure(adapter, target_modules=targets)
    assert_merged(opened(model, adapter), merged_by_peft(model, adapter))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa.*changes the base weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*changes the base weights"),
        ({"init_lora_weights": "olora"}, "olora.*changes the base weights"),
        ({"init_lora_weights": "loftq"}, "loftq.*changes the base weights"),
        ({"init_lora_weights": "corda"}, "corda.*changes the base weights"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga.*changes the base weights"),
        ({"init_lora_weights": "tomorrow"}, "tomorrow.*not known"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication is set: .*repeats layers"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters is set"),
        ({"alora_invocation_tokens": [5]}, "aLoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"kasa_config": {"beta": 1.0}}, "KaSA truncates"),
        ({"arrow_config": {"top_k": 3}}, "Arrow"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"monteclora_config": {"num_samples": 8}}, "MonteCLoRA"),
        ({"megatron_config": {"a": 1}}, "Megatron"),
        ({"some_new_kind": {"on": True}}, "some_new_kind is set"),
        ({"use_dora": True}, "lacks model.layers.0.self_attn.q_proj.lora_magnitude_vector, which use_dora"),
        ({"lora_bias": True}, "q_proj has no bias to merge it into"),
        ({"trainable_token_indices": [1, 2]}, "lacks the rows of model.embed_tokens"),
        (
            {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
            "embed_tokens, which modules_to_save or",
        ),
        ({"trainable_token_indices": {"q_proj": [1]}}, "q_proj.*no tokens"),
        ({"trainable_token_indices": 3}, "trainable_token_indices must be"),
        ({"modules_to_save": ["lm_head"]}, "lacks lm_head.weight, .*modules_to_save"),
        ({"modules_to_save": ["norm"]}, "lacks model.layers.0.input_layernorm.weight, .*modules_to_save"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list"),
        ({"bias": "some"}, "bias must be none, all or lora_only"),
        ({"r": 9}, "rank 9"),
        ({"r": None}, "r is null"),
        ({"lora_alpha": None}, "lora_alpha is null"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": None}}, "q_proj must be a number"),
        ({"rank_pattern": {"(": 3}}, "not a pattern"),
        ({"target_modules": 5}, "list of module names"),
        ({"target_modules": ["q_proj", "v_proj"]}, "lacks model.layers.0.self_attn.v_proj, which"),
        (
            {"target_modules": ["layers.0.self_attn.q_proj"]},
            "q_proj.lora_A.weight, which target_modules .*does not ask",
        ),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, "which target_modules .*does not ask for"),
        ({"layers_to_transform": [0, 1]}, "which target_modules .*does not ask for"),
        ({"layers_pattern": 3, "layers_to_transform": [0]}, "layers_pattern"),
    ],
)
def test_adapters_that_would_be_merged_wrongly_are_refused_by_name(changes, message, tmp_path):
    model = make_model(tmp_path / "model", num_hidden_layers=3)
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    configure(adapter, **changes)
    with pytest.raises(UserError, match=message):
        opened(model, adapter)


@pytest.mark.parametrize(
    "other, message",
    [
        ({"num_hidden_layers": 4}, "lacks model.layers.4"),
        ({"num_hidden_layers": 8}, "which the model does not have"),
        ({"hidden_size": 60}, "do not fit"),
        ({"intermediate_size": 80}, "do not fit"),
    ],
)
def test_an_adapter_of_another_model_is_refused(other, message, tmp_path):
    model = make_model(tmp_path / "model")
    adapter = make_adapter(make_model(tmp_path / "other", **other), tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        opened(model, adapter)


@pytest.mark.parametrize(
    "options, other, message",
    [
        ({"modules_to_save": BOTH}, {"hidden_size": 60}, r"has shape \(131, 60\), the model's is \(131, 48\)"),
        ({"modules_to_save": ["lm_head"]}, {"vocab_size": 150}, "150 tokens, but without the model.embed_tokens"),
        ({"target_modules": ["embed_tokens"], "vocabulary": 140}, {}, "140 tokens, but without the lm_head.weight"),
        ({"trainable_token_indices": [140]}, {"vocab_size": 150}, "names token 140 of model.embed_tokens's 131"),
    ],
)  # fmt: skip
def test_tables_that_do_not_fit_are_refused(options, other, message, tmp_path):
    model = make_model(tmp_path / "model", num_hidden_layers=3)
    source = make_model(tmp_path / "other", num_hidden_layers=3, **other)
    adapter = make_adapter(source, tmp_path / "adapter", **options)
    with pytest.raises(UserError, match=message):
        opened(model, adapter)


@pytest.mark.parametrize(
    "variant, without, message",
    [
        ("plain", r"layers\.2\.mlp\.up_proj\.lora_B", "up_proj.lora_A.weight has no partner"),
        ("embedding", "lora_embedding_A", "lora_embedding_B has no partner"),
        ("plain", r"layers\.2\.mlp\.up_proj", "lacks model.layers.2.mlp.up_proj, which adapter_config.json targets"),
        ("DoRA", r"layers\.1\.self_attn\.o_proj\.lora_magnitude", "lacks .*o_proj.lora_magnitude_vector"),
        ("lora_bias", r"layers\.1\.self_attn\.k_proj\.lora_B\.bias", "lacks .*k_proj.lora_B.bias"),
        ("all biases", r"layers\.1\.self_attn\.v_proj", "lacks .*v_proj.bias, which bias: all"),
        ("biases of adapted layers", r"layers\.1\.self_attn\.v_proj.*bias", "lacks .*v_proj.bias, which bias: lora"),
        ("saved embedding and head, tied", "lm_head", "lacks lm_head.weight, of a module that modules_to_save names"),
        ("an MLP saved", r"layers\.1\.mlp\.gate_proj", "lacks model.layers.1.mlp.gate_proj.weight, of a module"),
        ("tokens, tied", "token_adapter", "lacks the rows of model.embed_tokens"),
    ],
)  # fmt: skip
def test_incomplete_adapters_are_refused(variant, without, message, tmp_path):
    model, adapter = made(tmp_path, VARIANTS[variant])
    rename(adapter, lambda key: None if re.search(without, key) else key)
    with pytest.raises(UserError, match=message):
        opened(model, adapter)


@pytest.mark.parametrize(
    "key, message",
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight", "not a LoRA tensor"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "use_dora .*does not ask for"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", "lora_bias .*does not ask for"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "trainable_token_indices .*does"),
        ("base_model.model.model.norm.modules_to_save.default.weight", "modules_to_save .*does not ask for"),
        ("base_model.model.score.weight", "score.weight, which the model does not have"),
        ("lm_head.weight", "lm_head.weight, which the model does not have"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.other.weight", "several adapters|does not ask"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_asked_for_are_refused(key, message, tmp_path):
    model = make_model(tmp_path / "model", num_hidden_layers=2)
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    rename(adapter, named("default"))
    save_file({**load_file(file), key: torch.ones(1)}, file)
    with pytest.raises(UserError, match=message):
        opened(model, adapter)


def test_an_adapter_saved_from_a_sharded_model_is_refused(tmp_path):
    """DeepSpeed's ZeRO-3 leaves empty tensors in place of what other processes hold."""
    model, adapter = made(tmp_path, VARIANTS["saved head"])
    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.weight": torch.empty(0)}, file)
    with pytest.raises(UserError, match="lm_head.weight is empty"):
        opened(model, adapter)


def test_missing_files_are_refused(tmp_path):
    model = make_model(tmp_path / "model", num_hidden_layers=2)
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no adapter_model"):
        opened(model, adapter)
    with pytest.raises(UserError, match="no such directory"):
        opened(model, tmp_path / "nowhere")


@pytest.mark.parametrize("variant", ["grown, tied", "grown, saved embedding, tied", "saved head, tied", "tied"])
def test_ranks_and_reference_follow_the_merged_model(variant, tmp_path):
    """Vocabulary and tying of ranks and of the reference are the merged model's, not the checkpoint's."""
    model, adapter = made(tmp_path, VARIANTS[variant])
    expected = merged_by_peft(model, adapter, VARIANTS[variant].get("vocabulary"))
    checkpoint = Checkpoint(model, adapter)
    ranks = plan(checkpoint.model, CqilConfig(p=2, start=1, end=5))
    weights = [rank_weights(rank, checkpoint.reader) for rank in ranks]
    head = torch.cat([own["lm_head.weight"] for own in weights])
    torch.testing.assert_close(head, expected.lm_head.weight.detach(), rtol=1e-6, atol=1e-6)
    for rank, own in zip(ranks, weights):
        assert rank.shares_embedding == (variant in ("grown, tied", "tied"))
        table = expected.model.embed_tokens.weight.detach()
        torch.testing.assert_close(own["embedding.weight"], table, rtol=1e-6, atol=1e-6)
    ids = torch.randint(expected.config.vocab_size, (1, 20))
    with torch.inference_mode():
        found = from_reader(checkpoint.model, checkpoint.reader)(ids, use_cache=False).logits
        torch.testing.assert_close(found, expected.eval()(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_grown_vocabulary_end_to_end(tmp_path):
    """Ranks split a vocabulary that the checkpoint does not have, of a tied model that the adapter unties."""
    model, adapter = made(tmp_path, VARIANTS["grown, saved embedding, tied"])
    engine = tmp_path / "engine"
    done = build(
        "--model", model, "--lora", adapter, "--output", engine, "--p", 2, "--start", 1, "--end", 5,
        "--placement", "sharded", "--dtype", "float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stored = json.loads((engine / "config.json").read_text())["model"]
    assert (stored["vocab_size"], stored["tie_embeddings"]) == (140, False)
    ids = write_json(tmp_path / "ids.json", [[1, 139, 7, 135], [138, 2, 3]])
    done = mpirun(2, "--engine", engine, "--token-ids", ids, "--max-new-tokens", 4, "--validate")
    assert done.returncode == 0, done.stdout + done.stderr
