"""Backends compile and execute a rank's network. Each is a folder that implements `Backend`.

The folder is the registry: nothing else lists the backends. A backend's `__init__` defines `BACKEND`. It imports the
packages it needs only when they are used, because `build.py --help` loads every backend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from cqil_trt import formats
from cqil_trt.config import AUTO, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.model import Feature, ModelConfig
from cqil_trt.shard import RankPlan

if TYPE_CHECKING:
    from cqil_trt.engine import Engine
    from cqil_trt.session import Session

# Where a session computes; "auto": on a GPU where there is one and the backend can.
DEVICES = ("auto", "cpu", "cuda")
# The backend whose engines are nothing but the weights. It is the default, and the others compile from its engines.
PLAIN = "torch"


@dataclass(frozen=True, kw_only=True)
class Option:
    """A build option of a backend: `timing_cache` is the flag `--timing-cache`.

    Several backends may share an option. `choices`: the values that this backend accepts. `keywords`: further arguments
    of argparse's `add_argument`.
    """

    name: str
    help: str
    choices: tuple[str, ...] | None = None
    keywords: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a backend is about to build. `version`, `architecture`, `build`: as in `Engine`.

    `notes`: printed with the plan, before the engine is written. `circles`: whether the KV caches of layers with a
    window may be circles (`EngineLimits.circle`).
    """

    version: str
    architecture: str = "any"
    build: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    circles: bool = False


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """One rank's network to compile into `directory`, which already holds its weights.

    `rotary`: as in `Engine`. `description`: what `describe` said. `options`: the backend's options that were given.
    `progress`: show it on standard error.
    """

    directory: Path
    plan: RankPlan
    limits: EngineLimits
    rotary: tuple[float, ...]
    description: Description
    options: Mapping[str, Any]
    progress: bool

    def file(self, suffix: str) -> Path:
        return self.directory / f"rank{self.plan.rank}.{suffix}"


@dataclass(frozen=True, kw_only=True)
class CompiledEngine:
    """An engine directory whose ranks have all been compiled; fields as in `Compilation`."""

    directory: Path
    ranks: tuple[RankPlan, ...]
    limits: EngineLimits
    description: Description
    progress: bool


