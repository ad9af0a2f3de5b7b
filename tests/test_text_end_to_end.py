"""Checkpoints as people have them, through the commands: text in, text out, and the ids compared."""

import json
import random
import re

import pytest
from support import SEED, write_json
from support.checkpoints import make_adapter, make_first_llama, make_model
from support.made_tokenizers import byte_level_gguf, byte_level_json, llama2_json, save_json, sentencepiece_model
from support.processes import assert_user_error, build, mpirun

from cqil_trt.tokenizer import Tokenizer


@pytest.mark.slow
def test_the_first_llama(tmp_path):
    """LLaMA as it was first converted: .bin in parts, tokenizer.model alone, the names and numbers of early 2023."""
    model = make_first_llama(tmp_path / "llama", vocab_size=360)
    sentencepiece_model(model / "tokenizer.model")
    template = "{% for m in messages %}USER: {{ m.content }} ASSISTANT:{% endfor %}"
    named = {"tokenizer_class": "LLaMATokenizer", "bos_token": "", "eos_token": "", "unk_token": ""}
    write_json(model / "tokenizer_config.json", {**named, "model_max_length": 10**30, "chat_template": template})
    engine = tmp_path / "engine"
    done = build("--model", model, "--p", 2, "--start", 2, "--end", 6, "--max-seq-len", 128, "--output", engine)
    assert done.returncode == 0, done.stderr
    found = {}
    for name, flags in {"text": [], "chat": ["--chat"]}.items():
        report = tmp_path / f"{name}.json"
        flags = [*flags, "--prompt", "the quick  fox\n12", "--max-new-tokens", 8, "--json", report]
        done = mpirun(2, "--engine", engine, *flags)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(report.read_text())["completions"][0]
    from sentencepiece import SentencePieceProcessor

    truth = SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    assert found["text"]["prompt_tokens"] == [1, *truth.encode("the quick  fox\n12")]
    assert found["chat"]["prompt_tokens"] == truth.encode("USER: the quick  fox\n12 ASSISTANT:")
    ids = [token for token in found["text"]["tokens"] if token != 2]
    assert found["text"]["text"] == Tokenizer(engine).decode(ids)
    report = tmp_path / "validation.json"
    done = mpirun(2, "--engine", engine, "--validate", "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    tokens = json.loads(report.read_text())["validation"]["tokens"]
    assert tokens["judge"] == str(model.resolve()) and tokens["equal"] == tokens["texts"] > 30
    assert f"token ids of {tokens['texts']} texts against {tokens['judge']}: {tokens['equal']} equal" in done.stdout


@pytest.mark.slow
def test_validation_finds_token_ids_that_differ(tmp_path):
    model = save_json(llama2_json(), make_model(tmp_path / "model", vocab_size=300), bos_token="<s>")
    engine = tmp_path / "engine"
    assert build("--model", model, "--p", 1, "--max-seq-len", 64, "--output", engine).returncode == 0
    # The checkpoint's tokenizer is another one now: it puts no space before a text.
    backend = llama2_json()
    backend.normalizer = None
    save_json(backend, model)
    done = mpirun(1, "--engine", engine, "--validate", env={})
    assert done.returncode == 1 and "validation FAILED" in done.stdout
    assert re.search(r"token ids of (\d+) texts against .*model: \d+ equal; the first that differs: ", done.stdout)


@pytest.mark.slow
def test_an_adapters_tokenizer_is_used_and_named(tmp_path):
    model = save_json(llama2_json(), make_model(tmp_path / "model", vocab_size=310), chat_template="model")
    adapter = make_adapter(model, tmp_path / "adapter")
    save_json(byte_level_json(), adapter)
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    engine = tmp_path / "engine"
    done = build("--model", model, "--lora", adapter, "--p", 1, "--max-seq-len", 64, "--output", engine)
    assert done.returncode == 0, done.stderr
    assert "note       the tokenizer is the adapter's" in done.stdout
    assert "note       the chat template is the adapter's" in done.stdout
    assert Tokenizer(engine).chat("hello") == byte_level_json().encode("hello!", add_special_tokens=False).ids
    report = tmp_path / "report.json"
    done = mpirun(1, "--engine", engine, "--validate", "--json", report)
    assert done.returncode == 0, done.stdout
    assert json.loads(report.read_text())["validation"]["tokens"]["judge"] == str(adapter.resolve())


@pytest.mark.slow
def test_an_engine_without_the_models_tokenizer(tmp_path):
    model = save_json(byte_level_json(), make_model(tmp_path / "model", vocab_size=310))
    (model / "tokenizer.json").write_text("broken")
    engine = tmp_path / "engine"
    flags = ["--model", model, "--p", 1, "--max-seq-len", 64, "--output", engine]
    done = build(*flags)
    assert_user_error(done, f"{model / 'tokenizer.json'}: not a tokenizer that can be read")
    assert not done.stdout  # found before the plan is printed
    assert not engine.exists()
    assert build(*flags, "--no-tokenizer").returncode == 0
    assert not any(path.name.startswith("tokenizer") for path in engine.iterdir())
    assert_user_error(mpirun(1, "--engine", engine, "--prompt", "x"), "came without a tokenizer")
    done = mpirun(
        1, "--engine", engine, "--token-ids", write_json(tmp_path / "ids.json", [1, 2]), "--max-new-tokens", 2
    )
    assert done.returncode == 0 and "2 tokens" in done.stdout


def test_conversations_from_a_file(tmp_path):
    template = (
        "{% if tools %}{{ tools[0].name }}|{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}"
    )
    model = save_json(byte_level_json(), make_model(tmp_path / "model", vocab_size=310), chat_template=template)
    engine, report = tmp_path / "engine", tmp_path / "report.json"
    assert build("--model", model, "--p", 1, "--max-seq-len", 64, "--output", engine).returncode == 0
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "tool", "content": "T"}]
    plain = write_json(tmp_path / "plain.json", messages)
    whole = write_json(tmp_path / "whole.json", {"messages": messages, "tools": [{"name": "F"}]})
    flags = ["--messages", plain, "--messages", whole, "--max-new-tokens", 2, "--json", report]
    done = mpirun(1, "--engine", engine, *flags)
    assert done.returncode == 0 and "--- prompt 2: tool: T" in done.stdout, done.stdout + done.stderr
    found = [completion["prompt_tokens"] for completion in json.loads(report.read_text())["completions"]]
    texts = ["system:S|user:U|tool:T|", "F|system:S|user:U|tool:T|"]
    assert found == [byte_level_json().encode(text, add_special_tokens=False).ids for text in texts]
    wrong = write_json(tmp_path / "wrong.json", [{"content": "no role"}])
    assert_user_error(mpirun(1, "--engine", engine, "--messages", wrong), f"--messages {wrong}", "role")


@pytest.mark.parametrize("pre", [None, "smollm"])
def test_a_gguf_that_does_not_say_how_text_is_split_is_named(pre, tmp_path):
    path = byte_level_gguf(tmp_path / "model.gguf", pre, random.Random(SEED))
    done = build("--model", path, "--p", 1, "--max-seq-len", 32, "--output", tmp_path / "engine")
    assert done.returncode == 0, done.stderr
    assert ("tokenizer.ggml.pre" in done.stdout) == (pre is None)
