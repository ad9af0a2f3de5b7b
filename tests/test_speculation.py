"""Drafts: what is drafted, what it may cost, and that no token depends on it."""

import json
import random
from bisect import bisect_left
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import SEED, noisy_drafts, write_json
from support.checkpoints import load_model, make_model
from support.draws import assert_same_draws
from support.noisy_drafts import Noisy
from support.processes import mpirun

import cqil_trt
from cqil_trt.errors import UserError
from cqil_trt.generate import GenerationConfig, generate
from cqil_trt.gpu.session import CudaSession
from cqil_trt.llm import Llm
from cqil_trt.reference import CqilModel
from cqil_trt.runner import Runner
from cqil_trt.sampling import SamplingConfig
from cqil_trt.scheduler import Request
from cqil_trt.session import HostSession
from cqil_trt.speculation import NgramDrafter, Speculation, Speculator, StepCosts

TOKENS = st.lists(st.integers(0, 3), max_size=60)


def looked_up(tokens, most):
    """What prompt lookup drafts, by its definition: of the last 8 earlier occurrences of the last 3 tokens, the one
    that agrees furthest back, up to 32 tokens; as many tokens as agree."""
    ends = [e for e in range(2, len(tokens) - 1) if len(tokens) > 2 and tokens[e - 2 : e + 1] == tokens[-3:]][-8:]
    agreeing = {
        e: max(n for n in range(3, min(32, e + 1) + 1) if tokens[e + 1 - n : e + 1] == tokens[-n:]) for e in ends
    }
    if not ends:
        return []
    best = max(ends, key=lambda e: (agreeing[e], e))
    draft = []
    while len(draft) < min(most, agreeing[best]):
        draft.append([*tokens, *draft][best + 1 + len(draft)])
    return draft


@settings(max_examples=300)
@given(TOKENS, TOKENS, st.integers(1, 15))
def test_ngrams_are_looked_up(first, second, most):
    drafter = NgramDrafter()
    drafter.extend(first)
    assert list(drafter.draft(most)) == looked_up(first, most)
    for token in second:
        drafter.extend([token])
    assert list(drafter.draft(most)) == looked_up(first + second, most)


def linear(row, wait=0.0):
    """Steps that take so much more with each row."""
    return StepCosts(steps=(1.0, 1.0 + row), wait=wait)


def duration(times, rows):
    """Of a step with so many rows: on the line through the measured ones around it, the last two for more."""
    known = sorted(times)
    i = min(max(bisect_left(known, rows), 1), len(known) - 1)
    before, after = known[i - 1], known[i]
    return times[before] + (times[after] - times[before]) * (rows - before) / (after - before)


@given(st.lists(st.floats(0.1, 5), min_size=2, max_size=6), st.floats(0.1, 10), st.integers(1, 70))
def test_costs_lie_on_lines_between_measured_ones(increases, unit, rows):
    times = {1 << i: unit * ms for i, ms in enumerate(accumulate(increases))}
    costs = StepCosts.of(times, 0.3)
    assert costs.step(1) == 1 and costs.step(rows) == pytest.approx(duration(times, rows) / times[1])
    for sequences in (1, 3):
        alone, drafting = (duration(times, sequences * width) for width in (1, rows))
        assert costs.drafts(sequences, rows) == pytest.approx((drafting + 0.3) / alone - 1)
        assert costs.waits(sequences) == pytest.approx(0.3 / alone)


def test_more_rows_never_take_less():
    """Where a measurement says so, it is noise: else a short draft would be dearer than a long one."""
    costs = StepCosts.of({1: 2.0, 2: 1.9, 4: 3.0, 8: 2.5, 16: 4.0}, 0.1)
    assert [costs.step(rows) for rows in (1, 2, 3, 4, 6, 8, 12, 16)] == [1, 1, 1.25, 1.5, 1.5, 1.5, 1.75, 2]
    assert costs.wait == 0.05


