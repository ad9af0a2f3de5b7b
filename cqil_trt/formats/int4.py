"""Integers of 4 bits, with a scale and a zero point for each group of columns in a row: 128, in int4g32 32."""

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
