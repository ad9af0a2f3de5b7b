"""Configurations against transformers' own, and the rules of CqilConfig."""

import json

import pytest
import torch
import transformers
from support import write_json
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cqil_trt import backends, families
from cqil_trt.builder import choose_cqil
from cqil_trt.config import CqilConfig, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.model import Feature, ModelConfig
from cqil_trt.network.rotary import inverse_frequencies
from cqil_trt.presets import PRESETS

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "intermediate_size": 96,
    "vocab_size": 100,
}


@pytest.mark.parametrize("architecture", [family.architecture for family in families.all_families()])
def test_fields_left_out_mean_what_transformers_takes_them_for(architecture, tmp_path):
    expected = getattr(transformers, architecture).config_class(**SMALL)
    path = write_json(tmp_path / "config.json", {"architectures": [architecture], **SMALL})
    model = families.read_config(path)
    assert model.num_kv_heads == expected.num_key_value_heads
    assert model.head_dim == (getattr(expected, "head_dim", None) or 2)
    assert model.max_position == expected.max_position_embeddings
    assert model.rms_norm_eps == expected.rms_norm_eps
    rope = expected.rope_parameters
    assert model.rope.theta == rope.get("full_attention", rope)["rope_theta"]
    if model.local_rope is not None:
        assert model.local_rope.theta == rope["sliding_attention"]["rope_theta"]
    assert model.tie_embeddings == expected.tie_word_embeddings
    kinds = getattr(expected, "layer_types", None) or ["sliding_attention"] * 4
    window = getattr(expected, "sliding_window", None)
    windows = [window if kind == "sliding_attention" else None for kind in kinds]
    assert [model.window_of(i) for i in range(4)] == windows


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 50000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("old_style", [False, True])
def test_rope_frequencies_equal_those_of_transformers(kind, old_style, tmp_path):
    rope = dict(ROPES[kind])
    config = transformers.LlamaConfig(**{**SMALL, "num_attention_heads": 1}, rope_parameters=dict(rope))
    if kind == "default":
        expected = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    else:
        expected, scale = ROPE_INIT_FUNCTIONS[kind](config)
        assert scale == 1.0
    written = {"architectures": ["LlamaForCausalLM"], **SMALL, "num_attention_heads": 1}
    if old_style:
        written["rope_theta"] = rope.pop("rope_theta")
        rope["type"] = rope.pop("rope_type")
        written["rope_scaling"] = None if kind == "default" else rope
    else:
        written["rope_parameters"] = rope
    model = families.read_config(write_json(tmp_path / "config.json", written))
    assert torch.equal(torch.tensor(inverse_frequencies(model)), expected)


