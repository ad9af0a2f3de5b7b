"""Similarity, perplexity, distillation, evaluation: against Hugging Face, PEFT, lm-evaluation-harness and float64."""

import argparse
import hashlib
import importlib
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from support import ROOT, SEED
from support.checkpoints import load_model, make_model
from support.formulas import Formulas
from support.made_tokenizers import save_byte_tokenizer
from support.processes import assert_user_error, build, environment, mpirun, run

import cqil_trt
from cqil_trt import families
from cqil_trt.config import CqilConfig
from cqil_trt.errors import UserError
from cqil_trt.job import Job
from cqil_trt.latency import H200, MACHINES, critical_bytes, decode_seconds
from cqil_trt.quality import corpus, open_tokenizer, perplexity, similarity, text_blocks
from cqil_trt.quality.distillation import largest_rise
from cqil_trt.shard import plan
from cqil_trt.weights import open_checkpoint

TEXT = (ROOT / "README.md").read_text()
SHAPE = ["--p", 2, "--start", 2, "--end", 6, "--drop-attention-join", "6-7"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quality") / "model"
    # Its end of text is not transformers' default, token 2.
    make_model(directory, vocab_size=260, num_hidden_layers=8, eos_token_id=[70, 2])
    save_byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def text(model):
    path = model.parent / "text.txt"
    path.write_text(TEXT[:6000])
    return path


def tokens(shape, seed=SEED):
    return np.random.default_rng(seed).integers(3, 259, shape).astype(np.int32)


def script(name, *arguments, **options):
    return run(sys.executable, f"scripts/{name}.py", *arguments, **options)


# Similarity and the choice of layers


def test_similarity_is_the_cosine_of_what_layers_receive(model):
    network, blocks, inputs = load_model(model), tokens((2, 24)), []
    for layer in network.model.layers:
        layer.register_forward_pre_hook(lambda module, args, kwargs: inputs.append(args[0].double()), with_kwargs=True)
    with torch.no_grad():
        network(torch.from_numpy(blocks.astype(np.int64)))
    expected = torch.nn.functional.cosine_similarity(torch.stack(inputs)[:, None], torch.stack(inputs)[None], dim=-1)
    np.testing.assert_allclose(similarity.input_similarity(network, blocks), expected.mean((2, 3)), atol=1e-5)


@given(st.integers(2, 4), st.integers(0, 3), st.floats(0.05, 0.95), st.integers(0, 2**32))
def test_recommended_range_is_the_longest_that_is_alike_enough(p, first, threshold, seed):
    random = np.random.default_rng(seed).random((11, 11))
    alike = np.maximum(random, random.T)
    fitting = {}
    for start in range(first, 11):
        for groups in range(1, (11 - start) // p + 1):
            members = [range(start + g * p, start + (g + 1) * p) for g in range(groups)]
            lowest = min(alike[group[0], j] for group in members for j in group[1:])
            if lowest >= threshold:
                fitting[start, start + groups * p] = lowest
    found = similarity.recommend(alike, p, threshold, first)
    if not fitting:
        assert found is None
        return
    longest = max(end - start for start, end in fitting)
    best = max((low, span) for span, low in fitting.items() if span[1] - span[0] == longest)
    assert (found.similarity, found.cqil.end - found.cqil.start) == (best[0], longest)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_frontier_is_what_no_point_beats(points):
    costs, losses = zip(*points)
    found = similarity.frontier(costs, losses)
    for cost, loss in points:
        assert any(costs[i] <= cost and losses[i] <= loss for i in found)
    for i in found:
        assert not any((c < costs[i] and v <= losses[i]) or (c <= costs[i] and v < losses[i]) for c, v in points)


def placed(shapes, p, start, end):
    """The model of these shapes, and the configuration of each name that the tables of docs/performance.md have."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from synthetic import model_config

    grouped = {name: CqilConfig(p=p, start=start, end=end, placement=name) for name in ("leader", "sharded")}
    tensor = CqilConfig(p=p, placement="tensor")
    return model_config(shapes), {"sequential": CqilConfig(p=1), **grouped, "tensor": tensor}


@pytest.mark.parametrize(
    "shapes, p, start, end, measured",
    [
        ("llama-7b", 4, 14, 30, {"sequential": 3.480, "leader": 2.216, "sharded": 1.134, "tensor": 1.363}),
        ("llama-33b", 2, 22, 56, {"sequential": 15.329, "leader": 11.085, "sharded": 8.112, "tensor": 8.577}),
    ],
)
def test_predicted_latency_is_near_what_one_rank_takes(shapes, p, start, end, measured):
    """docs/performance.md, rank 0's share on one H200; peers add 0.7 us a collective to it."""
    config, configurations = placed(shapes, p, start, end)
    for name, cqil in configurations.items():
        milliseconds = measured[name] + 0.7e-3 * plan(config, cqil)[0].collectives
        assert milliseconds < decode_seconds(config, cqil, "float16") * 1e3 < 1.07 * milliseconds


@pytest.mark.parametrize(
    "stored, measured",
    [
        ("fp8", {"sequential": 2.003, "leader": 1.501, "sharded": 1.267, "tensor": 1.514}),
        ("int4", {"sequential": 1.591, "leader": 1.210, "sharded": 1.068, "tensor": 1.333}),
    ],
)
def test_predicted_latency_of_quantized_weights(stored, measured):
    """docs/quantization.md, two H200 (NVLink)."""
    config, configurations = placed("llama-7b", 2, 12, 30)
    for name, cqil in configurations.items():
        seconds = decode_seconds(config, cqil, "float16", weights=stored)
        assert seconds * 1e3 == pytest.approx(measured[name], rel=0.03)


@pytest.mark.parametrize(
    "shapes, start, end, measured",
    [
        ("llama-7b", 12, 30, {"sequential": 3.480, "leader": 2.556, "sharded": 1.984, "tensor": 2.231}),
        ("qwen1.5-14b", 17, 37, {"sequential": 6.680, "leader": 5.154, "sharded": 3.716, "tensor": 3.994}),
    ],
)
def test_predicted_latency_is_near_what_was_measured(shapes, start, end, measured):
    """docs/performance.md, two H200 (NVLink), float16, at 200 tokens."""
    config, configurations = placed(shapes, 2, start, end)
    for name, cqil in configurations.items():
        assert decode_seconds(config, cqil, "float16") * 1e3 == pytest.approx(measured[name], rel=0.03)
    one_join = configurations["sharded"].dropping(f"auto:{config.num_layers - end + start}", config.num_layers)
    fewer = plan(config, configurations["sharded"])[0].collectives - plan(config, one_join)[0].collectives
    assert fewer == config.num_layers - end + start
    if shapes == "llama-7b":
        assert plan(config, one_join)[0].collectives == 23
    saved = decode_seconds(config, configurations["sharded"], "float16") - decode_seconds(config, one_join, "float16")
    assert saved == pytest.approx(fewer * (H200.collective - H200.dropped))
    leader = CqilConfig(p=2, start=start, end=end, placement="leader")
    bypassed = CqilConfig(p=2, d=1, start=start, end=end, placement="leader")  # an exchange more in every group
    assert decode_seconds(config, bypassed, "float16") > decode_seconds(config, leader, "float16")
    saved = 1 - critical_bytes(config, leader, "float16") / critical_bytes(config, CqilConfig(p=1), "float16")
    assert saved == pytest.approx((end - start) / 2 / config.num_layers, rel=0.1)


@pytest.mark.parametrize("stored, row", [("int8", 4096 + 4), ("fp8", 4096 + 4), ("int4", 2048 + 32 * 3)])
def test_predicted_saving_of_a_quantized_head(stored, row):
    """The bytes of a row: codes, and scales in float32, or for each of 32 groups one in float16 and a zero point."""
    config, configurations = placed("llama-7b", 2, 12, 30)
    for name, cqil in configurations.items():
        rows = 32_000 if name in ("sequential", "leader") else 16_000  # on the slowest rank
        for weights in ("dense", "int8"):
            dense, quantized = (
                decode_seconds(config, cqil, "float16", weights=weights, head=h) for h in ("dense", stored)
            )
            saved = rows * (2 * 4096 - row / H200.quantized[stored]) / H200.bandwidth
            assert dense - quantized == pytest.approx(saved, rel=1e-6)


@pytest.mark.parametrize(
    "stored, groups, measured",
    [("dense", True, -0.3), ("dense", False, 0.0), ("int4", True, 2.5), ("int4", False, 2.9)],
)
def test_predicted_saving_of_a_dropped_join(stored, groups, measured):
    """docs/performance.md, microseconds of rank 0's share of four ranks on one H200; peers add 0.7 us to a join."""
    config, _ = placed("llama-7b", 2, 12, 30)
    cqil = CqilConfig(p=2, ranks_per_layer=2, start=12, end=30) if groups else CqilConfig(p=4, placement="tensor")
    without = cqil.dropping(range(12) if groups else range(32), config.num_layers)
    times = [decode_seconds(config, each, "float16", weights=stored) for each in (cqil, without)]
    joins = len(without.drop_attention_join)
    assert (times[0] - times[1]) * 1e6 / joins == pytest.approx(measured + 0.7, abs=0.5)


@pytest.mark.parametrize(
    "shapes, start, end, more",
    [
        ("llama-7b", 12, 30, {"sequential": 0.552, "leader": 0.398, "sharded": 0.291, "tensor": 0.291}),
        ("qwen1.5-14b", 17, 37, {"sequential": 0.891, "leader": 0.672, "sharded": 0.474, "tensor": 0.500}),
    ],
)
def test_predicted_latency_of_a_long_context(shapes, start, end, more):
    """docs/performance.md, two H200 (NVLink), float16: what 4,096 tokens take more than 200."""
    config, configurations = placed(shapes, 2, start, end)
    for name, cqil in configurations.items():
        short, long = (decode_seconds(config, cqil, "float16", context=n) * 1e3 for n in (200, 4096))
        assert long - short == pytest.approx(more[name], rel=0.12)
        half = decode_seconds(config, cqil, "float16", context=4096, kv_dtype="fp8") * 1e3
        assert half - short == pytest.approx((long - short) / 2)


def test_predicted_latency_on_h100():
    """docs/performance.md, two H100 (NVLink), float16."""
    config, configurations = placed("llama-7b", 2, 12, 30)
    for name, milliseconds in {"sequential": 4.84, "leader": 3.56, "sharded": 2.62, "tensor": 2.79}.items():
        found = decode_seconds(config, configurations[name], "float16", MACHINES["h100"])
        assert found * 1e3 == pytest.approx(milliseconds, rel=0.05)


def test_predictions_are_what_the_command_next_to_them_prints(monkeypatch, capsys):
    section = (ROOT / "docs" / "performance.md").read_text().split("\n### Four and eight GPUs, predicted\n")[1]
    section = section.split("\n### ")[0]
    command = re.search(r"    PYTHONPATH=scripts python - <<'END'\n(.*?)    END\n", section, re.DOTALL)[1]
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    exec(textwrap.dedent(command), {})
    rows = re.findall(
        r"^\| (\d) \| `(\w+)`(?:, (p=\S+) (.*\)).*)? \| (\S+) \| (\S+) \| (\S+) \|$", section, re.MULTILINE
    )
    for line, row in itertools.zip_longest(capsys.readouterr().out.splitlines(), rows):
        ranks, placement, size, span, *times = row
        assert line.startswith(f"{ranks} {placement} {size}") and line.endswith(" ".join(times)) and span in line


@pytest.mark.slow
def test_similarity_command(model, text, tmp_path):
    report, plot = tmp_path / "s.json", tmp_path / "s.png"
    common = ["--model", model, "--text", text, "--block", 32, "--text-tokens", 200, "--json", report, "--plot", plot]
    done = script("similarity", *common, "--threshold", 0.1, "--p", 2, "--first", 4, "--joins")
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert np.shape(found["similarity"]) == (8, 8) and plot.read_bytes()[:4] == b"\x89PNG"
    assert [(r["cqil"]["start"], r["cqil"]["end"]) for r in found["recommended"]] == [(4, 8)]
    network, ids = load_model(model), torch.tensor(open_tokenizer(model).pieces([text.read_text()])[0][:192])
    costs = found["joins"]["2"]
    assert len(costs) == 8 and f"{costs[6]:+.4f}" in done.stdout
    formulas, rows = Formulas(network.config, network.state_dict()), ids.view(-1, 32)
    logits = [formulas.logits(rows, p=2, drop_attention_join=drop)[:, :-1].transpose(1, 2) for drop in ((), (6,))]
    losses = [torch.nn.functional.cross_entropy(each, rows[:, 1:]).item() for each in logits]
    assert costs[6] == pytest.approx(losses[1] - losses[0], abs=1e-5)
    assert_user_error(script("similarity", *common, "--p", "1"), "--p 1")
    assert_user_error(
        script("similarity", *common, "--block", "5000", "--text", tmp_path / "none"), "none: no such file"
    )


# Texts


def test_texts_come_from_files_directories_json_lines_and_datasets(model, tmp_path):
    import datasets

    tokenizer, config = open_tokenizer(model), families.read_config(model / "config.json")
    texts = [TEXT[i * 500 : i * 500 + 300 + i] for i in range(4)]
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "a.txt").write_text(texts[0])
    (tmp_path / "dir" / "b.md").write_text(texts[1])
    texts[2] += "\u2028 goes on"  # a line end that may stand within a string
    (tmp_path / "c.jsonl").write_text(json.dumps({"body": texts[2]}, ensure_ascii=False) + "\n\n")
    datasets.Dataset.from_dict({"body": [texts[3]]}).save_to_disk(tmp_path / "saved")
    paths = [tmp_path / "dir", tmp_path / "c.jsonl", tmp_path / "saved"]
    expected = []
    for part in texts:
        expected += ([70] if expected else []) + tokenizer.pieces([part])[0]
    found = text_blocks(paths, tokenizer, config, 16, None, "body")
    assert found.ravel().tolist() == expected[: len(expected) // 16 * 16]
    assert text_blocks(paths, tokenizer, config, 16, 35, "body").tolist() == found[:2].tolist()
    np.save(tmp_path / "ids.npy", found.astype(np.uint16))
    assert (text_blocks([tmp_path / "ids.npy"], tokenizer, config, 16, None, "body") == found).all()
    # A long text is tokenized in pieces, which single bytes do not notice.
    long = TEXT * 20
    assert corpus.encode(iter([long]), tokenizer, None).tolist() == tokenizer.pieces([long])[0]


def test_what_is_no_text_is_an_error(model, tmp_path):
    import datasets

    tokenizer, config = open_tokenizer(model), families.read_config(model / "config.json")
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "field.jsonl").write_text('{"other": 1}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["x"]})}).save_to_disk(tmp_path / "splits")
    np.save(tmp_path / "float.npy", np.zeros(40))
    np.save(tmp_path / "range.npy", np.full(40, 260))
    (tmp_path / "bad.npy").write_bytes(b"no array")
    cases = {
        "gone.txt": "no such file", "empty": "holds no", "binary.txt": "not UTF-8", "short.txt": "fewer than one block",
        "field.jsonl": "line 1 has no text in 'text'", "broken.jsonl": "line 2 is not valid JSON",
        "splits": "names the splits", "float.npy": "token ids", "range.npy": "token ids", "bad.npy": "cannot be read",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(UserError, match=name) as error:
            text_blocks([tmp_path / name], tokenizer, config, 16, None, "text")
        assert message.replace("names", "holds") in str(error.value)


# Perplexity


def test_scores_equal_hugging_faces_loss(model):
    network, blocks = load_model(model), tokens((3, 20))
    ids = torch.from_numpy(blocks.astype(np.int64))
    with torch.no_grad():
        out = network(ids, labels=ids)
    found = perplexity.score_reference(network, blocks)
    assert found.perplexity == pytest.approx(math.exp(out.loss), rel=1e-5)
    assert (found.top1 == out.logits[:, :-1].argmax(-1).numpy()).all() and found.agreement(found) == 1
    logits = out.logits[0, :-1].numpy() * 3
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits).double(), ids[0, 1:], reduction="none")
    np.testing.assert_allclose(perplexity.negative_log_likelihood(logits, blocks[0, 1:]), expected, rtol=1e-5)


def test_demo_texts_are_plain_prose(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import fetch_demo_text

    brown = (
        "\n\n\tThe/at jury/nn said/vbd ``/`` no/at ''/'' to/in us/ppo ,/, twice/rb ./.\n"
        "Why/wrb ?/. ?/.\n\n\n\tWell/uh ;/. ;/. so/rb ./.\n\n"
    )
    assert fetch_demo_text.plain_brown(brown) == 'The jury said "no" to us, twice. Why?\n\nWell; so.'
    markdown = "---\ntitle: x\n---\nOne [link](http://a.b) and <b>bold</b>.\n```\ncode\n```\n\n\nTwo."
    assert fetch_demo_text.plain_markdown(markdown) == "One link and bold.\n\nTwo."
    asciidoc = "[[anchor]]\n== One.(((index)))\n[source,console]\n----\n$ git <1>\n----\n<1> Git\n====\nSee <<a,two>>."
    assert fetch_demo_text.plain_asciidoc(asciidoc).split() == ["One.", "See", "two."]
    xhtml = "<head><title>x</title></head><body><p>A\n\tline &amp; <i>more</i>.</p>\n<p>Next.</p></body>"
    assert fetch_demo_text.plain_xhtml(xhtml) == "A line & more.\n\nNext."
    # The files that match, of a repository at a commit.
    repository, output = tmp_path / "repository", tmp_path / "output"
    for path, content in {"book/a/one.asc": "One.", "book/two.asc": "Two.", "three.md": "Three."}.items():
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        (repository / path).write_text(content)
    git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    (tmp_path / "config").write_text(f'[url "file://{repository}"]\n insteadOf = https://github.com/some/book\n')
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    output.mkdir()
    convert = fetch_demo_text.files("book", ".asc", str)
    assert convert(fetch_demo_text.checkout(output, "some/book", commit, ["/book/**/*.asc"])) == {
        "book": "One.\n\nTwo."
    }
    # The command: whole or not at all, and over nothing but its own.
    monkeypatch.setattr(fetch_demo_text, "SOURCES", [("some/book", commit, ["/book/**/*.asc"], convert)])

    def pip(command, **options):
        if "download" not in command:
            return run_command(command, **options)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "some-1.whl", "w") as archive:
            archive.writestr("news.txt", "News.")
        return subprocess.CompletedProcess(command, 0, "", "")

    run_command = subprocess.run
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(fetch_demo_text, "HELD_OUT", ("some==1", "news.txt", "0" * 64))
    made, flags = tmp_path / "made", argparse.Namespace(output=tmp_path / "made", force=False)
    with pytest.raises(UserError, match="expected sha256"):
        fetch_demo_text.fetch(flags)
    assert not made.exists()
    monkeypatch.setattr(fetch_demo_text, "HELD_OUT", ("some==1", "news.txt", hashlib.sha256(b"News.").hexdigest()))
    for flags.force in (False, True):
        fetch_demo_text.fetch(flags)
        texts = {str(path.relative_to(made)): path.read_text() for path in made.rglob("*.txt")}
        assert texts == {"english/book.txt": "One.\n\nTwo.", "heldout.txt": "News."}
        (made / "english/book.txt").write_text("old")
    (made / "mine.txt").write_text("mine")
    for flags.force, message in ((False, "exists already"), (True, "something else")):
        with pytest.raises(UserError, match=message):
            fetch_demo_text.fetch(flags)
    assert (made / "mine.txt").read_text() == "mine"
    monkeypatch.setattr(fetch_demo_text, "SOURCES", [("some/book", "0" * 40, ["*"], convert)])
    flags.output = tmp_path / "other"
    with pytest.raises(UserError, match="github.com/some/book cannot be fetched"):
        fetch_demo_text.fetch(flags)
    assert not flags.output.exists()


# Distillation


def test_divergence_and_its_gradient_are_those_of_float64():
    from cqil_trt.quality.distillation import divergence

    torch.manual_seed(SEED)
    teacher, student = torch.randn(3, 1700, 40) * 3, (torch.randn(3, 1700, 40) * 3).requires_grad_()
    found = divergence(teacher, student)
    (gradient,) = torch.autograd.grad(found, student)
    p, exact = teacher.double().softmax(-1), student.detach().double().requires_grad_()
    expected = (p * (p.log() - exact.log_softmax(-1))).sum(-1).mean()
    (exact_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-9)


def test_teacher_is_the_unchanged_model_and_student_starts_as_cqil(model):
    from cqil_trt.quality.distillation import Student

    blocks = torch.from_numpy(tokens((2, 16)).astype(np.int64))
    network = load_model(model)
    with torch.no_grad():
        unchanged = network(blocks).logits
    cqil = CqilConfig(p=2, d=1, start=2, end=6, drop_attention_join=(1, 7))
    expected = cqil_trt.CqilModel.of(load_model(model), cqil)(blocks).logits
    student = Student(network, cqil, 4, 8, 0.0)
    assert torch.equal(student.model(blocks).logits, expected)
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    trained = student.model(blocks).logits
    with student.teaching():
        assert torch.equal(student.model(blocks).logits, unchanged)
    assert not torch.allclose(trained, expected) and torch.equal(student.model(blocks).logits, trained)


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_self_generated_text_is_the_models_own(model, top_p):
    from cqil_trt.quality.distillation import self_generated

    network, first = load_model(model), np.array([7, 40, 99])

    def sample(seed):
        return self_generated(network, 40, 24, first[:, None], 16, seed, top_p, progress=False)

    found = sample(SEED)
    assert found.shape == (40, 24) and set(found[:, 0]) <= set(first) and found.max() < 260
    assert (found == sample(SEED)).all() and (found != sample(SEED + 1)).any()
    # The likeliest tokens after the first, then draws: sampled, the text's loss is near the entropy of what is left.
    ids = torch.from_numpy(found.astype(np.int64))
    with torch.no_grad():
        logits = network(ids).logits
    assert (logits[:, :4].argmax(-1) == ids[:, 1:5]).all() and (logits[:, 4:-1].argmax(-1) != ids[:, 5:]).any()
    probability, order = logits[:, 4:-1].double().softmax(-1).sort(descending=True)
    before = probability.cumsum(-1) - probability
    probability = torch.where(before < top_p, probability, 0)
    probability = (probability / probability.sum(-1, keepdim=True)).gather(-1, order.argsort(-1))
    chosen = probability.gather(-1, ids[:, 5:, None])
    assert (chosen > 0).all()
    entropy = torch.special.entr(probability).sum(-1).mean()
    assert -chosen.log().mean() == pytest.approx(entropy.item(), rel=0.1)


def test_conversations_begin_as_the_chat_template_begins(model):
    from cqil_trt.quality.distillation import self_generated

    tokenizer = open_tokenizer(model)
    beginning = tokenizer.chat_beginning()
    assert tokenizer.chat("x")[: len(beginning)] == beginning and len(beginning) > 1
    found = self_generated(load_model(model), 20, 24, np.array([beginning]), 8, SEED, 1.0, progress=False)
    assert (found[:, : len(beginning)] == beginning).all()
    # Drawn from there on: a user who says the same every time would teach nothing.
    assert len({tuple(block) for block in found}) > 15


def test_an_adapter_of_the_concurrent_layers_alone_in_bfloat16(tmp_path):
    from safetensors.torch import load_file

    from cqil_trt.lora import LoraReader
    from cqil_trt.quality.distillation import Student

    directory = make_model(tmp_path / "model", num_hidden_layers=8)
    cqil = CqilConfig(p=2, start=2, end=4, drop_attention_join=(5,))
    student = Student(load_model(directory), cqil, 4, 8, 0.0, concurrent_only=True)
    student.save(tmp_path / "adapter", torch.bfloat16)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert {name.split(".layers.")[1].split(".")[0] for name in tensors} == {"2", "3", "5"}
    config, reader = open_checkpoint(directory)
    assert LoraReader(reader, tmp_path / "adapter", config).merged == 3 * 7
    assert CqilConfig.of_adapter(tmp_path / "adapter") == cqil


def test_checkpointed_gradients_keep_nothing_of_a_group_but_its_input(model):
    """transformers checkpoints a layer's class, in one release by its forward and in another by its __call__."""
    from cqil_trt.quality.distillation import Student

    blocks = torch.from_numpy(tokens((2, 32)).astype(np.int64))

    def kept(checkpointed):
        torch.manual_seed(SEED)
        student = Student(load_model(model), CqilConfig(p=4, d=1, start=0, end=8), 4, 8, 0.0)
        if checkpointed:
            student.model.gradient_checkpointing_enable()
            student.model.enable_input_require_grads()
        size = 0

        def pack(tensor):
            nonlocal size
            size += tensor.nbytes
            return tensor

        student.model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = student.model.model.model(input_ids=blocks, use_cache=False).last_hidden_state
        out.square().sum().backward()
        gradients = [p.grad for p in student.model.parameters() if p.grad is not None]
        return size, torch.cat([g.flatten() for g in gradients])

    (whole, expected), (few, found) = kept(False), kept(True)
    assert few < whole / 5
    torch.testing.assert_close(found, expected)


def finetune(model, text, output, *options, **keywords):
    small = ["--sequence-length", 32, "--batch-size", 4, "--lora-rank", 4, "--steps", 30, "--save-steps", 8]
    common = ["--model", model, *SHAPE, "--text", text, "--output", output, *small, "--seed", SEED % 1000]
    return script("finetune", *common, *options, **keywords)


@pytest.fixture(scope="module")
def adapter(model, text):
    """A trained adapter: 30 steps on a CPU."""
    directory = model.parent / "adapter"
    done = finetune(model, text, directory, "--eval-text", text)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.slow
def test_adapter_is_what_build_takes_with_its_configuration_inside(model, adapter, tmp_path):
    assert {path.name for path in adapter.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "cqil_config.json", "loss.png", "training.json",
    }  # fmt: skip
    report = json.loads((adapter / "training.json").read_text())
    losses = [loss for _, loss in report["loss"]]
    assert report["steps"] == 30 and losses[-1] < 0.8 * losses[0]
    assert report["held_out"]["models"]["unchanged"]["top1_equal"] == 1
    # PEFT merges it, and CQIL's reference then says what the engine says.
    done = build("--model", model, "--lora", adapter, "--output", tmp_path / "engine")
    assert done.returncode == 0 and "2 groups of 2 layers in [2, 6)" in done.stdout, done.stderr
    merged = PeftModel.from_pretrained(load_model(model), adapter).merge_and_unload()
    expected = cqil_trt.CqilModel(merged, 2, 0, 2, 6, drop_attention_join="6-7")(
        torch.tensor([[5, 9, 77, 100]])
    ).logits[0]
    (tmp_path / "prompt.json").write_text("[5, 9, 77, 100]")
    flags = ["--token-ids", tmp_path / "prompt.json", "--logits-out", tmp_path / "logits.npy", "--max-new-tokens", 1]
    assert mpirun(2, "--engine", tmp_path / "engine", *flags).returncode == 0
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected.detach(), rtol=1e-4, atol=1e-4)
    # Flags win over what is inside, and the plan says so.
    done = build("--model", model, "--lora", adapter, "--end", 4, "--output", tmp_path / "other")
    assert "1 group of 2 layers in [2, 4)" in done.stdout
    assert "the adapter was trained for p=2 d=0 [2, 6), attention joins dropped in 6-7" in done.stdout
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in adapter.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "cqil_config.json").write_text('{"p": 2, "d": 0, "start": 2, "end": 5}')
    assert_user_error(build("--model", model, "--lora", damaged), "cqil_config.json", "does not divide")


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_training_is_the_same_training(model, recompute, tmp_path, monkeypatch):
    """With the compiler's front end, which is where training could change; what it generates is PyTorch's to test."""
    import transformers

    from cqil_trt.quality.distillation import Blocks, DistillationTrainer, Student

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    blocks, losses, states, scores = tokens((12, 16)), [], [], []
    for compiled in (False, True):
        torch.manual_seed(SEED)
        cqil = CqilConfig(p=2, d=1, start=2, end=6, drop_attention_join=(1,))
        student = Student(load_model(model), cqil, 4, 8, 0.0)
        if compiled:
            student.compile()
        if recompute:
            student.model.enable_input_require_grads()
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(compiled)), max_steps=6, per_device_train_batch_size=12, learning_rate=5e-3,
            gradient_checkpointing=recompute, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no",
            disable_tqdm=True, remove_unused_columns=False, label_names=[],
        )  # fmt: skip
        trainer = DistillationTrainer(student, False, args=settings, train_dataset=Blocks(blocks))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        states.append(student.model.state_dict())
        with torch.compiler.set_stance("force_eager"):
            scores.append(perplexity.score_reference(student.model.get_base_model(), blocks).log_perplexity)
    assert losses[0][-1] < 0.9 * losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert states[0].keys() == states[1].keys() and scores[1] == pytest.approx(scores[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which training is compiled for")
def test_training_compiled_for_the_gpu_is_the_same_training(model, text, tmp_path):
    losses = {}
    for compiled in ("on", "off"):
        done = finetune(model, text, tmp_path / compiled, "--compile", compiled, "--precision", "fp32")
        assert done.returncode == 0, done.stderr
        losses[compiled] = [loss for _, loss in json.loads((tmp_path / compiled / "training.json").read_text())["loss"]]
    np.testing.assert_allclose(losses["on"], losses["off"], rtol=1e-2)


@pytest.mark.slow
def test_training_resumed_after_a_kill_ends_where_it_would_have(model, text, adapter, tmp_path):
    output = tmp_path / "adapter"
    command = [sys.executable, "scripts/finetune.py", "--model", model, *SHAPE, "--text", text, "--output", output]
    command += ["--sequence-length", 32, "--batch-size", 4, "--lora-rank", 4, "--steps", 30, "--save-steps", 8]
    command += ["--seed", SEED % 1000]
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    checkpoints = output / "checkpoints"
    while not (checkpoints / "checkpoint-16" / "trainer_state.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "adapter_config.json").exists()
    # What was being written then does not look finished.
    (checkpoints / "checkpoint-999").mkdir()
    (checkpoints / "checkpoint-999" / "trainer_state.json").write_text('{"global_')
    assert_user_error(finetune(model, text, output), "exists already", "--resume")
    assert_user_error(finetune(model, text, output, "--resume", "--lora-alpha", 7), "--lora-alpha 32.0, found 7.0")
    done = finetune(model, text, output, "--resume", "--compile", "off")  # which decides nothing about the training
    assert done.returncode == 0 and "from " in done.stdout, done.stderr
    expected, found = (json.loads((path / "training.json").read_text())["loss"] for path in (adapter, output))
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert found[-1][1] == pytest.approx(expected[-1][1], abs=1e-3)
    assert not checkpoints.exists()
    assert_user_error(finetune(model, text, output, "--resume"), "no unfinished training")


def test_training_resumed_after_its_last_step_takes_no_step_more(model, text, tmp_path, monkeypatch):
    flags = ["--model", model, *SHAPE, "--text", text, "--sequence-length", 32, "--batch-size", 4, "--lora-rank", 4]
    flags += ["--steps", 4, "--save-steps", 2, "--output", tmp_path / "adapter"]

    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("finetune")
    options = script.parser().parse_args([*map(str, flags)])
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        patch.setattr(script, "save", lambda student, output, dtype: sys.exit("killed"))
        script.train(options)
    script.train(script.parser().parse_args([*map(str, flags), "--resume"]))
    report = json.loads((tmp_path / "adapter" / "training.json").read_text())
    assert report["steps"] == 4 and (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_two_processes_with_checkpointed_gradients_train_as_one_with_twice_the_batch(model, text, adapter, tmp_path):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--", "scripts/finetune.py", "--model", model]
    command += [*SHAPE, "--text", text, "--output", tmp_path / "adapter", "--sequence-length", 32, "--batch-size", 2]
    command += ["--lora-rank", 4, "--steps", 30, "--seed", SEED % 1000, "--gradient-checkpointing", "on"]
    done = run(sys.executable, *command, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    expected, found = (json.loads((path / "training.json").read_text()) for path in (adapter, tmp_path / "adapter"))
    assert found["steps"] == expected["steps"] and found["tokens"] == expected["tokens"]
    np.testing.assert_allclose(found["loss"], expected["loss"], atol=1e-3)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--p", 1, "--drop-attention-join", "none"], "no layers run concurrently"),
        (["--steps", 0], "--steps must be at least 1"),
        (["--sequence-length", 4096], "128 positions"),
        (["--batch-size", 5000], "fewer than one step's"),
        (["--resume", "--force"], "give one of them"),
        (["--lora-rank", "many"], "--lora-rank"),
        (["--self-generated", 99, "--top-p", 0], "--top-p must be above 0"),
        (["--top-p", 0.9], "--self-generated, which is not given"),
        (["--lora-dropout", 2], "--lora-dropout must be"),
        (["--text", "gone.txt"], "gone.txt: no such file"),
        (["--force", "--output", "docs"], "this is none"),
        (["--learning-rate", "nan"], "--learning-rate must be above 0, found nan"),
    ],
)
def test_wrong_training_is_refused_in_one_line(flags, message, model, text, tmp_path, refused):
    common = ["--model", model, *SHAPE, "--text", text, "--sequence-length", 32, "--output", tmp_path / "adapter"]
    refused("finetune", lambda script, options: script.train(options), [*common, *flags], message)
    assert not (tmp_path / "adapter").exists() and (ROOT / "docs" / "architecture.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [5, 12])  # noticed where the last step is logged, and where the tenth is
def test_a_training_that_diverges_leaves_no_adapter(steps, model, text, tmp_path, refused):
    flags = ["--model", model, *SHAPE, "--text", text, "--sequence-length", 32, "--batch-size", 4, "--steps", steps]
    flags += ["--learning-rate", 1e30, "--precision", "fp32", "--output", tmp_path / "adapter"]
    refused("finetune", lambda script, options: script.train(options), flags, "--learning-rate below 1e+30")
    assert not list((tmp_path / "adapter").glob("adapter_*"))


@given(st.lists(st.sampled_from([0.0, 0.1, 0.15, 0.2, 0.3, 1.0, 7.0]), max_size=8))
def test_largest_rise_is_the_furthest_above_what_was_lowest_before(losses):
    found = largest_rise(list(enumerate(losses)))
    ratios = {
        (i, j): losses[j] / losses[i] if losses[i] else math.inf
        for j in range(len(losses))
        for i in range(j)
        if losses[j] > 2 * losses[i]
    }
    assert (found is None) == (not ratios)
    if found is not None:
        (i, low), (j, high) = found
        assert (losses[i], losses[j]) == (low, high)
        assert ratios[i, j] == pytest.approx(max(ratios.values()))


# Evaluation


def make_tasks(directory):
    """Task files of the harness: choices, a text's likelihood, generation, of pieces of the README."""
    # No long words: an answer of two must fit into --max-length tokens, which are bytes here.
    random, words = np.random.default_rng(SEED), [word for word in TEXT.split() if len(word) <= 20]

    def piece(count):
        start = random.integers(len(words) - count)
        return " ".join(words[start : start + count])

    rows = [
        {"question": piece(5), "choices": [piece(2) for _ in range(3)], "answer": int(random.integers(3))}
        for _ in range(8)
    ]
    directory.mkdir()
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {directory / 'rows.jsonl'}}}}}\ntest_split: test\n"
    )
    kinds = {
        "own_choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
        "own_text": "output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{question}} {{choices[0]}} {{choices[1]}}'\nmetric_list: [{metric: byte_perplexity}]\n",
        "own_generation": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{choices[0]}}'\n"
        "generation_kwargs: {until: ['e'], max_gen_toks: 12, do_sample: false}\nmetric_list: [{metric: exact_match}]\n",
    }
    for name, body in kinds.items():
        (directory / f"{name}.yaml").write_text(f"task: {name}\n{common}{body}")
    return ",".join(kinds)


