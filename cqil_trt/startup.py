"""How long the start of a process takes, part by part."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def since_start() -> float:
    """Seconds since this process began (proc(5): field 22 of stat is in clock ticks since boot)."""
    ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class Startup:
    """Times the parts of a start, from the beginning of the process on.

    `parts`: the seconds of each, one after the other. `within`: of what happened inside a part, some at the same time.
    """

    def __init__(self) -> None:
        self.parts = {"process": since_start()}
        self.within: dict[str, dict[str, float]] = {}
        self._last = time.perf_counter()

    def end(self, part: str, within: Mapping[str, float] | None = None) -> None:
        """A part ends, and the next begins."""
        now = time.perf_counter()
        self.parts[part] = now - self._last
        if within:
            self.within[part] = dict(within)
        self._last = now

    @property
    def report(self) -> dict[str, Any]:
        """Seconds, for JSON."""
        return {"total": sum(self.parts.values()), "parts": self.parts, "within": self.within}

    def __str__(self) -> str:
        texts = []
        for part, seconds in self.parts.items():
            inside = ", ".join(f"{name} {each:.2f}" for name, each in self.within.get(part, {}).items())
            texts.append(f"{part} {seconds:.2f}" + (f" ({inside})" if inside else ""))
        return f"{sum(self.parts.values()):.2f} s: {', '.join(texts)}"
