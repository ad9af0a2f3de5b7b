"""What is a call and what is text, however it is cut; the grammar of calls, against llguidance itself."""

import json
import random

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cqil_trt.serving.tool_calls import Call, Delta, ToolParser, collect, format_of, new_call_id, parse, tool_grammar

NAMES = {"f", "get_weather"}
F = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
G = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "days": [1, 2.5e3, null]}}\n</tool_call>'
F3 = '{"name": "f", "parameters": {"a": 1}}'
G3 = '{"name": "get_weather", "parameters": {"city": "Köln"}}'


def counter():
    numbers = iter(range(10**6))
    return lambda: f"call_{next(numbers)}"


def run(format, pieces):
    parser = ToolParser(format, NAMES, counter())
    deltas = [delta for piece in pieces for delta in parser.add(piece)] + parser.finish()
    assert parser.finish() == []
    assert parser.called == any(delta.index is not None for delta in deltas)
    return deltas


def found(format, text):
    """The text and the (name, arguments) of the calls; the same for the whole and for single characters."""
    content, calls = parse(format, text, NAMES, counter())
    assert collect(run(format, list(text))) == (content, calls)
    assert [call.id for call in calls] == [f"call_{at}" for at in range(len(calls))]
    return content, [(call.name, call.arguments) for call in calls]


def h(inside):
    return f"<tool_call>\n{inside}\n</tool_call>"


