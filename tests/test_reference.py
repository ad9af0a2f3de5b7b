"""The judge itself: against the untouched model bit for bit, and against the formulas written out."""

import copy

import pytest
import torch
from support import SEED
from support.checkpoints import load_model, make_adapter, make_model

from cqil_trt import families
from cqil_trt.errors import UserError
from cqil_trt.reference import CqilModel

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


class Formulas:
    """The definition of CQIL in float64, from raw weights: no module of transformers or of this project."""

    def __init__(self, state, heads, kv_heads, dim, eps=1e-6, theta=10000.0):
        self.w = {name: tensor.double() for name, tensor in state.items()}
        self.heads, self.kv_heads, self.dim, self.eps, self.theta = heads, kv_heads, dim, eps, theta

    def norm(self, x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.w[name]

    def rotate(self, x):
        positions = torch.arange(x.shape[-2]).double()[:, None]
        angles = positions * self.theta ** (-2 * torch.arange(self.dim // 2).double() / self.dim)
        pairs = torch.complex(x[..., : self.dim // 2], x[..., self.dim // 2 :]) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.cat((pairs.real, pairs.imag), -1)

    def attention(self, x, i):
        def project(name, heads):
            return (
                (x @ self.w[f"model.layers.{i}.self_attn.{name}.weight"].T)
                .unflatten(-1, (heads, self.dim))
                .transpose(1, 2)
            )

        q, k = self.rotate(project("q_proj", self.heads)), self.rotate(project("k_proj", self.kv_heads))
        v = project("v_proj", self.kv_heads)
        group = self.heads // self.kv_heads
        out = torch.zeros_like(q)
        for h in range(self.heads):
            scores = q[:, h] @ k[:, h // group].transpose(1, 2) / self.dim**0.5
            scores += torch.full_like(scores, -torch.inf).triu(1)
            out[:, h] = scores.softmax(-1) @ v[:, h // group]
        return out.transpose(1, 2).flatten(2) @ self.w[f"model.layers.{i}.self_attn.o_proj.weight"].T

    def mlp(self, x, i):
        gate, up, down = (self.w[f"model.layers.{i}.mlp.{n}_proj.weight"].T for n in ("gate", "up", "down"))
        return (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down

    def logits(self, ids, layers, p, d, start, end, bypass):
        x = self.w["model.embed_tokens.weight"][ids]
        i = 0
        while i < layers:
            size = p if start <= i < end else 1
            a = [
                self.attention(self.norm(x, f"model.layers.{layer}.input_layernorm.weight"), layer)
                for layer in range(i, i + size)
            ]
            delta = 0
            for j, layer in enumerate(range(i, i + size)):
                b = sum(a[max(0, j - d) : j], torch.zeros_like(x))
                m = self.mlp(self.norm(x + a[j] + b, f"model.layers.{layer}.post_attention_layernorm.weight"), layer)
                delta = delta + a[j] + m + (b if bypass == "residual" else 0)
            x = x + delta
            i += size
        return self.norm(x, "model.norm.weight") @ self.w["lm_head.weight"].T


@pytest.mark.parametrize("bypass", ["mlp", "residual"])
@pytest.mark.parametrize("p, d, start, end", [(2, 0, 1, 5), (2, 1, 0, 6), (3, 2, 0, 6), (4, 1, 1, 5), (4, 3, 2, 6)])
def test_groups_follow_the_definition(bypass, p, d, start, end, tmp_path):
    make_model(tmp_path, seed=SEED + p + d)
    network = load_model(tmp_path)
    expected = Formulas(network.state_dict(), 6, 2, 8).logits(tokens(), 6, p, d, start, end, bypass)
    found = CqilModel(network, p, d, start, end, bypass)(tokens()).logits
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


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
