"""Builds, finds and loads libcqil_trt_plugins.so, the compiled form of `plugins/`.

A library is kept in a cache directory under the version of its sources; building again (for another TensorRT, say)
replaces it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from cqil_trt.errors import UserError
from cqil_trt.gpu import abi
from cqil_trt.gpu.sources import source_directory, source_version

LIBRARY = "libcqil_trt_plugins.so"


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
    """The library to use: CQIL_TRT_PLUGINS, else the one in the cache. Raises UserError if it does not exist."""
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
    if not hasattr(library, "cqil_version"):
        raise UserError(f"{path}: not a cqil-trt plugin library (it has no cqil_version)")
    abi.interface().declare(library)
    found = library.cqil_version().decode()
    if found != source_version():
        raise UserError(f"{path}: built from other sources ({found}, not {source_version()}): build it again")
    return library
