"""The plugin library, as far as a machine without GPU goes: it compiles, loads, and TensorRT takes its plugins."""

import ctypes.util
import platform
import re
import shutil
import subprocess
import sys
from enum import IntEnum
from functools import cache
from pathlib import Path

import numpy as np
import pycparser
import pytest
import torch
from support import ROOT, SEED
from support.needs import need
from support.processes import run

import cqil_trt
from cqil_trt.config import MAX_RANKS
from cqil_trt.errors import UserError
from cqil_trt.gpu import abi, kernel_library, tensorrt_plugins

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="cc is not on the PATH")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
HEADERS = ROOT / "third_party" / "tensorrt_headers"
HEADER = ROOT / "plugins" / "cqil_trt.h"
HOST_CUBLASLT = "tests/support/host_cublaslt.cpp"
UNOPTIMIZED = "-Xcicc -O0 -Xptxas -O0"  # where only symbols and warnings matter


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The library for one architecture with the headers of one TensorRT, built once; warnings are errors.

    Only the first one is optimized: that takes a minute.
    """

    @cache
    def build(headers, architecture):
        path = tmp_path_factory.mktemp(headers) / kernel_library.LIBRARY
        with pytest.MonkeyPatch.context() as patch:
            if architecture != "80":
                patch.setenv("NVCC_APPEND_FLAGS", UNOPTIMIZED)
            return kernel_library.build(HEADERS / headers, architecture, path)

    return build


@pytest.fixture(params=[("10.14", "80"), ("11.1", "90")], ids=lambda param: param[0])
def built(request, library):
    return request.param[0], library(*request.param)


@pytest.mark.slow
@needs_nvcc
def test_it_compiles_and_loads_without_a_gpu_or_tensorrt(built):
    _, path = built
    library = kernel_library.load(path)
    assert library.cqil_version().decode() == kernel_library.source_version()
    assert library.cqil_register_plugins() == -1  # there is no TensorRT in this process


@pytest.mark.slow
@needs_nvcc
def test_without_tensorrt_the_c_interface_alone_is_built(tmp_path):
    path = tmp_path / kernel_library.LIBRARY
    unoptimized = {"NVCC_APPEND_FLAGS": UNOPTIMIZED}  # only its symbols matter
    command = ["-m", "cqil_trt.kernels", "build", "--architectures", "80", "--output", path]
    done = run(sys.executable, *command, env=unoptimized)
    assert done.returncode == 0, done.stderr
    names = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True).stdout
    assert "cqil_all_reduce" in names and "cqil_register_plugins" not in names
    configured = run("cmake", "-S", "plugins", "-B", tmp_path / "build", env={"TENSORRT_ROOT": ""})
    assert "the C interface alone" in configured.stdout


LIBRARY_PRODUCT = """
import ctypes, sys
import numpy as np
library = ctypes.CDLL(sys.argv[1])
library.last_error.restype = ctypes.c_char_p
random = np.random.default_rng(int(sys.argv[2]))

def draw(*shape):
    return random.standard_normal(shape, np.float32)

def product(*arrays, sizes):
    return library.product(*(None if a is None else ctypes.c_void_p(a.ctypes.data) for a in arrays), *sizes)

for rows, outputs, inputs in ((17, 10, 24), (40, 64, 7), (17, 10, 24), (18, 65, 8)):
    for biased, added in ((0, 0), (0, 1), (1, 0), (1, 1)):
        x, weight, out = draw(rows, inputs), draw(outputs, inputs), draw(rows, outputs)
        bias, residual = draw(outputs) if biased else None, draw(rows, outputs) if added else None
        before = out.copy()
        done = product(x, weight, bias, residual, out, sizes=(rows, outputs, inputs))
        assert done == (outputs <= 64), library.last_error()
        expected = x.astype(np.float64) @ weight.T.astype(np.float64)
        expected += (0 if bias is None else bias) + (0 if residual is None else residual)
        np.testing.assert_allclose(out, expected if done else before, rtol=0, atol=1e-5 if done else 0)
