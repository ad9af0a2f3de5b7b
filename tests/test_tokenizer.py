"""Token ids against the libraries that own each form; text against the bytes that tokens stand for."""

import json
import random
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from support import SEED
from support.made_tokenizers import (
    JSON_FORMS,
    byte_level_gguf,
    byte_level_json,
    gpt2_alphabet,
    llama2_json,
    random_text,
    save_json,
    sentencepiece_gguf,
    sentencepiece_model,
)
from tokenizers import AddedToken, Regex, decoders, models
from tokenizers import Tokenizer as Backend

from cqil_trt.errors import UserError
from cqil_trt.tokenizer import Conversation, TextStream, Tokenizer, find_tokenizer, save_tokenizer
from cqil_trt.tokenizer.vocabulary import JsonVocabulary

CHECKED = settings(max_examples=150)
TEXTS = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30),
    st.lists(
        st.sampled_from(["hello", " ", "  ", "<s>", "</s>", "<tool>", "<|end|>", "\n", "é", "😀", "12"]), max_size=8
    ).map("".join),
)
SENTENCEPIECE = ("tokenizer.model", "sentencepiece GGUF")
FORMS = [*JSON_FORMS, "byte-level GGUF", *SENTENCEPIECE]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function: form → (its tokenizer in an engine, what its own library says)."""
    found = {}

    def make(form):
        if form not in found:
            root = tmp_path_factory.mktemp("tokenizer")
            source, engine, rng = root / "source", root / "engine", random.Random(SEED)
            source.mkdir()
            engine.mkdir()
            truth = None
            if form in JSON_FORMS:
                save_json(JSON_FORMS[form](), source)
                truth = Backend.from_file(str(source / "tokenizer.json"))
            elif form == "tokenizer.model":
                truth = SentencePieceProcessor(model_file=str(sentencepiece_model(source / "tokenizer.model")))
            elif form == "byte-level GGUF":
                source = byte_level_gguf(source / "model.gguf", "llama-bpe", rng)
            else:
                source = sentencepiece_gguf(source / "model.gguf", rng)
            save_tokenizer(source, engine)
            found[form] = Tokenizer(engine), truth
        return found[form]

    return make


def spelling(form, tokenizer, token):
    """A token as its vocabulary spells it; None for one that controls the model, or that there is not."""
    vocabulary = tokenizer.vocabulary
    if token >= vocabulary.size() or vocabulary.special_text(token) is not None:
        return None
    return (vocabulary._model.id_to_piece if form in SENTENCEPIECE else vocabulary.backend.id_to_token)(token)


def stands_for(form, piece):
    """The bytes of a token, from its spelling alone."""
    if form in ("byte level", "byte-level GGUF"):
        byte_of = {letter: byte for byte, letter in gpt2_alphabet().items()}
        # What is added to the vocabulary is spelled as it is.
        return piece.encode() if piece.startswith("<tool>") else bytes(byte_of[letter] for letter in piece)
    if form in SENTENCEPIECE and piece == "<unk>":
        return " \u2047 ".encode()
    if len(piece) == 6 and piece.startswith("<0x") and form != "metaspace decoder":
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def opening(form, pieces, parts):
    """The parts without the space that the vocabulary puts before a text."""
    if form == "metaspace decoder":
        return [stands_for(form, piece.replace("▁", "")) for piece in pieces[:1]] + parts[1:]
    if form in ("llama 2", "metaspace"):
        text = b"".join(parts)
        return [text.removeprefix(b" ")]
    if form in SENTENCEPIECE and pieces and pieces[0].startswith("▁"):
        return [stands_for(form, pieces[0][1:]), *parts[1:]]
    return parts


@pytest.mark.parametrize("form", FORMS)
@CHECKED
@given(data=st.data())
def test_any_tokens_read_as_the_utf8_of_their_bytes(form, made, data):
    tokenizer, _ = made(form)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary.size() + 3), max_size=14))
    pieces = [piece for token in ids if (piece := spelling(form, tokenizer, token)) is not None]
    parts = opening(form, pieces, [stands_for(form, piece) for piece in pieces])
    stream = tokenizer.stream()
    streamed = [stream.add(token) for token in ids] + [stream.finish()]
    assert "".join(streamed) == b"".join(parts).decode("utf-8", "replace") == tokenizer.decode(ids)


@pytest.mark.parametrize("form", FORMS)
@CHECKED
@given(text=TEXTS)
def test_text_becomes_the_tokens_of_its_own_library_and_comes_back(form, made, text):
    tokenizer, truth = made(form)
    ids = tokenizer.encode(text)
    if form in JSON_FORMS:
        assert ids == truth.encode(text).ids
        assert tokenizer.encode(text, special=False) == truth.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == truth.decode(ids)
    elif form == "tokenizer.model":
        assert ids == [truth.bos_id(), *truth.encode(text)]
        assert tokenizer.decode(ids) == truth.decode(truth.encode(text))
    if form in ("byte level", "llama 2", "tokenizer.model", "byte-level GGUF"):
        specials = filter(None, map(tokenizer.vocabulary.special_text, range(tokenizer.vocabulary.size())))
        # "▁" is how sentencepiece writes a space.
        if not any(mark in text for mark in ("▁", "<unk>", *specials)):
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("form", FORMS)
def test_transformers_is_not_needed(form, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it raises ImportError
    source, engine = tmp_path / "source", tmp_path / "engine"
    source.mkdir()
    engine.mkdir()
    if form in JSON_FORMS:
        save_json(JSON_FORMS[form](), source, chat_template="{{ messages[0].content }}")
    elif form == "tokenizer.model":
        sentencepiece_model(source / "tokenizer.model")
    else:
        make = sentencepiece_gguf if form == "sentencepiece GGUF" else partial(byte_level_gguf, pre="smollm")
        source = make(source / "model.gguf", rng=random.Random(SEED))
    save_tokenizer(source, engine)
    tokenizer = Tokenizer(engine)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    if form in JSON_FORMS:
        assert tokenizer.chat("hello") == tokenizer.encode("hello", special=False)


def test_a_backend_of_tokenizers_streams_too():
    backend = byte_level_json()
    stream, ids = TextStream(backend), backend.encode("héllo 😀").ids
    assert "".join([*map(stream.add, ids), stream.finish()]) == "héllo 😀"


LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize(
    "kind", ["LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast", None]
)
@pytest.mark.parametrize("legacy", [None, True, False])
def test_the_class_that_a_configuration_names_changes_nothing(kind, legacy, tmp_path):
    named = {} if kind is None else {"tokenizer_class": kind}
    extra = {} if legacy is None else {"legacy": legacy}
    source = save_json(llama2_json(), tmp_path / "source", **LLAMA, **named, **extra)
    (tmp_path / "engine").mkdir()
    save_tokenizer(source, tmp_path / "engine")
    assert (tmp_path / "engine" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    tokenizer, truth, rng = Tokenizer(tmp_path / "engine"), llama2_json(), random.Random(SEED)
    for text in ["  hello", "</s> hello", "hello</s>hello <s> hello", "", *(random_text(rng) for _ in range(50))]:
        assert tokenizer.encode(text) == truth.encode(text).ids


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("add_eos", [None, True, False])
@pytest.mark.parametrize("in_file", [True, False])
def test_bos_and_eos_as_the_configuration_says(add_bos, add_eos, in_file, tmp_path):
    backend = llama2_json()
    if not in_file:
        backend.post_processor = None
    flags = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    given = {name: value for name, value in flags.items() if value is not None}
    tokenizer = Tokenizer(save_json(backend, tmp_path / "source", **LLAMA, **given))
    inner = backend.encode("hello", add_special_tokens=False).ids
    bos = in_file if add_bos is None else add_bos
    assert tokenizer.encode("hello") == [1] * bos + inner + [2] * bool(add_eos)
    assert tokenizer.encode("") == [1] * bos + [2] * bool(add_eos)


def test_tokens_that_the_configuration_adds(tmp_path):
    backend, count = llama2_json(), llama2_json().get_vocab_size()
    added = {
        str(count): {"content": "<pad>", "special": True},
        str(count + 1): {"content": "<think>", "special": False, "lstrip": True},
    }
    tokenizer = Tokenizer(
        save_json(backend, tmp_path / "source", **LLAMA, pad_token="<pad>", added_tokens_decoder=added)
    )
    ids = tokenizer.encode("a <think>b<pad>", special=False)
    a, b = (backend.encode(text, add_special_tokens=False).ids for text in "ab")
    assert ids == [*a, count + 1, *b, count]  # with what this form puts before a text, and without the space
    assert tokenizer.decode(ids) == "a<think> b" and tokenizer.special("pad_token") == count
    # Before transformers 4.33 they had a file of their own, and their names another.
    older = save_json(backend, tmp_path / "older")
    (older / "added_tokens.json").write_text(json.dumps({"<pad>": count}))
    (older / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>", "eos_token": {"content": "</s>"}}))
    tokenizer = Tokenizer(older)
    assert tokenizer.encode("<pad>", special=False) == [count] == [tokenizer.special("pad_token")]
    assert tokenizer.decode([count, 2]) == "" and tokenizer.special("eos_token") == 2


def test_what_lies_next_to_a_whole_configuration_is_not_read(tmp_path):
    """transformers reads special_tokens_map.json and added_tokens.json only where the decoder is missing."""
    backend, count = llama2_json(), llama2_json().get_vocab_size()
    older = save_json(backend, tmp_path / "older", eos_token="<unk>")
    whole = save_json(backend, tmp_path / "whole", eos_token="</s>", added_tokens_decoder={})
    for directory in (older, whole):
        (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<s>", "pad_token": "</s>"}))
        # The file's own flags of a token hold where this one gives its id alone.
        ids = {"<tool>": backend.token_to_id("<tool>"), "</s>": 2} | ({} if directory == older else {"<x>": count + 9})
        (directory / "added_tokens.json").write_text(json.dumps(ids))
    assert Tokenizer(older).special("eos_token") == 1 and Tokenizer(older).special("pad_token") == 2
    assert Tokenizer(whole).special("eos_token") == 2 and Tokenizer(whole).special("pad_token") is None
    for directory in (older, whole):
        tokenizer = Tokenizer(directory)
        for text in ("hello <tool> hello", "a</s> b"):
            assert tokenizer.encode(text) == backend.encode(text).ids
            assert tokenizer.decode(tokenizer.encode(text)) == backend.decode(backend.encode(text).ids)


def test_naming_a_token_special_leaves_its_other_flags(tmp_path):
    tokenizer = Tokenizer(save_json(llama2_json(), tmp_path / "source", extra_special_tokens=["<tool>"]))
    ids = llama2_json().encode("hello <tool> hello").ids
    assert tokenizer.encode("hello <tool> hello") == ids and tokenizer.decode(ids) == "hello hello"


def test_bos_of_the_configuration_takes_the_place_of_the_files(tmp_path):
    for add, expected in ((True, [0]), (False, [])):
        source = save_json(llama2_json(), tmp_path / str(add), bos_token="<unk>", add_bos_token=add)
        inner = llama2_json().encode("hello", add_special_tokens=False).ids
        assert Tokenizer(source).encode("hello") == expected + inner


def test_a_named_special_token_stands_for_no_text(tmp_path):
    backend = byte_level_json()
    backend.add_tokens([AddedToken("<|stop|>", special=False)])
    stop = backend.token_to_id("<|stop|>")
    plain = Tokenizer(save_json(backend, tmp_path / "plain"))
    named = Tokenizer(save_json(backend, tmp_path / "named", eos_token="<|stop|>"))
    assert plain.decode([stop]) == "<|stop|>" and named.decode([stop]) == "" and named.text_of(stop) == "<|stop|>"


def test_special_tokens_may_be_ordinary_text(tmp_path):
    tokenizer = Tokenizer(save_json(llama2_json(), tmp_path / "source", **LLAMA, split_special_tokens=True))
    assert 2 not in tokenizer.encode("a</s>") and tokenizer.decode(tokenizer.encode("a</s>")) == "a</s>"


def test_cutting_and_padding_saved_from_training_are_left_out(tmp_path):
    backend = byte_level_json()
    backend.enable_truncation(5)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer(save_json(backend, tmp_path / "source"))
    text = "a longer text than five tokens"
    assert tokenizer.encode(text) == byte_level_json().encode(text).ids
    assert tokenizer.encode("a") == byte_level_json().encode("a").ids


@pytest.mark.parametrize(
    "config",
    [
        None,
        {"tokenizer_class": "LlamaTokenizer", **LLAMA, "legacy": False},
        {"tokenizer_class": "LLaMATokenizer", "bos_token": "", "eos_token": "", "unk_token": ""},
        {"auto_map": {"AutoTokenizer": ["tokenization_llama.LlamaTokenizer", None]}, **LLAMA, "pad_token": None},
        {**LLAMA, "add_bos_token": False, "add_eos_token": True},
    ],
)
def test_tokenizer_model_with_any_configuration(config, tmp_path):
    model = SentencePieceProcessor(model_file=str(sentencepiece_model(tmp_path / "tokenizer.model")))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, rng = Tokenizer(tmp_path), random.Random(SEED)
    fixed = [
        " hello",
        "  two  spaces",
        "a\nb\n\n  c",
        "123 4567",
        "<tool>x [INST]",
        "<s>a</s> <ctrl>",
        "😀 안녕",
        "",
        "x ",
    ]
    for text in [*fixed, *(random_text(rng) for _ in range(100))]:
        ids = model.encode(text)
        before, after = ([], [2]) if config and config.get("add_eos_token") else ([1], [])
        assert tokenizer.encode(text) == before + ids + after
        assert tokenizer.decode(tokenizer.encode(text)) == model.decode(ids)
    assert tokenizer.special("bos_token") == 1 and tokenizer.special("eos_token") == 2


@pytest.mark.parametrize(
    "options",
    [{}, {"add_dummy_prefix": False}, {"remove_extra_whitespaces": True}, {"model_type": "unigram", "vocab_size": 315}],
)
def test_sentencepiece_models_decode_as_sentencepiece_does(options, tmp_path):
    path = sentencepiece_model(tmp_path / "tokenizer.model", **options)
    model, tokenizer, rng = SentencePieceProcessor(model_file=str(path)), Tokenizer(tmp_path), random.Random(SEED)
    others = [token for token in range(model.get_piece_size()) if not model.is_byte(token)]
    for _ in range(300):
        ids = [rng.choice(others) for _ in range(rng.randrange(8))]
        assert tokenizer.decode(ids) == model.decode(ids), [model.id_to_piece(token) for token in ids]


def test_tokens_added_to_a_tokenizer_model(tmp_path):
    model = SentencePieceProcessor(model_file=str(sentencepiece_model(tmp_path / "tokenizer.model")))
    size = model.get_piece_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size, "<|im_start|>": size + 1}))
    tokenizer = Tokenizer(tmp_path)
    expected = [1, size + 1, *model.encode("user\nhello"), size, *model.encode("\n")]
    assert tokenizer.encode("<|im_start|>user\nhello<|im_end|>\n") == expected
    assert tokenizer.decode([size + 1, *model.encode("hello")]) == "<|im_start|> hello"


def test_user_defined_pieces_that_are_named_special(tmp_path):
    model = SentencePieceProcessor(model_file=str(sentencepiece_model(tmp_path / "tokenizer.model")))
    ids = model.encode("a<tool>b[INST]")
    assert Tokenizer(tmp_path).decode(ids) == "a<tool>b[INST]"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<tool>"}))
    tokenizer, token = Tokenizer(tmp_path), model.piece_to_id("<tool>")
    assert tokenizer.encode("a<tool>b[INST]")[1:] == ids and tokenizer.decode(ids) == "ab[INST]"
    assert tokenizer.vocabulary.special_text(token) == "<tool>" and token not in tokenizer.plain_tokens()


def test_control_tokens_of_a_tokenizer_model_in_a_chat_template(tmp_path):
    """As Meta's own code builds a conversation: BOS by its id, the text between tokenized on its own."""
    model = SentencePieceProcessor(model_file=str(sentencepiece_model(tmp_path / "tokenizer.model")))
    template = "{% for m in messages %}{{ bos_token }}[INST] {{ m.content }} [/INST]{{ eos_token }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert Tokenizer(tmp_path).chat("hello") == [1, *model.encode("[INST] hello [/INST]"), 2]


