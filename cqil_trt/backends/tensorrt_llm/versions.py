"""The installed TensorRT-LLM, and what differs between the supported releases (0.20 to 1.2)."""

from __future__ import annotations

import ctypes
import importlib.metadata
import inspect
import re
from typing import Any

from cqil_trt.errors import UserError

FIRST, LAST = (0, 20), (1, 2)


def installed() -> str | None:
    """The version of tensorrt_llm that is installed; None without one. Raises UserError for one not supported."""
    try:
        version = importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        return None
    check(version)
    return version


def check(version: str) -> None:
    """Raises UserError unless the version has what the export needs."""
    found = re.match(r"(\d+)\.(\d+)", version)
    number = tuple(map(int, found.groups())) if found else (0, 0)
    if number < FIRST:
        raise UserError(f"tensorrt_llm {version}: too old, 0.20 to 1.2 are supported")
    if number > LAST:
        raise UserError(
            f"tensorrt_llm {version}: its TensorRT backend was removed after 1.2: install 1.2.1, or use "
            "--backend tensorrt"
        )


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
