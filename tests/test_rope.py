"""Rotary embedding: parameters, frequencies and logits against transformers' own, for every type and any spelling."""

import copy
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import SEED, write_json
from support.batches import Batch, score
from support.cases import FAMILIES
from support.checkpoints import checkpoint_logits, load_model, make_model, write_gguf
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import cqil_trt
from cqil_trt import backends, families, reference
from cqil_trt.backends.torch.opening import open_session
from cqil_trt.backends.torch.session import TorchSession
from cqil_trt.checkpoint import Checkpoint
from cqil_trt.config import EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.model import ModelConfig
from cqil_trt.network.rotary import decode_tables, dynamic_frequencies, inverse_frequencies
from cqil_trt.rope import RopeConfig

logging.getLogger("transformers").setLevel(logging.CRITICAL)

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
}
TYPES = ["default", "linear", "dynamic", "yarn", "llama3", "longrope", "su", "mrope", "proportional", None]
factors = st.sampled_from([1, 2, 4.0, 1.1, 2.5, 40])


def parameters():
    """rope_parameters or rope_scaling, with fields that belong to the type, or do not, or are missing."""
    return st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(TYPES),
            "rope_type": st.sampled_from(TYPES),
            "rope_theta": st.sampled_from([10000, 10000.0, 500000.0, 1e6]),
            "factor": factors | st.none(),
            "original_max_position_embeddings": st.sampled_from([64, 4096, 32768]),
            "low_freq_factor": st.sampled_from([1, 1.0, 2.0]),
            "high_freq_factor": st.sampled_from([4, 4.0, 32.0]),
            "attention_factor": st.sampled_from([None, 1, 0.7, 1.3]),
            "beta_fast": st.sampled_from([None, 0, 32, 16.0, 100]),
            "beta_slow": st.sampled_from([None, 1, 2.0]),
            "mscale": st.sampled_from([None, 0, 1.0, 0.7]),
            "mscale_all_dim": st.sampled_from([None, 0, 1.0, 0.9]),
            "truncate": st.booleans() | st.none(),
            "short_factor": st.sampled_from([[1.0] * 32, [1.5] * 31 + [2]]),
            "long_factor": st.sampled_from([[4] * 32, [1.1] * 16 + [30.0] * 16]),
        },
    )


def complete(kind, factor=2.0, **more):
    return {"rope_type": kind, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **more}


def of_its_type():
    kinds = st.sampled_from(["linear", "dynamic", "yarn", "yarn", "llama3", "llama3", "longrope", "longrope"])
    factors = {"short_factor": [1.25] * 32, "long_factor": [2.5] * 32}
    return st.builds(lambda kind, more: {**complete(kind, **factors), **more, "rope_type": kind}, kinds, parameters())


def transformers_rotary(values):
    """transformers' module for a config.json, or None where it has none for it."""
    try:
        return LlamaRotaryEmbedding(transformers.LlamaConfig.from_dict(copy.deepcopy(values)))
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return None


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scaling=st.sampled_from([..., None, {}]) | parameters() | of_its_type(),
    standard=st.sampled_from([..., None]) | parameters(),
    theta=st.sampled_from([..., 20000, 1e5]),
    original=st.sampled_from([..., ..., 2048]),
    positions=st.sampled_from([2048, 4096, 131072]),
)
def test_any_spelling_means_what_transformers_takes_it_for(scaling, standard, theta, original, positions, tmp_path):
    given_fields = {
        "rope_scaling": scaling,
        "rope_parameters": standard,
        "rope_theta": theta,
        "original_max_position_embeddings": original,
    }
    values = SMALL | {"max_position_embeddings": positions}
    values |= {name: value for name, value in given_fields.items() if value is not ...}
    expected = transformers_rotary(values)
    try:
        model = families.read_config(write_json(tmp_path / "config.json", values))
    except UserError as error:
        # What transformers can compute is refused only for its type.
        unsupported = expected is not None and expected.rope_type == "proportional"
        assert expected is None or (unsupported and expected.rope_type in str(error)), (values, str(error))
        return
    assert expected is not None, values
    assert model.rope.kind == expected.rope_type
    assert torch.equal(torch.tensor(inverse_frequencies(model)), expected.inv_freq), values
    assert model.rope.attention_factor == expected.attention_scaling
    assert ModelConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model
    # The reference that judges weights of any reader is made from our description.
    kind, config = reference.hugging_face_config(model)
    rotary = LlamaRotaryEmbedding(config)
    assert torch.equal(rotary.inv_freq, expected.inv_freq)
    assert rotary.attention_scaling == expected.attention_scaling


