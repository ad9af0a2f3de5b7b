"""Puts compiled kernels into a wheel: what the directory in CQIL_WHEEL_LIBRARIES holds (scripts/build_wheel.sh)."""

import os
import platform
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Libraries(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        directory = os.environ.get("CQIL_WHEEL_LIBRARIES")
        if not directory or version == "editable":
            return
        build_data["force_include"][directory] = "cqil_trt/_library"
        build_data["pure_python"] = False
        # ctypes loads them, so any Python 3 will do; auditwheel finds out which manylinux they need.
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"
