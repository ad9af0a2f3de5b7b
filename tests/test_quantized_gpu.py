"""Engines with quantized weights or KV caches on a GPU, judged by the reference with these. Skipped without a GPU."""

import pytest
from support import SEED, write_json
from support.cases import ARCHITECTURES, FAMILIES
from support.checkpoints import make_model
from support.needs import need_cuda_backend
from support.processes import mpirun

import cqil_trt

pytestmark = pytest.mark.slow

# Two ranks cut the groups of down's columns at 352, so they are packed in smaller ones. Three ranks have numbers of
# columns that are no multiples of 8, which are dequantized.
SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "head_dim": 32}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function that makes a model by its name."""
    need_cuda_backend()
    root = tmp_path_factory.mktemp("quantized")

    def get(name):
        if not (root / name).exists():
            architecture, changes = {**ARCHITECTURES, **FAMILIES}[name]
            make_model(root / name, architecture, seed=SEED, **{**changes, **SIZES})
        return root / name

    return get


@pytest.mark.parametrize(
    ("name", "stored", "dtype", "p"),
    [
        ("llama-gqa", "int8", "float16", 1),
        ("llama-gqa", "fp8", "bfloat16", 2),
        ("llama-gqa", "int4", "float16", 1),
        ("llama-gqa", "int4", "float16", 2),
        ("llama-gqa", "int4g32", "bfloat16", 3),
        ("llama-gqa", "int4", "float32", 2),
        ("gemma3", "int8", "float16", 2),
        ("granite", "int4", "float16", 1),
    ],
)
def test_engines_run_and_validate(name, stored, dtype, p, models, tmp_path):
    run(p, models(name), tmp_path, dtype=dtype, quantize=stored)


# Three ranks have uneven heads, whose prompts our own kernels attend to; otherwise a library does.
@pytest.mark.parametrize(
    ("dtype", "p", "prefill_chunk"), [("float16", 1, 512), ("bfloat16", 2, 16), ("float16", 3, 512), ("float32", 2, 16)]
)
def test_engines_with_an_fp8_cache(dtype, p, prefill_chunk, models, tmp_path):
    run(p, models("llama-gqa"), tmp_path, dtype=dtype, kv_dtype="fp8", prefill_chunk=prefill_chunk)


def run(p, model, tmp_path, **options):
    """Builds an engine and validates it."""
    shape = {"p": p} if p == 1 else {"p": p, "start": 1, "end": 1 + 4 // p * p}
    limits = {"max_seq_len": 128, "max_batch_size": 4}
    cqil_trt.build(model=model, output=tmp_path / "engine", **options, **limits, **shape)
    # Prompts of one packed product, of several, and of more tokens than those take.
    ids = write_json(tmp_path / "ids.json", [[5, 9, 77], list(range(3, 23)), list(range(3, 93))])
    flags = ("--device", "cuda", "--token-ids", ids, "--max-new-tokens", 16, "--validate")
    done = mpirun(p, "--engine", tmp_path / "engine", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validation passed: all ranks hold identical bits" in done.stdout
