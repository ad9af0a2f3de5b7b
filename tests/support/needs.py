"""What a test needs of its machine: it skips with the reason where that is missing."""

from __future__ import annotations

import importlib
import shutil
from importlib import metadata

import pytest
from packaging.requirements import Requirement

# Packages whose modules have other names.
MODULES = {
    "cuda-bindings": "cuda.bindings",
    "cuda-pathfinder": "cuda.pathfinder",
    "compressed-tensors": "compressed_tensors",
}


def missing(requirement: str) -> str | None:
    """Why a package, like "peft" or "transformers>=5", cannot be used here; None when it can."""
    wanted = Requirement(requirement)
    try:
        module = importlib.import_module(MODULES.get(wanted.name, wanted.name))
    except Exception as error:  # whatever it, or what it imports, raises
        return f"needs {requirement} ({type(error).__name__}: {error})"
    if not wanted.specifier:
        return None
    try:
        found = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        found = module.__version__
    if not wanted.specifier.contains(found, prereleases=True):
        return f"needs {requirement}, {found} is installed"
    return None


def need(*requirements: str) -> None:
    """Skips the test unless all these packages can be used here."""
    for requirement in requirements:
        if why := missing(requirement):
            pytest.skip(why)


def need_cuda_backend() -> None:
    """Skips the test unless the torch backend can compute on a GPU here."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(f"needs a GPU of compute capability 8.0, {torch.cuda.get_device_name()} has less")
    need("cuda-bindings", "cuda-pathfinder")
    need_plugins()


def need_plugins() -> None:
    """Compiles the CUDA kernels where they are not yet. Skips the test when the compilers for that are not here."""
    from cqil_trt.errors import UserError
    from cqil_trt.gpu import kernel_library

    try:
        kernel_library.load()
    except UserError as error:
        for tool in ("cmake", "nvcc"):
            if shutil.which(tool) is None:
                pytest.skip(f"needs {tool} to compile the CUDA kernels ({error})")
        kernel_library.load(kernel_library.build())
