"""The JSON files next to a vocabulary: special tokens by name, added tokens, chat templates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cqil_trt.errors import UserError
from cqil_trt.json_fields import Fields, read_json

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"
# transformers' names for the special tokens of any model.
STANDARD_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token next to the vocabulary, with its flags as in `tokenizers`.

    `bare`: it has no flags, because it is from added_tokens.json; those in the vocabulary's file apply.
    """

    content: str
    id: int
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    bare: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The contents of tokenizer_config.json, special_tokens_map.json and added_tokens.json.

    Attributes:
        names: special tokens by name, including model-specific ones (image_token, …).
        specials: the texts of all special tokens.
        added: added tokens in the order of their ids.
        add_bos, add_eos: whether a text begins with BOS and ends with EOS; None leaves it to the vocabulary.
        split_special: whether a special token's text in a prompt is ordinary text; None if not set.
        tokenizer_class: the class that transformers would use; None if not set.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    specials: tuple[str, ...] = ()
    added: tuple[AddedToken, ...] = ()
    add_bos: bool | None = None
    add_eos: bool | None = None
    split_special: bool | None = None
    tokenizer_class: str | None = None

    @classmethod
    def read(cls, directory: Path) -> Settings:
        """The settings in `directory`; empty if it has none of the files. Raises UserError if malformed."""
        config = _fields(directory / CONFIG)
        # Since transformers 4.34 everything is in one file, and the others are not read.
        whole = config.get("added_tokens_decoder") is not None
        named = Fields({}, "") if whole else _fields(directory / SPECIAL_TOKENS)
        names: dict[str, str] = {}
        lists: list[str] = []
        for source in (config, named):  # the later one wins
            for name, value in source.values.items():
                if name.endswith("_token") and (text := _content(value, source)):
                    names[name] = text
            for name in ("extra_special_tokens", "model_specific_special_tokens", "additional_special_tokens"):
                value = source.get(name)
                if isinstance(value, dict):
                    names |= {key: text for key, item in value.items() if (text := _content(item, source))}
                elif isinstance(value, list):
                    lists += [text for item in value if (text := _content(item, source))]
        older = {} if whole else _fields(directory / ADDED_TOKENS).values
        added = [*_decoder(config), *_older(older, str(directory / ADDED_TOKENS))]
        specials = dict.fromkeys([*names.values(), *lists, *(token.content for token in added if token.special)])
        kind = config.get("tokenizer_class")
        return cls(
            names=names,
            specials=tuple(specials),
            added=tuple(replace(token, special=token.content in specials) for token in added),
            add_bos=_flag(config, "add_bos_token"),
            add_eos=_flag(config, "add_eos_token"),
            split_special=_flag(config, "split_special_tokens"),
            tokenizer_class=kind if isinstance(kind, str) else None,
        )


def _flag(config: Fields, name: str) -> bool | None:
    return None if config.get(name) is None else config.boolean(name)


def _fields(path: Path) -> Fields:
    return Fields(read_json(path) if path.exists() else {}, str(path))


def _content(value: Any, source: Fields) -> str | None:
    """The text of a special token, given as a string or an object; None for anything else, or if empty."""
    value = value.get("content") if isinstance(value, dict) else value
    if not isinstance(value, str) or not value:
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{source.source}: {value!r:.60} is not text that can be written as UTF-8") from None
    return value


def _older(ids: Mapping[str, Any], source: str) -> list[AddedToken]:
    """Before transformers 4.34, added tokens were in a separate file, with only their ids."""
    for content, number in ids.items():
        if isinstance(number, bool) or not isinstance(number, int) or not content:
            raise UserError(f"{source}: {content!r:.60} has the id {number!r:.20}, expected a number")
    return [AddedToken(content=content, id=ids[content], bare=True) for content in sorted(ids, key=ids.__getitem__)]


def _decoder(config: Fields) -> list[AddedToken]:
    found: dict[int, AddedToken] = {}
    decoder = config.object("added_tokens_decoder")
    for key, value in decoder.values.items():
        content = _content(value, config)
        if not (key.isascii() and key.isdecimal() and len(key) < 10) or content is None:
            raise UserError(f"{decoder.source}: {key!r:.40} is not the id of an added token with a content")
        flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}
        if isinstance(value, dict):
            flags = {name: bool(value.get(name, default)) for name, default in flags.items()}
        found[int(key)] = AddedToken(content=content, id=int(key), **flags)
    return [found[number] for number in sorted(found)]


def chat_templates(directory: Path) -> dict[str, str]:
    """Chat templates by name ("default" is the main one), from separate files or from tokenizer_config.json."""
    path = directory / TEMPLATE
    more = sorted((directory / TEMPLATES).glob("*.jinja")) if (directory / TEMPLATES).is_dir() else []
    if path.exists() or more:
        files = {"default": path} if path.exists() else {}
        files |= {file.stem: file for file in more}
        return {name: _text(file) for name, file in files.items()}
    value = _fields(directory / CONFIG).get("chat_template")
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    value = {} if value is None else value
    if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise UserError(f"{directory / CONFIG}: chat_template is neither a text nor a list of named texts")
    return value


def write_templates(directory: Path, templates: Mapping[str, str], source: str) -> None:
    """Writes chat templates to separate files. Raises UserError, naming `source`, for an invalid name."""
    for name, text in templates.items():
        if not re.fullmatch(r"\w[\w-]{,63}", name, re.ASCII):
            raise UserError(f"{source}: {name!r:.60} is no name for a chat template (use letters, digits, - and _)")
        path = directory / TEMPLATE if name == "default" else directory / TEMPLATES / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode("utf-8", "replace"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
