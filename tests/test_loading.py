"""How a rank's file gets to where it is used: read and verified once, through buffers, and put into its places."""

import ctypes
import json
import random
import sys
import threading
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, SEED, write_json
from support.checkpoints import make_model
from support.needs import need, need_cuda_backend
from support.processes import run

import cqil_trt
from cqil_trt.errors import CollectiveError, UserError
from cqil_trt.sampling import SamplingConfig
from cqil_trt.schedule import Peers
from cqil_trt.scheduler import Chunk, Start, Step


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """A function that gives an engine of two ranks, in float16; the rows of its shared embedding are not aligned."""
    root = tmp_path_factory.mktemp("loading")
    model = make_model(root / "model", seed=SEED, tie_word_embeddings=True, hidden_size=72)
    made = {}

    def get(weights="dense"):
        if weights not in made:
            quantize = {} if weights == "dense" else {"quantize": weights}
            made[weights] = cqil_trt.build(
                model=model, output=root / weights, p=2, dtype="float16", probes="never", **quantize
            )
        return made[weights]

    return get


NAME = "rank1.safetensors"


def buffers(chance):
    size = chance.randrange(1000, 40_000)
    return [memoryview(bytearray(size)) for _ in range(chance.randrange(1, 9))]


@pytest.mark.parametrize("number", range(4))
def test_blocks_are_the_file_and_stay_until_they_were_used(number, engines):
    engine, chance = engines(), random.Random(SEED + number)
    found, users = bytearray(engine.files[NAME]["size"]), []

    def use(offset, block):
        """Copies a block later, as a GPU does."""

        def copy():
            time.sleep(chance.random() / 1000)
            found[offset : offset + len(block)] = block

        assert sum(user.is_alive() for user in users) <= 1
        users.append(threading.Thread(target=copy))
        users[-1].start()
        return users[-1].join

    engine.read(NAME, buffers(chance), use)
    assert found == (engine.path / NAME).read_bytes()
    assert len(users) > 1


def test_damage_is_found_though_all_was_used(engines):
    engine, chance = engines(), random.Random(SEED)
    path = engine.path / NAME
    whole = path.read_bytes()
    read = lambda: engine.read(NAME, buffers(chance), lambda offset, block: lambda: None)
    try:
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=f"{NAME}: the checksum differs"):
            read()
        path.write_bytes(whole[:-1])
        with pytest.raises(UserError, match=f"{NAME}: {len(whole) - 1} bytes, config.json says {len(whole)}"):
            read()
        path.unlink()
        with pytest.raises(UserError, match=f"{NAME}: cannot be read"):
            read()
        # A header that is another one must not decide where tensors go.
        path.write_bytes(whole.replace(b"layers.1.", b"layers.2."))
        with pytest.raises(UserError, match=f"{NAME}: the checksum differs"):
            engine.weight_offsets(1)
    finally:
        path.write_bytes(whole)
    read()


def test_a_file_that_shrinks_while_it_is_read(engines, tmp_path):
    engine = engines()
    path = engine.path / NAME
    whole = path.read_bytes()

    def use(offset, block):
        with open(path, "r+b") as file:
            file.truncate(offset + len(block))
        return lambda: None

    try:
        with pytest.raises(UserError, match=f"{NAME}: truncated while it was read"):
            engine.read(NAME, [memoryview(bytearray(1000))], use)
    finally:
        path.write_bytes(whole)


