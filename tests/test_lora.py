"""The merge against PEFT's merge_and_unload, and adapters that must be refused."""

import json

import pytest
import torch
from conftest import load_model, make_adapter, make_model, write_json
from safetensors.torch import load_file, save_file

from cqil_trt.errors import UserError
from cqil_trt.lora import LoraReader
from cqil_trt.shard import checkpoint_shapes
from cqil_trt.weights import open_checkpoint

FULL_NAMES = [f"model.layers.{i}.{m}" for i in (0, 3) for m in ("self_attn.q_proj", "mlp.down_proj")]
VARIANTS = {
    "plain": {},
    "rank one": {"r": 1},
    "rslora": {"use_rslora": True},
    "rank and alpha patterns": {
        "rank_pattern": {"q_proj": 7, r"model\.layers\.[12]\.mlp\.up_proj": 2},
        "alpha_pattern": {"down_proj": 11, "layers.3.self_attn.v_proj": 3},
    },
    "full names": {"target_modules": FULL_NAMES},
    "one pattern": {"target_modules": r".*layers\.[024].*_proj"},
    "all linear": {"target_modules": "all-linear"},
    "excluded": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["model.layers.1.mlp.up_proj"]},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 4]},
    "fan in fan out": {"fan_in_fan_out": True},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "norms saved": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "biases of adapted layers": {"bias": "lora_only"},
    "all biases": {"bias": "all", "target_modules": ["up_proj", "q_proj"]},
}


def merged_by_peft(model, adapter):
    from peft import PeftModel

    return PeftModel.from_pretrained(load_model(model), adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize("variant", VARIANTS)
def test_merge_equals_peft(variant, tmp_path):
    architecture = "Qwen2ForCausalLM" if "bias" in variant else "LlamaForCausalLM"
    model = make_model(tmp_path / "model", architecture)
    adapter = make_adapter(model, tmp_path / "adapter", **VARIANTS[variant])
    config, base = open_checkpoint(model)
    reader = LoraReader(base, adapter)
    expected = merged_by_peft(model, adapter)
    changed = 0
    for name, shape in checkpoint_shapes(config).items():
        found = reader.read(name)
        assert found.shape == shape
        torch.testing.assert_close(found, expected[name], rtol=1e-6, atol=1e-6)
        changed += not torch.equal(found, base.read(name))
        if len(shape) == 2:  # slices of a merge are the merge of slices
            rows, columns = (shape[0] // 3, shape[0] // 2), (shape[1] // 4, shape[1] - 1)
            part = expected[name][slice(*rows), slice(*columns)]
            torch.testing.assert_close(reader.read(name, rows, columns), part, rtol=1e-6, atol=1e-6)
    assert 0 < changed <= reader.merged


def test_a_half_precision_checkpoint_is_merged_in_float32_and_rounded_once(tmp_path):
    model = make_model(tmp_path / "model", save_dtype=torch.float16)
    adapter = make_adapter(model, tmp_path / "adapter")
    config, base = open_checkpoint(model)
    expected = merged_by_peft(model, adapter)  # transformers loads float32, so PEFT merges in it
    for name in checkpoint_shapes(config):
        torch.testing.assert_close(LoraReader(base, adapter).read(name).float(), expected[name], rtol=1e-6, atol=1e-6)


def test_an_adapter_in_a_bin_file(tmp_path):
    model = make_model(tmp_path / "model")
    adapter = make_adapter(model, tmp_path / "adapter")
    base = open_checkpoint(model)[1]
    expected = LoraReader(base, adapter).read("model.layers.0.mlp.up_proj.weight")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert torch.equal(LoraReader(base, adapter).read("model.layers.0.mlp.up_proj.weight"), expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"some_new_kind": {"on": True}}, "some_new_kind"),
        ({"r": 9}, "rank 9"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"rank_pattern": {"(": 3}}, "not a pattern"),
        ({"target_modules": 5}, "list of module names"),
    ],
)
def test_adapters_that_would_be_merged_wrongly_are_refused_by_name(changes, message, tmp_path):
    model = make_model(tmp_path / "model")
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    path = adapter / "adapter_config.json"
    write_json(path, {**json.loads(path.read_text()), **changes})
    with pytest.raises(UserError, match=message):
        LoraReader(open_checkpoint(model)[1], adapter)


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
        LoraReader(open_checkpoint(model)[1], adapter)


def test_broken_adapter_files_are_refused(tmp_path):
    model = make_model(tmp_path / "model")
    base = open_checkpoint(model)[1]
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "lora_B" in n)
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    with pytest.raises(UserError, match="no partner"):
        LoraReader(base, adapter)
    save_file({**tensors, "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight": torch.ones(1)}, file)
    with pytest.raises(UserError, match="not a LoRA tensor"):
        LoraReader(base, adapter)
    file.unlink()
    with pytest.raises(UserError, match="no adapter_model"):
        LoraReader(base, adapter)
    with pytest.raises(UserError, match="no such directory"):
        LoraReader(base, tmp_path / "nowhere")


def test_an_adapter_that_unties_a_tied_embedding_is_refused(tmp_path):
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["embed_tokens"])
    config, base = open_checkpoint(model)
    with pytest.raises(UserError, match="ties"):
        LoraReader(base, adapter, config.tie_embeddings)
