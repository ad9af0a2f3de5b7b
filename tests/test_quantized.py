"""Quantized checkpoints against the packages that own the formats, or packers written from their documentation."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import SEED, write_json
from support.checkpoints import checkpoint_logits, load_model, make_adapter, make_model
from support.needs import need
from support.processes import build, mpirun

import cqil_trt
from cqil_trt.backends.torch.quantized import take_quantized
from cqil_trt.checkpoint import Checkpoint, write_rank
from cqil_trt.config import CqilConfig, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.families.layout import checkpoint_shapes
from cqil_trt.shard import plan
from cqil_trt.weights import check_shapes, open_checkpoint

SIZES = {"intermediate_size": 96, "save_dtype": torch.float16}
GROUP = 16


# Packers. Each gives a module's tensors, and its matrix in float32


def pack(values, bits, axis):
    """Unsigned integers in int32 words along an axis, the first in the lowest bits; the end is filled up with 0."""
    values = np.moveaxis(np.asarray(values, np.uint64), axis, -1)
    each = 32 // bits
    values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % each)])
    words = values.reshape(*values.shape[:-1], -1, each)
    words = (words << (np.arange(each, dtype=np.uint64) * np.uint64(bits))).sum(-1).astype(np.uint32)
    return torch.from_numpy(np.moveaxis(words.view(np.int32), -1, axis).copy())


def affine(weight, bits, size, rng):
    """Codes, zero points and scales (float16) of groups of columns, not as good as they could be."""
    height, width = weight.shape
    groups = weight.float().numpy().reshape(height, -1, size)
    low, high = groups.min(-1), groups.max(-1)
    scales = ((high - low) / (2**bits - 1)).astype(np.float16)
    zeros = np.clip(np.round(-low / scales.astype(np.float32)), 1, 2**bits - 1).astype(np.int64)
    codes = np.round(groups / scales.astype(np.float32)[..., None]) + zeros[..., None]
    return np.clip(codes, 0, 2**bits - 1).astype(np.int64).reshape(height, width), zeros, scales


def gptq(weight, rng, bits=4, size=GROUP, order=False, version="gptq"):
    codes, zeros, scales = affine(weight, bits, size, rng)
    height, width = codes.shape
    index = np.arange(width) // size
    if order:
        index = rng.permutation(index)
        codes = rng.integers(0, 2**bits, codes.shape)
    stored = zeros - 1 if version == "gptq" else zeros
    tensors = {
        "qweight": pack(codes.T, bits, 0),
        "qzeros": pack(stored.T, bits, 1),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.from_numpy(index.astype(np.int32)),
    }
    return tensors, (codes - zeros[:, index]).astype(np.float32) * scales.astype(np.float32)[:, index]


def awq(weight, rng, size=GROUP):
    codes, zeros, scales = affine(weight, 4, size, rng)
    index = np.arange(codes.shape[1]) // size

    def words(values):  # [rows, N]
        return pack(values.reshape(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(values), -1), 4, 1)

    tensors = {"qweight": words(codes.T), "qzeros": words(zeros.T), "scales": torch.from_numpy(scales.T.copy())}
    return tensors, (codes - zeros[:, index]).astype(np.float32) * scales.astype(np.float32)[:, index]


def fp8(weight, rng, block=None, channels=False, scale="weight_scale", shape=None):
    height, width = weight.shape
    rows, columns = block or ((1 if channels else height), width)
    wide = weight.float()
    grid = -(-height // rows), -(-width // columns)
    scales = torch.tensor(rng.uniform(0.001, 0.003, grid), dtype=torch.float32)
    each = scales.repeat_interleave(rows, 0)[:height].repeat_interleave(columns, 1)[:, :width]
    codes = (wide / each).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, scale: scales if shape is None else scales.reshape(shape)}, (codes.float() * each).numpy()


def compressed(weight, rng, kind, **weights):
    """By the package itself; scales are float32, so that it dequantizes in float32."""
    need("compressed-tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    args = scheme.weights
    height, width = weight.shape
    grid = {
        "tensor": (1,),
        "channel": (height, 1),
        "group": (height, width // (args.group_size or width)),
        "block": (-(-height // 16), -(-width // 32)),
    }[args.strategy]
    top = 448 if args.type == "float" else 2 ** (args.num_bits - 1) - 1
    scales = torch.tensor(rng.uniform(0.2, 0.5, grid), dtype=torch.float32) / top
    state = {"weight": weight.float(), "weight_scale": scales}
    if not args.symmetric:
        low = -(2 ** (args.num_bits - 1))
        state["weight_zero_point"] = torch.tensor(rng.integers(low, -low, grid), dtype=torch.int8)
    compressor = BaseCompressor.get_value_from_registry(kind)
    stored = compressor.compress(dict(state), scheme)
    truth = compressor.decompress(dict(stored), scheme)["weight"]
    assert truth.dtype == torch.float32
    return stored, truth.numpy()


def compressed_config(kind, **weights):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


GROUPED = {"strategy": "group", "group_size": GROUP}
COMPRESSED = {
    "fp8-tensor": ("float-quantized", dict(num_bits=8, type="float", strategy="tensor")),
    "fp8-channel": ("float-quantized", dict(num_bits=8, type="float", strategy="channel")),
    "fp8-block": ("float-quantized", dict(num_bits=8, type="float", strategy="block", block_structure=[16, 32])),
    "int8-channel": ("int-quantized", dict(num_bits=8, type="int", strategy="channel")),
    "int8-asymmetric": ("int-quantized", dict(num_bits=8, type="int", strategy="channel", symmetric=False)),
    "int4-group": ("int-quantized", dict(num_bits=4, type="int", **GROUPED)),
    "int4-asymmetric": ("int-quantized", dict(num_bits=4, type="int", symmetric=False, **GROUPED)),
    "w4-group": ("pack-quantized", dict(num_bits=4, type="int", **GROUPED)),
    "w4-asymmetric": ("pack-quantized", dict(num_bits=4, type="int", symmetric=False, **GROUPED)),
    "w4-channel": ("pack-quantized", dict(num_bits=4, type="int", strategy="channel")),
    "w8-group": ("pack-quantized", dict(num_bits=8, type="int", **GROUPED)),
    "w8-asymmetric-channel": ("pack-quantized", dict(num_bits=8, type="int", strategy="channel", symmetric=False)),
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
# By name: the packer of a matrix, the configuration, and the file and key that it is in.
FORMATS = {
    "gptq": (gptq, GPTQ),
    "gptq-order": (lambda w, rng: gptq(w, rng, order=True), {**GPTQ, "desc_act": True, "checkpoint_format": "gptq"}),
    "gptq-v2": (lambda w, rng: gptq(w, rng, version="gptq_v2"), {**GPTQ, "checkpoint_format": "gptq_v2"}),
    "gptq-8": (lambda w, rng: gptq(w, rng, bits=8), {**GPTQ, "bits": 8}),
    "gptq-channel": (lambda w, rng: gptq(w, rng, size=w.shape[1]), {**GPTQ, "group_size": -1}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "fp8-blocks": (
        lambda w, rng: fp8(w, rng, block=(32, 32), scale="weight_scale_inv"),
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
    ),
    "fp8-one": (
        lambda w, rng: fp8(w, rng, scale="weight_scale_inv", shape=()),
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "dynamic"},
    ),
    "fp8-rows": (
        lambda w, rng: fp8(w, rng, channels=True),
        {"quant_method": "fp8", "activation_scheme": "static"},
    ),
    "modelopt": (
        lambda w, rng: fp8(w, rng, shape=()),
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
    ),
    **{
        name: (
            lambda w, rng, kind=kind, weights=weights: compressed(w, rng, kind, **weights),
            compressed_config(kind, **weights),
        )
        for name, (kind, weights) in COMPRESSED.items()
    },
}


def quantize(source, target, packer, config, keep=lambda name: False, seed=SEED):
    """Writes the checkpoint quantized; returns the float32 matrices of its quantized modules by name."""
    rng = np.random.default_rng(seed)
    tensors, truth = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj") or keep(module):
            tensors[name] = tensor
            continue
        stored, matrix = packer(tensor, rng)
        tensors |= {f"{module}.{part}": value.contiguous() for part, value in stored.items()}
        truth[name] = torch.from_numpy(matrix)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    values = json.loads((source / "config.json").read_text())
    write_json(target / "config.json", {**values, "quantization_config": config})
    return truth


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), **SIZES)


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_the_owners(name, source, tmp_path):
    packer, config = FORMATS[name]
    truth = quantize(source, tmp_path / "quantized", packer, config)
    model, reader = open_checkpoint(tmp_path / "quantized")
    check_shapes(reader, checkpoint_shapes(model))
    assert reader.shapes().keys() == checkpoint_shapes(model).keys()
    assert reader.note.startswith(f"{len(truth)} matrices are quantized (")
    rng = np.random.default_rng(SEED)
    dense = load_file(source / "model.safetensors")
    for key in reader.shapes():
        expected = truth.get(key, dense[key])
        assert torch.equal(reader.read(key), expected), key
        assert reader.dtype(key) == expected.dtype
        if expected.dim() == 2:
            rows, columns = (sorted(rng.choice(n + 1, 2, replace=False).tolist()) for n in expected.shape)
            assert torch.equal(reader.read(key, tuple(rows), tuple(columns)), expected[slice(*rows), slice(*columns)])


def logits_of(directory, source, truth, prompt):
    """transformers' logits with the true matrices."""
    network = load_model(source)
    state = network.state_dict()
    with torch.inference_mode():
        for name, matrix in truth.items():
            state[name].copy_(matrix)
        return network(torch.tensor([prompt])).logits[0]


