"""Readers of checkpoints: safetensors, PyTorch .bin and GGUF as one mapping name → tensor, read slice by slice."""

from cqil_trt.weights.checkpoint import check_shapes, open_checkpoint
from cqil_trt.weights.files import SafetensorsReader, ShardedReader, TorchReader
from cqil_trt.weights.gguf import GgufReader
from cqil_trt.weights.kv_scales import has_kv_scales, kv_scales
from cqil_trt.weights.reader import Range, RenamedReader, WeightReader, cut, is_float

__all__ = [
    "GgufReader",
    "Range",
    "RenamedReader",
    "SafetensorsReader",
    "ShardedReader",
    "TorchReader",
    "WeightReader",
    "check_shapes",
    "cut",
    "has_kv_scales",
    "is_float",
    "kv_scales",
    "open_checkpoint",
]
