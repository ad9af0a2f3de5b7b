"""Tool calls in a model's text: found as it is generated, and a grammar that forces them.

Two formats are known:

hermes (Hermes 2 and 3, Qwen2.5, Qwen3)
    <tool_call>
    {"name": "f", "arguments": {...}}
    </tool_call>
    Any number of them, possibly with text before, between and after.

llama3 (the JSON calls of Llama 3.1 to 3.3)
    {"name": "f", "parameters": {...}}
    The answer itself, possibly after <|python_tag|>. Several are separated by `;`, `,` or whitespace. An answer that
    starts otherwise is ordinary text; so is what follows the last call.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["FORMATS", "Call", "Delta", "ToolParser", "collect", "format_of", "new_call_id", "parse", "tool_grammar"]

FORMATS = ("hermes", "llama3")

_OPEN = "<tool_call>"
_CLOSE = "</tool_call>"
_TAG = "<|python_tag|>"
_ARGUMENT_KEYS = ("arguments", "parameters")  # either is taken, in both formats: models mix them up

_FIRST = re.compile(r"\s*(?:<\|python_tag\|>\s*)?")  # before the first llama3 call
_SEPARATING = ";,"  # and whitespace
_NEXT = re.compile(rf"[\s{_SEPARATING}]*(?:<\|python_tag\|>[\s{_SEPARATING}]*)?")  # before a later one
_SEPARATORS = re.compile(rf"[\s{_SEPARATING}]*")
_LLAMA3_TEMPLATE = re.compile(r'<\|python_tag\|>|<\|eom_id\|>|\bipython\b|"parameters": dictionary')
_OTHER_CALLS = ("<function=", "<arg_key>")  # Qwen3-Coder, GLM: <tool_call> around something that is not JSON


def format_of(chat_template: str) -> str | None:
    """The format that a chat template's source asks for; None: none of FORMATS."""
    if any(mark in chat_template for mark in _OTHER_CALLS):
        return None
    if _OPEN in chat_template:
        return "hermes"
    return "llama3" if _LLAMA3_TEMPLATE.search(chat_template.replace("\\", "")) else None


def new_call_id() -> str:
    """A random id for a call: "call_" and 24 hexadecimal digits."""
    return "call_" + secrets.token_hex(12)


@dataclass(frozen=True)
class Delta:
    """A piece of the answer: of its text (index None), or of the call of that index.

    A call's first piece has its id and name, and no arguments; the later ones have only arguments.
    """

    text: str = ""
    index: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Call:
    """A whole call; its arguments are JSON text, incomplete where the model's were."""

    id: str
    name: str
    arguments: str


# JSON, a character at a time -----------------------------------------------------------------------------------------

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WORDS = ("true", "false", "null")
_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}


