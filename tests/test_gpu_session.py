"""The session of GPUs without a GPU: its memory is the host's, and its kernels are in PyTorch (tests/support)."""

import ctypes
import random
from types import SimpleNamespace

import pytest
import torch
from support import SEED, noisy_drafts
from support.cases import ARCHITECTURES, GPU_FAMILIES
from support.checkpoints import load_model, make_model
from support.host_gpu import SessionKernels, use_host
from support.needs import need

import cqil_trt
from cqil_trt.gpu import kernel_library
from cqil_trt.runner import Runner
from cqil_trt.scheduler import Request

LENGTH = 200


@pytest.fixture
def open_session(monkeypatch):
    need("cuda-bindings", "cuda-pathfinder")
    from cqil_trt.backends.torch.gpu_session import TorchCudaSession
    from cqil_trt.gpu.weights import DeviceWeights

    kernels = SessionKernels()
    use_host(monkeypatch)
    monkeypatch.setattr(kernel_library, "load", lambda: kernels)
    monkeypatch.setattr(kernel_library, "find_linear_library", lambda library: True)
    opened = []

    def open(engine, slots):
        opened.append(TorchCudaSession(engine, None, 0, slots, DeviceWeights(engine, 0, 0, kernels)))
        opened[-1].wait()
        return opened[-1]

    yield open
    for session in opened:
        session.close()


def some_requests(chance, vocabulary):
    """Beginnings that several share, up to the last place of a slot."""
    base = [chance.randrange(vocabulary) for _ in range(LENGTH)]
    lengths = [1, chance.randint(2, 60), chance.randint(2, LENGTH), LENGTH - 1, LENGTH]
    sizes = [(40, 40, 20), (50, 30, 20)]  # of a prompt, of what it shares, and of its answer
    sizes += [(length, chance.randint(0, length), chance.choice([1, 2, 12])) for length in lengths]
    for length, shared, answer in sizes:
        prompt = base[:shared] + [chance.randrange(vocabulary) for _ in range(length - shared)]
        yield Request(prompt=tuple(prompt), max_new_tokens=answer)


def run(runner, requests, chance):
    """The tokens of each request, and how many of their prompts' tokens were reused, and of their drafts accepted."""
    waiting, numbers, found, cached, accepted = list(requests), [], {}, 0, 0
    while waiting or not runner.scheduler.idle:
        if waiting and (runner.scheduler.idle or chance.random() < 0.3):
            numbers.append(runner.scheduler.add(waiting.pop(0)))
        for event in runner.turn():
            found.setdefault(event.number, []).extend(choice.token for choice in event.choices)
            cached += event.cached
            accepted += event.accepted
    return [found[number] for number in numbers], cached, accepted


def slot_state(session):
    """Of every slot: its cache, its next token, its length, and which tokens it has chosen."""
    sizes = session._caches | session._states
    return {name: ctypes.string_at(session._memory[name], size) for name, size in sizes.items()}


@pytest.mark.parametrize("length, widest", [(64, 16), (5, 4), (1, 1)])
def test_measuring_leaves_nothing_behind(length, widest, tmp_path, open_session, monkeypatch):
    chance = random.Random(SEED)
    model = make_model(tmp_path / "model", max_position_embeddings=64)
    limits = {"max_seq_len": length, "max_batch_size": 3, "dtype": "float32"}
    engine = cqil_trt.build(model=model, output=tmp_path / "engine", p=1, probes="never", **limits)
    fresh, measured = (open_session(engine, 4) for _ in range(2))
    unknown = fresh.step_costs
    before, executed, execute = slot_state(measured), [], measured._execute
    with monkeypatch.context() as patch:
        patch.setattr(measured, "_execute", lambda *a: (executed.append((a[1], a[2])), execute(*a)))
        measured.measure_steps()
    assert slot_state(measured) == before
    costs = measured.step_costs
    if widest == 1:
        assert costs == unknown and not executed
    else:
        # Each width as often as any other.
        counts = {width: executed.count((1, width)) for width in (1, 2, 4, 8, 16) if width <= widest}
        assert sum(counts.values()) == len(executed) and len(set(counts.values())) == 1
        assert len(costs.steps) == widest and costs.steps[0] == 1 and list(costs.steps) == sorted(costs.steps)
        assert costs.wait > 0
    requests = []
    for _ in range(6):
        prompt = tuple(chance.randrange(engine.model.vocab_size) for _ in range(chance.randint(1, length)))
        requests.append(Request(prompt=prompt, max_new_tokens=chance.randint(1, length + 1 - len(prompt))))
    turns = chance.random()
    found = [run(Runner.of(s, "latency"), requests, random.Random(turns)) for s in (fresh, measured)]
    assert found[0] == found[1] and fresh.digest == measured.digest != 0
    assert slot_state(fresh) == slot_state(measured)


