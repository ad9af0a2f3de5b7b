"""The scripts without the package; of benchmark*.py what they refuse, and that the parts of the CPU's are the whole."""

import json
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from support import ROOT, SEED
from support.chat_models import make_chat_model
from support.checkpoints import make_model
from support.needs import need
from support.processes import assert_user_error, mpirun, run
from support.serving import ServerProcess

import cqil_trt
from cqil_trt.commands import RankParser
from cqil_trt.gpu import cuda
from cqil_trt.job import Job


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_parts_of_a_step_add_up(ranks, tmp_path):
    make_model(tmp_path / "model")
    shape = {"p": ranks, "start": 0, "end": 6} if ranks > 1 else {"p": 1}
    cqil_trt.build(model=tmp_path / "model", output=tmp_path / "engine", max_seq_len=64, probes="never", **shape)
    flags = ("--engine", tmp_path / "engine", "--context", 7, "--steps", 9, "--json", tmp_path / "found.json")
    script = "scripts/benchmark_cpu.py"
    done = mpirun(ranks, *flags, script=script) if ranks > 1 else run(sys.executable, script, *flags)
    assert done.returncode == 0, done.stderr
    step = json.loads((tmp_path / "found.json").read_text())["milliseconds"]
    assert all(step[name] > 0 for name in ("matrix products", "attention", "MPI", "the rest"))
    assert sum(step.values()) - step["total"] == pytest.approx(step["total"], rel=1e-9)
    assert "matrix products" in done.stdout


@pytest.mark.slow
def test_serving_is_measured_beside_the_engine(tmp_path):
    make_chat_model(tmp_path / "model")
    cqil_trt.build(model=tmp_path / "model", p=2, output=tmp_path / "engine", max_seq_len=64, probes="never")
    flags = ("--engine", tmp_path / "engine", "--concurrency", "1,3", "--prompt-tokens", 7, "--new-tokens", 5)
    done = run(sys.executable, "scripts/benchmark_serving.py", *flags, "--rounds", 2, "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    for found, clients in zip(json.loads((tmp_path / "found.json").read_text()), (1, 3)):
        assert found["clients"] == clients and len(found["first_token_ms"]) == 2 * clients
        times = found["engine_step_ms"], found["between_tokens_ms"]["50"], min(found["first_token_ms"])
        assert all(time > 0 for time in times)
        stages = np.array([found["stages_ms"][name] for name in ("asked", "begun", "first_token")])
        assert stages.shape == (3, 2 * clients) and (np.diff(stages, axis=0) >= 0).all() and (stages > 0).all()
        assert np.median(stages[-1]) <= np.median(found["first_token_ms"])
    assert "engine's step ms" in done.stdout and "it had begun" in done.stdout


@pytest.mark.slow
def test_the_parts_of_a_start(tmp_path):
    need("uvicorn", "starlette", "pydantic", "prometheus_client", "llguidance")
    make_model(tmp_path / "model")
    engine = cqil_trt.build(model=tmp_path / "model", output=tmp_path / "engine", max_seq_len=64, probes="never", p=2)
    flags = ("--engine", engine.path, "--device", "cpu", "--rounds", 1, "--json", tmp_path / "found.json")
    done = mpirun(2, *flags, script="scripts/benchmark_start.py")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["bytes"] == sum(path.stat().st_size for path in engine.path.iterdir() if path.name != "config.json")
    seconds = found["seconds"]
    assert seconds["parts"].keys() == {
        "process",
        "files",
        "session",
        "tokenizer",
        "first passes",
        "graphs",
        "weights",
        "grammars",
    }
    assert {"PyTorch", "waiting for the verification"} <= seconds["within"]["session"].keys()
    assert 0 < max(seconds["parts"].values()) < seconds["start"] and not found["on_gpu"]
    assert found["ratio"] == pytest.approx(seconds["start"] / seconds["copy"])
    refused = mpirun(1, *flags, script="scripts/benchmark_start.py")
    assert_user_error(refused, "the engine needs 2 MPI ranks")


@pytest.mark.slow
def test_two_servers_are_compared(tmp_path):
    """The same server twice, as one and as the other."""
    need("uvicorn", "starlette", "pydantic", "prometheus_client", "llguidance")
    make_chat_model(tmp_path / "model")
    cqil_trt.build(model=tmp_path / "model", p=1, output=tmp_path / "engine", max_seq_len=64, probes="never")
    server = ServerProcess(1, tmp_path / "engine", "--device", "cpu")
    flags = ["--engine", tmp_path / "engine", "--concurrency", "1,2", "--prompt-tokens", 7, "--new-tokens", 5]
    for url in (server.url, server.url + "/"):
        flags += ["--url", url]
    done = run(sys.executable, "scripts/benchmark_serving.py", *flags, "--rounds", 2, "--json", tmp_path / "found.json")
    assert server.stop() == 0 and done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(row["clients"], len(row["first_token_ms"])) for row in found] == [(1, 2), (1, 2), (2, 4), (2, 4)]
    with socket.socket() as ended:  # on whose port nobody listens, and nobody else can
        ended.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{ended.getsockname()[1]}"
        refused = run(sys.executable, "scripts/benchmark_serving.py", *flags[:8], "--url", nobody)
    assert_user_error(refused, "Connection refused")
    refused = run(sys.executable, "scripts/benchmark_serving.py", *flags[:8], "--url", "x")
    assert_user_error(refused, "--url x: expected http://host:port")


