"""A reader that merges a PEFT LoRA adapter into another reader's tensors, slice by slice.

The arithmetic is that of PEFT's `merge_and_unload` on a loaded adapter, in float32: W + (B @ A) * scaling, which DoRA
rescales (see `merging`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path

import torch

from cqil_trt import families
from cqil_trt.errors import UserError
from cqil_trt.families.family import EMBEDDING
from cqil_trt.families.family import LM_HEAD as HEAD
from cqil_trt.families.layout import checkpoint_shapes
from cqil_trt.merging import Added, Change, Dora, LowRank, MergedTensor, Rows
from cqil_trt.model import ModelConfig
from cqil_trt.peft_config import AdapterConfig
from cqil_trt.weights import Range, SafetensorsReader, TorchReader, WeightReader, is_float
from cqil_trt.weights.quantized import QuantizedMatrix

_PREFIX = "base_model.model."
_TABLES = _TABLE, _PROJECTION = f"{EMBEDDING}.weight", f"{HEAD}.weight"
# The names that old and new releases of PEFT give a module's tensors. The second group is the adapter's name, if the
# key has it.
_FORMS = {
    "A": r"(.+)\.lora_A(?:\.([^.]+))?\.weight",
    "B": r"(.+)\.lora_B(?:\.([^.]+))?\.weight",
    "bias": r"(.+)\.lora_B(?:\.([^.]+))?\.bias",
    "embedding_A": r"(.+)\.lora_embedding_A(?:\.([^.]+))?",
    "embedding_B": r"(.+)\.lora_embedding_B(?:\.([^.]+))?",
    "magnitude": r"(.+)\.lora_magnitude_vector(?:\.((?!weight$)[^.]+))?(?:\.weight)?",
    "tokens": r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.([^.]+))?",
    "unused": r"(.+)\.(?:token_adapter\.trainable_tokens_original|lora_velora_embed)(?:\.([^.]+))?",
}
# The field of adapter_config.json that asks for tensors of a kind.
_FIELDS = {
    **dict.fromkeys(("A", "B", "embedding_A", "embedding_B"), "target_modules"),
    "bias": "lora_bias",
    "magnitude": "use_dora",
    "tokens": "trainable_token_indices",
    "saved": "modules_to_save",
}
_RESIZE = "resize the embeddings of the base model, save it, and build from that"


class LoraReader(WeightReader):
    """`base`, the weights of `model`, with the adapter in `directory` merged.

    The attribute `model` describes the merged weights: an adapter may change the size of the vocabulary, and training
    the embedding and the last projection separately unties them. Only low-rank factors stay in memory; tables that the
    adapter stores whole are also read slice by slice.

    Raises UserError for an adapter of another model (shapes, missing or extra modules), an incomplete one, or a kind
    that is not supported.
    """

    def __init__(self, base: WeightReader, directory: Path, model: ModelConfig):
        if not directory.is_dir():
            raise UserError(f"--lora {directory}: no such directory (an adapter on the hub is named org/name)")
        self._base = base
        self.source = f"{base.source} + {directory}"
        targets = families.of(model).lora_targets
        self._config = AdapterConfig(directory / "adapter_config.json", model.tie_embeddings, targets)
        self._adapter = _adapter_reader(directory)
        self._tied = model.tie_embeddings
        self._names = checkpoint_shapes(replace(model, tie_embeddings=False))
        self._keys = self._sort_keys()
        self._scalings: dict[str, float] = {}
        vocabulary = self._vocabulary(model.vocab_size)
        self._names.update({name: (vocabulary, model.hidden_size) for name in _TABLES})
        self._merged = self._merge()
        self._check_all_taken()
        if not self._merged:
            raise self._fail("holds no tensor to merge")
        if vocabulary > model.vocab_size and (missing := self._not_grown()):
            raise self._fail(
                f"made for a vocabulary of {vocabulary} tokens, but without the {missing} of that size: {_RESIZE}"
            )
        self.model = replace(
            model, vocab_size=vocabulary, tie_embeddings=self._tied and _PROJECTION not in self._merged
        )
        self._shapes = {**base.shapes(), **{name: tensor.shape for name, tensor in self._merged.items()}}

    def _fail(self, message: str) -> UserError:
        return UserError(f"{self._adapter.source}: {message}")

    def _sort_keys(self) -> dict[str, dict[str, str]]:
        """The adapter's keys: kind (of `_FORMS`, "saved" or "base") → module or tensor → key.

        "saved" tensors are those of modules_to_save; "base" ones replace the checkpoint's own.
        """
        found: dict[str, dict[str, str]] = {kind: {} for kind in (*_FORMS, "saved", "base")}
        adapters: set[str] = set()
        for key, shape in self._adapter.shapes().items():
            kind, target, adapter = self._place(key)
            dtype = self._adapter.dtype(key)
            if not is_float(dtype):
                raise self._fail(f"{key[:120]} has type {dtype}, which is not supported")
            if 0 in shape:
                raise self._fail(f"{key[:120]} is empty (a sharded model's weights must be gathered before saving)")
            if kind in _FORMS and f"{target}.weight" not in self._names:
                raise self._fail(f"adapts {target[:120]}, which the model does not have")
            if kind not in _FORMS and (target not in self._names or not key.startswith(_PREFIX)):
                raise self._fail(f"holds {key[:120]}, which the model does not have")
            # A module of modules_to_save may be stored twice: PEFT reads the key without the infix.
            if target not in found[kind] or ".modules_to_save." not in key:
                found[kind][target] = key
            if adapter is not None:
                adapters.add(adapter)
        if len(adapters) > 1:
            raise self._fail(f"holds several adapters ({', '.join(sorted(adapters))[:80]}): save one alone")
        return found

    def _place(self, key: str) -> tuple[str, str, str | None]:
        """A key's kind, the module or tensor that it belongs to, and the adapter's name if the key has it."""
        name = key.removeprefix(_PREFIX)
        for kind, form in _FORMS.items():
            if match := re.fullmatch(form, name):
                return kind, match[1], match[2]
        if ".lora_" in name:
            raise self._fail(f"{key[:120]} is not a LoRA tensor that is merged")
        module, infix, rest = name.partition(".modules_to_save.")
        if infix:
            adapter, _, inner = rest.partition(".")
            if f"{module}.{rest}" in self._names:
                return "saved", f"{module}.{rest}", None
            return "saved", f"{module}.{inner}", adapter
        plain = re.sub(r"\.(token_adapter\.base_layer|base_layer|original_module)\.", ".", name)
        return "saved" if plain == name and self._config.saves(name) else "base", plain, None

    def _vocabulary(self, tokens: int) -> int:
        """The size of the vocabulary, from the tables that the adapter stores, or else the checkpoint's."""
        shapes = self._adapter.shapes()
        keys = [self._keys[kind].get(name) for kind in ("saved", "base") for name in _TABLES]
        sizes = {shapes[key][0]: key for key in keys if key and shapes[key]}
        if len(sizes) > 1:
            raise self._fail(f"holds tables of different sizes: {', '.join(f'{k} {n}' for n, k in sizes.items())}")
        return next(iter(sizes), tokens)

    def _take(self, kind: str, name: str, shape: tuple[int, ...], why: str) -> str:
        """The key of a required tensor, which must have this shape."""
        key = self._keys[kind].pop(name, None)
        if key is None:
            raise self._fail(f"lacks {why}")
        self._check_shape(key, shape)
        return key

    def _check_shape(self, key: str, shape: tuple[int, ...]) -> None:
        found = self._adapter.shapes()[key]
        if found != shape:
            raise self._fail(f"{key[:120]} has shape {found}, the model's is {shape}: an adapter of another model?")

    def _merge(self) -> dict[str, MergedTensor]:
        """Every tensor that differs from the checkpoint's."""
        merged = {}
        shared: tuple[str, ...] = _TABLES if self._tied else ()
        saved = {
            name: self._take("saved", name, shape, f"{name}, of a module that modules_to_save names")
            for name, shape in self._names.items()
            if self._config.saves(name)
        }
        changes = {name: self._changes_of(name) for name in self._names}
        for name, shape in self._names.items():
            if name in saved:
                merged[name] = MergedTensor(reader=self._adapter, key=saved[name], shape=shape, changes=[])
                continue
            # PEFT loads and merges the modules in this order; the two tables of a tied model are the same tensor.
            sources = shared if name in shared else (name,)
            stored = [self._keys["base"][source] for source in sources if source in self._keys["base"]]
            for key in stored:
                self._check_shape(key, shape)
            reader, key = (self._adapter, stored[-1]) if stored else (self._base, sources[0])
            own = [change for source in sources if source not in saved for change in changes[source]]
            if own or (reader, key, shape) != (self._base, name, self._base.shapes().get(name)):
                merged[name] = MergedTensor(reader=reader, key=key, shape=shape, changes=own)
        if self._tied and self._config.saves_tied:
            merged[_TABLE] = merged[_PROJECTION]
        if self._tied and (self._config.saves_tied or not saved.keys() & set(_TABLES)):
            del merged[_PROJECTION]
        return merged

    def _changes_of(self, name: str) -> list[Change]:
        """The adapter's changes to the tensor `name`."""
        module, _, kind = name.rpartition(".")
        targeted = len(self._names[f"{module}.weight"]) == 2 and self._config.targets(module)
        indices = self._config.token_indices(module)
        if kind == "bias":
            wanted = self._config.bias == "all" or (self._config.bias == "lora_only" and targeted)
            if wanted and name not in self._keys["base"] and not self._config.saves(name):
                raise self._fail(f"lacks {name}, which bias: {self._config.bias} of adapter_config.json trains")
            return [self._bias(module)] if targeted and self._config.lora_bias else []
        if targeted:
            return [self._low_rank(module)]
        return [self._rows(module, indices)] if indices else []

    def _low_rank(self, module: str) -> LowRank:
        embedding, shape = module == EMBEDDING, self._names[f"{module}.weight"]
        kinds = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        found = {kind: self._keys[kind].pop(module) for kind in kinds if module in self._keys[kind]}
        if not found:
            raise self._fail(f"lacks {module}, which adapter_config.json targets: an adapter of another model?")
        if len(found) == 1:
            raise self._fail(f"{next(iter(found.values()))[:120]} has no partner")
        a, b = (self._adapter.read(found[kind]).float() for kind in kinds)
        shapes = f"{module[:120]} has A {tuple(a.shape)} and B {tuple(b.shape)}"
        if embedding:  # its weight is (vocabulary, hidden), so that B @ A is the transpose
            a, b = b.T, a.T
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != shape:
            raise self._fail(f"{shapes}, which do not fit the model's {shape}: an adapter of another model?")
        scaling = self._scalings[module] = self._config.scaling(module, a.shape[0])
        if self._config.lora_bias and f"{module}.bias" not in self._names:
            raise self._fail(f"lora_bias is set, but {module} has no bias to merge it into (PEFT cannot either)")
        if not self._config.dora:
            return LowRank(a=a, b=b, scaling=scaling)
        length = shape[1] if embedding else shape[0]
        key = self._take("magnitude", module, (length,), f"{module}.lora_magnitude_vector, which use_dora asks for")
        return Dora(a=a, b=b, scaling=scaling, magnitude=self._adapter.read(key).float(), by_column=embedding)

    def _bias(self, module: str) -> Added:
        why = f"{module}.lora_B.bias, which lora_bias asks for"
        key = self._take("bias", module, self._names[f"{module}.bias"], why)
        return Added(self._adapter.read(key).float() * self._scalings[module])

    def _rows(self, module: str, indices: tuple[int, ...]) -> Rows:
        rows, width = self._names[f"{module}.weight"]
        if max(indices) >= rows:
            raise self._fail(f"trainable_token_indices names token {max(indices)} of {module}'s {rows}: {_RESIZE}")
        why = f"the rows of {module} that trainable_token_indices names"
        values = self._adapter.read(self._take("tokens", module, (len(indices), width), why)).float()
        last = {token: row for row, token in enumerate(indices)}
        return Rows(torch.tensor(list(last), dtype=torch.long), values[list(last.values())])

    def _check_all_taken(self) -> None:
        """Raises UserError for tensors that the adapter's configuration does not name: PEFT would ignore them."""
        if self._tied and self._config.token_indices(EMBEDDING):
            self._keys["tokens"].pop(HEAD, None)  # the same rows again
        for kind, keys in self._keys.items():
            if keys and kind in _FIELDS:
                key = next(iter(keys.values()))
                raise self._fail(f"holds {key[:120]}, which {_FIELDS[kind]} of adapter_config.json does not ask for")

    def _not_grown(self) -> str | None:
        """A table that the adapter lacks in the size of its vocabulary, if any."""
        found = (name for name in _TABLES if name in self._merged and self._merged[name].reader is self._base)
        return next(found, None)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        tensor = self._merged.get(name)
        if tensor is None:
            return self._base.dtype(name)
        return torch.float32 if tensor.changes else tensor.reader.dtype(tensor.key)

    def read(self, name: str, rows: Range = None, columns: Range = None) -> torch.Tensor:
        tensor = self._merged.get(name)
        return self._base.read(name, rows, columns) if tensor is None else tensor.read(rows, columns)

    @property
    def quantized_names(self) -> Set[str]:
        """Without the matrices that the adapter changes."""
        return self._base.quantized_names - self._merged.keys()

    def quantized(self, name: str) -> QuantizedMatrix | None:
        return None if name in self._merged else self._base.quantized(name)

    @property
    def merged(self) -> int:
        """The number of the model's tensors that the adapter changes."""
        return len(self._merged)


def _adapter_reader(directory: Path) -> WeightReader:
    if (directory / "adapter_model.safetensors").exists():
        return SafetensorsReader(directory / "adapter_model.safetensors")
    if (directory / "adapter_model.bin").exists():
        return TorchReader(directory / "adapter_model.bin")
    raise UserError(f"--lora {directory}: no adapter_model.safetensors or adapter_model.bin")