class _Json:
    """Follows one JSON object, a character at a time.

    Stricter than a bracket counter and as strict as JSON, but for control characters in strings, which it lets pass.
    """

    def __init__(self) -> None:
        self.stack: list[str] = []  # the open brackets
        # top: before the object; first_key, key, colon, value, first_item, comma: what may come next;
        # string, escape, hex, number, word: inside one; done: after the object.
        self.state = "top"
        # Of the last character: "key": it ended a key of the outermost object; "start", "end": it started or ended a
        # value of it. A number has no "end".
        self.event = ""
        self.text: list[str] = []  # the source of the last key or string value of the outermost object
        self.hex_left = 0
        self._is_key = False
        self._word = ""

    def feed(self, ch: str) -> bool:
        """Takes one more character; False: it cannot come here, and was not taken."""
        self.event = ""
        state = self.state
        if state == "string":
            if ch == '"':
                self._end_string()
                return True
            if ch == "\\":
                self.state = "escape"
        elif state == "escape":
            if ch == "u":
                self.state, self.hex_left = "hex", 4
            elif ch in '"\\/bfnrt':
                self.state = "string"
            else:
                return False
        elif state == "hex":
            if ch not in "0123456789abcdefABCDEF":
                return False
            self.hex_left -= 1
            if not self.hex_left:
                self.state = "string"
        else:
            return self._outside(ch)
        if len(self.stack) == 1:
            self.text.append(ch)
        return True

    def string(self) -> str:
        """The last key or string value of the outermost object; without what is incomplete at the end of its source."""
        source = "".join(self.text)
        if self.state == "escape":
            source = source[:-1]
        elif self.state == "hex":
            source = source[: -2 - (4 - self.hex_left)]
        return str(json.loads(f'"{source}"', strict=False))

    def _outside(self, ch: str) -> bool:
        state = self.state
        if state == "word":
            self._word += ch
            if self._word in _WORDS:
                self._end_value()
            return any(word.startswith(self._word) for word in _WORDS)
        if state == "number":
            if ch in "0123456789+-.eE":
                self._word += ch
                return True
            if not _NUMBER.fullmatch(self._word):
                return False
            state = self.state = "comma"
        if ch in " \t\n\r":
            return True
        if state == "top":
            return ch == "{" and self._start_value(ch)
        if state == "first_key" or state == "key":
            if ch == '"':
                self._start_string(is_key=True)
                return True
            return ch == "}" and state == "first_key" and self._pop(ch)
        if state == "colon":
            self.state = "value"
            return ch == ":"
        if state == "value":
            return self._start_value(ch)
        if state == "first_item":
            return self._pop(ch) if ch == "]" else self._start_value(ch)
        if state == "comma":
            if ch == ",":
                self.state = "key" if self.stack[-1] == "{" else "value"
                return True
            return self._pop(ch)
        return False

    def _start_value(self, ch: str) -> bool:
        if len(self.stack) == 1:
            self.event = "start"
        if ch == "{" or ch == "[":
            self.stack.append(ch)
            self.state = "first_key" if ch == "{" else "first_item"
        elif ch == '"':
            self._start_string(is_key=False)
        elif ch in "-0123456789":
            self.state, self._word = "number", ch
        elif ch in "tfn":
            self.state, self._word = "word", ch
        else:
            return False
        return True

    def _end_value(self) -> None:
        if len(self.stack) == 1:
            self.event = "end"
        self.state = "comma" if self.stack else "done"

    def _start_string(self, is_key: bool) -> None:
        self.state, self._is_key = "string", is_key
        if len(self.stack) == 1:
            self.text = []

    def _end_string(self) -> None:
        if not self._is_key:
            self._end_value()
            return
        self.state = "colon"
        if len(self.stack) == 1:
            self.event = "key"

    def _pop(self, ch: str) -> bool:
        if {"{": "}", "[": "]"}[self.stack[-1]] != ch:
            return False
        self.stack.pop()
        self._end_value()
        return True


def _escaped(ch: str, in_string: bool) -> str:
    """A character of JSON text, a bare control character in a string made an escape."""
    return _CONTROL.get(ch) or f"\\u{ord(ch):04x}" if in_string and ch < " " else ch


def _object_text(text: str, whole: bool) -> str | None:
    """JSON text that came inside a JSON string, if it is that of an object (whole false: of the start of one)."""
    text = _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text.strip())
    if not text:
        return "{}" if whole else ""
    scanner = _Json()
    pieces = []
    for ch in text:
        pieces.append(_escaped(ch, scanner.state == "string"))
        if not scanner.feed(ch):
            return None
    return "".join(pieces) if scanner.state == "done" or not whole else None


# The parser ----------------------------------------------------------------------------------------------------------


