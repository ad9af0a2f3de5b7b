"""The installed TensorRT-LLM, which runtimes the releases have, and what differs between those that build engines.

What differs between releases of the PyTorch backend is in `pytorch/modeling_cqil/releases.py`, which the engine
directory takes along.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import inspect
import re
from typing import Any

from cqil_trt.errors import UserError

ENGINE, PYTORCH = "engine", "pytorch"
TARGETS = (ENGINE, PYTORCH)
FIRST_WITH_ENGINES, LAST_WITH_ENGINES = (0, 20), (1, 2)
FIRST_WITH_PYTORCH = (1, 2)


def installed() -> str | None:
    """The version of tensorrt_llm that is installed; None without one."""
    try:
        return importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        return None


def default_target(version: str | None) -> str:
    """What is exported for this release when the user does not say: an engine, where a release can build one."""
    return PYTORCH if version is not None and _number(version) > LAST_WITH_ENGINES else ENGINE


def check(version: str, target: str) -> None:
    """Raises UserError unless the version has what the target needs."""
    number = _number(version)
    if target == PYTORCH:
        if number < FIRST_WITH_PYTORCH:
            raise UserError(f"tensorrt_llm {version}: too old for --target pytorch, 1.2 and later are supported")
        return
    if number < FIRST_WITH_ENGINES:
        raise UserError(f"tensorrt_llm {version}: too old, 0.20 to 1.2 are supported")
    if number > LAST_WITH_ENGINES:
        raise UserError(
            f"tensorrt_llm {version}: its TensorRT backend was removed after 1.2: use --target pytorch, or install "
            "1.2.1"
        )


def _number(version: str) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else (0, 0)


def load_plugins() -> ctypes.CDLL:
    """Our plugin library, registered with this process's TensorRT. Raises UserError when it cannot be."""
    import tensorrt

    from cqil_trt.gpu import tensorrt_plugins

    return tensorrt_plugins.register(tensorrt)


def attention_arguments(attention: Any, config: Any, place: int) -> dict[str, Any]:
    """Arguments that Attention takes in some releases only.

    Before 0.20 a layer had to know its index in the KV cache's pool, which layers with the same number of local heads
    share. Since 0.20 the pool mapping has a second column for it.
    """
    if "layer_idx_in_cache_pool" not in inspect.signature(attention.__init__).parameters:
        return {}
    heads = config.num_kv_heads_per_layer
    return {"layer_idx_in_cache_pool": heads[:place].count(heads[place])}
