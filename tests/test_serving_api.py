"""The server, asked by OpenAI's own client: every endpoint and field, judged by run.py and by Hugging Face."""

import asyncio
import json
import math
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from support import ROOT
from support.chat_models import PLAIN, TEMPLATE, chat_tokenizer, make_chat_model
from support.checkpoints import load_model
from support.draws import possible
from support.made_tokenizers import gpt2_alphabet, save_json
from support.needs import need
from support.processes import build, mpirun
from support.serving import ServerProcess
from support.waiting import until

need("openai", "llguidance", "starlette", "uvicorn", "pydantic", "prometheus_client")
import openai  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from cqil_trt.errors import UserError  # noqa: E402
from cqil_trt.sampling import SamplingConfig  # noqa: E402
from cqil_trt.serving import api, grammar_check, grammars  # noqa: E402
from cqil_trt.serving.answers import tools_of  # noqa: E402
from cqil_trt.serving.grammar_check import GrammarCheck  # noqa: E402
from cqil_trt.serving.grammars import Grammars  # noqa: E402
from cqil_trt.tokenizer import Tokenizer  # noqa: E402

# As the engine computes in float32, and Hugging Face too.
CLOSE = 1e-4
LONGEST = 1024
PROMPTS = [
    "hello world",
    "def f(x):\n    return",
    "the quick brown fox",
    "安 你好 世界",
    "😀 emoji é",
    "12345 67",
    "a",
    "  spaces  ",
    "this is a small test of a tokenizer, and a longer one than the others: hello world, hello world",
    "<tool_call>",
]
MORE = {"ignore_eos", "top_k", "min_p", "repetition_penalty", "chat_template_kwargs", "add_special_tokens"}


def fields(**given):
    """Those that OpenAI's client knows as they are, the others in extra_body."""
    extra = {name: value for name, value in given.items() if name in MORE or name.startswith("guided_")}
    return {name: value for name, value in given.items() if name not in extra} | {"extra_body": extra}


@dataclass
class Served:
    server: Any
    client: Any
    tokenizer: Any  # of the library tokenizers
    truth: Any  # the model, loaded by transformers
    templates: Any  # the tokenizer, loaded by transformers

    def complete(self, prompt="hello world", **given):
        given = {"max_tokens": 16, "temperature": 0, "model": "tiny", **given}
        return self.client.completions.create(prompt=prompt, **fields(**given))

    def chat(self, content="Hello", **given):
        messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
        given = {"max_tokens": 16, "temperature": 0, "model": "tiny", **given}
        return self.client.chat.completions.create(messages=messages, **fields(**given))

    def ids(self, text):
        return self.tokenizer.encode(text).ids

    def rendered(self, messages, **options):
        text = self.templates.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        return self.ids(text)

    def log_softmax(self, ids):
        """float64 [tokens, vocabulary]: row i is about the token after token i."""
        import torch

        with torch.no_grad():
            return self.truth(torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)

    def id_of(self, data):
        """The token that stands for these bytes."""
        letters = gpt2_alphabet()
        special = self.tokenizer.token_to_id(bytes(data).decode(errors="replace"))
        found = self.tokenizer.token_to_id("".join(letters[byte] for byte in data))
        return special if found is None else found

    def bytes_of(self, token):
        piece = self.tokenizer.id_to_token(token)
        if token >= self.tokenizer.get_vocab_size(with_added_tokens=False):
            return piece.encode()
        of = {letter: byte for byte, letter in gpt2_alphabet().items()}
        return bytes(of[letter] for letter in piece)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("engines") / "engine"
    flags = ["--p", 2, "--placement", "tensor", "--max-seq-len", LONGEST, "--max-batch-size", 8]
    done = build("--model", model, *flags, "--output", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def served(model, engine):
    from transformers import AutoTokenizer

    # With drafts, which must not change anything; run.py, whose answers are expected, does without them.
    server = ServerProcess(2, engine, "--device", "cpu", "--model-name", "tiny", "--speculate", "ngram:4")
    yield Served(
        server=server,
        client=server.client(),
        tokenizer=chat_tokenizer(),
        truth=load_model(model),
        templates=AutoTokenizer.from_pretrained(model),
    )
    assert server.stop() == 0, server.output
    assert "all ranks hold identical bits" in server.output and "Traceback" not in server.output


@pytest.fixture(scope="module")
def expected(engine, tmp_path_factory):
    """What run.py says to the prompts, by its flags."""
    directory = tmp_path_factory.mktemp("expected")
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]

    def ask(*flags):
        done = mpirun(2, "--engine", engine, *prompts, "--max-new-tokens", 24, *flags, "--json", directory / "out.json")
        assert done.returncode == 0, done.stderr
        return [SimpleNamespace(**found) for found in json.loads((directory / "out.json").read_text())["completions"]]

    sampled = ("--temperature", 1, "--seed", 5, "--top-k", 50, "--top-p", 0.95)
    return {"greedy": ask(), "sampled": ask(*sampled), "chat": ask("--chat")}


SAMPLED = {"temperature": 1, "seed": 5, "top_k": 50, "top_p": 0.95}


def assert_same_text(served, text, wanted, **sampling):
    """The text is that of run.py, up to a token that float32's rounding decides; returns whether it is all of it."""
    import torch

    if text == wanted.text:
        return True
    ids, tokens, config = wanted.prompt_tokens, wanted.tokens, SamplingConfig(**sampling)
    with torch.inference_mode():
        rows = served.truth(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 :].numpy()
    sure = 0
    while len(possible(config, ids, tokens[:sure], rows[sure])) == 1:
        sure += 1
        assert sure < len(tokens), (text, wanted.text)
    assert text.startswith(served.tokenizer.decode(tokens[:sure]).rstrip("\ufffd")), (text, wanted.text)
    return False


def ask(server, path, body=None, method=None, **headers):
    """The status, the headers, and the JSON of an answer, if it is that."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(server.url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            status, found, text = response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as error:
        status, found, text = error.code, error.headers, error.read().decode()
    return status, found, json.loads(text) if "json" in found.get("content-type", "") else text


def log_lines(server):
    return [json.loads(line) for line in server.output.splitlines() if line.startswith("{") and line.endswith("}")]


def refusal(answer):
    """The error of an answer, which must have OpenAI's shape."""
    status, _, body = answer
    assert status >= 400 and set(body) == {"error"}, answer
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == status, error
    assert isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str)
    return error


