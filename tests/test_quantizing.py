"""Weights that a build quantizes: what they become, how they are dealt to ranks, and the engines that hold them."""

import json
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import SEED, write_json
from support.checkpoints import load_model, make_adapter, make_model
from support.made_tokenizers import save_byte_tokenizer
from support.processes import assert_user_error, build, mpirun, run

import cqil_trt
from cqil_trt.backends.torch.quantized import take_quantized
from cqil_trt.builder import parse_keep
from cqil_trt.checkpoint import Checkpoint, write_rank
from cqil_trt.config import CqilConfig, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.llm import Llm
from cqil_trt.runner import Runner
from cqil_trt.shard import plan
from cqil_trt.weights.quantized.rounding import quantize as rounded
from cqil_trt.weights.quantized.rounding import to_fp8, to_int4, to_int8

# Columns that are no multiple of a group, and that three ranks share unevenly.
SIZES = {"hidden_size": 204, "intermediate_size": 346, "num_attention_heads": 6, "head_dim": 24, "num_hidden_layers": 4}
FORMATS = ("int8", "fp8", "int4", "int4g32")


def some_matrix(rows, columns, seed=SEED):
    torch.manual_seed(seed)
    return torch.randn(rows, columns) * torch.rand(rows, 1) * 3 + torch.rand(1, columns)


def test_int8_is_the_nearest():
    weight = some_matrix(37, 129)
    weight[5] = 0
    found = to_int8(weight)
    exact = weight.double().numpy()
    top = np.abs(exact).max(1, keepdims=True)
    scales = found.scales.double().numpy()
    np.testing.assert_allclose(scales[:5] * 127, top[:5], rtol=1e-6)
    assert np.abs(found.codes.numpy()).max(1)[:5].tolist() == [127] * 5 and not found.codes[5].any()
    error = np.abs(found.dequantize().double().numpy() - exact)
    assert (error <= scales * 0.5 * (1 + 1e-5)).all()


def test_fp8_is_the_nearest():
    weight = some_matrix(37, 129)
    weight[5] = 0
    found = to_fp8(weight)
    np.testing.assert_allclose(
        found.scales.numpy()[:5] * 448, weight.abs().amax(1, keepdim=True).numpy()[:5], rtol=1e-6
    )
    expected = (weight / found.scales).clamp(-448, 448).numpy().astype(ml_dtypes.float8_e4m3fn)
    assert (found.codes.view(torch.uint8).numpy() == expected.view(np.uint8)).all()
    assert torch.equal(found.dequantize(), found.codes.float() * found.scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("columns", "group"), [(128, 128), (256, 128), (200, 128), (5, 128), (200, 32)])
