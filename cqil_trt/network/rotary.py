"""Rotary position embedding: inverse frequencies, computed at build time, and the tables an engine makes of them.

One unit in the last place of a frequency is 1e-4 radians at position 2,000, so "close" would show in the logits:
frequencies are computed as Hugging Face does (float32, by PyTorch, in its order) and stored in the engine.

With dynamic rope and longrope a sequence longer than the original context has frequencies of its length. transformers
takes those of a forward pass's last position: a prompt of L tokens is rotated by f(L), a token that is then decoded at
position t by f(t + 1), and keys in the cache stay as they were. Here, too, a prompt's L is that of the whole prompt,
however many chunks it is taken in, and each sequence's own, whatever else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cqil_trt.model import ModelConfig
from cqil_trt.rope import RopeConfig

if TYPE_CHECKING:
    import torch

Tables = tuple[np.ndarray, np.ndarray]


def inverse_frequencies(model: ModelConfig) -> list[float]:
    """float32 values, radians per position, up to `model.fixed_context` tokens. Needs PyTorch.

    [rotary_dim / 2] of each of the model's rotary embeddings (`ModelConfig.ropes`), one after the other.
    """
    return [frequency for rope in model.ropes for frequency in _frequencies(rope, model.rotary_dim)]


def _frequencies(rope: RopeConfig, dim: int) -> list[float]:
    """Sources: theta^(-2i/D), RoFormer (arXiv 2104.09864); linear scaling, position interpolation (arXiv 2306.15595);
    yarn (arXiv 2309.00071); llama3, the smoothed scaling of the Llama 3.1 release (low and high frequency factors in
    wavelengths of the original context); longrope (arXiv 2402.13753); divisors, ggml's frequency factors.
    """
    import torch

    powers = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)
    frequencies = 1.0 / powers
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind in ("dynamic", "longrope"):
        frequencies = torch.tensor(dynamic_frequencies(rope, dim, None))
    elif rope.kind == "yarn":
        frequencies = _yarn(rope, powers)
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    if rope.divisors:
        frequencies = frequencies / torch.tensor(rope.divisors)
    return frequencies.tolist()


def _llama3(rope: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    import torch

    context = rope.original_max_position
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    return torch.where(
        wavelengths > context / rope.low_freq_factor,
        frequencies / rope.factor,
        torch.where(wavelengths < context / rope.high_freq_factor, frequencies, blended),
    )


def _yarn(rope: RopeConfig, powers: torch.Tensor) -> torch.Tensor:
    """Frequencies that turn more than `beta_fast` times in the original context stay, below `beta_slow` they scale."""
    import torch

    dim = 2 * len(powers)

    def pair(turns: float) -> float:
        """The index of the frequency that turns this many times in the original context."""
        return dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(len(powers), dtype=torch.float) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


def dynamic_frequencies(rope: RopeConfig, dim: int, length: int | None) -> list[float]:
    """As `inverse_frequencies`, of a rope whose frequencies depend on a sequence's length, for `length` tokens.

    None: within the original context. `dim`: rotated elements of a head.

    Sources: dynamic, the base stretched with the length, so that the lowest frequency is interpolated and the highest
    is not (dynamic NTK-aware scaling, by bloc97 and emozilla); longrope, one of two sets of divisors.
    """
    import torch

    original = rope.original_max_position
    exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
    if rope.kind == "longrope":
        factors = rope.short_factors if length is None or length <= original else rope.long_factors
        return (1.0 / (torch.tensor(factors) * rope.theta**exponents)).tolist()
    # transformers has the length as a tensor when it is beyond the original context: float32 from there on.
    tokens = original if length is None else torch.tensor(length)
    base = rope.theta * (rope.factor * tokens / original - (rope.factor - 1)) ** (dim / (dim - 2))
    return (1.0 / base**exponents).tolist()


def rotary_tables(model: ModelConfig, frequencies: Sequence[float] | np.ndarray, length: int, which: int = 0) -> Tables:
    """cos and sin, float32 [length, rotary_dim / 2], of positions 0 … length - 1, times the attention factor.

    `frequencies`: as `inverse_frequencies` gives them; `which`: of the model's rotary embeddings.
    """
    return _tables(model.ropes[which], _own(model, frequencies, which), length)


def _own(model: ModelConfig, frequencies: Sequence[float] | np.ndarray, which: int) -> np.ndarray:
    size = model.rotary_dim // 2
    return np.asarray(frequencies, np.float32)[which * size : (which + 1) * size]


def _tables(rope: RopeConfig, frequencies: np.ndarray | Sequence[float], length: int) -> Tables:
    """As `rotary_tables`. `frequencies`: those of every position [dim / 2], or of each one [length, dim / 2].

    The angle is rounded to float32 as Hugging Face's is; cosine and sine are then exact up to their own rounding.
    """
    angles = np.arange(length, dtype=np.float32)[:, None] * np.asarray(frequencies, np.float32)
    wide, scale = angles.astype(np.float64), np.float32(rope.attention_factor)
    return np.cos(wide).astype(np.float32) * scale, np.sin(wide).astype(np.float32) * scale


def decode_tables(model: ModelConfig, frequencies: Sequence[float], length: int, which: int = 0) -> Tables:
    """As `rotary_tables`, with each row for a token decoded at its position, beyond a fixed context, too."""
    rope, own = model.ropes[which], _own(model, frequencies, which)
    rows = np.tile(own, (length, 1))
    fixed = min(length, rope.fixed_context)
    if rope.kind == "longrope" and fixed < length:
        rows[fixed:] = dynamic_frequencies(rope, model.rotary_dim, length)
    elif fixed < length:
        rows[fixed:] = [dynamic_frequencies(rope, model.rotary_dim, n + 1) for n in range(fixed, length)]
    return _tables(rope, rows, length)


def prompt_tables(
    model: ModelConfig, frequencies: Sequence[float], lengths: Sequence[int], which: int = 0
) -> Tables | None:
    """For prompts of these lengths: cos and sin [B, longest, rotary_dim / 2] as in `rotary_tables`, each prompt's own.

    None where all prompts are within the fixed context, and the rows are those of `decode_tables`.
    """
    rope, longest = model.ropes[which], max(lengths)
    if longest <= rope.fixed_context:
        return None
    within = _own(model, frequencies, which)
    own = [
        within if length <= rope.fixed_context else dynamic_frequencies(rope, model.rotary_dim, length)
        for length in lengths
    ]
    cos, sin = zip(*(_tables(rope, each, longest) for each in own))
    return np.stack(cos), np.stack(sin)