REFUSED = {
    "architectures": (["GPT2LMHeadModel"], "GPT2LMHeadModel"),
    "hidden_act": ("gelu", "gelu"),
    "rope_scaling": ({"type": "su", "long_factor": [1.0], "short_factor": [1.0]}, "su"),
    "model_type": ("gpt2", "gpt2"),
    "partial_rotary_factor": (0.5, "partial_rotary_factor"),
    "num_key_value_heads": (5, "key/value heads"),
    "hidden_size": (-1, "hidden_size"),
    "num_hidden_layers": ("many", "num_hidden_layers"),
    "rms_norm_eps": (float("nan"), "rms_norm_eps"),
    "vocab_size": (10**40, "vocab_size"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_would_be_computed_wrongly_is_refused_by_name(field, tmp_path):
    value, name = REFUSED[field]
    path = write_json(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"], **SMALL, field: value})
    with pytest.raises(UserError) as caught:
        families.read_config(path)
    assert name in str(caught.value) and str(path) in str(caught.value)


def test_a_sliding_window_is_refused_only_where_it_is_in_use(tmp_path):
    values = {"architectures": ["MistralForCausalLM"], **SMALL, "num_key_value_heads": 8, "sliding_window": 512}
    model = families.read_config(write_json(tmp_path / "config.json", values))
    for name in backends.names():
        backends.load(name).check_model(model, EngineLimits(max_seq_len=512))
        if Feature.WINDOWS in backends.load(name).features:
            backends.load(name).check_model(model, EngineLimits(max_seq_len=513))
            continue
        with pytest.raises(UserError, match=f"backend {name}: Mistral.* sliding windows.*--max-seq-len 512"):
            backends.load(name).check_model(model, EngineLimits(max_seq_len=513))
    for off in ({"sliding_window": None}, {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}):
        path = write_json(tmp_path / "config.json", {**values, **off})
        assert families.read_config(path).sliding_window is None


@pytest.mark.parametrize(
    "values, message",
    [
        ({"p": 0}, "--p"),
        ({"p": 9}, "--p"),
        ({"p": 2, "d": 2}, "--d"),
        ({"p": 2, "d": -1}, "--d"),
        ({"p": 4, "start": 2, "end": 8}, "does not divide.*try --end 6$"),
        ({"p": 4, "start": 3, "end": 6}, "does not divide.*try --p 3, or --end 7 if there are so many layers$"),
        ({"p": 4, "start": 3, "end": 4}, "does not divide.*try --end 7 if"),
        ({"p": 2, "start": 4, "end": 2}, "start <= end"),
        ({"p": 2, "start": -2, "end": 2}, "start <= end"),
        ({"p": 2, "bypass": "both"}, "--bypass"),
        ({"p": 2, "placement": "here"}, "--placement"),
        ({"p": 2, "start": 2, "end": 4, "placement": "tensor"}, "tensor"),
        ({"p": 1, "drop_attention_join": [1]}, "--drop-attention-join 1: with --p 1 no layer is split"),
        ({"p": 2, "placement": "leader", "drop_attention_join": [1]}, "with --placement leader no layer is split"),
        ({"p": 2, "start": 2, "end": 4, "drop_attention_join": [3, 1]}, "1,3: layer 3 is in a group of .2, 4."),
        ({"p": 2, "drop_attention_join": [4, 5, 4]}, "names layer 4 more than once"),
        ({"p": 2, "drop_attention_join": [-1]}, "no layer -1"),
        ({"p": 2, "ranks_per_layer": 0}, "--ranks-per-layer must be at least 1, found 0"),
        ({"p": 3, "ranks_per_layer": 3}, "--p 3 times --ranks-per-layer 3 is 9 ranks: at most 8"),
        ({"p": 2, "ranks_per_layer": 2, "placement": "leader"}, "--ranks-per-layer 2: placement leader"),
        (
            {"p": 2, "d": 1, "ranks_per_layer": 2, "start": 2, "end": 4, "drop_attention_join": [3]},
            "3: layer 3 is in a group of .2, 4., whose bypass",
        ),
    ],
)
def test_wrong_configurations_name_the_flag(values, message):
    with pytest.raises(UserError, match=message):
        CqilConfig(**values)


@pytest.mark.parametrize(
    "wanted, message",
    [
        ("4-", "4-: expected layers like"),
        ("7-4", "7-4: expected layers like"),
        ("auto", "auto: expected layers like"),
        ("4,,5", "4,,5: expected layers like"),
        ("4-6,5", "names layer 5 more than once"),
        ("20", "layer 20 is in a group of .12, 30."),
        ("31-32", "layer 32 is beyond the model, whose layers are 0 to 31"),
        ("auto:15", "auto:15: only 14 layers are split"),
    ],
)
def test_layers_that_have_no_join_to_drop_are_named(wanted, message):
    with pytest.raises(UserError, match=f"--drop-attention-join.*{message}"):
        CqilConfig.choose(32, 2, drop_attention_join=wanted)


def test_layers_whose_join_is_dropped_are_chosen_and_described():
    def dropped(*arguments, **options):
        return CqilConfig.choose(*arguments, **options).drop_attention_join

    assert dropped(32, 2, drop_attention_join="28-31,4", end=28) == (4, 28, 29, 30, 31)
    assert dropped(32, 2, drop_attention_join="auto:4") == (5, 6, 7, 8)
    assert dropped(32, 2, drop_attention_join="auto:10") == (*range(3, 12), 30)
    assert dropped(32, 2, drop_attention_join="auto:13") == (*range(1, 12), 30, 31)
    assert dropped(32, 2, drop_attention_join="auto:0") == dropped(32, 1, drop_attention_join="none") == ()
    tensor = CqilConfig.choose(4, 3, placement="tensor", drop_attention_join="auto:3")
    assert tensor.drop_attention_join == tensor.changed_layers == (1, 2, 3) and not tensor.groups
    both = CqilConfig.choose(32, 2, d=1, start=12, end=14, drop_attention_join=[31, 4, 5, 7])
    assert both.changed_layers == (4, 5, 7, 12, 13, 31) and both.name == "p2-d1-12-14-drop4-5_7_31"
    assert CqilConfig(p=1, start=3, end=7).summary == "p=1 d=0, no groups"
    assert both.summary == "p=2 d=1 mlp [12, 14), attention joins dropped in 4-5,7,31"
    shared = CqilConfig.choose(32, 2, start=12, end=30, ranks_per_layer=2, drop_attention_join="auto:4")
    assert shared.drop_attention_join == (5, 6, 7, 8) and shared.name == "p2x2-d0-12-30-drop5-8"
    assert shared.dropping("5,12-13", 32).summary == "p=2x2 d=0 [12, 30), attention joins dropped in 5,12-13"
    assert [shared.sharing(layer) for layer in (0, 12, 31)] == [4, 2, 4]


def test_what_an_adapter_was_trained_for_is_kept(tmp_path):
    config = CqilConfig(p=2, d=1, start=2, end=4, drop_attention_join=(0, 5))
    config.save_with_adapter(tmp_path)
    assert CqilConfig.of_adapter(tmp_path) == config
    # The number of ranks changes what is computed only with joins left out.
    shared = CqilConfig(p=2, ranks_per_layer=2, start=2, end=4, drop_attention_join=(0, 2))
    shared.save_with_adapter(tmp_path)
    assert CqilConfig.of_adapter(tmp_path) == shared and not shared.computes_as(
        CqilConfig(p=2, ranks_per_layer=3, start=2, end=4, drop_attention_join=(0, 2))
    )
    whole = CqilConfig(p=2, ranks_per_layer=2, start=2, end=4)
    whole.save_with_adapter(tmp_path)
    assert CqilConfig.of_adapter(tmp_path) == CqilConfig(p=2, start=2, end=4) and whole.computes_as(
        CqilConfig(p=2, start=2, end=4, placement="leader")
    )
    config.save_with_adapter(tmp_path)
    path = tmp_path / "cqil_config.json"
    values = json.loads(path.read_text())
    del values["drop_attention_join"]  # as it was written before there was such a thing
    write_json(path, values)
    assert CqilConfig.of_adapter(tmp_path) == CqilConfig(p=2, d=1, start=2, end=4)
    for wrong, message in (("4-6", "a layer or a list of them, found '4-6'"), ([3], "layer 3 is in a group")):
        write_json(path, {**values, "drop_attention_join": wrong})
        with pytest.raises(UserError, match=f"cqil_config.json.*{message}"):
            CqilConfig.of_adapter(tmp_path)


def test_the_middle_is_chosen_when_no_range_is_given():
    for layers in range(1, 81):
        for p in range(1, 9):
            config = CqilConfig.choose(layers, p)
            assert 0 <= config.start <= config.end <= layers and (config.end - config.start) % p == 0
            assert CqilConfig.choose(layers, p, start=0).start == 0
            assert CqilConfig.choose(layers, p, end=layers).end == layers
    assert (CqilConfig.choose(32, 2).start, CqilConfig.choose(32, 2).end) == (12, 30)


def test_presets_are_the_published_ranges():
    chosen = {name: preset.cqil for name, preset in PRESETS.items()}
    found = {name: (c.p, c.d, c.start, c.end, c.bypass) for name, c in chosen.items()}
    assert found == {
        "llama-7b-p2-d0": (2, 0, 12, 30, "mlp"),
        "llama-7b-p2-d1": (2, 1, 12, 30, "residual"),
        "llama-7b-p4-d0": (4, 0, 14, 30, "mlp"),
        "llama-7b-p4-d1": (4, 1, 14, 30, "residual"),
        "qwen1.5-14b-p2-d0": (2, 0, 17, 37, "mlp"),
    }


def test_presets_for_models_of_other_depths(tmp_path):
    def chosen(layers, preset="llama-7b-p2-d0", **flags):
        sizes = {**SMALL, "num_hidden_layers": layers}
        path = write_json(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"], **sizes})
        model = families.read_config(path)
        notes = []
        return choose_cqil(model, {"preset": preset, **flags}, notes), notes

    for layers, flags, noted in ((32, {}, False), (30, {}, True), (24, {"end": 20}, True)):
        cqil, notes = chosen(layers, **flags)
        assert (cqil.start, cqil.end) == (12, flags.get("end", 30))
        expected = f"--preset llama-7b-p2-d0 was published for a model of 32 layers, and this one has {layers}"
        assert notes == ([expected] if noted else [])
    assert not [note for note in chosen(24, placement="tensor")[1] if "--preset" in note]
    with pytest.raises(UserError, match=r"^--preset qwen1.5-14b-p2-d0: its layers \[17, 37\) are beyond .*has 36"):
        chosen(36, "qwen1.5-14b-p2-d0")


def test_model_config_survives_json(tmp_path):
    rope = ROPES["llama3"]
    path = write_json(
        tmp_path / "config.json",
        {"architectures": ["LlamaForCausalLM"], **SMALL, "rope_parameters": rope, "eos_token_id": [1, 2]},
    )
    model = families.read_config(path)
    assert ModelConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model
    assert model.eos_token_ids == (1, 2)
