"""Quantized checkpoints, a file for each format. Their matrices are read as float32, slice by slice.

A scheme is named after the `quant_method` of its configuration; its file defines `SCHEME`. Which modules are quantized
is seen from the tensors that are there, as every format leaves dense weights dense; the configuration says how.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from cqil_trt.errors import UserError
from cqil_trt.families.hugging_face import QUANTIZATION_FILES
from cqil_trt.json_fields import Fields, read_json
from cqil_trt.weights.quantized.matrix import QuantizedMatrix, even_groups
from cqil_trt.weights.quantized.quantizing import QuantizingReader
from cqil_trt.weights.quantized.scheme import QuantizedReader, Scheme
from cqil_trt.weights.reader import WeightReader

__all__ = [
    "QuantizedMatrix",
    "QuantizedReader",
    "QuantizingReader",
    "Scheme",
    "even_groups",
    "dequantized",
    "is_quantized",
    "methods",
]


def methods() -> tuple[str, ...]:
    """The values of `quant_method` that are read."""
    helpers = "matrix", "packing", "quantizing", "rounding", "scheme"
    return tuple(sorted(m.name.replace("_", "-") for m in iter_modules(__path__) if m.name not in helpers))


def is_quantized(directory: Path) -> bool:
    """Whether a checkpoint directory says that its matrices are quantized."""
    return _configuration(directory) is not None


def dequantized(directory: Path, reader: WeightReader) -> WeightReader:
    """The weights of a checkpoint directory with quantized matrices as float32; `reader` itself if none is.

    Raises UserError for a quantization that is not supported, or tensors that do not fit the configuration.
    """
    config = _configuration(directory)
    if config is None:
        return reader
    method = config.text("quant_method").lower()
    if method not in methods():
        raise UserError(
            f"{config.source}: quantization {method!r:.60} is not supported ({', '.join(methods())} and GGUF files are)"
        )
    kind: type[Scheme] = import_module(f"{__name__}.{method.replace('-', '_')}").SCHEME
    return QuantizedReader(reader, kind(config))


def _configuration(directory: Path) -> Fields | None:
    """How the checkpoint is quantized: in config.json, or where older and other tools wrote it."""
    path = directory / "config.json"
    values = read_json(path)
    for name in ("quantization_config", "compression_config"):
        if values.get(name) is not None:
            found = Fields(values, str(path)).object(name)
            return found.with_defaults(quant_method="compressed-tensors") if name == "compression_config" else found
    for name, method in QUANTIZATION_FILES.items():
        path = directory / name
        if path.is_file():
            return Fields(read_json(path), str(path)).with_defaults(quant_method=method)
    return None
