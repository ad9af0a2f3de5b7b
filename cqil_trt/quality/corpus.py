"""Text files and datasets → token ids in blocks of equal length."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from cqil_trt.errors import UserError
from cqil_trt.table import counted
from cqil_trt.tokenizer import Tokenizer

_SUFFIXES = (".txt", ".md", ".jsonl")
# Files in a directory saved by `datasets`.
_DATASET_FILES = ("state.json", "dataset_dict.json")
# Texts are cut at the first line end after this many characters: tokenizers are slow on megabytes at a time.
_PIECE = 1 << 16
# Pieces tokenized at a time, on all cores.
_BATCH = 64


def documents(paths: Sequence[Path], column: str = "text") -> Iterator[str]:
    """The texts at `paths`.

    A path is a text file, a .jsonl file (one object per line), a directory of such files, or one saved by `datasets`;
    `column` names the field of objects and datasets that holds the text. Raises UserError for anything else.
    """
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or directory")
        if not path.is_dir():
            yield from _file(path, column)
        elif any((path / name).exists() for name in _DATASET_FILES):
            yield from _dataset(path, column)
        else:
            files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)
            if not files:
                raise UserError(f"{path}: holds no {', '.join(_SUFFIXES)} file, and no dataset saved by datasets")
            for file in files:
                yield from _file(file, column)


def _file(path: Path, column: str) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from None
    if path.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):  # strings may contain other line ends
        if line.strip():
            try:
                yield _text(json.loads(line), column, f"{path}: line {number}")
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number} is not valid JSON ({error})") from None


def _dataset(path: Path, column: str) -> Iterator[str]:
    import datasets

    data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        raise UserError(f"{path}: holds the splits {', '.join(data)}: name one, e.g. {path / next(iter(data))}")
    for number, row in enumerate(data):
        yield _text(row, column, f"{path}: row {number}")


def _text(row: object, column: str, where: str) -> str:
    value = row.get(column) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise UserError(f"{where} has no text in {column!r} (--column names another field)")
    return value


def encode(texts: Iterator[str], tokenizer: Tokenizer, separator: int | None, limit: int | None = None) -> np.ndarray:
    """Token ids, int32, of the concatenated texts, with `separator` between two; at most `limit` of them."""
    parts: list[np.ndarray] = []
    count = 0
    for text in texts:
        if parts and separator is not None:
            parts.append(np.array([separator], np.int32))
        pieces = _pieces(text)
        while batch := list(islice(pieces, _BATCH)):
            parts += [np.array(ids, np.int32) for ids in tokenizer.pieces(batch)]
            count += sum(len(part) for part in parts[-len(batch) :])
            if limit is not None and count >= limit:
                return np.concatenate(parts)[:limit]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _pieces(text: str) -> Iterator[str]:
    first = 0
    while first < len(text):
        end = text.find("\n", first + _PIECE)
        last = len(text) if end < 0 else end + 1
        yield text[first:last]
        first = last


def saved_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """The token ids in a .npy file, int32, flattened. Raises UserError if they are not ids of the model's tokens."""
    try:
        tokens = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or directory") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as .npy ({error})") from None
    if tokens.dtype.kind not in "iu" or (tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size):
        raise UserError(f"{path}: does not hold token ids from 0 to {vocab_size - 1}")
    return tokens.astype(np.int32).ravel()


def blocks(tokens: np.ndarray, length: int, source: str) -> np.ndarray:
    """The tokens cut into blocks, [count, length]; an incomplete one at the end is dropped.

    Raises UserError, naming `source`, if there are too few tokens for one block.
    """
    count = len(tokens) // length
    if not count:
        raise UserError(
            f"{source}: {counted(len(tokens), 'token')}, fewer than one block of {length} (--block, --text-tokens)"
        )
    return tokens[: count * length].reshape(count, length)