class HostGpu:
    """Host memory in place of a GPU's, behind the functions of `gpu.cuda` that loading calls.

    What is enqueued is executed when somebody waits for it: as late as on a slow GPU.
    """

    def __init__(self, real):
        self._real, self._queue, self.ALIGNMENT, self.aligned = real, deque(), real.ALIGNMENT, real.aligned
        self.live = 0
        gpu = self

        class Arena(real.Arena):
            def __init__(self, size, what):
                self.size, self._used = max(size, real.ALIGNMENT), 0
                self.memory = np.full(self.size + real.ALIGNMENT, 0xA5, np.uint8)
                self.address = real.aligned(self.memory.ctypes.data)
                gpu.live += 1

            def free(self):
                gpu.live -= 1

        self.Arena = Arena

    def use_device(self, number):
        pass

    def new_stream(self):
        return 7

    def pinned(self, shape, dtype):
        self.live += 1
        return np.empty(shape, dtype)

    def free_pinned(self, array):
        self.live -= 1

    def upload(self, address, array, stream):
        self.copy(address, array.ctypes.data, array.nbytes, stream)

    def copy(self, target, source, size, stream):
        assert stream == 7
        self.enqueue(lambda: ctypes.memmove(target, source, size))

    def enqueue(self, work):
        self._queue.append(work)

    def call(self, name, *arguments):
        if name.endswith("Synchronize"):
            while self._queue:
                self._queue.popleft()()
        return 1


class HostPacking:
    """The library's functions of quantized weights. `made`: by address, the stored parts that were packed there."""

    def __init__(self, gpu):
        self._gpu, self.made, self.sizes = gpu, {}, {}

    def cqil_packed_rows(self):
        return 16

    def cqil_packed_bytes(self, shape):
        return shape.outputs * (1 + shape.gated) * shape.inputs

    def _make(self, shape, codes, scales, zeros, size, first, address, stream):
        sizes = self.sizes[address]
        parts = [part for part in (codes, scales, zeros) if part is not None]
        self._gpu.enqueue(lambda: self.made.update({address: [at(*part) for part in zip(parts, sizes, strict=True)]}))
        return 0

    cqil_pack = cqil_dequantize = _make


def at(address, size):
    return (ctypes.c_char * size).from_address(address).raw


@pytest.mark.parametrize("weights", ["dense", "int8", "fp8", "int4g32"])
@pytest.mark.parametrize("rank", [0, 1])
def test_tensors_arrive_in_their_places(weights, rank, engines, monkeypatch):
    need("cuda-bindings")
    from cqil_trt.gpu import cuda
    from cqil_trt.gpu import weights as loading

    engine, chance = engines(weights), random.Random(SEED + rank)
    gpu = HostGpu(cuda)
    library = HostPacking(gpu)
    monkeypatch.setattr(loading, "cuda", gpu)
    monkeypatch.setattr(loading, "_BUFFERS", chance.randrange(1, 5))
    monkeypatch.setattr(loading, "_BUFFER_BYTES", chance.randrange(500, 20_000))
    stored = {name: tensor.view(-1).numpy(force=True) for name, tensor in bits(engine.rank_file(rank)).items()}

    class Sizes(dict):
        def __missing__(self, address):
            [matrix] = [m for m in loaded.quantized.values() if loaded.memory[m.parts[0]] == address]
            return [stored[part].nbytes for part in matrix.parts]

    library.sizes = Sizes()
    loaded = loading.DeviceWeights(engine, rank, 0, library)
    loaded.wait()
    packed = {part for matrix in loaded.quantized.values() for part in matrix.parts}
    assert bool(packed) == (weights != "dense")
    for name, values in stored.items():
        if name not in packed:
            assert at(loaded.memory[name], values.nbytes) == values.tobytes(), name
    for matrix in loaded.quantized.values():
        assert library.made[loaded.memory[matrix.parts[0]]] == [stored[part].tobytes() for part in matrix.parts]
    plan = engine.plan(rank)
    if plan.shares_embedding:
        first, last = plan.vocabulary
        rows = stored["embedding.weight"].reshape(plan.model.vocab_size, -1)[first:last]
        assert at(loaded.memory["lm_head.weight"], rows.nbytes) == rows.tobytes()
        assert loaded.memory["lm_head.weight"] % cuda.ALIGNMENT == 0
    assert gpu.live == 1  # the weights alone
    loaded.close()
    assert gpu.live == 0


