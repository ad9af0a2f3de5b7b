"""The judge itself: against the untouched model bit for bit, and against the formulas written out."""

import copy

import pytest
import torch
from support import SEED
from support.cases import ARCHITECTURES as CASES
from support.cases import FAMILIES, relative
from support.checkpoints import load_model, make_adapter, make_model
from support.formulas import Formulas

from cqil_trt import families
from cqil_trt.errors import UserError
from cqil_trt.reference import CqilModel, from_reader, load_hugging_face
from cqil_trt.weights import open_checkpoint

ARCHITECTURES = [family.architecture for family in families.all_families()]


def tokens(batch=2, length=11):
    # Not token 0, which generate() would take for padding.
    return torch.randint(1, 131, (batch, length), generator=torch.Generator().manual_seed(SEED))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", [{"p": 1}, {"p": 2, "start": 3, "end": 3}, {"p": 1, "start": 1, "end": 5}])
def test_without_groups_it_is_the_hugging_face_model_bit_for_bit(architecture, shape, tmp_path):
    make_model(tmp_path, architecture)
    expected = load_model(tmp_path)(tokens()).logits
    model = CqilModel(load_model(tmp_path), **shape)
    assert torch.equal(model(tokens()).logits, expected)
    wrapped = CqilModel(load_model(tmp_path), p=2, start=1, end=5)
    assert not torch.equal(wrapped(tokens()).logits, expected)
    with wrapped.sequential():
        assert torch.equal(wrapped(tokens()).logits, expected)
    assert not torch.equal(wrapped(tokens()).logits, expected)


@pytest.mark.parametrize("bypass", ["mlp", "residual"])
@pytest.mark.parametrize("p, d, start, end", [(2, 0, 1, 5), (2, 1, 0, 6), (3, 2, 0, 6), (4, 1, 1, 5), (4, 3, 2, 6)])
def test_groups_follow_the_definition(bypass, p, d, start, end, tmp_path):
    make_model(tmp_path, seed=SEED + p + d)
    network = load_model(tmp_path)
    expected = Formulas(network.config, network.state_dict()).logits(tokens(), p, d, start, end, bypass)
    found = CqilModel(network, p, d, start, end, bypass)(tokens()).logits
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


# Biases of o and down, uneven heads and neurons, ranks without heads, norms of heads; groups, and none.
DROPPED = [
    ("llama-tied-bias", {"p": 2, "d": 1, "start": 2, "end": 4, "drop_attention_join": (0, 4, 5)}),
    ("llama-tied-bias", {"p": 4, "drop_attention_join": (1, 2)}),
    ("llama-odd-heads", {"p": 2, "start": 2, "end": 6, "drop_attention_join": (1,)}),
    ("llama-odd-heads", {"p": 3, "d": 2, "start": 0, "end": 3, "bypass": "residual", "drop_attention_join": (3, 5)}),
    ("llama-few-heads", {"p": 4, "start": 1, "end": 5, "drop_attention_join": (0, 5)}),
    ("qwen2", {"p": 3, "start": 3, "end": 3, "drop_attention_join": range(6)}),
    ("qwen3", {"p": 2, "start": 0, "end": 4, "drop_attention_join": (4,)}),
    ("llama-tied-bias", {"p": 2, "ranks_per_layer": 2, "start": 1, "end": 5, "drop_attention_join": (1, 2, 3, 5)}),
    ("llama-odd-heads", {"p": 3, "ranks_per_layer": 2, "d": 2, "start": 0, "end": 3, "drop_attention_join": (4,)}),
]