HERMES = [
    # text only: as it is
    ("", "", []),
    (" \n ", " \n ", []),
    (" Hello, <b>world</b>. \n", " Hello, <b>world</b>. \n", []),
    ("a < b <tool", "a < b <tool", []),
    ("<<tool_call", "<<tool_call", []),
    ("see </tool_call>", "see </tool_call>", []),
    # calls
    (F, "", [("f", '{"a": 1}')]),
    ("\n\n" + F + "\n", "", [("f", '{"a": 1}')]),
    (F + "\n" + G, "", [("f", '{"a": 1}'), ("get_weather", '{"city": "Köln", "days": [1, 2.5e3, null]}')]),
    ("Let me look. \n\n" + F, "Let me look.", [("f", '{"a": 1}')]),
    ("<" + F, "<", [("f", '{"a": 1}')]),
    ("A\n" + F + "\n\nB\n" + F + " ", "A\n\nB", [("f", '{"a": 1}')] * 2),
    (F + "\nB c", "B c", [("f", '{"a": 1}')]),
    ('<tool_call>{"name":"f","arguments":{}}</tool_call>', "", [("f", "{}")]),
    (h('{"arguments": {"name": "x"}, "name": "f"}'), "", [("f", '{"name": "x"}')]),
    (
        h('{"name": "f", "arguments": {"name": "x", "arguments": {"b": "}"}}}'),
        "",
        [("f", '{"name": "x", "arguments": {"b": "}"}}')],
    ),
    (h('{"id": 7, "name": "f", "arguments": {}, "type": "function"}'), "", [("f", "{}")]),
    (h('{"name": "f", "parameters": {"a": 1}}'), "", [("f", '{"a": 1}')]),
    (h(r'{"na\u006de": "\u0066", "arguments": {"q": "\"}\\"}}'), "", [("f", r'{"q": "\"}\\"}')]),
    (
        h('{"name": "f", "arguments": {"q": "</tool_call> <tool_call>"}}'),
        "",
        [("f", '{"q": "</tool_call> <tool_call>"}')],
    ),
    (h('{"name": "f", "arguments": {  "a" :\n1 } }'), "", [("f", '{  "a" :\n1 }')]),
    # no arguments, and arguments in a string
    (h('{"name": "f"}'), "", [("f", "{}")]),
    (h('{"name": "f", "arguments": null}'), "", [("f", "{}")]),
    (h('{"arguments": null, "name": "f"}'), "", [("f", "{}")]),
    (h('{"name": "f", "arguments": ""}'), "", [("f", "{}")]),
    (h(r'{"name": "f", "arguments": "{\"a\": \"\u00e9\\n\"}"}'), "", [("f", '{"a": "é\\n"}')]),
    (h(r'{"arguments": " {\"a\": \"x\ny\"}", "name": "f"}'), "", [("f", '{"a": "x\\ny"}')]),
    (h(r'{"name": "f", "arguments": "{\"a\": \"\ud83d\"}"}'), "", [("f", '{"a": "\\ud83d"}')]),
    # control characters in strings
    (h('{"name": "f", "arguments": {"q": "a\n\tb\x01"}}'), "", [("f", '{"q": "a\\n\\tb\\u0001"}')]),
    # no calls: text, markers and all
    *[
        (text, text, [])
        for text in (
            h("nonsense"),
            h(""),
            h("{}"),
            h('{"name": "unknown", "arguments": {"a": 1}}') + "\n",
            h('{"name": 5, "arguments": {}}'),
            h('{"name": "f", "arguments": 5}'),
            h('{"name": "f", "arguments": [1]}'),
            h('{"name": "f", "arguments": "no object"}'),
            h(r'{"name": "f", "arguments": "{\"a\": 1} x"}'),
            h('{"name": "f", "name": "f", "arguments": {}}'),
            h("{'name': 'f', 'arguments': {}}"),
            h('{{"name": "f", "arguments": {}}}'),
            h('[{"name": "f", "arguments": {}}]'),
            h('{"name": "f" "arguments": 1}'),
            h('{"arguments": {"a": None}, "name": "f"}'),
            h('{"n": 01, "name": "f"}'),
            h('{"name": "f", "arguments": nul}'),
            h('{"name": "f", "arguments": {"a": 1}'[:-9] + "}"),
            h('{"name": "unknown", "arguments": {"a": "' + F.replace("\n", "").replace('"', '\\"') + '"}}'),
        )
    ],
    (h("nonsense") + "\n" + F, h("nonsense"), [("f", '{"a": 1}')]),
    ("<tool_call>" + F, "<tool_call>", [("f", '{"a": 1}')]),
    ("A " + h('{"name": "unknown"}') + "\n" + F, "A " + h('{"name": "unknown"}'), [("f", '{"a": 1}')]),
    # arguments that stop being JSON once the call has begun
    (
        h('{"name": "f", "arguments": {"a": None, "b": "}"}}') + "\n" + F,
        "",
        [("f", '{"a": None, "b": "}"}'), ("f", '{"a": 1}')],
    ),
    (h('{"name": "f", "arguments": {"a": "say "hi" now", "b": [1]}}'), "", [("f", '{"a": "say "hi" now", "b": [1]}')]),
    (h('{"name": "f", "arguments": {"a": "it\\\'s {"}}'), "", [("f", '{"a": "it\\\'s {"}')]),
    (h('{"name": "f", "arguments": {"a": 1.2.3}}'), "", [("f", '{"a": 1.2.3}')]),
    (h('{"name": "f", "arguments": {"a": b"}}') + F, "", [("f", '{"a": b"}}\n'), ("f", '{"a": 1}')]),
    (h('{"name": "f", "arguments": {"a": x<b</tool}}'), "", [("f", '{"a": x<b</tool}')]),
    # the end missing, or too much of it
    (h('{"name": "f", "arguments": {"a": 1}') + " B", "B", [("f", '{"a": 1}')]),
    (h('{"name": "f", "arguments": {"a": 1}}}') + "\n" + F, "", [("f", '{"a": 1}')] * 2),
    (h('{"name": "f", "arguments": {}}\n{"name": "f", "arguments": {"b": 2}}'), "", [("f", "{}"), ("f", '{"b": 2}')]),
    ('<tool_call>\n{"name": "f", "arguments": {}}\n' + F, "", [("f", "{}"), ("f", '{"a": 1}')]),
    ('<tool_call>\n{"name": "f", "arguments": {}}\nDone. ', "Done.", [("f", "{}")]),
    # cut short
    ('<tool_call>\n{"name": "f', '<tool_call>\n{"name": "f', []),
    ('<tool_call>\n{"arguments": {"a": 1', '<tool_call>\n{"arguments": {"a": 1', []),
    ('Hi\n<tool_call>\n{"name": "f"', "Hi", [("f", "")]),
    ('<tool_call>\n{"name": "f", "argu', "", [("f", "")]),
    ('<tool_call>\n{"name": "f", "arguments": {"a": "b\\', "", [("f", '{"a": "b\\')]),
    ('<tool_call>\n{"name": "f", "arguments": {"a": 1}', "", [("f", '{"a": 1}')]),
    ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_c', "", [("f", '{"a": 1}')]),
    (r'<tool_call>{"name": "f", "arguments": "{\"a\": \"b\u00', "", [("f", '{"a": "b')]),
    (r'<tool_call>{"name": "f", "arguments": "{\"a\": \"b\ud83d\\', "", [("f", '{"a": "b\\ud83d\\')]),
    ('<tool_call>{"name": "f", "arguments": "', "", [("f", "")]),
]

