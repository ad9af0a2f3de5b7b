"""The tokenizer of an engine directory or a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from cqil_trt.errors import UserError
from cqil_trt.tokenizer.chat import ChatTemplate, Conversation
from cqil_trt.tokenizer.detokenizer import TextStream, read_all
from cqil_trt.tokenizer.settings import Settings, chat_templates
from cqil_trt.tokenizer.vocabulary import open_vocabulary


class Tokenizer:
    """The tokenizer whose files are in `directory`. Raises UserError when there is none or it cannot be read.

    `source` names it in messages about its chat template; by default the directory.
    """

    def __init__(self, directory: Path, source: str | None = None):
        settings = Settings.read(directory)
        vocabulary = open_vocabulary(directory, settings)
        if vocabulary is None:
            raise UserError(f"{directory}: the checkpoint came without a tokenizer: use --token-ids")
        self.vocabulary = vocabulary
        templates = chat_templates(directory)
        self.chat_template = templates.get("tool_use", templates.get("default"))  # as text
        self._template = ChatTemplate(templates, vocabulary.names, source or str(directory))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`; `special`: with the special tokens the model expects around it."""
        _check_text(text)
        ids = self.vocabulary.encode(text)
        return [*self.vocabulary.prefix, *ids, *self.vocabulary.suffix] if special else ids

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of parts of longer texts: without the special tokens a text begins and ends with."""
        for text in texts:
            _check_text(text)
        return self.vocabulary.encode_batch(texts)

    def special(self, name: str) -> int | None:
        """The token id of "bos_token", "eos_token", …; None when the tokenizer has none."""
        return self.vocabulary.named(name)

    def text_of(self, token: int) -> str:
        """A token as text within other text, including control tokens."""
        return self.bytes_of(token).decode(errors="replace")

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for within a text; those of a control token's text."""
        special = self.vocabulary.special_text(token)
        if special is not None:
            return special.encode()
        reader = self.vocabulary.reader()
        reader(self._inner)  # sentencepiece drops the space of a text's first token
        return bytes(reader(token))

    @cached_property
    def _inner(self) -> int:
        return self.plain_tokens()[0]

    def plain_tokens(self) -> list[int]:
        """Every token id that stands for text, i.e. without control tokens."""
        return self.vocabulary.plain_tokens()

    def decode(self, ids: Sequence[int]) -> str:
        """The text that `ids` stand for: the UTF-8 reading of their bytes, U+FFFD where they are not UTF-8."""
        return read_all(self.vocabulary, ids)

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        """Reads tokens as a text of their own, or as what goes on `after` others: it may begin with a space then."""
        return TextStream(self.vocabulary, after)

    def chat(self, conversation: str | Conversation) -> list[int]:
        """Token ids of a conversation rendered with the chat template, up to the beginning of the assistant's turn.

        A string is a single user message. Raises UserError if it cannot be rendered.
        """
        if isinstance(conversation, str):
            conversation = Conversation(messages=[{"role": "user", "content": conversation}])
        text = self._template.render(conversation)
        _check_text(text)
        return self.vocabulary.encode(text, control=True)

    def chat_beginning(self) -> list[int]:
        """Token ids with which the chat template begins a conversation, up to the first user's text.

        A model trained on conversations continues from there with one of its own (Magpie, arXiv 2406.08464). Raises
        UserError for a template that puts nothing before the user's text.
        """
        mark, source = "\u2060user\u2060", "--self-generated-chat"  # no template has this character
        opening = Conversation(messages=[{"role": "user", "content": mark}], source=source)
        rendered = self._template.render(opening)
        text, found, _ = rendered.partition(mark)
        ids = self.vocabulary.encode(text, control=True)
        if not found or not ids:
            raise UserError(f"{source}: the chat template puts nothing before a user's text, or does not show it")
        return ids


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates
        raise UserError(f"{text!r:.60} is not text that can be written as UTF-8") from None
