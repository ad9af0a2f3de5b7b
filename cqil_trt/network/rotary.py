"""Inverse frequencies of rotary position embedding, as Hugging Face computes them (float32, same order)."""

from __future__ import annotations

import math

import numpy as np

from cqil_trt.config import ModelConfig


def inverse_frequencies(model: ModelConfig) -> np.ndarray:
    """float32 [head_dim / 2], radians per position.

    Sources: theta^(-2i/D), RoFormer (arXiv 2104.09864); linear scaling, position interpolation (arXiv 2306.15595);
    llama3, the smoothed scaling of the Llama 3.1 release (low and high frequency factors in wavelengths of the
    original context).
    """
    rope = model.rope
    exponents = np.arange(0, model.head_dim, 2, dtype=np.float32) / np.float32(model.head_dim)
    frequencies = (np.float32(1) / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "linear":
        frequencies = frequencies / np.float32(rope.factor)
    elif rope.kind == "llama3":
        wavelengths = np.float32(2 * math.pi) / frequencies
        smooth = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
        long = wavelengths > rope.original_max_position / rope.low_freq_factor
        short = wavelengths < rope.original_max_position / rope.high_freq_factor
        frequencies = np.where(long, frequencies / rope.factor, np.where(short, frequencies, blended))
    return frequencies.astype(np.float32)


def rotary_tables(model: ModelConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32 [length, head_dim / 2], of positions 0 … length - 1."""
    angles = np.arange(length, dtype=np.float32)[:, None] * inverse_frequencies(model)[None, :]
    return np.cos(angles), np.sin(angles)