def test_events_that_a_proxy_cuts_are_whole(monkeypatch):
    """Chunks that end anywhere, and several events in one of them."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from benchmark_serving import Client, Served

    random = np.random.default_rng(SEED)
    events = [b'data: {"usage": {"completion_tokens": %d}}\n\n' % tokens for tokens in (1, 2, 4, 5)]
    body = b"".join([*events, b"data: [DONE]\n\n"])
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def answer():
            with listener.accept()[0] as client:
                for _ in range(20):
                    client.recv(1 << 16)
                    cuts = sorted({0, len(body), *random.integers(1, len(body), size=random.integers(9)).tolist()})
                    pieces = [body[first:last] for first, last in zip(cuts, cuts[1:])]
                    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [*pieces, b""])
                    client.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)

        answering = pool.submit(answer)
        client, served = Client(listener.getsockname()), Served()
        for _ in range(20):
            client.complete([1, 2], 5, served)
        client.close()
        answering.result()
    assert len(served.first) == 20 and len(served.between) == 20 * 4


VLLM = """
import json, pathlib, time
from types import SimpleNamespace

__version__ = "0"


class SamplingParams(SimpleNamespace):
    pass


class LLM:
    def __init__(self, model, tensor_parallel_size, enable_prefix_caching, max_model_len, **others):
        layers = json.loads((pathlib.Path(model) / "config.json").read_text())["num_hidden_layers"]
        self.step = 0.002 * layers / tensor_parallel_size
        self.longest, self.seen = max_model_len, set()
        assert not enable_prefix_caching

    def generate(self, prompts, sampling, use_tqdm):
        prompts = [tuple(prompt["prompt_token_ids"]) for prompt in prompts]
        assert not self.seen & set(prompts)
        self.seen |= set(prompts)
        assert max(map(len, prompts)) + sampling.max_tokens <= self.longest
        time.sleep(0.0002 * len(prompts[0]) + self.step * len(prompts) * (sampling.max_tokens - 1))
        output = SimpleNamespace(token_ids=[0] * sampling.max_tokens)
        return [SimpleNamespace(outputs=[output]) for _ in prompts]
