"""Reader of GGUF files: their tensors under the names of a Hugging Face checkpoint, and the model they describe."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cqil_trt import families
from cqil_trt.errors import UserError
from cqil_trt.families.family import GGUF_TOP, Family, Gguf
from cqil_trt.gguf_files import gguf_parts, open_gguf
from cqil_trt.json_fields import Fields
from cqil_trt.model import ModelConfig
from cqil_trt.rope import RopeConfig, yarn_magnitude
from cqil_trt.tokenizer.gguf import GgufTokenizer
from cqil_trt.weights.quantized.matrix import QuantizedMatrix, even_groups, hold
from cqil_trt.weights.reader import Range, WeightReader

# The types that are not quantized.
_FLOATS = ("F64", "F32", "F16", "BF16")
# The type whose blocks are codes of 4 bits, (code - 8) * scale, and the elements of a block. Others have offsets that
# are no multiples of the scale, or scales of scales.
_CODES, _BLOCK = "Q4_0", 32
# Keys that llama.cpp does not read for these architectures, with the values that change nothing. transformers' yarn has
# the same parameters, so a file with other values would mean different things in the two.
_GGUF_UNREAD = {
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scaling.alpha": 0.0,
}


class GgufReader(WeightReader):
    """A GGUF file in any quantization that the gguf package knows, read as float32 under Hugging Face's names.

    Matrices of type Q4_0 are codes too (`quantized`).

    `path` may be any part of a split file. The first part holds the metadata.
    """

    def __init__(self, path: Path):
        self.source = str(path)
        paths = gguf_parts(path)
        for part in paths:
            if not part.is_file():
                among = "" if len(paths) == 1 else f" (one of the {len(paths)} parts of a split file)"
                raise UserError(f"{part}: no such file{among}")
        self._tensors: dict[str, Any] = {}
        self._held: dict[str, QuantizedMatrix] = {}
        for number, part in enumerate(paths):
            reader = open_gguf(part)
            try:
                if number == 0:
                    self._reader = reader
                    self.architecture = str(self.field("general.architecture"))
                    self._family = families.of_gguf(self.architecture, reader.fields.keys())
                    self._names = {} if self._family is None else dict(self._family.gguf_names())
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
        self._coded = frozenset(name for name, t in self._tensors.items() if t.tensor_type.name == _CODES)
        if len(paths) > 1 and total != len(self._tensors):
            raise UserError(f"{path}: its parts hold {len(self._tensors)} tensors, they should hold {total}")
        kinds = [t.tensor_type.name for t in self._tensors.values() if t.tensor_type.name not in _FLOATS]
        if kinds:
            self.note = f"{len(kinds)} tensors are quantized ({', '.join(sorted(set(kinds)))})"

    @staticmethod
    def _split(reader: Any, key: str) -> int:
        field = reader.fields.get(f"split.{key}")
        return 0 if field is None else int(field.contents())

    @property
    def _gguf(self) -> Gguf | None:
        return None if self._family is None else self._family.gguf

    def field(self, key: str, default: Any = None) -> Any:
        """A metadata value; `{arch}` in `key` is replaced by the architecture."""
        field = self._reader.fields.get(key.replace("{arch}", str(getattr(self, "architecture", ""))))
        return default if field is None else field.contents()

    def _integer(self, key: str, default: int | None = None, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.field(f"{{arch}}.{key}", default)
        return Fields({key: value if value is None else int(value)}, self.source).integer(key, low=low, high=high)

    def _number(self, key: str, default: float) -> float:
        """A metadata value; 0 means that it is not given, as in llama.cpp."""
        value = float(self.field(f"{{arch}}.{key}", default) or default)
        return default if value == default else Fields({key: value}, self.source).number(key)

    def _rename(self, name: str) -> str:
        base, _, kind = name.rpartition(".")
        if base.startswith("blk."):
            _, index, part = base.split(".", 2)
            if part in self._names:
                return f"model.layers.{index}.{self._names[part]}.{kind}"
        return f"{GGUF_TOP[base]}.{kind}" if base in GGUF_TOP else name

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, rows: Range = None, columns: Range = None) -> torch.Tensor:
        from gguf import GGML_QUANT_SIZES, dequantize

        entry = self._tensors[name]
        data, first = self._rows(name, slice(None) if rows is None else slice(*rows)), 0
        if columns is not None:
            # Quantized data are bytes, in whole blocks of elements.
            block, size = GGML_QUANT_SIZES[entry.tensor_type] if data.dtype == np.uint8 else (1, 1)
            first = columns[0] // block * block
            data = data[:, first // block * size : -(-columns[1] // block) * size]
        try:
            values = np.array(dequantize(np.ascontiguousarray(data), entry.tensor_type), dtype=np.float32)
        except Exception as error:
            raise UserError(f"{self.source}: {entry.name} cannot be dequantized ({error})") from None
        if self._family is not None and self._family.offset_norms and name.endswith("norm.weight"):
            values = values - np.float32(1)  # llama.cpp's norms multiply by the weight itself
        if columns is not None:
            values = values[:, columns[0] - first : columns[1] - first]
        return torch.from_numpy(np.ascontiguousarray(values))

    def _rows(self, name: str, wanted: slice) -> np.ndarray:
        """Rows of a tensor as they are stored."""
        order = self._row_order(name)
        return self._tensors[name].data[wanted if order is None else order[wanted]]

    @property
    def quantized_names(self) -> Set[str]:
        return self._coded

    def quantized(self, name: str) -> QuantizedMatrix | None:
        return hold(self._held, name, lambda: self._codes(name)) if name in self._coded else None

    def _codes(self, name: str) -> QuantizedMatrix:
        """A matrix of blocks: a float16, then 16 bytes with the first half of the codes in their lower bits."""
        height, width = self.shapes()[name]
        data = np.ascontiguousarray(self._rows(name, slice(None))).reshape(height, width // _BLOCK, -1)
        codes = np.concatenate((data[:, :, 2:] & 15, data[:, :, 2:] >> 4), axis=2).reshape(height, width)
        scales = np.ascontiguousarray(data[:, :, :2]).view("<f2")[:, :, 0].astype(np.float32)
        return QuantizedMatrix(
            codes=torch.from_numpy(codes),
            bits=4,
            scales=torch.from_numpy(scales),
            zeros=torch.full(scales.shape, 8, dtype=torch.uint8),
            rows=1,
            group=even_groups(width, _BLOCK),
        )

    def _row_order(self, name: str) -> np.ndarray | None:
        """The row in the file of each row of a tensor; None if they are in order."""
        if self._family is None or self._gguf is None or not self._gguf.interleaved:
            return None
        part = next((part for part in ("q", "k") if f".{self._family.layer[part]}." in name), None)
        if part is None:
            return None
        # llama.cpp rotates neighbouring pairs, Hugging Face the two halves of a head.
        count = "head_count" if part == "q" else "head_count_kv"
        heads = self._integer(f"attention.{count}", self._integer("attention.head_count"))
        return np.arange(self.shapes()[name][0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def _rope(self, rotary_dim: int) -> RopeConfig:
        """As llama.cpp reads it: a factor without a type is linear scaling, and rope_freqs divide the frequencies."""
        for key, harmless in _GGUF_UNREAD.items():
            if self._number(key, harmless) != harmless:
                raise UserError(f"{self.source}: {key} other than {harmless:g} is not supported")
        if any(name.startswith("rope_factors_") for name in self._tensors):
            return self._longrope(rotary_dim)
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
            divisors=self._divisors("rope_freqs.weight", rotary_dim),
        )
        if kind != "yarn":
            return rope
        if rope.theta <= 1:
            raise UserError(f"{self.source}: rope.freq_base must be above 1 for yarn, found {rope.theta:g}")
        original = self._integer("rope.scaling.original_context_length", self._integer("context_length"))
        attention = rope.attention_factor * yarn_magnitude(factor)
        return replace(rope, original_max_position=original, attention_factor=attention)

    def _longrope(self, rotary_dim: int) -> RopeConfig:
        """llama.cpp takes the long factors for a context beyond the original one, transformers for such a sequence."""
        original = self._integer("rope.scaling.original_context_length", self._integer("context_length"))
        return RopeConfig(
            theta=self._number("rope.freq_base", 10000.0),
            kind="longrope",
            factor=self._integer("context_length") / original,
            original_max_position=original,
            attention_factor=self._number("rope.scaling.attn_factor", 1.0),
            short_factors=self._factors("rope_factors_short.weight", rotary_dim),
            long_factors=self._factors("rope_factors_long.weight", rotary_dim),
        )

    def _divisors(self, name: str, rotary_dim: int) -> tuple[float, ...]:
        """The values of rope_freqs.weight; empty if all are 1."""
        values = self._factors(name, rotary_dim) if name in self._tensors else ()
        return () if set(values) <= {1.0} else values

    def _factors(self, name: str, rotary_dim: int) -> tuple[float, ...]:
        """What a tensor divides frequencies by."""
        gguf, longrope = self._gguf, name.startswith("rope_factors_")
        if gguf is None or not (gguf.longrope if longrope else gguf.frequency_factors):
            what = f"{name} (longrope)" if longrope else name
            raise UserError(f"{self.source}: {what} in a file of architecture {self.architecture} is not supported")
        if self.shapes().get(name) != (rotary_dim // 2,):
            raise UserError(
                f"{self.source}: {name} has shape {self.shapes().get(name)}, heads of {rotary_dim} need half"
            )
        values = self.read(name).tolist()
        if not all(0 < value < float("inf") for value in values):
            raise UserError(f"{self.source}: {name} holds a value that is not positive and finite")
        return tuple(values)

    def _windows(self, gguf: Gguf, layers: int) -> tuple[int | None, tuple[int, ...]]:
        """The window, and the layers that have it.

        llama.cpp ignores some windows that transformers applies; both agree up to the window's length.
        """
        if self._family is None or self._family.sliding_window != "always":
            return None, ()
        window = self._integer("attention.sliding_window", gguf.defaults.get("attention.sliding_window", 0), low=0)
        listed = self.field("{arch}.attention.sliding_window_pattern")
        pattern = gguf.window_pattern if listed is None or isinstance(listed, list) else int(listed)
        if isinstance(listed, list):
            windowed = tuple(i for i in range(layers) if listed[i])
        else:
            windowed = tuple(i for i in range(layers) if not pattern or (i + 1) % pattern)
        return (window, windowed) if window and windowed else (None, ())

    def _computation(self, gguf: Gguf, family: Family, layers: int, rope: RopeConfig) -> dict[str, Any]:
        """The fields of `ModelConfig` for what only some families have."""
        window, windowed = self._windows(gguf, layers)
        heads, hidden = self._integer("attention.head_count"), self._integer("embedding_length")
        local = None
        if family.local_theta:
            local = RopeConfig(theta=self._number("rope.freq_base_swa", gguf.local_theta or rope.theta))
        known = {number.name: self.field(f"{{arch}}.{number.name}") for number in gguf.numbers.values()}
        given = {name: float(value) for name, value in known.items() if value}  # 0: not given, as in llama.cpp
        metadata = Fields({**gguf.defaults, **given}, self.source)
        defaults: dict[str, Any] = {field.name: field.default for field in fields(ModelConfig)}
        found: dict[str, Any] = {name: n.read(metadata, defaults[name]) for name, n in gguf.numbers.items()}
        if "query_scale" in family.numbers and "query_scale" not in gguf.numbers:
            head_dim = self._integer("attention.key_length", hidden // heads)
            found["query_scale"] = (hidden / heads if layers in gguf.hidden_query_scale else head_dim) ** -0.5
        interval = gguf.no_rope_interval
        return {
            **family.features(hidden),
            **found,
            "sliding_window": window,
            "windowed": windowed,
            "unrotated": tuple(i for i in range(layers) if interval and (i + 1) % interval == 0),
            "local_rope": local,
            "activation": next(iter(family.activations.values())),
        }

    def model_config(self) -> ModelConfig:
        """The model that the file's metadata describes. Raises UserError for one that is not supported."""
        if self._family is None:
            known = ", ".join(families.gguf_architectures())
            raise UserError(f"{self.source}: architecture {self.architecture!r:.80} is not supported ({known} are)")
        shapes, layer, gguf = self.shapes(), self._family.layer, self._family.gguf
        try:
            heads, hidden = self._integer("attention.head_count"), self._integer("embedding_length")
            layers = self._integer("block_count", high=1000)
            head_dim = self._integer("attention.key_length", hidden // heads)
            rotary_dim = self._integer("rope.dimension_count", head_dim)
            if rotary_dim != head_dim and not self._family.partial_rotary:
                raise UserError(f"{self.source}: partial rotary embedding is not supported")
            rope = self._rope(rotary_dim)
            computation = self._computation(gguf or Gguf(architecture=""), self._family, layers, rope)
            computation["qk_norm"] = f"model.layers.0.{layer['q_norm']}.weight" in shapes
            return ModelConfig(
                architecture=self._family.architecture,
                num_layers=layers,
                hidden_size=hidden,
                intermediate_size=self._integer("feed_forward_length"),
                num_heads=heads,
                num_kv_heads=self._integer("attention.head_count_kv", heads),
                head_dim=head_dim,
                rotated_dim=None if rotary_dim == head_dim else rotary_dim,
                vocab_size=shapes["model.embed_tokens.weight"][0],
                max_position=self._integer("context_length"),
                rms_norm_eps=float(self.field("{arch}.attention.layer_norm_rms_epsilon")),
                rope=rope,
                tie_embeddings="lm_head.weight" not in shapes,
                qkv_bias=f"model.layers.0.{layer['q']}.bias" in shapes,
                o_bias=f"model.layers.0.{layer['o']}.bias" in shapes,
                mlp_bias=f"model.layers.0.{layer['gate']}.bias" in shapes,
                dtype="float32",
                eos_token_ids=GgufTokenizer(Path(self.source)).ends(),
                **computation,
            )
        except (TypeError, ValueError, LookupError, ZeroDivisionError) as error:
            raise UserError(f"{self.source}: GGUF metadata is incomplete or malformed ({error})") from None