@pytest.mark.parametrize("name", ["gptq-order", "awq", "fp8-blocks", "modelopt", "w4-asymmetric", "fp8-channel"])
def test_the_model_is_transformers(name, source, tmp_path):
    packer, config = FORMATS[name]
    truth = quantize(source, tmp_path / "quantized", packer, config)
    prompt = np.random.default_rng(SEED).integers(3, 131, 40).tolist()
    found = checkpoint_logits(Checkpoint(tmp_path / "quantized", tokenizer=False), prompt)
    torch.testing.assert_close(found, logits_of(tmp_path, source, truth, prompt), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "p"), [("gptq-order", 2), ("awq", 4), ("w4-group", 2), ("fp8-blocks", 4)])
def test_engines_run_and_validate(name, p, source, tmp_path):
    packer, config = FORMATS[name]
    quantize(source, tmp_path / "quantized", packer, config)
    flags = ("--p", p, "--start", 1, "--end", 5, "--dtype", "float32", "--output", tmp_path / "engine")
    done = build("--model", tmp_path / "quantized", *flags)
    assert done.returncode == 0, done.stderr
    assert re.search(r"note +.*: 42 matrices are quantized \(.*\); the engine stores them in float32", done.stdout)
    ids = write_json(tmp_path / "ids.json", [[5, 9, 77], [8] * 20])
    done = mpirun(p, "--engine", tmp_path / "engine", "--token-ids", ids, "--max-new-tokens", 8, "--validate")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validation passed: all ranks hold identical bits" in done.stdout


