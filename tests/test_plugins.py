"""The plugin library, as far as a machine without GPU goes: it compiles, loads, and TensorRT takes its plugins."""

import ctypes.util
import shutil
import subprocess
import sys

import pytest
from support import ROOT
from support.processes import run

from cqil_trt.errors import UserError
from cqil_trt.gpu import kernel_library

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
HEADERS = ROOT / "third_party" / "tensorrt_headers"


@pytest.fixture(scope="module", params=[("10.14", "80"), ("11.1", "90")], ids=lambda param: param[0])
def built(request, tmp_path_factory):
    """The library for one architecture with the headers of one TensorRT; warnings are errors."""
    headers, architecture = request.param
    path = tmp_path_factory.mktemp(headers) / kernel_library.LIBRARY
    return headers, kernel_library.build(HEADERS / headers, architecture, path)


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
    done = run(sys.executable, "-m", "cqil_trt.kernels", "build", "--architectures", "90", "--output", path)
    assert done.returncode == 0, done.stderr
    names = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True).stdout
    assert "cqil_all_reduce" in names and "cqil_register_plugins" not in names
    configured = run("cmake", "-S", "plugins", "-B", tmp_path / "build", env={"TENSORRT_ROOT": ""})
    assert "the C interface alone" in configured.stdout


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
assert create("CqilBroadcast", rank=3, hidden=4096, dtype=1) == ([3, 4096, 1], 1)
assert create("CqilBypass", distance=2, dtype=1) == ([2, 1, 0], 1)
assert create("CqilNorm", delta=1, eps=0.0, dtype=2) == ([1, 0, 2], 1)
linear = {"delta": 0, "bias": 1, "norm": 1, "residual": 0, "gated": 1, "eps": 0.0, "dtype": 1}
assert create("CqilLinear", **linear) == ([0, 1, 1, 0, 1, 0, 1], 1)
assert create("CqilLinear", **{**linear, "residual": 1}) is None  # a gated product takes none
assert create("CqilAdd", terms=2, dtype=1) == ([2, 1], 1) and create("CqilAdd", terms=1, dtype=1) is None
assert create("CqilGather", dtype=1) == ([1], 1)
attention = {"heads": 9, "kv_heads": 3, "head_dim": 64, "capacity": 2048, "max_batch": 8, "group": 3, "first": 1}
made, outputs = create("CqilAttention", **attention, head_norms=1, eps=0.0, dtype=1)
assert made == [9, 3, 64, 2048, 8, 3, 1, 1, 0, 1] and outputs == 1
assert create("CqilAttention", **{**attention, "group": 0}, head_norms=0, eps=0.0, dtype=1) is None
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
