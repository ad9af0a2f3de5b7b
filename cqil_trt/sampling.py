"""Chooses the next token from logits; plugins/sampling.cu does the same on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cqil_trt.errors import UserError

# The most alternatives that `logprobs` may ask for: as in OpenAI's interface, and what the kernel has room for.
MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen.

    First `logit_bias` (token, added value) is added. Then come the penalties of tokens that occurred: a logit above 0
    is divided by `repetition_penalty`, another one multiplied by it, for tokens of the prompt and generated ones;
    `frequency_penalty` times the number of occurrences, and `presence_penalty` once, are subtracted for generated ones.
    If `guided`, a mask then removes tokens. Last are temperature (0 is greedy), top_k (0 keeps every token), top_p and
    min_p, in the order of Hugging Face. `seed`: of the sequence's random numbers. `logprobs`: how many of the likeliest
    tokens to report besides the chosen one; None for no log-probabilities. They are those of the model, before all of
    this, so they do not depend on it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    guided: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature must be a finite number, at least 0, found {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"--top-k must be at least 0, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must be above 0 and at most 1, found {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"--min-p must be from 0 to 1, found {self.min_p}")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"--seed must be from 0 to {2**64 - 1}, found {self.seed}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(f"--repetition-penalty must be a finite number above 0, found {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"--{name.replace('_', '-')} must be a finite number, found {getattr(self, name)}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise UserError(f"logprobs must be from 0 to {MAX_LOGPROBS}, found {self.logprobs}")

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is drawn."""
        return self.penalizes or self.guided or bool(self.logit_bias)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is all that is wanted."""
        return self.temperature == 0 and not self.adjusts and self.logprobs is None


@dataclass(frozen=True)
class Choice:
    """A chosen token. `logprobs`: (token, log-probability) of the chosen one, then of the likeliest; None: unwanted."""

    token: int
    logprobs: tuple[tuple[int, float], ...] | None = None


class Sampler:
    """Chooses the tokens of one sequence, on the host. Tokens depend on its own logits and seed only."""

    def __init__(self, config: SamplingConfig, prompt: Sequence[int], vocabulary: int):
        self.config = config
        self._random = np.random.Generator(np.random.Philox(config.seed))
        self._bias: tuple[np.ndarray, np.ndarray] | None = None
        if config.logit_bias:
            tokens, places = np.unique([token for token, _ in config.logit_bias], return_inverse=True)
            self._bias = tokens, np.zeros(len(tokens), np.float32)
            np.add.at(self._bias[1], places, np.array([value for _, value in config.logit_bias], np.float32))
        self._counts = np.zeros(vocabulary, np.int32) if config.penalizes else None
        self._in_prompt = np.zeros(vocabulary, bool) if config.penalizes else None
        if self._in_prompt is not None:
            self._in_prompt[list(prompt)] = True

    def choose(self, logits: np.ndarray, mask: np.ndarray | None = None) -> Choice:
        """The next token from float32 logits [vocabulary]; `mask`: the tokens allowed, uint32, a bit for each."""
        config = self.config
        draw = self._random.random()
        adjusted = self._adjust(logits, mask) if config.adjusts else logits
        if config.temperature == 0:
            token = int(_ordered(adjusted).argmax())
        else:
            token = sample(adjusted, config, draw)
        if self._counts is not None:
            self._counts[token] += 1
        wanted = None if config.logprobs is None else log_probabilities(logits, token, config.logprobs)
        return Choice(token, wanted)

    def _adjust(self, logits: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        config, x = self.config, logits.astype(np.float32)
        if self._bias is not None:
            tokens, values = self._bias
            x[tokens] += values
        if self._counts is not None and self._in_prompt is not None:
            occurred = self._in_prompt | (self._counts > 0)
            with np.errstate(all="ignore"):  # a tiny penalty makes logits infinite
                r = np.float32(config.repetition_penalty)
                x = np.where(occurred, np.where(x > 0, x / r, x * r), x)
            x -= np.float32(config.frequency_penalty) * self._counts.astype(np.float32)
            x -= np.float32(config.presence_penalty) * (self._counts > 0)
        if mask is not None:
            allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(x)].astype(bool)
            x = np.where(allowed, x, np.float32(-np.inf))
        return x


def sample(logits: np.ndarray, config: SamplingConfig, uniform: float) -> int:
    """One token from float32 logits [vocabulary]: temperature, then top-k, then top-p, then min-p.

    `uniform` is drawn from [0, 1). Tokens are ordered by probability, equal ones by id; top-p keeps the smallest set of
    most likely tokens that reaches it, min-p those with at least min_p times the probability of the likeliest. NaN is
    a token that is not possible; if none is, 0 is chosen.
    """
    logits = _ordered(logits)
    # A stable sort makes ties go to the smaller id, on every rank alike.
    order = np.argsort(-logits, kind="stable")
    if config.top_k:
        order = order[: config.top_k]
    ordered = logits[order].astype(np.float64)
    if ordered[0] == -np.inf:
        return 0
    with np.errstate(all="ignore"):  # infinity less infinity, or divided by a tiny temperature
        weights = np.where(ordered == ordered[0], 1, np.exp((ordered - ordered[0]) / config.temperature))
    cumulative = np.cumsum(weights)
    cumulative /= cumulative[-1]
    keep = int(np.searchsorted(cumulative, config.top_p)) + 1 if config.top_p < 1 else len(order)
    # Weights fall, and those below min_p or 0 (removed tokens) are at the end.
    keep = min(keep, int((weights >= config.min_p).sum()), int((weights > 0).sum()))
    kept = cumulative[:keep]
    return int(order[np.searchsorted(kept, uniform * kept[-1], side="right").clip(max=len(kept) - 1)])


def _ordered(logits: np.ndarray) -> np.ndarray:
    """Logits of which NaN is the smallest, as in plugins/sampling.cu."""
    return np.where(np.isnan(logits), np.float32(-np.inf), logits)


def log_probabilities(logits: np.ndarray, token: int, count: int) -> tuple[tuple[int, float], ...]:
    """(token, log-probability) of `token`, then of the `count` likeliest, equal ones by id. logits [vocabulary]."""
    wide = logits.astype(np.float64)
    top = wide.max()
    total = top + np.log(np.exp(wide - top).sum())
    likeliest: list[int] = []
    if count:
        # All that are at least as likely as the last one wanted, so that equal ones are ordered by id.
        count = min(count, len(wide))
        bound = np.partition(wide, len(wide) - count)[len(wide) - count]
        candidates = np.flatnonzero(wide >= bound)
        likeliest = candidates[np.argsort(-wide[candidates], kind="stable")][:count].tolist()
    return tuple((int(i), float(wide[i] - total)) for i in (token, *likeliest))
