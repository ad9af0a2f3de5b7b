"""Whatever comes in as a request's body, the answer is a result or says what is wrong, and the server goes on."""

import asyncio
import copy
import json
import math
import random

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from support import SEED
from support.checkpoints import make_model
from support.http_client import HttpConnection
from support.made_tokenizers import save_byte_tokenizer
from support.needs import need
from support.processes import build
from support.serving import ServerProcess

pytestmark = pytest.mark.slow

CHAT, TEXT, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
LENGTH = 96  # tokens that the engine holds
SETTINGS = settings(suppress_health_check=list(HealthCheck), print_blob=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    need("uvicorn", "starlette", "pydantic", "prometheus_client", "llguidance")
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    model = make_model(tmp_path_factory.mktemp("model"), vocab_size=259, **sizes)
    save_byte_tokenizer(model)
    path = tmp_path_factory.mktemp("engines") / "engine"
    done = build("--model", model, "--p", 2, "--max-seq-len", LENGTH, "--max-batch-size", 4, "--output", path)
    assert done.returncode == 0, done.stderr
    flags = ("--device", "cpu", "--no-log", "--max-body-bytes", 1 << 17, "--request-timeout", 20)
    server = ServerProcess(2, path, *flags)
    yield server
    assert server.stop() == 0, server.output
    assert "stopped: all ranks hold identical bits" in server.output
    assert "error" not in server.output.lower() and "Traceback" not in server.output, server.output


class Fuzzer:
    """Sends bodies over a connection that is kept alive, and checks each answer."""

    def __init__(self, server):
        self._server = server
        self._loop = asyncio.new_event_loop()
        self._http = None

    def send(self, path, raw, headers=None):
        """The status and the answer's JSON, or the list of its events."""
        return self._loop.run_until_complete(asyncio.wait_for(self._send(path, raw, headers), 30))

    async def _send(self, path, raw, headers):
        if self._http is None:
            self._http = await HttpConnection.open(self._server.url)
        http = self._http
        await http.send("POST", path, raw, headers)
        status = await http.head()
        if http.headers.get("content-type", "").startswith("text/event-stream"):
            answer = [data if data == "[DONE]" else json.loads(data) async for data in http.events()]
        else:
            answer = json.loads(await http.body(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
        if http.headers.get("connection") == "close":
            http.abort()
            self._http = None
        return status, answer

    def check(self, path, raw, headers=None):
        status, answer = self.send(path, raw, headers)
        assert 200 <= status < 300 or 400 <= status < 500, (status, answer)
        if isinstance(answer, list):
            assert status == 200 and answer[-1] == "[DONE]", answer[-1]
            assert all("error" not in chunk for chunk in answer[:-1])
        elif status >= 400:
            error = answer["error"]
            assert isinstance(error["message"], str) and error["message"]
            assert error["code"] == status and isinstance(error["type"], str)
            assert len(error["message"]) < 2000
        return status

    def assert_alive(self):
        body = {"prompt": "hello", "max_tokens": 2, "temperature": 0, "ignore_eos": True}
        status, answer = self.send(TEXT, json.dumps(body).encode())
        assert status == 200 and answer["usage"]["completion_tokens"] == 2

    def close(self):
        if self._http is not None:
            self._http.abort()
        self._loop.close()


@pytest.fixture
def fuzzer(server):
    made = Fuzzer(server)
    yield made
    made.assert_alive()
    assert server.status("/health") == 200
    made.close()


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
# Valid bodies with every field; what is drawn changes them.
CHATS = [
    {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3},
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": None, "refusal": None},
            {"role": "tool", "content": "1", "tool_call_id": "a"},
        ],
        "max_completion_tokens": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "seed": 7,
        "n": 2,
        "stop": ["x", "yz"],
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": 1.5},
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "user": "me",
    },
    {
        "messages": [{"role": "user", "content": "h"}],
        "max_tokens": 6,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
    },
    {"messages": [{"role": "user", "content": "h"}], "max_tokens": 6, "tools": [TOOL], "tool_choice": "auto"},
    {"messages": [{"role": "user", "content": "h"}], "max_tokens": 6, "guided_json": {"type": "object"}},
    {"messages": [{"role": "user", "content": "h"}], "max_tokens": 6, "chat_template_kwargs": {"a": 1}},
]
TEXTS = [
    {"prompt": "hello", "max_tokens": 3},
    {"prompt": ["a", "bc"], "max_tokens": 2, "n": 2, "echo": True, "logprobs": 2, "temperature": 0},
    {"prompt": [5, 6, 7], "max_tokens": 2, "stream": True, "stop": "q", "ignore_eos": True},
    {"prompt": [[5, 6], [7]], "max_tokens": 0, "echo": True, "logprobs": 0},
    {"prompt": "x", "max_tokens": 5, "guided_regex": "[ab]+"},
    {"prompt": "x", "max_tokens": 5, "guided_choice": ["yes", "no"]},
    {"prompt": "x", "max_tokens": 5, "guided_grammar": 'start: "a" | "b"'},
]
TOKENS = [{"prompt": "hello"}, {"messages": [{"role": "user", "content": "a"}]}, {"prompt": "", "model": None}]
IDS = [{"tokens": [5, 6, 7]}, {"tokens": []}]
BODIES = [(CHAT, CHATS), (TEXT, TEXTS), (TOKENIZE, TOKENS), (DETOKENIZE, IDS)]

# Values that programs stumble over. Infinite numbers are written as Python writes them: NaN, Infinity.
ODD = st.sampled_from(
    [
        *(None, True, False, 0, -1, 1, 2, 258, 259, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, -0.0, 5e-324),
        *(math.nan, math.inf, -math.inf, 0.5, 1.0, 3.7),
        *("", " ", "\x00", "a\x00b", "\ud800", "\udfff\ud800", "😀" * 3, "\u202e", "x" * 300, "<|im_end|>", "<eos>"),
        *("null", "1", "{{ 7 * 7 }}", "{% raw %}", "(", "[", "(?=a)", "a{99999999}", "\\", "start: start", "start:"),
        *([], {}, [[]], [None], [{}], [""], ["", ""], {"": {}}, [[[]]], [1, "a"], [0] * 200, ["a"] * 100, {"a": "b"}),
        *({"type": "text"}, {"type": "json_object"}, {"type": "bogus"}, {"$ref": "#"}, {"anyOf": []}),
        {"type": "string", "pattern": "("},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 10**9},
        {"role": "user"},
        {"-1": 1},
        {"258": 100},
        {"259": 1},
        {"٣": 1},
        {"1": 1e9},
    ]
)
VALUES = st.recursive(
    st.one_of(ODD, st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6) | st.just("type"), inner, max_size=4)
    ),
    max_leaves=6,
)
FIELDS = sorted({name for _, bodies in BODIES for body in bodies for name in body} | {"best_of", "suffix", "functions"})
CHANGES = st.lists(
    st.tuples(st.sampled_from(["set", "drop", "add", "double", "deep"]), st.integers(0, 1000), VALUES),
    min_size=1,
    max_size=3,
)