def parsed_metrics(server):
    text = ask(server, "/metrics")[2]
    return {
        (sample.name, *(value for name, value in sorted(sample.labels.items()) if name != "model_name")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# Endpoints


def test_models(served):
    [model] = served.client.models.list().data
    assert model.id == "tiny" and model.object == "model" and model.max_model_len == LONGEST
    assert served.client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="tiny"):
        served.client.models.retrieve("other/model")
    with pytest.raises(openai.NotFoundError, match="'other' does not exist") as caught:
        served.complete(model="other")
    assert caught.value.param == "model"


def test_state(served):
    assert ask(served.server, "/health")[2] == {"status": "ok"}
    status, headers, _ = ask(served.server, "/ready")
    assert status == 200 and "retry-after" not in headers
    assert ask(served.server, "/health/")[2] == {"status": "ok"}
    assert ask(served.server, "/", method="HEAD")[::2] == (200, "")
    from cqil_trt import __version__

    assert ask(served.server, "/version")[2] == {"version": __version__}
    status, headers, page = ask(served.server, "/")
    assert status == 200 and page.startswith("<!doctype html>") and "script-src" in headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v2/chat/completions", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/tokenize", 405),
    ],
)
def test_paths_that_are_not_there(method, path, status, served):
    answer = ask(served.server, path, b"{}" if method in ("POST", "PUT") else None, method)
    assert answer[0] == status and refusal(answer)["param"] is None


def test_embeddings_are_refused_by_name(served):
    with pytest.raises(openai.BadRequestError, match="embeddings are not supported"):
        served.client.embeddings.create(model="tiny", input="x")


@pytest.mark.parametrize("text", [*PROMPTS, "<|im_start|>user\nx<|im_end|>", "\x00\x1f\u2028", "e\u0301"])
def test_tokens_of_a_text_and_back(text, served):
    found = ask(served.server, "/tokenize", {"prompt": text})[2]
    # A control token that a user writes is text; everything else is as the library says.
    if "<|" not in text:
        assert found["tokens"] == served.ids(text)
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] == LONGEST
    assert ask(served.server, "/detokenize", {"tokens": found["tokens"]})[2] == {"prompt": text}


def test_tokens_of_messages_and_back(served):
    messages = [{"role": "system", "content": "Bé"}, {"role": "user", "content": "Hi <|im_end|>"}]
    found = ask(served.server, "/tokenize", {"messages": messages})[2]["tokens"]
    assert found == served.rendered(messages)
    text = "<|im_start|>system\nBé<|im_end|>\n<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert ask(served.server, "/detokenize", {"tokens": found})[2] == {"prompt": text}
    size = served.tokenizer.get_vocab_size()
    assert refusal(ask(served.server, "/detokenize", {"tokens": [size]}))["param"] == "tokens"


def test_metrics_count(served):
    before = parsed_metrics(served.server)
    served.complete(PROMPTS[2], max_tokens=5, ignore_eos=True)
    assert ask(served.server, "/v1/completions", {"prompt": "x", "n": 0})[0] == 400

    def grown(name, *labels):
        return parsed_metrics(served.server)[(name, *labels)] - before.get((name, *labels), 0)

    until(lambda: grown("vllm:request_success_total", "length") == 1)
    assert grown("vllm:prompt_tokens_total") == len(served.ids(PROMPTS[2]))
    assert grown("vllm:generation_tokens_total") == grown("vllm:request_generation_tokens_sum") == 5
    assert grown("vllm:time_to_first_token_seconds_count") == 1
    assert grown("vllm:inter_token_latency_seconds_count") == 4
    until(lambda: grown("cqil:requests_refused_total", "invalid") == 1)
    after = parsed_metrics(served.server)
    assert after["cqil:healthy",] == 1
    assert {"0", "1"} == {labels[0] for name, *labels in after if name == "cqil:rank_last_seen_seconds"}


# The same text as run.py


def streamed(chunks):
    """The pieces of a stream's first choice, why it ended, and the usage where it came."""
    pieces, reason, usage = [], None, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text = choice.text if hasattr(choice, "text") else choice.delta.content
            pieces += [text] if text else []
            reason = choice.finish_reason or reason
    return pieces, reason, usage


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("clients", [1, 8])
@pytest.mark.parametrize("kind", ["greedy", "sampled", "chat"])
def test_text_is_that_of_run_py(kind, clients, stream, served, expected):
    more = SAMPLED if kind == "sampled" else {}
    if stream:
        more = {**more, "stream": True, "stream_options": {"include_usage": True}}

    def complete(prompt):
        answer = (served.chat if kind == "chat" else served.complete)(prompt, max_tokens=24, **more)
        if stream:
            pieces, reason, usage = streamed(answer)
            return "".join(pieces), reason, usage
        [choice] = answer.choices
        return choice.message.content if kind == "chat" else choice.text, choice.finish_reason, answer.usage

    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(complete, PROMPTS))
    for prompt, (text, reason, usage), wanted in zip(PROMPTS, answers, expected[kind]):
        if not assert_same_text(served, text, wanted, **(SAMPLED if kind == "sampled" else {})):
            continue
        assert reason == {"eos": "stop"}.get(wanted.finish_reason, wanted.finish_reason)
        messages = [{"role": "user", "content": prompt}]
        ids = served.rendered(messages) if kind == "chat" else served.ids(prompt)
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), len(wanted.tokens))
        assert usage.total_tokens == len(ids) + len(wanted.tokens)


def test_usage_with_every_piece(served):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = served.complete(stream=True, max_tokens=6, ignore_eos=True, temperature=1, seed=3, logprobs=0,
                                    stream_options=options)  # fmt: skip
    counted = 0
    for chunk in chunks:
        counted += len(chunk.choices[0].logprobs.tokens)
        assert chunk.usage.completion_tokens == counted
    assert last.choices == [] and last.usage.completion_tokens == counted == 6
    chunks = list(served.complete(stream=True, max_tokens=3, ignore_eos=True))
    assert all(chunk.usage is None for chunk in chunks)


def test_a_second_turn_reads_only_what_is_new(served):
    first = [{"role": "user", "content": "Remember this: " + PROMPTS[8]}]
    answer = served.chat(first, max_tokens=12, temperature=1, seed=1).choices[0].message.content
    turn = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "And now?"}]
    again = served.chat(turn, max_tokens=24)
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert len(served.rendered(first)) - 4 <= cached < again.usage.prompt_tokens
    # Judged without any cache: every token that Hugging Face finds likeliest.
    scored = served.chat(turn, max_tokens=24, logprobs=True)
    assert scored.choices[0].message.content == again.choices[0].message.content
    prompt = served.rendered(turn)
    tokens = [served.id_of(entry.bytes) for entry in scored.choices[0].logprobs.content]
    found = served.log_softmax(prompt + tokens)[len(prompt) - 1 :]
    assert all(float(row.max() - row[token]) < CLOSE for token, row in zip(tokens, found))


