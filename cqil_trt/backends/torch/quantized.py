"""Quantized weights on a CPU: products of packed weights where PyTorch has fast ones, else dense matrices.

PyTorch's packed products are fast for bfloat16 only. In the other types they take several times as long as products of
dense matrices (torch 2.13: a scalar loop), so those are made when the engine is loaded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from cqil_trt.formats.quantized import MatrixPart
from cqil_trt.shard import RankPlan
from cqil_trt.weights.quantized import QuantizedMatrix
from cqil_trt.weights.quantized.packing import nibbles

Product = Callable[[torch.Tensor], torch.Tensor]

# Columns of a group, and what must divide the rows, in the packed product of 4 bits.
_PACKED_GROUPS = (32, 64, 128, 256)
_PACKED_ROWS = 16
# What must divide the columns in the one of 8 bits: torch 2.13 reads beyond the end of rows of other lengths.
_PACKED_COLUMNS = 32


def take_quantized(plan: RankPlan, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, Product]:
    """Replaces quantized matrices in `weights` by dense ones of type `dtype`, or takes them out.

    Returns the products of those taken out, by the projection's name: x [..., inputs] → [..., outputs], without bias.
    """
    products = {}
    for tensor in plan.tensors:
        if not isinstance(tensor, MatrixPart) or tensor.part != "weight":
            continue
        name = tensor.name.removesuffix(".weight")
        codes, scales = weights.pop(tensor.name), weights.pop(f"{name}.scale")
        zeros = weights.pop(f"{name}.zero", None)
        width = tensor.inputs
        if tensor.packed:
            codes = nibbles(codes)[:, :width]
        product = _packed_product(tensor, codes, scales, zeros) if dtype == torch.bfloat16 else None
        if product is not None:
            products[name] = product
            continue
        size = tensor.group or width
        matrix = QuantizedMatrix(
            codes=codes,
            bits=4 if tensor.packed else 8,
            scales=scales.float().view(len(codes), -1),
            zeros=zeros,
            rows=1,
            group=(torch.arange(width) + tensor.first) // size,
        )
        weights[tensor.name] = matrix.dequantize().to(dtype)
    return products


def _packed_product(
    tensor: MatrixPart, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> Product | None:
    height, width = codes.shape
    if codes.dtype == torch.int8:
        if width % _PACKED_COLUMNS:
            return None
        codes, ones = codes.contiguous(), torch.ones(height, dtype=torch.bfloat16)
        # Scales of bfloat16 would shift whole channels.
        return _flat(lambda x: (torch._weight_int8pack_mm(x, codes, ones) * scales).to(torch.bfloat16))
    fits = tensor.group in _PACKED_GROUPS and not tensor.first and width % tensor.group == 0
    if zeros is None or not fits or height % _PACKED_ROWS:
        return None
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 1)
    # It computes (code - 8) * scale + offset.
    offsets = ((8 - zeros.float()) * scales.float()).to(torch.bfloat16)
    pairs = torch.stack((scales.to(torch.bfloat16), offsets), dim=-1).transpose(0, 1).contiguous()
    return _flat(lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, tensor.group, pairs))


def _flat(product: Product) -> Product:
    """A product of matrices for inputs of any rank."""
    return lambda x: product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
