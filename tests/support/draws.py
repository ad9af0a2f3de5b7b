"""Tokens that are chosen twice, alone and in a batch, or by an engine and by its judge, where float32 rounds otherwise.

Of many thousands of tokens of random models, two are so near to each other that this decides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np

from cqil_trt.sampling import Sampler, SamplingConfig

# How tests/support/mpi_worker.py draws.
SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 5}
SAMPLED_CONFIG = SamplingConfig(**SAMPLED)


def possible(config: SamplingConfig, prompt: list[int], tokens: list[int], logits: np.ndarray) -> set[int]:
    """What may follow a prompt and these tokens, by the right logits [vocabulary] but for float32's rounding."""
    sampler, chance = Sampler(config, prompt, len(logits)), np.random.default_rng(0)
    for token in tokens:  # which it counts, and for which it draws
        only = np.full(len(logits), -np.inf, np.float32)
        only[token] = 0
        assert sampler.choose(only).token == token
    rounding = 1e-6 * np.abs(logits).max() * chance.standard_normal((1000, len(logits)))
    return {copy.deepcopy(sampler).choose(noisy.astype(np.float32)).token for noisy in logits + rounding}


def assert_same_draws(
    found: list[int],
    other: list[int],
    prompt: list[int],
    logits_of: Callable[[list[int]], np.ndarray],
    config: SamplingConfig = SAMPLED_CONFIG,
) -> int:
    """They are equal, or diverge where logits within float32's rounding of the right ones give either token.

    `logits_of`: the logits [tokens, vocabulary] after each of these tokens. Returns how many tokens are equal.
    """
    assert len(found) == len(other)
    at = next((i for i, (a, b) in enumerate(zip(found, other)) if a != b), len(found))
    if at < len(found):
        either = possible(config, prompt, found[:at], logits_of([*prompt, *found[:at]])[-1])
        assert {found[at], other[at]} <= either, (at, found, other, either)
    return at


def assert_likeliest(tokens: list[int], logits: np.ndarray) -> None:
    """Each is the likeliest by its row of the right logits [tokens, vocabulary], but for float32's rounding."""
    assert len(tokens) == len(logits)
    short = logits.max(-1) - logits[np.arange(len(tokens)), tokens]
    assert short.max() <= 1e-5 * np.abs(logits).max(), (tokens, short)


def assert_same_choices(
    found: list[int], other: list[int], prompt: list[int], logits_of: Callable[[list[int]], np.ndarray]
) -> None:
    """Greedy tokens are equal, or all are the likeliest. `logits_of` as in `assert_same_draws`."""
    assert len(found) == len(other)
    for tokens in () if found == other else (found, other):
        assert_likeliest(tokens, logits_of(prompt + tokens[:-1])[len(prompt) - 1 :])