def test_an_engine_from_before_scaled_rope_still_describes_its_model():
    old = {"theta": 5e5, "kind": "linear", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert RopeConfig.from_dict({**old, "original_max_position": 8192}) == RopeConfig(
        theta=5e5, kind="linear", factor=2.0
    )


def session_of(directory, output, **options) -> TorchSession:
    """One rank of a fresh engine, in this process."""
    return TorchSession(cqil_trt.build(model=directory, p=1, output=output, probes="never", **options), None, 2)


def relative(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def prompt_of(length, seed=0):
    return np.random.default_rng(SEED + seed).integers(3, 131, length).tolist()


def positions(count):
    return {"max_position_embeddings": count}


OF_32 = {"original_max_position_embeddings": 32}
SCALED = {
    # As Qwen's model cards tell to extend the context, at a thousandth of the size.
    "qwen2.5": ("Qwen2ForCausalLM", positions(32), complete("yarn", 4.0, **OF_32)),
    "qwen3": ("Qwen3ForCausalLM", positions(40), complete("yarn", 4.0, **OF_32)),
    "yarn-mscale": (
        "LlamaForCausalLM",
        positions(32),
        complete("yarn", 8.0, mscale=1.0, mscale_all_dim=0.7, beta_fast=8, beta_slow=2, truncate=False),
    ),
    "linear": ("LlamaForCausalLM", positions(32), {"type": "linear", "factor": 4.0}),
    "llama3": ("LlamaForCausalLM", positions(128), complete("llama3", 8.0, **OF_32)),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_rope_equals_transformers_over_the_whole_stretched_context(name, tmp_path):
    architecture, sizes, scaling = SCALED[name]
    directory = make_model(tmp_path / "model", architecture, **sizes)
    values = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", {**values, "rope_scaling": scaling})
    session = session_of(directory, tmp_path / "engine", max_seq_len=128)
    prompt = prompt_of(128)
    with torch.inference_mode():
        expected = load_model(directory)(torch.tensor([prompt]), use_cache=False).logits[0].numpy()
    assert relative(score(session, prompt), expected) < 1e-5
    batch = Batch(session, [prompt[:100]])
    for position in range(100, 128):
        batch.decode([prompt[position]])
        assert relative(batch.logits[0], expected[position]) < 1e-5
    # Without --max-seq-len an engine takes what it can, and never more.
    model = families.read_config(directory / "config.json")
    assert session_of(directory, tmp_path / "default").limits.max_seq_len == model.context >= 128
    with pytest.raises(UserError, match=f"the model's {model.context} positions"):
        EngineLimits(max_seq_len=model.context + 1).check_model(model)


ORIGINAL = 48


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    """A model with dynamic rope, and an engine of it that goes to three times its context, in chunks of 16."""
    root = tmp_path_factory.mktemp("dynamic")
    directory = make_model(
        root / "model", max_position_embeddings=ORIGINAL, rope_parameters={"rope_type": "dynamic", "factor": 3.5}
    )
    options = {"max_seq_len": 3 * ORIGINAL, "prefill_chunk": 16}
    engine = cqil_trt.build(model=directory, p=1, output=root / "engine", probes="never", **options)
    return directory, engine, open_session(engine, None, "auto", 0, 4)


@pytest.mark.parametrize("length", [7, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 100])
def test_dynamic_rope_equals_transformers_within_and_beyond_the_context(length, dynamic):
    directory, _, session = dynamic
    prompt, steps = prompt_of(length, length), 30  # from within the context to beyond it, too
    network = load_model(directory)
    with torch.inference_mode():
        expected = network(torch.tensor([prompt]), use_cache=False).logits[0].numpy()
    assert relative(score(session, prompt), expected) < 1e-5
    # A fresh model: transformers' module keeps the frequencies of the longest sequence it has seen.
    network = load_model(directory)
    batch = Batch(session, [prompt])
    new, cache = prompt, None
    for _ in range(steps):
        with torch.inference_mode():
            out = network(torch.tensor([new]), past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1]
        assert relative(batch.logits[0], logits) < 1e-5
        new = [int(logits.argmax())]
        batch.decode(new)


@pytest.fixture(scope="module")
def longrope(tmp_path_factory):
    """A Phi-3 with longrope and rotation of a part of each head, and a session that goes beyond its first context."""
    root, (architecture, changes) = tmp_path_factory.mktemp("longrope"), FAMILIES["phi3-longrope"]
    directory = make_model(root / "model", architecture, **{**changes, "original_max_position_embeddings": ORIGINAL})
    options = {"max_seq_len": 100, "prefill_chunk": 16}
    engine = cqil_trt.build(model=directory, p=1, output=root / "engine", probes="never", **options)
    return directory, open_session(engine, None, "auto", 0, 4)


@pytest.mark.parametrize("length", [7, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 80])
def test_longrope_equals_transformers_within_and_beyond_the_context(length, longrope):
    directory, session = longrope
    prompt, network, cache = prompt_of(length, length), load_model(directory), None
    with torch.inference_mode():
        expected = network(torch.tensor([prompt]), use_cache=False).logits[0].numpy()
    assert relative(score(session, prompt), expected) < 1e-5
    batch, new = Batch(session, [prompt]), prompt
    for _ in range(12):
        with torch.inference_mode():
            out = network(torch.tensor([new]), past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1]
        assert relative(batch.logits[0], logits) < 1e-5
        new = [int(logits.argmax())]
        batch.decode(new)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.2}


@pytest.mark.parametrize(
    "name, changes",
    [
        ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 777.0}),
        ("gemma3", {"rope_theta": 5e4, "rope_local_base_freq": 300.0}),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_theta": 500.0}, "full_attention": YARN}}),
        ("olmo3", {"rope_scaling": YARN, "rope_theta": 500000}),
        ("olmo3", {"rope_theta": 900.0}),
    ],
)
def test_layers_with_windows_have_their_own_rope(name, changes, tmp_path):
    architecture, sizes = FAMILIES[name]
    directory = make_model(tmp_path / "model", architecture, **sizes)
    values = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", {**{k: v for k, v in values.items() if k != "rope_parameters"}, **changes})
    checkpoint, prompt = Checkpoint(directory, None), prompt_of(60)
    expected = reference.score(load_model(directory), prompt)
    assert relative(checkpoint_logits(checkpoint, prompt), expected) < 1e-5
    network = reference.from_reader(checkpoint.model, checkpoint.reader)
    assert relative(reference.score(network, prompt), expected) < 1e-5
    assert checkpoint.model.local_rope is not None and checkpoint.model.local_rope.kind == "default"


