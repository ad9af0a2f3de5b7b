"""Token ids → text, token by token: the bytes that tokens stand for, read as UTF-8."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

from cqil_trt.errors import UserError

# Gives the bytes of one token after another; one per text, because a text's first token may lose its space.
Reader = Callable[[int], bytes]


class Readable(Protocol):
    def reader(self) -> Reader: ...


class TextStream:
    """Turns tokens into text as they arrive.

    The results, including that of `finish`, are together the tokens' bytes read as UTF-8, with U+FFFD for invalid
    bytes. A character split over tokens appears when it is complete. Never fails, whatever the tokens.
    """

    def __init__(self, vocabulary: Readable, after: Sequence[int] = ()):
        """`vocabulary`: one of vocabulary.py, or a tokenizer of `tokenizers`. `after`: the tokens before these."""
        if not hasattr(vocabulary, "reader"):
            from cqil_trt.tokenizer.vocabulary import JsonVocabulary

            vocabulary = JsonVocabulary(vocabulary)
        self._read = vocabulary.reader()
        for token in after:  # only what begins a text is read in another way
            if self._read(token):
                break
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that `token` completes; empty when it completes none."""
        return self._decoder.decode(self._read(token))

    def finish(self) -> str:
        """U+FFFD for an incomplete character at the end; otherwise empty."""
        return self._decoder.decode(b"", True)


@cache
def byte_of_character() -> dict[str, int]:
    """The byte each character of a byte-level vocabulary stands for (GPT-2): printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def byte_level(piece: str) -> bytes:
    """The bytes of a byte-level token; a token with any other character stands for its own text."""
    table = byte_of_character()
    try:
        return bytes(table[character] for character in piece)
    except KeyError:
        return piece.encode()


def byte_fallback(piece: str) -> bytes | None:
    """The byte that a piece like <0x0A> stands for; None for any other piece."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            return None
    return None


class JsonDecoder:
    """The decoder of a tokenizer.json, applied token by token.

    Raises UserError, naming `source`, for one that no LLaMA-family tokenizer has.
    """

    def __init__(self, decoder: dict[str, Any] | None, source: str):
        self._joined_by_spaces = decoder is None
        self._before: list[Callable[[str, bool], str]] = []
        self._to_bytes: Callable[[str], bytes | None] = lambda piece: None
        self._leading: tuple[str, int] = ("", 0)
        self.byte_level = False
        fused = False
        for step in _steps(decoder):
            kind = step.get("type")
            if kind == "ByteLevel":
                self.byte_level, self._to_bytes = True, byte_level
            elif kind == "ByteFallback":
                self._to_bytes = byte_fallback
            elif kind == "Fuse":
                fused = True
            elif kind == "Replace" and not fused and "String" in step.get("pattern", {}):
                self._before.append(_replace(step["pattern"]["String"], step["content"]))
            elif kind == "Metaspace" and not fused:
                self._before.append(_metaspace(step))
            elif kind == "Strip" and fused and not step.get("stop"):
                self._leading = (step["content"], step.get("start", 0))
            elif kind == "Strip" and not fused:
                self._before.append(_strip(step))
            else:
                raise UserError(f"{source}: its decoder {step!r:.100} is not one of a LLaMA-family tokenizer")

    def reader(self, piece_of: Callable[[int], str | None], plain: Callable[[int], bool]) -> Reader:
        """A reader for one text.

        `piece_of`: the vocabulary's spelling of a token; None for one that stands for nothing. `plain`: whether the
        spelling is already the text.
        """
        first, left = True, self._leading[1]

        def read(token: int) -> bytes:
            nonlocal first, left
            piece = piece_of(token)
            if piece is None:
                return b""
            if self.byte_level and plain(token):
                return piece.encode()
            for step in self._before:
                piece = step(piece, first)
            found = self._to_bytes(piece)
            if found is None:
                found = (" " + piece if self._joined_by_spaces and not first else piece).encode()
            first = False
            if left and found:
                mark = self._leading[0].encode()
                while left and found.startswith(mark):
                    found, left = found[len(mark) :], left - 1
                if found:
                    left = 0
            return found

        return read


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for part in decoder.get("decoders", []) for step in _steps(part)]
    return [decoder]


def _replace(pattern: str, content: str) -> Callable[[str, bool], str]:
    return lambda piece, first: piece.replace(pattern, content)


def _metaspace(step: dict[str, Any]) -> Callable[[str, bool], str]:
    mark = step.get("replacement", "▁")
    # Older files have add_prefix_space instead of prepend_scheme.
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    return lambda piece, first: piece.replace(mark, "" if first and scheme != "never" else " ")


def _strip(step: dict[str, Any]) -> Callable[[str, bool], str]:
    mark, start, stop = step["content"], step.get("start", 0), step.get("stop", 0)

    def strip(piece: str, first: bool) -> str:
        for _ in range(start):
            piece = piece.removeprefix(mark)
        for _ in range(stop):
            piece = piece.removesuffix(mark)
        return piece

    return strip


def read_all(vocabulary: Readable, tokens: Sequence[int]) -> str:
    """The text of all `tokens`."""
    stream = TextStream(vocabulary)
    return "".join([*map(stream.add, tokens), stream.finish()])