def test_int4_is_at_least_as_good_as_the_whole_range(dtype, columns, group):
    weight = some_matrix(23, columns)
    weight[3] = 0
    weight[4] = 2.5
    found = to_int4(weight, dtype, group)
    assert found.codes.max() <= 15 and found.zeros.max() <= 15
    assert torch.equal(found.scales, found.scales.to(dtype).float())
    exact, got = weight.double().numpy(), found.dequantize().double().numpy()
    totals = np.zeros(2)
    for first in range(0, columns, group):
        part = exact[:, first : first + group]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        scale = torch.tensor((high - low) / 15).to(dtype).double().numpy()[:, None]
        scale[scale == 0] = 1
        zero = np.clip(np.round(-low[:, None] / scale), 0, 15)
        plain = (np.clip(np.round(part / scale) + zero, 0, 15) - zero) * scale
        errors = (((x - part) ** 2).sum(1) for x in (got[:, first : first + group], plain))
        ours, theirs = errors
        assert (ours <= theirs * 1.02 + 1e-12).all()
        totals += ours.sum(), theirs.sum()
    assert totals[0] < 0.99 * totals[1] or columns == 5
    assert not got[3].any()
    np.testing.assert_allclose(got[4], 2.5, rtol=0.01)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), **SIZES)


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize(
    "shape",
    [{"p": 1}, {"p": 3, "placement": "tensor"}, {"p": 2, "start": 1, "end": 3}, {"p": 7, "placement": "tensor"}],
)
def test_ranks_hold_the_codes_of_the_whole_matrix(stored, shape, source, tmp_path):
    """The weights of an engine do not depend on how many ranks share them, whatever their borders."""
    limits = EngineLimits(dtype="float16", weights=stored, keep=(3,), max_seq_len=16)
    checkpoint, dense = (Checkpoint(source, tokenizer=False) for _ in range(2))
    checkpoint.quantize(limits)
    for rank in plan(checkpoint.model, CqilConfig(**shape), limits.dtype, stored, limits.keep):
        path = tmp_path / f"rank{rank.rank}.safetensors"
        entry = write_rank(path, rank, checkpoint.reader)
        assert path.stat().st_size == entry["size"]
        weights = load_file(path)
        products = take_quantized(rank, weights, torch.float32)
        assert not products
        for tensor in plan(dense.model, CqilConfig(**shape), "float32")[rank.rank].tensors:
            kept = tensor.name.startswith("layers.3.") or "norm" in tensor.name or not tensor.name.startswith("layers.")
            reader = dense.reader if kept else checkpoint.reader
            expected = torch.cat(list(tensor.blocks(reader)))
            found = weights[tensor.name].float()
            if kept or tensor.name.endswith("bias"):
                expected = expected.to(torch.float16).float()
            assert torch.equal(found, expected), tensor.name


def test_the_adapter_is_merged_before(source, tmp_path):
    adapter = make_adapter(source, tmp_path / "adapter")
    found, merged = (Checkpoint(source, adapter, tokenizer=False) for _ in range(2))
    found.quantize(EngineLimits(weights="int8", max_seq_len=16))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(found.reader.read(name), to_int8(merged.reader.read(name).float()).dequantize())


@pytest.mark.parametrize("stored", FORMATS)
def test_the_engine_computes_with_the_dequantized_weights(stored, source, tmp_path):
    """Against transformers with these weights, in float32."""
    engine = cqil_trt.build(model=source, p=1, quantize=stored, output=tmp_path / "engine", max_seq_len=64)
    checkpoint = Checkpoint(source, tokenizer=False)
    checkpoint.quantize(engine.limits)
    network = load_model(source)
    state = network.state_dict()
    prompt = np.random.default_rng(SEED).integers(3, 131, 40).tolist()
    with torch.inference_mode():
        for name in checkpoint.reader.shapes():
            state[name].copy_(checkpoint.reader.read(name))
        expected = network(torch.tensor([prompt])).logits[0].numpy()
    found = Runner.of(Llm(engine.path).session, "latency").score(prompt)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4)
    # Less is stored: a quarter, an eighth.
    size = engine.files["rank0.safetensors"]["size"]
    dense = cqil_trt.build(model=source, p=1, output=tmp_path / "dense", max_seq_len=64)
    assert size < dense.files["rank0.safetensors"]["size"] * (0.5 if stored in ("int8", "fp8") else 0.46)


