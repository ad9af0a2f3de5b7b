"""From a request's body to the engine, and from its tokens to an answer's text, tool calls and log-probabilities."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from cqil_trt.errors import UserError
from cqil_trt.generate import StoppingText
from cqil_trt.sampling import Choice, SamplingConfig
from cqil_trt.serving import api, grammars, tool_calls
from cqil_trt.serving.client import EngineClient, Ticket, Update
from cqil_trt.serving.refusals import Refused
from cqil_trt.tokenizer import Conversation, Tokenizer

# The control tokens that tool calls are made of, in models where they are control tokens.
_TOOL_MARKS = ("<tool_call>", "</tool_call>", "<|python_tag|>")


def sampling_of(body: api.Sampled, logprobs: int | None, index: int, guided: bool, vocabulary: int) -> SamplingConfig:
    """The sampling of choice `index`. Raises Refused for tokens that do not exist."""
    bias = []
    for name, value in (body.logit_bias or {}).items():
        if not re.fullmatch("[0-9]{1,10}", name) or int(name) >= vocabulary:
            raise Refused(400, f"{name!r:.40} is not a token id from 0 to {vocabulary - 1}", "logit_bias")
        bias.append((int(name), value))

    def given(value: Any, default: Any) -> Any:
        return default if value is None else value

    seed = secrets.randbits(63) if body.seed is None else (body.seed + index) % 2**64
    return SamplingConfig(
        temperature=float(given(body.temperature, 1.0)),
        top_k=max(given(body.top_k, 0), 0),
        top_p=float(given(body.top_p, 1.0)),
        min_p=float(given(body.min_p, 0.0)),
        seed=seed,
        repetition_penalty=float(given(body.repetition_penalty, 1.0)),
        presence_penalty=float(given(body.presence_penalty, 0.0)),
        frequency_penalty=float(given(body.frequency_penalty, 0.0)),
        logit_bias=tuple(bias),
        logprobs=logprobs,
        guided=guided,
    )


def grammar_of(body: api.Sampled) -> tuple[str, str] | None:
    """The grammar that an answer must follow and the field that asks for it. Raises Refused for a wrong one."""
    makers: dict[str, Callable[[Any], str]] = {
        "guided_json": grammars.json_schema,
        "guided_regex": grammars.regex,
        "guided_choice": grammars.choice,
        "guided_grammar": grammars.lark,
    }
    wanted = {name: getattr(body, name) for name in makers}
    if isinstance(body, api.ChatBody) and body.response_format is not None and body.wants_json:
        given = body.response_format.json_schema
        makers["response_format"] = grammars.json_schema
        wanted["response_format"] = {"type": "object"} if given is None or given.schema_ is None else given.schema_
    for name, value in wanted.items():
        if value is not None:  # the body has at most one
            try:
                return makers[name](value), name
            except UserError as error:
                raise Refused(400, str(error), name) from None
    return None


def conversation_of(body: api.ChatBody | api.TokenizeBody) -> Conversation:
    """The messages in the form that chat templates take."""
    messages = []
    for message in body.messages or ():
        values = message.model_dump(exclude_none=True)
        if isinstance(message.content, list):
            values["content"] = "".join(part.text for part in message.content)
        for call in values.get("tool_calls", ()):
            # Templates write arguments as JSON themselves.
            call["function"]["arguments"] = _parsed(call["function"]["arguments"])
        messages.append(values)
    tools = variables = None
    if isinstance(body, api.ChatBody):
        variables = body.chat_template_kwargs
        if body.tools and body.tool_choice != "none":
            tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
    value = {"messages": messages, "tools": tools, "chat_template_kwargs": variables}
    return Conversation.of_json(value, "messages")


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What the answer may call; with a `grammar` it must. `several`: whether more than once."""

    format: str
    names: frozenset[str]
    several: bool = True
    grammar: str | None = None


def tools_of(body: api.ChatBody, tokenizer: Tokenizer) -> Tools | None:
    """Raises Refused if the model's format of tool calls is not known."""
    if not body.tools or body.tool_choice == "none":
        return None
    form = tool_calls.format_of(tokenizer.chat_template or "")
    if form is None:
        raise Refused(400, "the model's chat template has no format of tool calls that is known here", "tools")
    names = frozenset(tool.function.name for tool in body.tools)
    several = body.parallel_tool_calls is not False
    if body.tool_choice in (None, "auto"):
        return Tools(format=form, names=names, several=several)
    wanted = names
    if isinstance(body.tool_choice, api.NamedTool):
        wanted = frozenset({body.tool_choice.function.name})
    functions = [tool.function for tool in body.tools if tool.function.name in wanted]
    described = [{"name": function.name, "parameters": function.parameters} for function in functions]
    several = several and body.tool_choice == "required"
    # Where the marks are control tokens, their letters are not what the model has learned to write.
    mark = tokenizer.vocabulary.id_of(_TOOL_MARKS[0])
    special = mark is not None and tokenizer.vocabulary.special_text(mark) is not None
    grammar = grammars.lark(tool_calls.tool_grammar(form, described, several, special))
    return Tools(format=form, names=names, several=several, grammar=grammar)


