"""Sampling against transformers, stopping, streaming; on an engine of one rank, in this process."""

import numpy as np
import pytest
import torch
from support import SEED, write_json
from support.checkpoints import load_model, make_model
from support.made_tokenizers import llama2_json, save_byte_tokenizer, save_json
from support.processes import mpirun
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import cqil_trt
from cqil_trt.errors import UserError
from cqil_trt.generate import GenerationConfig
from cqil_trt.sampling import Sampler, SamplingConfig, sample
from cqil_trt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    root = tmp_path_factory.mktemp("generate")
    make_model(root / "model", vocab_size=259)
    save_byte_tokenizer(root / "model")
    cqil_trt.build(model=root / "model", p=1, output=root / "engine", max_seq_len=48, max_batch_size=2)
    return cqil_trt.load(root / "engine")


@pytest.fixture(scope="module")
def network(llm):
    return load_model(llm.engine.source.model)


def test_greedy_equals_hugging_face_generate(llm, network):
    prompts = [[5, 9, 77], [200], [8] * 20]
    completions = llm.generate(prompts, 16, ignore_eos=True)
    for prompt, completion in zip(prompts, completions):
        expected = network.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None)
        assert completion.tokens == expected[0, len(prompt) :].tolist()
        assert completion.finish_reason == "length" and completion.prompt == prompt


def test_eos_ends_a_sequence_and_not_its_neighbours(llm):
    free = llm.generate([[5, 9, 77], [200]], 16, ignore_eos=True)
    import dataclasses

    stop = free[0].tokens[6]
    engine = llm.engine
    try:
        llm.engine = dataclasses.replace(engine, model=dataclasses.replace(engine.model, eos_token_ids=(stop,)))
        ended = llm.generate([[5, 9, 77], [200]], 16)
    finally:
        llm.engine = engine
    ends = {stop, llm.tokenizer.special("eos_token")}
    for found, tokens in zip(ended, (completion.tokens for completion in free), strict=True):
        length = next((i for i, token in enumerate(tokens, start=1) if token in ends), 16)
        assert found.tokens == tokens[:length]
        assert found.finish_reason == ("eos" if tokens[length - 1] in ends else "length")
    assert ended[0].finish_reason == "eos"


def test_a_full_engine_ends_generation(llm):
    completion = llm.generate([[7] * 45], 16, ignore_eos=True)[0]
    assert len(completion.tokens) == 48 - 45 + 1 and completion.finish_reason == "length"
    assert len(llm.generate([[7] * 48], 16, ignore_eos=True)[0].tokens) == 1
    with pytest.raises(UserError, match="prompt 1 has 49 tokens, the engine takes 48"):
        llm.generate([[7] * 49])


def test_a_full_sequence_does_not_disturb_its_neighbour(llm):
    alone = llm.generate([[5, 9, 77]], 40, ignore_eos=True)[0].tokens
    both = llm.generate([[7] * 46, [5, 9, 77]], 40, ignore_eos=True)
    assert len(both[0].tokens) == 3 and both[1].tokens == alone


def test_stop_texts_and_streams(llm):
    pieces: dict[int, str] = {}
    prompts = ["hello", "some other text"]
    free = llm.generate(prompts, 30, ignore_eos=True, on_text=lambda i, t: pieces.update({i: pieces.get(i, "") + t}))
    for i, completion in enumerate(free):
        assert llm.tokenizer.decode(completion.tokens).startswith(completion.text.rstrip("\ufffd"))
        assert pieces.get(i, "") == completion.text
    stop = free[0].text[3:5]
    assert stop, "the random model produced no text"
    shown: list[str] = []
    stopped = llm.generate(prompts[:1], 30, ignore_eos=True, stop=[stop], on_text=lambda i, t: shown.append(t))[0]
    assert stopped.text == free[0].text.split(stop)[0] and stopped.finish_reason == "stop"
    # The beginning of a stop text is not shown, though it comes tokens before its end.
    assert "".join(shown) == stopped.text