@pytest.mark.parametrize(
    ("flags", "p"),
    [
        (("--quantize", "int8", "--dtype", "bfloat16"), 2),
        (("--quantize", "int4", "--dtype", "bfloat16", "--placement", "tensor"), 2),
        (
            (
                "--quantize",
                "int4",
                "--dtype",
                "float32",
                "--keep",
                "lm_head,layers.0,layers.2-3",
                "--start",
                0,
                "--end",
                4,
            ),
            4,
        ),
        (("--quantize", "fp8", "--dtype", "float16", "--start", 1, "--end", 3, "--drop-attention-join", "0,3"), 2),
        (("--quantize", "int4", "--dtype", "float32", "--ranks-per-layer", 2, "--p", 2, "--start", 1, "--end", 3), 4),
        (("--quantize", "int4", "--quantize-head", "int8", "--dtype", "bfloat16"), 2),
    ],
)
def test_commands_build_and_validate(flags, p, source, tmp_path):
    done = build("--model", source, "--p", p, *flags, "--probes", "always", "--output", tmp_path / "engine")
    assert done.returncode == 0, done.stderr
    stored = flags[1]
    assert f"\nweights    {stored}" in done.stdout
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert config["limits"]["weights"] == stored
    assert config["limits"]["keep"] == ([0, 2, 3] if "--keep" in flags else [])
    head = "int8" if "--quantize-head" in flags else "dense"
    assert config["limits"]["head"] == head and ("\nhead       int8\n" in done.stdout) == (head == "int8")
    ids = write_json(tmp_path / "ids.json", [[5, 9, 77], [8] * 20])
    arguments = ("--engine", tmp_path / "engine", "--token-ids", ids, "--max-new-tokens", 8, "--validate")
    done = mpirun(p, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validation passed: all ranks hold identical bits" in done.stdout


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stored", ["int8", "fp8", "int4g32"])
def test_the_last_projection_is_quantized_by_itself(stored, tied, tmp_path):
    """Against transformers with this matrix and everything else as it is, the embedding table included."""
    source = make_model(tmp_path / "model", tie_word_embeddings=tied)
    flags = {"quantize_head": stored, "max_seq_len": 32, "dtype": "float32"}
    engine = cqil_trt.build(model=source, p=1, output=tmp_path / "engine", **flags)
    network = load_model(source)
    table = network.lm_head.weight.detach().clone()
    network.lm_head.weight = torch.nn.Parameter(rounded(table, stored, torch.float32).dequantize())
    assert torch.equal(network.model.embed_tokens.weight, table) == tied
    prompt = np.random.default_rng(SEED).integers(3, 131, 20).tolist()
    with torch.inference_mode():
        expected = network(torch.tensor([prompt])).logits[0].numpy()
    found = Runner.of(Llm(engine.path).session, "latency").score(prompt)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4)
    # The ranks have rows of the same codes, and both tables.
    [whole], codes = plan(engine.model, CqilConfig(p=1), "float32", head=stored), []
    checkpoint = Checkpoint(source, tokenizer=False)
    checkpoint.quantize(engine.limits)
    for rank in plan(engine.model, CqilConfig(p=3, placement="tensor"), "float32", head=stored):
        path = tmp_path / f"rank{rank.rank}.safetensors"
        write_rank(path, rank, checkpoint.reader)
        held = load_file(path)
        assert torch.equal(held["embedding.weight"], load_model(source).model.embed_tokens.weight)
        codes.append(held["lm_head.weight"])
    assert torch.equal(torch.cat(codes), load_file(engine.rank_file(0))["lm_head.weight"])
    assert whole.bytes_per_token < plan(engine.model, CqilConfig(p=1))[0].bytes_per_token


def test_a_head_that_is_kept_is_not_quantized(source, tmp_path):
    arguments = ("--model", source, "--output", tmp_path / "engine", "--quantize-head", "int8")
    assert_user_error(
        build(*arguments, "--quantize", "int8", "--keep", "lm_head"), "--keep lm_head and --quantize-head"
    )
    assert_user_error(build(*arguments, "--backend", "onnx"), "--quantize-head int8: backend onnx does not support it")


@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_packed_products_are_those_of_the_dequantized_matrix(stored, tmp_path):
    """In bfloat16, where PyTorch has them."""
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8, "num_hidden_layers": 1}
    checkpoint = Checkpoint(make_model(tmp_path / "model", **sizes), tokenizer=False)
    checkpoint.quantize(EngineLimits(dtype="bfloat16", weights=stored, max_seq_len=16))
    [rank] = plan(checkpoint.model, CqilConfig(p=1), "bfloat16", stored)
    write_rank(tmp_path / "rank0.safetensors", rank, checkpoint.reader)
    packed, dense = (load_file(tmp_path / "rank0.safetensors") for _ in range(2))
    products = take_quantized(rank, packed, torch.bfloat16)
    take_quantized(rank, dense, torch.float32)
    assert {"layers.0.gate_up", "layers.0.down"} <= products.keys()
    for name, product in products.items():
        matrix = dense[f"{name}.weight"]
        x = torch.randn(2, 3, matrix.shape[1], dtype=torch.bfloat16)
        exact = x.double() @ matrix.double().T
        assert product(x).shape == exact.shape
        error = (product(x).double() - exact).norm() / exact.norm()
        assert error < 6e-3, (name, error)


