"""Integers of 8 bits, one scale for each output channel."""

from __future__ import annotations

from cqil_trt.formats.quantized import QuantizedFormat


class Int8(QuantizedFormat):
    codes = "int8"


FORMAT = Int8()
