"""Small tokenizers of every form that models come with, as their makers' libraries save them."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedTokenizerFast

CORPUS = [
    "hello world, this is a small test of a tokenizer",
    "def f(x):\n    return x + 1\n",
    "the quick brown fox jumps over the lazy dog 12345 67",
    "安 你好 世界 😀 emoji é ü ß",
] * 10
# Characters that tokenizers treat differently: words, digits, marks, spaces, scripts, signs.
ALPHABET = (
    list("abcXYZ 0123456789'\"!?.,;:()[]{}<>=+-*/^~|`$#@&%_\\\n\r\t")
    + ["  ", "\n\n", " \n", "'s", "'S", "'LL", "é", "ß", "Ж", "你", "好", "の", "カ", "한", "😀", "▁"]
    + ["\u00a0", "\u2003", "\u3000", "\u0301", "ſ", "٣", "Ⅷ", "½", "ǅ", "\u200d", "।", "“", "…", "€"]
    + ["\x0b", "\x0c", "\x85", "\u2028", "ª", "ʰ", "𝟘"]
)


def random_text(rng: random.Random, longest: int = 40) -> str:
    return "".join(rng.choice(ALPHABET) for _ in range(rng.randrange(longest)))


def byte_level_json() -> Tokenizer:
    """As Llama 3, Qwen and SmolLM ship it."""
    backend = Tokenizer(models.BPE())
    pattern = r"\s?\p{L}+|\s?\p{N}|\s?[^\s\p{L}\p{N}]+|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<|begin|>", "<|end|>", "<|im_end|>")])
    backend.add_tokens([AddedToken("<tool> é", special=False)])
    begin = backend.token_to_id("<|begin|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B", special_tokens=[("<|begin|>", begin)]
    )
    return backend


def _sentencepiece_like() -> Tokenizer:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for piece in ["▁", "h", "e", "l", "o", "w", "r", "d", "a", "b", "t", "s", ".", "é", "你", "\n"]:
        vocabulary[piece] = len(vocabulary)
    merges = []
    for pair in ("▁ ▁", "l l", "h e", "he ll", "hell o", "▁ hello", "▁▁ ▁▁", "▁ t", "▁ w"):
        first, second = pair.split(" ")
        merges.append((first, second))
        vocabulary[first + second] = len(vocabulary)
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = [AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")]
    backend.add_special_tokens(specials)
    backend.add_tokens([AddedToken("<tool>", special=False), AddedToken("    ", special=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return backend


def llama2_json() -> Tokenizer:
    """As Llama 2, TinyLlama and Vicuna ship it: a normalizer that puts a space before the text."""
    backend = _sentencepiece_like()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def metaspace_json() -> Tokenizer:
    """As Mistral v0.3 ships it: a pre-tokenizer that does."""
    backend = _sentencepiece_like()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    return backend


def metaspace_decoder_json() -> Tokenizer:
    """With Metaspace as the decoder too, and no byte fallback."""
    backend = Tokenizer(
        models.Unigram([("<unk>", 0.0), *((piece, -1.0 - n) for n, piece in enumerate("▁abcdehlo."))], 0)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<unk>", special=True)])
    return backend


JSON_FORMS = {
    "byte level": byte_level_json,
    "llama 2": llama2_json,
    "metaspace": metaspace_json,
    "metaspace decoder": metaspace_decoder_json,
}


def sentencepiece_model(path: Path, **options: object) -> Path:
    """tokenizer.model as LLaMA's was trained, with user-defined and control symbols."""
    import sentencepiece

    values = {
        "vocab_size": 360,
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.999,
        "user_defined_symbols": ["<tool>", "[INST]"],
        "control_symbols": ["<ctrl>"],
        **options,
    }
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, minloglevel=2, **values
    )
    path.write_bytes(written.getvalue())
    return path


