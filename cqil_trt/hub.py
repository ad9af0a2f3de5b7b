"""Names on the Hugging Face hub → local files, through huggingface_hub: its cache, its token, its offline mode.

    org/name, org/name@revision                  a model or an adapter; a revision is a branch, a tag or a commit
    org/name/file.gguf, org/name/file.gguf@…     one GGUF file of a repository that holds several

Only files that a build reads are downloaded, never code. They are downloaded one by one, weights last, and then the
revision is recorded: a revision in the cache is complete even if a later update was interrupted.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cqil_trt.config import ADAPTER_FILE
from cqil_trt.errors import UserError
from cqil_trt.families.hugging_face import QUANTIZATION_FILES
from cqil_trt.gguf_files import PART, gguf_parts
from cqil_trt.json_fields import read_json
from cqil_trt.table import size
from cqil_trt.tokenizer.files import FILES
from cqil_trt.tokenizer.settings import TEMPLATES

_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>[^@]+\.gguf))?(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)
_TEMPLATES = re.compile(rf"{TEMPLATES}/[^/]+\.jinja")
_MODEL = {"config.json", "generation_config.json", *QUANTIZATION_FILES}
_ADAPTER = {"adapter_config.json", ADAPTER_FILE}
_TOKEN = "(HF_TOKEN, or hf auth login)"
# At most this many names are listed in a message.
_LISTED = 12


@dataclass(frozen=True, kw_only=True)
class Found:
    """A model or an adapter as the user named it, and its local path.

    `commit` is None unless it came from the hub. `note`: a message for the user about its origin.
    """

    name: str
    path: Path
    commit: str | None = None
    note: str | None = None

    @property
    def stem(self) -> str:
        """The base name for engines and adapters made from it."""
        if self.path.suffix == ".gguf":
            split = PART.fullmatch(self.path.name)
            return split["stem"] if split else self.path.stem
        match = None if self.commit is None else _NAME.fullmatch(self.name)
        return match["repo"].partition("/")[2] if match else self.path.resolve().name

    @property
    def pinned(self) -> str:
        """The name with the commit instead of a branch or tag, which may move."""
        return self.name if self.commit is None else f"{self.name.partition('@')[0]}@{self.commit}"

    def __str__(self) -> str:
        return self.name if self.commit is None else f"{self.name}, commit {self.commit[:12]}"


def find_model(name: str | Path | Found) -> Found:
    """The model's local path, or a snapshot that is downloaded if `name` is a name on the hub.

    A string is a name on the hub if it has the form org/name and no such path exists; a `Path` never is. A path is
    returned without checking that it exists. Raises UserError for an empty string, or if the model cannot be
    downloaded.
    """
    return _find(name, "--model", _model_files)


def find_adapter(name: str | Path | Found) -> Found:
    """As `find_model`, for a PEFT adapter."""
    return _find(name, "--lora", _adapter_files)


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """A parsed name. `label`: flag and name, for messages."""

    label: str
    repo: str
    file: str | None
    revision: str | None


# The names of a repository's files, and a function that downloads one → the files to download, in order, and the one
# that is the model (None: their directory is).
_Choice = tuple[list[str], str | None]
_Choose = Callable[[_Reference, Collection[str], Callable[[str], Path]], _Choice]


def _find(name: str | Path | Found, flag: str, choose: _Choose) -> Found:
    if isinstance(name, Found):
        return name
    if isinstance(name, Path):
        return Found(name=str(name), path=name)
    if not name:
        raise UserError(f"{flag} is empty")
    match = None if os.path.exists(name) else _NAME.fullmatch(name)
    if match is None:
        return Found(name=name, path=Path(name))
    reference = _Reference(label=f"{flag} {name}", repo=match["repo"], file=match["file"], revision=match["revision"])
    from huggingface_hub import constants, logging

    logging.set_verbosity_error()  # our messages cover its warnings
    if constants.HF_HUB_OFFLINE:
        return _from_cache(name, reference, choose, "HF_HUB_OFFLINE is set")
    try:
        info = _listing(reference)
    except _Unreachable as error:
        return _from_cache(name, reference, choose, str(error))
    return _from_hub(name, reference, choose, info)


class _Unreachable(Exception):
    """The hub gives no usable answer. The name may still be right, and its files in the cache."""


def _listing(reference: _Reference) -> Any:
    """The hub's description of the revision: `sha`, and `siblings` with `rfilename` and `size` in bytes."""
    from huggingface_hub import HfApi, constants

    with _errors(reference):
        return HfApi().model_info(
            reference.repo,
            revision=reference.revision,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
            files_metadata=True,
        )


def _from_hub(name: str, reference: _Reference, choose: _Choose, info: Any) -> Found:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    def fetch(file: str, revision: str = info.sha) -> Path:
        with _errors(reference):
            return Path(hf_hub_download(reference.repo, file, revision=revision))

    sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}
    try:
        files, main = choose(reference, sizes, fetch)
        missing = [
            f for f in files if not isinstance(try_to_load_from_cache(reference.repo, f, revision=info.sha), str)
        ]
        _check_space(reference, sum(sizes[file] for file in missing))
        paths = [fetch(file) for file in files]
        fetch(files[0], reference.revision or "main")
    except _Unreachable as error:
        raise UserError(f"{reference.label}: {error}: run it again to continue") from None
    return Found(name=name, path=_place(paths[0], files[0], main), commit=info.sha)


