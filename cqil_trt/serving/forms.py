"""The shapes of responses: of a chat, and of completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from cqil_trt import __version__
from cqil_trt.serving import api, tool_calls
from cqil_trt.serving.answers import Exchange, Piece
from cqil_trt.tokenizer import Tokenizer


class Form:
    """The shape of a response: chat or text."""

    kind = ""
    chunk_kind = ""
    prefix = ""

    def __init__(self, body: api.Sampled, model: str, tokenizer: Tokenizer | None):
        self.id = self.prefix + secrets.token_hex(12)
        self.created = int(time.time())
        self.model = body.model or model
        self._options = body.stream_options or api.StreamOptions()
        self._tokenizer = tokenizer
        # Of each choice of a whole response.
        self._texts: dict[int, str] = {}
        self._reasons: dict[int, str] = {}

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
        """Takes in a piece of a whole response."""
        raise NotImplementedError

    def _add(self, piece: Piece, text: str) -> None:
        self._texts[piece.index] = self._texts.get(piece.index, "") + text
        if piece.finish_reason is not None:
            self._reasons[piece.index] = piece.finish_reason

    def chunks(self, piece: Piece, exchange: Exchange) -> list[dict[str, Any]]:
        raise NotImplementedError

    def whole(self, exchange: Exchange) -> dict[str, Any]:
        raise NotImplementedError

    def _name(self, token: int) -> str:
        return str(token) if self._tokenizer is None else self._tokenizer.text_of(token)


class ChatForm(Form):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, body: api.ChatBody, model: str, tokenizer: Tokenizer | None):
        super().__init__(body, model, tokenizer)
        self._logprobs = bool(body.logprobs)
        self._begun: set[int] = set()
        self._calls: dict[int, list[tool_calls.Delta]] = {}
        self._tokens: dict[int, list[dict[str, Any]]] = {}

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
        self._add(piece, piece.text)
        self._tokens.setdefault(piece.index, []).extend(self._content(piece))
        self._calls.setdefault(piece.index, []).extend(piece.calls)

    def whole(self, exchange: Exchange) -> dict[str, Any]:
        choices = []
        for index in range(len(exchange.answers)):
            _, calls = tool_calls.collect(self._calls[index])
            text = self._texts[index]
            message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
            if calls:
                message["tool_calls"] = [
                    {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                    for call in calls
                ]
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


def _call_delta(call: tool_calls.Delta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.id is None:
        return {"index": call.index, "function": function}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, **function}}


class CompletionForm(Form):
    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl-"

    def __init__(self, body: api.CompletionBody, model: str, tokenizer: Tokenizer | None, prompts: list[list[int]]):
        super().__init__(body, model, tokenizer)
        self._body, self._prompts = body, prompts
        self._logprobs: dict[int, dict[str, list[Any]]] = {}
        self._offsets: dict[int, _Offset] = {}

    def _prompt(self, index: int) -> list[int]:
        return self._prompts[index // (self._body.n or 1)]

    def _new(self, piece: Piece) -> tuple[str, dict[str, list[Any]]]:
        """The text and the log-probabilities that a piece adds."""
        index = piece.index
        text = piece.text
        prompt: list[tuple[int, float | None, Any]] = []
        if index not in self._offsets:
            self._offsets[index] = _Offset(self._tokenizer, self._prompt(index))
            if self._body.echo:
                ids = self._prompt(index)
                text = ("" if self._tokenizer is None else read_tokens(self._tokenizer, ids)) + text
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
        self._add(piece, text)
        kept = self._logprobs.setdefault(piece.index, {name: [] for name in logprobs})
        for name, values in logprobs.items():
            kept[name] += values

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

    def __init__(self, tokenizer: Tokenizer | None, prompt: list[int]):
        self._tokenizer, self._prompt = tokenizer, prompt
        self._stream = None if tokenizer is None else tokenizer.stream()
        self._size, self._in_prompt = 0, True

    def of(self, token: int, in_prompt: bool) -> int:
        if self._tokenizer is None or self._stream is None:
            return 0
        if self._in_prompt and not in_prompt:
            self._size += len(self._stream.finish())
            self._stream = self._tokenizer.stream(self._prompt)
        self._in_prompt = in_prompt
        start = self._size
        control = control_text(self._tokenizer, token)
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
    return value if value > -9999.0 else -9999.0  # NaN too


def read_tokens(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of tokens, control tokens included."""
    stream = tokenizer.stream()
    parts = []
    for token in ids:
        control = control_text(tokenizer, token)
        parts.append(stream.add(token) if control is None else control)
    return "".join([*parts, stream.finish()])


def control_text(tokenizer: Tokenizer, token: int) -> str | None:
    """The text of a control token; of a token that only the embedding has, none."""
    return tokenizer.vocabulary.special_text(token) if token < tokenizer.vocabulary.size() else ""
