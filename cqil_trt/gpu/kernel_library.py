"""Builds, finds and loads libcqil_trt_plugins.so, the compiled form of `plugins/`.

A library is kept in a cache directory under the version of its sources; building again (for another TensorRT, say)
replaces it. A wheel may bring libraries of its own, one for each major version of CUDA, each with a `library.json`:

    _library/cuda13/libcqil_trt_plugins.so
    _library/cuda13/library.json             {"version": …, "cuda": 13, "architectures": [80, 90, 100, 120]}
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cqil_trt import cores
from cqil_trt.errors import UserError
from cqil_trt.gpu import abi
from cqil_trt.gpu.sources import source_directory, source_version

LIBRARY = "libcqil_trt_plugins.so"
RECORD = "library.json"
# What a wheel brings.
_PACKAGED = Path(__file__).resolve().parent.parent / "_library"


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cqil-trt" / source_version()


def build(
    tensorrt_root: Path | None = None,
    architectures: str | None = None,
    output: Path | None = None,
    progress: bool = False,
) -> Path:
    """Builds the library with CMake and nvcc; returns its path.

    Args:
        tensorrt_root: where TensorRT's headers are; without it the library has no TensorRT plugins.
        architectures: as CMake's CUDA_ARCHITECTURES, e.g. "80;90"; default those of sm_80, 90, 100, 120 nvcc knows.
        output: where the library goes; default the cache, where `library_path` finds it.
        progress: show a bar of the files compiled.

    Raises:
        UserError: a tool is missing, or the compiler's first error.
    """
    target = output or cache_directory() / LIBRARY
    _compile(target, tensorrt_root, architectures, progress)
    return target


def build_packaged(
    directory: Path, tensorrt_root: Path | None = None, architectures: str | None = None, progress: bool = False
) -> Path:
    """Builds a library and its record for a wheel, in `cudaN` under `directory`; else as `build`."""
    _check_tools()
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.", said)
    if found is None:
        raise UserError("nvcc --version does not say which release of CUDA it is")
    target = directory / f"cuda{found[1]}" / LIBRARY
    write_record(target, int(found[1]), _compile(target, tensorrt_root, architectures, progress))
    return target


def write_record(library: Path, cuda: int, architectures: list[int]) -> None:
    """Writes what a wheel says about a library next to it: CUDA's major version; architectures like 80 for sm_80."""
    values = {"version": source_version(), "cuda": cuda, "architectures": architectures}
    library.with_name(RECORD).write_text(json.dumps(values) + "\n")


def _check_tools() -> None:
    for tool in ("cmake", "nvcc"):
        if shutil.which(tool) is None:
            raise UserError(f"{tool} is needed to build the plugins and is not on the PATH")


def _compile(target: Path, tensorrt_root: Path | None, architectures: str | None, progress: bool) -> list[int]:
    """Compiles to `target`; returns the architectures."""
    _check_tools()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cqil-plugins-") as work:
        configure = ["cmake", "-S", str(source_directory()), "-B", work, "-DCMAKE_BUILD_TYPE=Release"]
        configure += [
            "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
            f"-DCQIL_VERSION={source_version()}",
            f"-DTENSORRT_ROOT={tensorrt_root or ''}",
        ]
        if architectures:
            configure.append(f"-DCQIL_ARCHITECTURES={architectures}")
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(cores.usable())
        output = _run(configure, work)
        files = json.loads((Path(work) / "compile_commands.json").read_text())
        from tqdm import tqdm  # only those who compile need it

        with tqdm(total=len(files), desc="compiling", unit="file", disable=not progress, leave=False) as bar:

            def count() -> None:
                bar.n = sum(1 for _ in Path(work).glob("CMakeFiles/cqil_trt_plugins.dir/*.o"))
                bar.refresh()

            _run(["cmake", "--build", work, "--parallel", jobs], work, count)
        # A library that another process has mapped must not be written over.
        temporary = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copy(Path(work) / LIBRARY, temporary)
        temporary.rename(target)
    [said] = re.findall(r"GPU architectures: ([\d;]+)", output)
    return [int(number) for number in said.split(";")]


def _run(command: list[str], temporary: str, every_second: Callable[[], None] = lambda: None) -> str:
    """What a command says, whose temporary files are in `temporary`. Raises UserError with its first error."""
    environment = {**os.environ, "TMPDIR": temporary}  # nvcc leaves what it writes there when it is killed
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment) as process:
            try:
                while process.returncode is None:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(1)
                    every_second()
            except BaseException:
                process.kill()
                raise
        said.seek(0)
        output = said.read()
    if process.returncode:
        lines = output.splitlines()
        first = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no output")
        raise UserError(f"building the plugins failed: {first.strip()} (whole output: {' '.join(command)})")
    return output


def library_path() -> Path:
    """The library to use: CQIL_TRT_PLUGINS, else the one in the cache, else the wheel's. Raises UserError for none."""
    named = os.environ.get("CQIL_TRT_PLUGINS")
    path = Path(named) if named else cache_directory() / LIBRARY
    if path.is_file():
        return path
    packaged = None if named else packaged_library(_PACKAGED, this_gpu())
    if packaged is None:
        raise UserError(f"{path}: no such plugin library: build it with python -m cqil_trt.kernels build")
    return packaged


@dataclass(frozen=True)
class Gpu:
    """`capability`: 90 for compute capability 9.0. `cuda`: the newest major version of CUDA that the driver runs."""

    capability: int
    cuda: int


def packaged_library(directory: Path, gpu: Gpu | None) -> Path | None:
    """The library of a wheel, in `directory`, that was compiled from these sources and runs on `gpu`, if any does.

    It holds PTX of each architecture, so it runs on those and on later ones. Without a GPU all fit.
    """
    found = []
    for record in directory.glob(f"*/{RECORD}"):
        values = json.loads(record.read_text())
        fits = gpu is None or (gpu.cuda >= values["cuda"] and gpu.capability >= min(values["architectures"]))
        if fits and values["version"] == source_version() and record.with_name(LIBRARY).is_file():
            found.append((values["cuda"], record.with_name(LIBRARY)))
    return max(found)[1] if found else None


def this_gpu() -> Gpu | None:
    """The first GPU of this machine, as its driver says; None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version, device, major, minor = (ctypes.c_int() for _ in range(4))
    # CUDA driver API: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR is 75, …_MINOR is 76; versions are 1000 * major + …
    failed = driver.cuInit(0) or driver.cuDriverGetVersion(ctypes.byref(version))
    failed = failed or driver.cuDeviceGet(ctypes.byref(device), 0)
    failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
    failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    return None if failed else Gpu(10 * major.value + minor.value, version.value // 1000)


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


def find_linear_library(library: ctypes.CDLL) -> bool:
    """Whether products of many rows are cuBLASLt's: of NVIDIA's wheels, conda, a CUDA toolkit, or CQIL_CUBLASLT.

    Raises UserError when the file that CQIL_CUBLASLT names cannot be used.
    """
    if not os.environ.get("CQIL_CUBLASLT"):
        from cuda.pathfinder import load_nvidia_dynamic_lib

        with suppress(RuntimeError):  # which it raises for all that it does not find or cannot load
            load_nvidia_dynamic_lib("cublasLt")
    found: int = library.cqil_linear_library(-1)
    if found < 0:
        raise UserError(library.cqil_last_error().decode())
    return found == 1