# Fields


def test_choices_and_seeds(served):
    sampled = {"temperature": 1, "n": 4, "max_tokens": 12, "ignore_eos": True}
    first, again = (served.complete(seed=7, **sampled) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    # Float32 rounds otherwise in another batch, which may decide a token.
    assert len(set(texts)) == 4 and sum(choice.text != text for choice, text in zip(again.choices, texts)) <= 1
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert first.usage.prompt_tokens == len(served.ids("hello world")) and first.usage.completion_tokens == 48
    others = {served.complete(**sampled).choices[0].text for _ in range(3)}
    assert len(others) > 1  # without a seed, each time another text
    chunks = list(served.complete(seed=7, stream=True, **sampled))
    streams = ["".join(c.text for chunk in chunks for c in chunk.choices if c.index == index) for index in range(4)]
    assert sum(stream != text for stream, text in zip(streams, texts)) <= 1


def test_several_prompts_and_token_ids(served, expected):
    first, second, third = expected["greedy"][:3]

    def check(answer, *wanted):
        for choice, one in zip(answer.choices, wanted, strict=True):
            assert_same_text(served, choice.text, one)
        return answer

    answer = check(served.complete(PROMPTS[:3], max_tokens=24), first, second, third)
    assert answer.usage.prompt_tokens == sum(len(served.ids(prompt)) for prompt in PROMPTS[:3])
    check(served.complete([served.ids(prompt) for prompt in PROMPTS[:3]], max_tokens=24), first, second, third)
    check(served.complete(served.ids(PROMPTS[1]), max_tokens=24), second)
    check(served.complete(PROMPTS[:2], n=2, max_tokens=24), first, first, second, second)


def long_text(served, **more):
    """A text of many different tokens, the same each time. A stop text could be part of a control token: none here."""
    bias = {served.tokenizer.token_to_id(text): -100 for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    return served.complete(max_tokens=40, temperature=1.3, seed=11, logit_bias=bias, **more)


def whole_text(served):
    """`long_text` of the second time, and of all later ones: the first time, the prompt may not have been read yet."""
    return [long_text(served).choices[0].text for _ in range(2)][-1]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_end_a_text_before_them(stream, served):
    whole = whole_text(served)
    # From every place a text of two to five characters, so that some reach over the border of two tokens.
    for start in range(1, len(whole) - 5, 5):
        stop = whole[start : start + 2 + start % 4]
        given = stop if start % 2 else ["\u2060never", stop]
        answer = long_text(served, stop=given, stream=stream)
        if stream:
            pieces, reason, _ = streamed(answer)
            text = "".join(pieces)
        else:
            text, reason = answer.choices[0].text, answer.choices[0].finish_reason
        assert (text, reason) == (whole[: whole.index(stop)], "stop"), stop


def test_a_beginning_of_a_stop_text_is_shown_in_the_end(served):
    whole = whole_text(served)
    assert "".join(streamed(long_text(served, stop=whole[-2:] + "\u2060", stream=True))[0]) == whole


def test_sampling_fields_limit_what_comes(served):
    def tokens(**more):
        answer = served.chat(max_tokens=8, ignore_eos=True, logprobs=True, top_logprobs=5, **more)
        return answer.choices[0].logprobs.content

    greedy = [entry.token for entry in tokens()]
    for one in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1}):
        assert [entry.token for entry in tokens(temperature=2, seed=1, **one)] == greedy, one
    # So low that two tokens are hardly ever near enough to each other for both.
    assert [entry.token for entry in tokens(temperature=1e-7, seed=1)] == greedy
    for seed in range(4):
        for entry in tokens(temperature=2, seed=seed, top_k=3):
            assert entry.logprob >= entry.top_logprobs[2].logprob - 1e-6
        for entry in tokens(temperature=2, seed=seed, min_p=0.5):
            # After temperature: exp((logit - highest) / 2) >= 0.5.
            assert (entry.logprob - entry.top_logprobs[0].logprob) / 2 >= math.log(0.5) - 1e-4


def test_penalties(served):
    import torch

    def tokens(**more):
        answer = served.chat(max_tokens=24, ignore_eos=True, logprobs=True, **more)
        return [served.id_of(entry.bytes) for entry in answer.choices[0].logprobs.content]

    prompt = served.rendered([{"role": "user", "content": "Hello"}])
    for name, value in {"presence_penalty": 1.5, "frequency_penalty": 1.5, "repetition_penalty": 1.7}.items():
        found = tokens(**{name: value})
        with torch.no_grad():
            logits = served.truth(torch.tensor([prompt + found])).logits[0, len(prompt) - 1 :]
        for at, token in enumerate(found):
            row = logits[at].clone()
            for other in set(found[:at]):
                row[other] -= {"presence_penalty": 1.5, "frequency_penalty": 1.5 * found[:at].count(other)}.get(name, 0)
            if name == "repetition_penalty":
                for other in {*prompt, *found[:at]}:
                    row[other] = row[other] / value if row[other] > 0 else row[other] * value
            assert row.max() - row[token] < CLOSE, (name, at)


