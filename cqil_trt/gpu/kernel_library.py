"""Builds, finds and loads libcqil_trt_plugins.so, the compiled form of `plugins/`.

A library is kept in a cache directory under the version of its sources; building again (for another TensorRT, say)
replaces it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from cqil_trt import __version__
from cqil_trt.config import EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.model import ModelConfig
from cqil_trt.shard import LayerShard

LIBRARY = "libcqil_trt_plugins.so"


class Failure(ctypes.Structure):
    """cqil_failure of cqil_trt.h."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("code", "rank", "peer", "operation", "sequence")]


def attention_fields(model: ModelConfig, shard: LayerShard, limits: EngineLimits) -> dict[str, int | float]:
    """What cqil_attention_shape and the plugin CqilAttention say of a rank's share of a layer, type and pass aside."""
    return {
        "heads": shard.num_heads,
        "kv_heads": shard.num_kv_heads,
        "head_dim": model.head_dim,
        "capacity": limits.max_seq_len,
        "max_batch": limits.max_batch_size,
        "group": model.group_size,
        "first": shard.first_in_group(model.group_size),
        "eps": model.rms_norm_eps,
    }


class AttentionShape(ctypes.Structure):
    """cqil_attention_shape of cqil_trt.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in "batch length heads kv_heads head_dim capacity max_batch group first dtype".split()
        ),
        ("eps", ctypes.c_float),
    ]


class Sampling(ctypes.Structure):
    """cqil_sampling of cqil_trt.h."""

    _fields_ = [("temperature", ctypes.c_float), ("top_p", ctypes.c_float), ("top_k", ctypes.c_int32)]


class LinearShape(ctypes.Structure):
    """cqil_linear_shape of cqil_trt.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in "rows outputs inputs gated dtype".split()),
        ("eps", ctypes.c_float),
    ]


