"""Text ↔ token ids with the `tokenizers` package alone: what an engine directory carries and a runtime needs."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

from cqil_trt.config import read_json
from cqil_trt.errors import UserError

_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_SOURCES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def save_tokenizer(model: Path, directory: Path) -> list[Path]:
    """Writes the tokenizer of the checkpoint at `model` to `directory`; returns the files written.

    A checkpoint without a tokenizer gives none: its engine then takes token ids only. Raises UserError when there is
    one that transformers cannot turn into tokenizer.json.
    """
    gguf = model.suffix == ".gguf"
    if not gguf and not any((model / name).exists() for name in _SOURCES):
        return []
    from transformers import AutoTokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        place, options = (model.parent, {"gguf_file": model.name}) if gguf else (model, {})
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=True, **options)
        if not tokenizer.is_fast:
            raise ValueError("it has no fast form (tokenizer.json)")
        tokenizer.save_pretrained(directory)
    except Exception as error:  # transformers raises many kinds for a broken tokenizer
        raise UserError(f"{model}: its tokenizer cannot be read ({error})") from None
    return [directory / name for name in _FILES if (directory / name).exists()]


class Tokenizer:
    """The tokenizer of an engine directory."""

    def __init__(self, directory: Path):
        from tokenizers import Tokenizer as Backend

        self._directory = directory
        if not (directory / "tokenizer.json").exists():
            raise UserError(f"{directory}: the checkpoint came without a tokenizer: use --token-ids")
        self._backend = Backend.from_file(str(directory / "tokenizer.json"))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`; `special`: with the special tokens the model expects around it."""
        try:
            return self._backend.encode(text, add_special_tokens=special).ids
        except TypeError:  # what the library raises for lone surrogates
            raise UserError(f"{text!r:.60} is not text that can be written as UTF-8") from None

    def pieces(self, texts: list[str]) -> list[list[int]]:
        """Token ids of parts of longer texts: without the special tokens a text begins and ends with."""
        try:
            return [encoding.ids for encoding in self._backend.encode_batch(texts, add_special_tokens=False)]
        except TypeError:
            raise UserError("a text holds characters that cannot be written as UTF-8 (lone surrogates)") from None

    def special(self, name: str) -> int | None:
        """The token id of "bos_token", "eos_token", …; None when the tokenizer has none."""
        text = self._special_tokens().get(name)
        return None if text is None else self._backend.token_to_id(text)

    def text_of(self, token: int) -> str:
        """A token as text, one that controls the model too."""
        return self._backend.decode([token], skip_special_tokens=False)

    def plain_tokens(self) -> list[int]:
        """Every token id that stands for text: those that control the model are left out."""
        special = self._backend.get_added_tokens_decoder().keys()
        return [token for token in range(self._backend.get_vocab_size()) if token not in special]

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def stream(self) -> TextStream:
        return TextStream(self._backend)

    def chat(self, message: str) -> list[int]:
        """Token ids of a conversation whose only user message is `message`, by the model's chat template."""
        template = self._template()
        messages = [{"role": "user", "content": message}]
        try:
            text = template.render(messages=messages, add_generation_prompt=True, **self._special_tokens())
        except UserError:
            raise
        except Exception as error:  # a template can raise whatever its expressions do
            raise UserError(f"--chat: the chat template of {self._directory} failed ({error})") from None
        return self.encode(text, special=False)

    def _config(self) -> dict[str, Any]:
        path = self._directory / "tokenizer_config.json"
        return read_json(path) if path.exists() else {}

    def _special_tokens(self) -> dict[str, str]:
        def content(value: Any) -> Any:
            return value.get("content") if isinstance(value, dict) else value

        config = self._config()
        tokens = {name: content(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        return {name: token for name, token in tokens.items() if isinstance(token, str)}

    def _template(self):
        # The sandbox and the options that Hugging Face renders chat templates with: a template is untrusted text.
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        path = self._directory / "chat_template.jinja"
        source = path.read_text() if path.exists() else self._config().get("chat_template")
        if not isinstance(source, str):
            raise UserError(f"--chat: {self._directory} has no chat template")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"--chat: the chat template of {self._directory} is malformed ({error})") from None


def _raise(message: str) -> None:
    raise UserError(f"--chat: the chat template says: {message}")


class TextStream:
    """Turns tokens into text as they come; a character split over tokens appears when it is complete."""

    def __init__(self, backend):
        from tokenizers.decoders import DecodeStream

        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """The text that `token` completes; empty when none."""
        return self._stream.step(self._backend, token) or ""