@dataclass(kw_only=True)
class Piece:
    """What is new of an answer. `finish_reason`: as in OpenAI's API, None while it runs."""

    index: int
    text: str = ""
    calls: list[tool_calls.Delta] = field(default_factory=list)
    choices: tuple[Choice, ...] = ()
    finish_reason: str | None = None
    prompt_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()


class Answer:
    """One choice of a response."""

    def __init__(
        self,
        ticket: Ticket,
        tokenizer: Tokenizer | None,
        stops: Sequence[str],
        tools: Tools | None = None,
        after: Sequence[int] = (),
    ):
        """`after`: the tokens whose text it continues."""
        self.ticket = ticket
        visible: Collection[str] = _TOOL_MARKS if tools is not None else ()
        self._text = None if tokenizer is None else StoppingText(tokenizer, stops, visible, after)
        self._parser = None if tools is None else tool_calls.ToolParser(tools.format, set(tools.names))
        self._several = tools is None or tools.several
        self.finished = False
        self.reason: str | None = None
        self.tokens = 0  # of the answer, up to a stop text
        self.cached = 0

    def add(self, update: Update) -> Piece:
        """Takes in what came from the engine."""
        piece = Piece(index=self.ticket.index, prompt_logprobs=update.prompt_logprobs)
        tokens, reason = [choice.token for choice in update.choices], update.finish_reason
        if self._text is None:
            self.finished = bool(reason)
            text = "".join(f"{token} " for token in tokens)  # as run.py prints them
        else:
            count, reason = self._text.feed(tokens, reason)
            tokens = tokens[:count]
            self.finished = bool(reason)
            text = self._text.take(self.finished)
        self.tokens += len(tokens)
        self.cached = max(self.cached, update.cached)
        piece.choices = update.choices[: len(tokens)]
        if self._parser is None:
            piece.text = text
        else:
            deltas = self._parser.add(text) + (self._parser.finish() if self.finished else [])
            second = next((at for at, delta in enumerate(deltas) if delta.index is not None and delta.index > 0), None)
            if second is not None and not self._several:  # which ends the answer
                deltas, self.finished, reason = deltas[:second], True, "stop"
            piece.text = "".join(delta.text for delta in deltas if delta.index is None)
            piece.calls = [delta for delta in deltas if delta.index is not None]
        if self.finished:
            called = self._parser is not None and self._parser.called
            self.reason = piece.finish_reason = "length" if reason == "length" else "tool_calls" if called else "stop"
        return piece


class Exchange:
    """The answers to one HTTP request, as they grow: `choices` for each prompt. Ends what still runs when closed."""

    def __init__(self, client: EngineClient, choices: int, seconds: float, queue_seconds: float):
        self._client, self.choices = client, choices
        # An update without a request is the time being over.
        self._updates: asyncio.Queue[tuple[int, Update | None]] = asyncio.Queue()
        self._seconds = seconds
        self.answers: list[Answer] = []
        self._over = False
        loop = asyncio.get_running_loop()
        self._timers = [
            loop.call_later(min(queue_seconds, seconds), self._updates.put_nowait, (0, None)),
            loop.call_later(seconds, self._expire),
        ]

    def _expire(self) -> None:
        self._over = True
        self._updates.put_nowait((0, None))

    def ask(
        self,
        tokenizer: Tokenizer | None,
        stops: Sequence[str],
        tools: Tools | None,
        after: Sequence[int],
        **fields: Any,
    ) -> None:
        ticket = self._client.submit(self._updates, len(self.answers), **fields)
        self.answers.append(Answer(ticket, tokenizer, stops, tools, after))

    @property
    def finished(self) -> bool:
        return all(answer.finished for answer in self.answers)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Raises Refused when the engine fails or time is over."""
        while not self.finished:
            index, update = await self._updates.get()
            if update is None:
                if all(answer.ticket.started_at is None for answer in self.answers):
                    self._client.metrics.refused("timeout")
                    raise Refused(503, "the request waited too long for its turn", retry=1)
                if not self._over:
                    continue
                raise Refused(503, f"the request took longer than {self._seconds:g} s")
            answer = self.answers[index]
            if answer.finished:
                continue
            if update.finish_reason == "error":
                raise Refused(update.status, update.error, retry=5 if update.status == 503 else None)
            piece = answer.add(update)
            if answer.finished:
                # A stop text ends the answer before the engine knows.
                self._client.abort(answer.ticket)
            yield piece

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        for answer in self.answers:
            self._client.abort(answer.ticket)