"""


def test_vllm_is_measured_where_it_is(tmp_path):
    """A stand-in for vLLM, whose prompts take 0.2 ms a token, and steps 1 ms a layer and sequence with two GPUs."""
    (tmp_path / "vllm.py").write_text(VLLM)
    flags = ["--layers", 3, "--tensor-parallel", 2, "--batches", "1,2", "--prefills", "50,100", "--context", 20]
    flags += ["--steps", 16, "--rounds", 3, "--json", tmp_path / "found.json"]
    done = run(sys.executable, "scripts/benchmark_vllm.py", *flags, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["milliseconds"]
    assert found["decode"] == {"1": pytest.approx(3, rel=0.2), "2": pytest.approx(6, rel=0.2)}
    assert found["first_token"] == {"50": pytest.approx(10, rel=0.2), "100": pytest.approx(20, rel=0.2)}
    assert "step, batch 2" in done.stdout and "first token, 100" in done.stdout


@pytest.mark.parametrize(
    "line, said",
    [
        ("benchmark --synthetic", "llama-7b-p2-d0 with 1 ranks: mpirun -n 2, or --alone"),
        ("benchmark --synthetic --alone --preset llama-7b-p2-d1", "--alone takes neither bypassing"),
        ("benchmark --synthetic --alone --end 40", "--end 40 is beyond the model"),
        ("benchmark --synthetic --alone --start 12 --end 12", "no layers run concurrently in [12, 12)"),
        ("benchmark --synthetic --alone --contexts 20,x", "--contexts 20,x: expected numbers"),
        ("benchmark --synthetic --alone --layers 1", "--layers must be at least 2"),
        ("benchmark --synthetic --alone --drop-attention-join 11-12", "11-12: layer 12 is in a group"),
        ("benchmark --synthetic --alone --layers 4 --end 4", "it takes neither --start nor --end"),
        ("benchmark --synthetic --alone --plot p.doc", "--plot p.doc: its ending is none of"),
        ("benchmark --synthetic --alone --json docs", "--json docs: is a directory"),
        ("benchmark_allreduce", "mpirun -n 2"),
        ("benchmark_linear --rows 0", "--rows 0: expected numbers"),
        ("benchmark_tensorrt --preset llama-7b", "--preset llama-7b: unknown"),
        ("benchmark_tensorrt --contexts 5000", "--contexts 5000: expected numbers from 1 to 3960"),
        ("benchmark_tensorrt --placements tensor,split", "--placements split: expected some of sequential,leader"),
        ("benchmark_tensorrt", "needs 2 GPUs, this host has 0"),
        ("benchmark_build", "GB of disk are free, 42 are needed"),
        ("benchmark_cpu --engine nowhere", "nowhere: not an engine directory"),
        ("benchmark_serving --engine nowhere", "nowhere: not an engine directory"),
        ("benchmark_serving --engine nowhere --new-tokens 1", "--new-tokens must be at least 2"),
        ("benchmark_vllm --batches 0", "--batches 0: expected numbers"),
        ("benchmark_vllm --layers 1", "vLLM cannot be imported (No module named 'vllm'): pip install vllm"),
    ],
)
def test_refusals_are_one_line(line, said, refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    monkeypatch.setattr(cuda, "device_count", lambda: 0)
    script, *flags = line.split()

    def call(module, options):
        arguments = [options, Job()] if isinstance(module.parser(), RankParser) else [options]
        module.run(*arguments)

    refused(script, call, flags, said)


def test_an_engine_that_is_too_short_is_refused(tmp_path, refused):
    make_model(tmp_path / "model")
    cqil_trt.build(model=tmp_path / "model", output=tmp_path / "engine", max_seq_len=64, probes="never", p=1)
    flags = ["--engine", tmp_path / "engine", "--context", 20]
    refused("benchmark_cpu", lambda script, options: script.run(options, Job()), flags, "the engine holds 64")


def test_a_script_without_the_package_says_how_to_get_it():
    scripts = [path for path in (ROOT / "scripts").glob("*.py") if "__main__" in path.read_text()]
    assert len(scripts) > 9
    for script in scripts:
        if script.name == "collect_trtllm_api.py":  # which needs none
            continue
        done = run(sys.executable, "-S", script, env={"PYTHONPATH": ""})
        assert_user_error(done, "cqil_trt is not installed", "scripts/environment.sh", f"PYTHONPATH={ROOT}")


@pytest.mark.parametrize("product", ["few_rows_kernel", "packed_nibbles_kernel", "packed_bytes_kernel"])
def test_kernels_are_named_alike_by_symbol_and_by_what_the_profiler_says(product, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from measuring import kernel_shares

    symbol = "_ZN12_GLOBAL__N_1{}{}I6__halfLb{}ELi8ELi8EEEvN8cqil_trt8OperandsE"
    demangled = "void (anonymous namespace)::{}<__half, {}, 8, 8>(cqil_trt::Operands)"
    # A layer, twice: its products are told apart by what is next to them, and by whether they are gated.
    layer = [(product, 0), ("attend_kernel", 0), *[(product, gated) for gated in (0, 1, 0)]]
    step = [
        ("gather_kernel", 0),
        *layer,
        *layer,
        (product, 0),
        ("row_argmax_kernel", 0),
        ("advance_kernel", 0),
    ]
    ends = np.cumsum(np.random.default_rng().random(2 * len(step)) + 1).tolist()
    found = []
    for write in (
        lambda name, gated: symbol.format(len(name), name, gated),
        lambda name, gated: demangled.format(name, "true" if gated else "false"),
    ):
        shares = kernel_shares([(write(*kernel), end) for kernel, end in zip(step * 2, ends)], 2)
        found.append({name: (count, each) for name, count, each in shares})
    assert found[0] == found[1]
    counts = {name: count for name, (count, _) in found[0].items()}
    products = {"qkv": 2, "o": 2, "gate+up": 2, "down": 2, "last projection": 1}
    assert counts.items() >= (products | {"attend_kernel": 2, "row_argmax_kernel": 1}).items()
    assert not any("few_rows" in name for name in counts)