assert library.cqil_linear_library(0) == 0 == product(x, weight, None, None, out, sizes=(18, 65, 8))
assert library.cqil_linear_library(-1) == 0 and library.cqil_linear_library(1) == 1
"""


@pytest.fixture(scope="module")
def host_product(tmp_path_factory):
    """plugins/library_linear.cu with a stand-in of cuBLASLt on the host, which refuses wrong descriptions."""
    path = tmp_path_factory.mktemp("product") / "product.so"
    sources = [HOST_CUBLASLT, "tests/support/library_product.cu", "plugins/library_linear.cu"]
    # The stand-in also has functions of CUDA's, and its own come first. Its driver runs CUDA 13.
    flags = ["-std=c++17", "-O1", "-arch=sm_90", "-shared", "-Xcompiler=-fPIC", "-Xlinker=--allow-multiple-definition"]
    done = run("nvcc", *flags, "-I", ROOT / "plugins", *sources, "-o", path)
    assert done.returncode == 0, done.stderr
    return path


@needs_nvcc
def test_many_rows_are_multiplied_as_cublaslt_is_documented(host_product):
    """And they are not without one, by one that is not cuBLASLt, or by one of a newer CUDA than the driver's."""
    path = host_product
    call = [sys.executable, "-c", LIBRARY_PRODUCT, path, SEED]
    done = run(*call, env={"CQIL_CUBLASLT": str(path)})
    assert done.returncode == 0, done.stderr
    ask = "import ctypes, sys; l = ctypes.CDLL(sys.argv[1]); l.last_error.restype = ctypes.c_char_p; "
    ask += "print(l.cqil_linear_library(-1), l.last_error().decode())"
    for named, release, said in (
        ("", "", "0 "),
        ("/nowhere.so", "", "-1 CQIL_CUBLASLT: /nowhere.so"),
        (path, "14010", f"-1 CQIL_CUBLASLT: {path} needs a newer driver"),
        (ctypes.util.find_library("m"), "", "-1 "),
    ):
        done = run(sys.executable, "-c", ask, path, env={"CQIL_CUBLASLT": str(named), "HOST_CUBLASLT_CUDA": release})
        assert done.stdout.startswith(said), (named, done.stdout, done.stderr)
    assert "has no cublasLt" in done.stdout


@needs_nvcc
def test_cublaslt_is_found_in_a_toolkit_that_the_loader_does_not_know(host_product, tmp_path):
    need("cuda-pathfinder")
    (tmp_path / "lib64").mkdir()
    flags = ["-std=c++17", "-shared", "-fPIC", "-Wl,-soname,libcublasLt.so.13", "-o", "lib64/libcublasLt.so.13"]
    subprocess.run(["g++", *flags, ROOT / HOST_CUBLASLT], cwd=tmp_path, check=True)
    ask = "import ctypes, sys; from cqil_trt.gpu.kernel_library import find_linear_library; "
    ask += "print(find_linear_library(ctypes.CDLL(sys.argv[1])))"
    done = run(sys.executable, "-c", ask, host_product, env={"CUDA_PATH": str(tmp_path), "CQIL_CUBLASLT": ""})
    assert done.stdout == "True\n", done.stderr


@pytest.fixture(scope="module")
def flash_attention(tmp_path_factory):
    """plugins/flash.cuh, compiled for this machine; warps are those of tests/support/host_warps.h."""
    directory = tmp_path_factory.mktemp("flash")
    shutil.copy(ROOT / "plugins" / "flash.cuh", directory)
    shutil.copy(ROOT / "tests" / "support" / "host_warps.h", directory / "linear.cuh")
    for name in ("cuda_runtime.h", "kv_cache.cuh"):
        (directory / name).touch()
    path = directory / "flash.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wno-unknown-pragmas", "-Wno-psabi"]
    done = run("g++", *flags, "-I", directory, "tests/support/flash_attention.cpp", "-o", path)
    if re.search("_Float16.* (was not declared|is not supported|does not name)", done.stderr):
        pytest.skip("this compiler has no _Float16")
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path)).attend