def test_ranks_take_the_costs_of_rank_0(tmp_path, open_session, monkeypatch):
    """Ranks that drafted by what each of them measured would run different steps."""
    model = make_model(tmp_path / "model", max_position_embeddings=64)
    engine = cqil_trt.build(model=model, output=tmp_path / "engine", p=1, probes="never", max_seq_len=8)
    session, told = open_session(engine, 1), {1: 2.0, 2: 2.5, 4: 3.0, 8: 7.0}

    def bcast(mine):
        assert mine.keys() == told.keys()
        return told

    with monkeypatch.context() as patch:
        patch.setattr(session, "_comm", SimpleNamespace(bcast=bcast))
        session.measure_steps()
    assert [session.step_costs.step(width) for width in told] == [1, 1.25, 1.5, 3.5]


@pytest.mark.parametrize("name, chunk", [("llama", 48), ("mistral-windows", 20), ("gemma3", 8)])
def test_sequences_that_come_and_go_are_the_models(name, chunk, tmp_path, open_session, monkeypatch):
    """Against transformers: chunks and their padding, graphs, slots that are continued and copied, circles, drafts."""
    chance, (architecture, changes) = random.Random(SEED), {**ARCHITECTURES, **GPU_FAMILIES}[name]
    model = make_model(tmp_path / "model", architecture, **{**changes, "max_position_embeddings": LENGTH})
    limits = {"max_seq_len": LENGTH, "prefill_chunk": chunk, "max_batch_size": 4, "dtype": "float32"}
    engine = cqil_trt.build(model=model, output=tmp_path / "engine", p=1, probes="never", **limits)
    assert (engine.limits.circle is None) == (name == "llama")
    session, network, vocabulary = open_session(engine, 3), load_model(model), engine.model.vocab_size
    session.warm_up(2, chunk, drafts=True)
    session.measure_steps()
    requests = list(some_requests(chance, vocabulary))
    policy = chance.choice(["latency", "throughput"])
    plain, cached, _ = run(Runner.of(session, policy, rows=2), requests, chance)
    assert cached > 0
    speculation = noisy_drafts.noisy(monkeypatch.setattr, SEED, vocabulary, tokens=15)
    noisy_drafts.Noisy.answers = tuple([*request.prompt, *tokens] for request, tokens in zip(requests, plain))
    drafted, _, accepted = run(Runner.of(session, policy, speculation=speculation), requests, chance)
    assert accepted > 0
    for request, *answers in zip(requests, plain, drafted):
        for tokens in answers:
            read, count = len(request.prompt), len(tokens)
            assert count == min(request.max_new_tokens, LENGTH + 1 - read)
            with torch.inference_mode():
                logits = network(torch.tensor([[*request.prompt, *tokens[:-1]]]), use_cache=False).logits[0, read - 1 :]
            # The likeliest, or as likely but for float32's rounding.
            chosen = logits[torch.arange(count), tokens]
            assert (logits.amax(-1) - chosen).max() <= 1e-4 * logits.abs().max(), (request, tokens)
