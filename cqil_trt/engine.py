"""The engine directory on disk: write, open, verify.

    config.json            what the engine is; size and BLAKE3 of every other file; a digest of itself
    rank{r}.safetensors    the tensors of rank r
    rank{r}.*              what the backend compiled from them, here or in a subdirectory
    reference.npz          the float32 reference's answers to a few prompts (see probes.py)
    tokenizer.json, ...    the tokenizer: the checkpoint's own files, or files made from its GGUF metadata

It is written to a temporary sibling and renamed into place, so a killed build leaves nothing that opens.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from cqil_trt.config import CqilConfig, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.files import lock
from cqil_trt.formats import StoredTensor
from cqil_trt.json_fields import read_json
from cqil_trt.model import ModelConfig
from cqil_trt.shard import RankPlan, plan

FORMAT_VERSION = 6
_TEMPORARY = ".building-"
LOCK = ".lock"
_SAFETENSORS_NAMES = {
    **{"float32": "F32", "float16": "F16", "bfloat16": "BF16"},
    **{"int8": "I8", "uint8": "U8", "float8_e4m3fn": "F8_E4M3"},
}


@dataclass(frozen=True)
class Source:
    """What an engine was built from, for its reference: absolute paths; `lora` is None without an adapter."""

    model: str
    lora: str | None


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine directory whose configuration has been verified; `verify_rank` verifies the files of a rank.

    `rotary`: the inverse frequencies of rotary embedding, float32 values [rotary_dim / 2], radians per position; for a
    model with several (`ModelConfig.ropes`) those of each, one after the other.
    `backend_version`, `architecture`: what built it, and the GPUs it runs on ("any", "9.0", "8.0, 8.9"). `build`:
    further data for the backend's runtime. `files`: size in bytes and BLAKE3 by name. `owners`: the rank of each file
    that belongs to one.
    """

    path: Path
    model: ModelConfig
    cqil: CqilConfig
    limits: EngineLimits
    backend: str
    rotary: tuple[float, ...]
    source: Source
    backend_version: str
    architecture: str
    build: Mapping[str, Any]
    created: str
    files: Mapping[str, Mapping[str, Any]]
    owners: Mapping[str, int]

    @property
    def world_size(self) -> int:
        return self.cqil.ranks

    def plan(self, rank: int) -> RankPlan:
        limits = self.limits
        return plan(self.model, self.cqil, limits.dtype, limits.weights, limits.keep, limits.head)[rank]

    def rank_file(self, rank: int, suffix: str = "safetensors") -> Path:
        return self.path / rank_file(rank, suffix)

    @property
    def shared_files(self) -> tuple[str, ...]:
        """The files that belong to no rank: tokenizer, reference."""
        return tuple(name for name in self.files if name not in self.owners)

    def verify(self, name: str) -> None:
        """Raises UserError unless file `name` exists with the size and BLAKE3 given in config.json."""
        with self._reading(name) as path:
            self._check(name, fingerprint(path)["blake3"])

    def read(
        self, name: str, buffers: Sequence[memoryview], use: Callable[[int, memoryview], Callable[[], None]]
    ) -> None:
        """Reads file `name` once, block by block, and verifies it like `verify`, of the same bytes.

        As many threads as there are buffers, all of one size, read ahead. `use(offset, block)` begins to use the bytes
        from `offset` on, and returns a function that waits until they are no longer needed; meanwhile they are hashed.
        It is called in the order of the file, with two blocks in use at the most. Damage is known, and raised, only at
        the end.
        """
        digest = blake3(max_threads=blake3.AUTO)
        size, step = self.files[name]["size"], len(buffers[0])
        offsets = iter(range(0, size, step))
        reading: deque[tuple[int, memoryview, Future[memoryview]]] = deque()
        using: deque[tuple[Callable[[], None], memoryview]] = deque()
        with self._reading(name) as path, open(path, "rb", buffering=0) as file:
            with ThreadPoolExecutor(len(buffers), thread_name_prefix="reader") as readers:

                def begin(buffer: memoryview) -> None:
                    offset = next(offsets, None)
                    if offset is not None:
                        read = readers.submit(_read_block, file.fileno(), buffer[: size - offset], offset, path)
                        reading.append((offset, buffer, read))

                for buffer in buffers:
                    begin(buffer)
                while reading:
                    offset, buffer, read = reading.popleft()
                    block = read.result()
                    using.append((use(offset, block), buffer))
                    digest.update(block)
                    # One block stays in use while the next begins to be, so that a copy follows the one before at once.
                    while len(using) > 1 or (using and not reading):
                        wait, buffer = using.popleft()
                        wait()
                        begin(buffer)
        self._check(name, digest.hexdigest())

    @contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        """The path of file `name`, whose size has been verified. Inside, what cannot be read is a UserError."""
        path, expected = self.path / name, self.files[name]["size"]
        try:
            size = path.stat().st_size
            if size != expected:
                raise UserError(f"{path}: {size} bytes, config.json says {expected}: rebuild the engine")
            yield path
        except OSError as error:
            advice = "" if isinstance(error, PermissionError) else ": rebuild the engine"
            raise UserError(f"{path}: cannot be read ({error.strerror or error}){advice}") from None

    def _check(self, name: str, found: str) -> None:
        if found != self.files[name]["blake3"]:
            raise UserError(
                f"{self.path / name}: the checksum differs from config.json: the file is damaged, rebuild the engine"
            )

    def weight_offsets(self, rank: int) -> list[int]:
        """Where each of a rank's tensors begins in its file, in bytes, in the plan's order.

        They follow from the plan, so that a damaged file cannot mislead. Raises UserError for another file.
        """
        tensors, name = self.plan(rank).tensors, rank_file(rank)
        header = tensor_header(tensors)
        offsets = [len(header)]
        for tensor in tensors:
            offsets.append(offsets[-1] + tensor.nbytes)
        with self._reading(name) as path, open(path, "rb") as file:
            found = file.read(len(header))
        if found != header or offsets.pop() != self.files[name]["size"]:
            self.verify(name)
            raise _foreign(self.path)
        return offsets

    def files_of(self, rank: int, needed: Sequence[str] = ()) -> list[str]:
        """The files of a rank. Raises UserError unless `needed` are among them."""
        own = [name for name, owner in self.owners.items() if owner == rank]
        if not {*needed} <= {*own}:
            raise _foreign(self.path)
        return own

    def verify_rank(self, rank: int, needed: Sequence[str] = (), but: Collection[str] = ()) -> None:
        """Verifies the files that rank `rank` loads: its own (`needed` among them), and on rank 0 the shared ones.

        `but`: those that whoever loads them verifies.
        """
        for name in (*self.files_of(rank, needed), *(self.shared_files if rank == 0 else ())):
            if name not in but:
                self.verify(name)

    @classmethod
    def open(cls, path: Path) -> Engine:
        """Opens an engine directory. Raises UserError for a missing, damaged or foreign one."""
        if not (path / "config.json").is_file():
            raise UserError(f"--engine {path}: not an engine directory (no config.json)")
        raw = read_json(path / "config.json")
        if raw.get("format") != "cqil-trt" or "digest" not in raw:
            raise UserError(f"{path}/config.json: not the configuration of an engine")
        if raw.get("format_version") != FORMAT_VERSION:
            found = raw.get("format_version")
            raise UserError(f"{path}: engine format {found!r:.20}, this release reads {FORMAT_VERSION}: rebuild it")
        if raw.pop("digest") != _canonical_digest(raw):
            raise UserError(f"{path}/config.json: its digest does not match: the file is damaged, rebuild the engine")
        try:
            engine = cls(
                path=path,
                model=ModelConfig.from_dict(raw["model"]),
                cqil=CqilConfig(**raw["cqil"]),
                limits=EngineLimits.from_dict(raw["limits"]),
                backend=raw["backend"],
                rotary=tuple(map(float, raw["rotary"])),
                source=Source(**raw["source"]),
                backend_version=raw["backend_version"],
                architecture=raw["architecture"],
                build=raw["build"],
                created=raw["created"],
                files=raw["files"],
                owners=raw["owners"],
            )
            model = engine.model
            complete = len(engine.rotary) == len(model.ropes) * model.rotary_dim // 2 and all(
                {"size", "blake3"} <= entry.keys() for entry in engine.files.values()
            )
            complete = complete and engine.owners.keys() <= engine.files.keys()
        except (KeyError, TypeError, ValueError, AttributeError):
            complete = False
        if not complete:
            raise _foreign(path)
        return engine


