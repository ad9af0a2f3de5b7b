"""Readers of checkpoints: safetensors, PyTorch .bin and GGUF as one mapping name → tensor, read slice by slice.

Safetensors are read by offset, not through a memory map: a build touches every byte of a checkpoint once, and mapped
pages would count towards its resident memory. PyTorch's and GGUF's own readers map.
"""

from __future__ import annotations

import json
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cqil_trt.config import Fields, ModelConfig, read_json
from cqil_trt.errors import UserError
from cqil_trt.gguf_files import gguf_parts, open_gguf
from cqil_trt.rope import RopeConfig, yarn_magnitude
from cqil_trt.tokenizer.gguf import GgufTokenizer

Range = tuple[int, int] | None

_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FLOATS = tuple(_SAFETENSORS_DTYPES.values())


class WeightReader(ABC):
    """Tensors by name; only what is asked for is read. `source` names the files in messages."""

    source: str

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor there is."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The type `read` returns for `name`."""

    @abstractmethod
    def read(self, name: str, rows: Range = None, columns: Range = None) -> torch.Tensor:
        """`tensor[rows, columns]` as a tensor of its own; half-open ranges, None for all.

        `columns` needs a matrix. Raises UserError when the file cannot be read.
        """


def cut(tensor: torch.Tensor, rows: Range, columns: Range) -> torch.Tensor:
    """`tensor[rows, columns]`, a view."""
    if rows is not None:
        tensor = tensor[rows[0] : rows[1]]
    return tensor if columns is None else tensor[:, columns[0] : columns[1]]


