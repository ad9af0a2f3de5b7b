"""Integers of 4 and 8 bits in 32-bit words."""

from __future__ import annotations

import torch


def unpack(words: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """The unsigned integers in int32 words [R, C], the lowest bits first along `axis`, uint8.

    `bits` must be 4 or 8; the axis becomes 32 / bits times as long.
    """
    if axis == 0:
        return unpack(words.T, bits, 1).T
    found = words.contiguous().view(torch.uint8)  # little-endian, as the file
    if bits == 8:
        return found
    return nibbles(found)


def nibbles(found: torch.Tensor) -> torch.Tensor:
    """The unsigned integers of 4 bits in bytes uint8 [R, C], the lower half first, uint8 [R, 2 C]."""
    return torch.stack((found & 15, found >> 4), dim=-1).flatten(1)