@pytest.mark.slow
def test_engine_scores_every_item_as_the_harness_scores_the_reference(model, text, adapter, tmp_path):
    names = make_tasks(tmp_path / "tasks")
    assert build("--model", model, "--lora", adapter, "--output", tmp_path / "engine").returncode == 0
    common = ["--text", text, "--block", 64, "--text-tokens", 640, "--max-length", 64, "--samples"]
    common += ["--tasks", names, "--task-path", tmp_path / "tasks", "--json"]
    done = script("evaluate", "--model", model, "--lora", adapter, *common, tmp_path / "reference.json")
    assert done.returncode == 0, done.stderr
    assert "wins back" in done.stdout and "own_choice" in done.stdout
    for label in ("unchanged", "CQIL", "CQIL + adapter"):
        assert done.stdout.splitlines().count(f"evaluating {label} ...") == 1
    # Four ranks are two replicas, which share the questions.
    engine = [
        "scripts/evaluate.py",
        "--engine",
        tmp_path / "engine",
        "--device",
        "cpu",
        *common,
        tmp_path / "engine.json",
    ]
    done = run("mpirun", "-n", 4, sys.executable, *engine)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count(f"evaluating {tmp_path / 'engine'} ...") == 1
    reference = json.loads((tmp_path / "reference.json").read_text())
    assert [column["label"] for column in reference["columns"]] == ["unchanged", "CQIL", "CQIL + adapter"]
    expected = reference["columns"][2]
    (found,) = json.loads((tmp_path / "engine.json").read_text())["columns"]
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    assert found["tasks"].keys() == expected["tasks"].keys() and len(expected["samples"]) == 3
    for task, samples in expected["samples"].items():
        assert len(samples) == 8
        for ours, theirs in zip(found["samples"][task], samples):
            assert ours["doc"] == theirs["doc"]
            if task == "own_generation":
                assert ours["filtered_resps"] == theirs["filtered_resps"]
            elif task == "own_text":
                assert ours["filtered_resps"][0] == pytest.approx(theirs["filtered_resps"][0], rel=1e-5)
            else:
                for (value, greedy), (other, same) in zip(ours["filtered_resps"], theirs["filtered_resps"]):
                    assert float(value) == pytest.approx(float(other), abs=1e-3) and greedy == same


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "what to evaluate on?"),
        (["--text", "gone.txt"], "gone.txt: no such file"),
        (["--text", "README.md", "--block", 0], "--block must be at least 2"),
        (["--text", "README.md", "--lora", "gone"], "--lora gone: no such directory"),
        (["--text", "README.md", "--json", "gone/f.json"], "--json gone/f.json: its directory"),
        (["--tasks", ","], "--tasks ,: names no task"),
        (["--tasks", "sciq", "--samples"], "--samples needs --json"),
        (["--tasks", "sciq", "--text-tokens", 9], "--text-tokens needs --text"),
        (["--text", "README.md", "--num-fewshot", 0], "--num-fewshot needs --tasks"),
    ],
)
def test_wrong_evaluation_is_refused_in_one_line(flags, message, model, refused):
    arguments = ["--model", model, *SHAPE, *flags]
    refused("evaluate", lambda script, options: script.evaluate(options, Job()), arguments, message)