@pytest.fixture
def open_session(monkeypatch):
    """A function that opens a session of rank 0 on a GPU with so much memory; it computes nothing."""
    need("cuda-bindings")
    from cqil_trt.gpu import cuda
    from cqil_trt.gpu import session as running

    class Library:
        def cqil_attention_cache_bytes(self, shape):
            return 2 * 2 * shape.max_batch * shape.kv_heads * shape.capacity * shape.head_dim

        def cqil_attention_failure(self):
            return None

    class Session(running.CudaSession):
        def _execute(self, phase, batch, length, rows):
            pass

        def _load_constants(self, engine):
            pass

    def open(engine, free, slots):
        gpu = HostGpu(cuda)
        real = gpu.call
        gpu.call = lambda name, *arguments: free if name == "MemGetInfo" else real(name, *arguments)
        monkeypatch.setattr(running, "cuda", gpu)
        monkeypatch.setattr(running, "_RESERVED_BYTES", 0)
        session = Session(engine, None, Library(), slots)
        there = {"memory": {}, "quantized": {}, "allocated": lambda: None, "close": lambda: None}
        there["closed_on_failure"] = nullcontext
        session._load(engine, SimpleNamespace(**there))
        return session, gpu

    return open


def test_the_cache_leaves_room_for_the_buffers(engines, open_session):
    """Long chunks of a large vocabulary, and many rows, take gigabytes next to the cache."""
    engine, free = engines(), 1 << 20
    engine = replace(engine, limits=replace(engine.limits, prefill_chunk=1024, max_batch_size=512))
    session, gpu = open_session(engine, free, 10_000)
    each = engine.plan(0).cache_bytes(engine.limits) + sum(session._slot_sizes().values())
    padding = gpu.ALIGNMENT * len(session._memory)
    allocated = sum(arena.size for arena in session._arenas)
    assert free - each < allocated <= free + padding and 1 < session.slots < free // each // 2


def test_a_start_that_fails_gives_everything_back(engines, open_session):
    """The process may open another engine."""

    def damaged():
        raise UserError("damaged")

    session, gpu = open_session(engines(), 1 << 30, 2)
    assert gpu.live > 1
    closed = []

    class Workspace:
        def close(self):
            closed.append(self)

    session._workspaces = dict.fromkeys(Peers, Workspace())  # one of all kinds
    session._weights.wait = damaged
    with pytest.raises(UserError, match="damaged"):
        session.wait()
    session.close()
    assert gpu.live == 0 and closed == [session._workspaces[Peers.ALL]]


def test_what_ended_a_kernel_is_said_wherever_cuda_reports_it(engines, open_session):
    """By the time that a kernel gives up, the host may be anywhere in a later step."""
    from cqil_trt.gpu import cuda

    def fail(*arguments):
        raise cuda.CudaError("cudaMemcpyAsync: unspecified launch failure")

    session, gpu = open_session(engines(), 1 << 30, 2)
    gpu.upload = lambda address, array, stream: None
    guided = SamplingConfig(guided=True, logprobs=1)
    start = Start(slot=0, prompt=(5,), sampling=guided, room=3)
    chunk = Chunk(slot=0, tokens=(5,), past=0, length=1, choose=True)
    session.submit(Step(starts=(start,), chunk=chunk, guided=(0,)))
    session._workspaces = {Peers.ALL: SimpleNamespace(failure=lambda: CollectiveError("rank 0 gave up"))}
    gpu.upload = gpu.download = fail
    for use in (
        lambda: session.choose({0: np.zeros(session.vocab_size, np.uint32)}),
        lambda: session.submit(Step(starts=(start,), decode=(0,))),
        lambda: session.submit(Step(decode=(0,), guided=(0,))),
        session.logits,
        lambda: session.warm_up(1, 1),
    ):
        with pytest.raises(CollectiveError, match="^rank 0 gave up$"):
            use()


class Counting(HostPacking):
    """Packs nothing; `made` has the addresses."""

    def _make(self, shape, codes, scales, zeros, size, first, address, stream):
        self.made[address] = shape
        return 0

    cqil_pack = cqil_dequantize = _make