def test_dynamic_rope_of_a_sequence_does_not_depend_on_its_batch(dynamic):
    directory, _, session = dynamic
    prompts = [prompt_of(length, length) for length in (5, 90, ORIGINAL, 60)]
    follow = prompt_of(8, 8)

    def answers(prompts):
        batch = Batch(session, prompts)
        found = [batch.logits]
        for token in follow:
            batch.decode([token] * len(prompts))
            found.append(batch.logits)
        return np.stack(found, axis=1)

    together = answers(prompts)
    for row, prompt in zip(together, prompts):
        assert relative(row, answers([prompt])[0]) < 1e-5


def test_the_reference_begins_every_sequence_anew_with_dynamic_rope(dynamic):
    directory, _, _ = dynamic
    network, prompt = reference.load_hugging_face(str(directory)), prompt_of(60)
    fresh = reference.score(load_model(directory), prompt)
    reference.score(network, prompt_of(120))
    assert torch.equal(reference.score(network, prompt), fresh)
    model = Checkpoint(directory, None)
    assert relative(reference.score(reference.from_reader(model.model, model.reader), prompt), fresh) < 1e-6


def test_rows_for_decoding_have_the_bits_of_transformers_frequencies(dynamic):
    directory, engine, _ = dynamic
    rotary = load_model(directory).model.rotary_emb
    tables = decode_tables(engine.model, engine.rotary, 3 * ORIGINAL)
    for position in range(3 * ORIGINAL):
        expected = rotary(torch.zeros(1), torch.tensor([[position]]))
        own = engine.rotary if position < ORIGINAL else dynamic_frequencies(engine.model.rope, 8, position + 1)
        assert torch.equal(torch.tensor(own), rotary.inv_freq)
        for table, wanted in zip(tables, expected):
            assert np.abs(table[position] - wanted[0, 0, : len(own)].numpy()).max() < 1e-7