def _writer(path: Path, tokens: list[str]) -> gguf.GGUFWriter:
    """A GGUF file of a one-layer model whose vocabulary is `tokens`; its metadata can still be added."""
    import gguf

    writer, width = gguf.GGUFWriter(str(path), "llama"), 32
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 2)
    rng = np.random.default_rng(len(tokens))
    square, table, row = (width, width), (len(tokens), width), (width,)
    shapes = {"token_embd": table, "output_norm": row, "output": table}
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{name}": square for name in names}
    shapes |= {f"blk.0.{name}": row for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    """Writes the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# What GGUF vocabularies hold next to text: tokens that control the model, one the user defined, and an end of text that
# the file does not mark.
GGUF_SPECIALS = {"<|bos|>": 3, "<|im_end|>": 3, "<tool>": 4, "<|endoftext|>": 1}


def byte_level_gguf(
    path: Path,
    pre: str | None,
    rng: random.Random,
    edit: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
    **more: object,
) -> Path:
    """A byte-level vocabulary whose merges reach over any pre-tokenizer's borders, so that its splits show.

    `more`: methods of the writer and what they are called with; `edit` has the last word.
    """
    letters = gpt2_alphabet()
    tokens, merges = [letters[byte] for byte in range(256)], []
    words = [[letters[byte] for byte in random_text(rng, 60).encode()] for _ in range(300)]
    for _ in range(200):
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        first, second = rng.choice(pairs.most_common(15))[0]
        merges.append(f"{first} {second}")
        if first + second not in tokens:
            tokens.append(first + second)
        words = [_merge(word, first, second) for word in words]
    types = [1] * len(tokens) + list(GGUF_SPECIALS.values())
    tokens += GGUF_SPECIALS
    writer = _writer(path, tokens)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index("<|bos|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    for name, value in more.items():
        getattr(writer, name)(value)
    edit(writer)
    finish(writer)
    return path


def _merge(word: list[str], first: str, second: str) -> list[str]:
    merged: list[str] = []
    for letter in word:
        # A letter that was just merged is no first half of the next pair.
        if merged and letter == second and merged[-1] == first:
            merged[-1] = first + second
        else:
            merged.append(letter)
    return merged


def gpt2_alphabet() -> dict[int, str]:
    """The letter that stands for each byte in GPT-2's vocabulary, by its published construction."""
    kept = (
        list(range(ord("!"), ord("~") + 1)) + list(range(ord("¡"), ord("¬") + 1)) + list(range(ord("®"), ord("ÿ") + 1))
    )
    letters, extra = {byte: chr(byte) for byte in kept}, 0
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + extra)
            extra += 1
    return letters


def sentencepiece_gguf(path: Path, rng: random.Random, prefix: bool = True) -> Path:
    """A vocabulary of llama.cpp's SPM form, with random pieces and scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types, scores = [2, 3, 3, *[6] * 256], [0.0] * 259
    single = [
        character for character in ALPHABET if len(character) == 1 and character not in " \n\r\t\x0b\x0c\x85\u2028"
    ]
    base = list(dict.fromkeys([*single[:60], "▁"]))
    pieces = list(base)
    for _ in range(120):
        piece = rng.choice(pieces) + rng.choice(base)
        if piece not in pieces:
            pieces.append(piece)
    for number, piece in enumerate(pieces):
        tokens.append(piece)
        types.append(1)
        scores.append(-1000.0 - number if piece in base else -float(rng.randrange(40)))
    for token, kind in (("<tool>", 4), ("  ", 4), ("<|im_end|>", 3)):
        tokens.append(token)
        types.append(kind)
        scores.append(0.0)
    writer = _writer(path, tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if not prefix:
        writer.add_add_space_prefix(False)
    finish(writer)
    return path


def save_json(backend: Tokenizer, directory: Path, **config: object) -> Path:
    """A checkpoint's tokenizer files: tokenizer.json, and tokenizer_config.json with `config` where there is any."""
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def save_byte_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes: token 3 + b is byte b. Multi-byte characters take several tokens."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<bos>", "<eos>"]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(special + alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}{% endfor %}\n"
    tokenizer.save_pretrained(directory)
    return tokenizer
