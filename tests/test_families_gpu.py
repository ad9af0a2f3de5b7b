"""Engines of families with more than LLaMA has, in half types on a GPU: as near to the reference as those on a CPU.

In float32 test_parity.py judges them. Skipped where there is no GPU.
"""

import numpy as np
import pytest
import torch
from support import SEED, write_json
from support.cases import FAMILIES, ranks_of, relative
from support.checkpoints import load_model, make_model
from support.needs import need_cuda_backend
from support.processes import mpirun

import cqil_trt
from cqil_trt.reference import CqilModel

pytestmark = pytest.mark.slow

STEPS = 20
SIZES = {"hidden_size": 64, "intermediate_size": 136, "num_attention_heads": 4, "num_key_value_heads": 2}
# The family, what is changed of its model, its type, and the shape of the engine. Prompts are longer than the windows,
# and heads of the sizes that have kernels of their own.
CASES = [
    ("gemma2", {"head_dim": 256, "query_pre_attn_scalar": 256}, "float16", {"p": 1}),
    ("gemma2", {"head_dim": 64}, "bfloat16", {"p": 2, "d": 1, "start": 2, "end": 6}),
    ("gemma3", {"head_dim": 256, "num_key_value_heads": 2}, "bfloat16", {"p": 1}),
    ("gemma3", {"head_dim": 64}, "float16", {"p": 2, "start": 1, "end": 5}),
    ("olmo3", {"head_dim": 16}, "float16", {"p": 2, "start": 1, "end": 5}),
    ("phi3-partial", {"head_dim": 128}, "float16", {"p": 1}),
    ("smollm3", {"head_dim": 64}, "bfloat16", {"p": 1}),
    ("granite", {}, "float16", {"p": 2, "start": 2, "end": 6, "d": 1}),
    ("mistral-windows", {"head_dim": 128}, "float16", {"p": 1}),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The models, the prompts, and what every case computes on either device."""
    need_cuda_backend()
    root = tmp_path_factory.mktemp("families")
    random = np.random.default_rng(SEED)
    prompts = [random.integers(3, 131, size=n).tolist() for n in (70, 1, 19)]
    runs: dict[int, list] = {}
    for i, (name, changes, dtype, shape) in enumerate(CASES):
        architecture, its = FAMILIES[name]
        model = make_model(root / f"model{i}", architecture, seed=SEED + i, **{**its, **SIZES, **changes})
        engine = root / f"engine{i}"
        # With short chunks, the caches of layers with a window are circles of 64 positions.
        limits = {"max_seq_len": 128, "max_batch_size": 3, "prefill_chunk": (16, 512)[i % 2]}
        cqil_trt.build(model=model, output=engine, dtype=dtype, probes="never", **limits, **shape)
        for device in ("cpu", "cuda"):
            run = {"engine": str(engine), "device": device, "prompts": prompts, "steps": STEPS}
            runs.setdefault(ranks_of(shape), []).append({**run, "out": str(root / f"{device}{i}")})
    for ranks, some in runs.items():
        done = mpirun(ranks, write_json(root / f"runs{ranks}.json", some), script="tests/support/mpi_worker.py")
        assert done.returncode == 0, done.stderr
    return root, prompts


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: f"{CASES[i][0]}-{CASES[i][2]}")
def test_half_types_are_as_near_on_a_gpu(number, results):
    root, prompts = results
    shape = CASES[number][3]
    reference = load_model(root / f"model{number}")
    if shape["p"] > 1:
        reference = CqilModel(reference, **shape)
    errors = {}
    for device in ("cpu", "cuda"):
        ranks = [np.load(f"{root}/{device}{number}-{rank}.npz") for rank in range(ranks_of(shape))]
        assert all(np.array_equal(ranks[0][key], other[key]) for other in ranks[1:] for key in other)  # bit for bit
        found, expected = [], []
        for i, prompt in enumerate(prompts):
            ids = torch.tensor([prompt + ranks[0]["tokens"][i].tolist()[:-1]])
            with torch.inference_mode():
                full = reference(ids, use_cache=False).logits[0].numpy()
            found += [ranks[0][f"score{i}"], ranks[0]["logits"][i]]
            expected += [full[: len(prompt)], full[len(prompt) - 1 :]]
        errors[device] = [relative(*pair) for pair in zip(found, expected)]
    print(CASES[number], errors)
    assert np.mean(errors["cuda"]) < 3 * np.mean(errors["cpu"]) + 1e-3
