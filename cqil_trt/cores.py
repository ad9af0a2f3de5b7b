"""How many CPU cores this process may keep busy."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")  # within a container, its own


def usable(cgroup: Path = _CGROUP) -> int:
    """The cores that this process is bound to, at most as many as its container's quota pays for; at least 1."""
    return _limited(len(os.sched_getaffinity(0)), cgroup)


def of_machine(cgroup: Path = _CGROUP) -> int:
    """As `usable`, for a process that may be bound to one core, which then says nothing."""
    return _limited(os.cpu_count() or 1, cgroup)


def _limited(cores: int, cgroup: Path) -> int:
    quota = _quota(cgroup)
    # Rounded down: threads wait for each other busily, and when the quota is used up, all stop.
    return cores if quota is None else max(1, min(cores, int(quota)))


def _quota(cgroup: Path) -> float | None:
    """Seconds of CPU time for each second; None without a limit.

    "max 100000" or "150000 100000" in cpu.max (cgroup v2); two files, where -1 is no limit (v1).
    https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/scheduler/sched-bwc.html
    """
    with suppress(OSError, ValueError):  # "max" is no number
        quota, period = (cgroup / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    return None
