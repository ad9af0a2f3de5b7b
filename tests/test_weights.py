"""Readers against the libraries that wrote the files, and what they say about files that are damaged."""

import json
import pickle
import resource
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from conftest import make_model, write_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cqil_trt.errors import UserError
from cqil_trt.shard import checkpoint_shapes
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
        num_attention_heads=heads, num_key_value_heads=kv_heads,
    )  # fmt: skip
    tensors = load_file(source / "model.safetensors")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(12345.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(131)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, tensor in tensors.items():
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            count = heads if "q_proj" in name else kv_heads
            values = values.reshape(count, 2, -1, hidden).swapaxes(1, 2).reshape(values.shape)
        kind = gguf.GGMLQuantizationType[quantization if values.ndim == 2 else "F32"]
        data = gguf.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model, reader = open_checkpoint(path)
    check_shapes(reader, checkpoint_shapes(model))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert_reads(reader, reference.state_dict())
    config = reference.config
    assert model.rope.theta == config.rope_parameters["rope_theta"] == 12345.0
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (heads, kv_heads, config.head_dim)
    assert model.rms_norm_eps == config.rms_norm_eps and model.num_layers == config.num_hidden_layers


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
    "data behind the end": lambda raw: raw + b"1234",
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


@settings(max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@settings(max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    from cqil_trt.builder import prepare

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        prepare(directory, p=2)
    except UserError as error:
        assert "\n" not in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kilobytes


@settings(max_examples=100, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