class _Candidate:
    """What may turn out to be a call: an object being read."""

    def __init__(self, raw: str) -> None:
        self.raw = [raw]  # the source so far, markers included; of use until the call has begun
        self.json = _Json()
        self.key = ""
        self.name: str | None = None
        self.kind = ""  # of the arguments: "{" an object, '"' a string, "n" null, "" none yet
        self.argument_key = ""
        self.in_arguments = False  # between the braces of an arguments object
        self.held: list[str] = []  # argument text, before the call has begun
        self.begun = False  # given out as a call
        self.refused = False  # another function's: goes out as text until the object ends
        # Arguments that stopped being JSON after the call had begun: only brackets and quotes count from there.
        self.broken = False
        self.quoted = False
        self.escaped = False

    def break_up(self) -> None:
        """From here on the arguments are not JSON."""
        self.broken = True
        self.quoted = self.json.state in ("string", "escape", "hex")
        self.escaped = self.json.state == "escape"

    def feed_broken(self, ch: str) -> None:
        """Takes one more character of broken arguments; the outermost bracket's end ends them."""
        stack = self.json.stack
        if self.escaped:
            self.escaped = False
        elif self.quoted:
            self.escaped = ch == "\\"
            self.quoted = ch != '"'
        elif ch == '"':
            self.quoted = True
        elif ch in "{[":
            stack.append(ch)
        elif ch in "}]":
            stack.pop()
            if len(stack) == 1:
                self.json.state = "comma"
                self.broken = self.in_arguments = False


def _partial(text: str, start: int, *markers: str) -> int:
    """How many characters at the end of text[start:] may be the start of a marker."""
    at = text.rfind("<", start)  # where a marker starts, and only there
    size = len(text) - at if at >= 0 else 0
    return size if any(size < len(marker) and marker.startswith(text[at:]) for marker in markers) else 0


