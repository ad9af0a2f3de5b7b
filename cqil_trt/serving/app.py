"""The HTTP side: OpenAI's API, health, metrics and the chat page, as a Starlette application."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from cqil_trt import __version__
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.scheduler import check_prompt
from cqil_trt.serving import api, wire
from cqil_trt.serving.answers import (
    Exchange,
    Piece,
    Refused,
    Tools,
    conversation_of,
    grammar_of,
    sampling_of,
    tools_of,
)
from cqil_trt.serving.client import EngineClient
from cqil_trt.tokenizer import Tokenizer

B = TypeVar("B", bound=BaseModel)
Send = Callable[[Any], Awaitable[None]]

# Texts of more characters are tokenized beside the event loop, which other clients' tokens pass through.
_LONG_TEXT = 20_000
# Errors of a body that are looked at; to list a million of them would take seconds.
_MANY_ERRORS = 10_000
# A client that takes nothing for so long is given up.
_STALLED_SECONDS = 60.0
_PAGE = Path(__file__).with_name("page.html")
# Served without an API key: what probes ask, and the page that asks for the key.
_OPEN = frozenset({"/", "/health", "/ready"})
_REFUSALS = {400: "invalid", 401: "unauthorized", 404: "invalid", 413: "too_large", 422: "invalid"}


class Server:
    """The handlers, and what they share."""

    def __init__(self, setup: wire.Setup, engine: Engine, tokenizer: Tokenizer | None, ends: tuple[int, ...]):
        self.setup, self.engine, self.tokenizer, self.ends = setup, engine, tokenizer, ends
        self.limits = engine.limits
        self.created = int(time.time())
        self.client: EngineClient
        self._grammars: Any = None

    def routes(self) -> list[Route]:
        post = ["POST"]
        return [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/ready", self.is_ready),
            Route("/metrics", self.metrics),
            Route("/version", self.version),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/chat/completions", self.chat, methods=post),
            Route("/v1/completions", self.complete, methods=post),
            Route("/v1/embeddings", self.embeddings, methods=post),
            Route("/tokenize", self.tokenize, methods=post),
            Route("/detokenize", self.detokenize, methods=post),
        ]

    # State

    async def page(self, request: Request) -> Response:
        html = _PAGE.read_text()
        return HTMLResponse(html, headers={"Content-Security-Policy": content_security_policy(html)})

    async def health(self, request: Request) -> Response:
        failure = self.client.failure
        if failure is not None:
            return JSONResponse({"status": "failed", "reason": failure}, 503)
        return JSONResponse({"status": "ok" if self.client.ready else "starting"})

    async def is_ready(self, request: Request) -> Response:
        client = self.client
        status = (
            "failed" if client.failure else "draining" if client.draining else "ready" if client.ready else "loading"
        )
        return JSONResponse({"status": status}, 200 if status == "ready" else 503, headers={"Retry-After": "1"})

    async def metrics(self, request: Request) -> Response:
        body, kind = await asyncio.to_thread(self.client.metrics.exposition)
        return Response(body, media_type=kind)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.setup.model_names]})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._check_model(name)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "cqil-trt",
            "max_model_len": self.limits.max_seq_len,
        }

    async def embeddings(self, request: Request) -> Response:
        raise Refused(400, "embeddings are not supported: this server generates text", "/v1/embeddings")

    # Tokens

    async def tokenize(self, request: Request) -> Response:
        body = parse(api.TokenizeBody, await request.body())
        self._check_model(body.model)
        tokenizer = self._tokenizer()
        try:
            if body.messages is not None:
                ids = await self._apart(_size(body.messages), lambda: tokenizer.chat(conversation_of(body)))
            else:
                text = body.prompt or ""
                ids = await self._apart(len(text), lambda: tokenizer.encode(text, body.add_special_tokens))
        except UserError as error:
            raise Refused(400, str(error), "messages" if body.messages else "prompt") from None
        return JSONResponse({"count": len(ids), "max_model_len": self.limits.max_seq_len, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        body = parse(api.DetokenizeBody, await request.body())
        self._check_model(body.model)
        self._check_tokens(body.tokens, "tokens")
        tokenizer = self._tokenizer()
        text = await self._apart(len(body.tokens), lambda: "".join(_read(tokenizer, body.tokens)))
        return JSONResponse({"prompt": text})

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise Refused(400, "this engine has no tokenizer: give prompts as token ids to /v1/completions", "prompt")
        return self.tokenizer

    def _check_tokens(self, tokens: list[int], field: str) -> None:
        size = self.engine.model.vocab_size
        if any(token >= size for token in tokens):
            raise Refused(400, f"a token id is not from 0 to {size - 1}", field)

    async def _apart(self, size: int, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.to_thread(work, *arguments) if size > _LONG_TEXT else work(*arguments)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.setup.model_names:
            known = ", ".join(self.setup.model_names)
            raise Refused(404, f"the model {name!r:.80} does not exist: this server has {known}", "model")

    # Completions

    async def chat(self, request: Request) -> Response:
        body = parse(api.ChatBody, await request.body())
        self._check_model(body.model)
        tokenizer = self._tokenizer()
        tools = tools_of(body, tokenizer)
        try:
            prompt = await self._apart(_size(body.messages), lambda: tokenizer.chat(conversation_of(body)))
        except UserError as error:
            variables = "chat_template_kwargs"
            raise Refused(400, str(error), variables if variables in str(error) else "messages") from None
        room = self._room([prompt], body.limit, "messages")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        exchange = await self._ask(body, [prompt], [room], logprobs, tools=tools)
        form = ChatForm(body, self, logprobs is not None)
        return await self._respond(request, body, exchange, form)

    async def complete(self, request: Request) -> Response:
        body = parse(api.CompletionBody, await request.body())
        self._check_model(body.model)
        prompts: list[list[int]] = []
        for given in body.prompts:
            if isinstance(given, str):
                tokenizer = self._tokenizer()
                text = given
                try:
                    ids = await self._apart(len(text), tokenizer.encode, text)
                except UserError as error:
                    raise Refused(400, str(error), "prompt") from None
            else:
                ids = list(given)
            prompts.append(ids)
        if body.limit == 0 and not body.echo:
            raise Refused(400, "0 needs echo to be true", "max_tokens")
        rooms = [self._room([prompt], body.limit, "prompt") for prompt in prompts]
        scored = 0 if body.echo and body.logprobs is not None else None
        exchange = await self._ask(body, prompts, rooms, body.logprobs, scored=scored)
        form = CompletionForm(body, self, prompts)
        return await self._respond(request, body, exchange, form)

    def _room(self, prompts: list[list[int]], limit: int | None, field: str) -> int:
        """The most tokens to generate. Raises Refused for a prompt that the engine does not take."""
        longest = self.limits.max_seq_len
        for prompt in prompts:
            try:
                check_prompt(prompt, "the prompt", self.engine.model.vocab_size, longest)
            except UserError as error:
                raise Refused(400, str(error), field) from None
        room = longest + 1 - max(map(len, prompts))
        return room if limit is None else min(limit, room)

    async def _ask(
        self,
        body: api.Sampled,
        prompts: list[list[int]],
        rooms: list[int],
        logprobs: int | None,
        scored: int | None = None,
        tools: Tools | None = None,
    ) -> Exchange:
        """Sends the requests of one body to the engine. Raises Refused if there is no room or no engine."""
        client, setup = self.client, self.setup
        if client.failure is not None:
            raise Refused(503, f"the engine failed: {client.failure}", retry=5)
        if client.draining:
            client.metrics.refused("draining")
            raise Refused(503, "the server is shutting down", retry=5)
        if client.ready is None:
            raise Refused(503, "the engine is loading", retry=2)
        count = body.n or 1
        rows = client.ready.rows
        if client.active + count * len(prompts) > rows + setup.max_waiting:
            client.metrics.refused("queue_full")
            raise Refused(429, f"{client.active} requests are running or waiting, no more are taken", retry=1)
        found = grammar_of(body)
        if tools is not None and tools.grammar is not None:
            if found is not None:
                raise Refused(400, f"cannot be used together with {found[1]}", "tool_choice")
            found = tools.grammar, "tools"
        if found is not None:
            await self._check_grammar(*found)
        grammar = None if found is None else found[0]
        if self.tokenizer is None and body.stops:
            raise Refused(400, "this engine has no tokenizer, which stop texts need", "stop")
        exchange = Exchange(client, count, setup.request_seconds, setup.queue_seconds)
        vocabulary = self.engine.model.vocab_size
        for prompt, room in zip(prompts, rooms):
            for index in range(count):
                exchange.ask(
                    self.tokenizer,
                    body.stops,
                    tools,
                    prompt=tuple(prompt),
                    max_new_tokens=room,
                    eos_token_ids=() if body.ignore_eos else self.ends,
                    sampling=sampling_of(body, logprobs, index, grammar is not None, vocabulary),
                    scored=scored,
                    grammar=grammar,
                )
        return exchange

    async def _check_grammar(self, grammar: str, field: str) -> None:
        from cqil_trt.serving.grammars import Grammars

        if self._grammars is None:
            self._grammars = Grammars(self._tokenizer(), self.engine.model.vocab_size, self.ends)
        try:
            await asyncio.to_thread(self._grammars.check, grammar)
        except UserError as error:
            raise Refused(400, str(error), field) from None

    # Responses

    async def _respond(self, request: Request, body: api.Sampled, exchange: Exchange, form: Form) -> Response:
        note: Note = request.state.note
        note.prompt_tokens = sum(answer.ticket.prompt_tokens for answer in exchange.answers)
        note.exchange = exchange
        pieces = exchange.pieces()
        try:
            if not body.stream:
                await unless_gone(request, form.take_all(pieces))
                return JSONResponse(form.whole(exchange))
            # What goes wrong before the first token has a status of its own.
            first = await unless_gone(request, anext(pieces))
        except BaseException:
            exchange.close()
            raise
        finally:
            if not body.stream:
                exchange.close()
        return EventStream(self._stream(first, pieces, exchange, form, body), exchange.close)

    async def _stream(
        self, first: Piece, pieces: AsyncIterator[Piece], exchange: Exchange, form: Form, body: api.Sampled
    ) -> AsyncIterator[bytes]:
        options = body.stream_options or api.StreamOptions()
        try:
            for piece in [first]:
                for chunk in form.chunks(piece, exchange):
                    yield event(chunk)
            async for piece in pieces:
                for chunk in form.chunks(piece, exchange):
                    yield event(chunk)
            if options.include_usage:
                yield event(form.envelope([], usage(exchange)))
            yield b"data: [DONE]\n\n"
        except Refused as refused:
            yield event(error_body(refused))


@dataclass
class Note:
    """What the log says about a request."""

    id: str
    began: float
    status: int = 0
    prompt_tokens: int | None = None
    exchange: Exchange | None = None
    body: bytes | None = None


class Form:
    """The shape of a response: chat or text."""

    kind = ""
    chunk_kind = ""
    prefix = ""

    def __init__(self, body: api.Sampled, server: Server):
        self.id = self.prefix + secrets.token_hex(12)
        self.created = int(time.time())
        self.model = body.model or server.setup.model_names[0]
        self._options = body.stream_options or api.StreamOptions()
        self._tokenizer = server.tokenizer

    def envelope(
        self, choices: list[dict[str, Any]], used: dict[str, Any] | None, whole: bool = False
    ) -> dict[str, Any]:
        found = {
            "id": self.id,
            "object": self.kind if whole else self.chunk_kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"cqil-trt-{__version__}",
            "choices": choices,
        }
        if used is not None:
            found["usage"] = used
        elif self._options.include_usage and not whole:
            found["usage"] = None
        return found

    def _chunk(self, choice: dict[str, Any], exchange: Exchange) -> dict[str, Any]:
        return self.envelope([choice], usage(exchange) if self._options.continuous_usage_stats else None)

    async def take_all(self, pieces: AsyncIterator[Piece]) -> None:
        async for piece in pieces:
            self.take(piece)

    def take(self, piece: Piece) -> None:
        raise NotImplementedError

    def chunks(self, piece: Piece, exchange: Exchange) -> list[dict[str, Any]]:
        raise NotImplementedError

    def whole(self, exchange: Exchange) -> dict[str, Any]:
        raise NotImplementedError

    def _name(self, token: int) -> str:
        return str(token) if self._tokenizer is None else self._tokenizer.text_of(token)


class ChatForm(Form):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, body: api.ChatBody, server: Server, logprobs: bool):
        super().__init__(body, server)
        self._logprobs = logprobs
        self._begun: set[int] = set()
        self._texts: dict[int, str] = {}
        self._calls: dict[int, list[dict[str, Any]]] = {}
        self._tokens: dict[int, list[dict[str, Any]]] = {}
        self._reasons: dict[int, str] = {}

    def _content(self, piece: Piece) -> list[dict[str, Any]]:
        return [
            {**self._token(*choice.logprobs[0]), "top_logprobs": [self._token(*pair) for pair in choice.logprobs[1:]]}
            for choice in piece.choices
            if choice.logprobs is not None
        ]

    def _token(self, token: int, value: float) -> dict[str, Any]:
        raw = b"" if self._tokenizer is None else self._tokenizer.bytes_of(token)
        return {"token": self._name(token), "logprob": finite(value), "bytes": list(raw)}

    def take(self, piece: Piece) -> None:
        index = piece.index
        self._texts[index] = self._texts.get(index, "") + piece.text
        self._tokens.setdefault(index, []).extend(self._content(piece))
        calls = self._calls.setdefault(index, [])
        for delta in piece.calls:
            if delta.id is not None:
                calls.append({"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}})
            calls[delta.index or 0]["function"]["arguments"] += delta.arguments
        if piece.finish_reason is not None:
            self._reasons[index] = piece.finish_reason

    def whole(self, exchange: Exchange) -> dict[str, Any]:
        choices = []
        for index in range(len(exchange.answers)):
            calls = self._calls[index]
            text = self._texts[index]
            message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
            if calls:
                message["tool_calls"] = calls
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": {"content": self._tokens[index]} if self._logprobs else None,
                    "finish_reason": self._reasons[index],
                }
            )
        return self.envelope(choices, usage(exchange), whole=True)

    def chunks(self, piece: Piece, exchange: Exchange) -> list[dict[str, Any]]:
        delta: dict[str, Any] = {}
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            delta = {"role": "assistant", "content": ""}
        if piece.text:
            delta["content"] = piece.text
        if piece.calls:
            delta["tool_calls"] = [_call_delta(call) for call in piece.calls]
        content = self._content(piece) if self._logprobs else []
        if not (delta or content or piece.finish_reason):
            return []
        choice = {
            "index": piece.index,
            "delta": delta,
            "logprobs": {"content": content} if content else None,
            "finish_reason": piece.finish_reason,
        }
        return [self._chunk(choice, exchange)]


def _call_delta(call: Any) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.id is None:
        return {"index": call.index, "function": function}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, **function}}


class CompletionForm(Form):
    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl-"

    def __init__(self, body: api.CompletionBody, server: Server, prompts: list[list[int]]):
        super().__init__(body, server)
        self._body, self._prompts = body, prompts
        self._texts: dict[int, str] = {}
        self._logprobs: dict[int, dict[str, list[Any]]] = {}
        self._reasons: dict[int, str] = {}
        self._offsets: dict[int, _Offset] = {}

    def _prompt(self, index: int) -> list[int]:
        return self._prompts[index // (self._body.n or 1)]

    def _new(self, piece: Piece) -> tuple[str, dict[str, list[Any]]]:
        """The text and the log-probabilities that a piece adds."""
        index = piece.index
        text = piece.text
        prompt: list[tuple[int, float | None, Any]] = []
        if index not in self._offsets:
            self._offsets[index] = _Offset(self._tokenizer)
            if self._body.echo:
                ids = self._prompt(index)
                text = ("" if self._tokenizer is None else "".join(_read(self._tokenizer, ids))) + text
                prompt.append((ids[0], None, None))
        prompt += [(pairs[0][0], pairs[0][1], pairs[1:]) for pairs in piece.prompt_logprobs]
        answer = [
            (choice.logprobs[0][0], choice.logprobs[0][1], choice.logprobs[1:])
            for choice in piece.choices
            if choice.logprobs is not None
        ]
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for number, (token, value, top) in enumerate([*prompt, *answer]):
            found["tokens"].append(self._name(token))
            found["token_logprobs"].append(None if value is None else finite(value))
            # Parts of characters share a name, which then means the likeliest.
            alternatives = None if top is None else {self._name(other): finite(p) for other, p in reversed(top)}
            found["top_logprobs"].append(alternatives)
            found["text_offset"].append(self._offsets[index].of(token, number < len(prompt)))
        return text, found

    def take(self, piece: Piece) -> None:
        text, logprobs = self._new(piece)
        self._texts[piece.index] = self._texts.get(piece.index, "") + text
        kept = self._logprobs.setdefault(piece.index, {name: [] for name in logprobs})
        for name, values in logprobs.items():
            kept[name] += values
        if piece.finish_reason is not None:
            self._reasons[piece.index] = piece.finish_reason

    def whole(self, exchange: Exchange) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "text": self._texts[index],
                "logprobs": None if self._body.logprobs is None else self._logprobs[index],
                "finish_reason": self._reasons[index],
            }
            for index in range(len(exchange.answers))
        ]
        return self.envelope(choices, usage(exchange), whole=True)

    def chunks(self, piece: Piece, exchange: Exchange) -> list[dict[str, Any]]:
        text, logprobs = self._new(piece)
        if not (text or logprobs["tokens"] or piece.finish_reason):
            return []
        choice = {
            "index": piece.index,
            "text": text,
            "logprobs": None if self._body.logprobs is None else logprobs,
            "finish_reason": piece.finish_reason,
        }
        return [self._chunk(choice, exchange)]


class _Offset:
    """Where each token begins in an answer's text, which has the prompt before it if that is echoed."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._stream = None if tokenizer is None else tokenizer.stream()
        self._size, self._in_prompt = 0, True

    def of(self, token: int, in_prompt: bool) -> int:
        if self._tokenizer is None or self._stream is None:
            return 0
        if self._in_prompt and not in_prompt:
            self._size += len(self._stream.finish())
            self._stream = self._tokenizer.stream()
        self._in_prompt = in_prompt
        start = self._size
        control = _control(self._tokenizer, token)
        if control is None:
            self._size += len(self._stream.add(token))
        elif in_prompt:  # an answer does not show them
            self._size += len(control)
        return start