def test_a_bias_forces_and_forbids(served):
    [token] = served.ids("z")
    assert served.complete(max_tokens=5, logit_bias={token: 100}).choices[0].text == "zzzzz"
    content = served.chat(max_tokens=1, ignore_eos=True, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    best, second = (served.id_of(entry.bytes) for entry in content[0].top_logprobs)
    found = served.chat(max_tokens=1, ignore_eos=True, logprobs=True, logit_bias={best: -100}).choices[0].logprobs
    assert served.id_of(found.content[0].bytes) == second


def test_lengths(served):
    assert served.chat(max_tokens=3, ignore_eos=True).usage.completion_tokens == 3
    limited = served.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], max_completion_tokens=4, temperature=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert (limited.usage.completion_tokens, limited.choices[0].finish_reason) == (4, "length")
    default = ask(served.server, "/v1/completions", {"prompt": "x", "ignore_eos": True})[2]
    assert default["usage"]["completion_tokens"] == 16
    # The engine holds no more: the last token needs no room of its own.
    prompt = [5] * (LONGEST - 9)
    full = served.complete(prompt, max_tokens=1000, ignore_eos=True)
    assert (full.usage.completion_tokens, full.choices[0].finish_reason) == (10, "length")
    end = served.tokenizer.token_to_id("<|im_end|>")
    ended = served.complete(max_tokens=9, logit_bias={end: 100})
    assert (ended.choices[0].text, ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("", "stop", 1)
    ignored = served.complete(max_tokens=9, logit_bias={end: 100}, ignore_eos=True)
    assert (ignored.choices[0].finish_reason, ignored.usage.completion_tokens) == ("length", 9)


# Log-probabilities

CHANGES = [
    {},
    {"temperature": 1.5, "seed": 3, "top_p": 0.9},
    {"frequency_penalty": 1.5, "presence_penalty": -0.5, "repetition_penalty": 1.3},
    {"logit_bias": {"70": 100, "71": 99}},
    {"guided_choice": ["Paris, é", "Rome 你好"], "temperature": 1, "seed": 2},
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("changes", CHANGES, ids=[" ".join(changes) or "greedy" for changes in CHANGES])
def test_log_probabilities_are_the_models_own(changes, stream, served):
    answer = served.chat("Where?", max_tokens=10, logprobs=True, top_logprobs=4, stream=stream, **changes)
    if stream:
        choices = [choice for chunk in answer for choice in chunk.choices]
        content = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    else:
        content = answer.choices[0].logprobs.content
    prompt = served.rendered([{"role": "user", "content": "Where?"}])
    tokens = [served.id_of(entry.bytes) for entry in content]
    rows = served.log_softmax(prompt + tokens)[len(prompt) - 1 :]
    for token, entry, row in zip(tokens, content, rows):
        assert abs(entry.logprob - row[token]) < CLOSE
        assert entry.token == bytes(entry.bytes).decode(errors="replace")
        assert len(entry.top_logprobs) == 4
        for other, likeliest in zip(entry.top_logprobs, row.sort(descending=True).values):
            assert abs(other.logprob - likeliest) < CLOSE and abs(row[served.id_of(other.bytes)] - likeliest) < CLOSE


@pytest.mark.parametrize("prompt", ["hello world, this", "安 你好 😀é <tool_call>x", [5]])
def test_an_echoed_prompt_with_its_log_probabilities(prompt, served):
    ids = prompt if isinstance(prompt, list) else served.ids(prompt)
    text = served.tokenizer.decode(ids, skip_special_tokens=False)
    answer = served.complete(prompt, echo=True, logprobs=3, max_tokens=6, temperature=1, seed=4, ignore_eos=True)
    [choice] = answer.choices
    assert choice.text.startswith(text)
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(ids) + 6
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    rows = served.log_softmax(ids)
    for at in range(1, len(ids)):
        assert abs(found.token_logprobs[at] - rows[at - 1][ids[at]]) < CLOSE
        # Tokens that are parts of characters share a name: the likeliest is meant.
        best = rows[at - 1].sort(descending=True)
        assert 1 <= len(found.top_logprobs[at]) <= 3
        for name, value in found.top_logprobs[at].items():
            named = [float(p) for p, token in zip(*best) if served.tokenizer.decode([int(token)], False) == name]
            assert abs(named[0] - value) < CLOSE
    # Where each token begins in the text, the parts of a character where it begins.
    data = b""
    for token, offset in zip(ids, found.text_offset):
        assert offset == len(data.decode(errors="ignore"))
        data += served.bytes_of(token)
    for name, offset in zip(found.tokens, found.text_offset):
        if "\ufffd" not in name and "<|" not in name:  # a broken character before it shows with it
            assert choice.text[offset:].lstrip("\ufffd").startswith(name)
    only = served.complete(prompt, echo=True, logprobs=0, max_tokens=0)
    assert only.choices[0].text == text and only.usage.completion_tokens == 0
    assert only.choices[0].logprobs.token_logprobs[1:] == pytest.approx(found.token_logprobs[1 : len(ids)], abs=CLOSE)
    pieces = list(served.complete(prompt, echo=True, logprobs=3, max_tokens=6, temperature=1, seed=4, ignore_eos=True,
                                  stream=True))  # fmt: skip
    assert "".join(piece.choices[0].text for piece in pieces) == choice.text
    assert [offset for piece in pieces for offset in piece.choices[0].logprobs.text_offset] == found.text_offset
    assert [v for piece in pieces for v in piece.choices[0].logprobs.token_logprobs][1:] == pytest.approx(
        found.token_logprobs[1:], abs=CLOSE
    )


# Characters of several bytes


def test_characters_split_over_tokens_come_whole(served):
    given = {"guided_regex": "[é你😀ßの]{8}", "temperature": 1, "max_tokens": 64}
    for seed in range(4):
        pieces, reason, _ = streamed(served.complete(stream=True, seed=seed, **given))
        assert re.fullmatch("[é你😀ßの]{8}", "".join(pieces)) and reason == "stop"
        assert "\ufffd" not in "".join(pieces)
        pieces, _, _ = streamed(served.chat(stream=True, seed=seed, **given))
        assert re.fullmatch("[é你😀ßの]{8}", "".join(pieces))


def test_what_is_no_character_is_replaced_as_unicode_says(served):
    served.chat(max_tokens=1)  # so that all others find the prompt read
    for seed in range(4):
        given = {"max_tokens": 40, "temperature": 2, "seed": seed, "ignore_eos": True, "logprobs": True}
        choice = served.chat(**given).choices[0]
        shown = [entry for entry in choice.logprobs.content if not entry.token.startswith("<|")]
        assert choice.message.content == b"".join(bytes(e.bytes) for e in shown).decode(errors="replace")
        assert "".join(streamed(served.chat(stream=True, **given))[0]) == choice.message.content


# Grammars

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Zürich"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def obeys(text):
    value = json.loads(text)
    assert set(value) == {"city", "days"} and value["city"] in ("Paris", "Zürich") and value["days"] in range(1, 10)
    return True


@pytest.fixture(scope="module")
def no_space(served):
    """A bias against tokens that begin with white space, which JSON may have without end."""
    vocabulary = served.tokenizer.get_vocab().items()
    return {str(token): -100 for text, token in vocabulary if text[0] in "ĠĊĉčĊ\n "}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_field", ["response_format", "guided_json", "guided_json text"])
def test_json_of_a_schema(as_field, stream, served, no_space):
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    given = {
        "response_format": {"response_format": form},
        "guided_json": {"guided_json": CITY},
        "guided_json text": {"guided_json": json.dumps(CITY)},
    }[as_field]
    for seed in range(3):
        answer = served.chat(max_tokens=100, temperature=1, seed=seed, logit_bias=no_space, stream=stream, **given)
        text = "".join(streamed(answer)[0]) if stream else answer.choices[0].message.content
        assert obeys(text)


def test_json_does_not_run_on_in_white_space(served):
    """As small models like to do; here it is what the model wants most."""
    # A new line most of all: the random model would else decide which white space it is.
    wants = {token: value for text, value in (("\n", 100), (" ", 80), ("\t", 80)) for token in served.ids(text)}
    pretty = served.chat(max_tokens=400, guided_json=CITY, logit_bias=wants).choices[0]
    assert pretty.finish_reason == "stop" and obeys(pretty.message.content) and "\n" in pretty.message.content


def test_any_json_object(served, no_space):
    ends = {token: 5 for text in '"}]' for token in served.ids(text)}  # soon, whatever the random model wants
    complete = 0
    for seed in range(4):
        given = {"response_format": {"type": "json_object"}, "logit_bias": {**no_space, **ends}}
        [choice] = served.chat(max_tokens=100, temperature=1, seed=seed, **given).choices
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
            complete += 1
    assert complete


def test_choices_regular_expressions_and_grammars(served):
    for seed in range(4):
        more = {"temperature": 1, "seed": seed, "max_tokens": 40}
        text = served.complete(guided_choice=["Paris", 'a "quoted" \\ é\n', "Par"], **more).choices[0].text
        assert text in ("Paris", 'a "quoted" \\ é\n', "Par")
        text = served.complete(guided_regex=r"[a-c]{3}-[0-9]{2}", **more).choices[0].text
        assert re.fullmatch(r"[a-c]{3}-[0-9]{2}", text)
        grammar = 'start: "(" (NUMBER | start) ")"\nNUMBER: /[0-9]{1,3}/'
        choice = served.complete(guided_grammar=grammar, **more).choices[0]
        whole = re.fullmatch(r"(\(+)([0-9]{1,3})(\)+)", choice.text)
        if choice.finish_reason == "stop":
            assert whole and len(whole[1]) == len(whole[3])
        else:
            assert re.match(r"\(+([0-9]{1,3}\)*)?$", choice.text)


def test_a_grammar_that_ends_its_compiler_ends_nothing_else(engine, monkeypatch):
    """One that overflows the stack, and one that takes hours; what comes after them is checked as before."""
    chain = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(20_000)}
    deep = grammars.json_schema({"$ref": "#/$defs/a0", "$defs": {**chain, "a20000": {"type": "string"}}})
    long = grammars.json_schema({"type": "integer", "multipleOf": 62_615_533})

    async def scenario():
        check = GrammarCheck(engine)
        check.start()
        await check.check(grammars.choice(["a", "b"]))
        with pytest.raises(UserError, match="too complex"):
            await check.check(deep)
        await check.check(grammars.choice(["c"]))
        check._process.kill()  # as a system without memory does; that is no grammar's fault
        check._process.wait()
        await check.check(grammars.choice(["d"]))
        monkeypatch.setattr(grammar_check, "CHECK_SECONDS", 0.5)
        with pytest.raises(UserError, match="longer than 0.5 s"):
            await check.check(long)
        await check.check(grammars.choice(["a", "b"]))  # which is known to be right

    asyncio.run(scenario())


def test_a_grammar_whose_masks_take_long_ends_its_request_only(served, engine):
    """Each of its symbols can be derived in more ways than the last one. A schema of many fields is nothing to that."""
    ambiguous = 'start: s "c"\ns: s s | s s s | "a" | "b" | s "a" s | s "b" s\n'
    endless = {str(token): -100 for text, token in served.tokenizer.get_vocab().items() if "c" in text}
    body = {"prompt": "x", "guided_grammar": ambiguous, "logit_bias": endless, "max_tokens": 200}
    answer = ask(served.server, "/v1/completions", body)
    assert answer[0] == 400 and "too complex" in refusal(answer)["message"], answer
    fields = {f"field {i}": "x" * i for i in range(300)}
    schema = {"type": "object", "properties": {name: {"type": ["string", "null"]} for name in fields}}
    end, size = served.tokenizer.token_to_id("<|im_end|>"), served.tokenizer.get_vocab_size()
    matcher = Grammars(Tokenizer(engine), size, [end]).matcher(grammars.json_schema(schema))
    for token in served.tokenizer.encode(json.dumps(dict(list(fields.items())[:100]))).ids:
        assert matcher.mask()[token // 32] >> token % 32 & 1
        matcher.advance(token)
        assert not matcher.failure


@pytest.mark.parametrize(
    "field, value",
    [
        ("guided_regex", "(unclosed"),
        ("guided_json", "no json"),
        ("guided_json", {"type": "nonsense"}),
        ("guided_grammar", "start: ("),
        ("guided_choice", []),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "xml"}),
    ],
)
def test_a_wrong_grammar_is_refused_by_its_field(field, value, served):
    body = {"messages": [{"role": "user", "content": "x"}], field: value, "max_tokens": 4}
    answer = ask(served.server, "/v1/chat/completions", body)
    assert answer[0] == 400 and refusal(answer)["param"].split(".")[0] == field, answer