def test_an_adapter_is_merged_into_the_dequantized_weights(source, tmp_path):
    packer, config = FORMATS["gptq"]
    truth = quantize(source, tmp_path / "quantized", packer, config)
    adapter = make_adapter(source, tmp_path / "adapter")
    found = Checkpoint(tmp_path / "quantized", adapter, tokenizer=False)
    plain = Checkpoint(source, adapter, tokenizer=False)
    dense = load_file(source / "model.safetensors")
    for name, matrix in truth.items():
        change = plain.reader.read(name).float() - dense[name].float()
        torch.testing.assert_close(found.reader.read(name).float() - matrix, change, atol=2e-6, rtol=0)


STORED = {
    "gptq": ("int4g16", "float16"),
    "gptq-v2": ("int4g16", "float16"),
    "awq": ("int4g16", "float16"),
    "w4-group": ("int4g16", "float32"),
    "int4-group": ("int4g16", "float32"),
    "int4-asymmetric": ("int4g16", "float32"),
    "w4-asymmetric": ("int4g16", "float32"),
    "fp8-tensor": ("fp8", "float16"),
    "fp8-channel": ("fp8", "bfloat16"),
    "modelopt": ("fp8", "float16"),
    "int8-channel": ("int8", "float16"),
}


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("shape", [{"p": 1}, {"p": 5, "placement": "tensor"}, {"p": 2, "start": 1, "end": 5}])
def test_an_engine_holds_the_checkpoints_own_codes(name, shape, source, tmp_path):
    packer, config = FORMATS[name]
    stored, dtype = STORED[name]
    truth = quantize(source, tmp_path / "quantized", packer, config, keep=lambda module: "layers.2.mlp.up" in module)
    checkpoint = Checkpoint(tmp_path / "quantized", tokenizer=False)
    assert checkpoint.own_format(dtype) == (stored, (2,))
    limits = EngineLimits(dtype=dtype, weights=stored, keep=(2,), max_seq_len=16)
    checkpoint.quantize(limits)
    dense = Checkpoint(tmp_path / "quantized", tokenizer=False).reader
    for rank in plan(checkpoint.model, CqilConfig(**shape), dtype, stored, (2,)):
        path = tmp_path / f"rank{rank.rank}.safetensors"
        write_rank(path, rank, checkpoint.reader)
        weights = load_file(path)
        take_quantized(rank, weights, torch.float32)
        for tensor in plan(checkpoint.model, CqilConfig(**shape))[rank.rank].tensors:
            if tensor.name.startswith("layers.") and "norm" not in tensor.name and ".2." not in tensor.name:
                assert all(piece.source in truth for piece in tensor.pieces)
                assert torch.equal(weights[tensor.name], torch.cat(list(tensor.blocks(dense)))), tensor.name