# Of each case: the elements of a head, whether the cache is in FP8, keys that a query sees, whether the cache is a
# circle, and what caps scores.
FLASH_CASES = [
    (128, False, None, False, 0),
    (96, False, None, False, 30),
    (64, False, 50, False, 0),
    (24, False, 9, True, 0),
    (256, False, 100, True, 20),
    (136, False, None, False, 0),
    (128, True, None, False, 0),
    (80, True, 70, True, 5),
    (64, True, None, False, 0),
    (200, True, 3, True, 0),
]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the PATH")
@pytest.mark.parametrize("dim, fp8, window, circle, cap", FLASH_CASES)
def test_attention_of_prompts_is_softmax(dim, fp8, window, circle, cap, flash_attention):
    """Causal, from a cache with other sequences' slots and NaN where nothing is seen, against float64.

    Where blocks can be larger, with these too, as on a GPU with few processors.
    """
    random = np.random.default_rng()
    lengths = int(random.integers(2, 60)), int(random.integers(66, 140)), int(random.integers(140, 270))
    for length, processors in zip(lengths, (1000, int(random.choice((1, 1000))), 1)):
        batch, slots, group = 2, 3, int(random.integers(1, 4))
        kv_heads, first = 1 + (group < 3), int(random.integers(0, group))
        heads = kv_heads * group - first
        past = random.integers(0, 300 if circle else 70, batch).astype(np.int32)
        positions = int(past.max()) + length - 1  # the last token of one of them is beyond it
        capacity = -(-(window + length - 1) // 64) * 64 if circle else positions
        positions = max(positions, capacity)
        slot_of = random.permutation(slots)[:batch].astype(np.int32)
        queries = random.standard_normal((batch, length, heads, dim)).astype(np.float16)
        scale, value_scale = (0.3, 1.7) if fp8 else (dim**-0.5, 1.0)
        every = torch.from_numpy(random.standard_normal((2, batch, kv_heads, positions, dim)).astype(np.float16))
        every = every.to(torch.float8_e4m3fn if fp8 else torch.float16)
        kept = [min(length, positions - int(before)) for before in past]
        cache = torch.full((2, slots, kv_heads, capacity, dim), torch.nan).to(every.dtype)
        for b, slot in enumerate(slot_of):
            end = int(past[b]) + kept[b]
            where = np.arange(0 if window is None else max(0, int(past[b]) + 1 - window), end)
            for part, slotted in zip(every.view(torch.uint8), cache.view(torch.uint8)):
                slotted[slot][:, where % capacity] = part[b][:, where]
        out = np.full_like(queries, np.nan)
        held = [ctypes.c_void_p(part.data_ptr()) for part in cache]
        arrays = [ctypes.c_void_p(array.ctypes.data) for array in (queries, out, past, slot_of)]
        sizes = batch, length, heads, kv_heads, dim, capacity, positions, group, first, window or 0
        factors = (ctypes.c_float(x) for x in (scale, value_scale, cap))
        assert flash_attention(arrays[0], *held, *arrays[1:], *sizes, *factors, int(fp8), processors) == 0
        keys, values = every.double().numpy()
        for b, h in np.ndindex(batch, heads):
            seen = slice(int(past[b]) + kept[b])
            mine, values_of = (part[b, (h + first) // group, seen] for part in (keys, values))
            scores = queries[b, : kept[b], h].astype(np.float64) @ mine.T * scale
            scores = cap * np.tanh(scores / cap) if cap else scores
            distance = past[b] + np.arange(kept[b])[:, None] - np.arange(len(mine))
            scores[(distance < 0) | (distance >= (window or np.inf))] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            expected = weights / weights.sum(-1, keepdims=True) @ values_of * value_scale
            error = np.linalg.norm(out[b, : kept[b], h] - expected) / np.linalg.norm(expected)
            assert error < 1e-3, (b, h, sizes, error)


CREATE = """
import ctypes, glob, os, sys
import numpy as np
import tensorrt_rtx as trt
import tensorrt_rtx_libs
for path in glob.glob(os.path.join(os.path.dirname(tensorrt_rtx_libs.__file__), "libtensorrt_rtx.so*")):
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
library = ctypes.CDLL(sys.argv[1])
assert library.cqil_register_plugins() == 0
registry = trt.get_plugin_registry()

def create(name, **values):
    kinds = {np.dtype(np.int32): trt.PluginFieldType.INT32, np.dtype(np.float32): trt.PluginFieldType.FLOAT32}
    arrays = {k: np.array([v], np.float32 if isinstance(v, float) else np.int32) for k, v in values.items()}
    fields = [trt.PluginField(k, v, kinds[v.dtype]) for k, v in arrays.items()]
    creator = registry.get_creator(name, "1", "cqil_trt")
    made = creator.create_plugin(name, trt.PluginFieldCollection(fields))
    if made is None:
        return None
    assert (made.plugin_type, made.plugin_namespace) == (name, "cqil_trt")
    stored = bytes(made.serialize())
    again = creator.deserialize_plugin(name, stored)
    assert bytes(again.serialize()) == stored and bytes(made.clone().serialize()) == stored
    assert creator.deserialize_plugin(name, stored + b"1") is None
    return np.frombuffer(stored, np.int32).tolist(), made.num_outputs

assert create("CqilAllReduce", mode=0, eps=0.0, dtype=0) == ([0, 0, 0, 0], 1)
assert create("CqilAllReduce", mode=2, eps=1e-5, dtype=1) == ([2, int(np.float32(1e-5).view(np.int32)), 1, 0], 2)
assert create("CqilAllReduce", mode=1, eps=0.0, dtype=1, shared=1) == ([1, 0, 1, 1], 1)
assert create("CqilBroadcast", rank=3, hidden=4096, dtype=1) == ([3, 4096, 1, 0], 1)
assert create("CqilBroadcast", rank=3, hidden=4096, dtype=1, flat=1) == ([3, 4096, 1, 1], 1)
assert create("CqilBypass", distance=2, dtype=1) == ([2, 1, 0], 1)
assert create("CqilNorm", delta=1, eps=0.0, dtype=2) == ([1, 0, 2, 0], 1)
assert create("CqilNorm", delta=0, eps=0.0, dtype=1, kind=2) == ([0, 0, 1, 2], 1)
assert create("CqilNorm", delta=0, eps=0.0, dtype=1, kind=3) is None
assert create("CqilPostNorm", residual=1, next=1, eps=0.0, kind=1, dtype=1) == ([1, 1, 0, 1, 1], 2)
assert create("CqilPostNorm", residual=0, next=0, eps=0.0, kind=1, dtype=1)[1] == 1
linear = {"delta": 0, "bias": 1, "norm": 1, "residual": 0, "gated": 1, "eps": 0.0, "dtype": 1}
assert create("CqilLinear", **linear) == ([0, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0], 1)
packed = {**linear, "weights": 3, "outputs": 11008, "group": 128}  # CQIL_INT4
assert create("CqilLinear", **packed) == ([0, 1, 1, 0, 1, 0, 1, 3, 11008, 128, 0, 0], 1)
assert create("CqilLinear", **{**packed, "weights": 1, "group": 0}) == ([0, 1, 1, 0, 1, 0, 1, 1, 11008, 0, 0, 0], 1)
for wrong in ({"group": 0}, {"group": 48}, {"weights": 1}, {"weights": 4}, {"outputs": 0}, {"dtype": 0}):
    assert create("CqilLinear", **{**packed, **wrong}) is None, wrong
assert create("CqilLinear", **linear, outputs=8) is None  # the weights say so
assert create("CqilLinear", **{**linear, "residual": 1}) is None  # a gated product takes none
added = {**linear, "gated": 0, "residual": 1, "sum": 1}
assert create("CqilLinear", **added) == ([0, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1], 2)
assert create("CqilLinear", **{**added, "residual": 0}) is None
assert create("CqilLinear", **linear, scale=2.0) is None
half = int(np.float32(0.5).view(np.int32))
assert create("CqilLinear", **{**linear, "gated": 0}, scale=0.5) == ([0, 1, 1, 0, 0, 0, 1, 0, 0, 0, half, 0], 1)
assert create("CqilLinear", **{**linear, "gated": 2}) is not None
assert create("CqilLinear", **{**linear, "gated": 3}) is None
assert create("CqilAdd", terms=2, dtype=1) == ([2, 1, 0], 1) and create("CqilAdd", terms=1, dtype=1) is None
assert create("CqilAdd", terms=0, dtype=1, after=1) == ([0, 1, 1], 1)
assert create("CqilAdd", terms=2, dtype=1, after=1) is None
assert create("CqilScale", factor=0.5, cap=0.5, dtype=2) == ([half, half, 2], 1)
squares = {"heads": 4, "kv_heads": 2, "head_dim": 8, "first_key": 1, "last_key": 2}
made = create("CqilHeadSquares", **squares, query_factor=0.5, key_factor=0.5, dtype=1)
assert made == ([4, 2, 8, 1, 2, half, half, 1], 1)
assert create("CqilGather", dtype=1) == ([1], 1)
attention = {"heads": 9, "kv_heads": 3, "head_dim": 64, "capacity": 2048, "max_batch": 8, "group": 3, "first": 1}
cached = {"cache": 1, "key_scale": 0.5, "value_scale": 2.0}  # CQIL_CACHE_FP8
attention |= {"eps": 0.0, "dtype": 1, **cached}
made, outputs = create("CqilAttention", **attention, head_norms=1)
scales = np.array([0.5, 2], np.float32).view(np.int32).tolist()
assert made == [9, 3, 64, 2048, 8, 3, 1, 1, 0, 1, 1, *scales, 0, 0, 0, 0, 0, 0, 0, 0] and outputs == 1
more = {"window": 1024, "rotary": 48, "norm": 2, "scale": 0.5, "cap": 0.5, "unrotated": 1, "joint": 1}
more["positions"] = 8192
made, _ = create("CqilAttention", **attention, head_norms=1, **more)
assert made[13:] == [1024, 48, 2, half, half, 1, 1, 8192]
for wrong in ({"window": -1}, {"rotary": 66}, {"norm": 3}, {"joint": 2}, {"cap": -1.0}, {"positions": 2047}):
    assert create("CqilAttention", **attention, head_norms=1, **{**more, **wrong}) is None, wrong
for wrong in ({"window": 0}, {"window": 2049}, {"capacity": 2047}):  # of a circle
    assert create("CqilAttention", **{**attention, **more, **wrong}, head_norms=1) is None, wrong
for wrong in ({"joint": 1}, {"group": 0}, {"cache": 2}, {"key_scale": 0.0}, {"value_scale": -1.0}):
    assert create("CqilAttention", **{**attention, "head_norms": 0, **wrong}) is None, wrong
assert create("CqilAllReduce", mode=3, eps=0.0, dtype=0) is None
assert create("CqilGather", dtype=3) is None
assert create("CqilNorm", delta=2, eps=0.0, dtype=0) is None
assert create("CqilAllReduce", mode=1, eps=0.0) is None and create("CqilAllReduce", mode=2) is None
assert create("CqilBroadcast", rank=9, hidden=8, dtype=1) is None and create("CqilBypass") is None
print("plugins work with TensorRT API", trt.__version__)
"""


@pytest.mark.slow
@needs_nvcc
def test_tensorrt_registers_creates_and_serialises_the_plugins(built):
    """In the runtime that TensorRT-RTX ships, whose plugin registry is that of TensorRT 11."""
    headers, path = built
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    done = run(sys.executable, "-c", CREATE, path)
    if headers == "10.14":  # another major version has another interface: it is not registered, and says so
        assert "built for TensorRT 10" in done.stderr and done.returncode != 0
        return
    assert done.returncode == 0, done.stderr
    assert "plugins work" in done.stdout


@pytest.mark.slow
@needs_nvcc
def test_a_library_of_other_sources_is_refused(built, tmp_path, monkeypatch):
    _, path = built
    copy = shutil.copy(path, tmp_path / "other.so")
    monkeypatch.setattr(kernel_library, "source_version", lambda: "0.0.0+other")
    with pytest.raises(UserError, match="built from other sources"):
        kernel_library.load(copy)


def test_missing_and_foreign_libraries_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CQIL_TRT_PLUGINS", str(tmp_path / "none.so"))
    with pytest.raises(UserError, match="cqil_trt.kernels build"):
        kernel_library.library_path()
    (tmp_path / "broken.so").write_text("not a library")
    with pytest.raises(UserError, match="cannot be loaded"):
        kernel_library.load(tmp_path / "broken.so")
    foreign = next(p for p in (ctypes.util.find_library("m"), "libm.so.6") if p)
    with pytest.raises(UserError, match="not a cqil-trt plugin library"):
        kernel_library.load(foreign)


def test_tools_that_are_missing_are_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="cmake is needed"):
        kernel_library.build()


@pytest.mark.slow
@needs_nvcc
def test_a_compiler_error_is_one_line(tmp_path):
    done = run(
        sys.executable, "-m", "cqil_trt.kernels", "build", "--tensorrt-root", tmp_path, "--output", tmp_path / "x.so"
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "building the plugins failed" in errors[0]


@pytest.mark.slow
@needs_nvcc
def test_without_a_gpu_a_workspace_says_so(built):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code = (
        "import sys; from cqil_trt.gpu import kernel_library; from cqil_trt.gpu.workspace import Workspace\n"
        "from mpi4py import MPI; from pathlib import Path\n"
        "from cqil_trt.errors import UserError\n"
        "try:\n    Workspace(MPI.COMM_SELF, library=kernel_library.load(Path(sys.argv[1])))\n"
        "except UserError as error:\n    print('refused:', error)"
    )
    done = run(sys.executable, "-c", code, built[1])
    assert "refused: cuda" in done.stdout, done.stderr


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("name, sizes", [("advance", (1,)), ("accept", (1, 1))])
def test_a_history_whose_places_would_leave_their_turn_is_refused(name, sizes, built):
    """2^32 steps are no multiple of 3: the step after them would have another place than the host expects."""
    library = kernel_library.load(built[1])
    pointers = [None] * (7 if name == "advance" else 8)
    assert getattr(library, f"cqil_{name}")(*pointers, 1, *sizes, 1, None, None, 3, 1, None) < 0
    assert "a history of 3 slots" in library.cqil_last_error().decode()


# What a wheel brings


CLEAN = """
import sys
from pathlib import Path
import cqil_trt
from cqil_trt.gpu import kernel_library, sources
package = Path(cqil_trt.__file__).parent
assert package.is_relative_to(sys.prefix), package
assert sources.source_directory() == package / "_plugins"
path = kernel_library.library_path()
assert path == package / "_library" / "cuda13" / kernel_library.LIBRARY, path
for driver in (12, 13):  # each has its own
    path = kernel_library.packaged_library(package / "_library", kernel_library.Gpu(90, driver))
    assert path.parent.name == f"cuda{driver}", path
    assert kernel_library.load(path).cqil_version().decode() == sources.source_version()
print("loaded", cqil_trt.__version__)
"""


@pytest.mark.slow
@needs_nvcc
def test_a_wheel_brings_its_library(library, tmp_path):
    """Built by the script from a library that is there, checked by auditwheel, installed where nothing else is."""
    for name in ("auditwheel", "patchelf"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not on the PATH")
    pytest.importorskip("hatchling")
    for cuda in (12, 13):
        (tmp_path / "libraries" / f"cuda{cuda}").mkdir(parents=True)
        compiled = shutil.copy(library("11.1", "90"), tmp_path / "libraries" / f"cuda{cuda}")
        kernel_library.write_record(Path(compiled), cuda, [90])
    environment = {"CQIL_WHEEL_LIBRARIES": str(tmp_path / "libraries")}
    done = run("bash", ROOT / "scripts" / "build_wheel.sh", tmp_path / "dist", env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = (tmp_path / "dist").iterdir()
    version = re.escape(cqil_trt.__version__)
    assert re.fullmatch(rf"cqil_trt-{version}-py3-none-manylinux_2_\d+_{platform.machine()}(\..*)?\.whl", wheel.name)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "clean"], check=True)
    python = tmp_path / "clean" / "bin" / "python"
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    subprocess.run([python, *install, wheel], check=True)
    # The one dependency that this needs, without a network.
    [packages] = (tmp_path / "clean" / "lib").glob("python*/site-packages")
    (packages / "pycparser").symlink_to(Path(pycparser.__file__).parent)
    nothing = {"PYTHONPATH": "", "PATH": "/nowhere", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([python, "-I", "-c", CLEAN], env=nothing, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"loaded {cqil_trt.__version__}\n"


def test_a_packaged_library_is_used_where_it_fits(tmp_path, monkeypatch):
    def record(cuda, architectures):
        path = tmp_path / "packaged" / f"cuda{cuda}" / kernel_library.LIBRARY
        path.parent.mkdir(parents=True)
        path.touch()
        kernel_library.write_record(path, cuda, architectures)
        return path

    find, gpu = kernel_library.packaged_library, kernel_library.Gpu
    old, new = record(12, [80, 90]), record(13, [90, 120])
    directory = tmp_path / "packaged"
    assert find(directory, None) == new
    assert find(directory, gpu(capability=90, cuda=13)) == find(directory, gpu(capability=103, cuda=14)) == new
    assert find(directory, gpu(capability=86, cuda=13)) == find(directory, gpu(capability=90, cuda=12)) == old
    assert find(directory, gpu(capability=75, cuda=13)) is None and find(directory, gpu(90, 11)) is None
    # One that was compiled here comes first, and of other sources none is used.
    monkeypatch.delenv("CQIL_TRT_PLUGINS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_library, "_PACKAGED", directory)
    monkeypatch.setattr(kernel_library, "this_gpu", lambda: gpu(90, 13))
    assert kernel_library.library_path() == new
    compiled = kernel_library.cache_directory() / kernel_library.LIBRARY
    compiled.parent.mkdir(parents=True)
    compiled.touch()
    assert kernel_library.library_path() == compiled
    compiled.unlink()
    monkeypatch.setattr(kernel_library, "source_version", lambda: "0.0.0+other")
    with pytest.raises(UserError, match="cqil_trt.kernels build"):
        kernel_library.library_path()


def exported(path):
    lines = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True).stdout.splitlines()
    return {name for name in (line.split()[-1] for line in lines) if name.startswith("cqil_")}


@pytest.mark.slow
@needs_nvcc
def test_the_library_exports_what_the_header_declares(built):
    only_for_tests = {"cqil_test_delays", "cqil_test_epoch"}  # in a build with CQIL_TEST_DELAYS
    assert exported(built[1]) | only_for_tests == abi.interface().functions.keys()


@needs_cc
def test_python_and_the_compiler_read_the_header_alike(tmp_path):
    """Sizes, offsets, enumerators, constants, and the fields of plugins."""
    interface = abi.interface()
    prints, expected = [], []

    def expect(expression, value):
        prints.append(f'printf("%s %ld\\n", "{expression}", (long)({expression}));')
        expected.append(f"{expression} {value}")

    for name, found in interface.names.items():
        if isinstance(found, str):
            prints.append(f'printf("{name} %s\\n", {name});')
            expected.append(f"{name} {found}")
        elif isinstance(found, int):
            expect(name, found)
        elif issubclass(found, IntEnum):
            for member in found:
                expect(member.name, member.value)
        else:
            expect(f"sizeof({name})", ctypes.sizeof(found))
            for field, kind in found._fields_:
                expect(f"offsetof({name}, {field})", getattr(found, field).offset)
                expect(f"sizeof((({name}*)0)->{field})", ctypes.sizeof(kind))
                expect(f"_Generic((({name}*)0)->{field}, float: 1, default: 0)", int(kind is ctypes.c_float))
    names = {(int, False): "INT", (float, False): "FLOAT", (int, True): "OPTIONAL_INT", (float, True): "OPTIONAL_FLOAT"}
    for plugin, fields in interface.plugins.items():
        kinds = [f"{names[field.type, field.optional]} {name}" for name, field in fields.items()]
        expected.append(" ".join([plugin, *kinds]))
    program = f"""
    #include <stdio.h>
    #include "{HEADER}"
    #define INT(name) " INT " #name
    #define FLOAT(name) " FLOAT " #name
    #define OPTIONAL_INT(name) " OPTIONAL_INT " #name
    #define OPTIONAL_FLOAT(name) " OPTIONAL_FLOAT " #name
    #define PLUGIN(name, fields) puts(#name fields);
    int main(void) {{ {" ".join(prints)} CQIL_PLUGINS(PLUGIN, INT, FLOAT, OPTIONAL_INT, OPTIONAL_FLOAT) }}
    """
    source, binary = tmp_path / "layout.c", tmp_path / "layout"
    source.write_text(program)
    subprocess.run(["cc", "-Wall", "-Werror", "-o", binary, source], check=True)
    done = subprocess.run([binary], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == expected
    assert interface.plugins and abi.CQIL_MAX_RANKS == MAX_RANKS


@needs_cc
def test_python_passes_what_another_header_says(tmp_path):
    """Nothing but the header says how a function is called: with another signature there Python calls it by that."""
    text = HEADER.read_text()
    changes = {
        "int cqil_workspace_rank(cqil_workspace* workspace)": "double cqil_workspace_rank(float a, int64_t b, double)",
        "float temperature, top_p,": "double before;\n    float temperature, top_p,",
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / HEADER.name).write_text(text)
    (tmp_path / "other.c").write_text(f"""
    #include "{HEADER.name}"
    double cqil_workspace_rank(float a, int64_t b, double c) {{ return a * b + c; }}
    int cqil_adjust(const void* logits, int rows, int width, cqil_dtype dtype, const cqil_sampling* settings,
                    const int32_t* slots, const uint32_t* counts, const float* bias, const uint32_t* mask, float* out,
                    void* stream) {{
        *out = dtype;
        return (int)(settings->before * settings->temperature) + settings->top_k;
    }}
    """)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "other.so", tmp_path / "other.c"], check=True)
    interface, library = abi.Interface(text), ctypes.CDLL(str(tmp_path / "other.so"))
    interface.declare(library)
    assert library.cqil_workspace_rank(0.5, 1 << 40, 0.25) == (1 << 39) + 0.25
    sampling = interface.names["cqil_sampling"](before=12.0, temperature=2.0, top_k=7)
    out = ctypes.c_float()
    for given in (sampling, ctypes.addressof(sampling)):  # on the host, or an address
        rest = None, None, None, None, ctypes.byref(out), None
        assert library.cqil_adjust(None, 1, 1, abi.dtype_code("bfloat16"), given, *rest) == 31 and out.value == 2
    with pytest.raises(ctypes.ArgumentError):
        library.cqil_adjust(None, 1, 1, 0, abi.cqil_linear_shape(), *rest)
    with pytest.raises(AttributeError, match="no attribute 'before'"):
        abi.cqil_sampling(before=1.0)
    with pytest.raises(AttributeError, match="cqil_nothing"):
        _ = abi.cqil_nothing
    with pytest.raises(ValueError, match="no type for wchar_t"):
        abi.Interface("typedef int wchar_t; int cqil_f(wchar_t x);")


@pytest.mark.parametrize(
    "header, reason",
    [
        ("typedef struct cqil_s { int a : 3; } cqil_s;", "bit-fields"),
        ("#pragma pack(1)\nint cqil_f(int x);", "#pragma pack"),
        ("#ifdef _WIN32\nint cqil_f(int x);\n#endif", "#ifdef _WIN32"),
        ("#define CQIL_LIMIT (1 << 4)", "#define CQIL_LIMIT"),
    ],
)
def test_what_python_would_read_otherwise_is_refused(header, reason):
    with pytest.raises(ValueError, match=reason):
        abi.Interface(header)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize(
    "source, old, new",
    [
        ("collectives.cu", "cqil_workspace_rank(cqil_workspace* workspace)", "cqil_workspace_rank(int workspace)"),
        ("tensorrt_plugins.cpp", "INT(terms)", "INT(summands)"),
        ("tensorrt_plugins.cpp", "PLUGIN(CqilAdd,", "PLUGIN(CqilSum,"),
    ],
)
def test_a_definition_that_differs_from_the_header_does_not_compile(source, old, new, tmp_path):
    plugins = shutil.copytree(HEADER.parent, tmp_path / "plugins")
    command = [
        "nvcc",
        "-std=c++17",
        "-arch=sm_90",
        "-I",
        HEADERS / "11.1",
        '-DCQIL_VERSION="test"',
        "-o",
        tmp_path / "o",
    ]
    command += ["-cuda"] if source.endswith(".cu") else ["-c", "-Xcompiler", "-fsyntax-only"]
    text = HEADER.read_text()
    assert old in text
    (plugins / HEADER.name).write_text(text.replace(old, new))
    done = subprocess.run([*command, plugins / source], capture_output=True, text=True)
    name = next(name for name in ("cqil_workspace_rank", "terms", "CqilAdd") if name in old)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode and any(name in line for line in errors), done.stderr


def test_a_plugin_is_given_its_fields():
    check = abi.interface().plugin_fields
    fields = {"delta": 1, "eps": 1e-5, "dtype": 0}
    assert check("CqilNorm", fields) == fields
    assert check("CqilBypass", {"distance": 1, "dtype": 0}) == {"distance": 1, "dtype": 0}  # `shared` is optional
    refused = {
        "CqilNorm has no field epsilon": ("CqilNorm", fields | {"epsilon": 1e-5}),
        "CqilNorm: its field dtype is not given": ("CqilNorm", {"delta": 1, "eps": 1e-5}),
        "CqilNorm: its field eps is of type float, found 0": ("CqilNorm", fields | {"eps": 0}),
        "CqilNorm: its field delta is of type int, found True": ("CqilNorm", fields | {"delta": True}),
        "CqilSum: .* no such plugin": ("CqilSum", fields),
    }
    for message, given in refused.items():
        with pytest.raises(TypeError, match=message):
            tensorrt_plugins.create(None, *given)  # before TensorRT sees it


@pytest.mark.slow
@needs_nvcc
def test_a_plugin_that_fails_prints_its_own_reason_once(library, tmp_path):
    headers, path = HEADERS / "11.1", library("11.1", "90")
    program = tmp_path / "plugin_failures"
    options = ["-std=c++17", "-Xcompiler=-Wno-deprecated-declarations", f"-I{headers}", f"-I{ROOT / 'plugins'}"]
    source = ROOT / "tests" / "support" / "plugin_failures.cpp"
    subprocess.run(["nvcc", *options, "-o", program, source, "-ldl"], check=True)
    done = subprocess.run([program, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = {}
    for part in re.split("^== ", done.stderr, flags=re.MULTILINE)[1:]:
        name, *lines = part.splitlines()
        said[name] = lines
    reasons = {
        "memset": "CqilAdd: cudaMemsetAsync",
        "unbound broadcast": "CqilBroadcast: its input `workspace` is not bound",
        "unbound bypass": "CqilBypass: its input `workspace` is not bound",
        "unshared bypass": "CqilBypass: this process shares no workspace",
    }
    if torch.cuda.is_available():
        reasons |= {
            "wrong rank": "CqilBroadcast: the engine was built for rank 1, the workspace is that of rank 0",
            "distance": "CqilBypass: distance 1 is not from 0 to 0",
        }
    else:
        assert said.pop("no GPU") == []
    assert said.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert len(said[name]) == 2 and said[name][1] == "status -1", (name, said[name])
        assert said[name][0].startswith(f"error: {reason}"), (name, said[name])
