"""Integers of 4 bits, with a scale and a zero point for each group of 128 columns in a row."""

from __future__ import annotations

from cqil_trt.formats.quantized import QuantizedFormat

GROUP = 128


class Int4(QuantizedFormat):
    codes = "uint8"
    scales = None
    group = GROUP
    zeros = True
    packed = True


FORMAT = Int4()