def test_guided_and_free_requests_side_by_side(served, expected, no_space):
    def free(index):
        return served.complete(PROMPTS[index], max_tokens=24).choices[0].text

    def guided(seed):
        answer = served.chat(max_tokens=100, temperature=1, seed=seed, guided_json=CITY, logit_bias=no_space)
        return obeys(answer.choices[0].message.content)

    with ThreadPoolExecutor(8) as pool:
        before, work = ([pool.submit(call, index) for index in range(6)] for call in (free, guided))
        after = [pool.submit(free, index) for index in range(6)]
        assert all(future.result() for future in work)
        for one, other, wanted in zip(before, after, expected["greedy"]):
            assert_same_text(served, one.result(), wanted)
            assert_same_text(served, other.result(), wanted)


# Tools


def tool(name, parameters):
    return {"type": "function", "function": {"name": name, "description": "…", "parameters": parameters}}


TOOLS = [
    tool("go_to", CITY),
    tool("wait", {"type": "object", "properties": {"long": {"type": "boolean"}}, "required": ["long"],
                  "additionalProperties": False}),
]  # fmt: skip


def put_together(chunks):
    """The tool calls of a stream, by the rules of OpenAI's API."""
    calls, content, reason = [], "", None
    for chunk in chunks:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for delta in choice.delta.tool_calls or ():
                if delta.id is not None:
                    assert delta.index == len(calls) and delta.type == "function"
                    calls.append([delta.id, delta.function.name, ""])
                calls[delta.index][2] += delta.function.arguments
    return calls, content, reason


def check_call(name, arguments):
    if name == "go_to":
        obeys(arguments)
    else:
        assert name == "wait" and set(json.loads(arguments)) == {"long"}
        assert isinstance(json.loads(arguments)["long"], bool)


