"""Rotary position embedding: inverse frequencies, computed at build time, and the tables an engine makes of them.

One unit in the last place of a frequency is 1e-4 radians at position 2,000, so "close" would show in the logits:
frequencies are computed as Hugging Face does (float32, by PyTorch, in its order) and stored in the engine.

With dynamic rope a sequence longer than the original context has frequencies of its length. transformers takes those
of a forward pass's last position: a prompt of L tokens is rotated by f(L), a token that is then decoded at position t
by f(t + 1), and keys in the cache stay as they were. Here, too, a prompt's L is that of the whole prompt, however many
chunks it is taken in, and each sequence's own, whatever else is in the batch.
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
    """float32 values [head_dim / 2], radians per position, up to `model.rope.fixed_context` tokens. Needs PyTorch.

    Sources: theta^(-2i/D), RoFormer (arXiv 2104.09864); linear scaling, position interpolation (arXiv 2306.15595);
    yarn (arXiv 2309.00071); llama3, the smoothed scaling of the Llama 3.1 release (low and high frequency factors in
    wavelengths of the original context); divisors, ggml's frequency factors.
    """
    import torch

    rope = model.rope
    powers = rope.theta ** (torch.arange(0, model.head_dim, 2, dtype=torch.float) / model.head_dim)
    frequencies = 1.0 / powers
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "dynamic":
        frequencies = torch.tensor(dynamic_frequencies(model, None))
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


def dynamic_frequencies(model: ModelConfig, length: int | None) -> list[float]:
    """As `inverse_frequencies`, of dynamic rope for a sequence of `length` tokens; None: within the original context.

    Source: the base stretched with the length, so that the lowest frequency is interpolated and the highest is not
    (dynamic NTK-aware scaling, by bloc97 and emozilla).
    """
    import torch

    rope, dim = model.rope, model.head_dim
    original = rope.original_max_position
    # transformers has the length as a tensor when it is beyond the original context: float32 from there on.
    tokens = original if length is None else torch.tensor(length)
    base = rope.theta * (rope.factor * tokens / original - (rope.factor - 1)) ** (dim / (dim - 2))
    return (1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)).tolist()


def rotary_tables(model: ModelConfig, frequencies: Sequence[float] | np.ndarray, length: int) -> Tables:
    """cos and sin, float32 [length, head_dim / 2], of positions 0 … length - 1, times the attention factor.

    `frequencies`: those of every position [head_dim / 2], or of each one [length, head_dim / 2].
    The angle is rounded to float32 as Hugging Face's is; cosine and sine are then exact up to their own rounding.
    """
    angles = np.arange(length, dtype=np.float32)[:, None] * np.asarray(frequencies, np.float32)
    wide, scale = angles.astype(np.float64), np.float32(model.rope.attention_factor)
    return np.cos(wide).astype(np.float32) * scale, np.sin(wide).astype(np.float32) * scale


def decode_tables(model: ModelConfig, frequencies: Sequence[float], length: int) -> Tables:
    """As `rotary_tables`, with each row for a token decoded at its position: dynamic rope's beyond the context, too."""
    fixed = min(length, model.rope.fixed_context)
    rows = np.tile(np.asarray(frequencies, np.float32), (length, 1))
    for position in range(fixed, length):
        rows[position] = dynamic_frequencies(model, position + 1)
    return rotary_tables(model, rows, length)


def prompt_tables(model: ModelConfig, frequencies: Sequence[float], lengths: Sequence[int]) -> Tables | None:
    """For prompts of these lengths: cos and sin [B, longest, head_dim / 2] as in `rotary_tables`, each prompt's own.

    None where all prompts are within the fixed context, and the rows are those of `decode_tables`.
    """
    fixed, longest = model.rope.fixed_context, max(lengths)
    if longest <= fixed:
        return None
    own = [frequencies if length <= fixed else dynamic_frequencies(model, length) for length in lengths]
    cos, sin = zip(*(rotary_tables(model, each, longest) for each in own))
    return np.stack(cos), np.stack(sin)