def test_vocab_and_merges_files(tmp_path):
    """Older Qwen2 checkpoints: the pre-tokenizer is that of the class, which Qwen publishes in tokenizer.json too."""
    from tokenizers import normalizers, pre_tokenizers

    backend = byte_level_json()
    backend.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    pattern = words + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    truth = Backend(models.BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))
    truth.normalizer = normalizers.NFC()
    truth.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    (tmp_path / "engine").mkdir()
    save_tokenizer(tmp_path, tmp_path / "engine")
    tokenizer, rng = Tokenizer(tmp_path / "engine"), random.Random(SEED)
    for text in (random_text(rng).replace("ſ", "") for _ in range(100)):
        assert tokenizer.encode(text) == truth.encode(text).ids
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "OtherTokenizer"}))
    with pytest.raises(UserError, match="do not say how text is split.*OtherTokenizer"):
        save_tokenizer(tmp_path, tmp_path / "engine")


def test_a_tokenizer_that_is_larger_than_the_model(tmp_path):
    from support.checkpoints import make_model

    from cqil_trt.builder import BuildRequest, prepare

    size = byte_level_json().get_vocab_size()
    for vocab_size, noted in ((size, False), (size - 2, True)):
        model = save_json(byte_level_json(), make_model(tmp_path / str(vocab_size), vocab_size=vocab_size))
        notes = prepare(BuildRequest(model=model, p=1, output=tmp_path / "engine")).notes
        assert any(f"the tokenizer has {size} tokens" in note for note in notes) == noted


