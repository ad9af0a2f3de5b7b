"""Readers against the libraries that wrote the files, and what they say about files that are damaged."""

import json
import pickle
import resource
import shutil
import struct
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import write_json
from support.cases import FAMILIES
from support.checkpoints import checkpoint_logits, load_model, make_adapter, make_first_llama, make_model, write_gguf
from support.processes import assert_user_error, build

import cqil_trt
from cqil_trt import families, reference
from cqil_trt.backends.torch.quantized import take_quantized
from cqil_trt.checkpoint import Checkpoint, write_rank
from cqil_trt.config import CqilConfig, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.families.layout import checkpoint_shapes
from cqil_trt.shard import plan
from cqil_trt.weights import SafetensorsReader, TorchReader, check_shapes, open_checkpoint


def expected_tensors(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").state_dict()


def assert_reads(reader, expected):
    for name, tensor in expected.items():
        assert torch.equal(reader.read(name), tensor), name
        assert reader.dtype(name) == tensor.dtype
        rows = (len(tensor) // 3, len(tensor) // 3 + max(1, len(tensor) // 2))
        assert torch.equal(reader.read(name, rows), tensor[slice(*rows)])
        if tensor.dim() == 2:
            columns = (tensor.shape[1] // 4, tensor.shape[1] // 2)
            assert torch.equal(reader.read(name, rows, columns), tensor[slice(*rows), slice(*columns)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", ["50GB", "20KB"])
def test_safetensors(dtype, shards, tmp_path):
    make_model(tmp_path, save_dtype=dtype, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "20KB")
    model, reader = open_checkpoint(tmp_path)
    check_shapes(reader, checkpoint_shapes(model))
    assert_reads(reader, expected_tensors(tmp_path))


def test_pytorch_bin(tmp_path):
    make_model(tmp_path, save_dtype=torch.float16)
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert_reads(open_checkpoint(tmp_path)[1], tensors)

    (tmp_path / "pytorch_model.bin").unlink()
    halves = {"a.bin": names[::2], "b.bin": names[1::2]}
    for file, members in halves.items():
        torch.save({name: tensors[name] for name in members}, tmp_path / file)
    weight_map = {name: file for file, members in halves.items() for name in members}
    write_json(tmp_path / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    assert_reads(open_checkpoint(tmp_path)[1], tensors)


def random_like(tensors, seed):
    torch.manual_seed(seed)
    return {name: torch.randn_like(tensor) * tensor.float().std() for name, tensor in tensors.items()}


def save_bin(tensors, directory):
    (directory / "model.safetensors").unlink()
    torch.save(tensors, directory / "pytorch_model.bin")


def save_in_two(tensors, directory, kind="safetensors", index=None):
    """Two files and their index; `index` is written instead of the right weight_map."""
    stem, save = ("model", save_file) if kind == "safetensors" else ("pytorch_model", torch.save)
    suffix = kind if kind == "safetensors" else "bin"
    (directory / "model.safetensors").unlink(missing_ok=True)
    names = sorted(tensors)
    weight_map = {}
    for number, members in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{number:05}-of-00002.{suffix}"
        save({name: tensors[name] for name in members}, directory / file)
        weight_map |= dict.fromkeys(members, file)
    entries = {"metadata": {}, "weight_map": weight_map if index is None else index(weight_map)}
    write_json(directory / f"{stem}.{suffix}.index.json", entries)


def edit_config(directory, **changes):
    values = json.loads((directory / "config.json").read_text())
    values = {name: value for name, value in {**values, **changes}.items() if value is not ...}
    write_json(directory / "config.json", values)


def other_head(tensors):
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].flip(0).contiguous()}


def same_head(tensors):
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def renamed(tensors, **names):
    return {names.get(name.split(".")[-2], name): tensor for name, tensor in tensors.items()}


def without_prefix(tensors):
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def with_extras(tensors):
    extras = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "steps": torch.arange(3)}
    return {**tensors, **extras}


def both_files(save_first, save_second):
    """Two checkpoints in one directory, of different weights: which one is read?"""

    def arrange(tensors, directory):
        save_first(tensors, directory)
        kept = (directory / "model.safetensors").read_bytes() if save_first is keep else None
        save_second(random_like(tensors, 1), directory)
        if kept:
            (directory / "model.safetensors").write_bytes(kept)

    return arrange


def keep(tensors, directory):
    save_file(tensors, directory / "model.safetensors")


TIED = {"tie_word_embeddings": True}
# How a checkpoint lies in its directory: what the model has, and how its tensors and configuration are changed.
LAYOUTS = {
    "tied, one table": (TIED, lambda t, d: None),
    "tied, two equal tables": (TIED, lambda t, d: keep(same_head(t), d)),
    "tied, two unequal tables": (TIED, lambda t, d: keep(other_head(t), d)),
    "tied, two unequal tables, bin": (TIED, lambda t, d: save_bin(other_head(t), d)),
    "tied, only the last projection": (TIED, lambda t, d: keep(renamed(t, embed_tokens="lm_head.weight"), d)),
    "tied, names of the base model": (TIED, lambda t, d: keep(without_prefix(t), d)),
    "names of the base model": ({}, lambda t, d: keep(without_prefix(t), d)),
    "names of the base model, sharded": ({}, lambda t, d: save_in_two(without_prefix(t), d)),
    "tensors nobody asks for": ({}, lambda t, d: keep(with_extras(t), d)),
    "tensors nobody asks for, bin": ({}, lambda t, d: save_bin(with_extras(t), d)),
    "one file beside an index": ({}, both_files(keep, save_in_two)),
    "one file beside a bin": ({}, both_files(keep, save_bin)),
    "an index beside a bin": ({}, both_files(save_in_two, lambda t, d: torch.save(t, d / "pytorch_model.bin"))),
    "a bin beside its index": (
        {},
        both_files(save_bin, lambda t, d: save_in_two(t, d, "bin")),
    ),
    "a file that config.json names": (
        {},
        lambda t, d: (
            save_file(t, d / "other.safetensors"),
            keep(random_like(t, 1), d),
            edit_config(d, transformers_weights="other.safetensors"),
        ),
    ),
    "an index of wrong files": ({}, lambda t, d: save_in_two(t, d, index=lambda m: dict(zip(m, reversed(m.values()))))),
    "an index of some tensors": ({}, lambda t, d: save_in_two(t, d, index=lambda m: dict([*m.items()][len(m) // 3 :]))),
    "LLaMAForCausalLM": ({}, lambda t, d: edit_config(d, architectures=["LLaMAForCausalLM"])),
    "no architectures": ({}, lambda t, d: edit_config(d, architectures=...)),
    "architectures of another class": ({}, lambda t, d: edit_config(d, architectures=["LlamaModel"])),
    "mistral as LlamaForCausalLM": (
        {},
        lambda t, d: edit_config(d, model_type="mistral", architectures=["LlamaForCausalLM"], sliding_window=None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_gives_the_logits_that_transformers_gives(name, tmp_path):
    changes, arrange = LAYOUTS[name]
    make_model(tmp_path, num_hidden_layers=3, **changes)
    arrange(load_file(tmp_path / "model.safetensors"), tmp_path)
    assert_logits_of_transformers(tmp_path)


def assert_logits_of_transformers(directory):
    checkpoint, prompt = Checkpoint(directory, None), torch.randint(3, 131, (40,)).tolist()
    with torch.inference_mode():
        expected = load_model(directory)(torch.tensor([prompt]), use_cache=False).logits[0]
    for found in (
        checkpoint_logits(checkpoint, prompt),
        reference.score(reference.from_reader(checkpoint.model, checkpoint.reader), prompt),
        reference.score(reference.load_hugging_face(str(directory)), prompt),
    ):
        assert (found - expected).norm() < 1e-5 * expected.norm()


def test_an_adapter_fits_a_checkpoint_without_the_prefix(tmp_path):
    model = make_model(tmp_path / "model", num_hidden_layers=2)
    adapter = make_adapter(model, tmp_path / "adapter")
    keep(without_prefix(load_file(model / "model.safetensors")), model)
    checkpoint, prompt = Checkpoint(model, adapter), torch.randint(3, 131, (40,)).tolist()
    judge = reference.score(reference.load_hugging_face(str(model), str(adapter)), prompt)
    found = checkpoint_logits(checkpoint, prompt)
    assert (found - judge).norm() < 1e-5 * judge.norm()


def test_a_configuration_without_model_type_goes_by_its_architecture(tmp_path):
    make_model(tmp_path, "Qwen2ForCausalLM", num_hidden_layers=2)
    edit_config(tmp_path, model_type=...)
    checkpoint, prompt = Checkpoint(tmp_path, None), torch.randint(3, 131, (40,)).tolist()
    judge = reference.score(reference.load_hugging_face(str(tmp_path)), prompt)
    found = checkpoint_logits(checkpoint, prompt)
    assert (found - judge).norm() < 1e-5 * judge.norm()


def test_the_first_llama_conversions(tmp_path):
    """The layout of early 2023: .bin parts, rotary frequencies among the weights, class and lengths under old names."""
    make_first_llama(tmp_path, save_dtype=torch.float16)
    checkpoint = Checkpoint(tmp_path, None)
    assert (checkpoint.model.max_position, checkpoint.model.dtype) == (2048, "float16")
    assert checkpoint.model.eos_token_ids == (1,)
    assert_logits_of_transformers(tmp_path)


def test_a_pickle_in_a_bin_file_does_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "it ran"), "w"))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Harmful()}))
    with pytest.raises(UserError, match="weights_only"):
        TorchReader(tmp_path / "pytorch_model.bin")
    torch.save({"a": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="weights_only"):
        TorchReader(tmp_path / "pytorch_model.bin")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("quantization", ["F32", "F16", "Q8_0", "Q4_1"])
def test_gguf_gives_the_tensors_and_configuration_that_transformers_reads(quantization, tmp_path):
    """A LLaMA checkpoint written as llama.cpp writes it (q and k rows permuted), read by us and by transformers."""
    from transformers import AutoModelForCausalLM

    heads, kv_heads, hidden, inner, layers = 4, 2, 64, 96, 2
    source = make_model(
        tmp_path / "hf", num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner, head_dim=16,
        num_attention_heads=heads, num_key_value_heads=kv_heads, rope_parameters={"rope_theta": 12345.0},
    )  # fmt: skip
    path = write_gguf(tmp_path / "model.gguf", source, quantization)

    model, reader = open_checkpoint(path)
    check_shapes(reader, checkpoint_shapes(model))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert_reads(reader, reference.state_dict())
    config = reference.config
    assert model.rope.theta == config.rope_parameters["rope_theta"] == 12345.0
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (heads, kv_heads, config.head_dim)
    assert model.rms_norm_eps == config.rms_norm_eps and model.num_layers == config.num_hidden_layers


def test_gguf_codes_are_those_of_the_file(tmp_path):
    """Q4_0, in the engine too, against the gguf package; other types are not taken as codes."""
    source = make_model(tmp_path / "hf", num_hidden_layers=2, hidden_size=96, intermediate_size=160, head_dim=16)
    path = write_gguf(tmp_path / "model.gguf", source, "Q4_0")
    checkpoint, dense = (Checkpoint(path, None) for _ in range(2))
    stored = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
    for name in checkpoint.reader.quantized_names:
        matrix = checkpoint.reader.quantized(name)
        assert torch.equal(matrix.dequantize(), dense.reader.read(name)), name
    up = checkpoint.reader.quantized("model.layers.1.mlp.up_proj.weight")
    assert np.array_equal(up.dequantize().numpy(), stored["blk.1.ffn_up.weight"])
    assert checkpoint.own_format("float16") == ("int4g32", ())
    # Scales of float16 are not exact in bfloat16.
    assert checkpoint.own_format("bfloat16") is None

    limits = EngineLimits(dtype="float16", weights="int4g32", max_seq_len=16)
    checkpoint.quantize(limits)
    for rank in plan(checkpoint.model, CqilConfig(p=3, placement="tensor"), "float16", "int4g32"):
        write_rank(tmp_path / "rank.safetensors", rank, checkpoint.reader)
        weights = load_file(tmp_path / "rank.safetensors")
        take_quantized(rank, weights, torch.float32)
        for tensor in plan(checkpoint.model, CqilConfig(p=3, placement="tensor"))[rank.rank].tensors:
            if tensor.name.startswith("layers.") and "norm" not in tensor.name:
                assert torch.equal(weights[tensor.name], torch.cat(list(tensor.blocks(dense.reader)))), tensor.name

    for other in ("Q4_1", "Q8_0", "F16"):
        found = Checkpoint(write_gguf(tmp_path / f"{other}.gguf", source, other), None)
        assert not found.reader.quantized_names and found.own_format("float16") is None


# Of a small Gemma a file does not say all: see GGUF_FAMILIES.
@pytest.mark.parametrize("architecture", [f.architecture for f in families.all_families() if f.gguf and not f.refused])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_gguf_gives_the_logits_of_what_it_was_converted_from(architecture, changes, tmp_path):
    if "mlp_bias" in changes and architecture != "LlamaForCausalLM":
        changes = {"rope_parameters": {"rope_theta": 1e6}}
    # Some configurations have no head_dim: it is the hidden size shared out among the heads.
    head_dim = 16 if hasattr(getattr(transformers, architecture).config_class(), "head_dim") else 8
    source = make_model(tmp_path / "hf", architecture, num_hidden_layers=2, head_dim=head_dim, **changes)
    assert_converted(write_gguf(tmp_path / "model.gguf", source), source)


# What GGUF does not say is what llama.cpp takes for granted: which layers have windows, and the scale of scores.
GGUF_FAMILIES = {
    "gemma2": {"query_pre_attn_scalar": 12},
    "gemma3": {"query_pre_attn_scalar": 12, "sliding_window_pattern": 6},
    "smollm3": {"no_rope_layers": None},
    "granite": {},
    "olmo2": {},
    "olmo3": {},
    "phi3-partial": {},
    "phi3-longrope": {},
}


@pytest.mark.parametrize("name", GGUF_FAMILIES)
def test_gguf_of_families_with_more_than_llama_has(name, tmp_path):
    architecture, changes = FAMILIES[name]
    source = make_model(tmp_path / "hf", architecture, **{**changes, **GGUF_FAMILIES[name]})
    path = write_gguf(tmp_path / "model.gguf", source)
    checkpoint = assert_converted(path, source)
    model, reader = open_checkpoint(source)
    described = {
        field: getattr(checkpoint.model, field) for field in ("architecture", "windowed", "unrotated", "ropes")
    }
    assert described.pop("ropes") == pytest.approx(model.ropes) or name == "phi3-longrope"
    assert described == {field: getattr(model, field) for field in described}
    for tensor in reader.shapes():
        torch.testing.assert_close(checkpoint.reader.read(tensor), reader.read(tensor), rtol=0, atol=1e-6)


def assert_converted(path, source):
    checkpoint, prompt = Checkpoint(path, None), torch.randint(3, 131, (40,)).tolist()
    expected = reference.score(load_model(source), prompt)
    judge = reference.score(reference.load_hugging_face(checkpoint.source.model), prompt)
    for found in (checkpoint_logits(checkpoint, prompt), judge):
        assert (found - expected).norm() < 1e-5 * expected.norm()
    return checkpoint


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A GGUF file in parts, with what scales rope in two of them, and where it came from."""
    root = tmp_path_factory.mktemp("split")
    source = make_model(root / "hf", num_hidden_layers=3)

    def add(writer):
        writer.add_rope_scaling_factor(4.0)
        writer.add_tensor("rope_freqs.weight", np.full(4, 0.25, np.float32))  # what undoes the factor

    first = write_gguf(root / "model.gguf", source, add=add, split_max_tensors=8)
    parts = sorted(root.glob("*.gguf"))
    assert parts[0] == first and len(parts) == 4
    return source, parts


@pytest.mark.parametrize("given_part", range(4))
def test_a_gguf_file_in_parts_is_one_whichever_part_is_given(given_part, split):
    source, parts = split
    checkpoint = assert_converted(parts[given_part], source)
    # The part with the metadata, where the tokenizer is, too.
    assert checkpoint.source.model == str(parts[0])


def test_a_gguf_file_in_more_parts_than_stay_open_is_one(tmp_path):
    source = make_model(tmp_path / "hf", num_hidden_layers=3)
    first = write_gguf(tmp_path / "model.gguf", source, split_max_tensors=1)
    assert len(list(tmp_path.glob("*.gguf"))) > 16
    assert_converted(first, source)


def copied(split, directory):
    return [shutil.copy(part, directory) for part in split[1]]


SPOILED = {
    "a missing part": (lambda parts: parts[2].unlink(), "00003-of-00004.gguf: no such file .*4 parts"),
    "the first one missing": (lambda parts: parts[0].unlink(), "00001-of-00004.gguf: no such file"),
    "parts that changed places": (
        lambda parts: (parts[1].rename("x"), parts[2].rename(parts[1]), Path("x").rename(parts[2])),
        "00002-of-00004.gguf: holds part 3 of 4",
    ),
    "a part twice": (lambda parts: shutil.copy(parts[1], parts[2]), "00003-of-00004.gguf: holds part 2 of 4"),
    "a damaged part": (lambda parts: parts[3].write_bytes(b"GGUF"), "00004-of-00004.gguf: corrupt"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_parts_of_a_gguf_file_that_do_not_fit_are_named(name, split, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil, message = SPOILED[name]
    parts = [Path(part) for part in copied(split, tmp_path)]
    spoil(parts)
    with pytest.raises(UserError, match=message):
        open_checkpoint(parts[1])


def test_a_part_of_a_gguf_file_under_another_name_is_refused(split, tmp_path):
    path = Path(shutil.copy(split[1][0], tmp_path / "model.gguf"))
    with pytest.raises(UserError, match="model.gguf: holds part 1 of 4"):
        open_checkpoint(path)


def test_parts_of_two_gguf_files_are_refused(split, tmp_path):
    parts = [Path(part) for part in copied(split, tmp_path)]
    source = make_model(tmp_path / "hf", num_hidden_layers=4)
    write_gguf(tmp_path / "other.gguf", source, split_max_tensors=11)
    others = sorted(tmp_path.glob("other-*.gguf"))
    assert len(others) == len(parts)
    shutil.copy(others[3], parts[3])
    with pytest.raises(UserError, match="00004-of-00004.gguf: belongs to another file"):
        open_checkpoint(parts[0])


@pytest.mark.parametrize("kind", [0, 5, 12])  # uint8, int32, float64
@pytest.mark.parametrize("count", [1000, 1 << 40])
def test_a_gguf_array_that_goes_beyond_its_file(kind, count, tmp_path):
    """As one damaged bit makes it; the gguf package would go on until memory ends."""
    key = b"general.tags"
    field = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, kind, count)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field + bytes(64))
    with pytest.raises(UserError, match="model.gguf: corrupt or truncated GGUF file"):
        open_checkpoint(tmp_path / "model.gguf")


def test_gguf_bounds_and_names(tmp_path):
    for number, (blocks, name, message) in enumerate(
        [
            (5_000_000, "token_embd.weight", "block_count"),
            (0, "token_embd.weight", "block_count"),
            (2, "blk.0.weight", "GGUF"),
        ]
    ):
        path = tmp_path / f"{number}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(blocks)
        writer.add_context_length(64)
        writer.add_embedding_length(32)
        writer.add_feed_forward_length(64)
        writer.add_head_count(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tensor(name, np.zeros((8, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UserError, match=message):
            open_checkpoint(path)


def small_file(path):
    save_file({"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5)}, path)
    return path.read_bytes()


DAMAGE = {
    "cut in the data": lambda raw: raw[:-3],
    "cut in the header": lambda raw: raw[:20],
    "empty": lambda raw: b"",
    "length beyond the file": lambda raw: (10**6).to_bytes(8, "little") + raw[8:],
    "absurd length": lambda raw: (2**63 + 5).to_bytes(8, "little") + raw[8:],
    "not JSON": lambda raw: raw[:8] + b"x" + raw[9:],
    "overlapping offsets": lambda raw: raw.replace(b"[48,68]", b"[40,60]"),
    "offsets and shape disagree": lambda raw: raw.replace(b"[3,4]", b"[3,3]"),
    "data after the end": lambda raw: raw + b"1234",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_safetensors_file_is_refused(damage, tmp_path):
    path = tmp_path / "model.safetensors"
    raw = small_file(path)
    damaged = DAMAGE[damage](raw)
    assert damaged != raw
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="corrupt or truncated") as caught:
        SafetensorsReader(path)
    assert str(path) in str(caught.value)


@settings(max_examples=300, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_safetensors_are_read_or_refused(data, tmp_path):
    path = tmp_path / "model.safetensors"
    raw = bytearray(small_file(path))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(["set", "insert", "cut", "digits"])):
            case "set":
                raw[position] = data.draw(st.integers(0, 255))
            case "insert":
                raw[position:position] = data.draw(st.binary(max_size=12))
            case "cut":
                del raw[position : position + data.draw(st.integers(1, 30))]
            case "digits":
                raw[position:position] = b"9" * data.draw(st.integers(1, 25))
        if not raw:
            raw = bytearray(b"\0")
    path.write_bytes(raw)
    try:
        reader = SafetensorsReader(path)
        for name in reader.shapes():
            reader.read(name)
    except UserError as error:
        assert "\n" not in str(error)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=300, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_configurations_are_read_or_refused(data, tmp_path_factory, fuzz_model):
    values = json.loads((fuzz_model / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        field = data.draw(st.sampled_from(sorted(values)))
        if data.draw(st.booleans()):
            values[field] = data.draw(JUNK)
        elif data.draw(st.booleans()):
            values[field] = data.draw(st.integers(-2, 10**12))
        else:
            values.pop(field)
    directory = tmp_path_factory.mktemp("fuzz")
    write_json(directory / "config.json", values)
    (directory / "model.safetensors").symlink_to(fuzz_model / "model.safetensors")
    from cqil_trt.builder import BuildRequest, prepare

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        prepare(BuildRequest(model=directory, p=2))
    except UserError as error:
        assert "\n" not in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kilobytes


@settings(max_examples=100, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=200))
def test_a_configuration_of_any_bytes_is_refused(raw, tmp_path):
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(UserError, match="config.json"):
        open_checkpoint(tmp_path)


def test_deeply_nested_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not valid JSON"):
        open_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def fuzz_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def test_an_index_cannot_point_outside_its_directory(tmp_path):
    make_model(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    name = next(iter(values["weight_map"]))
    for file in ("../model.safetensors", "/etc/passwd", 7):
        write_json(index, {"weight_map": {**values["weight_map"], name: file}})
        with pytest.raises(UserError, match="not a file name"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "model.bin", 7])
def test_a_configuration_cannot_name_weights_elsewhere(name, tmp_path):
    make_model(tmp_path)
    edit_config(tmp_path, transformers_weights=name)
    with pytest.raises(UserError, match="transformers_weights"):
        open_checkpoint(tmp_path)


def test_a_checkpoint_that_does_not_match_its_configuration_is_refused(tmp_path):
    make_model(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for change, message in (({"num_hidden_layers": 7}, "no tensor"), ({"intermediate_size": 96}, "has shape")):
        write_json(tmp_path / "config.json", {**values, **change})
        model, reader = open_checkpoint(tmp_path)
        with pytest.raises(UserError, match=message):
            check_shapes(reader, checkpoint_shapes(model))


def test_importing_the_library_imports_nothing_heavy():
    code = "import sys, cqil_trt; assert not {'torch', 'transformers', 'numpy', 'mpi4py'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def set_value(file, name, value):
    """One element of a tensor in a safetensors file."""
    tensors = load_file(file)
    tensors[name].view(-1)[torch.randint(tensors[name].numel(), ())] = value
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"dtype": "bfloat16"}, {"quantize": "int8"}])
def test_weights_that_are_not_finite_are_refused(value, options, tmp_path):
    source, name = make_model(tmp_path / "model"), "model.layers.2.post_attention_layernorm.weight"
    set_value(source / "model.safetensors", name, float(value))
    with pytest.raises(UserError, match=f"model.safetensors: {name} holds a value that is not finite$"):
        cqil_trt.build(model=source, probes="never", output=tmp_path / "engine", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_an_adapter_that_is_not_finite_is_refused(tmp_path):
    source = make_model(tmp_path / "model")
    adapter = make_adapter(source, tmp_path / "adapter")
    part = "base_model.model.model.layers.3.mlp.down_proj.lora_B.weight"
    set_value(adapter / "adapter_model.safetensors", part, float("nan"))
    done = build("--model", source, "--lora", adapter, "--output", tmp_path / "engine", "--probes", "always")
    assert_user_error(done, f"{adapter}: model.layers.3.mlp.down_proj.weight holds a value that is not finite")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "adapter"}


def test_weights_beyond_the_type_of_the_engine_are_refused(tmp_path):
    source, name = make_model(tmp_path / "model"), "model.layers.1.self_attn.o_proj.weight"
    for value, options, said in [
        (-65520.0, {"dtype": "float16"}, "holds -65520, which float16 cannot hold: use --dtype bfloat16"),
        (3.4e38, {"dtype": "float16"}, r"holds 3.4e\+38, which float16 cannot hold: use --dtype float32"),
        (3.4e38, {"dtype": "bfloat16"}, r"holds 3.4e\+38, which bfloat16 cannot hold: use --dtype float32"),
        (65519.0, {"dtype": "float16"}, None),  # rounds to 65504, the largest
        (3.4e38, {}, None),
    ]:
        set_value(source / "model.safetensors", name, value)
        with nullcontext() if said is None else pytest.raises(UserError, match=f"{name} {said}$"):
            cqil_trt.build(model=source, probes="never", force=True, output=tmp_path / "engine", **options)
        make_model(tmp_path / "model")


def test_stored_scales_that_are_not_finite_are_refused(tmp_path):
    source = make_model(tmp_path / "model", hidden_size=96, intermediate_size=160, head_dim=16)
    path = write_gguf(tmp_path / "model.gguf", source, "Q4_0")
    [damaged] = [tensor for tensor in gguf.GGUFReader(path, "r+").tensors if tensor.name == "blk.1.ffn_up.weight"]
    damaged.data.reshape(-1)[:2] = np.frombuffer(np.float16("inf").tobytes(), "u1")
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight, in its scales, holds a value that is not finite"):
        cqil_trt.build(model=path, quantize="stored", dtype="float16", probes="never", output=tmp_path / "engine")
