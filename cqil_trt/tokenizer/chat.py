"""Renders chat templates in the same environment as transformers' `apply_chat_template`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from cqil_trt.errors import UserError

# The names of a message's reasoning; templates read the first, that of gpt-oss the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """The input of a chat template: messages as in OpenAI's API and transformers, tools as JSON schemas.

    `variables`: further variables of the template. `source` names the conversation in messages to the user.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    source: str = "--chat"

    @classmethod
    def of_json(cls, value: Any, source: str) -> Conversation:
        """From a list of messages, or an object with messages and optionally tools, documents, chat_template_kwargs.

        Raises UserError, naming `source`, for anything else.
        """
        parts = value if isinstance(value, dict) else {"messages": value}
        known = ("messages", "tools", "documents", "chat_template_kwargs")
        if unknown := [name for name in parts if name not in known]:
            raise UserError(f"{source}: {unknown[0]!r:.60} is not one of {', '.join(known)}")
        messages = parts.get("messages")
        if not isinstance(messages, list) or not messages:
            raise UserError(f"{source}: expected a list of messages, or an object that holds one as messages")
        for number, message in enumerate(messages, 1):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise UserError(f"{source}: message {number} is not an object with a role")
        for name in ("tools", "documents"):
            items = parts.get(name)
            if items is not None and not (isinstance(items, list) and all(isinstance(item, dict) for item in items)):
                raise UserError(f"{source}: {name} must be a list of objects")
        variables = parts.get("chat_template_kwargs") or {}
        if not isinstance(variables, dict):
            raise UserError(f"{source}: chat_template_kwargs must be an object")
        if reserved := [name for name in variables if name in (*known, "continue_final_message")]:
            raise UserError(f"{source}: {reserved[0]} is not taken among chat_template_kwargs")
        return cls(
            messages=messages,
            tools=parts.get("tools"),
            documents=parts.get("documents"),
            variables=variables,
            source=source,
        )

    def __str__(self) -> str:
        last = self.messages[-1]
        return f"{last['role']}: {last.get('content')}"


class ChatTemplate:
    """The chat templates of a model, by name. `names`: its special tokens by name. `source` names them in messages."""

    def __init__(self, templates: Mapping[str, str], names: Mapping[str, str], source: str):
        self._templates, self._names, self._source = templates, names, source

    def render(self, conversation: Conversation) -> str:
        """The conversation as text, up to the assistant's turn, with the special tokens that the model expects.

        Raises UserError if there is no template, or if it is malformed, refuses the conversation or fails.
        """
        source = self._choose(conversation)
        try:
            template = _compile(source)
        except Exception as error:  # Jinja's errors, and those of compiling the code that it generates
            raise UserError(
                f"{conversation.source}: the chat template of {self._source} is malformed ({error})"
            ) from None
        values = {
            **self._names,
            "messages": [_message(message) for message in conversation.messages],
            "tools": conversation.tools,
            "documents": conversation.documents,
            "add_generation_prompt": True,
            **conversation.variables,
        }
        try:
            return template.render(**values)
        except _Refused as error:
            raise UserError(f"{conversation.source}: the chat template says: {error}") from None
        except Exception as error:  # a template's expressions can raise anything
            raise UserError(f"{conversation.source}: the chat template of {self._source} failed ({error})") from None

    def _choose(self, conversation: Conversation) -> str:
        if conversation.tools is not None and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        if self._templates:
            raise UserError(f"{conversation.source}: {self._source} has chat templates, but none is named default")
        raise UserError(f"{conversation.source}: {self._source} has no chat template")


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without null fields, which OpenAI's clients send, and with its reasoning under every name."""
    kept = {name: value for name, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in _REASONING if name in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


class _Refused(TemplateError):
    """Raised by the template itself."""


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}: marks the assistant's text for training; here it is just rendered."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: variables set inside are not visible outside.
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Any) -> str:
        return caller()


class _Namespace(Namespace):
    """A namespace without attributes that begin with an underscore, which would expose Python's internals."""

    def __init__(*args: Any, **values: Any) -> None:  # noqa: N805  a value may be called self
        self, *rest = args
        given = dict(*rest, **values)
        for name in given:
            _check_attribute(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


@cache
def _compile(source: str) -> Template:
    # The sandbox and the options of transformers: a template is untrusted text.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now, "namespace": _Namespace}
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise _Refused(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
