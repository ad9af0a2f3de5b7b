"""The CUDA and C++ sources that the kernel library is compiled from."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cqil_trt import __version__
from cqil_trt.errors import UserError


def source_directory() -> Path:
    """Where the sources are: next to the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package.parent / "plugins", package / "_plugins"):
        if (candidate / "CMakeLists.txt").is_file():
            return candidate
    raise UserError(f"the plugin sources are neither next to {package} nor in it")


def source_version() -> str:
    """What cqil_version() of a library built from these sources returns."""
    digest = hashlib.sha256()
    for path in sorted(source_directory().iterdir()):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:16]}"
