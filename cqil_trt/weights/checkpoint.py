"""Opens a checkpoint as transformers does: which files, which tensor names, tied or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from cqil_trt import families
from cqil_trt.errors import UserError
from cqil_trt.families.family import EMBEDDING, LM_HEAD
from cqil_trt.json_fields import read_json
from cqil_trt.model import ModelConfig
from cqil_trt.weights.files import SafetensorsReader, ShardedReader, TorchReader
from cqil_trt.weights.gguf import GgufReader
from cqil_trt.weights.quantized import dequantized
from cqil_trt.weights.reader import RenamedReader, WeightReader, is_float

# In the order in which transformers looks for them.
_CHECKPOINTS: Mapping[str, Callable[[Path], WeightReader]] = {
    "model.safetensors": SafetensorsReader,
    "model.safetensors.index.json": ShardedReader,
    "pytorch_model.bin": TorchReader,
    "pytorch_model.bin.index.json": ShardedReader,
}
_EMBEDDING, _HEAD = f"{EMBEDDING}.weight", f"{LM_HEAD}.weight"
# Rows compared at a time of two tables that the configuration ties.
_COMPARED_ROWS = 4096


def open_checkpoint(path: Path) -> tuple[ModelConfig, WeightReader]:
    """The model and the weights at `path`: a Hugging Face directory or a .gguf file, read as transformers reads it.

    Names may lack the prefix `model.`, as in a checkpoint of the model without its last projection, or have
    `language_model`, as in one of a model that reads images too. If the configuration ties the embedding to the last
    projection, either may be stored alone; two tables that differ are not tied, regardless of the configuration.
    Quantized matrices are read as float32.
    """
    if path.suffix == ".gguf":
        gguf = GgufReader(path)
        return gguf.model_config(), gguf
    if not path.is_dir():
        found = "a file that is not .gguf" if path.exists() else "nothing (a model on the hub is named org/name)"
        raise UserError(f"--model {path}: expected a Hugging Face directory or a .gguf file, found {found}")
    model = families.read_config(path / "config.json")
    file, open_file = _weights_file(path)
    reader = dequantized(path, _with_prefix(open_file(file)))
    return _tied(model, reader) if model.tie_embeddings else (model, reader)


def _weights_file(path: Path) -> tuple[Path, Callable[[Path], WeightReader]]:
    """The file of a directory that holds the weights or their index, chosen as in transformers, and its reader."""
    named = read_json(path / "config.json").get("transformers_weights")
    if named is not None:
        if not isinstance(named, str) or Path(named).name != named or ".safetensors" not in Path(named).suffixes:
            raise UserError(f"{path}/config.json: transformers_weights {named!r:.80} is not a safetensors file's name")
        return path / named, ShardedReader if named.endswith(".index.json") else SafetensorsReader
    for name, kind in _CHECKPOINTS.items():
        if (path / name).is_file():
            return path / name, kind
    raise UserError(f"--model {path}: no weights (looked for {', '.join(_CHECKPOINTS)})")


# Prefixes of a text model within a larger one, in files of transformers 4 and 5, and what they are without it.
_WITHIN = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.lm_head.": "lm_head."}


def _with_prefix(reader: WeightReader) -> WeightReader:
    shapes = reader.shapes()
    bare = [name for name in shapes if name.startswith(("embed_tokens.", "layers.", "norm."))]
    stored = {f"model.{name}": name for name in bare}
    for prefix, usual in _WITHIN.items():
        stored |= {usual + name.removeprefix(prefix): name for name in shapes if name.startswith(prefix)}
    stored = {name: source for name, source in stored.items() if name not in shapes}
    return RenamedReader(reader, stored) if stored else reader


def _tied(model: ModelConfig, reader: WeightReader) -> tuple[ModelConfig, WeightReader]:
    """Checks which tables a model that claims a tied embedding really has."""
    shapes = reader.shapes()
    if _HEAD not in shapes:
        return model, reader
    if _EMBEDDING not in shapes:
        return model, RenamedReader(reader, {_EMBEDDING: _HEAD})
    shape = shapes[_HEAD]
    if shapes[_EMBEDDING] != shape or len(shape) != 2:
        return replace(model, tie_embeddings=False), reader
    blocks = ((row, min(row + _COMPARED_ROWS, shape[0])) for row in range(0, shape[0], _COMPARED_ROWS))
    same = all(torch.equal(reader.read(_EMBEDDING, rows).float(), reader.read(_HEAD, rows).float()) for rows in blocks)
    return (model if same else replace(model, tie_embeddings=False)), reader


def check_shapes(reader: WeightReader, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError unless the checkpoint holds every expected tensor in its shape and a float type."""
    found = reader.shapes()
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{reader.source}: no tensor {name}, which config.json asks for")
        if found[name] != shape:
            raise UserError(f"{reader.source}: {name} has shape {found[name]}, config.json asks for {shape}")
        dtype = reader.dtype(name)
        if not is_float(dtype):
            raise UserError(f"{reader.source}: {name} has type {dtype}, but config.json says nothing of a quantization")