def test_an_adapters_tokenizer_and_template_come_before_the_models(tmp_path):
    model = save_json(llama2_json(), tmp_path / "model", chat_template="model")
    plain, template, whole = (tmp_path / name for name in ("plain", "template", "whole"))
    plain.mkdir()
    template.mkdir()
    (template / "chat_template.jinja").write_text("adapter {{ messages[0].content }}")
    save_json(byte_level_json(), whole)
    for adapter, places in {plain: (model, model), template: (model, template), whole: (whole, model)}.items():
        found = find_tokenizer(model, adapter)
        assert (found.place, found.template) == places
    (tmp_path / "engine").mkdir()
    files = save_tokenizer(model, tmp_path / "engine", template)
    assert {path.name for path in files} == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    tokenizer = Tokenizer(tmp_path / "engine")
    assert tokenizer.chat("x") == llama2_json().encode("adapter x", add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["../../../escaped", "/tmp/escaped", "a/b", "x\0", "", ".hidden"])
def test_chat_templates_are_written_nowhere_else(name, tmp_path):
    named = [{"name": "default", "template": "a"}, {"name": name, "template": "b"}]
    model = save_json(llama2_json(), tmp_path / "model")
    adapter = save_json(llama2_json(), tmp_path / "adapter", chat_template=named)
    (adapter / "tokenizer.json").unlink()
    (tmp_path / "deep" / "engine").mkdir(parents=True)
    before = {*tmp_path.rglob("*")}
    with pytest.raises(UserError, match="is no name for a chat template"):
        save_tokenizer(model, tmp_path / "deep" / "engine", adapter)
    written = {*tmp_path.rglob("*")} - before
    assert all(path.is_relative_to(tmp_path / "deep" / "engine") for path in written)