@pytest.mark.parametrize("choice", ["required", "go_to", "wait"])
def test_a_forced_call_obeys_its_schema(choice, served):
    named = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    served.chat(tools=TOOLS, max_tokens=1)  # so that all others find the prompt read
    for seed in range(2):
        given = {"tools": TOOLS, "tool_choice": named, "max_tokens": 120, "temperature": 1, "seed": seed}
        [found] = served.chat(parallel_tool_calls=False, **given).choices
        [call] = found.message.tool_calls
        assert (found.finish_reason, found.message.content) == ("tool_calls", None)
        assert call.type == "function" and call.id and choice in ("required", call.function.name)
        check_call(call.function.name, call.function.arguments)
        calls, content, reason = put_together(served.chat(parallel_tool_calls=False, stream=True, **given))
        assert [part[1:] for part in calls] == [[call.function.name, call.function.arguments]]
        assert (content, reason) == ("", "tool_calls")


def test_several_calls_at_once(served):
    given = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 120, "temperature": 1}
    served.chat(tools=TOOLS, max_tokens=1)  # so that all others find the prompt read
    for seed in range(2):
        [found] = served.chat(seed=seed, **given).choices
        calls = [(call.function.name, call.function.arguments) for call in found.message.tool_calls]
        for name, arguments in calls if found.finish_reason == "tool_calls" else calls[:-1]:
            check_call(name, arguments)
        parts, _, reason = put_together(served.chat(seed=seed, stream=True, **given))
        assert [tuple(part[1:]) for part in parts] == calls and reason == found.finish_reason
        assert len({call.id for call in found.message.tool_calls}) == len(calls)
        assert calls


def test_free_answers_with_tools(served):
    """auto and none: text that is no call stays text, the tools are part of the prompt or are not."""
    messages = [{"role": "user", "content": "Hello"}]
    for choice, tools in (("auto", TOOLS), (None, TOOLS), ("none", None)):
        given = {} if choice is None else {"tool_choice": choice}
        found = served.chat(messages, tools=TOOLS, temperature=1, seed=3, ignore_eos=True, logprobs=True, **given)
        prompt = served.rendered(messages, tools=tools)
        assert found.usage.prompt_tokens == len(prompt)
        content = found.choices[0].logprobs.content
        assert abs(served.log_softmax(prompt)[-1][served.id_of(content[0].bytes)] - content[0].logprob) < CLOSE
        assert found.choices[0].message.tool_calls is None and found.choices[0].message.content


def test_a_call_that_the_model_writes_by_itself(served):
    """Forced token by token, as a model that was trained for tools would write it."""
    text = '<tool_call>\n{"name": "wait", "arguments": {"long": true}}\n</tool_call>'
    [found] = served.chat(tools=TOOLS, guided_choice=["Well. " + text], max_tokens=100).choices
    [call] = found.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("wait", '{"long": true}')
    assert (found.message.content, found.finish_reason) == ("Well.", "tool_calls")
    # A tool that was not offered is text.
    other = text.replace("wait", "fly")
    [found] = served.chat(tools=TOOLS, guided_choice=[other], max_tokens=100).choices
    assert (found.message.content, found.message.tool_calls, found.finish_reason) == (other, None, "stop")


def test_only_one_call_where_no_more_are_wanted(served):
    text = '<tool_call>\n{"name": "wait", "arguments": {"long": %s}}\n</tool_call>'
    given = {"tools": TOOLS, "guided_choice": [f"{text % 'true'}\n{text % 'false'} So."], "max_tokens": 150}
    [found] = served.chat(**given).choices
    assert len(found.message.tool_calls) == 2 and found.message.content == "So."
    [found] = served.chat(parallel_tool_calls=False, **given).choices
    [call] = found.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("wait", '{"long": true}')
    assert (found.message.content, found.finish_reason) == (None, "tool_calls")
    calls, content, reason = put_together(served.chat(parallel_tool_calls=False, stream=True, **given))
    assert (len(calls), content, reason) == (1, "", "tool_calls")


def test_an_answer_goes_back_as_openais_client_writes_it(served):
    said = [{"role": "user", "content": "x"}, served.chat("x").choices[0].message.model_dump()]
    assert served.chat([*said, {"role": "user", "content": "y"}]).choices
    # Arguments that are no JSON, or too deep for Python, are text.
    call = {"id": "1", "type": "function", "function": {"name": "wait", "arguments": "[" * 5000}}
    deep = [said[0], {"role": "assistant", "tool_calls": [call]}]
    assert ask(served.server, "/v1/chat/completions", {"messages": deep, "max_tokens": 1})[0] in (200, 400)