def test_tokenizer_equals_that_of_transformers(llm):
    expected = PreTrainedTokenizerFast.from_pretrained(llm.engine.source.model)
    tokenizer = Tokenizer(llm.engine.path)
    text = "naïve café — 東京 🙂"
    assert tokenizer.encode(text) == expected(text).input_ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = expected.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    assert tokenizer.chat(text) == (chat if isinstance(chat, list) else chat["input_ids"])
    stream = tokenizer.stream()
    assert "".join(stream.add(token) for token in tokenizer.encode(text)) == text


def save_chain(directory, ids, vocab_size):
    """A model that says `ids` one after the other: its next token depends on the last one alone."""
    network = load_model(make_model(directory, vocab_size=vocab_size, num_hidden_layers=2, hidden_size=96))
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        network.model.norm.weight.fill_(1)
        network.model.embed_tokens.weight.normal_()
        network.lm_head.weight.zero_()
        for token, follower in zip(ids, ids[1:]):
            network.lm_head.weight[follower] += network.model.embed_tokens.weight[token]
    network.save_pretrained(directory)
    return directory


# Ids of bytes in the tokenizer of llama2_json.
NEWLINE, BROKEN, EMOJI = 3 + 0x0A, (3 + 0xF0, 3 + 0x9F), (3 + 0xF0, 3 + 0x9F, 3 + 0x98, 3 + 0x80)
SAYINGS = {
    "a character that breaks off, and what follows": ((NEWLINE, *BROKEN, "a", "."), (), "\n\ufffda.", "eos"),
    "a character in bytes": (("a", *EMOJI, "."), (), "a😀.", "eos"),
    "a character that the end breaks off": (("a", *BROKEN), (), "a\ufffd", "eos"),
    "a special token's text as a stop": (("a", "<|im_end|>", "."), ("<|im_end|>",), "a", "stop"),
    "a special token within a stop": (("h", "a", "<|im_end|>", "."), ("a<|im_end|>",), "h", "stop"),
    "special tokens are no text": (("a", "<|im_end|>", "."), ("nothing",), "a.", "eos"),
    "a stop over two tokens": (("h", "a", "."), ("a.",), "h", "stop"),
    "the earlier of two stops": (("h", "a", "."), (".", "a."), "h", "stop"),
    "a stop around a special token": (("h", "a", "<|im_end|>", "b"), ("ab",), "h", "stop"),
    "what only began like a stop": (("h", "a", "b"), ("a.",), "hab", "eos"),
}


@pytest.mark.parametrize("case", SAYINGS)
def test_text_as_it_appears(case, tmp_path):
    said, stops, text, reason = SAYINGS[case]
    backend = llama2_json()
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    start, size = backend.token_to_id("w"), backend.get_vocab_size()
    ids = [start, *(token if isinstance(token, int) else backend.token_to_id(token) for token in said), 2]
    model = save_chain(tmp_path / "model", ids, size + 3)
    save_json(backend, model, eos_token="</s>")
    cqil_trt.build(model=model, p=1, output=tmp_path / "engine", max_seq_len=32, probes="never")
    llm, pieces = cqil_trt.load(tmp_path / "engine"), []
    completion = llm.generate([[start]], 20, stop=stops, on_text=lambda i, piece: pieces.append(piece))[0]
    assert (completion.text, completion.finish_reason) == (text, reason)
    assert "".join(pieces) == text
    if reason == "stop":
        assert not any(stop[:1] in piece for stop in stops for piece in pieces)


def test_the_tokenizers_end_of_text_ends_too(tmp_path):
    backend = llama2_json()
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    start, end = backend.token_to_id("w"), backend.token_to_id("<|im_end|>")
    model = save_chain(tmp_path / "model", [start, end, start], backend.get_vocab_size())
    save_json(backend, model, eos_token="<|im_end|>")
    cqil_trt.build(model=model, p=1, output=tmp_path / "engine", max_seq_len=32, probes="never")
    completion = cqil_trt.load(tmp_path / "engine").generate([[start]], 20)[0]
    assert (completion.tokens, completion.finish_reason) == ([end], "eos")


