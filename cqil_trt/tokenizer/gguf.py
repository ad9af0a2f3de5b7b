"""The tokenizer in a GGUF file's metadata, as llama.cpp reads it, written as tokenizer.json or tokenizer.model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cqil_trt.errors import UserError
from cqil_trt.gguf_files import gguf_parts, open_gguf
from cqil_trt.tokenizer.detokenizer import byte_fallback
from cqil_trt.tokenizer.settings import CONFIG, write_templates
from cqil_trt.tokenizer.vocabulary import JSON, MODEL

# Token types of tokenizer.ggml.token_type, which are sentencepiece's too.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# Tokens that end a text in any vocabulary, found by their own text (llama.cpp, llama-vocab.cpp).
_ENDS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<｜end▁of▁sentence｜>",
))  # fmt: skip
# Fill-in-the-middle tokens that also end a text: padding, repository and file, found by key, or without it by text.
_FIM_ENDS = {
    "fim_pad_token": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token": ("<|file_sep|>",),
}
_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The range contains spaces, which llama.cpp excludes.
_CJK = r"(?:(?!\s)[一-龥ࠀ-一가-퟿])+"
_UPPER, _LOWER = r"(?:(?=[\p{L}])(?:[^a-z]))", r"(?:(?=[\p{L}])(?:[^A-Z]))"


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split before merges apply: by each pattern in order. `ignore_merges`: a whole word that is a token
    is not split further. `add_bos`: whether a text begins with BOS unless the file says otherwise."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


def _mixed(ending: str, numbers: str) -> PreTokenizer:
    """Splits words after a lower-case letter before a capital, as GPT-4o and Mistral's tekken do."""
    word = r"[^\r\n\p{L}\p{N}]?"
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    cases = f"{word}{_UPPER}*{_LOWER}+{ending}|{word}{_UPPER}+{_LOWER}*{ending}"
    return PreTokenizer((f"{cases}|{numbers}|{rest}",))