@pytest.mark.parametrize("special", [False, True])
def test_the_marks_of_a_call_are_the_models_tokens(special, tmp_path):
    """Where they are control tokens the model writes those, not their letters; both are part of the text."""
    backend = chat_tokenizer(special)
    tokenizer = Tokenizer(save_json(backend, tmp_path, eos_token="<|im_end|>", chat_template=TEMPLATE))
    end, size = backend.token_to_id("<|im_end|>"), backend.get_vocab_size()
    body = api.ChatBody.model_validate({**CHAT, "tools": TOOLS, "tool_choice": "required"})
    matcher = Grammars(tokenizer, size, [end]).matcher(tools_of(body, tokenizer).grammar)
    text = '<tool_call>\n{"name": "wait", "arguments": {"long": true}}\n</tool_call>'
    ids = backend.encode(text).ids
    assert [ids[0], ids[-1]] == [backend.token_to_id(mark) for mark in ("<tool_call>", "</tool_call>")]
    for token in [*ids, end]:
        assert matcher.mask()[token // 32] >> token % 32 & 1, backend.id_to_token(token)
        matcher.advance(token)


def test_calls_and_results_are_rendered(served):
    call = {"id": "call_1", "type": "function", "function": {"name": "wait", "arguments": '{"long":true}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Wait"}, {"type": "text", "text": " é"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]
    found = served.chat(messages, tools=TOOLS, logprobs=True, ignore_eos=True)
    plain = json.loads(json.dumps(messages))
    plain[0]["content"] = "Wait é"
    plain[1]["tool_calls"][0]["function"]["arguments"] = {"long": True}
    prompt = served.rendered(plain, tools=TOOLS)
    assert found.usage.prompt_tokens == len(prompt)
    entry = found.choices[0].logprobs.content[0]
    assert abs(served.log_softmax(prompt)[-1][served.id_of(entry.bytes)] - entry.logprob) < CLOSE


def test_variables_of_the_template(served):
    loud = served.chat(chat_template_kwargs={"shout": True}).usage.prompt_tokens
    assert loud == len(served.rendered([{"role": "user", "content": "Hello"}], shout=True))


# Errors

CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
TEXT = {"prompt": "x", "max_tokens": 2}
USER = {"role": "user", "content": "x"}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
BOTH = [
    ({"unknown_field": 1}, "unknown_field"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": "two"}, "n"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"seed": 1.5}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", 5]}, "stop.1"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"100000": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"model": 5}, "model"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ({"guided_choice": "a"}, "guided_choice"),
    ({"best_of": 2}, "best_of"),
    ({"user": 1}, "user"),
]
CHAT_ONLY = [
    ({"messages": []}, "messages"),
    ({"messages": "x"}, "messages"),
    ({"messages": [IMAGE]}, "messages.0.content.0"),
    ({"messages": [USER, {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
     "messages.1.content.0"),
    ({"messages": [USER, {"role": "robot", "content": "x"}]}, "messages.1.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{**USER, "extra": 1}]}, "messages.0.extra"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}]},
     "messages.0.tool_calls.0.function.arguments"),
    ({"messages": [{"role": "user", "content": "x " * 5000}]}, "messages"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"store": True}, "store"),
    ({"functions": []}, "functions"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "no good"}}]}, "tools.0.function.name"),
    ({"tools": [{"type": "retrieval"}]}, "tools.0"),
    ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "tool_choice"),
    ({"tools": [tool("f", {"type": "nonsense"})], "tool_choice": "required"}, "tools"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"prompt": "x"}, "prompt"),
]  # fmt: skip
TEXT_ONLY = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": {"text": "x"}}, "prompt"),
    ({"prompt": ["x", 5]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [100000]}, "prompt"),
    ({"prompt": [1] * (LONGEST + 1)}, "prompt"),
    ({"prompt": ["x"] * 65}, "prompt"),
    ({"suffix": "x"}, "suffix"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"echo": "x"}, "echo"),
    ({"tools": []}, "tools"),
    ({"messages": []}, "messages"),
]
WRONG = [("/v1/chat/completions", {**CHAT, **changes}, field) for changes, field in BOTH + CHAT_ONLY]
WRONG += [("/v1/completions", {**TEXT, **changes}, field) for changes, field in BOTH + TEXT_ONLY]
WRONG += [
    ("/v1/chat/completions", {"max_tokens": 2}, "messages"),
    ("/v1/completions", {"max_tokens": 2}, "prompt"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "x", "messages": [USER]}, "prompt"),
    ("/tokenize", {"prompt": 5}, "prompt"),
    ("/tokenize", {"prompt": "x", "other": 1}, "other"),
    ("/tokenize", {"messages": [IMAGE]}, "messages.0.content.0"),
    ("/detokenize", {}, "tokens"),
    ("/detokenize", {"tokens": "x"}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens.0"),
    ("/detokenize", {"tokens": [True]}, "tokens.0"),
]


def test_what_is_wrong_is_refused_by_name(served):
    missed = []
    for path, body, field in WRONG:
        status, headers, answer = ask(served.server, path, body)
        if status != 400:
            missed.append((path, field, status, answer))
            continue
        error = refusal((status, headers, answer))
        # The field itself, or what inside it.
        found = error["param"] or ""
        if not (found == field or found.startswith(field + ".")) or not set(found.split(".")) <= names(body):
            missed.append((path, field, found, error["message"]))
        if field.split(".")[0] not in error["message"]:
            missed.append((path, field, "message", error["message"]))
    assert not missed, "\n".join(map(str, missed))


def names(value):
    """Every field and place of a body, and what may be missing there."""
    found = {"messages", "prompt", "tokens", "content", "role", "arguments", "function"}
    if isinstance(value, dict):
        return found.union(value, *map(names, value.values()))
    if isinstance(value, list):
        return found.union(map(str, range(len(value))), *map(names, value))
    return found


@pytest.mark.parametrize(
    "body", [b"", b"{", b"not json", b"[]", b"5", b"null", b'"x"', b"\xff\xfe", b'{"prompt": NaN}']
)
def test_a_body_that_is_no_object(body, served):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        answer = ask(served.server, path, body, "POST")
        assert answer[0] == 400
        refusal(answer)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/detokenize"])
def test_bodies_made_to_be_slow(path, served):
    """Wrong in a million places, or nested without end: refused, and the server does not hang over it."""
    name = {"/v1/completions": "prompt", "/detokenize": "tokens"}.get(path, "messages")
    many = f'{{"{name}": [{"-1," * 1_000_000}-1]}}'
    nested = f'{{"{name}": {"[" * 1_000_000}'
    for body in (many, nested, f"{nested}{']' * 1_000_000}}}"):
        start = time.monotonic()
        assert refusal(ask(served.server, path, body.encode()))["code"] == 400
        assert time.monotonic() - start < 5


def test_names_of_requests(served):
    assert ask(served.server, "/health", X_Request_Id="my-id.1")[1]["X-Request-Id"] == "my-id.1"
    for wrong in ("with spaces", "x" * 129):
        assert re.fullmatch("[0-9a-f]{16}", ask(served.server, "/health", X_Request_Id=wrong)[1]["X-Request-Id"])
    answer = ask(served.server, "/v1/completions", {"prompt": 5}, X_Request_Id="wrong-1")
    assert (answer[0], answer[1]["X-Request-Id"]) == (400, "wrong-1")
    [line] = until(lambda: [line for line in log_lines(served.server) if line["id"] == "wrong-1"])
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 400)


def test_logs_have_no_text(served):
    secret = "zebra-in-the-prompt"
    served.complete(secret, max_tokens=2)
    served.chat(secret, max_tokens=2)
    ask(served.server, "/v1/completions", {"prompt": secret, "n": secret})
    ask(served.server, "/tokenize", {"prompt": secret}, X_Request_Id="last")
    until(lambda: any(line["id"] == "last" for line in log_lines(served.server)))
    assert "zebra" not in served.server.output
    done = [line for line in log_lines(served.server) if (line["path"], line["status"]) == ("/v1/completions", 200)]
    assert set(done[-1]) == {
        *("time", "id", "method", "path", "status", "seconds"),
        *("prompt_tokens", "completion_tokens", "asked_seconds", "begun_seconds", "first_token_seconds", "finish"),
    }
    stages = [done[-1][name] for name in ("asked_seconds", "begun_seconds", "first_token_seconds", "seconds")]
    assert 0 < stages[0] and stages == sorted(stages)