@pytest.mark.parametrize("weights", ["dense", "int8", "int4g32"])
def test_random_weights_of_the_benchmark(weights, engines, monkeypatch):
    """The same ones wherever they are placed; matrices whose scales are constants."""
    need("cuda-bindings")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import benchmark_tensorrt

    from cqil_trt.gpu import cuda
    from cqil_trt.gpu import weights as loading

    engine, found = engines(weights), []
    for _ in range(2):
        gpu = HostGpu(cuda)
        library = Counting(gpu)
        for module in (loading, benchmark_tensorrt):
            monkeypatch.setattr(module, "cuda", gpu)
        monkeypatch.setattr(benchmark_tensorrt, "BLOCK", 102_400)
        monkeypatch.setattr(benchmark_tensorrt.random_block, "__defaults__", (102_400,))
        loaded = benchmark_tensorrt.RandomWeights(engine, 0, 0, library)
        loaded.wait()
        packed = {part for matrix in loaded.quantized.values() for part in matrix.parts}
        plain = [tensor for tensor in engine.plan(0).tensors if tensor.name not in packed]
        found.append([at(loaded.memory[tensor.name], tensor.nbytes) for tensor in plain])
        assert len(library.made) == len(loaded.quantized)
        loaded.close()
        assert gpu.live == 0
    assert found[0] == found[1]
    for tensor, values in zip(plain, found[0]):
        read = np.frombuffer(values, tensor.dtype).astype(np.float32)
        assert (read == 1).all() if "norm" in tensor.name else 0.01 < read.std() < 0.03, tensor.name


@pytest.mark.parametrize("stored", ["int8", "fp8", "int4"])
def test_random_codes_of_the_benchmark(stored, monkeypatch):
    """Like dense weights: other codes of a deep model overflow in float16."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from benchmark_tensorrt import SCALES, random_block

    dense, codes = random_block(stored, 100_000)
    if stored == "int4":
        weights = np.concatenate([codes & 15, codes >> 4]).astype(np.float32) - 8
    elif stored == "int8":
        weights = codes.view(np.int8).astype(np.float32)
    else:
        weights = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    for found in (dense.astype(np.float32), weights * SCALES[stored]):
        assert abs(found.std() - 0.02) < 5e-4 and abs(found.mean()) < 4e-4


def test_damage_is_raised_by_waiting(engines, monkeypatch):
    need("cuda-bindings")
    from cqil_trt.gpu import cuda
    from cqil_trt.gpu import weights as loading

    engine, gpu = engines(), HostGpu(cuda)
    monkeypatch.setattr(loading, "cuda", gpu)
    path = engine.path / NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        loaded = loading.DeviceWeights(engine, 1, 0, None)
        for _ in range(2):
            with pytest.raises(UserError, match="the checksum differs"):
                loaded.wait()
    finally:
        path.write_bytes(whole)
    loaded.close()
    assert gpu.live == 0


def test_closing_ends_the_loading(engines, monkeypatch):
    need("cuda-bindings")
    from cqil_trt.gpu import cuda
    from cqil_trt.gpu import weights as loading

    engine, gpu, may_go_on = engines(), HostGpu(cuda), threading.Event()
    monkeypatch.setattr(loading, "cuda", gpu)
    monkeypatch.setattr(loading, "_BUFFER_BYTES", 1000)
    monkeypatch.setattr(gpu, "use_device", lambda number: may_go_on.wait())
    closed = loading.DeviceWeights(engine, 1, 0, None)
    threading.Timer(0.05, may_go_on.set).start()
    closed.close()
    assert gpu.live == 0


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_tensors_arrive_on_a_gpu(rank, engines, monkeypatch):
    need_cuda_backend()
    from cqil_trt.gpu import cuda, kernel_library
    from cqil_trt.gpu import weights as loading

    engine = engines()
    monkeypatch.setattr(loading, "_BUFFER_BYTES", random.Random(SEED).randrange(500, 20_000))
    cuda.use_device(0)
    loaded = loading.DeviceWeights(engine, rank, 0, kernel_library.load())
    loaded.wait()
    stream = cuda.new_stream()
    for name, tensor in bits(engine.rank_file(rank)).items():
        found = np.empty(tensor.numel(), np.uint8)
        cuda.download(found, loaded.memory[name], stream)
        cuda.call("StreamSynchronize", stream)
        assert found.tobytes() == tensor.numpy().tobytes(), name
    loaded.close()
    cuda.call("StreamDestroy", stream)


def bits(path):
    """A file's tensors as bytes."""
    import torch

    return {name: tensor.contiguous().view(torch.uint8) for name, tensor in load_file(path).items()}


