"""adapter_config.json: the kinds of LoRA adapters that are supported, and PEFT's rules for which module gets what.

The rules are those of PEFT 0.21: `check_target_module_exists`, `get_pattern_key`, `set_additional_trainable_modules`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cqil_trt.errors import UserError
from cqil_trt.families.family import EMBEDDING
from cqil_trt.families.family import LM_HEAD as HEAD
from cqil_trt.json_fields import Fields, read_json

# Fields that this module reads, or that do not change what merging computes.
_KNOWN = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "task_type", "peft_version",
    "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "megatron_core", "ensure_weight_tying", "eva_config", "corda_config", "loftq_config", "lora_ga_config",
    "runtime_config", "qalora_group_size", "use_dora", "lora_bias", "trainable_token_indices", "velora_config",
}  # fmt: skip
_REFUSED = {
    "layer_replication": "the adapted model repeats layers of the checkpoint",
    "target_parameters": "it adapts parameters of modules that this model does not have",
    "alora_invocation_tokens": "aLoRA changes only the tokens after an invocation, which no merged weight can",
    "use_qalora": "QALoRA adapts pooled inputs of quantized layers",
    "kasa_config": "KaSA truncates the base weights",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "arrow_config": "Arrow chooses among adapters token by token",
    "monteclora_config": "MonteCLoRA samples its weights",
    "megatron_config": "it is made for Megatron's parallel layers",
}
# Initialisations that leave the base weights unchanged, and the prefixes of those that do not.
_PLAIN_INIT = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_CHANGING_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterConfig:
    """The configuration of a LoRA adapter. `tied`: whether the model's embedding and last projection are tied.

    `default_targets`: the modules that PEFT adapts in such a model by default.

    Modules are named as in the checkpoint, e.g. `model.layers.0.self_attn.q_proj`. Raises UserError for a kind of
    adapter that is not supported, with the reason.
    """

    def __init__(self, path: Path, tied: bool, default_targets: Sequence[str]):
        self.source = str(path)
        self._fields = fields = Fields(read_json(path), str(path))
        self._check_kind()
        self.dora = fields.boolean("use_dora")
        self.lora_bias = fields.boolean("lora_bias")
        self.bias = fields.text("bias", "none")
        if self.bias not in ("none", "all", "lora_only"):
            raise fields.fail("bias", "none, all or lora_only")
        self._targets = fields.get("target_modules", list(default_targets))
        self._excluded = fields.get("exclude_modules")
        self._saved = self._list("modules_to_save")
        for names in (self._targets, self._excluded or []):
            if not isinstance(names, (str, list)):
                raise UserError(f"{self.source}: expected a list of module names or a pattern, found {names!r:.60}")
        tying = tied and fields.boolean("ensure_weight_tying")
        self.saves_tied = tying and any(_is_vocabulary(name) for name in self._saved)
        if self.saves_tied:  # PEFT then saves the embedding, and makes the last projection the same tensor
            self._saved = [*self._saved, EMBEDDING, HEAD]
        self._targets_tied = tying and not self.saves_tied and self._targets_vocabulary()
        self._tokens = self._token_indices(tied)

    def _check_kind(self) -> None:
        values, kind = self._fields.values, self._fields.text("peft_type", "LORA")
        if kind != "LORA":
            raise UserError(f"{self.source}: adapters of type {kind[:40]} are not merged (LORA is)")
        for name in ("r", "lora_alpha"):
            if name in values and values[name] is None:
                raise UserError(f"{self.source}: {name} is null: how strongly the adapter acts is not known")
        for name, value in values.items():
            # An empty object or list, false and null all turn a feature off.
            if name in _KNOWN or not value or self._is_default(name, value):
                continue
            reason = _REFUSED.get(name, "a field that is not known here")
            raise UserError(f"{self.source}: {name[:60]} is set: {reason}; such an adapter is not merged")
        init = values.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_CHANGING_INIT):
            raise UserError(
                f"{self.source}: init_lora_weights {init!r:.60} changes the base weights, and is not merged "
                "(PEFT saves such an adapter as plain LoRA with path_initial_model_for_weight_conversion)"
            )
        if init not in _PLAIN_INIT:
            raise UserError(f"{self.source}: init_lora_weights {init!r:.60} is not known, and is not merged")

    def _is_default(self, name: str, value: Any) -> bool:
        """Whether the installed PEFT knows the field and would behave the same without it."""
        try:
            from peft import LoraConfig
        except ImportError:
            return False
        default = LoraConfig()
        if name not in {field.name for field in dataclasses.fields(default)}:
            return False
        known = getattr(default, name)
        if dataclasses.is_dataclass(known) and not isinstance(known, type):
            return value == dataclasses.asdict(known)
        return value == known

    def _list(self, field: str) -> list[str]:
        names = self._fields.get(field, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._fields.fail(field, "a list of module names")
        return names

    def _matches(self, pattern: str, module: str, whole: bool = True) -> bool:
        try:
            return (re.fullmatch if whole else re.match)(pattern, module) is not None
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{self.source}: {pattern!r:.60} is not a pattern ({error})") from None

    def _names(self, module: str, names: str | list[Any]) -> bool:
        if isinstance(names, str):
            return self._matches(names, module)
        return any(isinstance(name, str) and (module == name or module.endswith(f".{name}")) for name in names)

    def _targets_vocabulary(self) -> bool:
        if isinstance(self._targets, str):
            return any(self._matches(self._targets, name) for name in ("embed_tokens", HEAD))
        return any(isinstance(name, str) and _is_vocabulary(name) for name in self._targets)

    def targets(self, module: str) -> bool:
        """Whether `module`, which has a weight matrix, gets low-rank factors."""
        if self._targets_tied and module in (EMBEDDING, HEAD):
            return True
        if self._excluded and self._names(module, self._excluded):
            return False
        if any(self._matches(rf"(^|.*\.){name}($|\..*)", module, whole=False) for name in self._saved):
            return False
        if isinstance(self._targets, str):
            if self._targets.lower() == "all-linear":  # all but the output layer; an embedding is not a linear layer
                return module not in (EMBEDDING, HEAD)
            return self._matches(self._targets, module)
        if module in self._targets:
            return True
        return self._names(module, self._targets) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        layers = self._fields.get("layers_to_transform", [])
        if layers == []:
            return True
        patterns = self._fields.get("layers_pattern", [])
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise self._fields.fail("layers_pattern", "a name or a list of names")
        if patterns and not any(self._matches(rf"(?:^|.*?\.){p}\.\d+\.", module, whole=False) for p in patterns):
            return False
        index = re.match(r"model\.layers\.(\d+)\.", module)
        return index is not None and int(index[1]) in (layers if isinstance(layers, list) else [layers])

    def saves(self, tensor: str) -> bool:
        """Whether `tensor`, e.g. `model.norm.weight`, belongs to a module of modules_to_save."""
        parts = tensor.split(".")[:-1]
        modules = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        return any(module.endswith(name) for module in modules for name in self._saved)

    def token_indices(self, module: str) -> tuple[int, ...]:
        """The rows of the module's weight that trainable_token_indices replaces."""
        return self._tokens.get(module, ())

    def _token_indices(self, tied: bool) -> dict[str, tuple[int, ...]]:
        given = self._fields.get("trainable_token_indices", {})
        named = {EMBEDDING: given} if isinstance(given, list) else given
        if not isinstance(named, dict):
            raise self._fields.fail("trainable_token_indices", "a list of token ids, or one for each module")
        found: dict[str, tuple[int, ...]] = {}
        for name, indices in named.items():
            tokens = Fields({name: indices}, f"{self.source}: trainable_token_indices").integers(name)
            modules = [module for module in (EMBEDDING, HEAD) if module.endswith(name)]
            if not modules:
                raise UserError(f"{self.source}: trainable_token_indices names {name!r:.60}, which has no tokens")
            found.update(dict.fromkeys(modules, tokens))
        if tied and found.get(EMBEDDING) == found.get(HEAD):  # one table: PEFT stores its rows once
            found.pop(HEAD, None)
        for module in (module for module, tokens in found.items() if tokens):
            adapted = self.targets(module) or (tied and module == EMBEDDING and self.targets(HEAD))
            if adapted or self.saves(f"{module}.weight"):
                raise UserError(
                    f"{self.source}: trainable_token_indices names {module}, which modules_to_save or target_modules "
                    "names too: PEFT trains a table in one way only"
                )
        return found

    def _pattern(self, field: str, module: str, default: float) -> float:
        """PEFT's rule: the first pattern that matches the end of the module's name, else the default."""
        patterns = self._fields.object(field)
        for pattern in patterns.values:
            if self._matches(rf"(.*\.)?({pattern})$", module, whole=False):
                return patterns.number(pattern, low=-math.inf)
        return default

    def scaling(self, module: str, rank: int) -> float:
        """The factor of a module's B @ A: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732).

        Raises UserError unless `rank`, that of the module's tensors, matches the configuration.
        """
        expected = self._pattern("rank_pattern", module, self._fields.integer("r", 8))
        # A projection that is adapted together with the embedding has its factors, whatever rank is configured.
        if rank != expected and not (self._targets_tied and module == HEAD):
            raise UserError(f"{self.source}: says rank {expected:g} for {module}, whose tensors have rank {rank}")
        alpha = self._pattern("alpha_pattern", module, self._fields.number("lora_alpha", 8, low=-math.inf))
        return alpha / (math.sqrt(expected) if self._fields.boolean("use_rslora") else expected)


def _is_vocabulary(name: str) -> bool:
    return name.rpartition(".")[2] in ("embed_tokens", HEAD)
