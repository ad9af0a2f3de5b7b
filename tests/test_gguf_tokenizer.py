"""Tokenizers in GGUF files, against llama.cpp itself."""

import json
import random
import time
import urllib.request

import pytest
from support import SEED
from support.made_tokenizers import GGUF_SPECIALS, byte_level_gguf, finish, random_text, sentencepiece_gguf
from support.ports import free_port

from cqil_trt.errors import UserError
from cqil_trt.tokenizer import Tokenizer, find_tokenizer, save_tokenizer
from cqil_trt.tokenizer.gguf import PRE_TOKENIZERS, GgufTokenizer

# One of each different way to split text; the other names are the same.
PRE = {how: name for name, how in reversed(PRE_TOKENIZERS.items())}.values()


@pytest.fixture
def llama_cpp():
    """A function: GGUF file → (text, add_special) → token ids, as llama.cpp has them."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp (the package xllamacpp) is not installed")
    servers = []

    def load(path):
        port = free_port()
        options = xllamacpp.CommonParams()
        options.model.path, options.port, options.n_ctx, options.warmup, options.verbosity = (
            str(path),
            port,
            64,
            False,
            -1,
        )
        options.cpuparams.n_threads = 1
        servers.append(xllamacpp.Server(options))
        # Answered by the server's own loop: one that is ended before that has begun never ends.
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/slots", timeout=300):
            pass

        def tokenize(text, add_special=True):
            body = json.dumps({"content": text, "add_special": add_special, "parse_special": True}).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/tokenize", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.load(answer)["tokens"]

        return tokenize

    yield load
    servers.clear()


def engine_tokenizer(path, directory):
    directory.mkdir()
    save_tokenizer(path, directory)
    return Tokenizer(directory)


def texts(rng, specials, count):
    for number in range(count):
        yield random_text(rng) if number % 3 else random_text(rng, 10) + rng.choice(specials) + random_text(rng, 10)


@pytest.mark.parametrize("pre", PRE)
def test_byte_level_vocabularies(pre, llama_cpp, tmp_path):
    rng = random.Random(f"{SEED} {pre}")
    path = byte_level_gguf(tmp_path / "model.gguf", pre, rng)
    expected, tokenizer = llama_cpp(path), engine_tokenizer(path, tmp_path / "engine")
    for text in texts(rng, list(GGUF_SPECIALS), 60):
        for around in (True, False):
            assert tokenizer.encode(text, around) == expected(text, around), text


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_vocabularies(prefix, llama_cpp, tmp_path):
    rng = random.Random(SEED)
    path = sentencepiece_gguf(tmp_path / "model.gguf", rng, prefix)
    expected, tokenizer = llama_cpp(path), engine_tokenizer(path, tmp_path / "engine")
    specials = ["<s>", "</s>", "<|im_end|>", "<tool>", "  ", "<unk>", "<0x41>"]
    for text in texts(rng, specials, 200):
        for around in (True, False):
            assert tokenizer.encode(text, around) == expected(text, around), text


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm"])
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_bos_comes_by_the_files_word_or_by_the_pre_tokenizer(pre, add_bos, llama_cpp, tmp_path):
    more = {} if add_bos is None else {"add_add_bos_token": add_bos}
    path = byte_level_gguf(tmp_path / "model.gguf", pre, random.Random(SEED), **more)
    assert engine_tokenizer(path, tmp_path / "engine").encode("hello") == llama_cpp(path)("hello")


def test_a_file_that_does_not_say_how_text_is_split(llama_cpp, tmp_path):
    path = byte_level_gguf(tmp_path / "model.gguf", None, random.Random(SEED))
    assert find_tokenizer(path).guesses
    expected, tokenizer = llama_cpp(path), engine_tokenizer(path, tmp_path / "engine")
    for text in texts(random.Random(SEED), list(GGUF_SPECIALS), 30):
        assert tokenizer.encode(text) == expected(text)


@pytest.mark.slow
def test_the_demo_model(llama_cpp, tmp_path):
    from cqil_trt.demo import demo_model

    path = demo_model()
    expected, tokenizer, rng = llama_cpp(path), engine_tokenizer(path, tmp_path / "engine"), random.Random(SEED)
    for text in texts(rng, ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>"], 60):
        assert tokenizer.encode(text) == expected(text)
    chat = tokenizer.chat("Why?")
    assert "".join(map(tokenizer.text_of, chat)).endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")


def test_what_ends_a_text(tmp_path):
    """llama-vocab.cpp: eos, eot and eom by key, and the tokens that its list of texts names."""
    path = byte_level_gguf(tmp_path / "model.gguf", "llama-bpe", random.Random(SEED), add_eot_token_id=70)
    tokenizer = GgufTokenizer(path)
    ids = {token: number for number, token in enumerate(tokenizer.tokens)}
    assert tokenizer.ends() == tuple(sorted([70, ids["<|im_end|>"], ids["<|endoftext|>"]]))
    engine = engine_tokenizer(path, tmp_path / "engine")
    assert engine.decode([ids["<|endoftext|>"]]) == "" and engine.decode([ids["<tool>"]]) == "<tool>"


def test_chat_templates_by_name(tmp_path):
    template = [
        {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"},
        {"name": "tool_use", "template": "TOOLS {{ tools | length }}"},
    ]
    path = byte_level_gguf(tmp_path / "model.gguf", "qwen2", random.Random(SEED), add_chat_template=template)
    tokenizer = engine_tokenizer(path, tmp_path / "engine")
    assert tokenizer.chat("x") == tokenizer.encode("<|bos|>x")
    from cqil_trt import Conversation

    conversation = Conversation(messages=[{"role": "user", "content": "x"}], tools=[{"type": "function"}])
    assert tokenizer.chat(conversation) == tokenizer.encode("TOOLS 1")


@pytest.mark.parametrize(
    "method, key, value, message",
    [
        ("add_int32", "tokenizer.ggml.eot_token_id", -1, "eot_token_id is -1"),
        ("add_string", "tokenizer.ggml.eot_token_id", "2", "another type"),
        ("add_string", "tokenizer.ggml.add_bos_token", "no", "another type"),
        ("add_array", "tokenizer.ggml.merges", [1, 2], "another type"),
        ("add_uint32", "tokenizer.ggml.token_type", 1, "another type"),
        ("add_string", "tokenizer.chat_template./tmp/escaped", "x", "is no name for a chat template"),
    ],
)
def test_metadata_of_other_types_is_refused(method, key, value, message, tmp_path):
    def edit(writer):
        for part in writer.kv_data:
            part.pop(key, None)
        getattr(writer, method)(key, value)

    path = byte_level_gguf(tmp_path / "model.gguf", "qwen2", random.Random(SEED), edit)
    with pytest.raises(UserError, match=message):
        engine_tokenizer(path, tmp_path / "engine")
        GgufTokenizer(path).ends()


def test_a_vocabulary_that_names_a_token_twice(tmp_path):
    """Found at once, and no matter to an engine without a tokenizer."""
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "llama")
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(f"t{number}" for number in range(60_000)), "t59999"])
    writer.add_eos_token_id(7)
    finish(writer)
    tokenizer, began = GgufTokenizer(tmp_path / "model.gguf"), time.process_time()
    with pytest.raises(UserError, match="two tokens of its vocabulary are 't59999'.*--no-tokenizer"):
        tokenizer.write(tmp_path)
    assert tokenizer.ends() == (7,) and time.process_time() - began < 10


def test_what_llama_cpp_refuses_is_refused(tmp_path):
    path = byte_level_gguf(tmp_path / "unknown.gguf", "no-such-pre", random.Random(SEED))
    with pytest.raises(UserError, match="tokenizer.ggml.pre 'no-such-pre' is not known"):
        engine_tokenizer(path, tmp_path / "engine")
    path = byte_level_gguf(tmp_path / "form.gguf", "qwen2", random.Random(SEED), add_tokenizer_model="t5")
    with pytest.raises(UserError, match="of the form 't5', which is not read"):
        engine_tokenizer(path, tmp_path / "other")
