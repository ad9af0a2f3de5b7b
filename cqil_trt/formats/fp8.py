"""Floats of 8 bits (E4M3), one scale for each output channel."""

from __future__ import annotations

from cqil_trt.formats.quantized import QuantizedFormat


class Fp8(QuantizedFormat):
    codes = "float8_e4m3fn"


FORMAT = Fp8()
