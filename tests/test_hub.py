"""Models and adapters by their names on the hub: huggingface_hub's own client against a hub on the loopback."""

import json
import os
import shutil
import sys
import time

import pytest
import torch
from support import write_json
from support.checkpoints import load_model, make_adapter, make_model
from support.hub_server import TOKEN, Hub
from support.made_tokenizers import save_byte_tokenizer
from support.processes import assert_quiet, assert_user_error, build, mpirun, run

import cqil_trt
from cqil_trt.commands.build import describe
from cqil_trt.errors import UserError
from cqil_trt.hub import Found, find_adapter, find_model

FIND = """
import json, sys
from cqil_trt.hub import find_adapter, find_model
from cqil_trt.job import command
with command():
    find = {"--model": find_model, "--lora": find_adapter}[sys.argv[1]]
    found = [find(name) for name in sys.argv[2:]]
    print(json.dumps([{**vars(f), "path": str(f.path), "stem": f.stem} for f in found]))
"""
OTHERS = (
    "modeling_evil.py",
    "consolidated.00.pth",
    "tf_model.h5",
    "model.fp16.safetensors",
    "README.md",
    "a/config.json",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model in shards, with a copy of the weights in the old form and files that nothing here reads."""
    directory = make_model(tmp_path_factory.mktemp("hub") / "local", vocab_size=259, max_shard_size="100kB")
    save_byte_tokenizer(directory)
    torch.save(load_model(directory).state_dict(), directory / "pytorch_model.bin")
    for name in OTHERS:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"raise SystemExit(77)\n")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    return directory


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    directory = make_adapter(checkpoint, tmp_path_factory.mktemp("hub") / "adapter")
    write_json(directory / "cqil_config.json", {"p": 2, "d": 0, "start": 2, "end": 6, "bypass": "mlp"})
    (directory / "adapter_model.bin").write_bytes(b"not fetched")
    (directory / "train.py").write_text("raise SystemExit(77)\n")
    return directory


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


def find(hub, cache, *names, flag="--model", **environment):
    return run(sys.executable, "-c", FIND, flag, *names, env=hub.environment(cache, **environment))


def found(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def shards(checkpoint):
    return {path.name for path in checkpoint.glob("model-*.safetensors")}


def test_a_name_is_of_the_hub_only_when_no_path_and_of_its_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "local").mkdir(parents=True)
    for name in ("org/local", "./org/tiny", "../org/tiny", "/org/tiny", "~/tiny", "gpt2", "a/b/c", "org/", "a@b"):
        assert find_model(name) == Found(name=name, path=type(tmp_path)(name))
    assert find_adapter(tmp_path / "org" / "none").commit is None
    for name in ("org/tiny", "org/tiny@v1", "org/tiny@refs/pr/1", "org/tiny/sub/m.Q4_0.gguf@v1"):
        with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
            find_model(name)
    with pytest.raises(UserError, match="^--model is empty$"):
        find_model("")
    with pytest.raises(UserError, match="--model gpt2.*org/name"):
        cqil_trt.build(model="gpt2")
    with pytest.raises(UserError, match="--lora mine.*org/name"):
        cqil_trt.build(model=make_model(tmp_path / "m"), lora="mine")


@pytest.mark.slow
def test_only_what_is_read_is_fetched_and_once(hub, checkpoint, adapter, tmp_path):
    commit = hub.add("org/tiny", checkpoint, tags=("v1", "refs/pr/1"))
    hub.add("org/adapter", adapter)
    [first, other] = found(find(hub, tmp_path, "org/tiny@v1", "org/tiny@refs/pr/1"))
    assert first["commit"] == other["commit"] == commit and first["stem"] == "tiny" and first["path"] == other["path"]
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    wanted |= {"chat_template.jinja", "additional_chat_templates/tool.jinja", "model.safetensors.index.json"}
    assert len(shards(checkpoint)) > 2 and hub.files("org/tiny") == wanted | shards(checkpoint)
    [mine] = found(find(hub, tmp_path, "org/adapter", flag="--lora"))
    assert hub.files("org/adapter") == {"adapter_config.json", "adapter_model.safetensors", "cqil_config.json"}
    assert set(hub.fetched.values()) == {1}
    # From now on the cache has it, with the hub and without.
    assert found(find(hub, tmp_path, "org/tiny@v1"))[0]["path"] == first["path"]
    hub.stop()
    offline = {"HF_HUB_OFFLINE": "1"}
    for name in ("org/tiny@v1", f"org/tiny@{commit}"):
        assert found(find(hub, tmp_path, name, **offline))[0]["path"] == first["path"]
    assert found(find(hub, tmp_path, "org/adapter", flag="--lora", **offline))[0]["path"] == mine["path"]
    unreachable = found(find(hub, tmp_path, "org/tiny@v1"))[0]
    assert unreachable["path"] == first["path"] and "cannot be reached" in unreachable["note"]
    assert set(hub.fetched.values()) == {1}


@pytest.mark.slow
def test_the_old_form_of_weights_only_where_there_is_no_other(hub, checkpoint, adapter, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(checkpoint, old, ignore=shutil.ignore_patterns("model*.safetensors*"))
    hub.add("org/old", old)
    found(find(hub, tmp_path / "cache", "org/old"))
    assert {name for name in hub.files("org/old") if "model" in name} == {"pytorch_model.bin"}
    # One file is what transformers takes where an index stands beside it.
    one = tmp_path / "one"
    shutil.copytree(checkpoint, one)
    (one / "model.safetensors").write_bytes(b"whole")
    hub.add("org/one", one)
    found(find(hub, tmp_path / "cache", "org/one"))
    assert {name for name in hub.files("org/one") if "model" in name} == {"model.safetensors"}
    # An index may name anything; only files of weights are fetched.
    (one / "model.safetensors").unlink()
    write_json(one / "model.safetensors.index.json", {"weight_map": {"a": "modeling_evil.py", "b": ["x"], "c": None}})
    hub.add("org/evil", one)
    found(find(hub, tmp_path / "cache", "org/evil"))
    assert "model.safetensors.index.json" in hub.files("org/evil") and "modeling_evil.py" not in hub.files("org/evil")
    shutil.copytree(adapter, tmp_path / "a", ignore=shutil.ignore_patterns("*.safetensors", "cqil_config.json"))
    hub.add("org/a", tmp_path / "a")
    found(find(hub, tmp_path / "cache", "org/a", flag="--lora"))
    assert hub.files("org/a") == {"adapter_config.json", "adapter_model.bin"}


def test_gguf_repositories(hub, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    (files / "config.json").write_text("{}")
    parts = [f"big-0000{i}-of-00002.gguf" for i in (1, 2)]
    for name in ("tiny.Q4_0.gguf", "tiny.Q8_0.gguf", *parts):
        (files / name).write_bytes(name.encode())
    hub.add("org/many", files)
    done = find(hub, tmp_path / "cache", "org/many")
    assert_user_error(done, "--model org/many", "tiny.Q4_0.gguf", parts[0], "org/many/")
    [one, split] = found(find(hub, tmp_path / "cache", "org/many/tiny.Q8_0.gguf", f"org/many/{parts[1]}@main"))
    assert one["path"].endswith("/tiny.Q8_0.gguf") and one["stem"] == "tiny.Q8_0"
    assert split["path"].endswith(parts[0]) and split["stem"] == "big"
    assert hub.files("org/many") == {"tiny.Q8_0.gguf", *parts}
    assert_user_error(find(hub, tmp_path / "cache", "org/many/none.gguf"), "no file none.gguf")
    for name in ("tiny.Q4_0.gguf", *parts):
        (files / name).unlink()
    hub.add("org/single", files)
    assert found(find(hub, tmp_path / "cache", "org/single"))[0]["path"].endswith("/tiny.Q8_0.gguf")


@pytest.mark.slow
def test_what_the_hub_refuses_is_said_in_one_line(hub, checkpoint, adapter, tmp_path):
    hub.add("org/tiny", checkpoint)
    hub.add("org/adapter", adapter)
    hub.add("org/gated", checkpoint, gated=True)
    hub.add("org/private", checkpoint, private=True)

    def refused(name, *fragments, flag="--model", **environment):
        assert_user_error(find(hub, tmp_path, name, flag=flag, **environment), f"{flag} {name}", *fragments)

    refused("org/none", "no such path here", "no repository org/none", "HF_TOKEN", "hf auth login")
    refused("org/private", "no repository", "HF_TOKEN")
    refused("org/gated", "gated", "ask for access", "HF_TOKEN", "hf auth login")
    refused("org/tiny@v9", "no revision v9")
    refused("org/tiny", "HTTP 401", "HF_TOKEN", HF_TOKEN="hf_wrong")
    refused("org/a--b", "not a name on the hub")
    refused("org/tiny", "no adapter_config.json", flag="--lora")
    refused("org/adapter", "give it with --lora")
    assert not hub.fetched
    for name in ("org/gated", "org/private"):
        found(find(hub, tmp_path, name, HF_TOKEN=TOKEN))
    hub.claimed = dict.fromkeys(shards(checkpoint), 10**18)
    refused("org/tiny", "to fetch", "are free", "HF_HUB_CACHE")
    hub.claimed = {}
    hub.status = 503
    refused("org/tiny", "HTTP 503", "does not hold all of it")
    (tmp_path / "file").write_text("")
    hub.status = None
    refused("org/tiny", "cannot be written", HF_HUB_CACHE=str(tmp_path / "file" / "hub"))
    assert_user_error(find(hub, tmp_path / "empty", "org/tiny", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set")


@pytest.mark.slow
def test_a_hub_that_is_away_or_silent(hub, checkpoint, tmp_path):
    import socket

    hub.stop()
    assert_user_error(find(hub, tmp_path, "org/tiny"), "cannot be reached", "does not hold all of it")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and says nothing
        began = time.monotonic()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = find(hub, tmp_path, "org/tiny", HF_ENDPOINT=endpoint, HF_HUB_ETAG_TIMEOUT="2")
    assert_user_error(done, endpoint, "cannot be reached")
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_a_download_that_breaks_off_goes_on_later(hub, checkpoint, tmp_path):
    commit = hub.add("org/tiny", checkpoint)
    hub.dies_after = 20_000
    done = build("--model", "org/tiny", "--output", tmp_path / "engine", env=hub.environment(tmp_path / "cache"))
    assert_user_error(done, "--model org/tiny", "cannot be reached", "run it again")
    assert not (tmp_path / "engine").exists() and not list(tmp_path.rglob("*.incomplete"))
    offline = find(hub, tmp_path / "cache", "org/tiny", HF_HUB_OFFLINE="1")
    assert_user_error(offline, "does not hold all of it")
    before = dict(hub.fetched)
    hub.dies_after = None
    hub.start(hub.port)
    assert found(find(hub, tmp_path / "cache", "org/tiny"))[0]["commit"] == commit
    assert all(hub.fetched[entry] == 1 for entry in before if "model-" not in entry[1])
    # Another tool may have left no tokenizer, which is said, or not all weights, which is no model.
    snapshot = tmp_path / "cache" / "hub" / "models--org--tiny" / "snapshots" / commit
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (snapshot / file).unlink()
    assert "no tokenizer" in found(find(hub, tmp_path / "cache", "org/tiny", HF_HUB_OFFLINE="1"))[0]["note"]
    (snapshot / max(shards(checkpoint))).unlink()
    offline = find(hub, tmp_path / "cache", "org/tiny", HF_HUB_OFFLINE="1")
    assert_user_error(offline, "no file " + max(shards(checkpoint)), "only a part of it")


@pytest.mark.slow
def test_build_and_validate_by_name(hub, checkpoint, adapter, tmp_path):
    commit, other = hub.add("org/tiny", checkpoint, tags=("v1",)), hub.add("org/adapter", adapter)
    environment = hub.environment(tmp_path / "cache")
    arguments = ("--model", "org/tiny@v1", "--lora", "org/adapter", "--max-seq-len", 40)
    builder = os.path.abspath("builders/build.py")
    work = tmp_path / "work"
    work.mkdir()
    # Two processes: one of them fetches.
    command = ("mpirun", "-n", 2, sys.executable, builder, *arguments, "--probes", "never", "--json")
    done = run(*command, cwd=work, env=environment)
    assert_quiet(done)
    plan = json.loads(done.stdout)
    assert (plan["model"], plan["model_commit"]) == ("org/tiny@v1", commit)
    assert (plan["lora"], plan["lora_commit"]) == ("org/adapter", other)
    shown = describe(plan)
    assert f"org/tiny@v1, commit {commit[:12]}" in shown and f"org/adapter, commit {other[:12]}" in shown
    assert set(hub.fetched.values()) == {1}
    [engine] = (work / "engines").iterdir()
    assert engine.name == "tiny-adapter-p2-d0-2-6-sharded-torch-float32"
    runner = os.path.abspath("runtime/run.py")
    done = mpirun(2, "--validate", "--device", "cpu", script=runner, cwd=work, env={"HF_HUB_OFFLINE": "1"})
    assert_quiet(done)
    assert "validation passed" in done.stdout
    # The same weights as from the directories themselves, and from Python.
    cqil_trt.build(model=checkpoint, lora=adapter, output=tmp_path / "local", max_seq_len=40, probes="never")
    call = "from cqil_trt import build; import sys; build(model='org/tiny', lora='org/adapter', output=sys.argv[1])"
    assert run(sys.executable, "-c", call, tmp_path / "python", env=environment).returncode == 0
    for rank in range(2):
        name = f"rank{rank}.safetensors"
        expected = (tmp_path / "local" / name).read_bytes()
        assert all((path / name).read_bytes() == expected for path in (engine, tmp_path / "python"))


@pytest.mark.slow
def test_scripts_take_names(hub, checkpoint, tmp_path):
    hub.add("org/tiny", checkpoint)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    environment = hub.environment(tmp_path / "cache")
    common = ("--model", "org/tiny", "--text", text)
    training = (
        "--sequence-length",
        16,
        "--batch-size",
        2,
        "--steps",
        1,
        "--lora-rank",
        2,
        "--gradient-checkpointing",
        "on",
    )
    script = os.path.abspath("scripts/finetune.py")
    done = run(sys.executable, script, *common, *training, cwd=tmp_path, env=environment)
    assert_quiet(done)
    [made] = (tmp_path / "adapters").iterdir()
    assert made.name.startswith("tiny-p2") and "--model org/tiny" in done.stdout
    assert json.loads((made / "training.json").read_text())["model"] == "org/tiny"
    hub.add("org/trained", made)
    done = run(sys.executable, "scripts/similarity.py", *common, "--block", 16, "--text-tokens", 64, env=environment)
    assert_quiet(done)
    assert done.stdout.startswith("tiny, 6 layers")
    arguments = ("--lora", "org/trained", "--block", 16, "--text-tokens", 64)
    done = run(sys.executable, "scripts/evaluate.py", *common, *arguments, env=environment)
    assert_quiet(done)
    assert "CQIL + adapter" in done.stdout
    assert set(hub.fetched.values()) == {1}
