"""Where a model's tokenizer is, and its files in an engine directory.

Files that the runtime can read are copied into the engine unchanged; only GGUF metadata, and the vocab.json and
merges.txt of older checkpoints, are converted to tokenizer.json or tokenizer.model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cqil_trt.errors import UserError
from cqil_trt.json_fields import read_json
from cqil_trt.tokenizer.gguf import GgufTokenizer, byte_level_tokenizer
from cqil_trt.tokenizer.settings import (
    ADDED_TOKENS,
    CONFIG,
    SPECIAL_TOKENS,
    TEMPLATE,
    TEMPLATES,
    Settings,
    chat_templates,
    write_templates,
)
from cqil_trt.tokenizer.tokenizer import Tokenizer
from cqil_trt.tokenizer.vocabulary import JSON, MODEL, JsonVocabulary, SentencePieceVocabulary

_SETTINGS = (CONFIG, SPECIAL_TOKENS, ADDED_TOKENS)
_BYTE_LEVEL = ("vocab.json", "merges.txt")
# All files of a checkpoint that may belong to its tokenizer, except the templates in additional_chat_templates/.
FILES = frozenset((JSON, MODEL, TEMPLATE, *_SETTINGS, *_BYTE_LEVEL))
# llama.cpp's name of the pre-tokenizer for vocab.json and merges.txt, by tokenizer_class.
_BYTE_LEVEL_CLASSES = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2"}
# Special in both classes, even if the configuration does not name it.
_END = "<|endoftext|>"


@dataclass(frozen=True)
class TokenizerFiles:
    """The location of a tokenizer. `place`: the directory or GGUF file with the vocabulary.

    `template`: likewise for the chat template; None without one.
    """

    place: Path
    template: Path | None

    def open(self) -> Tokenizer:
        """Opens the tokenizer in its place. Raises UserError, naming its file, if it cannot be read."""
        if self.place.is_dir() and has_tokenizer(self.place):
            return Tokenizer(self.place)
        with tempfile.TemporaryDirectory() as temporary:
            self.write(Path(temporary))
            try:
                return Tokenizer(Path(temporary), str(self.place))
            except UserError as error:  # it names a temporary file
                raise UserError(str(error).replace(f"{temporary}/", f"{self.place}, written as ")) from None

    def write(self, directory: Path) -> list[Path]:
        """Writes the files that `Tokenizer(directory)` reads, and returns them.

        Raises UserError for a tokenizer that cannot be converted.
        """
        if self.place.suffix == ".gguf":
            GgufTokenizer(self.place).write(directory)
        else:
            self._write_vocabulary(directory)
        if self.template not in (None, self.place):
            (directory / TEMPLATE).unlink(missing_ok=True)
            shutil.rmtree(directory / TEMPLATES, ignore_errors=True)
            # The vocabulary's own templates complete the others.
            write_templates(directory, {**templates_of(self.place), **templates_of(self.template)}, str(self.template))
        return sorted(path for path in directory.rglob("*") if path.is_file() and _is_ours(path, directory))

    @property
    def guesses(self) -> bool:
        """Whether the vocabulary is in a GGUF file that does not say how text is split."""
        if self.place.suffix != ".gguf":
            return False
        return GgufTokenizer(self.place).guesses

    def _write_vocabulary(self, directory: Path) -> None:
        for name in _SETTINGS:
            _copy(self.place / name, directory / name)
        _copy(self.place / TEMPLATE, directory / TEMPLATE)
        for path in (self.place / TEMPLATES).glob("*.jinja"):
            _copy(path, directory / TEMPLATES / path.name)
        for name in (JSON, MODEL):
            if (self.place / name).exists():
                _copy(self.place / name, directory / name)
                return
        _write_byte_level(self.place, directory)

    def judge(self) -> tuple[Callable[[str], list[int]], list[str], list[str]]:
        """The reference for an engine's token ids: the vocabulary's own library, on the original file.

        Returns a function text → token ids, without BOS and EOS; the texts of control tokens; and texts that it cannot
        judge, because the settings next to the vocabulary add them or change how they are read.
        """
        vocabulary = self.open().vocabulary
        texts = filter(None, map(vocabulary.special_text, range(vocabulary.size())))
        if isinstance(vocabulary, JsonVocabulary) and (self.place / JSON).exists():
            from tokenizers import Tokenizer as Backend

            backend = Backend.from_file(str(self.place / JSON))
            backend.no_truncation()
            own = {token.content: repr(token) for token in backend.get_added_tokens_decoder().values()}
            ours = {token.content: repr(token) for token in vocabulary.backend.get_added_tokens_decoder().values()}
            split = vocabulary.backend.encode_special_tokens
            changed = [text for text, token in ours.items() if split or own.get(text) != token]
            specials = [text for text in texts if text not in changed]
            return lambda text: backend.encode(text, add_special_tokens=False).ids, specials, changed
        if isinstance(vocabulary, SentencePieceVocabulary) and (self.place / MODEL).exists():
            from sentencepiece import SentencePieceProcessor

            model = SentencePieceProcessor(model_file=str(self.place / MODEL))
            return model.encode, [], list(vocabulary.found_in_text)
        # Other forms have no second reader: this only shows whether the source has changed.
        return vocabulary.encode, list(texts), []


def find_tokenizer(model: Path, lora: Path | None = None) -> TokenizerFiles | None:
    """The tokenizer of a checkpoint (a directory or a GGUF file), or of its adapter.

    Vocabulary and chat template are each the adapter's if it has one. None without a vocabulary. Raises UserError for a
    form that is not supported.
    """
    places = [place for place in (lora, model) if place is not None]
    found = next((place for place in places if _has_vocabulary(place)), None)
    if found is None:
        return None
    return TokenizerFiles(found, next((place for place in places if templates_of(place)), None))


def save_tokenizer(model: Path, directory: Path, lora: Path | None = None) -> list[Path]:
    """Writes the tokenizer of a checkpoint, or of its adapter, to `directory`, if there is one; returns the files."""
    found = find_tokenizer(model, lora)
    return [] if found is None else found.write(directory)


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has a tokenizer that the runtime can read."""
    return any((directory / name).exists() for name in (JSON, MODEL))