@pytest.mark.parametrize("name", ["gptq", "fp8-channel"])
def test_stored_codes_run_and_validate(name, source, tmp_path):
    packer, config = FORMATS[name]
    quantize(source, tmp_path / "quantized", packer, config)
    flags = ("--p", 2, "--quantize", "stored", "--dtype", "float16", "--output", tmp_path / "engine")
    done = build("--model", tmp_path / "quantized", *flags)
    assert done.returncode == 0, done.stderr
    assert f"the engine stores them in {STORED[name][0]}" in done.stdout
    ids = write_json(tmp_path / "ids.json", [[5, 9, 77], [8] * 20])
    done = mpirun(2, "--engine", tmp_path / "engine", "--token-ids", ids, "--max-new-tokens", 8, "--validate")
    assert done.returncode == 0, done.stdout + done.stderr


def test_codes_that_no_engine_holds(source, tmp_path):
    for name, dtype in (
        ("gptq-order", "float16"),
        ("gptq-8", "float16"),
        ("fp8-blocks", "float16"),
        ("gptq", "bfloat16"),
    ):
        packer, config = FORMATS[name]
        quantize(source, tmp_path / f"{name}-{dtype}", packer, config)
        with pytest.raises(UserError, match="--quantize stored: no format of an engine in"):
            cqil_trt.build(
                model=tmp_path / f"{name}-{dtype}", p=1, quantize="stored", dtype=dtype, output=tmp_path / "engine"
            )
    adapter = make_adapter(source, tmp_path / "adapter", target_modules="all-linear")
    with pytest.raises(UserError, match="or an adapter changes them"):
        cqil_trt.build(
            model=tmp_path / "gptq-bfloat16", lora=adapter, p=1, quantize="stored", output=tmp_path / "engine"
        )
    with pytest.raises(UserError, match="--keep: --quantize stored keeps what is not quantized"):
        cqil_trt.build(
            model=tmp_path / "gptq-bfloat16", p=1, quantize="stored", keep="layers.0", output=tmp_path / "engine"
        )


