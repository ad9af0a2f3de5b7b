"""Inverse frequencies of rotary position embedding, computed as Hugging Face does: float32, by PyTorch, in its order.

One unit in the last place of a frequency is 1e-4 radians at position 2,000, so "close" would show in the logits.
"""

from __future__ import annotations

import math

import torch

from cqil_trt.config import ModelConfig


def inverse_frequencies(model: ModelConfig) -> torch.Tensor:
    """float32 [head_dim / 2], radians per position.

    Sources: theta^(-2i/D), RoFormer (arXiv 2104.09864); linear scaling, position interpolation (arXiv 2306.15595);
    llama3, the smoothed scaling of the Llama 3.1 release (low and high frequency factors in wavelengths of the
    original context).
    """
    rope = model.rope
    frequencies = 1.0 / rope.theta ** (torch.arange(0, model.head_dim, 2, dtype=torch.float) / model.head_dim)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        context = rope.original_max_position
        wavelengths = 2 * math.pi / frequencies
        smooth = (context / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
        frequencies = torch.where(
            wavelengths > context / rope.low_freq_factor,
            frequencies / rope.factor,
            torch.where(wavelengths < context / rope.high_freq_factor, frequencies, blended),
        )
    return frequencies


def rotary_tables(model: ModelConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [length, head_dim / 2], of positions 0 … length - 1."""
    angles = torch.arange(length, dtype=torch.float)[:, None] * inverse_frequencies(model)
    return angles.cos(), angles.sin()