@pytest.mark.parametrize(
    ("text", "layers"), [(None, ()), ("layers.0", (0,)), ("lm_head,layers.2-4,embed_tokens,layers.3", (2, 3, 4))]
)
def test_layers_to_keep(text, layers):
    assert parse_keep(text, 6) == layers


@pytest.mark.parametrize("text", ["layers", "layers.6", "layers.4-2", "layers.1-9", "q_proj", "layers.1,", "layers.²"])
def test_wrong_layers_to_keep_are_named(text):
    with pytest.raises(UserError, match="--keep .*: expected lm_head, embed_tokens, or layers from 0 to 5"):
        parse_keep(text, 6)


def test_extreme_values():
    tiny = torch.full((2, 128), 1e-44)
    huge = torch.full((2, 128), 3e38)
    for stored in FORMATS:
        for weight in (tiny, huge, torch.zeros(2, 128)):
            for dtype in (torch.float32, torch.float16):
                assert torch.isfinite(rounded(weight, stored, dtype).dequantize()).all()
        assert not rounded(torch.zeros(2, 128), stored, torch.float16).dequantize().any()


def test_values_that_are_not_finite_are_named(tmp_path):
    source = make_model(tmp_path / "model", **SIZES)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight holds a value that is not finite"):
        cqil_trt.build(model=source, p=1, quantize="int8", probes="never", output=tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_what_cannot_be_built_is_refused(source, tmp_path):
    output = tmp_path / "engine"
    with pytest.raises(UserError, match="--keep needs --quantize"):
        cqil_trt.build(model=source, p=1, keep="layers.0", output=output)
    with pytest.raises(UserError, match="--quantize int8: backend onnx does not support it: use dense"):
        cqil_trt.build(model=source, p=1, quantize="int8", backend="onnx", output=output)
    with pytest.raises(
        UserError, match="--quantize int3: backend torch does not support it: use dense or fp8 or int4 or int8"
    ):
        cqil_trt.build(model=source, p=1, quantize="int3", output=output)
    engine = cqil_trt.build(model=source, p=1, quantize="int8", output=output)
    with pytest.raises(UserError, match="--quantize int8: backend onnx does not support it"):
        cqil_trt.build(model=engine.path, backend="onnx", output=tmp_path / "onnx")
    with pytest.raises(UserError, match="an engine, which fixes --quantize: omit it"):
        cqil_trt.build(model=engine.path, backend="onnx", quantize="int8", output=tmp_path / "onnx")


def test_evaluate_measures_the_quantized_model(tmp_path):
    source = make_model(tmp_path / "model", **SIZES, vocab_size=259)
    save_byte_tokenizer(source)
    tokens = np.random.default_rng(SEED).integers(3, 131, 3 * 32).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    found = {}
    for flags in ((), ("--quantize", "int4")):
        out = tmp_path / "out.json"
        command = ["scripts/evaluate.py", "--model", source, "--p", 1, "--text", tmp_path / "tokens.npy", "--block", 32]
        done = run(sys.executable, *command, *flags, "--json", out)
        assert done.returncode == 0, done.stderr
        found[flags] = json.loads(out.read_text())["columns"][0]["perplexity"]
    checkpoint = Checkpoint(source, tokenizer=False)
    checkpoint.quantize(EngineLimits(dtype="float16", weights="int4"))
    network = load_model(source)
    state = network.state_dict()
    blocks = torch.from_numpy(tokens.astype(np.int64)).view(-1, 32)
    for flags in found:
        with torch.inference_mode():
            if flags:
                for name in checkpoint.reader.shapes():
                    state[name].copy_(checkpoint.reader.read(name))
            logits = network(blocks).logits[:, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
        assert found[flags] == pytest.approx(loss.exp().item(), rel=1e-4)