@pytest.mark.parametrize("backend", [name for name in backends.names() if name != backends.PLAIN])
def test_other_backends_refuse_dynamic_rope_beyond_the_context(backend, dynamic):
    model = dynamic[1].model
    backends.load(backend).check_model(model, EngineLimits(max_seq_len=ORIGINAL))
    with pytest.raises(UserError, match=f"dynamic rope .* --max-seq-len {ORIGINAL}"):
        backends.load(backend).check_model(model, EngineLimits(max_seq_len=ORIGINAL + 1))
    longrope = replace(model, rope=RopeConfig(kind="longrope", original_max_position=ORIGINAL))
    with pytest.raises(UserError, match=f"longrope rope .* --max-seq-len {ORIGINAL}"):
        backends.load(backend).check_model(longrope, EngineLimits(max_seq_len=ORIGINAL + 1))


def test_a_gpu_is_not_given_dynamic_rope_beyond_the_context(dynamic):
    with pytest.raises(UserError, match=f"--device cuda: dynamic rope beyond {ORIGINAL} tokens"):
        open_session(dynamic[1], None, "cuda", 0, 4)


def test_tensorrt_llm_refuses_what_its_attention_has_no_parameters_for(tmp_path):
    directory = make_model(tmp_path, rope_parameters=complete("yarn", 4.0))
    model = families.read_config(directory / "config.json")
    with pytest.raises(UserError, match="yarn rope"):
        backends.load("tensorrt-llm").check_model(model, EngineLimits())


# GGUF: what llama.cpp computes


def scaled_gguf(tmp_path, add, **changes):
    source = make_model(tmp_path / "hf", max_position_embeddings=96, **changes)
    return source, write_gguf(tmp_path / "model.gguf", source, add=add)


def judged(path, source, rope, length=90):
    """Engine, reference and a Hugging Face model of these rope parameters say the same."""
    values = json.loads((source / "config.json").read_text())
    parameters = {"rope_theta": 10000.0, **rope}
    write_json(source / "config.json", {**values, "rope_parameters": parameters})
    prompt = prompt_of(length)
    expected = reference.score(load_model(source), prompt)
    opened = Checkpoint(path, None)
    assert relative(checkpoint_logits(opened, prompt), expected) < 1e-5
    assert relative(reference.score(reference.load_hugging_face(str(path)), prompt), expected) < 1e-5
    assert relative(reference.score(reference.from_reader(opened.model, opened.reader), prompt), expected) < 1e-5
    return opened.model