class ToolParser:
    """Splits an answer, as it is generated, into text and tool calls.

    The deltas of all `add` calls and of `finish` together are the same however the answer was cut into pieces. An
    answer without calls comes out as it is. With calls, whitespace next to them is dropped, except where it separates
    text from text. Nothing that may turn out to belong to a call is given out before that is decided; what is no call
    after all (no JSON, no known function, arguments that are no object) is text, its markers included.

    A call begins, and stands, as soon as its name and the start of its arguments are known. Its arguments are their
    source, given out as it comes, but for control characters inside strings, which become escapes. If they go on as
    something that is not JSON, they are passed on as they are, up to where their brackets close (or </tool_call>).
    """

    def __init__(self, format: str, names: Iterable[str], new_id: Callable[[], str] = new_call_id) -> None:
        """A parser for one answer; names: the functions that may be called."""
        if format not in FORMATS:
            raise ValueError(f"tool call format {format!r} is none of {', '.join(FORMATS)}")
        self._hermes = format == "hermes"
        self._names = frozenset(names)
        self._new_id = new_id
        # text: outside a call (hermes); lead: where a call may start (llama3); call: in one;
        # after: behind its object, </tool_call> to come (hermes); plain: text up to the end
        self._state = "text" if self._hermes else "lead"
        self._steps = {
            "text": self._in_text,
            "lead": self._in_lead,
            "call": self._in_call,
            "after": self._in_after,
            "plain": self._in_plain,
        }
        self._hold = ""  # the end of what came, a possible start of a marker: to be read again with what follows
        self._lead = ""  # lead: what came since the start or the last call
        self._tag = ""  # and the end of it, a possible start of _TAG
        self._candidate = _Candidate("")
        self._complete = False  # after: the object had ended properly
        self._junk: list[str] = []  # after: what came that is no </tool_call>
        self._count = 0
        self._finished = False

        self._space = ""  # whitespace at the end of the text
        self._spoken = False  # there has been text other than whitespace
        self._fresh = False  # no text since the last call
        self._out: list[Delta] = []
        self._pieces: list[str] = []  # the last delta's text or arguments, not yet in _out
        self._index: int | None = None  # and its call

    @property
    def called(self) -> bool:
        """Whether any call has begun."""
        return self._count > 0

    def add(self, text: str) -> list[Delta]:
        """What the next piece of the answer decides; often nothing."""
        if self._finished:
            raise ValueError("the answer has been finished")
        data, self._hold = self._hold + text, ""
        at = 0
        while at < len(data):
            at = self._steps[self._state](data, at)
        return self._take()

    def finish(self) -> list[Delta]:
        """What was held back, now that the answer is over; a call that is incomplete but for its name is a call."""
        if self._finished:
            return []
        self._finished = True
        if self._state == "text":
            self._text(self._hold)
        elif self._state == "lead":
            if not (self.called and _SEPARATORS.fullmatch(self._lead)):
                self._text(self._lead)
        elif self._state == "call":
            self._cut_short(self._candidate)
        elif self._state == "after":
            rest = "".join(self._junk) + self._hold
            if self._complete and not _CLOSE.startswith(rest):
                self._text(rest)
        if not self.called:
            self._put(None, self._space)
        return self._take()

    # The states: each reads data from `at`, and returns where to go on.

    def _in_plain(self, data: str, at: int) -> int:
        self._text(data[at:])
        return len(data)

    def _in_text(self, data: str, at: int) -> int:
        found = data.find(_OPEN, at)
        if found >= 0:
            self._text(data[at:found])
            self._try_call(_OPEN)
            return found + len(_OPEN)
        end = len(data) - _partial(data, at, _OPEN)
        self._text(data[at:end])
        self._hold = data[end:]
        return len(data)

    def _in_lead(self, data: str, at: int) -> int:
        self._lead += data[at]
        if not self._tag and (data[at].isspace() or self.called and data[at] in _SEPARATING):
            return at + 1
        before = (_NEXT if self.called else _FIRST).match(self._lead)
        body = self._lead[before.end() :] if before else self._lead
        if body == "{":
            self._try_call(self._lead[:-1])
            self._lead = ""
            return at
        self._tag = body
        if body and (_TAG in self._lead or not _TAG.startswith(body)):
            self._text(self._lead)
            self._state = "plain"
        return at + 1

    def _in_call(self, data: str, at: int) -> int:
        candidate = self._candidate
        while at < len(data) and self._state == "call":
            if candidate.broken and self._hermes and data[at] == "<":
                if data.startswith(_CLOSE, at):
                    self._state = "text"
                    return at + len(_CLOSE)
                if len(data) - at < len(_CLOSE) and _CLOSE.startswith(data[at:]):
                    self._hold = data[at:]
                    return len(data)
            if candidate.broken:
                self._put(self._count - 1, data[at])
                candidate.feed_broken(data[at])
                at += 1
            elif self._step(candidate, data[at]):
                at += 1
        return at

    def _in_after(self, data: str, at: int) -> int:
        if self._complete and not self._junk:
            start = at
            while at < len(data) and data[at].isspace():
                at += 1
            self._space += data[start:at]
            if at == len(data):
                return at
            if data[at] == "{":  # a second object between the same markers
                self._try_call("")
                return at
        close, opening = data.find(_CLOSE, at), data.find(_OPEN, at)
        if close >= 0 and (opening < 0 or close < opening):
            self._space = ""
            self._state = "text"
            return close + len(_CLOSE)
        if opening >= 0:
            if self._complete:
                self._text("".join(self._junk) + data[at:opening])
            self._try_call(_OPEN)
            return opening + len(_OPEN)
        end = len(data) - _partial(data, at, _CLOSE, _OPEN)
        if end > at:
            self._junk.append(data[at:end])
        self._hold = data[end:]
        return len(data)

    # A call.

    def _try_call(self, raw: str) -> None:
        """A call may start here; raw: the source that goes with it if it does not."""
        self._candidate = _Candidate(raw)
        self._junk = []
        self._state = "call"

    def _step(self, candidate: _Candidate, ch: str) -> bool:
        """Takes one character of a candidate; False: not taken, to be read again in the state that is now."""
        scanner = candidate.json
        in_string = scanner.state == "string"
        if not scanner.feed(ch):
            if candidate.begun and candidate.in_arguments:
                candidate.break_up()
            elif candidate.begun:
                self._close(complete=False)
            else:
                self._give_up(candidate)
            return False
        if candidate.refused:
            self._text(ch)
            if scanner.state == "done":
                self._state = "text"
            return True
        if not candidate.begun:
            candidate.raw.append(ch)
            if not self._member(candidate, ch):
                self._give_up(candidate)
                return True
        if candidate.in_arguments:
            self._argument_text(candidate, _escaped(ch, in_string))
            if scanner.event == "end":
                candidate.in_arguments = False
        if scanner.state == "done":
            if not candidate.begun and self._hermes and candidate.name is not None:  # no arguments at all
                self._begin(candidate)
                self._put(self._count - 1, "{}")
            if candidate.begun:
                self._close(complete=True)
            elif not candidate.refused:
                self._give_up(candidate)
        return True

    def _member(self, candidate: _Candidate, ch: str) -> bool:
        """Looks at the object's members before the call has begun; False: it is no call."""
        scanner = candidate.json
        if scanner.event == "key":
            candidate.key = scanner.string()
        elif scanner.event == "start":
            if candidate.key == "name":
                return ch == '"' and candidate.name is None
            if candidate.key in _ARGUMENT_KEYS:
                if candidate.kind or ch not in '{"n':
                    return False
                candidate.kind, candidate.argument_key = ch, candidate.key
                candidate.in_arguments = ch == "{"
                if ch == "{" and candidate.name is not None:
                    self._begin(candidate)
        elif scanner.event == "end":
            if candidate.key == "name":
                candidate.name = scanner.string()
                if candidate.name not in self._names:
                    return self._refuse(candidate)
            elif candidate.key == candidate.argument_key and candidate.kind != "{":
                text = "{}" if candidate.kind == "n" else _object_text(scanner.string(), whole=True)
                if text is None:
                    return False
                candidate.held.append(text)
            if candidate.name is not None and (candidate.held or candidate.in_arguments):
                self._begin(candidate)
        return True

    def _refuse(self, candidate: _Candidate) -> bool:
        """The call is of an unknown function; whether to follow its object to the end, so as to find no call in it."""
        if self._hermes:
            candidate.refused = True
            self._text("".join(candidate.raw))
        return self._hermes

    def _give_up(self, candidate: _Candidate) -> None:
        """The candidate is no call."""
        self._state = "text" if self._hermes else "plain"
        if not candidate.refused:
            self._text("".join(candidate.raw))

    def _begin(self, candidate: _Candidate) -> None:
        """Gives out the call, and the arguments that were held back."""
        candidate.begun = True
        self._space = ""
        self._fresh = True
        self._flush()
        self._out.append(Delta(index=self._count, id=self._new_id(), name=candidate.name))
        self._count += 1
        self._put(self._count - 1, "".join(candidate.held))

    def _argument_text(self, candidate: _Candidate, text: str) -> None:
        if candidate.begun:
            self._put(self._count - 1, text)
        else:
            candidate.held.append(text)

    def _close(self, complete: bool) -> None:
        """The call is over; complete: its object ended properly."""
        if self._hermes:
            self._state, self._complete = "after", complete
        else:
            self._state = "lead" if complete else "plain"

    def _cut_short(self, candidate: _Candidate) -> None:
        """The answer ended within a candidate."""
        if candidate.begun or candidate.refused:
            return
        if candidate.name is None:
            self._text("".join(candidate.raw))
            return
        self._begin(candidate)
        scanner = candidate.json
        if candidate.kind == '"' and candidate.key == candidate.argument_key:
            text = scanner.string()
            if text and "\ud800" <= text[-1] <= "\udbff":  # half of a character
                text = text[:-1]
            partial = _object_text(text, whole=False)
            self._put(self._count - 1, text if partial is None else partial)

    # The output.

    def _text(self, text: str) -> None:
        """Gives out text, but for the whitespace at its end, which waits for more text."""
        whole = self._space + text
        body = whole.rstrip()
        self._space = whole[len(body) :]
        if not body:
            return
        if self._fresh and not self._spoken:
            body = body.lstrip()
        self._fresh, self._spoken = False, True
        self._put(None, body)

    def _put(self, index: int | None, text: str) -> None:
        """Gives out text of the answer (index None) or of a call's arguments."""
        if index != self._index:
            self._flush()
            self._index = index
        if text:
            self._pieces.append(text)

    def _flush(self) -> None:
        text = "".join(self._pieces)
        self._pieces.clear()
        if text and self._index is None:
            self._out.append(Delta(text=text))
        elif text:
            self._out.append(Delta(index=self._index, arguments=text))

    def _take(self) -> list[Delta]:
        self._flush()
        out, self._out = self._out, []
        return out


