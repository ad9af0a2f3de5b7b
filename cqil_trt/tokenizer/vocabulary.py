"""The two forms a vocabulary comes in: tokenizer.json, read by `tokenizers`, and tokenizer.model, by sentencepiece."""

from __future__ import annotations

import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from cqil_trt.errors import UserError
from cqil_trt.tokenizer.detokenizer import JsonDecoder, Reader
from cqil_trt.tokenizer.settings import Settings

JSON, MODEL = "tokenizer.json", "tokenizer.model"
# Fields of a tokenizer.json's model.
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
_SPACES = re.compile(r"\s+")
# Longer texts are encoded as a batch of one: while it encodes a single text, the library keeps Python's lock.
_LONG_TEXT = 4_096
# Texts to find out what a post-processor adds: any vocabulary has tokens for one of them.
_SAMPLES = ("a", "0", ".", " ", "\n", "é", "一")


class Vocabulary(ABC):
    """Text ↔ token ids, including the tokens that the settings add.

    `prefix`, `suffix`: token ids around a whole text. `names`: special tokens by name.
    """

    prefix: list[int]
    suffix: list[int]
    names: dict[str, str]

    @abstractmethod
    def size(self) -> int:
        """The number of tokens, including added ones."""

    @abstractmethod
    def encode(self, text: str, control: bool = False) -> list[int]:
        """Token ids of `text` without prefix and suffix; `control`: texts of special tokens always become these."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    @abstractmethod
    def id_of(self, content: str) -> int | None:
        """The token spelled `content`."""

    @abstractmethod
    def special_text(self, token: int) -> str | None:
        """The text of a control token, which stands for no text; None for any other token."""

    @abstractmethod
    def reader(self) -> Reader:
        """A function that gives the bytes of a new text, token by token."""

    def plain_tokens(self) -> list[int]:
        """Every token id that stands for text."""
        return [token for token in range(self.size()) if self.special_text(token) is None]

    def _surround(self, settings: Settings) -> None:
        """Sets prefix and suffix to BOS and EOS, or to nothing, where the settings say so."""
        bos, eos = self.named("bos_token"), self.named("eos_token")
        if settings.add_bos is False:
            self.prefix = []
        elif settings.add_bos and bos is not None:
            self.prefix = [bos]
        if settings.add_eos is False:
            self.suffix = []
        elif settings.add_eos and eos is not None:
            self.suffix = [eos]

    def named(self, name: str) -> int | None:
        """The token id of "bos_token", "eos_token", …; None if there is no such token."""
        content = self.names.get(name)
        return None if content is None else self.id_of(content)


class JsonVocabulary(Vocabulary):
    """A tokenizer.json, read by `tokenizers`, with `settings` applied.

    Raises UserError, naming `source`, if they do not fit or its decoder is not supported.
    """

    def __init__(self, backend: Any, settings: Settings | None = None, source: str = JSON):
        settings = settings or Settings()
        self.backend = backend
        self._decoder = JsonDecoder(json.loads(backend.decoder.__getstate__()) if backend.decoder else None, source)
        # A file saved in training may truncate or pad every text.
        self.backend.no_truncation()
        self.backend.no_padding()
        self._add(settings, source)
        self._split = bool(settings.split_special)
        self._splitting = threading.Lock()
        self.backend.encode_special_tokens = self._split
        self._added: dict[int, Any] = self.backend.get_added_tokens_decoder()
        self.names = dict(settings.names)
        self.prefix, self.suffix = self._around()
        self._surround(settings)

    @classmethod
    def open(cls, path: Path, settings: Settings) -> JsonVocabulary:
        """Reads a file. Raises UserError for one that `tokenizers` cannot read."""
        from tokenizers import Tokenizer

        try:
            text = path.read_text(encoding="utf-8")
            model = json.loads(text).get("model", {})
            # With affixes, the library aborts the process on some texts.
            if affixes := [name for name in _AFFIXES if model.get(name)]:
                raise UserError(f"{path}: has {affixes[0]} set, which no LLaMA-family tokenizer has")
            return cls(Tokenizer.from_str(text), settings, str(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare exceptions, and panics that are not even those
            raise UserError(f"{path}: not a tokenizer that can be read ({error})") from None

    def _add(self, settings: Settings, source: str) -> None:
        from tokenizers import AddedToken as Added

        present = self.backend.get_added_tokens_decoder()
        for token in settings.added:
            known = self.backend.token_to_id(token.content)
            added = _added(Added, token)
            if known is not None and (token.bare or repr(present.get(known)) == repr(added)):
                continue
            self.backend.add_tokens([added])
            given = self.backend.token_to_id(token.content)
            if known is None and given != token.id:
                raise UserError(
                    f"{source}: the settings next to it give {token.content!r:.60} the id {token.id}, but after its "
                    f"own tokens it would be {given}"
                )
        present = self.backend.get_added_tokens_decoder()
        for content in settings.specials:
            known = self.backend.token_to_id(content)
            if known is None:
                continue  # a name without a token
            if known not in present:
                self.backend.add_special_tokens([content])
            elif not present[known].special:
                self.backend.add_tokens([_added(Added, present[known], special=True)])

    def _around(self) -> tuple[list[int], list[int]]:
        """The tokens that the post-processor puts before and after a text."""
        for sample in _SAMPLES:
            whole = self.backend.encode(sample, add_special_tokens=True).ids
            inner = self.backend.encode(sample, add_special_tokens=False).ids
            for first in range(len(whole) - len(inner) + 1):
                if inner and whole[first : first + len(inner)] == inner:
                    return whole[:first], whole[first + len(inner) :]
        return self.backend.encode("", add_special_tokens=True).ids, []

    def size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str, control: bool = False) -> list[int]:
        try:
            if not self._split:
                return self._ids(text)
            with self._splitting:  # a server tokenizes in several threads
                self.backend.encode_special_tokens = not control
                try:
                    return self._ids(text)
                finally:
                    self.backend.encode_special_tokens = True
        except Exception as error:  # a vocabulary without an unknown token
            raise UserError(f"{text!r:.60} cannot be tokenized ({error})") from None

    def _ids(self, text: str) -> list[int]:
        if len(text) > _LONG_TEXT:
            return self.backend.encode_batch([text], add_special_tokens=False)[0].ids
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def id_of(self, content: str) -> int | None:
        return self.backend.token_to_id(content)

    def special_text(self, token: int) -> str | None:
        added = self._added.get(token)
        return added.content if added is not None and added.special else None

    def plain_tokens(self) -> list[int]:
        own = set(self.backend.get_vocab(with_added_tokens=False).values())
        return sorted(own - self._added.keys())

    def reader(self) -> Reader:
        return self._decoder.reader(self._piece, self._added.__contains__)

    def _piece(self, token: int) -> str | None:
        # A model's table may have more rows than its tokenizer has tokens.
        return None if self.special_text(token) is not None else self.backend.id_to_token(token)


def _added(kind: Any, token: Any, special: bool | None = None) -> Any:
    """`token`, ours or the library's, as the library's `kind`."""
    return kind(
        token.content,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
        normalized=token.normalized,
        special=token.special if special is None else special,
    )


class SentencePieceVocabulary(Vocabulary):
    """A tokenizer.model, read by sentencepiece. A text begins with BOS, as LLaMA expects, unless the settings differ.

    Tokens that the settings add are unknown to sentencepiece. They are found first; the parts between them are
    tokenized separately, each with the space that sentencepiece puts before a text. Control tokens are found the same
    way in chat templates; in other texts their spelling is ordinary text, as in sentencepiece, unless the settings say
    otherwise. Raises UserError for a file that sentencepiece cannot read.
    """

    def __init__(self, path: Path, settings: Settings):
        from sentencepiece import SentencePieceProcessor

        try:
            data = path.read_bytes()
            if not data:
                raise ValueError("an empty file")
            self._model = SentencePieceProcessor(model_proto=data)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except Exception:  # RuntimeError and others, with text from the library's C++ code
            raise UserError(
                f"{path}: not a sentencepiece model; for one in tiktoken's form, use the tokenizer.json of the Hugging "
                "Face conversion"
            ) from None
        model, own = self._model, self._model.get_piece_size()
        self._control = {model.id_to_piece(t): t for t in range(own) if model.is_control(t) or model.is_unknown(t)}
        self._added = {t.content: t for t in settings.added if not self._owns(t.content, t.id)}
        self._id = {content: token.id for content, token in self._added.items()}
        self._special = {token: content for content, token in self._control.items() if model.is_control(token)}
        self._size = max([own, *(token + 1 for token in self._id.values())])
        if settings.split_special is False:
            self._id |= self._control
            self._id |= {token.content: token.id for token in settings.added}
        self._known = {**self._control, **self._id}
        self._plain, self._with_control = _splitter(self._id), _splitter(self._known)
        defaults = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        self.names = {name: model.id_to_piece(token) for name, token in defaults.items() if token >= 0}
        self.names |= {name: text for name, text in settings.names.items() if self.id_of(text) is not None}
        for content in settings.specials:
            token = self.id_of(content)
            if token is not None and not (token < own and model.is_unknown(token)):
                self._special[token] = content
        bos = self.named("bos_token")
        self.prefix, self.suffix = ([] if bos is None else [bos]), []
        self._surround(settings)
        self._strips, self._strips_all = _stripping(model)

    def _owns(self, content: str, token: int) -> bool:
        return token < self._model.get_piece_size() and self._model.id_to_piece(token) == content

    def size(self) -> int:
        return self._size

    def encode(self, text: str, control: bool = False) -> list[int]:
        pattern = self._with_control if control else self._plain
        if pattern is None:
            return self._model.encode(text)
        ids: list[int] = []
        start = 0
        for match in pattern.finditer(text):
            token = self._added.get(match[0])
            before = text[start : match.start()]
            ids += self._model.encode(before.rstrip() if token is not None and token.lstrip else before)
            ids.append(self._known[match[0]])
            start = match.end()
            if token is not None and token.rstrip and (spaces := _SPACES.match(text, start)):
                start = spaces.end()
        return ids + self._model.encode(text[start:])

    @property
    def found_in_text(self) -> Collection[str]:
        """The texts that are found before sentencepiece tokenizes the parts between them."""
        return self._id.keys()

    def id_of(self, content: str) -> int | None:
        if content in self._id:
            return self._id[content]
        token = self._model.piece_to_id(content)
        return token if self._owns(content, token) else None

    def special_text(self, token: int) -> str | None:
        return self._special.get(token)

    def plain_tokens(self) -> list[int]:
        model, others = self._model, {*self._id.values(), *self._special}
        kinds = (model.is_unknown, model.is_unused)
        return [t for t in range(model.get_piece_size()) if t not in others and not any(kind(t) for kind in kinds)]

    def reader(self) -> Reader:
        model, control = self._model, set(self._control.values())
        texts = {token: content for content, token in self._id.items() if token not in control}
        # The first space of a text was added by sentencepiece and is removed again.
        at_start, written = self._strips, False

        def read(token: int) -> bytes:
            nonlocal at_start, written
            if token in self._special or not 0 <= token < self._size:
                return b""
            if token in texts:
                found = texts[token].encode()
            elif token >= model.get_piece_size():
                return b""
            elif model.is_byte(token):
                found = bytes([int(model.id_to_piece(token)[3:5], 16)])
            elif model.is_unknown(token):
                found = model.decode([token]).encode()
            else:
                piece = model.id_to_piece(token)
                if at_start and not written and piece.startswith("▁"):
                    piece = piece[1:]
                    at_start = self._strips_all
                found = piece.replace("▁", " ").encode()
            written = written or bool(found)
            return found

        return read


def _splitter(tokens: dict[str, int]) -> re.Pattern[str] | None:
    """Finds the texts of `tokens`, the longest first; None when there are none."""
    if not tokens:
        return None
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def _stripping(model: Any) -> tuple[bool, bool]:
    """Whether decoding drops a text's first space, and whether it drops all spaces that follow immediately.

    Found by decoding, because only the model's serialized form says so.
    """
    spaces = model.piece_to_id("▁")
    if model.is_unknown(spaces):
        pieces = [t for t in range(model.get_piece_size()) if model.id_to_piece(t).startswith("▁")]
        if not pieces:
            return False, False
        spaces = pieces[0]
    one, two = model.decode([spaces]), model.decode([spaces, spaces])
    length = len(model.id_to_piece(spaces))
    return len(one) < length, len(two) < 2 * length - 1


def open_vocabulary(directory: Path, settings: Settings) -> Vocabulary | None:
    """The vocabulary in `directory`, preferably tokenizer.json; None if there is none."""
    if (directory / JSON).exists():
        return JsonVocabulary.open(directory / JSON, settings)
    if (directory / MODEL).exists():
        return SentencePieceVocabulary(directory / MODEL, settings)
    return None