@pytest.mark.parametrize("name, shape", DROPPED)
def test_dropped_joins_follow_the_definition(name, shape, tmp_path):
    architecture, changes = CASES[name]
    make_model(tmp_path, architecture, **changes)
    network = load_model(tmp_path)
    formulas = Formulas(network.config, network.state_dict())
    expected = formulas.logits(tokens(), **shape)
    model = CqilModel(network, **{"start": 0, "end": 0, **shape})
    found = model(tokens()).logits
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    joined = formulas.logits(tokens(), **{**shape, "drop_attention_join": ()})
    assert (joined - expected).abs().max() > 1e-2
    with model.sequential():
        torch.testing.assert_close(model(tokens()).logits.double(), formulas.logits(tokens()), rtol=1e-4, atol=1e-4)
    out = model.generate(tokens(1), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(out[0, 11:], model(out[:, :-1], use_cache=False).logits[0, 10:].argmax(-1))


def test_gradients_of_an_adapter_are_those_of_the_definition(tmp_path):
    """Through LoRA on every projection, those that have biases too."""
    from peft import LoraConfig, get_peft_model

    make_model(tmp_path, **CASES["llama-tied-bias"][1])
    network = load_model(tmp_path)
    state, shape = dict(network.state_dict()), {"p": 3, "start": 2, "end": 5, "drop_attention_join": (0, 5)}
    wrapped = CqilModel(network, **shape)
    options = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(network, options).train()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    factors = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    exact = {name: p.detach().double().requires_grad_() for name, p in factors.items()}
    for name, b in exact.items():
        if ".lora_B." in name:
            weight = name.removeprefix("base_model.model.").replace(".lora_B.default", "")
            state[weight] = state[weight].double() + 2 * b @ exact[name.replace("lora_B", "lora_A")]
    weights = torch.randn(2, 11, 131, dtype=torch.float64)
    (Formulas(network.config, state).logits(tokens(), **shape) * weights).sum().backward()
    for checkpointed in (False, True):
        if checkpointed:
            tuned.gradient_checkpointing_enable()
            tuned.enable_input_require_grads()
        tuned.zero_grad()
        (tuned(tokens(), use_cache=False).logits * weights).sum().backward()
        for name, factor in factors.items():
            expected = exact[name].grad
            assert (factor.grad - expected).norm() < 1e-4 * expected.norm(), name
    assert wrapped.cqil.changed_layers == (0, 2, 3, 4, 5)


def test_generate_with_its_cache_equals_full_passes(tmp_path):
    make_model(tmp_path)
    model = CqilModel(load_model(tmp_path), p=2, d=1, start=1, end=5)
    out = model.generate(tokens(1), max_new_tokens=12, do_sample=False, eos_token_id=None)
    full = model(out[:, :-1], use_cache=False).logits[0, 10:].argmax(-1)
    assert torch.equal(out[0, 11:], full)


def test_a_copy_is_independent_of_the_original(tmp_path):
    make_model(tmp_path)
    model = CqilModel(load_model(tmp_path), p=2, start=0, end=6)
    before = model(tokens()).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(tokens()).logits, before)


def test_peft_trains_it_and_the_adapter_fits_the_original_names(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    import cqil_trt
    from cqil_trt.lora import LoraReader
    from cqil_trt.weights import open_checkpoint

    make_model(tmp_path / "model")
    model = CqilModel(load_model(tmp_path / "model"), p=2, start=1, end=5)
    assert list(dict(model.named_parameters())) == list(dict(load_model(tmp_path / "model").named_parameters()))
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    data = [{"input_ids": row, "labels": row} for row in tokens(16)]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=3, report_to=[], use_cpu=True, gradient_checkpointing=True, disable_tqdm=True
    )
    Trainer(tuned, arguments, train_dataset=data).train()
    expected = tuned(tokens()).logits
    tuned.save_pretrained(tmp_path / "adapter")
    config, base = open_checkpoint(tmp_path / "model")
    reader = LoraReader(base, tmp_path / "adapter", config)
    assert reader.merged == 12
    from peft import PeftModel

    merged = PeftModel.from_pretrained(load_model(tmp_path / "model"), tmp_path / "adapter").merge_and_unload()
    found = CqilModel(merged, p=2, start=1, end=5)(tokens()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert cqil_trt.CqilModel is CqilModel


def test_a_range_beyond_the_model_is_refused(tmp_path):
    make_model(tmp_path)
    with pytest.raises(UserError, match="beyond the model"):
        CqilModel(load_model(tmp_path), p=2, start=2, end=8)


def test_loading_with_an_adapter_equals_peft(tmp_path):
    from peft import PeftModel

    from cqil_trt.reference import load_hugging_face

    make_adapter(make_model(tmp_path / "model"), tmp_path / "adapter")
    found = load_hugging_face(str(tmp_path / "model"), str(tmp_path / "adapter"))(tokens()).logits
    unmerged = PeftModel.from_pretrained(load_model(tmp_path / "model"), tmp_path / "adapter")(tokens()).logits
    torch.testing.assert_close(found, unmerged, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="gone"):
        load_hugging_face(str(tmp_path / "nowhere"))


def test_soft_caps_do_not_depend_on_what_transformers_attends_with_by_default(tmp_path, monkeypatch):
    from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

    # As up to release 5.20, which then chose PyTorch's own attention, and no cap.
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    architecture, changes = FAMILIES["gemma2"]
    path = make_model(tmp_path / "model", architecture, seed=SEED, **changes)
    judge, ids = load_model(path), tokens()
    expected = Formulas(judge.config, judge.state_dict()).logits(ids).numpy()
    for network in (judge, load_hugging_face(str(path)), from_reader(*open_checkpoint(path))):
        with torch.inference_mode():
            found = network.cpu()(ids, use_cache=False).logits.numpy()
        assert relative(found, expected) < 1e-5
