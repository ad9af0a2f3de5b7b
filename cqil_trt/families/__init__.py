"""The model families, one file each: its `FAMILY` is all that the rest of the program knows about the family.

Files in this folder are discovered automatically; nothing else lists the families.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from cqil_trt.errors import UserError
from cqil_trt.families import hugging_face
from cqil_trt.families.family import Family
from cqil_trt.families.refused import REASONS, TYPES
from cqil_trt.json_fields import Fields, read_json
from cqil_trt.model import ModelConfig


@cache
def all_families() -> tuple[Family, ...]:
    """Every family, ordered by file name."""
    modules = (import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__))
    return tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))


def of(model: ModelConfig) -> Family:
    """The family that the model belongs to."""
    return next(family for family in all_families() if family.architecture == model.architecture)


def of_type(model_type: str) -> Family:
    """The family that transformers calls `model_type`."""
    return next(family for family in all_families() if family.model_type == model_type)


def of_gguf(architecture: str, keys: Collection[str] = ()) -> Family | None:
    """The family of a GGUF file by its `general.architecture` and the keys of its metadata; None if not supported.

    llama.cpp stores some families under the name of another with the same computation; the result is that other family.
    """
    found = [family for family in all_families() if family.gguf and family.gguf.architecture == architecture]
    special = [f for f in found if f.gguf and f.gguf.requires and f"{architecture}.{f.gguf.requires}" in keys]
    return next(iter(special or [f for f in found if f.gguf and not f.gguf.requires]), None)


def gguf_architectures() -> tuple[str, ...]:
    return tuple(dict.fromkeys(family.gguf.architecture for family in all_families() if family.gguf))


def read_config(path: Path) -> ModelConfig:
    """The model that a Hugging Face config.json describes, with the stop tokens of a generation_config.json next to it.

    Of a model that also reads images the text model, where its family is supported. Raises UserError for a family that
    is not supported, or for a feature that the model uses and is not supported.
    """
    config = Fields(read_json(path), str(path))
    if (family := _text_family(config)) is not None:
        shared = {name: config.values[name] for name in _SHARED if config.get(name) is not None}
        text = config.object("text_config").values
        config = Fields({**text, **shared, "model_type": family.model_type}, config.source)
    return hugging_face.read_model(config, _of_config(config))


# What a configuration says for all of its models together.
_SHARED = ("dtype", "torch_dtype", "eos_token_id")


def _text_family(config: Fields) -> Family | None:
    """The family of the text model of a model that reads more than text; None for any other."""
    kind = config.get("model_type")
    return next((family for family in all_families() if family.inside is not None and family.inside == kind), None)


def reads_more_than_text(path: Path) -> bool:
    """Whether a config.json describes a model of which only the text model is used."""
    return _text_family(Fields(read_json(path), str(path))) is not None


def written(model: ModelConfig) -> dict[str, Any]:
    """The fields of a config.json for what only some families have, and for rotary embedding."""
    return hugging_face.written(model, of(model))


def _of_config(config: Fields) -> Family:
    """The family of a config.json by its model_type, regardless of `architectures`, as transformers chooses the class.

    Without model_type, which transformers refuses, the architecture decides. Its case does not matter
    (LLaMAForCausalLM, as in 2023).
    """
    families = {family.model_type: family for family in all_families()}
    kind = name = config.get("model_type")
    if kind is None:
        names = config.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise UserError(f"{config.source}: no model_type and no architectures: not a model's configuration")
        name, types = names[0], {family.architecture.lower(): family.model_type for family in families.values()}
        kind = types.get(name.lower(), TYPES.get(name))
        if kind is None:
            known = ", ".join(family.architecture for family in families.values())
            raise UserError(f"{config.source}: {name[:80]} is not supported (supported: {known})")
    if isinstance(kind, str) and kind in REASONS:
        raise UserError(f"{config.source}: {name} is not supported: {REASONS[kind]}")
    if not isinstance(kind, str) or kind not in families:
        raise UserError(f"{config.source}: model_type {kind!r:.80} is not supported ({', '.join(families)} are)")
    family = families[kind]
    other = next((other for name, other in family.becomes.items() if name in config.values), None)
    return family if other is None else families[other]
