"""Waiting for what comes soon, unless the machine does something else."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 240.0


def until(condition: Callable[[], T], pause: float = 0.02) -> T:
    """What `condition` gives once that is true. Fails after PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(pause)
    assert found, "it did not happen"
    return found