def test_an_adapters_template_leaves_the_models_others(tmp_path):
    named = [{"name": "default", "template": "model"}, {"name": "rank0", "template": "r"}]
    model = save_json(llama2_json(), tmp_path / "model", chat_template=named)
    adapter = save_json(
        llama2_json(), tmp_path / "adapter", chat_template=[{"name": "tool_use", "template": "adapter"}]
    )
    (adapter / "tokenizer.json").unlink()
    (tmp_path / "engine").mkdir()
    save_tokenizer(model, tmp_path / "engine", adapter)
    tokenizer = Tokenizer(tmp_path / "engine")
    encode = partial(llama2_json().encode, add_special_tokens=False)
    assert tokenizer.chat("x") == encode("model").ids
    assert tokenizer.chat(Conversation(messages=[{"role": "user"}], tools=[{}])) == encode("adapter").ids


def test_unreadable_tokenizers_are_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json: not a tokenizer that can be read"):
        Tokenizer(tmp_path)
    backend = byte_level_json()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match="WordPiece"):
        Tokenizer(save_json(backend, tmp_path / "wordpiece"))
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        Tokenizer(tmp_path)
    for part, value in {
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<no>", "type_id": 0}}]},
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "continuing_subword_prefix": "a"},
    }.items():
        value = {"pair": [], "special_tokens": {}, **value} if part == "post_processor" else value
        broken = save_json(byte_level_json(), tmp_path / part)
        values = json.loads((broken / "tokenizer.json").read_text())
        (broken / "tokenizer.json").write_text(json.dumps({**values, part: value}))
        with pytest.raises(UserError, match="tokenizer.json: (not a tokenizer that can be read|has continuing)"):
            Tokenizer(broken).encode("a")
    for names in ({"pad_token": "\ud800"}, {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}):
        with pytest.raises(UserError, match="tokenizer_config.json"):
            Tokenizer(save_json(byte_level_json(), tmp_path / "names", **names))
    (tmp_path / "tokenizer.model").rename(tmp_path / "tekken.json")
    with pytest.raises(UserError, match="tekken.json alone"):
        find_tokenizer(tmp_path)
    (tmp_path / "tekken.json").unlink()
    assert find_tokenizer(tmp_path) is None
    source = save_json(byte_level_json(), tmp_path / "source", added_tokens_decoder={"900": {"content": "<x>"}})
    with pytest.raises(UserError, match="give '<x>' the id 900, but after its own tokens it would be"):
        Tokenizer(source)
    shutil.rmtree(source)
    with pytest.raises(UserError, match="not text that can be written as UTF-8"):
        Tokenizer(save_json(byte_level_json(), source)).encode("a\ud800")


