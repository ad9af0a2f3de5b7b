"""A family is its file: found by the folder, and complete as data."""

import pytest
import torch
from support import SEED
from support.checkpoints import checkpoint_logits, load_model, make_adapter, make_model, write_json

from cqil_trt import families
from cqil_trt.checkpoint import Checkpoint
from cqil_trt.families.family import HUGGING_FACE_LAYER
from cqil_trt.families.layout import checkpoint_shapes

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.mark.parametrize("family", families.all_families(), ids=lambda family: family.model_type)
def test_the_layout_is_that_of_transformers(family, tmp_path):
    source = make_model(tmp_path, family.architecture, num_hidden_layers=2)
    model = families.read_config(source / "config.json")
    expected = {name: tuple(tensor.shape) for name, tensor in load_model(source).state_dict().items()}
    assert checkpoint_shapes(model) == expected
    assert families.of(model) is families.of_type(family.model_type) is family


def test_a_family_is_added_by_a_file(tmp_path, monkeypatch):
    (tmp_path / "made_up.py").write_text(
        "from cqil_trt.families.family import HUGGING_FACE_LAYER, Family\n"
        'LAYER = {**HUGGING_FACE_LAYER, "q": "mixer.in", "k": "mixer.in", "v": "mixer.in", "o": "mixer.out"}\n'
        'FAMILY = Family(architecture="MadeUpForCausalLM", model_type="made_up", layer=LAYER, qkv_bias=True)\n'
    )
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    families.all_families.cache_clear()
    try:
        values = {
            "model_type": "made_up",
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 40,
            "vocab_size": 50,
        }
        model = families.read_config(write_json(tmp_path / "config.json", values))
        shapes = checkpoint_shapes(model)
    finally:
        monkeypatch.undo()
        families.all_families.cache_clear()
    assert model.architecture == "MadeUpForCausalLM" and model.head_dim == 8
    assert shapes["model.layers.0.mixer.in.weight"] == (40, 24)
    assert shapes["model.layers.0.mixer.in.bias"] == (40,)
    assert shapes["model.layers.0.mixer.out.weight"] == (24, 24)
    assert not any("self_attn" in name for name in shapes)


@pytest.mark.parametrize("targets", [FUSED, ["qkv_proj"], "all-linear"], ids=str)
def test_an_adapter_of_phi3_is_merged_as_peft_merges_it(targets, tmp_path):
    from peft import PeftModel

    source = make_model(tmp_path / "model", "Phi3ForCausalLM", num_hidden_layers=2)
    adapter = make_adapter(source, tmp_path / "adapter", target_modules=targets)
    expected = PeftModel.from_pretrained(load_model(source), adapter).merge_and_unload()
    checkpoint = Checkpoint(source, adapter)
    prompt = torch.randint(3, 131, (20,), generator=torch.Generator().manual_seed(SEED)).tolist()
    with torch.no_grad():
        logits = expected(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(checkpoint_logits(checkpoint, prompt), logits, rtol=1e-4, atol=1e-5)


def test_the_authors_projections_are_adapted_in_every_family():
    assert list(families.of_type("phi3").linear_modules) == FUSED
    split = [HUGGING_FACE_LAYER[part].rpartition(".")[2] for part in ("q", "k", "v", "o", "gate", "up", "down")]
    assert list(families.of_type("llama").linear_modules) == split
