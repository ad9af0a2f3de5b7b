"""Readers of safetensors and PyTorch .bin files.

Safetensors are read by offset, not through a memory map: a build touches every byte of a checkpoint once, and mapped
pages would count towards its resident memory. PyTorch's own reader maps its files.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from cqil_trt.errors import UserError
from cqil_trt.json_fields import read_json
from cqil_trt.weights.reader import Range, WeightReader, cut

_SAFETENSORS_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    # Of quantized matrices.
    **{"F8_E4M3": torch.float8_e4m3fn, "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8},
}
_DTYPES = tuple(_SAFETENSORS_DTYPES.values())


class SafetensorsReader(WeightReader):
    """One safetensors file. The safetensors library checks the header; tensors are then read by offset."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.source = str(path)
        try:
            # First, because safetensors reports any file it cannot open as missing.
            self._file = open(path, "rb", buffering=0)
            with safe_open(path, framework="pt"):
                pass
            size = int.from_bytes(self._file.read(8), "little")
            header = json.loads(self._file.read(size))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        except (SafetensorError, ValueError, RecursionError, OverflowError) as error:
            raise UserError(f"{path}: corrupt or truncated safetensors file ({error})") from None
        header.pop("__metadata__", None)
        self._start = 8 + size
        self._header: dict[str, dict] = header
        self._shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        kind = self._header[name]["dtype"]
        if kind not in _SAFETENSORS_DTYPES:
            raise UserError(f"{self.source}: {name} has type {kind}, which is not supported")
        return _SAFETENSORS_DTYPES[kind]

    def read(self, name: str, rows: Range = None, columns: Range = None) -> torch.Tensor:
        dtype, shape = self.dtype(name), self._shapes[name]
        first, last = rows or (0, shape[0] if shape else 1)
        row_bytes = dtype.itemsize
        for size in shape[1:]:
            row_bytes *= size
        data = torch.empty((last - first) * row_bytes, dtype=torch.uint8)
        view, offset = memoryview(data.numpy()), self._start + self._header[name]["data_offsets"][0] + first * row_bytes
        while view:
            try:
                count = os.preadv(self._file.fileno(), [view], offset)
            except OSError as error:
                raise UserError(f"{self.source}: cannot be read ({error.strerror})") from None
            if not count:
                raise UserError(f"{self.source}: truncated while reading {name}")
            view, offset = view[count:], offset + count
        tensor = data.view(dtype).reshape(shape if not shape else (last - first, *shape[1:]))
        return cut(tensor, None, columns)


class TorchReader(WeightReader):
    """One PyTorch .bin file, loaded with weights_only: no code in it runs."""

    def __init__(self, path: Path):
        self.source = str(path)
        try:
            # Files from before PyTorch 1.6 are not archives and cannot be mapped.
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except Exception as error:  # torch.load raises many kinds of exceptions on a damaged file
            reason = str(error).split("\n")[0] or type(error).__name__
            raise UserError(f"{path}: not a PyTorch checkpoint that loads with weights_only ({reason})") from None
        if not isinstance(tensors, dict) or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) and v.layout == torch.strided and v.device.type == "cpu"
            for k, v in tensors.items()
        ):
            raise UserError(f"{path}: expected a dictionary of dense tensors")
        self._tensors: dict[str, torch.Tensor] = tensors

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        dtype = self._tensors[name].dtype
        if dtype not in _DTYPES:
            raise UserError(f"{self.source}: {name} has type {dtype}, which is not supported")
        return dtype

    def read(self, name: str, rows: Range = None, columns: Range = None) -> torch.Tensor:
        self.dtype(name)
        return cut(self._tensors[name], rows, columns).clone()


class ShardedReader(WeightReader):
    """A checkpoint of several files, found through its index (model.safetensors.index.json and the like).

    As in transformers, the index lists the files, and each file says which tensors it holds. If two files hold the same
    tensor, the last one in alphabetical order is used.
    """

    def __init__(self, index: Path):
        self.source = str(index)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise UserError(f"{index}: {name} is mapped to {file!r:.80}, which is not a file name")
        kind = SafetensorsReader if index.name.endswith(".safetensors.index.json") else TorchReader
        self._readers: dict[str, WeightReader] = {}
        for file in sorted(set(weight_map.values())):
            reader = kind(index.parent / file)
            self._readers |= dict.fromkeys(reader.shapes(), reader)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: reader.shapes()[name] for name, reader in self._readers.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._readers[name].dtype(name)

    def read(self, name: str, rows: Range = None, columns: Range = None) -> torch.Tensor:
        return self._readers[name].read(name, rows, columns)
