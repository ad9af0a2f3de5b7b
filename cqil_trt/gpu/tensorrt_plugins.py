"""Our plugins in TensorRT's registry, for whichever package provides TensorRT."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cqil_trt.errors import UserError
from cqil_trt.gpu import abi, kernel_library


def register(trt: Any) -> ctypes.CDLL:
    """The library, its plugins registered with this process's TensorRT `trt`. Raises UserError when they cannot be."""
    # The library looks TensorRT up in the process, and Python loads it out of sight.
    for package in ("tensorrt", "tensorrt_libs"):
        directory = Path(getattr(sys.modules.get(package), "__file__", None) or os.devnull).parent
        for path in sorted(directory.glob("libnvinfer.so*")):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library, path = kernel_library.load(), kernel_library.library_path()
    if not hasattr(library, "cqil_register_plugins"):
        raise UserError(f"{path}: built without TensorRT plugins: build it with --tensorrt-root (docs/tensorrt.md)")
    if library.cqil_register_plugins():
        raise UserError(f"{path}: does not fit TensorRT {trt.__version__}: build it with that version's headers")
    return library


def create(trt: Any, name: str, fields: dict[str, int | float]) -> Any:
    """A plugin, for a network. Raises TypeError for a field that cqil_trt.h does not declare, or not with that type."""
    fields = abi.interface().plugin_fields(name, fields)
    kinds = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}
    given = []
    for field, value in fields.items():
        dtype, kind = kinds[type(value)]
        given.append(trt.PluginField(field, np.array([value], dtype), kind))
    registry = trt.get_plugin_registry()
    find = getattr(registry, "get_plugin_creator", None) or registry.get_creator
    creator = find(name, abi.CQIL_PLUGIN_VERSION, abi.CQIL_PLUGIN_NAMESPACE)
    return creator.create_plugin(name, trt.PluginFieldCollection(given))