# Another server: with keys, of a model without tools

KEYS = "first-key,second-key"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("guarded")
    model = make_chat_model(directory / "model", PLAIN, vocab_size=chat_tokenizer().get_vocab_size() + 7)
    done = build("--model", model, "--p", 1, "--max-seq-len", 128, "--output", directory / "engine")
    assert done.returncode == 0, done.stderr
    flags = ["--device", "cpu", "--model-name", "one", "--model-name", "org/two", "--log-text"]
    server = ServerProcess(1, directory / "engine", *flags, "--max-body-bytes", 2000, api_key=KEYS)
    yield server
    assert server.stop() == 0, server.output


def test_keys(guarded):
    open_paths = {"/", "/health", "/ready"}
    paths = ("/v1/models", "/v1/models/one", "/metrics", "/version", "/v1/chat/completions", "/tokenize", "/nothing")
    for path in (*open_paths, *paths):
        answer = ask(guarded, path)
        assert (answer[0] == 200) == (path in open_paths), path
        if path not in open_paths:
            assert answer[0] == 401 and refusal(answer)["type"] == "authentication_error"
    for wrong in (
        "Bearer wrong",
        "Bearer ",
        "first-key",
        "Basic first-key",
        f"Bearer {KEYS}",
        "Bearer first-key2",
        "é",
    ):
        assert ask(guarded, "/v1/models", Authorization=wrong)[0] == 401, wrong
    for key in KEYS.split(","):
        status, _, body = ask(guarded, "/v1/models", Authorization=f"Bearer {key}")
        assert status == 200 and [model["id"] for model in body["data"]] == ["one", "org/two"]
        client = openai.OpenAI(base_url=guarded.url + "/v1", api_key=key, max_retries=0)
        assert client.models.retrieve("org/two").id == "org/two"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=guarded.url + "/v1", api_key="x", max_retries=0).models.list()
    assert "first-key" not in guarded.output


def test_a_body_too_large(guarded):
    key = "Bearer first-key"
    for body in (b" " * 2001, b"x" * 300_000):
        answer = ask(guarded, "/v1/completions", body, Authorization=key)
        assert answer[0] == 413 and "2000 bytes" in refusal(answer)["message"]
    fits = json.dumps({"prompt": "x", "max_tokens": 1}).encode().ljust(2000)
    assert ask(guarded, "/v1/completions", fits, Authorization=key)[0] == 200


def test_a_body_too_large_in_parts(guarded):
    import http.client

    connection = http.client.HTTPConnection(guarded.url.removeprefix("http://"), timeout=30)
    parts = (b" " * 500 for _ in range(10))
    headers = {"Authorization": "Bearer first-key", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", parts, headers, encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413 and json.loads(response.read())["error"]["code"] == 413


def test_log_text_has_the_text(guarded):
    body = json.dumps({"prompt": "zébra", "max_tokens": 1}, ensure_ascii=False).encode()
    ask(guarded, "/v1/completions", body, Authorization="Bearer first-key")
    [line] = until(lambda: [line for line in log_lines(guarded) if "zébra" in line.get("body", "")])
    assert json.loads(line["body"])["prompt"] == "zébra"


def test_rows_of_the_vocabulary_without_a_token(guarded):
    """Models' tables are often longer than their tokenizers' lists."""
    size = chat_tokenizer().get_vocab_size()
    bias = {str(size + 2): 100, str(size + 3): 99.9}
    for path, body in (
        ("/v1/completions", {**TEXT, "logprobs": 2}),
        ("/v1/chat/completions", {**CHAT, "logprobs": True}),
    ):
        body = {**body, "max_tokens": 4, "logit_bias": bias, "guided_regex": None}
        status, _, answer = ask(guarded, path, body, Authorization="Bearer first-key")
        [choice] = answer["choices"]
        assert status == 200 and answer["usage"]["completion_tokens"] == 4
        assert (choice["text"] if "text" in choice else choice["message"]["content"]) == ""
    body = {**TEXT, "prompt": [size + 2, 5], "echo": True, "logprobs": 0, "logit_bias": bias, "guided_regex": "[ab]{3}"}
    answer = ask(guarded, "/v1/completions", {**body, "max_tokens": 9}, Authorization="Bearer first-key")[2]
    assert re.fullmatch("[ab]{3}", answer["choices"][0]["text"][1:])


def test_tools_of_a_model_without_them(guarded):
    answer = ask(guarded, "/v1/chat/completions", {**CHAT, "tools": TOOLS[1:]}, Authorization="Bearer first-key")
    assert answer[0] == 400 and refusal(answer)["param"] == "tools"
    none = {**CHAT, "tools": TOOLS[1:], "tool_choice": "none"}
    assert ask(guarded, "/v1/chat/completions", none, Authorization="Bearer first-key")[0] == 200


# The demo model


@pytest.mark.slow
def test_the_demo_model_answers(tmp_path):
    from cqil_trt.demo import demo_model
    from cqil_trt.errors import UserError

    try:
        model = demo_model(ROOT / "models")
    except UserError as error:
        pytest.skip(f"the demo model cannot be fetched: {error}")
    assert build("--model", model, "--p", 2, "--d", 0, "--output", tmp_path / "engine").returncode == 0
    questions = ["What is the capital of France?", "Explain in one sentence why the sky is blue.", "Say hello."]
    prompts = [part for question in questions for part in ("--prompt", question)]
    flags = ["--chat", "--max-new-tokens", 40, "--json", tmp_path / "out.json"]
    assert mpirun(2, "--engine", tmp_path / "engine", *prompts, *flags).returncode == 0
    wanted = json.loads((tmp_path / "out.json").read_text())["completions"]
    assert "Paris" in wanted[0]["text"]
    server = ServerProcess(2, tmp_path / "engine", "--device", "cpu", timeout=300)
    try:
        client = server.client()

        def chat(question, **more):
            messages = [{"role": "user", "content": question}]
            given = {"model": "engine", "max_tokens": 40, "temperature": 0, **more}
            return client.chat.completions.create(messages=messages, **fields(**given))

        with ThreadPoolExecutor(3) as pool:
            texts = list(pool.map(lambda q: "".join(streamed(chat(q, stream=True))[0]), questions))
        assert texts == [completion["text"] for completion in wanted]
        cities = ["London", "Paris", "Rome"]
        assert chat(questions[0], guided_choice=cities).choices[0].message.content in cities
        form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
        assert obeys(
            chat("Where to, and for how many days?", response_format=form, max_tokens=80).choices[0].message.content
        )
    finally:
        assert server.stop() == 0
