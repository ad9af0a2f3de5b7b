"""The commands as users start them: what they print, and what they say to a wrong input."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from support import ROOT, write_json
from support.checkpoints import load_model, make_adapter, make_model
from support.made_tokenizers import save_byte_tokenizer
from support.processes import assert_user_error, build, environment, mpirun, run

import cqil_trt.commands.run
import cqil_trt.engine
from cqil_trt import kernels
from cqil_trt.builder import BuildRequest, choose_cqil, prepare
from cqil_trt.commands import build as build_command
from cqil_trt.commands import serve, started_by
from cqil_trt.commands.run import parser as run_parser
from cqil_trt.commands.run import random_prompts, read_prompts
from cqil_trt.errors import UserError
from cqil_trt.packages import missing


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = make_model(tmp_path_factory.mktemp("model"), vocab_size=259)
    save_byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("engines") / "engine"
    done = build("--model", model, "--p", 2, "--d", 1, "--max-seq-len", 40, "--output", path)
    assert done.returncode == 0, done.stderr
    return path


def test_build_prints_its_plan_and_writes_json(model, tmp_path):
    arguments = ("--model", model, "--p", 2, "--output", tmp_path / "engine")
    shown = build(*arguments)
    assert shown.returncode == 0, shown.stderr
    for text in (
        "1 group of 2 layers in [2, 4)",
        "the middle of the model",
        "read/token",
        "all-reduces",
        "mpirun -n 2",
    ):
        assert text in shown.stdout
    plan = json.loads(build(*arguments, "--json", "--force").stdout)
    ranks = plan["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1]
    for rank in ranks:  # what the plan says is what is on disk, but for the safetensors header
        size = (tmp_path / "engine" / f"rank{rank['rank']}.safetensors").stat().st_size
        assert 0 < size - rank["weight_bytes"] < 20_000
    groups = (plan["cqil"]["end"] - plan["cqil"]["start"]) // 2
    assert ranks[0]["all_reduces_per_token"] == groups + 2 * (6 - 2 * groups)
    assert 0.4 < plan["saving"] < 0.6
    assert [rank["bypasses_per_token"] for rank in ranks] == [0, 0]
    bypassed = json.loads(build(*arguments, "--d", 1, "--json", "--force").stdout)["ranks"]
    assert [rank["bypasses_per_token"] for rank in bypassed] == [groups, groups]


def test_dropped_joins_are_in_the_plan_and_in_the_engine(model, tmp_path):
    flags = ("--p", 2, "--start", 2, "--end", 4, "--drop-attention-join", "0,4-5")
    done = build("--model", model, *flags, "--output", tmp_path / "engine")
    assert done.returncode == 0, done.stderr
    assert "\ndropped    the all-reduce after attention in layers 0,4-5\n" in done.stdout
    assert "0 (1/2, one join), 1 (1/2), 2, 4-5 (1/2 of each, one join)" in done.stdout
    engine = cqil_trt.engine.Engine.open(tmp_path / "engine")
    assert engine.cqil.drop_attention_join == (0, 4, 5)
    assert engine.plan(0).collectives == 1 + 2 * 4 - 3
    # What an adapter was trained for is built again, unless a flag says otherwise, and that is said.
    for flags, dropped, noted in (
        ({}, (0, 4, 5), False),
        ({"placement": "sharded", "drop_attention_join": "auto:2"}, (4, 5), True),
        ({"drop_attention_join": "none", "placement": "leader"}, (), True),
        ({"placement": "tensor"}, (), False),
    ):
        found = choose_cqil(engine.model, flags, notes := [], trained=engine.cqil)
        assert found.drop_attention_join == dropped
        assert any("trained for p=2 d=0 [2, 4), attention joins dropped in 0,4-5" in note for note in notes) == noted
    with pytest.raises(UserError, match="--drop-attention-join 0,4-5: with --placement leader"):
        choose_cqil(engine.model, {"placement": "leader"}, [], trained=engine.cqil)
    done = build("--model", tmp_path / "engine", "--backend", "onnx", "--drop-attention-join", "none")
    assert_user_error(done, "which fixes --drop-attention-join: omit it")


def test_a_dry_run_prints_the_plan_and_writes_nothing(model, tmp_path):
    output = tmp_path / "engine"
    arguments = ("--model", model, "--p", 2, "--output", output, "--json")
    planned = json.loads(build(*arguments, "--dry-run").stdout)
    done = build(*arguments[:-1], "--dry-run")
    assert done.returncode == 0 and f"it would be written to {output}" in done.stdout and "all-reduces" in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert json.loads(build(*arguments).stdout) == planned | {"output": str(output.resolve())}
    assert_user_error(build(*arguments[:-1], "--dry-run"), "exists already")
    # What is no engine is never replaced, and that is said before anything else.
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    for flags in ((), ("--force",), ("--force", "--dry-run")):
        done = build("--model", model, "--p", 2, "--output", tmp_path / "notes", *flags)
        assert_user_error(done, "exists and is not an engine: give another directory")
        assert done.stdout == ""


@pytest.mark.slow
def test_several_ranks_share_a_layer(model, tmp_path):
    engine = tmp_path / "engine"
    flags = ("--p", 2, "--ranks-per-layer", 2, "--d", 1, "--start", 2, "--end", 6)
    done = build("--model", model, *flags, "--output", engine)
    assert done.returncode == 0, done.stderr
    assert "CQIL       p=2, d=1 (mlp): 2 groups of 2 layers in [2, 6), 2 ranks per layer, placement" in done.stdout
    assert "0-1 (1/4 of each), 2 4 (1/2 of each)" in done.stdout and "0-1 (1/4 of each), 3 5 (1/2" in done.stdout
    assert "mpirun -n 4 python " in done.stdout and f"runtime/run.py --engine {engine}" in done.stdout
    assert cqil_trt.engine.Engine.open(engine).plan(3).collectives == 2 * 2 + 2 * (1 + 1 + 1)
    done = mpirun(4, "--engine", engine, "--validate")
    assert done.returncode == 0 and "all ranks hold identical bits" in done.stdout, done.stdout + done.stderr
    assert_user_error(mpirun(2, "--engine", engine, "--prompt", "x"), "mpirun -n 4")


def test_one_rank_reads_all_the_weights(model, tmp_path):
    plan = json.loads(build("--model", model, "--p", 1, "--output", tmp_path / "e", "--json").stdout)
    parameters = sum(p.numel() for n, p in load_model(model).named_parameters() if "embed" not in n)
    assert plan["ranks"][0]["bytes_per_token"] == plan["bytes_per_token_one_rank"] == 4 * parameters
    assert plan["saving"] == 0
    assert build_command.describe(plan).endswith("on one rank alone (the same)")


@pytest.mark.slow
@pytest.mark.parametrize("preset, ranks", [("llama-7b-p2-d1", 2), ("llama-7b-p4-d0", 4)])
def test_presets_and_what_overrides_them(preset, ranks, tmp_path):
    deep = make_model(tmp_path / "deep", num_hidden_layers=32, hidden_size=12, intermediate_size=16, head_dim=2)
    plan = json.loads(build("--model", deep, "--preset", preset, "--output", tmp_path / "a", "--json").stdout)
    assert plan["cqil"]["end"] == 30 and len(plan["ranks"]) == ranks
    changed = ("--preset", preset, "--placement", "leader", "--end", 26)
    plan = json.loads(build("--model", deep, *changed, "--output", tmp_path / "b", "--json").stdout)
    assert plan["cqil"]["placement"] == "leader" and plan["cqil"]["end"] == 26


def test_text_json_logits_and_replicas(engine, model, tmp_path):
    prompts = ["hello there", "a", "and a third prompt"]
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    out, logits = tmp_path / "out.json", tmp_path / "logits.npy"
    arguments = ("--engine", engine, *flags, "--max-new-tokens", 9, "--json", out)
    done = mpirun(2, *arguments, "--logits-out", logits)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert [c["prompt"] for c in report["completions"]] == prompts
    assert np.load(logits).shape == (len(prompts[0]), 259) and np.load(logits).dtype == np.float32

    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    done = mpirun(
        4, "--engine", engine, "--prompt-file", tmp_path / "prompts.txt", "--max-new-tokens", 9, "--json", out
    )
    assert done.returncode == 0, done.stderr
    replicated = json.loads(out.read_text())
    assert replicated["replicas"] == 2
    assert [c["tokens"] for c in replicated["completions"]] == [c["tokens"] for c in report["completions"]]

    ids = write_json(tmp_path / "ids.json", [c["prompt_tokens"] for c in report["completions"]])
    done = mpirun(2, "--engine", engine, "--token-ids", ids, "--max-new-tokens", 9, "--json", out, "--stream")
    assert done.returncode == 0, done.stderr
    assert [c["tokens"] for c in json.loads(out.read_text())["completions"]] == [
        c["tokens"] for c in report["completions"]
    ]
    assert "[2] " in done.stdout


def test_prompts_of_a_file_end_at_newlines_only(tmp_path):
    def prompts(name, content):
        (tmp_path / name).write_bytes(content)
        flag = "--token-ids" if name == "ids.json" else "--prompt-file"
        return read_prompts(run_parser().parse_args([flag, str(tmp_path / name)]))

    separators = "\f\v\x1c\x1d\x1e\x85\u2028\u2029"
    lines = [f"one{separators}two", "a lone \r stays", " spaces stay ", "último ❤"]
    for newline in ("\n", "\r\n"):
        for end in ("", newline, newline * 3):
            text = newline.join(lines[:2]) + newline * 2 + newline.join(lines[2:]) + end
            assert prompts("p.txt", text.encode()) == lines
            assert prompts("p.txt", b"\xef\xbb\xbf" + text.encode()) == lines
    assert prompts("p.json", b"\xef\xbb\xbf" + json.dumps(lines, ensure_ascii=False).encode()) == lines
    assert prompts("ids.json", b"\xef\xbb\xbf[3, 4]") == [[3, 4]]
    for name, content in (("p.txt", b"\xef\xbb\xbf\n\r\n"), ("p.json", b"[]")):
        with pytest.raises(UserError, match="expected at least one prompt"):
            prompts(name, content)
    for content, message in ((b"[]", "expected a list of token ids"), (b"[[3], []]", "list 2 has no token ids")):
        with pytest.raises(UserError, match=f"--token-ids .*ids.json: {message}"):
            prompts("ids.json", content)
    with pytest.raises(UserError, match="not UTF-8"):
        prompts("p.txt", "ÿ".encode("latin-1"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said_in_one_line(engine):
    assert_user_error(mpirun(2, "--engine", engine, "--device", "cuda"), "--device cuda: there is no CUDA GPU")
    with pytest.raises(UserError, match="device must be one of auto, cpu, cuda"):
        cqil_trt.load(engine, device="gpu")


@pytest.mark.slow
def test_validate_passes_on_a_good_engine_and_fails_on_a_wrong_one(engine, model, tmp_path):
    done = mpirun(2, "--engine", engine, "--validate", "--benchmark", "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validation passed" in done.stdout and "decode" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["validation"]["passed"] and len(report["validation"]["prompts"]) == 3
    assert [(m["step"], m["batch"]) for m in report["benchmark"]] == [
        *(("prefill", 1), ("decode", 1), ("prefill amid decode", 1)),
    ]
    assert all(len(m["ms"]) > 1 for m in report["benchmark"])

    # The same engine judged against other weights: the checkpoint changes behind its back.
    other = tmp_path / "model"
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    wrong = tmp_path / "wrong"
    arguments = ("--model", other, "--p", 2, "--max-seq-len", 40)
    assert build(*arguments, "--probes", "always", "--output", wrong).returncode == 0
    assert build(*arguments, "--output", tmp_path / "unjudged").returncode == 0
    make_model(other, vocab_size=259, seed=1)
    done = mpirun(2, "--engine", wrong, "--validate", env={})
    assert done.returncode == 1 and "validation FAILED" in done.stdout
    assert "where its greedy tokens first differ, the reference's logits for the two are" in done.stdout

    # Without a checkpoint the judge is what the reference said at build time, about the right weights.
    shutil.rmtree(other)
    done = mpirun(2, "--engine", wrong, "--validate", "--json", tmp_path / "report.json")
    assert done.returncode == 0 and "when the engine was built" in done.stdout, done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["validation"]["reference"] == "stored"
    assert_user_error(mpirun(2, "--engine", tmp_path / "unjudged", "--validate"), "no stored reference", "--probes")
    # Prompts of one's own cannot have been asked before.
    ids = write_json(tmp_path / "ids.json", [1, 2, 3])
    assert_user_error(mpirun(2, "--engine", wrong, "--validate", "--token-ids", ids), "the reference needs")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_engines_validate(dtype, model, tmp_path):
    adapter = make_adapter(model, tmp_path / "adapter")
    arguments = ("--model", model, "--lora", adapter, "--dtype", dtype, "--max-seq-len", 40, "--output", tmp_path / "e")
    assert build(*arguments).returncode == 0
    done = mpirun(2, "--engine", tmp_path / "e", "--validate")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_newest_engine_that_fits_is_found(model, tmp_path):
    command = [sys.executable, ROOT / "builders" / "build.py", "--model", model, "--max-seq-len", 40]
    for p in (4, 2):
        done = run(*command, "--p", p, cwd=tmp_path)
        assert done.returncode == 0 and "replaces" not in done.stdout
    [made] = (tmp_path / "engines").glob("*-p2-*")
    created = cqil_trt.engine.Engine.open(made).created
    done = run(*command, "--p", 2, cwd=tmp_path)  # a name of our own making is replaced, and that is said
    built = f"{created[:10]}, {created[11:16]} UTC"
    assert done.returncode == 0 and f"replaces the engine built on {built} in engines/{made.name}" in done.stdout
    assert cqil_trt.engine.Engine.open(made).created > created
    arguments = ("--prompt", "x", "--max-new-tokens", 2)
    script = ROOT / "runtime" / "run.py"
    assert "p=2" in mpirun(2, *arguments, script=script, cwd=tmp_path).stdout
    if not torch.cuda.is_available():  # one that does not run here is newer, and passed over
        done = run(*command, "--p", 2, "--backend", "tensorrt", "--target", "8.6", cwd=tmp_path)
        assert "it does not run here: engines/" in done.stdout and "runs on a GPU" in done.stdout, done.stderr
        [foreign] = (tmp_path / "engines").glob("*-tensorrt-*")
        assert "p=2" in mpirun(2, *arguments, script=script, cwd=tmp_path).stdout
        shutil.rmtree(foreign)
    assert "p=2" in mpirun(4, *arguments, script=script, cwd=tmp_path).stdout
    assert_user_error(mpirun(3, *arguments, script=script, cwd=tmp_path), "3 MPI ranks", "mpirun -n N")
    assert len(list((tmp_path / "engines").glob("[!.]*"))) == 2


BUILD_ERRORS = {
    "p does not divide the range": (["--p", 2, "--start", 0, "--end", 5], ["--p 2 does not divide", "--end 4"]),
    "end far beyond the model": (["--p", 2, "--start", 2, "--end", 99], ["--end 99 is beyond", "6 layers"]),
    "end beyond the model": (["--p", 2, "--start", 0, "--end", 8], ["--end 8", "6 layers"]),
    "d not below p": (["--p", 2, "--d", 2], ["--d", "--p 2"]),
    "a join of a group": (["--start", 2, "--end", 4, "--drop-attention-join", "1-2"], ["1-2: layer 2 is in a group"]),
    "a join that leader has not": (["--placement", "leader", "--drop-attention-join", "0"], ["--placement leader"]),
    "too many ranks": (["--p", 4, "--ranks-per-layer", 3], ["--ranks-per-layer 3 is 12 ranks"]),
    "ranks that leader does not have": (["--ranks-per-layer", 2, "--placement", "leader"], ["use placement sharded"]),
    "ranks that TensorRT-LLM does not have": (
        ["--ranks-per-layer", 2, "--backend", "tensorrt-llm", "--dtype", "float16"],
        ["--backend tensorrt-llm: --ranks-per-layer 2"],
    ),
    "joins that NCCL cannot leave out": (
        ["--ranks-per-layer", 2, "--backend", "tensorrt", "--target", "8.6", "--drop-attention-join", "2"],
        ["--collective nccl: --drop-attention-join"],
    ),
    "unknown preset": (["--preset", "llama-8b"], ["--preset llama-8b", "llama-7b-p2-d0"]),
    "preset of a deeper model": (
        ["--preset", "llama-7b-p2-d0"],
        ["--preset llama-7b-p2-d0: its layers [12, 30)", "which has 6"],
    ),
    "too long": (["--max-seq-len", 4096], ["--max-seq-len 4096", "128 positions"]),
    "no batch": (["--max-batch-size", 0], ["--max-batch-size"]),
    "chunk beyond a grid": (["--prefill-chunk", 65536], ["--prefill-chunk must be from 1 to 65535, found 65536"]),
    "no such adapter": (["--lora", "/nowhere"], ["--lora /nowhere"]),
    "no name": (["--lora", ""], ["--lora is empty"]),
}


@pytest.mark.parametrize("case", BUILD_ERRORS)
def test_build_errors(case, model, tmp_path):
    arguments, fragments = BUILD_ERRORS[case]
    assert_user_error(build("--model", model, "--output", tmp_path / "engine", *arguments), *fragments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_build_errors_about_files(model, tmp_path):
    out = tmp_path / "engine"
    assert_user_error(build("--model", tmp_path / "none", "--output", out), "--model", "none", "found nothing")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((model / "config.json").read_bytes())
    assert_user_error(build("--model", broken, "--output", out), "no weights")
    raw = (model / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    assert_user_error(build("--model", broken, "--output", out), "model.safetensors", "corrupt or truncated")
    (broken / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    assert_user_error(build("--model", broken / "model.gguf", "--output", out), "model.gguf")
    values = json.loads((model / "config.json").read_text())
    write_json(broken / "config.json", {**values, "model_type": "falcon"})
    assert_user_error(build("--model", broken, "--output", out), "model_type 'falcon' is not supported")
    pissa = make_adapter(model, tmp_path / "pissa", init_lora_weights="pissa")
    assert_user_error(build("--model", model, "--lora", pissa, "--output", out), "init_lora_weights", "pissa")
    other = make_adapter(make_model(tmp_path / "other", intermediate_size=80), tmp_path / "adapter")
    assert_user_error(build("--model", model, "--lora", other, "--output", out), "do not fit")
    assert not out.exists()


def test_an_output_directory_that_exists(model, engine, tmp_path):
    arguments = ("--model", model, "--max-seq-len", 40, "--output")
    assert_user_error(build(*arguments, engine), "--output", "--force")
    plan = prepare(BuildRequest(model=model, max_seq_len=40, output=engine, force=True))
    assert "replaces the engine built on" in plan.notes[-1]
    left = tmp_path / "left"
    left.mkdir()
    (left / "config.json").write_text((engine / "config.json").read_text().replace('"p": 2', '"p": 4'))
    assert (
        "what is left of an engine"
        in prepare(BuildRequest(model=model, max_seq_len=40, output=left, force=True)).notes[-1]
    )
    shutil.rmtree(left)
    (tmp_path / "precious").write_text("mine")
    assert_user_error(build(*arguments, tmp_path, "--force"), "is not an engine")
    assert (tmp_path / "precious").read_text() == "mine"
    assert_user_error(build(*arguments, tmp_path / "precious" / "engine"), "precious is not a directory")


@pytest.mark.slow
def test_run_errors(engine, tmp_path):
    def fails(ranks, *arguments, **options):
        return mpirun(ranks, "--engine", engine, *arguments, **options)

    assert_user_error(fails(3), "needs 2 MPI ranks", "found 3")
    assert_user_error(run(sys.executable, "runtime/run.py", "--engine", engine, env={}), "mpirun -n 2")
    assert_user_error(fails(2, "--prompt", "", env={}), "prompt 1 is empty")
    assert_user_error(fails(2, "--prompt", "x" * 41), "41 tokens", "takes 40")
    assert_user_error(fails(2, "--prompt", "x", "--temperature", -1), "--temperature")
    assert_user_error(fails(2, "--no-such-flag"), "--no-such-flag")
    assert_user_error(fails(2, "--token-ids", tmp_path / "none"), "none", "cannot be read")
    done = fails(2, "--token-ids", write_json(tmp_path / "ids", [[1], [1, 999]]), "--prompt", "x")
    assert_user_error(done, f"--token-ids {tmp_path / 'ids'}: list 2: 999 is not a token id")
    assert_user_error(fails(2, "--token-ids", write_json(tmp_path / "ids", {"a": 1})), "--token-ids")
    done = fails(2, "--prompt", "x", "--json", tmp_path / "no" / "file")
    assert_user_error(done, "--json", "its directory does not exist")
    assert_user_error(mpirun(2, "--engine", tmp_path), "not an engine directory")
    for name in ("--contexts", "--batches"):
        assert_user_error(fails(2, "--prompt", "x", name, 5), f"{name} needs --benchmark")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rank0.safetensors", "rank1.safetensors", "config.json", "tokenizer.json"])
def test_one_flipped_byte_is_found(name, engine, tmp_path):
    copy = tmp_path / "engine"
    copy.mkdir()
    for file in engine.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    raw = bytearray((copy / name).read_bytes())
    position = raw.index(b'"p": 2') + 5 if name == "config.json" else len(raw) * 2 // 3
    raw[position] ^= 1
    (copy / name).write_bytes(raw)
    assert_user_error(mpirun(2, "--engine", copy, "--prompt", "x"), name, "damaged")
    (copy / name).write_bytes(raw[:-10])
    assert_user_error(mpirun(2, "--engine", copy, "--prompt", "x"), name)


@pytest.mark.slow
def test_an_engine_without_a_tokenizer_takes_token_ids(tmp_path):
    make_model(tmp_path / "model")
    engine = tmp_path / "engine"
    assert build("--model", tmp_path / "model", "--p", 2, "--output", engine).returncode == 0
    ids = write_json(tmp_path / "ids.json", [3, 4, 5])
    done = mpirun(2, "--engine", engine, "--token-ids", ids, "--max-new-tokens", 5)
    assert done.returncode == 0, done.stderr
    expected = load_model(tmp_path / "model")
    from cqil_trt.reference import CqilModel

    out = CqilModel(expected, p=2).generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False)
    assert f"\n{' '.join(map(str, out[0, 3:].tolist()))}\n" in done.stdout
    assert mpirun(2, "--engine", engine, "--validate").returncode == 0
    assert_user_error(mpirun(2, "--engine", engine, "--prompt", "x"), "without a tokenizer")
    assert_user_error(mpirun(2, "--engine", engine, "--token-ids", ids, "--chat"), "--chat")


@pytest.mark.slow
def test_a_full_engine_says_so(tmp_path):
    made = build(
        "--model", make_model(tmp_path / "model"), "--p", 1, "--max-seq-len", 6, "--output", tmp_path / "engine"
    )
    assert made.returncode == 0, made.stderr
    ids, report = write_json(tmp_path / "ids.json", [3, 4, 5]), tmp_path / "report.json"
    for wanted in (2, 50):
        flags = ("--token-ids", ids, "--max-new-tokens", wanted, "--json", report)
        done = mpirun(1, "--engine", tmp_path / "engine", *flags)
        assert done.returncode == 0, done.stderr
        [completion] = json.loads(report.read_text())["completions"]
        # The last token needs no room. A random model may end before.
        full = completion["finish_reason"] == "length" and wanted == 50
        assert len(completion["tokens"]) == min(wanted, 4) or completion["finish_reason"] == "eos"
        assert ("the engine holds 6 tokens" in done.stdout) == full


def test_help_is_quick():
    """In time of a processor: other processes may have them too."""
    for command, flag in (("cqil-build", "--model"), ("cqil-run", "--engine")):
        process = subprocess.Popen([command, "--help"], env=environment(), stdout=subprocess.PIPE, text=True)
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0 and flag in said and said.startswith(f"usage: {command} ")
        assert used.ru_utime + used.ru_stime < 2


def test_the_help_of_every_command_can_be_printed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    commands = [build_command, cqil_trt.commands.run, serve]
    for script in sorted((ROOT / "scripts").rglob("*.py")):
        if "add_argument(" in (text := script.read_text()) and "__main__" in text:
            module = script.relative_to(ROOT / "scripts").with_suffix("")
            commands.append(importlib.import_module(".".join(module.parts)))
    assert len(commands) > 15
    for module in commands:
        assert "usage: " in module.parser().format_help(), module


def test_a_command_is_named_as_it_was_started(monkeypatch, tmp_path):
    for called, directory, named in (
        ("builders/build.py", ROOT, "python runtime/run.py"),
        ("build.py", ROOT / "builders", "python ../runtime/run.py"),
        (str(ROOT / "builders" / "build.py"), tmp_path, f"python {ROOT}/runtime/run.py"),
        ("/usr/local/bin/cqil-build", ROOT, "cqil-run"),
    ):
        monkeypatch.setattr(sys, "argv", [called])
        monkeypatch.chdir(directory)
        assert started_by("cqil-run", "runtime/run.py") == named
        assert f"{named} [options]" in " ".join(run_parser().format_help().split())


def test_values_that_begin_with_a_dash_and_values_that_are_empty():
    for text in ("-1e30", "-1", "-.5", "-inf", "1e-3"):
        assert run_parser().parse_args(["--frequency-penalty", text, "--stream"]).frequency_penalty == float(text)
    assert run_parser().parse_args(["--prompt", "-1e5", "--stop=-2"]).prompt == ["-1e5"]
    for arguments, said in (
        (["--engine", ""], "--engine: is empty"),
        (["--frequency-penalty", "--stream"], "--frequency-penalty: expected one argument"),
        (["--stream", "-1e30"], "--stream: ignored explicit argument '-1e30'"),
    ):
        with pytest.raises(UserError, match=said):
            run_parser().parse_args(arguments)


def test_messages_name_the_flag():
    for flag in ("--prompt", "--stop"):
        with pytest.raises(UserError, match=f"{flag} a.*: not UTF-8 text"):
            read_prompts(run_parser().parse_args([flag, "a\udcff"]))
    assert [len(prompt) for prompt in random_prompts("1,39", 99, 40)] == [1, 39]
    for contexts in ("0", "40", "-1", "5,", ""):
        with pytest.raises(UserError, match=f"--contexts {contexts}: expected numbers from 1 to 39"):
            random_prompts(contexts, 99, 40)


def test_the_kernels_command_reports_wrong_arguments_on_one_line(capsys):
    for arguments in ([], ["make"], ["build", "--output", ""]):
        with pytest.raises(SystemExit) as ended:
            kernels.main(arguments)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1


def test_a_missing_package_is_installed_from_the_checkout():
    """Not from an index, where anybody could take the project's name."""
    for package, extra in (("uvicorn", "[serve]"), ("ray", "[ray]"), ("numpy", "")):
        assert f"pip install '.{extra}'" in missing(ModuleNotFoundError(name=package))
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert "install 'cqil-trt" not in document.read_text(), document