def lost_in_vain(times, wait, sequences, steps, chance):
    """Steps lost to drafts, of which some are accepted, and how many tokens were drafted."""
    padded, widest = {w: next(p for p in WIDTHS if p >= w) for w in range(1, 17)}, max(1, 16 // sequences)
    speculator = Speculator(Speculation(method="ngram", tokens=15), StepCosts.of(times, wait), padded.__getitem__)
    speculator.extend([1, 2, 3] * 30)
    usual, lost, drafted = duration(times, sequences), 0.0, 0
    for step in range(1, steps + 1):
        if chance.random() < 0.5 and speculator.pays_to_wait(sequences):
            lost += sequences * wait / usual
        draft = speculator.draft(widest - 1, sequences)
        assert len(draft) < widest
        accepted = chance.randint(0, len(draft)) if chance.random() < 0.02 else 0
        speculator.verified(len(draft), accepted, sequences)
        if draft:
            lost += sequences * ((duration(times, sequences * padded[1 + len(draft)]) + wait) / usual - 1) - accepted
            drafted += len(draft)
        assert lost <= 0.5 + 0.02 * step + 1e-9
    return drafted


WIDTHS = (1, 2, 4, 8, 16)
# One H200: SmolLM2-135M in float32, scripts/benchmark_speculation.py.
SMALL_MODEL = dict(zip(WIDTHS, (1.06, 1.37, 1.68, 2.06, 2.14)))


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("wait", [0.0, 0.1])
@pytest.mark.parametrize("times", [SMALL_MODEL, *({1: 1, 2: 1 + row} for row in (0.01, 0.1, 0.3))])
def test_drafts_in_vain_cost_little(times, wait, sequences):
    assert lost_in_vain(times, wait, sequences, 3000, random.Random(SEED)) > 0


@settings(max_examples=50)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 3)), min_size=4, max_size=4),
    st.floats(0, 1),
    st.integers(1, 8),
    st.randoms(use_true_random=False),
)
def test_drafts_in_vain_cost_little_whatever_steps_take(increases, wait, sequences, chance):
    lost_in_vain(dict(zip(WIDTHS, accumulate(increases, initial=1.0))), wait, sequences, 200, chance)


def test_accepted_drafts_are_followed_by_long_ones():
    speculator = Speculator(Speculation(method="ngram", tokens=9), linear(0.1))
    text = list(range(40))
    speculator.extend([*text, 0, 1, 2])
    done, steps = 3, 0
    while done < 33:
        draft = speculator.draft(33 - done, 1)
        assert list(draft) == text[done : done + len(draft)]
        speculator.verified(len(draft), len(draft), 1)
        speculator.extend(text[done : done + len(draft) + 1])
        done += len(draft) + 1
        steps += 1
    assert steps <= 7


def test_a_wait_is_paid_if_a_draft_can_follow():
    speculator = Speculator(Speculation(method="ngram"), linear(0.05, wait=0.1))
    assert not speculator.pays_to_wait(1)  # nothing has occurred before
    speculator.extend([1, 2, 3] * 10)
    waits = 0
    while speculator.pays_to_wait(1):
        waits += 1
        assert speculator.draft(9, 1)
    assert waits == 3  # of half a step: the next wait, that after the draft and a row are 0.25
    assert not speculator.pays_to_wait(3)
    speculator.verified(4, 4, 1)
    assert speculator.pays_to_wait(1)


def test_steps_with_drafts_have_a_width_that_is_captured():
    session = SimpleNamespace(_draft_rows=16)
    widths = [CudaSession.draft_width(session, sequences) for sequences in range(1, 18)]
    assert widths == [16, 8, 4, 4, 2, 2, 2, 2, *[1] * 9]
    for width in range(1, 17):
        padded = CudaSession.padded_width(session, width)
        assert width <= padded < 2 * width and padded in widths


def test_computed_rows_are_paid():
    padded = {4: 8}
    speculation = Speculation(method="ngram", tokens=15)
    speculator = Speculator(speculation, linear(0.125), lambda width: padded.get(width, width))
    speculator.extend([1, 2, 3] * 30)
    # Half a step is four rows. Of two sequences it is two of a step that has two already, one for each.
    assert len(speculator.draft(9, 1)) == 4 and len(speculator.draft(9, 2)) == 1
    speculator.verified(1, 0, 1)
    assert len(speculator.draft(9, 1)) == 2  # three drafted tokens would be seven rows


def test_sessions_without_drafts_refuse(engine, monkeypatch):
    monkeypatch.setattr(HostSession, "step_costs", None)
    with pytest.raises(UserError, match="this backend does not verify drafts"):
        cqil_trt.load(engine, speculate="ngram").generate([[5]], 2)


def test_costs_are_measured_where_tokens_are_drafted(engine, noisy, monkeypatch):
    """Once the weights are there; sequences that start then are drafted for by these costs."""
    monkeypatch.setattr(HostSession, "measure_steps", lambda session: setattr(session, "step_costs", linear(1e6)))
    assert Llm(engine).session.step_costs == HostSession.step_costs
    llm = Llm(engine, speculation=noisy)
    assert llm.session.step_costs == linear(1e6) and "step costs" in llm.startup.parts
    assert llm.generate([[5, 9]], 30, ignore_eos=True)[0].drafted == 0
    llm.session.step_costs = linear(0.01)
    assert llm.generate([[5, 9]], 30, ignore_eos=True)[0].drafted > 0


