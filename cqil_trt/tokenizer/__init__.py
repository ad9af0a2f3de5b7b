"""Text ↔ token ids: what an engine directory carries and a runtime needs, without transformers."""

from cqil_trt.tokenizer.chat import Conversation
from cqil_trt.tokenizer.detokenizer import TextStream
from cqil_trt.tokenizer.files import TokenizerFiles, find_tokenizer, has_tokenizer, save_tokenizer
from cqil_trt.tokenizer.tokenizer import Tokenizer

__all__ = [
    "Conversation",
    "TextStream",
    "Tokenizer",
    "TokenizerFiles",
    "find_tokenizer",
    "has_tokenizer",
    "save_tokenizer",
]
