"""The HTTP side: OpenAI's API, health, metrics and the chat page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from cqil_trt import __version__
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.scheduler import check_prompt
from cqil_trt.serving import api
from cqil_trt.serving.answers import (
    Exchange,
    Tools,
    conversation_of,
    grammar_of,
    sampling_of,
    tools_of,
)
from cqil_trt.serving.client import EngineClient
from cqil_trt.serving.forms import ChatForm, CompletionForm, Form, read_tokens, usage
from cqil_trt.serving.gate import Note
from cqil_trt.serving.grammar_check import GrammarCheck
from cqil_trt.serving.refusals import Refused, error_body, error_response
from cqil_trt.serving.streams import EventStream, event, read_body, unless_gone
from cqil_trt.tokenizer import Tokenizer

# Bodies of more bytes are rendered and tokenized beside the event loop, which other clients' tokens pass through.
_LONG_BODY = 20_000
_PAGE = Path(__file__).with_name("page.html")
# What comes after it is a model's name.
_ONE_MODEL = "/v1/models/"


class Server:
    """The handlers, and what they share. An ASGI application for HTTP, which raises what a handler raises."""

    def __init__(self, client: EngineClient, engine: Engine, tokenizer: Tokenizer | None, ends: tuple[int, ...]):
        self.client, self.setup = client, client.setup
        self.engine, self.tokenizer, self.ends = engine, tokenizer, ends
        self.limits = engine.limits
        self.created = int(time.time())
        self._page = _PAGE.read_text()
        self._policy = content_security_policy(self._page)
        self.grammars = None if tokenizer is None else GrammarCheck(engine.path)

        get: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/": self.page,
            "/health": self.health,
            "/ready": self.is_ready,
            "/metrics": self.metrics,
            "/version": self.version,
            "/v1/models": self.models,
            _ONE_MODEL: self.one_model,
        }
        post: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/v1/chat/completions": self.chat,
            "/v1/completions": self.complete,
            "/v1/embeddings": self.embeddings,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
        }
        self._handlers = {"GET": get, "HEAD": get, "POST": post}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # Not Starlette's router: with its middlewares it takes an eighth of the time until the engine has the request.
        handler = self._handlers.get(scope["method"], {}).get(_place(scope["path"]), self._not_found)
        response = await handler(Request(scope, receive))
        await response(scope, receive, send)

    async def _not_found(self, request: Request) -> Response:
        method, path = request.method, request.scope["path"]
        if any(_place(path) in handlers for handlers in self._handlers.values()):
            return error_response(Refused(405, f"this method is not for this path: {method} {path}"))
        return error_response(Refused(404, f"no such path: {method} {path}"))

    # State

    async def page(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers={"Content-Security-Policy": self._policy})

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
        if status == "ready":
            return JSONResponse({"status": status})
        return JSONResponse({"status": status}, 503, headers={"Retry-After": "1"})

    async def metrics(self, request: Request) -> Response:
        body, kind = await asyncio.to_thread(self.client.metrics.exposition)
        return Response(body, media_type=kind)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.setup.model_names]})

    async def one_model(self, request: Request) -> Response:
        name = request.scope["path"].removeprefix(_ONE_MODEL).rstrip("/")
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
        given = await read_body(request)
        body = api.parse(api.TokenizeBody, given)
        self._check_model(body.model)
        tokenizer = self._tokenizer()
        try:
            if body.messages is not None:
                ids = await self._apart(given, lambda: tokenizer.chat(conversation_of(body)))
            else:
                ids = await self._apart(given, tokenizer.encode, body.prompt or "", body.add_special_tokens)
        except UserError as error:
            raise Refused(400, str(error), "messages" if body.messages else "prompt") from None
        return JSONResponse({"count": len(ids), "max_model_len": self.limits.max_seq_len, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        given = await read_body(request)
        body = api.parse(api.DetokenizeBody, given)
        self._check_model(body.model)
        size = self.engine.model.vocab_size
        if any(token >= size for token in body.tokens):
            raise Refused(400, f"a token id is not from 0 to {size - 1}", "tokens")
        tokenizer = self._tokenizer()
        text = await self._apart(given, read_tokens, tokenizer, body.tokens)
        return JSONResponse({"prompt": text})

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise Refused(400, "this engine has no tokenizer: give prompts as token ids to /v1/completions", "prompt")
        return self.tokenizer

    async def _apart(self, body: bytes, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.to_thread(work, *arguments) if len(body) > _LONG_BODY else work(*arguments)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.setup.model_names:
            known = ", ".join(self.setup.model_names)
            raise Refused(404, f"the model {name!r:.80} does not exist: this server has {known}", "model")

    # Completions

    async def chat(self, request: Request) -> Response:
        given = await read_body(request)
        body = api.parse(api.ChatBody, given)
        self._check_model(body.model)
        tokenizer = self._tokenizer()
        tools = tools_of(body, tokenizer)
        try:
            prompt = await self._apart(given, lambda: tokenizer.chat(conversation_of(body)))
        except UserError as error:
            variables = "chat_template_kwargs"
            raise Refused(400, str(error), variables if variables in str(error) else "messages") from None
        room = self._room(prompt, body.limit, "messages")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        exchange = await self._ask(body, [prompt], [room], logprobs, tools=tools)
        form = ChatForm(body, self.setup.model_names[0], self.tokenizer)
        return await self._respond(request, body, exchange, form)

    async def complete(self, request: Request) -> Response:
        given = await read_body(request)
        body = api.parse(api.CompletionBody, given)
        self._check_model(body.model)
        prompts: list[list[int]] = []
        for prompt in body.prompts:
            if isinstance(prompt, str):
                try:
                    ids = await self._apart(given, self._tokenizer().encode, prompt)
                except UserError as error:
                    raise Refused(400, str(error), "prompt") from None
            else:
                ids = list(prompt)
            prompts.append(ids)
        if body.limit == 0 and not body.echo:
            raise Refused(400, "0 needs echo to be true", "max_tokens")
        rooms = [self._room(prompt, body.limit, "prompt") for prompt in prompts]
        scored = 0 if body.echo and body.logprobs is not None else None
        exchange = await self._ask(body, prompts, rooms, body.logprobs, scored=scored)
        form = CompletionForm(body, self.setup.model_names[0], self.tokenizer, prompts)
        return await self._respond(request, body, exchange, form)

    def _room(self, prompt: list[int], limit: int | None, field: str) -> int:
        """The most tokens to generate. Raises Refused for a prompt that the engine does not take."""
        longest = self.limits.max_seq_len
        try:
            check_prompt(prompt, "the prompt", self.engine.model.vocab_size, longest)
        except UserError as error:
            raise Refused(400, str(error), field) from None
        room = longest + 1 - len(prompt)
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
        # From here on nothing is awaited: what is checked holds until the requests are sent.
        count = body.n or 1
        self._check_room(count * len(prompts))
        vocabulary = self.engine.model.vocab_size
        samplings = [
            sampling_of(body, logprobs, index, grammar is not None, vocabulary)
            for _ in prompts
            for index in range(count)
        ]
        # Nothing is refused any more: an exchange has timers, which must be stopped.
        exchange = Exchange(client, count, setup.request_seconds, setup.queue_seconds)
        for number, sampling in enumerate(samplings):
            prompt = prompts[number // count]
            exchange.ask(
                self.tokenizer,
                body.stops,
                tools,
                prompt if isinstance(body, api.CompletionBody) else (),
                prompt=tuple(prompt),
                max_new_tokens=rooms[number // count],
                eos_token_ids=() if body.ignore_eos else self.ends,
                sampling=sampling,
                scored=scored,
                grammar=grammar,
            )
        return exchange

    def _check_room(self, count: int) -> None:
        """Raises Refused if there is no engine, or no room for so many more requests."""
        client = self.client
        if client.failure is not None:
            raise Refused(503, f"the engine failed: {client.failure}", retry=5)
        if client.draining:
            client.metrics.refused("draining")
            raise Refused(503, "the server is shutting down", retry=5)
        if client.ready is None:
            raise Refused(503, "the engine is loading", retry=2)
        if client.active + count > client.ready.rows + self.setup.max_waiting:
            client.metrics.refused("queue_full")
            raise Refused(429, f"{client.active} requests are running or waiting, no more are taken", retry=1)

    async def _check_grammar(self, grammar: str, field: str) -> None:
        if self.grammars is None:
            raise Refused(400, "this engine has no tokenizer, which grammars need", field)
        try:
            await self.grammars.check(grammar)
        except UserError as error:
            raise Refused(400, str(error), field) from None

    # Responses

    async def _respond(self, request: Request, body: api.Sampled, exchange: Exchange, form: Form) -> Response:
        note: Note = request.state.note
        note.exchange = exchange
        if body.stream:
            return EventStream(self._stream(exchange, form, body, note), exchange.close)
        try:
            await unless_gone(request, form.take_all(exchange.pieces()))
            return JSONResponse(form.whole(exchange))
        finally:
            exchange.close()

    async def _stream(
        self, exchange: Exchange, form: Form, body: api.Sampled, note: Note
    ) -> AsyncIterator[tuple[bytes, bool]]:
        """For `EventStream`: the events of each piece, of the last one with the end of the stream.

        Raises Refused before the first event, which then is a status of its own; later it is an event.
        """
        options = body.stream_options or api.StreamOptions()
        begun = False
        try:
            async for piece in exchange.pieces():
                events = b"".join(map(event, form.chunks(piece, exchange)))
                over = exchange.finished
                if over:
                    if options.include_usage:
                        events += event(form.envelope([], usage(exchange)))
                    events += b"data: [DONE]\n\n"
                if events:
                    begun = True
                    yield events, not over
        except Refused as refused:
            if not begun:
                raise
            note.failed = True
            yield event(error_body(refused)), False


def _place(path: str) -> str:
    """The path in the table of handlers."""
    path = path.rstrip("/") or "/"
    return _ONE_MODEL if path.startswith(_ONE_MODEL) else path


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