def test_flags_are_read():
    assert Speculation.parse("none") is None
    assert Speculation.parse("ngram") == Speculation(method="ngram", tokens=7)
    assert Speculation.parse("ngram:15") == Speculation(method="ngram", tokens=15)
    with pytest.raises(UserError, match="method must be one of ngram"):
        Speculation(method="medusa")
    for wrong in (
        "",
        "eagle",
        "ngram:0001999",
        "ngram:" + "9" * 5000,
        "ngram:",
        "ngram:0",
        "ngram:16",
        "ngram:x",
        "ngram:-1",
        "ngram:²",
        "none:3",
    ):
        with pytest.raises(UserError, match="--speculate"):
            Speculation.parse(wrong)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    root = tmp_path_factory.mktemp("speculation")
    make_model(root / "model", vocab_size=259)
    cqil_trt.build(model=root / "model", p=1, output=root / "engine", max_seq_len=64, max_batch_size=6)
    return root / "engine"


@pytest.fixture
def noisy(monkeypatch):
    return noisy_drafts.noisy(monkeypatch.setattr, SEED)


SAMPLINGS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.2, "min_p": 0.02, "repetition_penalty": 1.3, "logprobs": 3},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"temperature": 0.9, "frequency_penalty": 0.4, "logit_bias": ((5, 4.0), (17, -3.5))},
]


def sampling_of(index):
    return SamplingConfig(**SAMPLINGS[index % len(SAMPLINGS)], seed=SEED + index)


def judge(network):
    """A function that gives a network's logits after each of some tokens."""

    def logits_of(tokens):
        with torch.inference_mode():
            return network(torch.tensor([tokens]), use_cache=False).logits[0].numpy()

    return logits_of


def run(runner, prompts):
    """By prompt: tokens, log-probabilities, and how many drafted tokens were accepted."""
    found, numbers = [([], [], [0]) for _ in prompts], {}
    for index, prompt in enumerate(prompts):
        request = Request(prompt=prompt, max_new_tokens=40, sampling=sampling_of(index))
        numbers[runner.scheduler.add(request)] = index
    while not runner.scheduler.idle:
        for news in runner.turn():
            tokens, logprobs, accepted = found[numbers[news.number]]
            tokens += [choice.token for choice in news.choices]
            logprobs += [choice.logprobs for choice in news.choices if choice.logprobs]
            accepted[0] += max(len(news.choices) - 1, 0)
    return found


@pytest.mark.parametrize("ahead", [0, 1])
def test_no_token_depends_on_drafts(ahead, engine, noisy, monkeypatch):
    # As on a GPU: a step is submitted before the tokens of the one before are known, unless they may be drafted.
    monkeypatch.setattr(HostSession, "ahead", ahead)
    monkeypatch.setattr(HostSession, "step_costs", linear(0.15, wait=0.05 * ahead))
    rng = random.Random(SEED)
    # One begins so late that its slot is soon full.
    prompts = [tuple(rng.randrange(3, 259) for _ in range(n)) for n in (1, 9, 20, 5, 2, 59, 13, 30)]
    llm = Llm(engine)
    plain = run(Runner.of(llm.session, "latency"), prompts)
    Noisy.answers = tuple([*prompt, *tokens] for prompt, (tokens, _, _) in zip(prompts, plain))
    drafted = run(Runner.of(llm.session, "latency", speculation=noisy), prompts)
    logits_of = judge(load_model(llm.engine.source.model))
    for index, ((tokens, logprobs, _), (found, found_logprobs, _)) in enumerate(zip(plain, drafted)):
        # One row is multiplied by another kernel than several.
        equal = assert_same_draws(tokens, found, prompts[index], logits_of, sampling_of(index))
        assert len(found_logprobs) == len(logprobs)
        for expected, actual in zip(logprobs[:equal], found_logprobs):
            assert [token for token, _ in actual] == [token for token, _ in expected]
            assert [value for _, value in actual] == pytest.approx([value for _, value in expected], abs=1e-4)
    assert sum(accepted for _, _, (accepted,) in drafted) > 30
    assert [accepted for _, _, (accepted,) in plain] == [0] * len(prompts)


def test_greedy_text_is_hugging_faces(engine, noisy, monkeypatch):
    monkeypatch.setattr(Speculation, "parse", lambda text: {"noisy": noisy}[text])
    llm = cqil_trt.load(engine, speculate="noisy")
    network = load_model(llm.engine.source.model)
    prompts = [[5, 9, 77], [200], [8] * 20]
    expected = []
    for prompt in prompts:
        answer = network.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None)
        expected.append(answer[0].tolist())
    Noisy.answers = tuple(expected)
    completions = llm.generate(prompts, 30, ignore_eos=True)
    assert [c.prompt + c.tokens for c in completions] == expected
    for completion in completions:
        assert completion.steps == len(completion.tokens) - completion.accepted
        assert 0 < completion.accepted <= completion.drafted


