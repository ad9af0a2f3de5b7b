"""FP8, as DeepSeek's checkpoints and transformers' FineGrainedFP8 store it.

`weight` float8_e4m3fn [N, K]; `weight_scale_inv` [ceil(N / 128), ceil(K / 128)], multiplied in spite of its name, or
one number. Other tools store a `weight_scale` for each matrix, or for each of its rows. Which it is, the tensors tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from cqil_trt.json_fields import Fields
from cqil_trt.weights.quantized.matrix import QuantizedMatrix, even_groups
from cqil_trt.weights.quantized.scheme import Module, Scheme, matrices
from cqil_trt.weights.reader import WeightReader

# Where the configuration does not say, as in transformers.
_BLOCK = 128, 128


class Fp8(Scheme):
    def __init__(self, config: Fields):
        super().__init__(config)
        if config.text("fmt", "e4m3").lower() not in ("e4m3", "float8_e4m3fn"):
            raise self.fail(f"fmt {config.text('fmt')!r:.40} is not supported (e4m3 is)")
        block = config.get("weight_block_size", list(_BLOCK))
        if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
            raise config.fail("weight_block_size", "two numbers above 0")
        self._block = block[0], block[1]
        if config.text("activation_scheme", "dynamic") == "static":
            self.ignored = ("scales of activations",)

    def describe(self) -> str:
        return "fp8"

    def shapes(self, reader: WeightReader) -> dict[str, tuple[int, int]]:
        return scaled_matrices(reader.shapes(), "weight_scale_inv") | scaled_matrices(reader.shapes(), "weight_scale")

    def parts(self) -> Iterable[str]:
        return "weight", "weight_scale_inv", "weight_scale", "input_scale", "activation_scale"

    def load(self, module: Module, shape: tuple[int, int]) -> QuantizedMatrix:
        height, width = shape
        codes = module.fp8("weight", shape)
        if module.has("weight_scale"):
            return by_row(module, codes, "weight_scale")
        if module.shape("weight_scale_inv") in ((), (1,)):
            return by_row(module, codes, "weight_scale_inv")
        rows, columns = self._block
        scales = module.scales("weight_scale_inv", (-(-height // rows), -(-width // columns)))
        group = even_groups(width, columns)
        return QuantizedMatrix(codes=codes, bits=8, scales=scales, zeros=None, rows=rows, group=group)


def scaled_matrices(stored: Mapping[str, tuple[int, ...]], scale: str) -> dict[str, tuple[int, int]]:
    """The modules with a matrix `weight` and a tensor `scale`."""
    return {name: shape for name, shape in matrices(stored, "weight").items() if f"{name}.{scale}" in stored}


def by_row(module: Module, codes: torch.Tensor, scale: str) -> QuantizedMatrix:
    """A matrix with a scale for all of it, or for each row."""
    height, width = codes.shape
    scales = module.scales(scale, (), (1,), (1, 1), (height,), (height, 1)).reshape(-1, 1)
    # One row has its own scale either way.
    rows = 1 if len(scales) == height else height
    return QuantizedMatrix(codes=codes, bits=8, scales=scales, zeros=None, rows=rows, group=even_groups(width, width))


SCHEME = Fp8