LLAMA3 = [
    *[
        (text, text, [])
        for text in (
            "",
            " \n",
            "Hello ",
            "<|python_tag|>",
            " <|python_ta",
            "<|python_tag|>print(1)\n",
            "<b>",
            "{",
            "{}",
            '{"a": 1} \n',
            '{"name": "unknown", "parameters": {}}',
            '{"name": "f"}',
            '{"name": "f", "parameters": 1}',
            "{x} is a set",
            "Sure: " + F3,
            F,
            '{"parameters": {"a": 1}',
            '{"name": "f',
            '<|python_tag|> {"name": null}',
            '[{"name": "f"}]',
        )
    ],
    (F3, "", [("f", '{"a": 1}')]),
    (" \n<|python_tag|>\n" + F3 + " \n", "", [("f", '{"a": 1}')]),
    (F3.replace("parameters", "arguments"), "", [("f", '{"a": 1}')]),
    ('{"type": "function", "name": "f", "parameters": {"a": "1"}}', "", [("f", '{"a": "1"}')]),
    ('{"type": "function", "parameters": {"a": {}}, "name": "f"}', "", [("f", '{"a": {}}')]),
    ('{"name": "f", "parameters": "{\\"a\\": 1}"}', "", [("f", '{"a": 1}')]),
    ('{"name": "f", "parameters": null}', "", [("f", "{}")]),
    *[
        (F3 + separator + G3 + separator, "", [("f", '{"a": 1}'), ("get_weather", '{"city": "Köln"}')])
        for separator in ("", ";", "; ", "\n", " ;\n", ", ")
    ],
    (F3 + "; <|python_tag|>" + G3, "", [("f", '{"a": 1}'), ("get_weather", '{"city": "Köln"}')]),
    (F3 + "\n Well. ", "Well.", [("f", '{"a": 1}')]),
    (F3 + '\n{"b": 2} ' + F3, '{"b": 2} ' + F3, [("f", '{"a": 1}')]),
    (F3 + "\n<|py", "<|py", [("f", '{"a": 1}')]),
    ('{"name": "f", "parameters": {"a": True}}; ' + F3, "", [("f", '{"a": True}'), ("f", '{"a": 1}')]),
    ('{"name": "f", "parameters": {"a": "x', "", [("f", '{"a": "x')]),
    ('{"name": "f", "para', "", [("f", "")]),
    ('{"name": "f", "parameters": {"a": 1}', "", [("f", '{"a": 1}')]),
]


@pytest.mark.parametrize("text, content, calls", HERMES)
def test_hermes(text, content, calls):
    assert found("hermes", text) == (content, calls)


@pytest.mark.parametrize("text, content, calls", LLAMA3)
def test_llama3(text, content, calls):
    assert found("llama3", text) == (content, calls)


FRAGMENTS = [
    F, G, F3, G3, "<tool_call>", "</tool_call>", "<tool_call>\n", "\n</tool_call>", "<|python_tag|>", '{"name": "f"',
    "}", ', "arguments": ', '{"arguments": ', '"{\\"a\\": 1}"', '{"a": 1}', ', "name": "f"}', '"', "\\", "{", "<",
    "</tool", " ", "\n", ";", "x", "é", '{"name": "g", ', "null", "[1, 2", "\\u00e9", "\\ud83d", '"arguments": {"b": ',
    "\x01", "\u00a0",
]  # fmt: skip
ANSWERS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12).map("".join)
CASES = st.sampled_from([text for text, _, _ in HERMES + LLAMA3])


@settings(max_examples=300)
@given(st.sampled_from(["hermes", "llama3"]), ANSWERS | CASES, st.data())
def test_any_split_is_the_same(format, text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]
    content, calls = parse(format, text, NAMES, counter())
    for deltas in (run(format, pieces), run(format, list(text))):
        assert collect(deltas) == (content, calls)
        begun = 0
        for delta in deltas:  # heads in order, each before its arguments; no empty pieces
            if delta.index is None:
                assert delta.text and not delta.arguments and delta.id is delta.name is None
            elif delta.id is not None:
                assert delta.index == begun and delta.name in NAMES and not delta.text and not delta.arguments
                begun += 1
            else:
                assert delta.index == begun - 1 and delta.arguments and delta.name is None and not delta.text
    if not calls:
        assert content == text
    else:
        assert content == content.rstrip()


