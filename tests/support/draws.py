"""Tokens that are drawn twice with the same random numbers: alone, and in a batch, where float32 rounds otherwise."""

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
