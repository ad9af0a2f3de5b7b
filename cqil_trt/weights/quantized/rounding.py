"""From floats to the codes of each quantized format."""

from __future__ import annotations

import torch

from cqil_trt import formats
from cqil_trt.weights.quantized.matrix import QuantizedMatrix, even_groups

_LARGEST_INT8, _LARGEST_FP8, _LARGEST_INT4 = 127.0, 448.0, 15
# The parts of a group's range that are tried for 4 bits.
_RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)


def quantize(weight: torch.Tensor, stored: str, dtype: torch.dtype) -> QuantizedMatrix:
    """Whole rows of a matrix, float32, in the format `stored` of an engine of type `dtype`."""
    kind = formats.base(stored)
    if kind == "int8":
        return to_int8(weight)
    if kind == "fp8":
        return to_fp8(weight)
    return to_int4(weight, dtype, formats.load(stored).group)


def to_int8(weight: torch.Tensor) -> QuantizedMatrix:
    """Integers from -127 to 127; the largest magnitude of each row is 127."""
    scales = _scales(weight, _LARGEST_INT8)
    codes = (weight / scales).round_().clamp_(-_LARGEST_INT8, _LARGEST_INT8).to(torch.int8)
    return _by_row(codes, scales)


def to_fp8(weight: torch.Tensor) -> QuantizedMatrix:
    """E4M3; the largest magnitude of each row is 448, the largest number."""
    scales = _scales(weight, _LARGEST_FP8)
    codes = (weight / scales).clamp_(-_LARGEST_FP8, _LARGEST_FP8).to(torch.float8_e4m3fn)
    return _by_row(codes, scales)


def to_int4(weight: torch.Tensor, dtype: torch.dtype, group: int) -> QuantizedMatrix:
    """Integers from 0 to 15 with a scale, of type `dtype`, and a zero point for each `group` columns of a row.

    They span the group's values and 0, or a part of that range if it has the smaller squared error.
    """
    height, width = weight.shape
    rest = -width % group
    # What fills the last group up repeats its last column, which changes no range.
    filled = torch.cat([weight, weight[:, -1:].expand(height, rest)], 1) if rest else weight
    groups = filled.reshape(height, -1, group)
    counted = (torch.arange(groups[0].numel(), device=weight.device) < width).view_as(groups[0])
    low, high = groups.amin(2).clamp_(max=0), groups.amax(2).clamp_(min=0)
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.ones_like(low), torch.zeros_like(low)

    def codes(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return (groups / scale[..., None]).round_().add_(zero[..., None]).clamp_(0, _LARGEST_INT4)

    for part in _RANGES:
        scale = ((high - low) * (part / _LARGEST_INT4)).clamp_(max=torch.finfo(dtype).max).to(dtype).float()
        scale = torch.where(scale > 0, scale, 1.0)
        zero = (-low * part / scale).round_().clamp_(0, _LARGEST_INT4)
        error = codes(scale, zero).sub_(zero[..., None]).mul_(scale[..., None]).sub_(groups).square_()
        error = (error.mul_(counted) if rest else error).sum(2)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return QuantizedMatrix(
        codes=codes(scales, zeros).to(torch.uint8).reshape(height, -1)[:, :width],
        bits=4,
        scales=scales,
        zeros=zeros.to(torch.uint8),
        rows=1,
        group=even_groups(width, group, weight.device),
    )


def _scales(weight: torch.Tensor, largest: float) -> torch.Tensor:
    """The scale [N, 1] with which the largest magnitude of each row becomes `largest`; 1 for a row of zeros."""
    scales = weight.abs().amax(1, keepdim=True) / largest
    return torch.where(scales > 0, scales, 1.0)


def _by_row(codes: torch.Tensor, scales: torch.Tensor) -> QuantizedMatrix:
    width = codes.shape[1]
    group = even_groups(width, width, codes.device)
    return QuantizedMatrix(codes=codes, bits=8, scales=scales, zeros=None, rows=1, group=group)
