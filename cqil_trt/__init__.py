"""CQIL for LLaMA-family models: a build pipeline and an MPI runtime for the lowest latency per token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cqil_trt.builder import build
    from cqil_trt.config import CqilConfig, EngineConfig, ModelConfig
    from cqil_trt.errors import UserError
    from cqil_trt.llm import Llm, load
    from cqil_trt.reference import CqilModel

# Imported when first used: torch alone takes seconds, and `cqil-build --help` should not.
_HOMES = {
    "build": "cqil_trt.builder",
    "CqilConfig": "cqil_trt.config",
    "EngineConfig": "cqil_trt.config",
    "ModelConfig": "cqil_trt.config",
    "UserError": "cqil_trt.errors",
    "Llm": "cqil_trt.llm",
    "load": "cqil_trt.llm",
    "CqilModel": "cqil_trt.reference",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cqil_trt' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
