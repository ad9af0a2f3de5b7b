"""Tokens in, text out: stopping and streaming. Every rank calls `generate` with the same prompts and gets the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from cqil_trt.errors import UserError
from cqil_trt.runner import Runner
from cqil_trt.sampling import SamplingConfig
from cqil_trt.scheduler import Request, check_prompt
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
    """A completed prompt. `finish_reason`: eos, stop, or length (also when the engine is full).

    `steps`: passes that gave tokens. `drafted`, `accepted`: how many tokens were drafted for them, and how many of
    those were chosen.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    steps: int = 0
    drafted: int = 0
    accepted: int = 0


class StoppingText:
    """The growing text of a sequence, up to a stop text. Text that may become one is held back.

    A stop text may contain the text of control tokens, which is not part of the answer.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], visible: Collection[str] = (), after: Sequence[int] = ()
    ):
        """`visible`: the control tokens, as text, that are part of the answer all the same. `after`: the tokens whose
        text it continues."""
        self._stream, self._stops, self._visible = tokenizer.stream(after), stops, visible
        self._control_text = tokenizer.vocabulary.special_text
        self._longest = max(map(len, stops), default=0)
        # The text that has not been taken yet, and for each character whether it is shown: "+" or "-".
        self._waiting, self._shown = "", ""
        self._stopped = False

    def feed(self, tokens: Sequence[int], finish_reason: str) -> tuple[int, str]:
        """Adds tokens up to a stop text; returns how many that were, and why the sequence ends: stop, or as given.

        With eos, the last token has no text.
        """
        for number, token in enumerate(tokens, 1):
            if not (finish_reason == "eos" and number == len(tokens)) and self._add(token):
                return number, "stop"
        return len(tokens), finish_reason

    def _add(self, token: int) -> bool:
        """Adds a token; returns whether a stop text is complete."""
        control = self._control_text(token) if self._stops or self._visible else None
        if control is not None and control in self._visible:
            self._append(control, "+")
        elif control is None:
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
    """One prompt in progress."""

    def __init__(self, prompt: Sequence[int], config: GenerationConfig, tokenizer: Tokenizer | None):
        self.completion = Completion(prompt=list(prompt))
        self._text = None if tokenizer is None else StoppingText(tokenizer, config.stop)

    def add(self, tokens: Sequence[int], finish_reason: str) -> str:
        """Adds the next tokens; returns the text that is now certain. `finish_reason`: "" while there are more."""
        completion = self.completion
        if self._text is None:
            completion.tokens += tokens
            completion.finish_reason = finish_reason
            return ""
        count, completion.finish_reason = self._text.feed(tokens, finish_reason)
        completion.tokens += tokens[:count]
        text = self._text.take(bool(completion.finish_reason))
        completion.text += text
        return text


def generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    tokenizer: Tokenizer | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """Completes every prompt (token ids). Raises UserError for one that the engine does not accept.

    `on_text(index, text)` is called as text appears. Without a tokenizer completions carry tokens only, and `stop`
    cannot be used: UserError.
    """
    if config.stop and tokenizer is None:
        raise UserError("--stop needs a tokenizer, which this engine does not have")
    session = runner.session
    for number, prompt in enumerate(prompts, 1):  # a session may hold less than its engine says
        check_prompt(prompt, f"prompt {number}", session.vocab_size, session.limits.max_seq_len)
    sequences = [_Sequence(prompt, config, tokenizer) for prompt in prompts]
    running: dict[int, int] = {}
    for index, prompt in enumerate(prompts):
        request = Request(
            prompt=tuple(prompt),
            max_new_tokens=config.max_new_tokens,
            eos_token_ids=config.eos_token_ids,
            sampling=config.sampling,
        )
        running[runner.scheduler.add(request)] = index
    while running:
        for event in runner.turn():
            if event.number not in running:
                continue
            index = running[event.number]
            sequence = sequences[index]
            sequence.completion.steps += bool(event.choices)
            sequence.completion.drafted += event.drafted
            sequence.completion.accepted += event.accepted
            text = sequence.add([choice.token for choice in event.choices], event.finish_reason)
            if on_text is not None and text:
                on_text(index, text)
            if sequence.completion.finish_reason:
                del running[event.number]
                runner.scheduler.abort(event.number)
    return [sequence.completion for sequence in sequences]