def test_an_accepted_end_ends(engine, noisy):
    llm = Llm(engine)
    prompt = [5, 9, 77]
    free = llm.generate([prompt], 30, ignore_eos=True)[0].tokens
    end = free[20]
    Noisy.answers = ([*prompt, *free],)
    runner = Runner.of(llm.session, "latency", speculation=noisy)
    # What a sequence left in its slot after the end is not taken for a part of it.
    for _ in range(3):
        config = GenerationConfig(max_new_tokens=30, eos_token_ids=(end,))
        found = generate(runner, [prompt], config)[0]
        assert found.tokens == free[: free.index(end) + 1] and found.finish_reason == "eos"
        again = generate(runner, [[*prompt, *free[:15]]], GenerationConfig(max_new_tokens=15))[0]
        assert again.tokens == free[15:]


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_ranks_draft_alike(tmp_path, backend):
    """Through the commands, whose prompts repeat themselves: the same text in fewer steps."""
    make_model(tmp_path / "model", vocab_size=61)
    # In placement leader, rank 1 predicts nothing.
    placement = {"torch": "sharded", "onnx": "leader"}[backend]
    shape = {"p": 2, "placement": placement, "max_seq_len": 96, "max_batch_size": 3}
    engine = cqil_trt.build(model=tmp_path / "model", backend=backend, output=tmp_path / "engine", **shape)
    logits_of = judge(CqilModel.of(load_model(tmp_path / "model"), engine.cqil))
    rng = random.Random(SEED)
    prompts = [[rng.randrange(3, 61) for _ in range(8)] * 3, [7, 8, 9] * 5, [11]]
    ids = write_json(tmp_path / "prompts.json", prompts)
    found = {}
    sampled = {"temperature": 0.3, "seed": 7, "frequency_penalty": 0.1}
    for values in ({}, sampled):
        flags = [flag for name, value in values.items() for flag in (f"--{name.replace('_', '-')}", value)]
        for speculate in ("none", "ngram:5"):
            out = tmp_path / "out.json"
            arguments = [
                "--engine",
                tmp_path / "engine",
                "--token-ids",
                ids,
                "--max-new-tokens",
                "60",
                "--device",
                "cpu",
            ]
            done = mpirun(2, *arguments, *flags, "--speculate", speculate, "--json", out)
            assert done.returncode == 0, done.stderr
            found.setdefault(speculate, []).extend(json.loads(out.read_text())["completions"])
    configs = [SamplingConfig(**values) for values in ({}, sampled) for _ in prompts]
    for plain, drafted, config in zip(*found.values(), configs, strict=True):
        assert_same_draws(drafted["tokens"], plain["tokens"], plain["prompt_tokens"], logits_of, config)
        assert plain["drafted_tokens"] == 0 and plain["steps"] == len(plain["tokens"])
        assert drafted["steps"] == len(drafted["tokens"]) - drafted["accepted_tokens"]
    # A random model's greedy text soon repeats itself.
    assert sum(c["accepted_tokens"] for c in found["ngram:5"]) > 0


@pytest.mark.parametrize("placement", ["leader", "tensor"])
def test_sampling_where_ranks_share_or_lack_the_vocabulary(placement, tmp_path):
    """Two ranks give the tokens of one, whether the second predicts nothing or half of the vocabulary."""
    make_model(tmp_path / "model", vocab_size=61)
    prompts = write_json(tmp_path / "prompts.json", [[5, 9, 7], [8] * 20])
    found = {}
    for p in (1, 2):
        shape = {"p": p, "placement": placement} if p == 1 or placement == "tensor" else {"p": p, "start": 6, "end": 6}
        cqil_trt.build(
            model=tmp_path / "model",
            output=tmp_path / f"engine{p}",
            max_seq_len=64,
            **{**shape, "placement": placement},
        )
        out = tmp_path / f"out{p}.json"
        arguments = ["--engine", tmp_path / f"engine{p}", "--token-ids", prompts, "--max-new-tokens", "30"]
        flags = ["--temperature", 0.9, "--seed", 3, "--repetition-penalty", 1.2, "--device", "cpu"]
        done = mpirun(p, *arguments, *flags, "--json", out)
        assert done.returncode == 0, done.stderr
        found[p] = json.loads(out.read_text())["completions"]
    logits_of = judge(load_model(tmp_path / "model"))
    config = SamplingConfig(temperature=0.9, seed=3, repetition_penalty=1.2)
    for one, two in zip(found[1], found[2], strict=True):
        assert_same_draws(one["tokens"], two["tokens"], one["prompt_tokens"], logits_of, config)


def test_wrong_flags_end_in_one_line(engine):
    done = mpirun(1, "--engine", engine, "--speculate", "medusa")
    assert done.returncode == 2
    assert "--speculate must be none or METHOD[:TOKENS] with METHOD of ngram, found 'medusa'" in done.stderr
