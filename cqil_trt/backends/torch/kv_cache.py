"""A KV cache in FP8 on a CPU: E4M3 codes of keys and values that are divided by a scale.

The codes are kept as bytes: PyTorch has no indexing of float8 tensors on CPUs before 2.10.
"""

from __future__ import annotations

import torch

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max


def fp8_codes(x: torch.Tensor, scale: float) -> torch.Tensor:
    """The codes of x / scale, uint8, rounded to even; what is too large becomes the largest code.

    The division is a product with the reciprocal in float32, as in the kernels (plugins/kv_cache.cuh).
    """
    inverse = 1 / torch.tensor(scale, dtype=torch.float32)
    return (x.float() * inverse).clamp_(-_LARGEST, _LARGEST).to(_FP8).view(torch.uint8)


class Fp8Values:
    """The values of codes in a float type, which holds all of them exactly. A table: PyTorch's conversion is slow."""

    def __init__(self, dtype: torch.dtype):
        self._table = torch.arange(256, dtype=torch.uint8).view(_FP8).to(dtype)

    def __call__(self, codes: torch.Tensor) -> torch.Tensor:
        return self._table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