BLOCKED = "import runpy, sys; sys.modules['torch'] = None\n"
IMPORTS = """
import cqil_trt.commands.run, cqil_trt.commands.serve, cqil_trt.serving.app, cqil_trt.serving.ranks
import cqil_trt.backends.torch.gpu_session, cqil_trt.backends.torch.opening
"""


def test_nothing_for_gpus_imports_pytorch():
    need("cuda-bindings")
    done = run(sys.executable, "-c", BLOCKED + IMPORTS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "gpu, lacking, said",
    [
        (None, None, "there is no CUDA GPU (nvidia-smi lists those that the driver sees)"),
        ((75, 13), None, "the kernels need compute capability 8.0, this GPU has 7.5"),
        ((80, 11), None, "the driver runs CUDA 11, and CUDA 12 is needed: install a driver of 525 or newer"),
        ((90, 12), "bindings", "cuda-bindings is not installed: pip install 'cuda-bindings~=12.0' cuda-pathfinder"),
        ((90, 13), "pathfinder", "cuda-pathfinder is not installed: pip install 'cuda-bindings~=13.0' cuda-pathfinder"),
        (
            (90, 12),
            None,
            "cuda-bindings 13.9.1 is newer than the driver, which runs CUDA 12: pip install 'cuda-bindings~=12.0'",
        ),
    ],
)
def test_what_a_gpu_lacks_is_said_in_one_line(gpu, lacking, said, engines, monkeypatch):
    need("cuda-bindings", "cuda-pathfinder")
    from cuda import bindings

    from cqil_trt.backends.torch.opening import open_session
    from cqil_trt.gpu import kernel_library

    monkeypatch.setattr(kernel_library, "this_gpu", lambda: gpu and kernel_library.Gpu(*gpu))
    monkeypatch.setattr(bindings, "__version__", "13.9.1")
    if lacking is not None:
        monkeypatch.setitem(sys.modules, f"cuda.{lacking}", None)
    with pytest.raises(UserError) as refused:
        open_session(engines(), None, "cuda", 0, 1)
    assert str(refused.value) == f"--device cuda: {said}"


def test_heads_that_are_too_large_for_the_kernels_are_named(engines, monkeypatch):
    need("cuda-bindings", "cuda-pathfinder")
    from cuda import bindings

    from cqil_trt.backends.torch.opening import open_session
    from cqil_trt.gpu import kernel_library

    engine = engines()
    engine = replace(engine, model=replace(engine.model, head_dim=258))
    monkeypatch.setattr(kernel_library, "this_gpu", lambda: kernel_library.Gpu(90, 13))
    monkeypatch.setattr(kernel_library, "library_path", lambda: None)
    monkeypatch.setattr(bindings, "__version__", "13.0.0")
    with pytest.raises(
        UserError, match="^--device cuda: the model has heads of 258 elements, our kernels take up to 256$"
    ):
        open_session(engine, None, "cuda", 0, 1)


@pytest.mark.slow
def test_a_gpu_generates_without_pytorch(tmp_path):
    need_cuda_backend()
    model = make_model(tmp_path / "model", seed=SEED)
    engine = cqil_trt.build(model=model, output=tmp_path / "engine", p=1, dtype="float32", probes="never").path
    prompts, found = write_json(tmp_path / "prompts.json", [[5, 6, 7], list(range(20, 60))]), {}
    for device, code in (("cpu", "import runpy\n"), ("cuda", BLOCKED)):
        report = tmp_path / f"{device}.json"
        options = ["--engine", engine, "--device", device, "--token-ids", prompts, "--max-new-tokens", 12]
        code += "runpy.run_path('runtime/run.py', run_name='__main__')"
        done = run(sys.executable, "-c", code, *options, "--json", report)
        assert done.returncode == 0, done.stderr
        found[device] = [completion["tokens"] for completion in json.loads(report.read_text())["completions"]]
    assert found["cuda"] == found["cpu"]
