"""Which tokens a grammar allows next, by llguidance."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from cqil_trt.errors import UserError
from cqil_trt.tokenizer import Tokenizer

# White space in JSON: none, a space, or a new line with its indentation. Without a bound a model can go on forever with
# nothing but new lines.
_WHITE_SPACE = r"( |\n[ \t]{0,40})?"
# The time that masks of one sequence may take: rank 0 computes them between steps, so that every sequence waits. Those
# of schemas take microseconds, those of a very ambiguous grammar up to 0.1 s.
_SECONDS, _SECONDS_PER_TOKEN = 0.25, 0.005


class _Tokens:
    """A tokenizer in the form that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer, size: int, ends: Sequence[int]):
        vocabulary = tokenizer.vocabulary
        self.eos_token_id = ends[0]
        self.bos_token_id = tokenizer.special("bos_token")
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        for token in range(size):
            known = token < vocabulary.size()
            if not known or vocabulary.special_text(token) is not None:
                self.special_token_ids.append(token)
            self.tokens.append(tokenizer.bytes_of(token) if known else f"<unused {token}>".encode())
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        found = text.decode(errors="replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(found, special=False)


class Grammars:
    """Grammars over an engine's tokens. `size`: of the vocabulary; `ends`: the tokens that end a text."""

    def __init__(self, tokenizer: Tokenizer, size: int, ends: Sequence[int]):
        self._tokenizer, self._size, self._ends = tokenizer, size, list(ends)

    @cached_property
    def _tokens(self) -> LLTokenizer:
        if not self._ends:
            raise UserError("the model has no token that ends a text, which grammars need")
        wrapped = TokenizerWrapper(_Tokens(self._tokenizer, self._size, self._ends))
        return LLTokenizer(wrapped, n_vocab=self._size, eos_token=self._ends)

    def prepare(self) -> None:
        """Does what the first grammar would otherwise wait for."""
        if self._ends:
            _ = self._tokens

    def check(self, grammar: str) -> None:
        """Raises UserError for a grammar that is wrong or too complex."""
        matcher = self.matcher(grammar)
        matcher.mask()  # which fails for a grammar that derives no text
        if matcher.failure:
            raise UserError(matcher.failure)

    def matcher(self, grammar: str) -> GrammarMatcher:
        """Raises UserError for a grammar that is wrong or too complex."""
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(_error(matcher))
        return GrammarMatcher(matcher, self._size)


class GrammarMatcher:
    """The state of one sequence: `scheduler.Matcher`."""

    def __init__(self, matcher: LLMatcher, size: int):
        self._matcher, self._words = matcher, -(-size // 32)
        self._seconds = _SECONDS
        self.failure = ""

    def mask(self) -> np.ndarray:
        """The tokens allowed next, uint32 [ceil(vocabulary / 32)]."""
        began = time.thread_time()
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        mask = np.zeros(self._words, np.uint32)
        mask[: len(found)] = found[: self._words]
        self._check(began)
        return mask

    def advance(self, token: int) -> None:
        began = time.thread_time()
        self._matcher.consume_token(token)
        self._seconds += _SECONDS_PER_TOKEN
        self._check(began)

    def _check(self, began: float) -> None:
        """llguidance does not raise: once it has failed, it allows the end of the text only."""
        self._seconds -= time.thread_time() - began
        if self._matcher.is_error():
            self.failure = f"the grammar: {_error(self._matcher)}"
        elif self._seconds < 0:
            self.failure = "the grammar is too complex: its masks take too long"


def _error(matcher: LLMatcher) -> str:
    """Why it failed, on one line."""
    return " ".join(matcher.get_error().split())[:300]


def json_schema(schema: Mapping[str, Any] | str) -> str:
    """The grammar of JSON texts that a schema allows. Raises UserError for what is no schema."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": _WHITE_SPACE})
    except ValueError as error:
        raise UserError(f"not a JSON schema: {error}") from None


def regex(expression: str) -> str:
    return LLMatcher.grammar_from_regex(expression)


def lark(grammar: str) -> str:
    return LLMatcher.grammar_from_lark(grammar)


def choice(options: Sequence[str]) -> str:
    """One of several texts."""
    return lark("start: " + " | ".join(json.dumps(option) for option in options))