def usage(exchange: Exchange) -> dict[str, Any]:
    first = exchange.answers[:: exchange.choices]  # the prompt of several choices counts once
    prompt = sum(answer.ticket.prompt_tokens for answer in first)
    completion = sum(answer.tokens for answer in exchange.answers)
    cached = sum(answer.cached for answer in first)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def finite(value: float) -> float:
    """JSON has no infinities; OpenAI's API gives -9999 for what cannot happen."""
    return max(value, -9999.0)


def _read(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text of tokens, control tokens included."""
    stream = tokenizer.stream()
    parts = []
    for token in ids:
        control = _control(tokenizer, token)
        parts.append(stream.add(token) if control is None else control)
    return [*parts, stream.finish()]


def _control(tokenizer: Tokenizer, token: int) -> str | None:
    """The text of a control token; of a token that only the embedding has, none."""
    return tokenizer.vocabulary.special_text(token) if token < tokenizer.vocabulary.size() else ""


def _size(messages: list[api.Message] | None) -> int:
    return sum(len(str(message.content)) for message in messages or ())


def parse(kind: type[B], body: bytes) -> B:
    """The body as `kind`. Raises Refused that names the field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > _MANY_ERRORS:
            raise Refused(400, f"the body is wrong in {error.error_count()} places") from None
        found, place = _deepest(error, body)
        message = found["msg"].removeprefix("Value error, ")
        name, _, rest = message.partition(": ")
        if found["type"] == "value_error" and rest:
            place.append(name)
            message = rest
        if found["type"] == "extra_forbidden":
            message = "is not supported"
        field = ".".join(place) or None
        raise Refused(400, f"{field or 'the body'}: {message}", field) from None


def _deepest(error: ValidationError, body: bytes) -> tuple[Any, list[str]]:
    """The error to report and its place in the body: of a field that takes several forms, the form that fits best."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    placed = [(found, _place(found, value)) for found in errors if found["loc"][:1] == errors[0]["loc"][:1]]
    return max(placed, key=lambda pair: len(pair[1]))


def _place(found: Any, value: Any) -> list[str]:
    """Where in the body an error is. Pydantic's own place also has the names of types, which no client knows."""
    place = []
    for number, part in enumerate(found["loc"], 1):
        last = number == len(found["loc"])
        inside = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if inside:
            value = value[part]
        if inside or (last and found["type"] == "missing"):
            place.append(str(part))
    return place


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_body(refused: Refused) -> dict[str, Any]:
    kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(refused.status, "server_error" if refused.status >= 500 else "invalid_request_error")
    message = refused.message
    if refused.field is not None and not message.startswith(refused.field):
        message = f"{refused.field}: {message}"
    return {"error": {"message": message, "type": kind, "param": refused.field, "code": refused.status}}


def error_response(refused: Refused) -> JSONResponse:
    headers = {} if refused.retry is None else {"Retry-After": f"{refused.retry:g}"}
    return JSONResponse(error_body(refused), refused.status, headers=headers)


class Gone(Exception):
    """The client closed its connection."""


async def unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled when the client closes its connection. Raises Gone then."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(disconnected())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        await ended(task, gone)


async def ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancels tasks and waits for their end.

    Until Python 3.12 `asyncio.wait_for` swallows a cancellation that comes just when what it waits for is done, so one
    is not enough.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=0.01)
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events. Ends when the client has gone or takes nothing for long; `close` is called in any case."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        sending: float | None = None  # since when the client takes nothing

        async def write() -> None:
            nonlocal sending
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for body in self._events:
                sending = time.monotonic()
                await send({"type": "http.response.body", "body": body, "more_body": True})
                sending = None
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        async def stalled() -> None:
            while sending is None or time.monotonic() - sending < _STALLED_SECONDS:
                await asyncio.sleep(_STALLED_SECONDS / 10)

        tasks = [asyncio.create_task(work()) for work in (write, gone, stalled)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                with contextlib.suppress(OSError):
                    tasks[0].result()
        finally:
            self._close()
            await ended(*tasks)


class Gate:
    """Before every request: its id, its key, its size; after it: the log."""

    def __init__(self, app: Any, server: Server):
        self._app, self._server = app, server
        self._keys = [hashlib.sha256(key.encode()).digest() for key in server.setup.keys]

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        note = Note(
            id=given if re.fullmatch(r"[\w.:-]{1,128}", given) else secrets.token_hex(8), began=time.monotonic()
        )
        scope.setdefault("state", {})["note"] = note
        begun = False

        async def answer(message: Any) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                note.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", note.id.encode())]
            await send(message)

        size = 0
        limit = self._server.setup.max_body_bytes

        async def limited() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise Refused(413, f"the body is larger than {limit} bytes")
            if self._server.setup.log_text:
                note.body = (note.body or b"") + message.get("body", b"")
            return message

        try:
            self._check_key(scope["path"], headers)
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > limit:
                raise Refused(413, f"the body is larger than {limit} bytes")
            await self._app(scope, limited, answer)
        except Refused as refused:
            self._server.client.metrics.refused(_REFUSALS[refused.status])
            if not begun:
                await error_response(refused)(scope, receive, answer)
        except Exception as error:
            # Starlette has answered with status 500.
            print(f"error: request {note.id}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            self._log(scope, note)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self._keys or path in _OPEN:
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(token).digest()
        # Every key is compared, and in constant time.
        known = [secrets.compare_digest(digest, key) for key in self._keys]
        if scheme.lower() != b"bearer" or not any(known):
            raise Refused(401, "a valid API key is needed: Authorization: Bearer KEY")

    def _log(self, scope: Any, note: Note) -> None:
        metrics = self._server.client.metrics
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": note.id,
            "method": scope["method"],
            "path": scope["path"],
            "status": note.status,
            "seconds": round(time.monotonic() - note.began, 6),
        }
        if note.exchange is not None:
            answers = note.exchange.answers
            for answer in answers:
                finish = {"tool_calls": "stop"}.get(answer.reason or "abort", answer.reason or "abort")
                ticket = answer.ticket
                now = time.monotonic()
                prefill = None if ticket.first_at is None else ticket.first_at - (ticket.started_at or ticket.queued_at)
                decode = None if ticket.first_at is None else (ticket.last_at or now) - ticket.first_at
                if note.status >= 500:
                    finish = "error"
                metrics.finished(finish, now - ticket.queued_at, ticket.prompt_tokens, answer.tokens, prefill, decode)
            first = min((a.ticket.first_at for a in answers if a.ticket.first_at is not None), default=None)
            line["prompt_tokens"] = note.prompt_tokens
            line["completion_tokens"] = sum(answer.tokens for answer in answers)
            line["first_token_seconds"] = None if first is None else round(first - note.began, 6)
            line["finish"] = [answer.reason or "abort" for answer in answers]
        if note.body is not None:
            line["body"] = note.body.decode(errors="replace")
        if self._server.setup.log_requests and scope["path"] not in ("/health", "/ready", "/metrics"):
            print(json.dumps(line, ensure_ascii=False), file=sys.stderr, flush=True)


def content_security_policy(html: str) -> str:
    """The strictest policy under which the page works: its own script and style by hash, its own server, data: icon."""

    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def application(server: Server) -> Any:
    """The ASGI application."""

    async def refused(request: Request, error: Any) -> Response:
        if error.status in _REFUSALS:
            server.client.metrics.refused(_REFUSALS[error.status])
        return error_response(error)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; the log does

    async def not_found(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        what = "no such path" if status == 404 else "this method is not for this path"
        return error_response(Refused(status, f"{what}: {request.method} {request.url.path}"))

    handlers: dict[Any, Any] = {404: not_found, 405: not_found, Refused: refused, Gone: gone}
    return Gate(Starlette(routes=server.routes(), exception_handlers=handlers), server)
