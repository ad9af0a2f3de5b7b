"""A reader that wraps a reader and merges a PEFT LoRA adapter into what it reads, slice by slice.

The arithmetic is PEFT's `merge_and_unload` in float32: W + (B @ A) * scaling, scaling = alpha / r, or
alpha / sqrt(r) with rsLoRA (arXiv 2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cqil_trt.config import Fields, read_json
from cqil_trt.errors import UserError
from cqil_trt.weights import Range, SafetensorsReader, TorchReader, WeightReader, cut

_PREFIX = "base_model.model."
# Fields of adapter_config.json that do not change what merging computes. Any other that is set names a kind of
# adapter that this reader would merge wrongly.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "task_type", "peft_version",
    "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "megatron_core", "ensure_weight_tying", "eva_config", "corda_config", "loftq_config", "lora_ga_config",
    "runtime_config", "qalora_group_size",
}  # fmt: skip
# Initialisations that leave the base weights alone; the others (PiSSA, OLoRA, LoftQ, CorDA, ...) change them.
_PLAIN_INIT = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Delta:
    """A low-rank change of one weight: rows of `b` (out, r), columns of `a` (r, in)."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


class LoraReader(WeightReader):
    """`base` with the adapter in `directory` merged.

    Only the adapter's own tensors stay in memory. Raises UserError for an adapter of another model (shapes, missing
    or extra modules) and for a kind of adapter that is not merged.
    """

    def __init__(self, base: WeightReader, directory: Path, tie_embeddings: bool = False):
        self._base = base
        self.source = f"{base.source} + {directory}"
        if not directory.is_dir():
            raise UserError(f"--lora {directory}: no such directory (an adapter on the hub is named org/name)")
        path = directory / "adapter_config.json"
        self._name = str(path)
        self._config = Fields(read_json(path), str(path))
        self._check_kind()
        reader = _adapter_reader(directory)
        self._deltas: dict[str, _Delta] = {}
        self._replaced: dict[str, torch.Tensor] = {}
        self._load(reader)
        self._check_modules(reader.source)
        if not self.merged:
            raise UserError(f"{reader.source}: holds no tensor to merge")
        if tie_embeddings and {"model.embed_tokens.weight", "lm_head.weight"} & (
            self._deltas.keys() | self._replaced.keys()
        ):
            raise UserError(f"{reader.source}: changes the embedding of a model that ties it to the last projection")

    def _check_kind(self) -> None:
        kind = self._config.text("peft_type", "LORA")
        if kind != "LORA":
            raise UserError(f"{self._name}: adapters of type {kind[:40]} are not merged (LORA is)")
        for name, value in self._config.values.items():
            # An empty object or list, false and null all leave a feature off.
            if name not in _HARMLESS and value:
                label = "DoRA" if name == "use_dora" else name
                raise UserError(f"{self._name}: {label[:60]} is set: such an adapter is not merged (plain LoRA is)")
        init = self._config.values.get("init_lora_weights")
        if init not in _PLAIN_INIT:
            raise UserError(f"{self._name}: init_lora_weights {init!r:.60} changes the base weights and is not merged")

    def _load(self, reader: WeightReader) -> None:
        """Sorts the adapter's tensors into low-rank changes and whole replacements, checking every shape."""
        shapes, base = reader.shapes(), self._base.shapes()
        for key, shape in shapes.items():
            name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
            module, _, last = name.rpartition(".lora_")
            if not module:
                self._replace(reader, key, name)
                continue
            if last in ("A.weight", "embedding_A"):
                partner = key.replace("lora_A.weight", "lora_B.weight").replace("lora_embedding_A", "lora_embedding_B")
            elif last in ("B.weight", "embedding_B"):
                partner = key.replace("lora_B.weight", "lora_A.weight").replace("lora_embedding_B", "lora_embedding_A")
            else:
                raise UserError(f"{reader.source}: {key[:120]} is not a LoRA tensor that is merged")
            if partner not in shapes:
                raise UserError(f"{reader.source}: {key[:120]} has no partner {partner[:120]}")
            weight = f"{module}.weight"
            if weight not in base:
                raise UserError(f"{reader.source}: adapts {module[:120]}, which the model does not have")
            if last.endswith(("B.weight", "embedding_B")):
                continue
            a, b = reader.read(key).float(), reader.read(partner).float()
            if last == "embedding_A":  # an embedding stores its table as (vocabulary, hidden): B @ A is its transpose
                a, b = b.T, a.T
            expected = base[weight]
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != expected:
                raise UserError(
                    f"{reader.source}: {module[:120]} has A {tuple(shape)} and B {tuple(shapes[partner])}, which do "
                    f"not fit the model's {expected}: an adapter of another model?"
                )
            self._deltas[weight] = _Delta(a, b, self._scaling(module, a.shape[0]))

    def _replace(self, reader: WeightReader, key: str, name: str) -> None:
        base = self._base.shapes()
        if not key.startswith(_PREFIX) or name not in base:
            raise UserError(f"{reader.source}: holds {key[:120]}, which the model does not have")
        if reader.shapes()[key] != base[name]:
            raise UserError(f"{reader.source}: {name} has shape {reader.shapes()[key]}, the model {base[name]}")
        self._replaced[name] = reader.read(key)

    def _pattern(self, field: str, module: str, default: float) -> float:
        """PEFT's rule: the first pattern that matches the end of the module's name, else the default."""
        patterns = self._config.object(field)
        for pattern in patterns.values:
            try:
                matches = re.match(rf"(.*\.)?({pattern})$", module)
            except (re.error, OverflowError, RecursionError) as error:
                raise UserError(f"{patterns.source}: {pattern!r:.60} is not a pattern ({error})") from None
            if matches:
                return patterns.number(pattern)
        return default

    def _scaling(self, module: str, rank: int) -> float:
        expected = self._pattern("rank_pattern", module, self._config.integer("r", 8))
        if rank != expected:
            raise UserError(f"{self._name}: says rank {expected:g} for {module}, whose tensors have rank {rank}")
        alpha = self._pattern("alpha_pattern", module, self._config.number("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if self._config.boolean("use_rslora") else rank)

    def _check_modules(self, source: str) -> None:
        """Every module that the configuration targets must be there: an adapter of a shallower model is not ours."""
        targets = self._config.values.get("target_modules")
        for name, shape in self._base.shapes().items():
            module, _, kind = name.rpartition(".")
            if kind != "weight" or len(shape) != 2 or name in self._deltas or name in self._replaced:
                continue
            if self._targets(module, targets):
                raise UserError(f"{source}: lacks {module}, which adapter_config.json targets: of another model?")

    def _targets(self, module: str, targets: Any) -> bool:
        """PEFT's rule for whether `module` is adapted: by suffix or full name, or by a pattern for the whole name."""
        excluded = self._config.values.get("exclude_modules")
        if excluded and _names(module, excluded):
            return False
        if targets == "all-linear":
            return ".layers." in module
        if not targets or not _names(module, targets):
            return False
        layers = self._config.values.get("layers_to_transform")
        if layers is None or isinstance(targets, str):
            return True
        index = re.match(r"model\.layers\.(\d+)\.", module)
        return index is not None and int(index.group(1)) in (layers if isinstance(layers, list) else [layers])

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._base.shapes()

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._deltas else self._base.dtype(name)

    def read(self, name: str, rows: Range = None, columns: Range = None) -> torch.Tensor:
        replaced = self._replaced.get(name)
        tensor = self._base.read(name, rows, columns) if replaced is None else cut(replaced, rows, columns)
        delta = self._deltas.get(name)
        if delta is None:
            return tensor
        return torch.addmm(tensor.float(), cut(delta.b, rows, None), cut(delta.a, None, columns), alpha=delta.scaling)

    @property
    def merged(self) -> int:
        """How many of the model's tensors the adapter changes."""
        return len(self._deltas) + len(self._replaced)


def _names(module: str, targets: Any) -> bool:
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, module) is not None
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"adapter_config.json: {targets!r:.60} is not a pattern ({error})") from None
    if not isinstance(targets, list):
        raise UserError(f"adapter_config.json: expected a list of module names, found {targets!r:.60}")
    return any(isinstance(t, str) and (module == t or module.endswith(f".{t}")) for t in targets)


def _adapter_reader(directory: Path) -> WeightReader:
    if (directory / "adapter_model.safetensors").exists():
        return SafetensorsReader(directory / "adapter_model.safetensors")
    if (directory / "adapter_model.bin").exists():
        return TorchReader(directory / "adapter_model.bin")
    raise UserError(f"--lora {directory}: no adapter_model.safetensors or adapter_model.bin")
