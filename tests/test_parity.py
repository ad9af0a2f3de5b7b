"""Engines under mpirun against the reference: prefill, cached decode, batches, every placement and architecture."""

import json

import numpy as np
import pytest
import torch
from support import SEED, write_json
from support.cases import ARCHITECTURES, FAMILIES, SHAPES, identifier, ranks_of, relative
from support.checkpoints import load_model, make_adapter, make_model
from support.draws import assert_likeliest, assert_same_choices, assert_same_draws
from support.formulas import Formulas
from support.needs import missing, need, need_cuda_backend
from support.processes import mpirun

import cqil_trt
from cqil_trt.reference import CqilModel

STEPS = 20


def cases():
    """Every architecture at two shapes and placements, every shape and placement at some architecture."""
    found = []
    for i, name in enumerate(ARCHITECTURES):
        for j, shape in enumerate(SHAPES):
            placement = ("sharded", "leader")[(i + j) % 2]
            if (i + j) % 3 == 0 or name == "llama-odd-heads":
                found.append((name, {**shape, "placement": placement}))
        found.append((name, {"p": 2 + i % 3, "placement": "tensor"}))
    found += [("llama-gqa", {**shape, "placement": p}) for shape in SHAPES for p in ("sharded", "leader")]
    # A few ranks more than usual, and an empty range.
    found += [("llama-gqa", {"p": 6, "d": 5, "start": 0, "end": 6}), ("qwen2", {"p": 2, "start": 3, "end": 3})]
    # Joins left out: beside groups, without any, with biases of o and down, on ranks without heads.
    found += [
        ("llama-odd-heads", {"p": 2, "start": 2, "end": 4, "drop_attention_join": "0-1,5"}),
        ("llama-tied-bias", {"p": 2, "placement": "tensor", "drop_attention_join": "0-5"}),
        ("llama-tied-bias", {"p": 3, "d": 1, "start": 0, "end": 3, "drop_attention_join": "3,5"}),
        ("qwen3", {"p": 3, "start": 3, "end": 3, "drop_attention_join": "auto:4"}),
        ("llama-few-heads", {"p": 3, "start": 1, "end": 4, "bypass": "residual", "d": 1, "drop_attention_join": "0"}),
    ]
    # Several ranks for each layer of a group: every number of both up to eight ranks, uneven heads, ranks without
    # heads, biases, no groups; joins left out in groups, in both layers of one or in one, and outside.
    found += [
        ("llama-odd-heads", {"p": 2, "ranks_per_layer": 2, "start": 1, "end": 5}),
        ("llama-tied-bias", {"p": 2, "ranks_per_layer": 2, "d": 1, "start": 0, "end": 4, "bypass": "residual"}),
        ("llama-few-heads", {"p": 2, "ranks_per_layer": 3, "start": 2, "end": 6}),
        ("llama-odd-heads", {"p": 2, "ranks_per_layer": 3, "d": 1, "start": 2, "end": 6}),
        ("qwen3", {"p": 3, "ranks_per_layer": 2, "start": 0, "end": 6}),
        ("phi3", {"p": 3, "ranks_per_layer": 2, "d": 1, "start": 0, "end": 6}),
        ("llama-tied-bias", {"p": 2, "ranks_per_layer": 4, "start": 1, "end": 5}),
        ("qwen2", {"p": 2, "ranks_per_layer": 4, "d": 1, "start": 2, "end": 6}),
        ("llama-gqa", {"p": 4, "ranks_per_layer": 2, "start": 1, "end": 5}),
        ("llama-odd-heads", {"p": 4, "ranks_per_layer": 2, "d": 1, "start": 2, "end": 6, "bypass": "residual"}),
        ("llama-odd-heads", {"p": 2, "ranks_per_layer": 2, "start": 3, "end": 3}),
        ("llama-gqa", {"p": 1, "ranks_per_layer": 3}),
        ("qwen2", {"p": 2, "ranks_per_layer": 2, "placement": "tensor"}),
        ("llama-tied-bias", {"p": 2, "ranks_per_layer": 2, "start": 2, "end": 6, "drop_attention_join": "0,2-3,5"}),
        ("llama-odd-heads", {"p": 2, "ranks_per_layer": 4, "start": 0, "end": 4, "drop_attention_join": "1,3,5"}),
        ("qwen3", {"p": 2, "ranks_per_layer": 2, "d": 1, "start": 2, "end": 4, "drop_attention_join": "auto:2"}),
    ]
    # Families with more than LLaMA has.
    found += [
        ("gemma2", {"p": 3, "d": 1, "start": 3, "end": 6}),
        ("gemma3", {"p": 2, "d": 1, "start": 2, "end": 6}),
        ("olmo2", {"p": 4, "placement": "tensor"}),
        ("olmo3", {"p": 2, "start": 1, "end": 5, "placement": "leader"}),
        ("granite", {"p": 2, "d": 1, "start": 0, "end": 4, "bypass": "residual", "drop_attention_join": "5"}),
        ("smollm3", {"p": 2, "start": 1, "end": 5}),
        ("qwen3-windows", {"p": 2, "start": 2, "end": 6}),
    ]
    return found