class SafetensorsReader(WeightReader):
    """One safetensors file. The safetensors library checks the header; tensors are then read by offset."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.source = str(path)
        try:
            with safe_open(path, framework="pt"):
                pass
            self._file = open(path, "rb", buffering=0)
            size = int.from_bytes(self._file.read(8), "little")
            header = json.loads(self._file.read(size))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
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
        except Exception as error:  # torch.load raises whatever its pickle machine trips over
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
        if dtype not in _FLOATS:
            raise UserError(f"{self.source}: {name} has type {dtype}, which is not supported")
        return dtype

    def read(self, name: str, rows: Range = None, columns: Range = None) -> torch.Tensor:
        self.dtype(name)
        return cut(self._tensors[name], rows, columns).clone()


class ShardedReader(WeightReader):
    """A checkpoint of several files, found through its index (model.safetensors.index.json and the like).

    As in transformers the index says which files there are, and the files what they hold; of two files with a tensor
    of one name, the last in alphabetical order counts.
    """

    def __init__(self, index: Path):
        self.source = str(index)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise UserError(f"{index}: {name} is said to be in {file!r:.80}, which is not a file name")
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


class RenamedReader(WeightReader):
    """`base` with some tensors under other names: `stored` maps a name to the one it has in the file."""

    def __init__(self, base: WeightReader, stored: Mapping[str, str]):
        self.source = base.source
        self._base, self._stored = base, stored

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        given = {stored: name for name, stored in self._stored.items()}
        return {given.get(name, name): shape for name, shape in self._base.shapes().items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(self._stored.get(name, name))

    def read(self, name: str, rows: Range = None, columns: Range = None) -> torch.Tensor:
        return self._base.read(self._stored.get(name, name), rows, columns)


_GGUF_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


# What llama.cpp does not read for these architectures, with the values that change nothing. transformers' yarn has
# the same parameters, so that a file with other values means one thing here and another there.
_GGUF_UNREAD = {
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scaling.alpha": 0.0,
}


class GgufReader(WeightReader):
    """A GGUF file, any quantization the gguf package knows; tensors come out as float32 under Hugging Face's names.

    Of a file split into parts, `path` may be any one. The first holds the metadata.
    """

    def __init__(self, path: Path):
        self.source = str(path)
        paths = gguf_parts(path)
        for part in paths:
            if not part.is_file():
                among = "" if len(paths) == 1 else f" (one of the {len(paths)} parts of a split file)"
                raise UserError(f"{part}: no such file{among}")
        self._tensors: dict[str, Any] = {}
        for number, part in enumerate(paths):
            reader = open_gguf(part)
            try:
                if number == 0:
                    self._reader = reader
                    self.architecture = str(self.field("general.architecture"))
                tensors = {self._rename(tensor.name): tensor for tensor in reader.tensors}
                found, count, total = (self._split(reader, key) for key in ("no", "count", "tensors.count"))
            except Exception as error:  # the gguf package raises numpy's and its own errors on a damaged file
                raise UserError(f"{part}: corrupt or truncated GGUF file ({error or type(error).__name__})") from None
            if (found, max(count, 1)) != (number, len(paths)):
                raise UserError(
                    f"{part}: holds part {found + 1} of {max(count, 1)} of a GGUF file, its name says {number + 1} of "
                    f"{len(paths)}: parts keep the names that gguf-split gave them (NAME-00001-of-00003.gguf)"
                )
            twice = sorted(tensors.keys() & self._tensors.keys())
            if twice or total != self._split(self._reader, "tensors.count"):
                raise UserError(f"{part}: belongs to another file than {paths[0].name}: its tensors do not fit")
            self._tensors |= tensors
        if len(paths) > 1 and total != len(self._tensors):
            raise UserError(f"{path}: its parts hold {len(self._tensors)} tensors, they should hold {total}")

    @staticmethod
    def _split(reader: Any, key: str) -> int:
        field = reader.fields.get(f"split.{key}")
        return 0 if field is None else int(field.contents())

    def field(self, key: str, default=None):
        """A metadata value; `{arch}` in `key` stands for the architecture."""
        field = self._reader.fields.get(key.replace("{arch}", str(getattr(self, "architecture", ""))))
        return default if field is None else field.contents()

    def _integer(self, key: str, default: int | None = None, high: int = 2**31 - 1) -> int:
        value = self.field(f"{{arch}}.{key}", default)
        return Fields({key: value if value is None else int(value)}, self.source).integer(key, high=high)

    def _number(self, key: str, default: float) -> float:
        """A metadata value; one of 0 stands for one that is not given, as in llama.cpp."""
        value = float(self.field(f"{{arch}}.{key}", default) or default)
        return default if value == default else Fields({key: value}, self.source).number(key)

    def _rename(self, name: str) -> str:
        base, _, kind = name.rpartition(".")
        if base.startswith("blk."):
            _, index, part = base.split(".", 2)
            if part in _GGUF_LAYER:
                return f"model.layers.{index}.{_GGUF_LAYER[part]}.{kind}"
        return f"{_GGUF_TOP[base]}.{kind}" if base in _GGUF_TOP else name

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, rows: Range = None, columns: Range = None) -> torch.Tensor:
        from gguf import GGML_QUANT_SIZES, dequantize

        entry = self._tensors[name]
        data, first = entry.data, 0
        wanted = slice(None) if rows is None else slice(*rows)
        order = self._row_order(name)
        data = data[wanted if order is None else order[wanted]]
        if columns is not None:
            # What is quantized lies in bytes, whole blocks of elements at a time.
            block, size = GGML_QUANT_SIZES[entry.tensor_type] if data.dtype == np.uint8 else (1, 1)
            first = columns[0] // block * block
            data = data[:, first // block * size : -(-columns[1] // block) * size]
        try:
            values = np.array(dequantize(np.ascontiguousarray(data), entry.tensor_type), dtype=np.float32)
        except Exception as error:
            raise UserError(f"{self.source}: {entry.name} cannot be dequantized ({error})") from None
        if columns is not None:
            values = values[:, columns[0] - first : columns[1] - first]
        return torch.from_numpy(np.ascontiguousarray(values))

    def _row_order(self, name: str) -> np.ndarray | None:
        """Where the rows of a tensor lie in the file; None where in order."""
        if self.architecture != "llama" or not (".q_proj." in name or ".k_proj." in name):
            return None
        # llama.cpp rotates neighbouring pairs, Hugging Face the two halves of a head.
        count = "head_count" if "q_proj" in name else "head_count_kv"
        heads = self._integer(f"attention.{count}", self._integer("attention.head_count"))
        return np.arange(self.shapes()[name][0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def _rope(self, head_dim: int) -> RopeConfig:
        """As llama.cpp reads it: a factor without a type is linear scaling, and rope_freqs divide the frequencies."""
        for key, harmless in _GGUF_UNREAD.items():
            if self._number(key, harmless) != harmless:
                raise UserError(f"{self.source}: {key} other than {harmless:g} is not supported")
        for name in self._tensors:
            if name.startswith("rope_factors_"):
                raise UserError(f"{self.source}: {name} (longrope) is not supported")
        scaling = str(self.field("{arch}.rope.scaling.type", "linear"))
        if scaling not in ("none", "linear", "yarn"):
            raise UserError(f"{self.source}: rope scaling {scaling[:80]!r} is not supported (linear and yarn are)")
        # scale_linear is the key of 2023.
        old = self.field("{arch}.rope.scaling.factor") is None
        factor = self._number("rope.scale_linear" if old else "rope.scaling.factor", 1.0)
        kind = "default" if scaling == "none" or factor == 1 else scaling
        rope = RopeConfig(
            theta=self._number("rope.freq_base", 10000.0),
            kind=kind,
            factor=1.0 if kind == "default" else factor,
            attention_factor=self._number("rope.scaling.attn_factor", 1.0),
            divisors=self._divisors(head_dim),
        )
        if kind != "yarn":
            return rope
        if rope.theta <= 1:
            raise UserError(f"{self.source}: rope.freq_base must be above 1 for yarn, found {rope.theta:g}")
        original = self._integer("rope.scaling.original_context_length", self._integer("context_length"))
        attention = rope.attention_factor * yarn_magnitude(factor)
        return replace(rope, original_max_position=original, attention_factor=attention)

    def _divisors(self, head_dim: int) -> tuple[float, ...]:
        """What rope_freqs.weight says; nothing where it says only ones."""
        name = "rope_freqs.weight"
        if name not in self._tensors:
            return ()
        if self.architecture != "llama":
            raise UserError(f"{self.source}: {name} in a file of architecture {self.architecture} is not supported")
        if self.shapes()[name] != (head_dim // 2,):
            raise UserError(f"{self.source}: {name} has shape {self.shapes()[name]}, heads of {head_dim} need half")
        values = self.read(name).tolist()
        if not all(0 < value < float("inf") for value in values):
            raise UserError(f"{self.source}: {name} holds a value that is not positive and finite")
        return () if set(values) == {1.0} else tuple(values)

    def model_config(self) -> ModelConfig:
        """The model that the file's metadata describes. Raises UserError for one we would compute wrongly."""
        if self.architecture not in _GGUF_ARCHITECTURES:
            known = ", ".join(_GGUF_ARCHITECTURES)
            raise UserError(f"{self.source}: architecture {self.architecture!r:.80} is not supported ({known} are)")
        shapes = self.shapes()
        try:
            heads, hidden = self._integer("attention.head_count"), self._integer("embedding_length")
            head_dim = self._integer("attention.key_length", hidden // heads)
            if self._integer("rope.dimension_count", head_dim) != head_dim:
                raise UserError(f"{self.source}: partial rotary embedding is not supported")
            return ModelConfig(
                architecture=_GGUF_ARCHITECTURES[self.architecture],
                num_layers=self._integer("block_count", high=1000),
                hidden_size=hidden,
                intermediate_size=self._integer("feed_forward_length"),
                num_heads=heads,
                num_kv_heads=self._integer("attention.head_count_kv", heads),
                head_dim=head_dim,
                vocab_size=shapes["model.embed_tokens.weight"][0],
                max_position=self._integer("context_length"),
                rms_norm_eps=float(self.field("{arch}.attention.layer_norm_rms_epsilon")),
                rope=self._rope(head_dim),
                tie_embeddings="lm_head.weight" not in shapes,
                qkv_bias="model.layers.0.self_attn.q_proj.bias" in shapes,
                o_bias="model.layers.0.self_attn.o_proj.bias" in shapes,
                mlp_bias="model.layers.0.mlp.gate_proj.bias" in shapes,
                qk_norm="model.layers.0.self_attn.q_norm.weight" in shapes,
                sliding_window=None,
                dtype="float32",
                eos_token_ids=GgufTokenizer(Path(self.source)).ends(),
            )
        except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
            raise UserError(f"{self.source}: GGUF metadata is incomplete or malformed ({error})") from None


# In the order in which transformers looks for them.
_CHECKPOINTS = {
    "model.safetensors": SafetensorsReader,
    "model.safetensors.index.json": ShardedReader,
    "pytorch_model.bin": TorchReader,
    "pytorch_model.bin.index.json": ShardedReader,
}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Rows compared at a time, of two tables that ought to be one.
_COMPARED_ROWS = 4096


def open_checkpoint(path: Path) -> tuple[ModelConfig, WeightReader]:
    """The model and the weights at `path`: a Hugging Face directory or a .gguf file, read as transformers reads it.

    Names may lack the prefix `model.`, as in a checkpoint of the model without its last projection. Where the
    configuration ties the embedding to that projection, either may be stored alone; two tables that differ are not
    tied, whatever the configuration says.
    """
    if path.suffix == ".gguf":
        reader = GgufReader(path)
        return reader.model_config(), reader
    if not path.is_dir():
        found = "a file that is not .gguf" if path.exists() else "nothing (a model on the hub is named org/name)"
        raise UserError(f"--model {path}: expected a Hugging Face directory or a .gguf file, found {found}")
    model = ModelConfig.from_hugging_face(path / "config.json")
    file, kind = _weights_file(path)
    reader = _with_prefix(kind(file))
    return _tied(model, reader) if model.tie_embeddings else (model, reader)


def _weights_file(path: Path) -> tuple[Path, type[WeightReader]]:
    """The file that holds a directory's weights, or their index, and its reader: the choice of transformers."""
    named = read_json(path / "config.json").get("transformers_weights")
    if named is not None:
        if not isinstance(named, str) or Path(named).name != named or ".safetensors" not in Path(named).suffixes:
            raise UserError(f"{path}/config.json: transformers_weights {named!r:.80} is not a safetensors file's name")
        return path / named, ShardedReader if named.endswith(".index.json") else SafetensorsReader
    for name, kind in _CHECKPOINTS.items():
        if (path / name).is_file():
            return path / name, kind
    raise UserError(f"--model {path}: no weights (looked for {', '.join(_CHECKPOINTS)})")


def _with_prefix(reader: WeightReader) -> WeightReader:
    bare = [name for name in reader.shapes() if name.startswith(("embed_tokens.", "layers.", "norm."))]
    stored = {f"model.{name}": name for name in bare if f"model.{name}" not in reader.shapes()}
    return RenamedReader(reader, stored) if stored else reader


def _tied(model: ModelConfig, reader: WeightReader) -> tuple[ModelConfig, WeightReader]:
    """What a model that says it ties its embedding really has."""
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
        reader.dtype(name)
