"""What compiles and executes a rank's network, one module a backend; each imports its packages when it is loaded.

A backend module provides

    compile_rank(job: Compilation) -> None     turns the rank's weights into what its session needs
    finish(directory, ranks, limits, made, progress)   where needed: once, behind all ranks
    describe(limits, options, ranks)           checks what is asked of it, and says what it will make: Description
    open_session(engine, comm, device, number) executes it on one rank: a Session; `comm` is an mpi4py communicator or
                                               None, `device` one of DEVICES, `number` which GPU, modulo those there are
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from cqil_trt.config import EngineConfig
from cqil_trt.engine import rank_file
from cqil_trt.shard import RankPlan

# Where a session computes; "auto": on a GPU where there is one and the backend can.
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Description:
    """What `Engine` says of a backend's engines: `backend_version`, `architecture` and `build`.

    `notes`: what else the user should know before the engine is written.
    """

    version: str
    architecture: str = "any"
    build: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compilation:
    """One rank's network to compile into `directory`, where its weights lie already.

    `rotary`: as in `Engine`. `made`: what `describe` said. `options`: the command's flags for this backend.
    `progress`: show it on standard error.
    """

    directory: Path
    plan: RankPlan
    limits: EngineConfig
    rotary: tuple[float, ...]
    made: Description
    options: Mapping[str, Any]
    progress: bool

    def file(self, suffix: str) -> Path:
        return self.directory / rank_file(self.plan.rank, suffix)


def load(name: str) -> ModuleType:
    """The module of a backend. Raises ModuleNotFoundError when a package it needs is not installed."""
    return importlib.import_module(f"cqil_trt.backends.{name.replace('-', '_')}")
