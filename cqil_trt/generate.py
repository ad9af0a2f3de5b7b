"""Tokens in, text out: stopping and streaming. Every rank runs this loop in lockstep and gets the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from cqil_trt.errors import UserError
from cqil_trt.sampling import SamplingConfig
from cqil_trt.session import Session
from cqil_trt.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """When to stop: after `max_new_tokens`, at a token in `eos_token_ids`, or before a text in `stop`."""

    max_new_tokens: int = 64
    eos_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens must be at least 1, found {self.max_new_tokens}")
        if any(not text for text in self.stop):
            raise UserError("--stop needs a text that is not empty")


@dataclass(kw_only=True)
class Completion:
    """A completed prompt. `finish_reason`: eos, stop, or length (also when the engine is full)."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""


class _Text:
    """The growing text of a sequence, up to a stop text.

    A stop text may contain the text of control tokens, which is not part of the answer.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self._stream, self._stops = tokenizer.stream(), stops
        self._control_text = tokenizer.vocabulary.special_text
        self._longest = max(map(len, stops), default=0)
        # The text that has not been taken yet, and for each character whether it is shown: "+" or "-".
        self._waiting, self._shown = "", ""
        self._stopped = False

    def add(self, token: int) -> bool:
        """Adds a token; returns whether a stop text is complete."""
        control = self._control_text(token) if self._stops else None
        if control is None:
            self._append(self._stream.add(token), "+")
        else:
            self._append(control, "-")
        found = [
            places[place] for text, places in self._views() for stop in self._stops if (place := text.find(stop)) >= 0
        ]
        if found:
            self._stopped = True
            self._waiting, self._shown = self._waiting[: min(found)], self._shown[: min(found)]
        return self._stopped

    def _append(self, text: str, mark: str) -> None:
        self._waiting += text
        self._shown += mark * len(text)

    def take(self, done: bool) -> str:
        """Takes the text that is certain; all of it if the sequence is `done`."""
        if done and not self._stopped:
            self._append(self._stream.finish(), "+")
        certain = len(self._waiting) if done else self._before_possible_stop()
        text = "".join(c for c, mark in zip(self._waiting[:certain], self._shown) if mark == "+")
        self._waiting, self._shown = self._waiting[certain:], self._shown[certain:]
        return text

    def _views(self) -> list[tuple[str, Sequence[int]]]:
        """The waiting text, whole and as it is shown, each with the positions of its characters."""
        views: list[tuple[str, Sequence[int]]] = [(self._waiting, range(len(self._waiting)))]
        if "-" in self._shown:
            places = [place for place, mark in enumerate(self._shown) if mark == "+"]
            views.append(("".join(self._waiting[place] for place in places), places))
        return views

    def _before_possible_stop(self) -> int:
        """The number of waiting characters that cannot belong to a stop text."""
        certain = len(self._waiting)
        for text, places in self._views():
            for start in range(max(0, len(text) - self._longest + 1), len(text)):
                if any(stop.startswith(text[start:]) for stop in self._stops):
                    certain = min(certain, places[start])
                    break
        return certain


class _Sequence:
    """One prompt in progress, with its own random stream and text, so that batching changes nothing."""

    def __init__(self, prompt: Sequence[int], config: GenerationConfig, tokenizer: Tokenizer | None):
        self.completion = Completion(prompt=list(prompt))
        self.random = np.random.Generator(np.random.Philox(config.sampling.seed))
        self._config = config
        self._text = None if tokenizer is None else _Text(tokenizer, config.stop)

    @property
    def done(self) -> bool:
        return bool(self.completion.finish_reason)

    def add(self, token: int, room: bool) -> str:
        """Adds the next token; returns the text that is now certain. `room`: whether the engine can hold another."""
        completion, config = self.completion, self._config
        completion.tokens.append(token)
        if token in config.eos_token_ids:
            completion.finish_reason = "eos"
        elif self._text is not None and self._text.add(token):
            completion.finish_reason = "stop"
        if not completion.finish_reason and (len(completion.tokens) == config.max_new_tokens or not room):
            completion.finish_reason = "length"
        if self._text is None:
            return ""
        text = self._text.take(self.done)
        completion.text += text
        return text


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    tokenizer: Tokenizer | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """Completes every prompt (token ids), in batches of at most the engine's size.

    `on_text(index, text)` is called as text appears. Without a tokenizer completions carry tokens only, and `stop`
    cannot be used. Raises UserError for a prompt that the engine does not accept.
    """
    if config.stop and tokenizer is None:
        raise UserError("--stop needs a tokenizer, which this engine does not have")
    completions: list[Completion] = []
    size = session.limits.max_batch_size
    for first in range(0, len(prompts), size):
        batch = [_Sequence(prompt, config, tokenizer) for prompt in prompts[first : first + size]]
        for number, text in _run(session, batch, config):
            if on_text is not None and text:
                on_text(first + number, text)
        completions += [sequence.completion for sequence in batch]
    return completions


def _run(session: Session, batch: list[_Sequence], config: GenerationConfig) -> Iterator[tuple[int, str]]:
    """Runs one batch to its end, yielding (sequence, text) as text appears."""
    prompts, limit = [sequence.completion.prompt for sequence in batch], session.limits.max_seq_len
    session.prefill(prompts)
    # The length of the longest possible completion.
    steps = min(config.max_new_tokens, limit + 1 - min(map(len, prompts)))
    uniforms = np.stack([sequence.random.random(steps) for sequence in batch], axis=1)
    for tokens in session.tokens(config.sampling, uniforms, config.eos_token_ids):
        for number, (sequence, token) in enumerate(zip(batch, tokens)):
            if not sequence.done:
                used = len(sequence.completion.prompt) + len(sequence.completion.tokens)
                yield number, sequence.add(int(token), room=used < limit)
        if all(sequence.done for sequence in batch):
            return
