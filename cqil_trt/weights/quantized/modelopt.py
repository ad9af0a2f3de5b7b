"""FP8 of NVIDIA's Model Optimizer: `weight` float8_e4m3fn [N, K] and one `weight_scale`.

The configuration is in config.json, or in hf_quant_config.json below `quantization`.
"""

from __future__ import annotations

from collections.abc import Iterable

from cqil_trt.json_fields import Fields
from cqil_trt.weights.quantized.fp8 import by_row, scaled_matrices
from cqil_trt.weights.quantized.matrix import QuantizedMatrix
from cqil_trt.weights.quantized.scheme import Module, Scheme
from cqil_trt.weights.reader import WeightReader


class ModelOpt(Scheme):
    def __init__(self, config: Fields):
        super().__init__(config)
        inner = config.object("quantization")
        fields = inner if inner.values else config
        algorithm = fields.text("quant_algo").upper()
        if algorithm != "FP8":
            raise self.fail(f"quant_algo {algorithm!r:.40} is not supported (FP8 is)")
        self.ignored = ("scales of activations",)
        cached = fields.text("kv_cache_quant_algo", "FP8").upper()
        self.caches_fp8 = cached == "FP8"
        if not self.caches_fp8:
            self.ignored += (f"the KV cache's {cached:.20}",)

    def describe(self) -> str:
        return "ModelOpt fp8"

    def shapes(self, reader: WeightReader) -> dict[str, tuple[int, int]]:
        return scaled_matrices(reader.shapes(), "weight_scale")

    def parts(self) -> Iterable[str]:
        return "weight", "weight_scale", "input_scale"

    def load(self, module: Module, shape: tuple[int, int]) -> QuantizedMatrix:
        return by_row(module, module.fp8("weight", shape), "weight_scale")


SCHEME = ModelOpt
