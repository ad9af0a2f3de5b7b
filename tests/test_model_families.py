"""Families that compute what LLaMA does not: one rank against transformers, several against the formulas in float64."""

import json

import numpy as np
import pytest
import torch
from support import SEED
from support.cases import FAMILIES, relative
from support.checkpoints import load_model, make_model, rank_weights
from support.formulas import Formulas
from support.threads import together

from cqil_trt.backends.torch.ops import TorchOps
from cqil_trt.checkpoint import Checkpoint
from cqil_trt.collectives import HostCommunicator, LocalCommunicator, split
from cqil_trt.config import CqilConfig, EngineLimits
from cqil_trt.model import ModelConfig
from cqil_trt.network.decoder import decode
from cqil_trt.reference import CqilModel
from cqil_trt.schedule import Peers
from cqil_trt.shard import plan

# Two prompts, of which one is longer than the windows, and tokens that follow both beyond them.
LENGTHS, FOLLOW = (14, 3), 12


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {
        name: make_model(root / name, architecture, seed=SEED + i, rms_norm_eps=1e-3, **changes)
        for i, (name, (architecture, changes)) in enumerate(FAMILIES.items())
    }


def sequences(seed):
    random = np.random.default_rng([SEED, seed])
    return [random.integers(3, 131, length + FOLLOW).tolist() for length in LENGTHS]


def computed(checkpoint, shape, tokens):
    """What every rank's decoder says after each token of both sequences, and the last stream that it joined.

    The prompts are read apart, the first in two chunks; then both sequences get a token at a time.
    """
    ranks = plan(checkpoint.model, CqilConfig(**shape))
    longest = max(map(len, tokens))
    limits = EngineLimits(max_batch_size=2, max_seq_len=longest)

    def work(comm, number):
        rank, communicators = ranks[number], {Peers.ALL: LocalCommunicator()}
        if len(ranks) > 1:
            communicators = {kind: HostCommunicator(part) for kind, part in split(comm, rank.schedule).items()}
        ops = TorchOps(rank, rank_weights(rank, checkpoint.reader), communicators, limits, checkpoint.rotary)
        found = [[], []]

        def step(slots, new, past):
            length = len(tokens[slots[0]]) if len(slots) == 1 else None
            ops.begin(slots, None if length is None else LENGTHS[slots[0]])
            select = torch.arange(len(new[0])).expand(len(slots), -1)
            out = decode(ops, torch.tensor(new), torch.tensor(past), select)
            if rank.schedule.predicts:
                for slot, logits in zip(slots, out):
                    found[slot].extend(logits)

        with torch.inference_mode():
            for slot, spans in ((0, ((0, 5), (5, LENGTHS[0]))), (1, ((0, LENGTHS[1]),))):
                for first, last in spans:
                    step([slot], [tokens[slot][first:last]], [first])
            for i in range(FOLLOW):
                step([0, 1], [[s[n + i]] for s, n in zip(tokens, LENGTHS)], [n + i for n in LENGTHS])
        return found, ops.joined

    results = together(len(ranks), work)
    logits = [torch.cat([torch.stack(found[i]) for found, _ in results if found[i]], -1) for i in range(2)]
    return logits, [joined for _, joined in results]


@pytest.mark.parametrize("name", FAMILIES)
def test_one_rank_computes_what_transformers_does(name, models):
    checkpoint, network, tokens = Checkpoint(models[name], None), load_model(models[name]), sequences(0)
    found, _ = computed(checkpoint, {"p": 1}, tokens)
    for logits, sequence, length in zip(found, tokens, LENGTHS):
        assert checkpoint.model.sliding_window is None or len(sequence) > checkpoint.model.sliding_window
        assert relative(logits.numpy(), cached(network, sequence, length)) < 1e-5


def cached(network, sequence, length):
    """transformers' logits after each token: of the prompt at once, then token by token with its cache."""
    found, cache = [], None
    for new in [sequence[:length], *([token] for token in sequence[length:])]:
        with torch.inference_mode():
            out = network(torch.tensor([new]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits[0].numpy())
    return np.concatenate(found)


SHAPES = [
    {"p": 2, "d": 0, "start": 1, "end": 5},
    {"p": 2, "d": 1, "start": 2, "end": 6, "placement": "leader"},
    {"p": 2, "d": 1, "start": 0, "end": 4, "bypass": "residual"},
    {"p": 3, "d": 1, "start": 3, "end": 6},
    {"p": 4, "d": 0, "start": 1, "end": 5, "placement": "leader"},
    {"p": 4, "d": 1, "start": 2, "end": 6},
    {"p": 4, "placement": "tensor"},
    {"p": 3, "placement": "tensor"},
    {"p": 2, "ranks_per_layer": 2, "d": 1, "start": 1, "end": 5},
    {"p": 2, "ranks_per_layer": 3, "d": 1, "start": 2, "end": 6, "bypass": "residual"},
]


@pytest.mark.parametrize("name", [name for name in FAMILIES if "longrope" not in name])
def test_ranks_compute_the_definition(name, models):
    checkpoint, network = Checkpoint(models[name], None), load_model(models[name])
    formulas = Formulas(network.config, network.state_dict())
    # The formulas themselves say what transformers does, without groups.
    ids = torch.tensor(sequences(0)[:1])
    with torch.inference_mode():
        assert relative(formulas.logits(ids).numpy(), network(ids, use_cache=False).logits.numpy()) < 1e-5
    for number, shape in enumerate(SHAPES):
        tokens = sequences(number)
        found, joined = computed(checkpoint, shape, tokens)
        for logits, sequence in zip(found, tokens):
            expected = formulas.logits(torch.tensor([sequence]), **shape)[0]
            assert relative(logits.numpy(), expected.numpy()) < 1e-5, shape
        assert all(torch.equal(joined[0], other) for other in joined[1:])  # bit for bit
        if shape.get("placement") != "tensor":
            wrapped = CqilModel(network, **{k: v for k, v in shape.items() if k != "placement"})
            with torch.inference_mode():
                judged = cached(wrapped, tokens[0], LENGTHS[0])
            expected = formulas.logits(torch.tensor(tokens[:1]), **shape)[0]
            assert relative(judged, expected.numpy()) < 1e-5, shape
            with wrapped.sequential(), torch.inference_mode():
                again = wrapped(ids, use_cache=False).logits
            assert relative(again.numpy(), formulas.logits(ids).numpy()) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_descriptions_survive_json(name, models):
    model = Checkpoint(models[name], None).model
    assert ModelConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model