def test_layers_of_other_codes_are_kept_dense(source, tmp_path):
    """One with 8 bits instead of 4, one whose scales the engine's type does not hold."""
    layer = {}

    def packer(weight, rng):
        number = layer["count"] = layer.get("count", -1) + 1  # in the order of names: seven matrices a layer
        tensors, matrix = gptq(weight, rng, bits=8 if number // 7 == 3 else 4)
        if number // 7 == 5:
            tensors["scales"] = tensors["scales"].float() * 1.0001
            matrix = matrix * np.float32(1.0001)
        return tensors, matrix

    config = {**GPTQ, "dynamic": {".*layers\\.3\\..*": {"bits": 8}}}
    quantize(source, tmp_path / "quantized", packer, config)
    checkpoint = Checkpoint(tmp_path / "quantized", tokenizer=False)
    assert checkpoint.own_format("float16") == ("int4g16", (3, 5))
    engine = cqil_trt.build(
        model=tmp_path / "quantized", p=1, quantize="stored", dtype="float16", output=tmp_path / "e"
    )
    assert engine.limits.weights == "int4g16" and engine.limits.keep == (3, 5)
    weights = load_file(engine.rank_file(0))
    take_quantized(engine.plan(0), weights, torch.float32)
    [rank] = plan(checkpoint.model, CqilConfig(p=1))
    dense = Checkpoint(tmp_path / "quantized", tokenizer=False).reader
    for tensor in rank.tensors:
        expected = torch.cat([block.view(-1) for block in tensor.blocks(dense)])
        exact = re.match(r"layers\.[0124]\.(qkv|o|gate_up|down)", tensor.name)
        expected = expected if exact else expected.half().float()
        assert torch.equal(weights[tensor.name].float().view(-1), expected), tensor.name


def test_modules_of_other_kinds(source, tmp_path):
    """Modules that stay dense, those that a rule gives other bits, and groups with names and patterns."""

    def packer(weight, rng):
        return gptq(weight, rng, bits=8 if weight.shape == (96, 48) else 4)

    config = {
        **GPTQ,
        "dynamic": {
            "-:.*layers\\.[04]\\..*": {},
            "+:.*\\.(gate|up)_proj": {"bits": 8},
            ".*\\.q_proj": {"sym": True},
        },
    }
    truth = quantize(source, tmp_path / "gptq", packer, config, keep=lambda name: re.search(r"layers\.[04]\.", name))
    _, reader = open_checkpoint(tmp_path / "gptq")
    assert len(truth) == 28
    for name, matrix in truth.items():
        assert torch.equal(reader.read(name), matrix), name

    one = COMPRESSED["w4-group"][1]
    other = COMPRESSED["w8-asymmetric-channel"][1]

    def mixed(weight, rng):
        return compressed(weight, rng, "pack-quantized", **(other if weight.shape == (48, 96) else one))

    config = compressed_config("pack-quantized", **one)
    config["config_groups"]["group_1"] = {"targets": ["re:.*down_proj"], "weights": other}
    truth = quantize(source, tmp_path / "compressed", mixed, config, keep=lambda name: name.endswith("v_proj"))
    _, reader = open_checkpoint(tmp_path / "compressed")
    for name, matrix in truth.items():
        assert torch.equal(reader.read(name), matrix), name


def test_configurations_in_other_files(source, tmp_path):
    for name, file, method in (("gptq", "quantize_config.json", "gptq"), ("modelopt", "hf_quant_config.json", None)):
        packer, config = FORMATS[name]
        truth = quantize(source, tmp_path / name, packer, config)
        values = json.loads((tmp_path / name / "config.json").read_text())
        inner = {key: value for key, value in values.pop("quantization_config").items() if key != "quant_method"}
        write_json(tmp_path / name / "config.json", values)
        write_json(tmp_path / name / file, inner if method else {"producer": {}, "quantization": inner})
        _, reader = open_checkpoint(tmp_path / name)
        for key, matrix in truth.items():
            assert torch.equal(reader.read(key), matrix)


def opened(directory):
    model, reader = open_checkpoint(directory)
    check_shapes(reader, checkpoint_shapes(model))
    for name in reader.shapes():
        reader.read(name)


MODULE = "model.layers.3.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "part", "change", "said"),
    [
        (
            "gptq",
            "scales",
            lambda t: t[:-1],
            r"up_proj: scales has shape \(2, 96\), the configuration asks for \(3, 96\)",
        ),
        ("gptq", "scales", lambda t: t * float("nan"), "up_proj: scales holds a value that is not finite"),
        ("gptq", "scales", None, "up_proj: scales is missing"),
        ("gptq", "qzeros", None, "up_proj: qzeros is missing"),
        ("gptq", "g_idx", lambda t: t + 1, "up_proj: g_idx holds a group that is not from 0 to 2"),
        ("gptq", "qweight", lambda t: t.float(), "up_proj: qweight has type torch.float32, packed integers are"),
        ("gptq", "qweight", lambda t: t[:-1], r"up_proj.weight has shape \(96, 40\), config.json asks for \(96, 48\)"),
        ("gptq", "qweight", None, "no tensor model.layers.3.mlp.up_proj.weight"),
        ("awq", "qzeros", lambda t: t[:, :-1], "up_proj: qzeros has shape"),
        ("awq", "scales", lambda t: t / 0, "up_proj: scales holds a value that is not finite"),
        ("fp8-blocks", "weight_scale_inv", lambda t: t[:-1], "up_proj: weight_scale_inv has shape"),
        ("fp8-blocks", "weight_scale_inv", None, "up_proj.weight has type torch.float8_e4m3fn"),
        ("modelopt", "weight", lambda t: t.float(), "up_proj: weight has type torch.float32, expected torch.float8"),
        (
            "modelopt",
            "weight",
            lambda t: (t.float() * float("nan")).to(t.dtype),
            "weight holds a value that is not a number",
        ),
        ("w4-group", "weight_scale", lambda t: t[:, :-1], "up_proj: weight_scale has shape"),
        ("w4-group", "weight_shape", None, "up_proj: weight_shape is missing"),
        ("w4-group", "weight_shape", lambda t: t + 8, r"up_proj.weight has shape \(104, 56\)"),
        (
            "w4-group",
            "weight_shape",
            lambda t: t.float(),
            "up_proj: weight_shape has type torch.float32, expected integers",
        ),
        (
            "int8-asymmetric",
            "weight_zero_point",
            lambda t: t.int() * 100,
            "up_proj: weight_zero_point holds a value that",
        ),
        ("gptq", "g_idx", lambda t: t + 0.5, "up_proj: g_idx has type torch.float32, expected integers"),
        ("w4-asymmetric", "weight_zero_point", None, "up_proj: weight_zero_point is missing"),
    ],
)
def test_damaged_tensors_are_named(name, part, change, said, source, tmp_path):
    packer, config = FORMATS[name]
    quantize(source, tmp_path / "quantized", packer, config)
    tensors = load_file(tmp_path / "quantized" / "model.safetensors")
    tensor = tensors.pop(f"{MODULE}.{part}")
    if change is not None:
        tensors[f"{MODULE}.{part}"] = change(tensor).contiguous()
    save_file(tensors, tmp_path / "quantized" / "model.safetensors")
    with pytest.raises(UserError, match=said):
        opened(tmp_path / "quantized")


