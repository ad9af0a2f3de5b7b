"""CQIL for LLaMA-family models: a build pipeline and an MPI runtime for the lowest latency per token."""

from __future__ import annotations

from typing import Any

__version__ = "0.2.0"
__all__ = [
    "Conversation",
    "CqilConfig",
    "CqilModel",
    "EngineLimits",
    "Llm",
    "ModelConfig",
    "UserError",
    "build",
    "load",
]

# Imported when first used: torch alone takes seconds, and `cqil-build --help` should not.
_HOMES = {
    "Conversation": "tokenizer",
    "CqilConfig": "config",
    "CqilModel": "reference",
    "EngineLimits": "config",
    "Llm": "llm",
    "ModelConfig": "model",
    "UserError": "errors",
    "build": "builder",
    "load": "llm",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cqil_trt' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"cqil_trt.{_HOMES[name]}"), name)
