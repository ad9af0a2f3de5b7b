"""Which layers may run concurrently, the adapter that recovers the quality, and the evaluation: on PyTorch."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cqil_trt.errors import UserError
from cqil_trt.model import ModelConfig
from cqil_trt.quality import corpus
from cqil_trt.tokenizer import Tokenizer, find_tokenizer, save_tokenizer
from cqil_trt.tokenizer.settings import STANDARD_NAMES
from cqil_trt.tokenizer.vocabulary import JsonVocabulary


def open_tokenizer(model: Path) -> Tokenizer:
    """The tokenizer of a checkpoint (directory or .gguf). Raises UserError when it has none."""
    found = find_tokenizer(model)
    if found is None:
        raise UserError(f"{model}: has no tokenizer, which texts and tasks need")
    return found.open()


def transformers_tokenizer(model: Path) -> Any:
    """The same as an object of transformers. Raises UserError if there is none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocabulary = open_tokenizer(model).vocabulary
    if not isinstance(vocabulary, JsonVocabulary):  # sentencepiece, for which transformers has a separate class
        with tempfile.TemporaryDirectory() as directory:
            save_tokenizer(model, Path(directory))
            return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    names = {name: text for name, text in vocabulary.names.items() if name in STANDARD_NAMES}
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary.backend, **names)


def text_blocks(
    paths: Sequence[Path], tokenizer: Tokenizer, model: ModelConfig, length: int, limit: int | None, column: str
) -> np.ndarray:
    """The texts at `paths` as blocks of token ids, int32 [N, length], from at most `limit` tokens.

    A path may also be a .npy file of token ids. Raises UserError for a path that is not text, or too few tokens for one
    block.
    """
    separator = model.eos_token_ids[0] if model.eos_token_ids else None
    texts = [path for path in paths if path.suffix != ".npy"]
    parts = [corpus.encode(corpus.documents(texts, column), tokenizer, separator, limit)]
    parts += [corpus.saved_tokens(path, model.vocab_size) for path in paths if path.suffix == ".npy"]
    return corpus.blocks(np.concatenate(parts)[:limit], length, ", ".join(map(str, paths)))