def places(value):
    """Every container in a value with every key of it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = []
    for key in keys:
        found.append((value, key))
        found += places(value[key])
    return found


def changed(body, changes):
    """A body as text, after changes that may break it in any way."""
    body = json.loads(json.dumps(body))
    doubles = []
    for kind, number, value in changes:
        value = copy.deepcopy(value)  # drawn objects are used again
        known = places(body)
        container, key = known[number % len(known)] if known else (body, "prompt")
        if kind == "set":
            container[key] = value
        elif kind == "drop" and known:
            del container[key]
        elif kind == "add":
            body[FIELDS[number % len(FIELDS)]] = value
        elif kind == "double":
            doubles.append((FIELDS[number % len(FIELDS)], value))
        elif kind == "deep":
            for _ in range(number % 250):
                value = [value] if number % 2 else {"a": value}
            container[key] = value
    text = json.dumps(body)
    for name, value in doubles:
        text = text[:-1] + f"{',' if body else ''}{json.dumps(name)}: {json.dumps(value)}}}"
    return text


@settings(SETTINGS, max_examples=250)
@given(st.data())
def test_changed_bodies(fuzzer, data):
    path, bodies = data.draw(st.sampled_from(BODIES))
    body, changes = data.draw(st.sampled_from(bodies)), data.draw(CHANGES)
    fuzzer.check(path, changed(body, changes).encode())


# Values of the right type, at and beyond the limits of what is allowed.
ANY_TEXT = st.text(max_size=12) | st.sampled_from(["", "\x00", "a\n", "é", "😀😀", "<eos>", "x" * 200])
SCHEMAS = st.recursive(
    st.sampled_from(
        [
            *({}, True, False, {"type": "string"}, {"type": "integer", "minimum": 3}, {"type": "number"}),
            *({"type": "null"}, {"enum": [1, "a", None]}, {"const": {"a": [1]}}, {"type": ["string", "null"]}),
            *({"type": "string", "pattern": "^[a-c]{2,5}$"}, {"type": "string", "pattern": "(?<=a)b"}, {"type": "x"}),
            *({"type": "string", "format": "date"}, {"$ref": "#/$defs/none"}, {"$ref": "http://127.0.0.1:1/"}),
            *({"type": "string", "minLength": 5, "maxLength": 2}, {"type": "integer", "multipleOf": 0}, {"not": {}}),
            {"type": "array", "minItems": 10**6},
        ]
    ),
    lambda inner: st.one_of(
        st.builds(lambda item: {"type": "array", "items": item, "maxItems": 3}, inner),
        st.builds(
            lambda fields, more: {"type": "object", "properties": fields, "required": [*fields, "z"][:more]},
            st.dictionaries(ANY_TEXT, inner, max_size=3),
            st.integers(0, 4),
        ),
        st.builds(lambda kind, parts: {kind: parts}, st.sampled_from(["anyOf", "allOf", "oneOf"]), st.lists(inner)),
    ),
    max_leaves=5,
)
PATTERNS = st.text("ab01()[]{}*+?|.\\^$-,é\n", max_size=10)
GRAMMARS = st.one_of(
    st.sampled_from(["start: start", 'start: "a"*', 'start: a b\na: "x"\nb: /[0-9]+/', "start: /(/", "%import x"]),
    st.builds(lambda text: f"start: {text}", st.text('ab"/()|*+: \n', max_size=12)),
)
SAMPLED = {
    "n": st.integers(0, 17),
    "seed": st.integers(-(2**65), 2**65),
    "stop": st.one_of(ANY_TEXT, st.lists(ANY_TEXT, max_size=18)),
    "stream": st.booleans(),
    "temperature": st.floats(-0.5, 2.5) | st.integers(-1, 3) | st.just(5e-324),
    "top_p": st.floats(-0.5, 1.5) | st.just(5e-324),
    "top_k": st.integers(-2, 300) | st.integers(2**31 - 2, 2**31 + 1),
    "min_p": st.floats(-0.5, 1.5),
    "presence_penalty": st.floats(-2.5, 2.5),
    "frequency_penalty": st.floats(-2.5, 2.5),
    "repetition_penalty": st.floats(-1, 11) | st.just(5e-324),
    "logit_bias": st.dictionaries(st.integers(-2, 270).map(str) | ANY_TEXT, st.floats(-110, 110), max_size=4)
    | st.just({str(token): -100 for token in range(259)}),
    "ignore_eos": st.booleans(),
    "max_tokens": st.integers(-1, 12),
    "max_completion_tokens": st.integers(-1, 12),
    "guided_json": SCHEMAS | SCHEMAS.map(json.dumps),
    "guided_regex": PATTERNS,
    "guided_choice": st.lists(ANY_TEXT, max_size=4),
    "guided_grammar": GRAMMARS,
}
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]), "content": ANY_TEXT},
        optional={
            "name": ANY_TEXT,
            "tool_calls": st.just([{"id": "a", "function": {"name": "f", "arguments": "{"}}]),
            "reasoning_content": ANY_TEXT,
        },
    ),
    max_size=4,
)
IDS_OF = st.lists(st.integers(-1, 260), max_size=LENGTH + 2)


def fields(required, optional):
    """Bodies with a few of the optional fields."""
    chosen = st.lists(st.sampled_from(sorted(optional)), max_size=5, unique=True)
    return chosen.flatmap(lambda names: st.fixed_dictionaries({**required, **{name: optional[name] for name in names}}))


NEAR = {
    CHAT: fields(
        {"messages": MESSAGES},
        {
            **SAMPLED,
            "logprobs": st.booleans(),
            "top_logprobs": st.integers(-1, 21),
            "response_format": st.one_of(
                st.just({"type": "json_object"}),
                SCHEMAS.map(lambda schema: {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}),
            ),
            "chat_template_kwargs": st.dictionaries(ANY_TEXT, ANY_TEXT, max_size=2),
        },
    ),
    TEXT: fields(
        {"prompt": st.one_of(ANY_TEXT, st.lists(ANY_TEXT, max_size=4), IDS_OF, st.lists(IDS_OF, max_size=3))},
        {**SAMPLED, "logprobs": st.integers(-1, 21), "echo": st.booleans()},
    ),
    TOKENIZE: st.one_of(
        st.fixed_dictionaries({"prompt": ANY_TEXT, "add_special_tokens": st.booleans()}),
        st.fixed_dictionaries({"messages": MESSAGES}),
    ),
    DETOKENIZE: st.fixed_dictionaries({"tokens": IDS_OF}),
}


@settings(SETTINGS, max_examples=250)
@given(st.sampled_from([CHAT, CHAT, TEXT, TEXT, TEXT, TOKENIZE, DETOKENIZE]), st.data())
def test_values_near_the_limits(fuzzer, path, data):
    body = data.draw(NEAR[path])
    status = fuzzer.check(path, json.dumps(body).encode())
    event(f"{path}: {status}")


@settings(SETTINGS, max_examples=60)
@given(st.sampled_from([path for path, _ in BODIES]), VALUES)
def test_any_json(fuzzer, path, value):
    fuzzer.check(path, json.dumps(value).encode())


@settings(SETTINGS, max_examples=60)
@given(st.sampled_from([path for path, _ in BODIES]), st.binary(max_size=200))
def test_any_bytes(fuzzer, path, raw):
    assert fuzzer.check(path, raw) == 400


def test_damaged_bytes(fuzzer):
    rng = random.Random(SEED)
    for _ in range(80):
        path, bodies = rng.choice(BODIES)
        raw = bytearray(json.dumps(rng.choice(bodies)).encode())
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(raw))
            kind = rng.randrange(3)
            if kind == 0:
                raw[place] = rng.randrange(256)
            elif kind == 1:
                del raw[place:]
                raw += b"}" * rng.randrange(2) or b" "
            else:
                raw[place:place] = raw[place : place + rng.randrange(30)]
        fuzzer.check(path, bytes(raw))


def test_every_base_is_valid(fuzzer):
    for path, bodies in BODIES:
        for body in bodies:
            status = fuzzer.check(path, json.dumps(body).encode())
            if "tools" not in body:  # the template has no format of calls
                assert status == 200, body


@pytest.mark.parametrize("path", [path for path, _ in BODIES])
def test_encodings(path, fuzzer):
    body = {"messages": [{"role": "user", "content": "é😀"}], "max_tokens": 2}
    body = body if path == CHAT else {"tokens": [5]} if path == DETOKENIZE else {"prompt": "é😀"}
    text = json.dumps(body, ensure_ascii=False)
    assert fuzzer.check(path, text.encode()) == 200
    assert fuzzer.check(path, text.encode(), {"content-type": "Application/JSON; charset=utf-8"}) == 200
    assert fuzzer.check(path, text.encode(), {"Content-Type": "text/plain"}) == 415
    for encoding in ("utf-16", "utf-32", "utf-16-le"):
        assert fuzzer.check(path, text.encode(encoding)) == 400
    for raw in (b"", b" ", b"null", b"[]", b"{", b"{}x", b"\xff", b'"\xed\xa0\x80"', b'{"a": "\xe2\x82"}', b"\x00"):
        assert fuzzer.check(path, raw) == 400
    assert fuzzer.check(path, text.encode().replace(b"}", b', "x": "\xff"}', 1)) == 400


def test_depth_and_size(fuzzer):
    for depth in (100, 1000, 60_000):
        for opening, closing in (("[", "]"), ('{"a":', "}")):
            nested = opening * depth + "1" + closing * depth
            if len(nested) > 1 << 16:
                nested = opening * depth
            for field in ("guided_json", "chat_template_kwargs", "messages", "prompt", "zzz"):
                raw = f'{{"messages": [{{"role": "user", "content": "a"}}], "max_tokens": 2, "{field}": {nested}}}'
                if len(raw) <= 1 << 17:
                    fuzzer.check(CHAT, raw.encode())
                    fuzzer.check(TEXT, raw.replace("messages", "user", 1).encode())
    for digits in ("9" * 4000, "9" * 5000, "1e99999", "0." + "1" * 5000, "-" + "9" * 400, "00", "0x10", "1_000"):
        for field in ("max_tokens", "temperature", "seed", "n", "top_k"):
            fuzzer.check(TEXT, f'{{"prompt": "a", "{field}": {digits}}}'.encode())
    assert fuzzer.check(TEXT, json.dumps({"prompt": "a" * LENGTH * 2}).encode()) == 400
    assert fuzzer.check(TEXT, json.dumps({"prompt": "a" * (1 << 17)}).encode()) == 413
    assert fuzzer.check(TEXT, json.dumps({"prompt": [["a"] * 65] * 65}).encode()) == 400


def test_surrogates_go_into_no_text(fuzzer):
    for text in (r"\ud800", r"a\udfffb", r"\ud83d\ude00", r"\ude00\ud83d", r"\u0000"):
        for path, body in (
            (CHAT, f'{{"messages": [{{"role": "user", "content": "{text}"}}], "max_tokens": 2}}'),
            (TEXT, f'{{"prompt": "{text}", "max_tokens": 2}}'),
            (TEXT, f'{{"prompt": "a", "stop": "{text}", "max_tokens": 2}}'),
            (TEXT, f'{{"prompt": "a", "model": "{text}", "max_tokens": 2}}'),
            (TEXT, f'{{"prompt": "a", "{text}": 2}}'),
            (TEXT, f'{{"prompt": "a", "guided_choice": ["{text}"], "max_tokens": 2}}'),
            (TEXT, f'{{"prompt": "a", "guided_regex": "{text}", "max_tokens": 2}}'),
            (CHAT, f'{{"messages": [{{"role": "user", "content": "a"}}], "guided_json": {{"{text}": "{text}"}}}}'),
            (TEXT, f'{{"prompt": "a", "logit_bias": {{"{text}": 1}}}}'),
            (TOKENIZE, f'{{"prompt": "{text}"}}'),
        ):
            fuzzer.check(path, body.encode())
