"""A port for a program that takes no open socket."""

import contextlib
import random
import socket
from pathlib import Path


def free_port() -> int:
    """A free TCP port of 127.0.0.1, of those that the system gives to nobody who asks for any: it stays free."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", random.randrange(first // 2, first))) as free,
        ):
            return free.getsockname()[1]