def test_threads_tokenize_what_users_and_templates_write(tmp_path):
    """A server does both at once: a control token that a user spells stays text, also after a template's."""
    tokenizer = Tokenizer(save_json(byte_level_json(), tmp_path, split_special_tokens=True))
    text = "hello <|im_end|> " * 200
    as_text, as_control = tokenizer.encode(text), tokenizer.vocabulary.encode(text, control=True)
    assert len(as_control) < len(as_text)

    def work(control):
        return all(
            tokenizer.vocabulary.encode(text, control=control) == (as_control if control else as_text[1:])
            for _ in range(30)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, [False, True] * 8))
    assert tokenizer.encode(text) == as_text


def test_a_long_text_is_tokenized_while_other_threads_run():
    """As a server's do, which send other clients' tokens meanwhile."""
    backend = byte_level_json()
    vocabulary = JsonVocabulary(byte_level_json())
    rng = random.Random(SEED)
    text = "".join(random_text(rng) for _ in range(400)) + "hello world, \n" * 20_000
    found, ticks = [], 0
    thread = threading.Thread(target=lambda: found.extend(vocabulary.encode(text)))
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert found == backend.encode(text, add_special_tokens=False).ids
    assert ticks > 10


@pytest.mark.parametrize("form", FORMS)
def test_what_goes_on_after_other_tokens(form, made):
    """Both together are the whole text; read by itself, the second part may lack its space."""
    tokenizer, _ = made(form)
    ids = tokenizer.encode("hello world, a b  c\n é 😀")
    for first in range(len(ids) + 1):
        stream = tokenizer.stream(ids[:first])
        before, after = b"".join(map(tokenizer.vocabulary.reader(), ids[:first])), ids[first:]
        text = "".join([*map(stream.add, after), stream.finish()])
        if before.decode(errors="ignore").encode() == before:  # whole characters
            assert before.decode() + text == tokenizer.decode(ids)
    assert all(tokenizer.text_of(token).encode() == tokenizer.bytes_of(token) for token in tokenizer.encode(" b c"))
