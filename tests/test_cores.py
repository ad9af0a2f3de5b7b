"""Cores that a process may use: its affinity, and its container's quota in the files that the kernel documents."""

import os

import pytest

from cqil_trt import cores


@pytest.mark.parametrize(
    "files, quota",
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "350000 100000\n"}, 3),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "125000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 2),
    ],
)
def test_a_containers_quota(files, quota, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert cores.of_machine(tmp_path) == (quota or 64)
    bound = len(os.sched_getaffinity(0))
    assert cores.usable(tmp_path) == min(bound, quota or bound)