def adapted(number):
    """Whether the engine of this case is built with an adapter."""
    return number % 4 == 1


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        name: make_model(root / name, architecture, seed=SEED + i, **changes)
        for i, (name, (architecture, changes)) in enumerate({**ARCHITECTURES, **FAMILIES}.items())
    }


@pytest.fixture(scope="session")
def engines(request, models, tmp_path_factory):
    """The directory with the engines of this run's tests, their prompts and adapters, and their numbers by ranks."""
    root = tmp_path_factory.mktemp("engines")
    chosen = {item.callspec.params["number"] for item in request.session.items if "results" in item.fixturenames}
    random = np.random.default_rng(SEED)
    prompts = {i: [random.integers(3, 131, size=n).tolist() for n in (7, 1, 19)] for i in range(len(cases()))}
    adapters = {}
    by_ranks: dict[int, list] = {}
    for i, (name, shape) in enumerate(cases()):
        if i not in chosen:
            continue
        lora = None
        if adapted(i):
            if missing("peft>=0.18"):
                continue
            if name not in adapters:
                adapters[name] = make_adapter(models[name], root / f"adapter-{name}", seed=SEED + i)
            lora = adapters[name]
        limits = {"max_seq_len": 64, "max_batch_size": 3}
        cqil_trt.build(model=models[name], lora=lora, output=root / f"engine{i}", probes="never", **limits, **shape)
        by_ranks.setdefault(ranks_of(shape), []).append(i)
    return root, prompts, adapters, by_ranks


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def results(request, engines):
    """What the engines compute on a device: one mpirun for each number of ranks runs those it fits."""
    if request.param == "cuda":
        need_cuda_backend()
    root, prompts, adapters, by_ranks = engines
    for ranks, numbers in by_ranks.items():
        batch = [
            {
                "engine": str(root / f"engine{i}"),
                "device": request.param,
                "prompts": prompts[i],
                "steps": STEPS,
                "out": str(root / f"{request.param}{i}"),
            }
            for i in numbers
        ]
        file = write_json(root / f"{request.param}-cases{ranks}.json", batch)
        done = mpirun(ranks, file, script="tests/support/mpi_worker.py")
        assert done.returncode == 0, done.stderr
    return root, prompts, adapters, request.param


# In the fast run a few that two ranks can execute.
NUMBERS = [
    pytest.param(i, id=identifier(case), marks=() if i % 4 < 2 and ranks_of(case[1]) < 3 else pytest.mark.slow)
    for i, case in enumerate(cases())
]


@pytest.mark.parametrize("number", NUMBERS)
def test_engine_equals_reference(number, models, results):
    root, prompts, adapters, device = results
    name, shape = cases()[number]
    if adapted(number):
        need("peft>=0.18")
    ranks = [np.load(f"{root}/{device}{number}-{rank}.npz") for rank in range(ranks_of(shape))]
    for other in ranks[1:]:  # bit for bit
        assert all(np.array_equal(ranks[0][key], other[key]) for key in ranks[0])
    has_collectives = len(ranks) > 1 and (shape.get("placement") != "leader" or shape["end"] > shape["start"])
    assert (ranks[0]["joined"].size > 0) == has_collectives
    found = ranks[0]

    network = load_model(models[name])
    config = json.loads((root / f"engine{number}" / "config.json").read_text())
    if config["source"]["lora"]:
        from peft import PeftModel

        network = PeftModel.from_pretrained(network, adapters[name]).merge_and_unload().eval()
    reference = network  # placement tensor is the unchanged model
    dropped = config["cqil"]["drop_attention_join"]
    if dropped:
        formulas = Formulas(network.config, network.state_dict())
    elif shape.get("placement") != "tensor":
        reference = CqilModel(network, **{k: v for k, v in shape.items() if k != "placement"})

    def logits_of(tokens):
        with torch.inference_mode():
            ids = torch.tensor([tokens])
            logits = formulas.logits(ids, **config["cqil"]) if dropped else reference(ids, use_cache=False).logits
            return logits[0].numpy()

    for i, prompt in enumerate(prompts[number]):
        # One full forward pass over prompt and continuation judges prefill and every cached decode step.
        tokens = found["tokens"][i].tolist()
        full = logits_of(prompt + tokens[:-1])
        assert relative(found[f"score{i}"], full[: len(prompt)]) < 1e-5
        assert relative(found["logits"][i], full[len(prompt) - 1 :]) < 1e-5
        assert_likeliest(tokens, full[len(prompt) - 1 :])
        # What a prompt gives does not depend on the batch it is in.
        assert_same_choices(tokens, found[f"alone{i}"].tolist(), prompt, logits_of)
        drawn = (found[f"{name}{i}"].tolist() for name in ("sampled", "sampled_alone"))
        assert_same_draws(*drawn, prompt, logits_of)