def changed(name, **values):
    return {**FORMATS[name][1], **values}


def changed_block(block):
    return compressed_config("float-quantized", num_bits=8, type="float", strategy="block", block_structure=block)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("gptq", {"quant_method": "bitsandbytes"}, "quantization 'bitsandbytes' is not supported"),
        ("gptq", {"quant_method": "sparseml"}, "quantization 'sparseml' is not supported"),
        ("gptq", {"bits": 4}, "quant_method must be a string"),
        ("gptq", changed("gptq", bits=3), "bits 3 is not supported"),
        ("gptq", changed("gptq", group_size=32), "scales has shape"),
        ("gptq", changed("gptq", checkpoint_format="marlin"), "checkpoint_format 'marlin' is not supported"),
        ("gptq", changed("gptq", dynamic={"(": {}}), "is not a regular expression"),
        ("gptq", changed("gptq", dynamic=[]), "dynamic must be"),
        ("gptq", changed("gptq", dynamic={"a{99999999999999999999}": {}}), "is not a regular expression"),
        ("gptq", changed("gptq", dynamic={"(" * 3000 + ")" * 3000: {}}), "is not a regular expression"),
        ("fp8-block", changed_block(["16", "32"]), "strategy 'block', group_size -1, are not supported"),
        ("fp8-block", changed_block([None, 32]), "strategy 'block', group_size -1, are not supported"),
        ("fp8-block", changed_block([16.0, 32.0]), "strategy 'block', group_size -1, are not supported"),
        ("fp8-block", changed_block("9" * 5000 + "x1"), "strategy 'block', group_size -1, are not supported"),
        ("awq", changed("awq", version="gemv"), "version 'gemv', is not supported"),
        ("awq", changed("awq", bits=3), "AWQ of 3 bits"),
        ("awq", changed("awq", group_size=32), "qzeros has shape|scales has shape"),
        ("fp8-blocks", changed("fp8-blocks", weight_block_size=[128]), "weight_block_size must be"),
        ("fp8-blocks", changed("fp8-blocks", weight_block_size=[16, 32]), "weight_scale_inv has shape"),
        ("modelopt", changed("modelopt", quant_algo="NVFP4"), "quant_algo 'NVFP4' is not supported"),
        (
            "w4-group",
            changed("w4-group", format="nvfp4-pack-quantized"),
            "format 'nvfp4-pack-quantized' is not supported",
        ),
        ("w4-group", changed("w4-group", format="marlin-24"), "format 'marlin-24' is not supported"),
        ("w4-group", changed("w4-group", sparsity_config={"format": "sparse-24-bitmask"}), "sparse weights"),
        ("w4-group", changed("w4-group", transform_config={"config_groups": {"a": {}}}), "transform_config"),
        ("w4-group", changed("w4-group", config_groups={}), "config_groups names no weights"),
        ("w4-group", changed("w4-group", config_groups={"group_0": []}), "group_0 must be an object"),
        ("w4-group", compressed_config("pack-quantized", num_bits=3, **GROUPED), "weights of 3 bits"),
        (
            "w4-group",
            compressed_config("pack-quantized", num_bits=4, strategy="group"),
            "strategy 'group', group_size -1",
        ),
        ("w4-group", compressed_config("pack-quantized", num_bits=4, strategy="group", group_size=32), "has shape"),
    ],
)
def test_wrong_configurations_are_named(name, config, said, source, tmp_path):
    quantize(source, tmp_path / "quantized", FORMATS[name][0], config)
    with pytest.raises(UserError, match=said) as caught:
        opened(tmp_path / "quantized")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_configuration_without_quantized_tensors(source, tmp_path):
    quantize(source, tmp_path / "dense", FORMATS["gptq"][0], FORMATS["gptq"][1], keep=lambda name: True)
    with pytest.raises(UserError, match="no tensor of a quantized module"):
        opened(tmp_path / "dense")


def test_a_damaged_checkpoint_ends_the_build_in_one_line(source, tmp_path):
    packer, config = FORMATS["gptq"]
    quantize(source, tmp_path / "quantized", packer, config)
    tensors = load_file(tmp_path / "quantized" / "model.safetensors")
    tensors[f"{MODULE}.scales"] *= float("inf")
    save_file(tensors, tmp_path / "quantized" / "model.safetensors")
    done = build("--model", tmp_path / "quantized", "--p", 2, "--output", tmp_path / "engine")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "up_proj: scales holds a value that is not finite" in done.stderr
    assert not list(tmp_path.glob("*engine*"))