OBJECTS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@settings(max_examples=50)
@given(OBJECTS, st.booleans(), st.booleans(), st.booleans(), st.sampled_from([None, 1]))
def test_any_arguments_come_through(value, ascii, encoded, last, indent):
    source = json.dumps(value, ensure_ascii=ascii, indent=indent)
    members = [f'"arguments": {json.dumps(source) if encoded else source}', '"name": "f"']
    body = "{" + ", ".join(members if last else members[::-1]) + "}"
    assert found("hermes", f"A\n<tool_call>{body}</tool_call>") == ("A", [("f", source)])
    assert found("llama3", body) == ("", [("f", source)])
    for cut in range(len(body)):  # cut short anywhere: never an error; and either all of it as text, or the call
        content, calls = parse("llama3", body[:cut], NAMES, counter())
        assert (content == body[:cut] and not calls) or (not content and source.startswith(calls[0].arguments))


def test_streams_as_soon_as_decided():
    parser = ToolParser("hermes", NAMES, counter())
    assert parser.add("Hi ") == [Delta("Hi")]
    assert parser.add("you\n<tool") == [Delta(" you")]
    assert parser.add('_call>\n{"name": "f", "arguments": ') == []
    assert not parser.called
    assert parser.add("{") == [Delta(index=0, id="call_0", name="f"), Delta(index=0, arguments="{")]
    assert parser.called
    assert parser.add('"a": "b') == [Delta(index=0, arguments='"a": "b')]
    assert parser.add('"}}\n</tool_call>\n') == [Delta(index=0, arguments='"}')]
    assert parser.add("<") == []
    assert parser.finish() == [Delta("\n<")]

    parser = ToolParser("llama3", NAMES, counter())
    assert parser.add('{"na') == []
    assert parser.add("x") == []
    assert parser.add('": 1, y') == [Delta('{"nax": 1, y')]
    assert parser.add("z") == [Delta("z")]

    parser = ToolParser("llama3", NAMES, counter())
    assert parser.add('{"name": "g"') == [Delta('{"name": "g"')]

    parser = ToolParser("hermes", NAMES, counter())
    assert parser.add('<tool_call>{"name": "g"') == [Delta('<tool_call>{"name": "g"')]
    assert parser.add(', "a') == [Delta(', "a')]


def test_misuse():
    with pytest.raises(ValueError, match="none of hermes, llama3"):
        ToolParser("mistral", NAMES)
    with pytest.raises(ValueError, match="none of hermes, llama3"):
        tool_grammar("mistral", [{"name": "f"}], False)
    with pytest.raises(ValueError, match="no tools"):
        tool_grammar("hermes", [], False)
    parser = ToolParser("hermes", NAMES)
    parser.finish()
    with pytest.raises(ValueError, match="finished"):
        parser.add("x")


def test_ids():
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(id.startswith("call_") and len(id) == 29 and id[5:].isalnum() for id in ids)
    _, calls = parse("hermes", F, NAMES)
    assert len(calls) == 1 and isinstance(calls[0], Call) and len(calls[0].id) == 29


@pytest.mark.parametrize("template, format", [
    ("{{ messages }}", None),
    ("return a json object within <tool_call></tool_call> tags: {\\\"name\\\": <function-name>}", "hermes"),
    ("<tool_call>\n<function=example>\n<parameter=x>", None),
    ("<tool_call>{function-name}\n<arg_key>", None),
    ("{%- if builtin_tools %}<|python_tag|>", "llama3"),
    ('Respond in the format {"name": function name, "parameters": dictionary of argument name and value}.', "llama3"),
    ('{{- \\"parameters\\": dictionary }}', "llama3"),
    ("{%- if message.role == 'ipython' %}", "llama3"),
    ("{{- '<|eom_id|>' }}", "llama3"),
    ("[TOOL_CALLS]", None),
])  # fmt: skip
def test_format_of(template, format):
    assert format_of(template) == format


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"$ref": "#/$defs/unit"}, "days": {"type": "integer"}},
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["C", "F"]}},
}
TOOLS = [
    {"name": "get_weather", "parameters": SCHEMA},
    {"name": "f", "parameters": None},
    {"name": "get_weather_2", "parameters": {"properties": {"a": {"type": "number", "not": {"const": 1}}}}},
]
GET = '{"city": "Köln", "unit": "C"}'