@pytest.mark.slow
@pytest.mark.parametrize("task, message", [("no_such_task", "no task"), ("sciq", "")])
def test_a_task_that_is_not_to_be_had_ends_in_one_line(task, message, model):
    """sciq's data is on a network that is not there."""
    assert_user_error(script("evaluate", "--model", model, *SHAPE, "--tasks", task), f"--tasks {task}", message)


@pytest.mark.slow
def test_an_error_anywhere_ends_all_ranks(model, tmp_path):
    assert build("--model", model, *SHAPE, "--output", tmp_path / "engine", "--max-seq-len", 64).returncode == 0
    make_tasks(tmp_path / "tasks")
    generation = (tmp_path / "tasks" / "own_generation.yaml").read_text().replace("own_generation", "own_empty")
    (tmp_path / "tasks" / "own_empty.yaml").write_text(generation.replace("'{{question}}'", "''"))
    (tmp_path / "tasks" / "needs.py").write_text("import a_package_that_is_not_there\ndef f(doc): return ''\n")
    own = f"{(tmp_path / 'tasks' / 'own_text.yaml').read_text()}process_docs: !function needs.f\n"
    (tmp_path / "tasks" / "own_needs.yaml").write_text(own.replace("own_text", "own_needs"))
    cases = {
        "sciq": "--tasks sciq",  # rank 0 finds no network
        "own_empty": "prompt 1 is empty",  # every rank refuses the prompt
        "own_needs": "a_package_that_is_not_there",  # rank 0 lacks a package
    }
    for task, message in cases.items():
        command = ["scripts/evaluate.py", "--engine", tmp_path / "engine", "--device", "cpu", "--tasks", task]
        command += ["--task-path", tmp_path / "tasks", "--max-length", 64]
        assert_user_error(run("mpirun", "-n", 2, sys.executable, *command), message)
    command = ["scripts/evaluate.py", "--engine", tmp_path / "engine", "--text", "README.md"]
    assert_user_error(run("mpirun", "-n", 2, sys.executable, *command), "--block 1024", "at most --block 65")
    command += ["--block", 60, "--kv-dtype", "fp8"]
    assert_user_error(run("mpirun", "-n", 2, sys.executable, *command), "--kv-dtype is for the reference")