KEY = "llama.rope.scaling."
LINEAR = {"rope_type": "linear", "factor": 4.0}
GGUF_ROPES = {
    "linear": ({"type": "linear", "factor": 4.0}, LINEAR),
    "a factor without a type": ({"factor": 4.0}, LINEAR),
    "the key of 2023": ({"../scale_linear": 4.0}, LINEAR),
    "none": ({"type": "none", "factor": 4.0}, {"rope_type": "default"}),
    "a type without a factor": ({"type": "linear"}, {"rope_type": "default"}),
    "yarn": ({"type": "yarn", "factor": 4.0}, complete("yarn", 4.0)),
    "yarn of an original context": (
        {"type": "yarn", "factor": 4.0, "original_context_length": 32},
        complete("yarn", 4.0, original_max_position_embeddings=32),
    ),
    "yarn with its defaults": (
        {"type": "yarn", "factor": 4.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "yarn_ext_factor": 1.0},
        complete("yarn", 4.0),
    ),
}


def add_keys(keys):
    def add(writer):
        for name, value in keys.items():
            key = "llama.rope.scale_linear" if name.startswith("../") else KEY + name
            kind = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
            kind(key, value)

    return add


@pytest.mark.parametrize("name", GGUF_ROPES)
def test_gguf_scaling_is_what_llama_cpp_makes_of_it(name, tmp_path):
    keys, rope = GGUF_ROPES[name]
    source, path = scaled_gguf(tmp_path, add_keys(keys))
    model = judged(path, source, rope)
    # The length rules are those of a config.json.
    assert model.context == families.read_config(source / "config.json").context


def test_gguf_attention_factor_scales_what_the_type_gives(tmp_path):
    source, path = scaled_gguf(tmp_path, add_keys({"type": "yarn", "factor": 4.0, "attn_factor": 0.9}))
    attention = 0.9 * (0.1 * np.log(4.0) + 1)
    judged(path, source, complete("yarn", 4.0, attention_factor=attention))


def test_gguf_frequency_factors_are_those_of_llama_3(tmp_path):
    """What llama.cpp's converter writes for llama3 scaling gives the logits of the model it was converted from."""
    rope = complete("llama3", 8.0, original_max_position_embeddings=32)
    source = make_model(tmp_path / "hf", max_position_embeddings=96, head_dim=32)
    frequencies = 10000.0 ** -(np.arange(0, 32, 2) / 32)
    wavelengths = 2 * np.pi / frequencies
    smooth = (32 / wavelengths - 1.0) / (4.0 - 1.0)
    divisors = np.where(wavelengths < 8, 1.0, np.where(wavelengths > 32, 8.0, 1 / ((1 - smooth) / 8.0 + smooth)))
    assert len(set(divisors)) > 3
    path = write_gguf(
        tmp_path / "model.gguf", source, add=lambda w: w.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    )
    model = judged(path, source, rope)
    assert len(model.rope.divisors) == 16
    assert ModelConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model


def test_gguf_frequency_factors_of_one_change_nothing(tmp_path):
    ones = np.ones(4, np.float32)
    source, path = scaled_gguf(tmp_path, lambda w: w.add_tensor("rope_freqs.weight", ones))
    assert judged(path, source, {"rope_type": "default"}).rope == RopeConfig(theta=10000.0)


@pytest.mark.parametrize(
    "add, message",
    [
        (add_keys({"type": "longrope"}), "longrope"),
        (add_keys({"type": "yarn", "factor": 4.0, "yarn_beta_fast": 16.0}), "yarn_beta_fast"),
        (add_keys({"type": "yarn", "factor": 4.0, "yarn_log_multiplier": 0.1}), "yarn_log_multiplier"),
        (add_keys({"alpha": 1000.0}), "rope.scaling.alpha"),
        (add_keys({"factor": -2.0}), "rope.scaling.factor"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(3, np.float32)), "rope_freqs.weight has shape"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.zeros(4, np.float32)), "not positive"),
        (lambda w: w.add_tensor("rope_factors_long.weight", np.ones(4, np.float32)), "longrope"),
    ],
)
def test_gguf_rope_that_would_be_computed_wrongly_is_refused_by_name(add, message, tmp_path):
    path = scaled_gguf(tmp_path, add)[1]
    with pytest.raises(UserError, match=message) as caught:
        Checkpoint(path, None)
    assert str(path) in str(caught.value)
