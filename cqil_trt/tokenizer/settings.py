"""What the JSON files next to a vocabulary add to it: special tokens by name, added tokens, chat templates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cqil_trt.config import Fields, read_json
from cqil_trt.errors import UserError

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"
# The names that transformers gives special tokens, of any model.
STANDARD_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A token next to the vocabulary. `id`: None where only its text is given; the rest as in `tokenizers`."""

    content: str
    id: int | None = None
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class Settings:
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json say.

    Attributes:
        names: special tokens by name, those of the model's own (image_token, …) too.
        specials: the texts of all special tokens.
        added: added tokens in the order of their ids.
        add_bos, add_eos: whether a text begins with BOS and ends with EOS; None leaves it to the vocabulary.
        split_special: whether a special token's text in a prompt is ordinary text; None where nothing says so.
        tokenizer_class: the class that transformers would take, None where nothing says so.
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
        """The settings in `directory`; empty ones where it has none of the files. Raises UserError if malformed."""
        config = _fields(directory / CONFIG)
        named = _fields(directory / SPECIAL_TOKENS)
        names: dict[str, str] = {}
        lists: list[Any] = []
        for source in (named, config):  # the later one wins
            for name, value in source.values.items():
                if name.endswith("_token") and (text := _content(value)):
                    names[name] = text
            for name in ("extra_special_tokens", "model_specific_special_tokens", "additional_special_tokens"):
                value = source.get(name)
                if isinstance(value, dict):
                    names |= {key: text for key, item in value.items() if (text := _content(item))}
                elif isinstance(value, list):
                    lists += value
        specials = dict.fromkeys([*names.values(), *filter(None, map(_content, lists))])
        flags = [config.boolean(name) if config.get(name) is not None else None for name in _FLAGS]
        kind = config.get("tokenizer_class")
        return cls(
            names,
            tuple(specials),
            tuple(_added(config, directory / ADDED_TOKENS, specials)),
            *flags,
            kind if isinstance(kind, str) else None,
        )


_FLAGS = ("add_bos_token", "add_eos_token", "split_special_tokens")


def _fields(path: Path) -> Fields:
    return Fields(read_json(path) if path.exists() else {}, str(path))


def _content(value: Any) -> str | None:
    """The text of a special token, given as text or as an object; None for what is neither, or empty."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def _added(config: Fields, path: Path, specials: Mapping[str, None]) -> Iterator[AddedToken]:
    found: dict[int, AddedToken] = {}
    # Before transformers 4.33 added tokens had a file of their own, with ids alone.
    for content, number in _fields(path).values.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise UserError(f"{path}: {content!r:.60} has the id {number!r:.20}, expected a number")
        found[number] = AddedToken(content, number, content in specials)
    decoder = config.object("added_tokens_decoder")
    for key, value in decoder.values.items():
        content = _content(value)
        if not key.isdecimal() or content is None:
            raise UserError(f"{decoder.source}: {key!r:.40} is not the id of an added token with a content")
        flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}
        if isinstance(value, dict):
            flags = {name: bool(value.get(name, default)) for name, default in flags.items()}
        flags["special"] |= content in specials
        found[int(key)] = AddedToken(content, int(key), **flags)
    yield from (found[number] for number in sorted(found))


def chat_templates(directory: Path) -> dict[str, str]:
    """Chat templates by name, "default" the main one, from files of their own or from tokenizer_config.json."""
    path = directory / TEMPLATE
    more = sorted((directory / TEMPLATES).glob("*.jinja")) if (directory / TEMPLATES).is_dir() else []
    if path.exists() or more:
        files = {"default": path} if path.exists() else {}
        files |= {file.stem: file for file in more}
        return {name: _text(file) for name, file in files.items()}
    value = _fields(directory / CONFIG).get("chat_template")
    if isinstance(value, str):
        return {"default": value}
    if value is None:
        return {}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in value}
    except (TypeError, KeyError):
        raise UserError(f"{directory / CONFIG}: chat_template is neither a text nor a list of named texts") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
