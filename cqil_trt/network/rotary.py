"""Rotary position embedding: inverse frequencies, computed at build time, and the tables an engine makes of them.

One unit in the last place of a frequency is 1e-4 radians at position 2,000, so "close" would show in the logits:
frequencies are computed as Hugging Face does (float32, by PyTorch, in its order) and stored in the engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cqil_trt.config import ModelConfig


def inverse_frequencies(model: ModelConfig) -> list[float]:
    """float32 values [head_dim / 2], radians per position. Needs PyTorch.

    Sources: theta^(-2i/D), RoFormer (arXiv 2104.09864); linear scaling, position interpolation (arXiv 2306.15595);
    llama3, the smoothed scaling of the Llama 3.1 release (low and high frequency factors in wavelengths of the
    original context).
    """
    import torch

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
    return frequencies.tolist()


def rotary_tables(frequencies: Sequence[float], length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32 [length, head_dim / 2], of positions 0 … length - 1.

    The angle is rounded to float32 as Hugging Face's is; cosine and sine are then exact but for their own rounding.
    """
    angles = np.arange(length, dtype=np.float32)[:, None] * np.asarray(frequencies, np.float32)
    wide = angles.astype(np.float64)
    return np.cos(wide).astype(np.float32), np.sin(wide).astype(np.float32)
