"""Tokens that are chosen twice, alone and in a batch, or by an engine and by its judge, where float32 rounds otherwise.

Of many thousands of tokens of random models, two are so near to each other that this decides.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cqil_trt.sampling import SamplingConfig, sample

# How tests/support/mpi_worker.py draws.
SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 5}


def assert_same_draws(
    found: list[int], other: list[int], prompt: list[int], logits_of: Callable[[list[int]], np.ndarray]
) -> None:
    """They are equal, or diverge where logits within float32's rounding of the right ones give either token.

    `logits_of`: the logits [tokens, vocabulary] after each of these tokens. A random number is rarely that near to the
    border between two tokens: 4.5e-9 in the one case that was seen.
    """
    assert len(found) == len(other)
    if found == other:
        return
    at = next(i for i, (a, b) in enumerate(zip(found, other)) if a != b)
    logits, config, random = logits_of(prompt + found[:at])[-1], SamplingConfig(**SAMPLED), np.random.default_rng(0)
    uniform = np.random.Generator(np.random.Philox(config.seed)).random(at + 1)[at]
    rounding = 1e-6 * np.abs(logits).max() * random.standard_normal((1000, len(logits)))
    possible = {sample(noisy.astype(np.float32), config, uniform) for noisy in logits + rounding}
    assert {found[at], other[at]} <= possible, (at, found, other, possible)


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
