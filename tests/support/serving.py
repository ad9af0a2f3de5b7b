"""A running server: `mpirun -n P python runtime/serve.py` on a free port, with what it prints."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from support import ROOT
from support.processes import environment


class ServerProcess:
    """Started in the constructor, which returns when it is ready; raises RuntimeError with its output if it ends."""

    def __init__(
        self,
        ranks: int,
        engine: Any,
        *flags: Any,
        api_key: str | None = None,
        timeout: float = 300,
        python: str = "python",
    ):
        self.api_key = api_key
        command = ["mpirun", "-n", ranks, python, ROOT / "runtime" / "serve.py", "--engine", engine, "--port", 0]
        env = environment() | {"OMP_NUM_THREADS": "1"} | ({} if api_key is None else {"CQIL_API_KEYS": api_key})
        self.process = subprocess.Popen(
            [str(part) for part in (*command, *flags)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            env=env,
            cwd=ROOT,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        end = time.monotonic() + timeout
        while (found := re.search(r"serving at (\S+)", self.output)) is None:
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(f"the server did not start:\n{self.output}")
            time.sleep(0.02)
        self.url = found[1]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def status(self, path: str) -> int:
        """The HTTP status of a GET."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=60) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    def ranks(self) -> list[int]:
        """The process ids of the ranks, in rank order, which is that of the ids unless these begin again in between."""
        return sorted(_children_running(self.process.pid, "serve.py"), key=_rank)

    def http(self) -> int:
        """The process id of the HTTP process."""
        [found] = [pid for rank in self.ranks() for pid in _children_running(rank, "cqil_trt.serving.frontend")]
        return found

    def client(self, **options: Any) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=self.url + "/v1", api_key=self.api_key or "none", **{"max_retries": 0, **options})

    def stop(self, timeout: float = 300) -> int:
        """Sends SIGTERM; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout)

    def wait(self, timeout: float = 300) -> int:
        try:
            code = self.process.wait(timeout)
        finally:
            self.process.kill()
        self._reader.join(timeout=5)
        return code


def processes() -> dict[int, tuple[int, str]]:
    """Every process: its parent, and its command line.

    Without those that have the command line of their parent, which they are about to replace by another program's.
    """
    listed = subprocess.run(["ps", "-ewwo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = (line.split(None, 2) for line in listed.splitlines())
    found = {int(pid): (int(parent), args) for pid, parent, args in (row for row in rows if len(row) == 3)}
    return {pid: (above, args) for pid, (above, args) in found.items() if above not in found or found[above][1] != args}


def _children_running(parent: int, name: str) -> list[int]:
    """The descendants of a process whose command line has `name` and begins with an interpreter, in order."""
    known = processes()
    found = []
    for pid, (above, args) in sorted(known.items()):
        ancestors = []
        while above in known and above not in ancestors:
            ancestors.append(above)
            above = known[above][0]
        if parent in ancestors and name in args and not args.startswith(("mpirun", "hydra")) and "hydra" not in args:
            found.append(pid)
    return found


def _rank(process: int) -> int:
    """Which rank a process is, by its launcher's word for it."""
    variables = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0")
    values = dict(variable.split("=", 1) for variable in variables if "=" in variable)
    return next(int(values[name]) for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK") if name in values)
