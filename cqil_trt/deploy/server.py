"""One server as a child process, `mpirun -n P serve.py`, that answers those who know its key."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shlex
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp

from cqil_trt.errors import UserError
from cqil_trt.files import HeldDirectory
from cqil_trt.serving.wire import GATEWAY_HEADER

# How often a server that loads is asked whether it is ready, and how long it may take to answer.
_ASK_SECONDS, _ANSWER_SECONDS = 0.1, 5.0
# How long after its drain a server may take to end before it is killed.
_GRACE_SECONDS = 10.0
# Lines of output that explain why a server ended.
_REMEMBERED_LINES = 20


def launcher(mpirun: str) -> list[str]:
    """The words of `mpirun`, its program preferably the one of this environment. Raises UserError if there is none."""
    words = shlex.split(mpirun)
    if not words:
        raise UserError("mpirun: is empty")
    own = Path(sys.executable).parent / words[0]
    found = str(own) if os.access(own, os.X_OK) else shutil.which(words[0])
    if found is None:
        raise UserError(f"mpirun: {words[0]} is neither next to {sys.executable} nor on the PATH")
    return [found, *words[1:]]


class EngineServer:
    """A server, from its start to its end. It ends with this process, however that ends.

    `url`: where it listens, once it has started; `key`: what it wants in the header GATEWAY_HEADER. `failure`: why it
    has ended, or None.
    """

    def __init__(
        self, ranks: int, flags: Sequence[str], environment: Mapping[str, str], mpirun: str, host: str = "127.0.0.1"
    ):
        """Args: `flags` of serve.py, but those that say where it listens; `environment`: changes of this process' own;
        `host`: the address to listen on.

        Raises UserError if mpirun is not found.
        """
        self._launcher = launcher(mpirun)
        self._ranks, self._flags, self._host = ranks, list(flags), host
        self.url, self.key = "", secrets.token_hex(32)
        self._environment = {**environment, "CQIL_GATEWAY_KEY": self.key}
        self._directory = HeldDirectory("cqil-replica-")
        self._pid_file, self._address_file = self._directory.path / "pid", self._directory.path / "address"
        self._lines: deque[str] = deque(maxlen=_REMEMBERED_LINES)
        self._ending = False
        self.failure: str | None = None

    async def start(self, seconds: float) -> None:
        """Returns when the server takes requests. Raises RuntimeError if it ends or needs more than `seconds`."""
        program = "from cqil_trt.commands.serve import main; main()"
        command = [*self._launcher, "-n", str(self._ranks), sys.executable, "-c", program, *self._flags]
        command += ["--host", self._host, "--port", "0", "--address-file", str(self._address_file)]
        command += ["--pid-file", str(self._pid_file), "--parent", str(os.getpid())]
        self._process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **self._environment},
        )
        self._watching = asyncio.create_task(self._watch())
        timeout = aiohttp.ClientTimeout(total=_ANSWER_SECONDS)
        self._session = aiohttp.ClientSession(headers={GATEWAY_HEADER: self.key}, timeout=timeout)
        end = time.monotonic() + seconds
        while await self.status() != "ready":
            if self.failure is None and time.monotonic() > end:
                self.failure = f"the server was not ready within {seconds:g} s"
            if self.failure is not None:
                reason = self.failure
                await self.stop(0.0)
                raise RuntimeError(reason)
            await asyncio.sleep(_ASK_SECONDS)

    async def status(self) -> str:
        """What /ready says: ready, loading, draining or failed; "ended" if nothing answers."""
        if not self.url and self._address_file.exists():
            self.url = f"http://{self._address_file.read_text().strip()}"
        try:
            async with self._session.get(f"{self.url}/ready") as answer:
                return str((await answer.json())["status"])
        except (aiohttp.ClientError, asyncio.TimeoutError):
            return "ended"

    async def _watch(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            text = line.decode(errors="replace").rstrip("\n")
            self._lines.append(text)
            print(text, flush=True)
        code = await self._process.wait()
        if not self._ending:
            said = next((line for line in reversed(self._lines) if line.startswith("error: ")), "")
            self.failure = f"the server ended with exit code {code}" + (
                f" ({said.removeprefix('error: ')})" if said else ""
            )

    async def stop(self, drain_seconds: float) -> None:
        """Lets running requests finish within `drain_seconds`, ends the server, and removes what it left."""
        self._ending = True
        if drain_seconds > 0:
            with contextlib.suppress(OSError, ValueError):  # it has ended
                os.kill(int(self._pid_file.read_text()), signal.SIGTERM)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), drain_seconds + _GRACE_SECONDS)
        # Also when it has ended: a rank may outlive mpirun.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        self._watching.cancel()
        await self._session.close()
        self._directory.remove()