_LLAMA3 = PreTokenizer((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), True, True)
_QWEN2 = PreTokenizer((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",))
_PLAIN = PreTokenizer((_GPT2,))
_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
# By tokenizer.ggml.pre, as in llama.cpp (llama-vocab.cpp).
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), PreTokenizer(_LLAMA3.patterns)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    "qwen35": PreTokenizer(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "mellum", "gigachat"), _PLAIN),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    "deepseek-v3": PreTokenizer(
        (
            r"\p{N}{1,3}",
            "[一-龥぀-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
    "seed-coder": PreTokenizer(
        (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",)
    ),
    "tekken": replace(_mixed("", r"\p{N}"), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _mixed(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")),
}


class GgufTokenizer:
    """The tokenizer in the metadata of the GGUF file at `path`. Raises UserError for what llama.cpp would refuse.

    `model`: tokenizer.ggml.model, None for a file without a tokenizer. `templates`: chat templates by name.
    """

    def __init__(self, path: Path):
        path = gguf_parts(path)[0]  # with the metadata
        self.source = str(path)
        self._fields = open_gguf(path).fields
        model = self._get("model", str)
        self.model: str | None = None if model in (None, "none", "no_vocab") else model

    def _get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        return self._value(f"tokenizer.ggml.{key}", kind, default)

    def _value(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A metadata value of type `kind`, or a list of such values if the default is a list.

        Raises UserError for another type.
        """
        field = self._fields.get(key)
        if field is None:
            return default
        try:
            value = field.contents()
        except UnicodeDecodeError:
            raise UserError(f"{self.source}: {key} is not UTF-8 text") from None
        items = value if isinstance(default, list) else [value]
        if not isinstance(items, list) or not all(
            isinstance(item, kind) and (kind is bool or not isinstance(item, bool)) for item in items
        ):
            raise UserError(f"{self.source}: {key} is {value!r:.60}, which is of another type than expected")
        return value

    def _id(self, key: str, default: int | None = None) -> int | None:
        """A token id; one beyond the vocabulary is ignored, as in llama.cpp."""
        value = self._get(f"{key}_id", int)
        if value is not None and value < 0:
            raise UserError(f"{self.source}: tokenizer.ggml.{key}_id is {value}, which is not a token id")
        count = len(self._get("tokens", str, []))
        known = [token for token in (value, default) if token is not None and (token < count or self.model is None)]
        return known[0] if known else None

    @property
    def templates(self) -> dict[str, str]:
        prefix = "tokenizer.chat_template"
        # The key with an s at the end lists the names.
        keys = [key for key in self._fields if key.startswith(prefix) and key != f"{prefix}s"]
        return {key.removeprefix(prefix).lstrip(".") or "default": self._value(key, str) for key in keys}

    @property
    def guesses(self) -> bool:
        """Whether the file does not say how text is split."""
        return self.model == "gpt2" and self._get("pre", str) is None

    @cached_property
    def tokens(self) -> list[str]:
        tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(self._get("tokens", str, []))]
        if not tokens:
            raise UserError(f"{self.source}: tokenizer.ggml.model without tokenizer.ggml.tokens")
        twice = [token for token, count in Counter(tokens).items() if count > 1]
        if twice:
            raise UserError(
                f"{self.source}: two tokens of its vocabulary are {twice[0]!r:.60}: leave the tokenizer out with "
                "--no-tokenizer"
            )
        return tokens

    @cached_property
    def types(self) -> list[int]:
        """The type of every token; tokens that end a text are control tokens, whatever the file says."""
        types = list(self._get("token_type", int, [])) or [_NORMAL] * len(self.tokens)
        if len(types) != len(self.tokens):
            raise UserError(f"{self.source}: {len(types)} token types for {len(self.tokens)} tokens")
        for token in self._ends_by_text(self.tokens):
            types[token] = _CONTROL
        return types

    def _ends_by_text(self, tokens: Sequence[str]) -> set[int]:
        ids = {token: number for number, token in enumerate(tokens)}
        found = {ids[text] for text in _ENDS if text in ids}
        for key, texts in _FIM_ENDS.items():
            if self._get(f"{key}_id", int) is None:
                # llama.cpp takes only one of them, but does not define which.
                found |= {ids[text] for text in texts if text in ids}
        return found

    def ends(self) -> tuple[int, ...]:
        """Every token that ends a text, in ascending order: found by key, and by text as in llama.cpp.

        They belong to the model, so this also works if the rest of the vocabulary cannot be read.
        """
        keys = {"eos_token": 2 if self.model == "llama" else None, "eot_token": None, "eom_token": None}
        by_key = (self._id(key, default) for key, default in (keys | dict.fromkeys(_FIM_ENDS)).items())
        found = {token for token in by_key if token is not None}
        if self.model is not None:
            found |= self._ends_by_text(self._get("tokens", str, []))
        return tuple(sorted(found))

    def write(self, directory: Path) -> None:
        """Writes the vocabulary, the settings and the chat templates."""
        if self.model == "gpt2":
            pre = self._get("pre", str, "default")
            ids = {token: number for number, token in enumerate(self.tokens)}
            backend = byte_level_tokenizer(ids, self._get("merges", str, []), pre, self.source)
            (directory / JSON).write_text(backend.to_str(), encoding="utf-8")
            add_bos = pre_tokenizer(pre, self.source).add_bos
        elif self.model == "llama":
            (directory / MODEL).write_bytes(self._sentencepiece())
            add_bos = True
        else:
            raise UserError(
                f"{self.source}: its tokenizer is of the form {self.model!r:.60}, which is not read (llama and gpt2 "
                "are): leave it out with --no-tokenizer"
            )
        self._write_settings(directory, add_bos)
        write_templates(directory, self.templates, self.source)

    def _sentencepiece(self) -> bytes:
        """A tokenizer.model with the file's pieces: llama.cpp merges them as sentencepiece does, by score."""
        from sentencepiece import sentencepiece_model_pb2 as format

        scores = self._get("scores", (int, float), []) or [0.0] * len(self.tokens)
        if len(scores) != len(self.tokens):
            raise UserError(f"{self.source}: {len(scores)} scores for {len(self.tokens)} tokens")
        unknown = self._id("unknown_token") or 0
        types = [_NORMAL if kind == _UNUSED else kind for kind in self.types]  # as in llama.cpp
        if _BYTE not in types:  # llama.cpp then finds byte tokens by their text
            types = [_BYTE if byte_fallback(token) else kind for token, kind in zip(self.tokens, types)]
        # sentencepiece requires exactly one unknown token.
        types = [_CONTROL if kind == _UNKNOWN else kind for kind in types]
        types[unknown] = _UNKNOWN
        proto = format.ModelProto()
        for token, score, kind in zip(self.tokens, scores, types):
            proto.pieces.add(piece=token, score=score, type=kind if kind in range(_NORMAL, _BYTE + 1) else _NORMAL)
        trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
        trainer.model_type = format.TrainerSpec.BPE
        trainer.byte_fallback = types.count(_BYTE) == 256
        trainer.vocab_size = len(self.tokens)
        ids = {"unk": unknown, "bos": self._id("bos_token", 1), "eos": self._id("eos_token", 2), "pad": None}
        for name, number in ids.items():
            setattr(trainer, f"{name}_id", -1 if number is None else number)
            if number is not None:
                setattr(trainer, f"{name}_piece", self.tokens[number])
        normalizer.name = "identity"
        normalizer.add_dummy_prefix = self._get("add_space_prefix", bool, True)
        normalizer.remove_extra_whitespaces = False
        normalizer.escape_whitespaces = True
        return proto.SerializeToString()

    def _write_settings(self, directory: Path, add_bos: bool) -> None:
        keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
        defaults = {"bos": 1, "eos": 2, "unk": 0} if self.model == "llama" else {}
        found = {name: self._id(f"{key}_token", defaults.get(name)) for name, key in keys.items()}
        named = {f"{name}_token": self.tokens[token] for name, token in found.items() if token is not None}
        added = {
            str(number): {"content": token, "special": kind != _USER_DEFINED}
            for number, (token, kind) in enumerate(zip(self.tokens, self.types))
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        }
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast" if self.model == "gpt2" else "LlamaTokenizer",
            **named,
            "add_bos_token": self._get("add_bos_token", bool, add_bos) and "bos_token" in named,
            "add_eos_token": self._get("add_eos_token", bool, False) and "eos_token" in named,
            "split_special_tokens": False,
            "added_tokens_decoder": added,
        }
        (directory / CONFIG).write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def pre_tokenizer(name: str, source: str) -> PreTokenizer:
    """The pre-tokenizer that llama.cpp calls `name`. Raises UserError, naming `source`, for an unknown one."""
    if name not in PRE_TOKENIZERS:
        raise UserError(
            f"{source}: tokenizer.ggml.pre {name!r:.60} is not known (known: {', '.join(PRE_TOKENIZERS)}): leave the "
            "tokenizer out with --no-tokenizer"
        )
    return PRE_TOKENIZERS[name]


def byte_level_tokenizer(
    ids: Mapping[str, int], merges: Sequence[str], pre: str, source: str, compose: bool = False
) -> Any:
    """A byte-level BPE tokenizer of `tokenizers`.

    `ids`: tokens in GPT-2's alphabet of bytes. `merges`: pairs of tokens separated by a space, in the order in which
    they are merged. `pre`: llama.cpp's name of the pre-tokenizer. `compose`: whether text is normalized to NFC first.
    Raises UserError, naming `source`, for a vocabulary that cannot be used.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    how = pre_tokenizer(pre, source)
    pairs = [merge.split(" ", 1) for merge in merges]
    # The library rejects merges that do not make a token; they never apply.
    known = [(a, b) for a, b in (pair for pair in pairs if len(pair) == 2) if a + b in ids and a in ids and b in ids]
    try:
        backend = Tokenizer(models.BPE(vocab=dict(ids), merges=known, ignore_merges=how.ignore_merges))
    except Exception as error:  # the library raises bare exceptions
        raise UserError(f"{source}: not a byte-level vocabulary ({error})") from None
    if compose:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in how.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend
