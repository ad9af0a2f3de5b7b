"""Sequences that share an engine's slots on a GPU: together, joining, reusing prefixes, sampled, guided, reported.

Judged by each sequence alone, by the engine on the CPU, and by the reference in float32. Skipped where there is no GPU.
"""

import json

import numpy as np
import pytest
import torch
from support import SEED, write_json
from support.checkpoints import load_model, make_model
from support.needs import need_cuda_backend
from support.processes import mpirun

import cqil_trt
from cqil_trt.config import EngineLimits
from cqil_trt.reference import CqilModel, with_kv_cache

pytestmark = pytest.mark.slow

VOCABULARY = 1009
# The shape of an engine, the architecture of its model, and what is changed of that. A window is within the prompts.
CASES = {
    "p1": ({"p": 1}, "LlamaForCausalLM", {}),
    "p2": ({"p": 2, "start": 1, "end": 5}, "LlamaForCausalLM", {}),
    "p2-windows": ({"p": 2, "start": 1, "end": 5}, "MistralForCausalLM", {"sliding_window": 11}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function that makes a case's model."""
    need_cuda_backend()
    root = tmp_path_factory.mktemp("slots")

    def get(case):
        _, architecture, changes = CASES[case]
        directory = root / architecture
        if not directory.exists():
            make_model(directory, architecture, seed=SEED, vocab_size=VOCABULARY, **changes)
        return directory

    return get


@pytest.fixture(scope="module")
def ran(models, tmp_path_factory):
    """A function that gives every rank's results for a case, a type and a device."""
    root, known = tmp_path_factory.mktemp("ran"), {}

    def get(case, dtype, device):
        """`dtype`: "float16-fp8" has a KV cache in FP8."""
        key, shape = f"{case}-{dtype}-{device}", CASES[case][0]
        if key not in known:
            engine, ranks = root / f"engine-{case}-{dtype}", shape["p"]
            if not engine.exists():
                # Prompts are read in several chunks, between steps of those that decode.
                limits = {"max_seq_len": 96, "max_batch_size": 8, "prefill_chunk": 8}
                own, _, kv_dtype = dtype.partition("-")
                types = {"dtype": own, "kv_dtype": kv_dtype or "auto"}
                cqil_trt.build(model=models(case), output=engine, probes="never", **types, **limits, **shape)
            run = {"engine": str(engine), "device": device, "seed": SEED, "out": str(root / key)}
            done = mpirun(ranks, write_json(root / f"{key}.json", run), script="tests/support/slots_worker.py")
            assert done.returncode == 0, done.stderr
            known[key] = [json.loads((root / f"{key}-{rank}.json").read_text()) for rank in range(ranks)]
        return known[key]

    return get


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module", params=["float32", "float16", "float16-fp8"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def found(ran, case, dtype):
    return ran(case, dtype, "cuda")[0]


@pytest.fixture(scope="module")
def exact(ran, case):
    """The results in float32, whose rounding changes no token."""
    return ran(case, "float32", "cuda")[0]


@pytest.fixture(scope="module")
def on_cpu(ran, case):
    return ran(case, "float32", "cpu")[0]


@pytest.fixture(scope="module")
def logits(models, case):
    """A function that gives the reference's logits from which each token after a prompt is chosen, float64."""
    shape, references = CASES[case][0], {}

    def get(prompt, tokens, kv_dtype="auto"):
        if kv_dtype not in references:
            network = with_kv_cache(load_model(models(case)), EngineLimits(kv_dtype=kv_dtype))
            references[kv_dtype] = CqilModel(network, **shape) if shape["p"] > 1 else network
        with torch.inference_mode():
            every = references[kv_dtype](torch.tensor([prompt + tokens[:-1]]), use_cache=False).logits[0]
        return every[len(prompt) - 1 :].double().numpy()

    return get


def tokens(found):
    return [sequence["tokens"] for sequence in found]


def log_softmax(rows):
    return torch.from_numpy(rows).log_softmax(-1).numpy()


def test_every_rank_has_the_same(ran, case, dtype):
    first, *others = ran(case, dtype, "cuda")
    assert all(other == first for other in others)


def test_greedy_tokens_are_the_likeliest(found, logits, dtype):
    # In float16 the logits are rounded, and some codes of a cache in FP8 are neighbours; logits are some units large.
    slack = 1e-4 if dtype == "float32" else 0.1
    kv_dtype = dtype.partition("-")[2] or "auto"
    for prompt, chosen in zip(found["prompts"], found["together"]):
        rows = logits(prompt, chosen, kv_dtype)
        assert len(chosen) == len(rows) == 24
        assert (rows.max(-1) - rows[np.arange(len(rows)), chosen]).max() <= slack


def test_together_is_as_alone(exact, on_cpu):
    assert exact["together"] == exact["alone"] == on_cpu["together"]


@pytest.mark.parametrize("name", ["joining", "few rows"])
def test_sequences_that_join_and_leave_are_as_alone(name, exact, on_cpu):
    for i, (sequence, count) in enumerate(zip(exact[name], exact["joining steps"])):
        if name == "joining" and i == 4:  # ended from outside
            assert sequence["reason"] == ""
            count = 8
        assert sequence["tokens"] == exact["alone"][i][:count] == on_cpu["alone"][i][:count]


def test_reused_beginnings_change_no_token(exact, on_cpu):
    reused = exact["reused"]
    assert tokens(reused["found"]) == tokens(reused["alone"]) == tokens(on_cpu["reused"]["found"])
    first, copied, fewer, none, continued, again = (sequence["cached"] for sequence in reused["found"])
    # Of 30, 19 and 10 equal tokens, beside a sequence that runs: less than 16 are not copied. Then both may continue.
    assert (first, copied, fewer, none) == (0, 30, 19, 0) and continued > 34 and again == 32


def test_sampled_tokens_are_those_of_a_cpu(exact, on_cpu):
    assert tokens(exact["sampled"]) == tokens(exact["sampled alone"]) == tokens(on_cpu["sampled"])
    assert exact["sampled"][0]["tokens"] != exact["together"][0]


def test_log_probabilities_are_those_of_the_model(exact, on_cpu, logits):
    """Before any bias, penalty or temperature."""
    assert tokens(exact["logprobs"]) == tokens(exact["sampled"]) == tokens(on_cpu["logprobs"])
    for i, (sequence, wanted) in enumerate(zip(exact["logprobs"], exact["logprobs wanted"])):
        if wanted is None:
            assert sequence["logprobs"] == []
            continue
        right = log_softmax(logits(exact["prompts"][i], sequence["tokens"]))
        assert len(sequence["logprobs"]) == len(sequence["tokens"])
        for token, pairs, row in zip(sequence["tokens"], sequence["logprobs"], right):
            ids, values = map(list, zip(*pairs))
            assert ids[0] == token and len(ids) == wanted + 1
            assert np.abs(row[ids] - values).max() < 1e-4
            # Equal but for rounding to those that are likeliest.
            assert np.abs(np.sort(row)[::-1][:wanted] - values[1:]).max(initial=0) < 1e-4
        for pairs, theirs in zip(sequence["logprobs"], on_cpu["logprobs"][i]["logprobs"]):
            assert np.abs(np.array(pairs)[:, 1] - np.array(theirs)[:, 1]).max() < 1e-4


@pytest.mark.parametrize("requests", ["reported", "masked"])
def test_no_token_depends_on_drafts(requests, found, dtype):
    """In half precision too: drafts are verified by the same sums."""
    plain, drafted = found[f"{requests} undrafted"], found[f"{requests} drafted"]
    assert tokens(drafted) == tokens(plain)
    for one, other in zip(plain, drafted):
        values, others = ([[p for _, p in pairs] for pairs in found["logprobs"]] for found in (one, other))
        # In float32 one row is multiplied by another kernel than several.
        assert others == ([pytest.approx(row, abs=1e-4) for row in values] if dtype == "float32" else values)
    accepted = [sequence["accepted"] for sequence in drafted]
    # Drafts of sequences with penalties or masks are not verified on GPUs.
    assert sum(accepted) > 3 and accepted[5] == 0


def test_masks_are_obeyed(found):
    for i, sequence in enumerate(found["guided"]):
        assert len(sequence["tokens"]) == 24
        allowed = [token % 5 == k % 5 for k, token in enumerate(sequence["tokens"])]
        assert all(allowed) if i % 2 == 0 else not all(allowed)


def test_guided_tokens_are_as_alone(exact, on_cpu, logits):
    assert tokens(exact["guided"]) == tokens(exact["guided alone"]) == tokens(on_cpu["guided"])
    # Sequences without masks are what they are without such neighbours.
    assert tokens(exact["guided"])[1:8:2] == tokens(exact["sampled"])[1::2]
    chosen = exact["guided"][8]["tokens"]
    rows = logits(exact["prompts"][2], chosen)
    for k, (token, row) in enumerate(zip(chosen, rows)):
        assert row[k % 5 :: 5].max() - row[token] < 1e-4