def _read_block(file: int, block: memoryview, offset: int, path: Path) -> memoryview:
    """Fills `block` from `offset` on. Raises UserError where the file ends before."""
    filled = 0
    while filled < len(block):
        count = os.preadv(file, [block[filled:]], offset + filled)
        if not count:
            raise UserError(f"{path}: truncated while it was read: rebuild the engine")
        filled += count
    return block


def _foreign(path: Path) -> UserError:
    return UserError(f"{path}/config.json: not what this release writes: rebuild the engine")


def rank_file(rank: int, suffix: str = "safetensors") -> str:
    return f"rank{rank}.{suffix}"


def tensor_header(tensors: Iterable[StoredTensor]) -> bytes:
    """The header of a safetensors file that holds these tensors in this order."""
    header, end = {}, 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_spans(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and length in bytes of each tensor in a safetensors file, in file order."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (8 + size + first, last - first) for name, (first, last) in spans.items()}


def fingerprint(path: Path) -> dict[str, Any]:
    """Size in bytes and BLAKE3 of a file, as config.json lists them. All cores that this process may use take part."""
    digest = blake3(max_threads=blake3.AUTO)
    digest.update_mmap(path)
    return {"size": path.stat().st_size, "blake3": digest.hexdigest()}


def _canonical_digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_config(directory: Path, values: dict[str, Any]) -> None:
    """Writes config.json with its own digest. It must be the last file of an engine to be written."""
    values = {"format": "cqil-trt", "format_version": FORMAT_VERSION, **values}
    values = json.loads(json.dumps(values))
    values["digest"] = _canonical_digest(values)
    (directory / "config.json").write_text(json.dumps(values, indent=1) + "\n")


def check_replaceable(path: Path, force: bool) -> None:
    """Raises UserError unless what exists at `path` is an engine, or empty, and `force` is set."""
    if not path.is_dir() or (any(path.iterdir()) and not is_engine(path)):
        raise UserError(f"--output {path}: exists and is not an engine: give another directory")
    if not force:
        raise UserError(f"--output {path}: exists already (--force replaces it)")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError into a UserError about the output `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror or error})") from None


@contextmanager
def new_directory(path: Path, force: bool) -> Iterator[Path]:
    """A temporary sibling of `path`, renamed to `path` if the block succeeds and removed if it fails.

    It is also removed when this process is killed. Raises UserError when `path` exists and `force` is not set, then or
    at the end, or holds something that is not an engine.
    """
    if path.exists():
        check_replaceable(path, force)
    temporary = held = remover = None
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(path)
            with _signals_wait():  # otherwise the directory could exist without its lock
                temporary = _hidden_sibling(path)
                remover = _remover(temporary)  # before there is anything that a killed process could leave
                temporary.mkdir()
                held = _lock(temporary)
            yield temporary
            (temporary / LOCK).unlink()
            _publish(temporary, path, force)
    finally:
        if held is not None:
            os.close(held)
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if remover is not None:
            remover.communicate()


def _publish(temporary: Path, path: Path, force: bool) -> None:
    """Renames a complete engine to `path`, which another build may have created meanwhile."""
    if path.exists():
        check_replaceable(path, force)
        # Moved aside whole, so that the name never refers to half an engine.
        old = _hidden_sibling(path)
        path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        return
    try:
        temporary.rename(path)  # fails if a directory with files has appeared
    except OSError:
        if path.exists():
            check_replaceable(path, force)
        raise


def _remover(directory: Path) -> subprocess.Popen[bytes]:
    """A process that removes `directory` when this one ends, however it does: its input ends then.

    mpirun kills all ranks as soon as one has ended, which leaves none of them the time to remove gigabytes. In a
    session of its own it does not receive what a terminal or mpirun sends. Other ranks may still add files: it tries a
    few times.
    """
    script = 'read _; for _ in 1 2 3 4 5; do rm -rf -- "$0" && exit; sleep 0.2; done'
    null = subprocess.DEVNULL
    return subprocess.Popen(
        ["/bin/sh", "-c", script, directory.absolute()],
        stdin=subprocess.PIPE,
        stdout=null,
        stderr=null,
        start_new_session=True,
    )


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Defers SIGINT and SIGTERM until the block ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def existing(path: Path) -> Engine | None:
    """The engine at `path`; None if it does not open."""
    try:
        return Engine.open(path)
    except UserError:
        return None


def _hidden_sibling(path: Path) -> Path:
    """An unused name next to `path`."""
    return path.parent / f"{_TEMPORARY}{path.name}-{secrets.token_hex(4)}"


def _lock(directory: Path) -> int:
    """Locks a build's directory for the life of the process. Raises OSError if another process holds the lock."""
    return lock(directory / LOCK, os.O_RDWR | os.O_CREAT)


def is_engine(path: Path) -> bool:
    """Whether `path` looks like an engine directory, damaged or not."""
    try:
        return read_json(path / "config.json").get("format") == "cqil-trt"
    except UserError:
        return False


def _remove_abandoned(path: Path) -> None:
    """Removes the leftovers of killed builds of `path`; a build that is still running holds its lock."""
    for entry in path.parent.glob(f"{_TEMPORARY}{glob.escape(path.name)}-{'[0-9a-f]' * 8}"):
        try:
            os.close(_lock(entry))
        except OSError:
            continue
        shutil.rmtree(entry, ignore_errors=True)


def find_engine(root: Path, ranks: int, runs: Callable[[Engine], bool]) -> Path:
    """The newest engine under `root` that `ranks` ranks can run, of those that run here (`runs`).

    Raises UserError when there is none.
    """
    sizes: list[tuple[str, int, Path]] = []
    for config in root.glob("[!.]*/config.json"):
        try:
            engine = Engine.open(config.parent)
        except UserError:
            continue
        if not runs(engine):
            continue
        sizes.append((engine.created, engine.world_size, config.parent))
    fitting = [entry for entry in sizes if ranks % entry[1] == 0]
    if fitting:
        return max(fitting)[2]
    if sizes:
        wanted = [str(size) for size in sorted({size for _, size, _ in sizes})]
        start = f"mpirun -n {wanted[0]}" if len(wanted) == 1 else f"mpirun -n N, N one of {', '.join(wanted)}"
        found = "1 MPI rank" if ranks == 1 else f"{ranks} MPI ranks"
        raise UserError(f"no engine under {root} fits {found}: start with {start}")
    raise UserError(
        f"no engine under {root} that runs here: build one with builders/build.py, or name it with --engine"
    )