class Backend(ABC):
    """What the builder and the runtime ask of a backend. `name`: as `--backend` takes it.

    `packages`: the packages it needs, by import name, and the extra of this project that installs each. `options`: its
    flags of build.py. `dynamic_rope`: whether it computes sequences beyond the original context of dynamic rope and
    longrope. `features`: what it computes that LLaMA does not have. `formats`: the weight formats that its
    `Ops.project` multiplies with. `head_formats`: those of the last projection, if they are others. `kv_dtypes`: how
    it stores a KV cache. `verifies_weights`: whether `open_session` verifies the rank's weights, while it loads them.
    """

    name: str
    packages: Mapping[str, str] = {}
    options: tuple[Option, ...] = ()
    dynamic_rope = False
    features: frozenset[Feature] = frozenset()
    formats: tuple[str, ...] = (formats.DENSE,)
    head_formats: tuple[str, ...] = ()
    verifies_weights = False
    kv_dtypes: tuple[str, ...] = (AUTO,)

    def rank_files(self, rank: int) -> tuple[str, ...]:
        """The files that a rank needs, relative to the engine directory."""
        return (f"rank{rank}.safetensors",)

    def check_model(self, model: ModelConfig, limits: EngineLimits) -> None:
        """Raises UserError for a model, a weight format or a KV cache that the backend does not compute."""
        for flag, stored, known in (
            ("--quantize", limits.weights, self.formats),
            ("--quantize-head", limits.head, self.head_formats or self.formats),
        ):
            if formats.base(stored) not in known:
                use = " or ".join(known)
                raise UserError(f"{flag} {stored}: backend {self.name} does not support it: use {use}")
        if limits.kv_dtype not in self.kv_dtypes:
            able = " or ".join(name for name in names() if limits.kv_dtype in load(name).kv_dtypes)
            raise UserError(f"--kv-dtype {limits.kv_dtype}: backend {self.name} does not support it: use {able}")
        if missing := [feature for feature in model.features(limits.max_seq_len) if feature not in self.features]:
            raise UserError(f"--backend {self.name}: {lacking(model, missing)}")
        context = model.fixed_context
        if limits.max_seq_len > context and not self.dynamic_rope:
            able = " and ".join(name for name in names() if load(name).dynamic_rope)
            raise UserError(
                f"--backend {self.name}: the model's {model.rope.kind} rope rotates a longer prompt than {context} "
                f"tokens by its length, which only backend {able} on CPUs does: --max-seq-len {context} or less keeps "
                "it out of use"
            )

    @abstractmethod
    def describe(self, limits: EngineLimits, options: Mapping[str, Any], ranks: tuple[RankPlan, ...]) -> Description:
        """Checks the request and describes what will be built. Raises UserError for what the backend cannot do."""

    def compile(self, compilation: Compilation) -> None:  # noqa: B027 (optional)
        """Compiles a rank's network into files named `rank{r}.*`, anywhere in the directory."""

    def finish(self, compiled: CompiledEngine) -> None:  # noqa: B027 (optional)
        """Called once, when all ranks are compiled."""

    def check_runnable(self, engine: Engine, device: str) -> None:  # noqa: B027 (optional)
        """Raises UserError for an engine that cannot be executed on this host; `device`: one of DEVICES."""

    @abstractmethod
    def open_session(self, engine: Engine, comm: Any, device: str, number: int, slots: int) -> Session:
        """The session that executes the engine on this rank, whose files are undamaged (but see `verifies_weights`).

        Args:
            comm: an mpi4py communicator of the engine's ranks; None for one rank.
            device: one of DEVICES.
            number: which GPU, modulo the number of GPUs.
            slots: the most sequences that the KV cache is to hold; fewer where memory does not suffice.
        """


def lacking(model: ModelConfig, missing: Sequence[Feature], backend: str = "") -> str:
    """Says that `missing` of the model's features are not computed, and what to do. `backend`: not to be advised."""
    what = f"{model.architecture} has {', '.join(feature.value for feature in missing)}: not computed there"
    if list(missing) == [Feature.WINDOWS]:
        return f"{what}: --max-seq-len {model.sliding_window} or less keeps them out of use"
    able = [name for name in names() if {*missing} <= load(name).features and name != backend]
    return f"{what}: use backend {' or '.join(able)}"


@cache
def names() -> tuple[str, ...]:
    """The backends' names, the plain one first."""
    found = [info.name.replace("_", "-") for info in iter_modules(__path__) if info.ispkg]
    return tuple(sorted(found, key=lambda name: (name != PLAIN, name)))


def load(name: str) -> Backend:
    """The backend of that name. Raises UserError for one that does not exist."""
    if name not in names():
        raise UserError(f"--backend must be one of {', '.join(names())}, found {name}")
    return import_module(f"{__name__}.{name.replace('-', '_')}").BACKEND


def all_options() -> dict[str, tuple[Option, tuple[str, ...]]]:
    """Every option by name, merged, and the names of the backends that have it.

    The choices are those of all of them, None where one takes any value; the help says which backend takes what.
    """
    found: dict[str, dict[str, Option]] = {}
    for name in names():
        for option in load(name).options:
            found.setdefault(option.name, {})[name] = option
    return {name: (_merged(takers), tuple(takers)) for name, takers in found.items()}


def _merged(takers: Mapping[str, Option]) -> Option:
    first, *_ = options = list(takers.values())
    helps: dict[str, list[str]] = {}
    for name, option in takers.items():
        helps.setdefault(option.help, []).append(name)
    known = [option.choices for option in options]
    choices = None if None in known else tuple(dict.fromkeys(choice for own in known for choice in own or ()))
    text = "; ".join(f"{', '.join(backends)}: {text}" for text, backends in helps.items())
    return Option(name=first.name, help=text, choices=choices, keywords=first.keywords)