def templates_of(place: Path) -> dict[str, str]:
    """The chat templates in a directory or a GGUF file, by name."""
    if place.suffix == ".gguf":
        return GgufTokenizer(place).templates
    return chat_templates(place)


def _has_vocabulary(place: Path) -> bool:
    if place.suffix == ".gguf":
        return GgufTokenizer(place).model is not None
    if has_tokenizer(place) or all((place / name).exists() for name in _BYTE_LEVEL):
        return True
    if (place / "tekken.json").exists():
        raise UserError(
            f"{place}: its tokenizer is tekken.json alone, which is not supported: use a conversion with "
            "tokenizer.json, or leave it out with --no-tokenizer"
        )
    return False


def _is_ours(path: Path, directory: Path) -> bool:
    names = {JSON, MODEL, TEMPLATE, *_SETTINGS}
    return path.name in names if path.parent == directory else path.parent == directory / TEMPLATES


def _copy(source: Path, target: Path) -> None:
    if not source.exists():
        return
    target.parent.mkdir(exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror})") from None


def _write_byte_level(place: Path, directory: Path) -> None:
    """tokenizer.json from vocab.json and merges.txt."""
    settings = Settings.read(place)
    kind = (settings.tokenizer_class or "").removesuffix("Fast")
    if kind not in _BYTE_LEVEL_CLASSES:
        raise UserError(
            f"{place}: vocab.json and merges.txt do not say how text is split, and {CONFIG} names the class "
            f"{settings.tokenizer_class or 'none'} ({', '.join(_BYTE_LEVEL_CLASSES)} are read): give tokenizer.json"
        )
    vocabulary: dict[str, Any] = read_json(place / _BYTE_LEVEL[0])
    try:
        lines = (place / _BYTE_LEVEL[1]).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{place / _BYTE_LEVEL[1]}: cannot be read ({error})") from None
    merges = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    backend = byte_level_tokenizer(
        vocabulary, merges, _BYTE_LEVEL_CLASSES[kind], str(place), compose=kind == "Qwen2Tokenizer"
    )
    if _END in vocabulary:
        backend.add_special_tokens([_END])
    (directory / JSON).write_text(json.dumps(json.loads(backend.to_str()), ensure_ascii=False), encoding="utf-8")