class Tokens:
    """A tokenizer of bytes, some tokens of several bytes, and special ones."""

    eos_token_id = 0
    bos_token_id = None

    def __init__(self, special):
        merged = [b'"}}', b'"}}\n', b"}}", b"}\n", b'": {"', b'"}', b'{"', b'": ', b'{"name', b"<tool", b"_call",
                  b'", "', b"{}}", b"}; ", b"arguments", b"parameters", b"get_weather", b'_2", "']  # fmt: skip
        self.special_token_ids = list(range(len(special) + 1))
        self.tokens = [b"<eos>", *special, *[bytes([byte]) for byte in range(256)], *merged]

    def __call__(self, text: bytes | str) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        first = len(self.special_token_ids)
        ids = []
        while data:
            ids.append(max(range(first, len(self.tokens)), key=lambda at: len(self.tokens[at]) * data.startswith(
                self.tokens[at])))  # fmt: skip
            data = data[len(self.tokens[ids[-1]]) :]
        return ids


def accepts(grammar, text, tokens, ids=None):
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens))
    matcher = llguidance.LLMatcher(tokenizer, llguidance.grammar_from("lark", grammar))
    assert not matcher.is_error(), matcher.get_error()
    ids = tokens(text) if ids is None else ids
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.mark.parametrize("format", ["hermes", "llama3"])
@pytest.mark.parametrize("parallel", [False, True])
def test_grammar_is_valid(format, parallel):
    for tools in (TOOLS[:1], TOOLS[:2], [{"name": "x"}], [{"name": "a-b_C9", "parameters": {}}]):
        grammar = llguidance.grammar_from("lark", tool_grammar(format, tools, parallel))
        assert llguidance.LLMatcher.validate_grammar_with_warnings(grammar) == (False, [])
    grammar = llguidance.grammar_from("lark", tool_grammar(format, TOOLS, parallel))
    failed, warnings = llguidance.LLMatcher.validate_grammar_with_warnings(grammar)
    assert not failed and warnings == ['Unimplemented keys: ["not"]']


@pytest.mark.parametrize("format", ["hermes", "llama3"])
def test_grammar_accepts_calls_only(format):
    def call(name, arguments):
        key = "arguments" if format == "hermes" else "parameters"
        body = f'{{"name": "{name}", "{key}": {arguments}}}'
        return h(body) if format == "hermes" else body

    one, several = (tool_grammar(format, TOOLS, parallel) for parallel in (False, True))
    separator = "\n" if format == "hermes" else "; "
    tokens = Tokens([])
    good = [call("get_weather", GET), call("f", "{}"), call("get_weather_2", '{"a": 1.5, "b": [{"c": "}"}]}')]
    for text in good:
        assert accepts(one, text, tokens) and accepts(several, text, tokens)
        assert found(format, text)[1] or "get_weather_2" in text
    assert accepts(several, separator.join(good), tokens)
    assert not accepts(one, separator.join(good), tokens)
    bad = ["", "Hello", call("g", "{}"), call("f", '{"a": 1}'), call("get_weather", "{}"), good[0][:-1], good[0] + " ",
           call("get_weather", '{"city": "x", "unit": "K"}'), good[0] + separator]  # fmt: skip
    assert not any(accepts(several, text, tokens) for text in bad)


def test_grammar_with_special_markers():
    tokens = Tokens([b"<tool_call>", b"</tool_call>"])
    ids = [1, *tokens(f'\n{{"name": "get_weather", "arguments": {GET}}}\n'), 2]
    assert accepts(tool_grammar("hermes", TOOLS, False, special_markers=True), "", tokens, ids)
    assert not accepts(tool_grammar("hermes", TOOLS, False), "", tokens, ids)


@pytest.mark.parametrize("format", ["hermes", "llama3"])
def test_what_the_grammar_lets_through_is_parsed(format):
    tokens = Tokens([])
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens))
    grammar = llguidance.grammar_from("lark", tool_grammar(format, TOOLS[:2], True))
    names = {"f", "get_weather"}
    for seed in range(20):
        draw = random.Random(seed)
        matcher = llguidance.LLMatcher(tokenizer, grammar)
        data = b""
        for _ in range(600):
            allowed = [at for at, bias in enumerate(matcher.compute_logit_bias()) if bias]
            closing = [at for at in allowed if tokens.tokens[at][:1] in b'"}'] if draw.random() < 0.3 else []
            chosen = 0 if 0 in allowed and draw.random() < 0.5 else draw.choice(closing or allowed)
            if chosen == 0:
                break
            data += tokens.tokens[chosen]
            assert matcher.consume_token(chosen)
        content, calls = parse(format, data.decode(errors="replace"), names, counter())
        assert content == "" and calls
        if chosen == 0:
            assert all(isinstance(json.loads(call.arguments), dict) for call in calls)
