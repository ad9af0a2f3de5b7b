"""Engines with quantized weights or KV caches on a GPU, judged by the reference with these. Skipped without a GPU.

One test runs on CPU ranks too.
"""

import json

import pytest
import torch
from support import SEED
from support.cases import ARCHITECTURES, FAMILIES, QUANTIZED_SIZES, identifier
from support.checkpoints import make_model
from support.needs import need_cuda_backend
from support.validation import assert_valid, validate

import cqil_trt
from cqil_trt import reference
from cqil_trt.checkpoint import Checkpoint

pytestmark = pytest.mark.slow

# The model, and how its engine is built.
CASES = [
    ("llama-gqa", {"quantize": "int8", "dtype": "float16", "p": 1}),
    ("llama-gqa", {"quantize": "fp8", "dtype": "bfloat16", "p": 2}),
    ("llama-gqa", {"quantize": "int4", "dtype": "float16", "p": 1}),
    ("llama-gqa", {"quantize": "int4", "dtype": "float16", "p": 2}),
    ("llama-gqa", {"quantize": "int4g32", "dtype": "bfloat16", "p": 3}),
    ("llama-gqa", {"quantize": "int4", "dtype": "float32", "p": 2}),
    ("gemma3", {"quantize": "int8", "dtype": "float16", "p": 2}),
    ("granite", {"quantize": "int4", "dtype": "float16", "p": 1}),
    ("llama-gqa", {"kv_dtype": "fp8", "dtype": "float16", "p": 1}),
    ("llama-gqa", {"kv_dtype": "fp8", "dtype": "float16", "p": 3}),
    ("llama-gqa", {"kv_dtype": "fp8", "dtype": "float32", "p": 2, "prefill_chunk": 16}),
]
# Prompts of one packed product, of several, and of more tokens than those take.
PROMPTS = [[5, 9, 77], list(range(3, 23)), list(range(3, 93))]


@pytest.fixture(scope="module")
def verdict_of(request, tmp_path_factory):
    """A function that gives the file with a case's verdict: those of this run with as many ranks are one job."""
    need_cuda_backend()
    root = tmp_path_factory.mktemp("quantized")
    chosen = [item.callspec.params["number"] for item in request.session.items if "verdict_of" in item.fixturenames]

    def get(number):
        out, p, cases = root / f"verdict{number}", CASES[number][1]["p"], []
        for i in (i for i in chosen if not out.exists() and CASES[i][1]["p"] == p):
            name, options = CASES[i]
            model, engine = root / name, root / f"engine{i}"
            if not model.exists():
                architecture, changes = {**ARCHITECTURES, **FAMILIES}[name]
                make_model(model, architecture, seed=SEED, **{**changes, **QUANTIZED_SIZES})
            shape = {} if p == 1 else {"start": 1, "end": 1 + 4 // p * p}
            cqil_trt.build(model=model, output=engine, max_seq_len=128, max_batch_size=4, **shape, **options)
            paths = {"engine": str(engine), "out": str(root / f"verdict{i}")}
            cases.append({"device": "cuda", "prompts": PROMPTS, **paths})
        validate(cases, p, root)
        return out

    return get


@pytest.mark.parametrize("number", range(len(CASES)), ids=map(identifier, CASES))
def test_engines_run_and_validate(number, verdict_of):
    assert_valid(verdict_of(number))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bfloat16_with_an_fp8_cache_errs_no_more_than_transformers(device, tmp_path):
    """Codes that flip make random models err by more than --validate allows, in transformers too (0.15 to 0.17)."""
    if device == "cuda":
        need_cuda_backend()
    architecture, changes = ARCHITECTURES["llama-gqa"]
    model = make_model(tmp_path / "model", architecture, seed=SEED, **{**changes, **QUANTIZED_SIZES})
    options = {"dtype": "bfloat16", "kv_dtype": "fp8", "p": 2, "start": 1, "end": 5, "prefill_chunk": 16}
    engine = cqil_trt.build(model=model, output=tmp_path / "engine", max_seq_len=128, max_batch_size=4, **options)
    case = {"device": device, "prompts": PROMPTS, "engine": str(engine.path), "out": str(tmp_path / "verdict")}
    validate([case], 2, tmp_path)
    found = json.loads((tmp_path / "verdict").read_text())
    assert "error" not in found, found["error"]
    checkpoint = Checkpoint(model, None)

    def answers(dtype):
        network = reference.from_reader(checkpoint.model, checkpoint.reader, dtype)
        network = reference.with_kv_cache(reference.with_cqil(network, engine.cqil), engine.limits)
        return [reference.score(network, prompt).double() for prompt in PROMPTS]

    for exact, rounded, ours in zip(answers(torch.float32), answers(torch.bfloat16), found["prompts"]):
        theirs = float((rounded - exact).norm() / exact.norm())
        assert ours["relative_l2"] < 1.2 * theirs, (ours["relative_l2"], theirs)