def source_directory() -> Path:
    """The CUDA sources: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package.parent / "plugins", package / "_plugins"):
        if (candidate / "CMakeLists.txt").is_file():
            return candidate
    raise UserError(f"the plugin sources are neither beside nor in {package}")


def source_version() -> str:
    """What cqil_version() of a library built from these sources returns."""
    digest = hashlib.sha256()
    for path in sorted(source_directory().iterdir()):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:16]}"


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cqil-trt" / source_version()


def build(tensorrt_root: Path | None = None, architectures: str | None = None, output: Path | None = None) -> Path:
    """Builds the library with CMake and nvcc; returns its path.

    Args:
        tensorrt_root: where TensorRT's headers are; without it the library has no TensorRT plugins.
        architectures: as CMake's CUDA_ARCHITECTURES, e.g. "80;90"; default those of sm_80, 90, 100, 120 nvcc knows.
        output: where the library goes; default the cache, where `library_path` finds it.

    Raises:
        UserError: a tool is missing, or the compiler's first error.
    """
    for tool in ("cmake", "nvcc"):
        if shutil.which(tool) is None:
            raise UserError(f"{tool} is needed to build the plugins and is not on the PATH")
    target = output or cache_directory() / LIBRARY
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cqil-plugins-") as work:
        configure = ["cmake", "-S", str(source_directory()), "-B", work, "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DCQIL_VERSION={source_version()}", f"-DTENSORRT_ROOT={tensorrt_root or ''}"]
        if architectures:
            configure.append(f"-DCQIL_ARCHITECTURES={architectures}")
        for command in (configure, ["cmake", "--build", work, "--parallel"]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                lines = done.stdout.splitlines()
                first = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no output")
                raise UserError(f"building the plugins failed: {first.strip()} (whole output: {' '.join(command)})")
        # A library that another process has mapped must not be written over.
        temporary = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copy(Path(work) / LIBRARY, temporary)
        temporary.rename(target)
    return target


def library_path() -> Path:
    """The library to use: CQIL_TRT_PLUGINS, else the one in the cache. Raises UserError when there is none."""
    named = os.environ.get("CQIL_TRT_PLUGINS")
    path = Path(named) if named else cache_directory() / LIBRARY
    if not path.is_file():
        raise UserError(f"{path}: no such plugin library: build it with python -m cqil_trt.kernels build")
    return path


@lru_cache
def load(path: Path | None = None) -> ctypes.CDLL:
    """The library, its functions typed. Raises UserError when it is missing or was built from other sources."""
    path = path or library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be loaded ({error})") from None
    pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    signatures = {
        "cqil_workspace_create": [integer, integer, size, size, ctypes.c_double, ctypes.POINTER(pointer)],
        "cqil_workspace_handle": [pointer, pointer],
        "cqil_workspace_open": [pointer, pointer],
        "cqil_workspace_close": [pointer],
        "cqil_workspace_destroy": [pointer],
        "cqil_workspace_share": [pointer],
        "cqil_workspace_failure": [pointer, ctypes.POINTER(Failure)],
        "cqil_workspace_tune": [pointer, integer, integer, size, integer],
        "cqil_all_reduce": [pointer] * 4 + [size, integer, pointer],
        "cqil_all_reduce_residual_norm": [pointer] * 6 + [integer, integer, ctypes.c_float, integer, pointer],
        "cqil_broadcast": [pointer] * 3 + [size, integer, pointer],
        "cqil_bypass": [pointer] * 3 + [size, integer, integer, pointer],
        "cqil_argmax": [pointer] * 5 + [integer, pointer],
        "cqil_row_argmax": [pointer, integer, integer, integer, integer, pointer, pointer, pointer],
        "cqil_advance": [pointer, pointer, pointer, integer, integer, pointer, pointer, integer, integer, pointer],
        "cqil_sample": [pointer, integer, integer, integer, pointer, pointer, pointer, integer, pointer, pointer],
        "cqil_spread": [pointer, pointer, integer, integer, integer, integer, integer, pointer],
        "cqil_residual_norm": [pointer] * 5 + [integer, integer, ctypes.c_float, integer, pointer],
        "cqil_gather_rows": [pointer, pointer, pointer, integer, integer, integer, pointer],
        "cqil_add": [pointer, pointer, pointer, size, integer, pointer],
        "cqil_swiglu": [pointer, pointer, integer, integer, integer, pointer],
        "cqil_linear": [ctypes.POINTER(LinearShape)] + [pointer] * 9,
        "cqil_linear_scratch_bytes": [ctypes.POINTER(LinearShape)],
        "cqil_attention": [ctypes.POINTER(AttentionShape)] + [pointer] * 10,
        "cqil_attention_cache_bytes": [ctypes.POINTER(AttentionShape)],
        "cqil_attention_scratch_bytes": [ctypes.POINTER(AttentionShape)],
        "cqil_ping": [pointer, integer, ctypes.POINTER(ctypes.c_double), pointer],
    }
    try:
        for name, arguments in signatures.items():
            getattr(library, name).argtypes = arguments
        for name in ("cqil_attention_cache_bytes", "cqil_attention_scratch_bytes", "cqil_linear_scratch_bytes"):
            getattr(library, name).restype = size
        for name in ("cqil_last_error", "cqil_version"):
            getattr(library, name).restype = ctypes.c_char_p
        library.cqil_workspace_address.argtypes, library.cqil_workspace_address.restype = [pointer], pointer
    except AttributeError as error:
        raise UserError(f"{path}: not a cqil-trt plugin library ({error})") from None
    found = library.cqil_version().decode()
    if found != source_version():
        raise UserError(f"{path}: built from other sources ({found}, not {source_version()}): build it again")
    return library


def register_plugins(trt: Any) -> ctypes.CDLL:
    """The library, its plugins registered with this process's TensorRT `trt`. Raises UserError when they cannot be."""
    # The library looks TensorRT up in the process, and Python loads it out of sight.
    for package in ("tensorrt", "tensorrt_libs"):
        directory = Path(getattr(sys.modules.get(package), "__file__", None) or os.devnull).parent
        for path in sorted(directory.glob("libnvinfer.so*")):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library, path = load(), library_path()
    if not hasattr(library, "cqil_register_plugins"):
        raise UserError(f"{path}: built without TensorRT plugins: build it with --tensorrt-root (docs/tensorrt.md)")
    if library.cqil_register_plugins():
        raise UserError(f"{path}: does not fit TensorRT {trt.__version__}: build it with that version's headers")
    return library