@pytest.mark.parametrize(
    "config",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"top_k": 9, "top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.15},
    ],
)
def test_sampling_draws_from_the_distribution_of_transformers(config):
    random = np.random.default_rng(SEED)
    logits = (3 * random.standard_normal(40)).astype(np.float32)
    sampling = SamplingConfig(**{"temperature": 1.3, **config})
    scores = TemperatureLogitsWarper(sampling.temperature)(None, torch.from_numpy(logits)[None].double())
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    expected = scores[0].softmax(-1).numpy()
    draws = 20_000
    counts = np.bincount([sample(logits, sampling, random.random()) for _ in range(draws)], minlength=40) / draws
    assert not counts[expected == 0].any()
    # 4.5 standard deviations of a binomial share, and a few draws more: rare tokens are Poisson, with a longer tail.
    assert (np.abs(counts - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / draws) + 5 / draws).all()


def test_the_same_seed_draws_the_same_tokens(llm):
    options = {"temperature": 1.0, "ignore_eos": True}
    llm.generate(["hello"], 1)  # what it leaves of the prompt is not read again, and float32 rounds otherwise
    first, again, other = (llm.generate(["hello"], 20, seed=seed, **options)[0].tokens for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature must be a finite number"),
        ({"repetition_penalty": float("inf")}, "repetition-penalty must be a finite number"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top-k"),
        ({"top_p": 0.0}, "top-p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"min_p": 1.5}, "min-p"),
        ({"repetition_penalty": 0.0}, "repetition-penalty"),
        ({"presence_penalty": float("inf")}, "presence-penalty"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_wrong_sampling_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**values)
    with pytest.raises(UserError, match="max-new-tokens"):
        GenerationConfig(max_new_tokens=0)


@pytest.mark.parametrize("prompt", [[], [259], [-1], [True], ""])
def test_wrong_prompts_are_refused(llm, prompt):
    with pytest.raises(UserError, match="prompt 2"):
        llm.generate([[3], prompt])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_gpu_draws_what_a_cpu_draws(ranks, tmp_path):
    """Greedy and sampled, alone and in batches; tokens never leave the GPU between steps there."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    make_model(tmp_path / "model", vocab_size=1009)
    shape = {"p": ranks, "start": 1, "end": 5} if ranks > 1 else {"p": 1}
    engine = tmp_path / "engine"
    cqil_trt.build(model=tmp_path / "model", output=engine, max_seq_len=64, max_batch_size=3, probes="never", **shape)
    found = {}
    for device in ("cpu", "cuda"):
        case = {"engine": str(engine), "device": device, "steps": 12, "out": str(tmp_path / device)}
        case["prompts"] = [[5, 9, 77], [200], [8] * 20]
        done = mpirun(ranks, write_json(tmp_path / f"{device}.json", [case]), script="tests/support/mpi_worker.py")
        assert done.returncode == 0, done.stderr
        found[device] = np.load(f"{case['out']}-0.npz")
    keys = [key for key in found["cpu"] if key.startswith(("tokens", "alone", "sampled"))]
    assert len(keys) == 10 and all(np.array_equal(found["cpu"][key], found["cuda"][key]) for key in keys)


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-6, 1.0, 2.0])
@pytest.mark.parametrize("penalty", [5e-324, 1e-310, 1e-39, 1.0])
@pytest.mark.parametrize("top_p", [5e-324, 0.5, 1.0])
def test_extreme_sampling_gives_a_token(temperature, penalty, top_p):
    inf, nan = float("inf"), float("nan")
    config = SamplingConfig(temperature=temperature, repetition_penalty=penalty, top_p=top_p, guided=True, min_p=5e-324)
    sampler = Sampler(config, [0, 1, 2], 4)
    for logits, mask, possible in (
        ([1, 2, -3, 0.5], 0b1111, {0, 1, 2, 3}),
        ([1, 2, -3, 0.5], 0b1100, {2, 3}),
        ([1, 2, -3, 0.5], 0, {0}),  # nothing is possible: as on GPUs
        ([nan, -inf, nan, -1e30], 0b1111, {3}),
        ([nan, nan, nan, nan], 0b1111, {0}),
        ([inf, 0, inf, nan], 0b1111, {0, 2}),
        ([-inf, -inf, -inf, -inf], 0b1111, {0}),
    ):
        assert sampler.choose(np.array(logits, np.float32), np.array([mask], np.uint32)).token in possible