def parse(
    format: str, text: str, names: Iterable[str], new_id: Callable[[], str] = new_call_id
) -> tuple[str, list[Call]]:
    """The text and the calls of a whole answer."""
    parser = ToolParser(format, names, new_id)
    return collect(parser.add(text) + parser.finish())


def collect(deltas: Iterable[Delta]) -> tuple[str, list[Call]]:
    """The text and the calls that the deltas of one answer add up to."""
    texts: list[str] = []
    heads: list[tuple[str, str]] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        if delta.index is None:
            texts.append(delta.text)
        elif delta.id is not None and delta.name is not None:
            heads.append((delta.id, delta.name))
            arguments.append([])
        else:
            arguments[delta.index].append(delta.arguments)
    calls = [Call(id, name, "".join(pieces)) for (id, name), pieces in zip(heads, arguments)]
    return "".join(texts), calls


# The grammar ---------------------------------------------------------------------------------------------------------

# As models are trained to write it; fixed, so that they cannot run on in whitespace. Lenient: keywords of a schema that
# llguidance does not know are passed over.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_SHAPES = ("type", "$ref", "anyOf", "oneOf", "allOf", "const", "enum")  # keywords that say what a value is


def tool_grammar(format: str, tools: Sequence[dict[str, Any]], parallel: bool, special_markers: bool = False) -> str:
    """A grammar for llguidance (its dialect of Lark) of one call of one of the tools; parallel: of one or more calls.

    A tool is {"name": …, "parameters": a JSON schema, or None or absent for a function without parameters}.
    special_markers: <tool_call> and </tool_call> are special tokens of the tokenizer, as opposed to tokens or text that
    llguidance takes for ordinary; without use for llama3.
    """
    if format not in FORMATS:
        raise ValueError(f"tool call format {format!r} is none of {', '.join(FORMATS)}")
    if not tools:
        raise ValueError("no tools to call")
    hermes = format == "hermes"
    key = "arguments" if hermes else "parameters"
    rules = []
    for at, tool in enumerate(tools):
        head = f'{{"name": {json.dumps(tool["name"])}, "{key}": '
        schema = tool.get("parameters")
        schema = dict(_NO_PARAMETERS if schema is None else schema)
        if not any(shape in schema for shape in _SHAPES):
            schema["type"] = "object"
        schema["x-guidance"] = _JSON_STYLE
        rules.append(f'call_{at}: {json.dumps(head)} %json {json.dumps(schema)} "}}"')
    call = "(" + " | ".join(f"call_{at}" for at in range(len(tools))) + ")"
    separator = "; "
    if hermes:
        opening, closing = (_OPEN, _CLOSE) if special_markers else (json.dumps(_OPEN), json.dumps(_CLOSE))
        call = f'{opening} "\\n" {call} "\\n" {closing}'
        separator = "\n"
    more = f" ({json.dumps(separator)} call)*" if parallel else ""
    return "\n".join([f"start: call{more}", f"call: {call}", *rules]) + "\n"