def _from_cache(name: str, reference: _Reference, choose: _Choose, why: str) -> Found:
    """The snapshot in the cache. `why`: the reason for not using the hub, for messages."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # Without patterns, this only locates the snapshot.
        folder = Path(
            snapshot_download(reference.repo, revision=reference.revision, local_files_only=True, allow_patterns=[])
        )
    except (LocalEntryNotFoundError, HFValidationError):
        raise UserError(
            f"{reference.label}: no such path here; {why}, and {constants.HF_HUB_CACHE} does not hold all of it"
        ) from None
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    try:
        files, main = choose(reference, names, lambda file: folder / file)
    except UserError as error:
        raise UserError(f"{error} (only a part of it is in the cache {folder}, and {why})") from None
    note = None if constants.HF_HUB_OFFLINE else f"{why}: taken from the cache"
    if choose is _model_files and main is None and not FILES & names:
        note = f"{why}, and the cache holds no tokenizer of it"  # some tools download only the weights
    return Found(name=name, path=_place(folder / files[0], files[0], main), commit=folder.name, note=note)


def _place(path: Path, file: str, main: str | None) -> Path:
    """The directory that holds `file` of a repository, found at `path`; or the file `main` in it."""
    root = path.parents[len(Path(file).parts) - 1]
    return root if main is None else root / main


def _model_files(reference: _Reference, names: Collection[str], get: Callable[[str], Path]) -> _Choice:
    if reference.file is not None:
        files = _split_set(reference.file)
        return _held(reference, files, names), files[0]
    weights = _weights(reference, names, get, "model.safetensors", "pytorch_model.bin")
    if "config.json" in names and weights:
        return [*_small(names, _MODEL), *weights], None
    files = sorted({_split_set(name)[0] for name in names if name.endswith(".gguf")})
    if len(files) == 1:
        return _held(reference, _split_set(files[0]), names), files[0]
    if files:
        shown = ", ".join(files[:_LISTED]) + (", …" if len(files) > _LISTED else "")
        raise UserError(
            f"{reference.label}: holds several GGUF files ({shown}): name one, as {reference.repo}/{files[0]}"
        )
    if "adapter_config.json" in names and not weights:
        raise UserError(f"{reference.label}: is a PEFT adapter: give it with --lora, and its base model with --model")
    if "config.json" not in names:
        raise UserError(f"{reference.label}: no config.json, which a model of transformers has, and no .gguf file")
    raise UserError(f"{reference.label}: no weights (looked for model.safetensors, pytorch_model.bin, *.gguf)")


def _adapter_files(reference: _Reference, names: Collection[str], get: Callable[[str], Path]) -> _Choice:
    if reference.file is not None or "adapter_config.json" not in names:
        raise UserError(f"{reference.label}: no adapter_config.json: not a PEFT adapter")
    weights = next((name for name in ("adapter_model.safetensors", "adapter_model.bin") if name in names), None)
    if weights is None:
        raise UserError(f"{reference.label}: no adapter_model.safetensors or adapter_model.bin")
    return [*_small(names, _ADAPTER), weights], None


def _small(names: Collection[str], wanted: set[str]) -> list[str]:
    """The repository's files that are `wanted` or belong to the tokenizer."""
    return sorted(name for name in names if name in wanted | FILES or _TEMPLATES.fullmatch(name))


def _weights(reference: _Reference, names: Collection[str], get: Callable[[str], Path], *forms: str) -> list[str]:
    """The files of the first of `forms` that exists, as one file or as an index and its shards."""
    for form in forms:
        if form in names:
            return [form]
        index = f"{form}.index.json"
        if index in names:
            weight_map = read_json(get(index)).get("weight_map")
            named = weight_map.values() if isinstance(weight_map, dict) else ()
            # Names of other files are not downloaded, and are refused when the index is read.
            shards = {file for file in named if isinstance(file, str) and file.endswith(Path(form).suffix)}
            return [index, *_held(reference, sorted(shards), names)]
    return []


def _split_set(file: str) -> list[str]:
    """All parts of a GGUF file in a repository."""
    return [str(part) for part in gguf_parts(PurePosixPath(file))]


def _held(reference: _Reference, files: list[str], names: Collection[str]) -> list[str]:
    for file in files:
        if file not in names:
            raise UserError(f"{reference.label}: no file {file}")
    return files


def _check_space(reference: _Reference, needed: int) -> None:
    """Raises UserError unless the cache's disk has room for `needed` bytes."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).absolute()
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if needed > free:
        raise UserError(
            f"{reference.label}: {size(needed)} to fetch, but only {size(free)} are free where the cache is, {cache} "
            "(HF_HUB_CACHE names another)"
        )


@contextmanager
def _errors(reference: _Reference) -> Iterator[None]:
    """Turns huggingface_hub's exceptions into UserError, or into _Unreachable if they are not about the name."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    label, hub = reference.label, constants.ENDPOINT
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{label}: gated: ask for access at {hub}/{reference.repo}, and give the token of that account {_TOKEN}"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{label}: no such path here, and no repository {reference.repo} on {hub} that this account sees "
            f"(a private one needs a token: {_TOKEN[1:-1]})"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{label}: {reference.repo} has no revision {reference.revision}") from None
    except HFValidationError:
        raise UserError(f"{label}: no such path here, and {reference.repo} is not a name on the hub") from None
    except LocalEntryNotFoundError as error:
        raise _Unreachable(f"{hub} cannot be reached ({error.__cause__ or error})") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(f"{label}: {hub} refuses access (HTTP {status}): check the token {_TOKEN}") from None
        raise _Unreachable(f"{hub} answers HTTP {status}") from None
    except OSError as error:
        if isinstance(error, (ConnectionError, TimeoutError)) or error.errno is None:
            raise _Unreachable(f"{hub} cannot be reached ({error})") from None
        where = error.filename or constants.HF_HUB_CACHE
        raise UserError(f"{label}: {where}: cannot be written ({error.strerror})") from None
    except Exception as error:  # its HTTP and storage clients raise many kinds
        raise _Unreachable(f"{hub} cannot be reached ({str(error) or type(error).__name__})") from None
