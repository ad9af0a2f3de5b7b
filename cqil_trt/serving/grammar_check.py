"""Checks clients' grammars in a process of its own: `python -m cqil_trt.serving.grammar_check ENGINE SOCKET`.

llguidance tries whatever it is given. Some thousand references, each to the next, overflow its stack, and a schema with
`multipleOf` of a large number takes hours, and memory without end. A thread can be neither stopped nor caught.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import queue
import resource
import socket
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path

from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.llm import end_tokens
from cqil_trt.serving import wire
from cqil_trt.serving.grammars import Grammars
from cqil_trt.tokenizer import Tokenizer

# A grammar that takes longer, or more memory, is refused.
CHECK_SECONDS = 10.0
_CHECK_BYTES = 2 << 30
# Far less than rank 0's thread has (`ranks.GRAMMAR_STACK`), so that what passes here passes there.
_CHECK_STACK = 4 << 20
# How long the process may take to start.
_START_SECONDS = 60.0
# Grammars that are known to be right: many requests have the same one.
_REMEMBERED = 256


class GrammarCheck:
    """The HTTP process's side. One grammar is checked at a time; a process that a grammar has ended is replaced."""

    def __init__(self, engine: Path):
        self._engine = engine
        self._turn = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._answered = False
        self._good: OrderedDict[bytes, None] = OrderedDict()
        self._starting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins what the first grammar would otherwise wait for."""
        self._starting = asyncio.create_task(self._start())

    async def _start(self) -> None:
        with contextlib.suppress(RuntimeError):  # the first grammar tries again
            async with self._turn:
                await self._ready()

    async def check(self, grammar: str) -> None:
        """Raises UserError for a grammar that is wrong or too complex."""
        digest = hashlib.sha256(grammar.encode()).digest()
        if digest in self._good:
            self._good.move_to_end(digest)
            return
        async with self._turn:
            await self._ready()
            try:
                error = await asyncio.wait_for(self._ask(wire.pack(grammar)), CHECK_SECONDS)
            except (TimeoutError, asyncio.TimeoutError):  # two classes until Python 3.11
                raise UserError(f"the grammar is too complex: it takes longer than {CHECK_SECONDS:g} s") from None
            except (OSError, EOFError):
                raise UserError("the grammar is too complex") from None
            finally:
                await self._end_unless_answered()
        if error:
            raise UserError(error)
        self._good[digest] = None
        if len(self._good) > _REMEMBERED:
            self._good.popitem(last=False)

    async def _ready(self) -> None:
        """Starts the process if there is none that runs. Raises RuntimeError if it does not start."""
        if self._process is not None and self._process.poll() is None:
            return
        self._answered = False
        await self._end_unless_answered()
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(self._engine), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        try:
            self._streams = await asyncio.open_unix_connection(sock=ours)
            await asyncio.wait_for(self._ask(b""), _START_SECONDS)
        except (TimeoutError, asyncio.TimeoutError, OSError, EOFError):
            raise RuntimeError("the process that checks grammars does not start") from None
        finally:
            await self._end_unless_answered()

    async def _ask(self, frame: bytes) -> str:
        """Sends a frame; returns the next line that the process says. Raises EOFError or OSError if it has ended."""
        self._answered = False
        assert self._streams is not None
        reader, writer = self._streams
        writer.write(frame)
        line = await reader.readuntil()
        self._answered = True
        return line.decode().rstrip("\n")

    async def _end_unless_answered(self) -> None:
        """A process that has not answered cannot be asked again."""
        if self._answered or self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
        await asyncio.to_thread(process.wait)


def _answer(grammars: Grammars, asked: queue.SimpleQueue[str], theirs: socket.socket) -> None:
    while True:
        error = ""
        try:
            grammars.check(asked.get())
        except UserError as refused:
            error = " ".join(str(refused).split())
        except BaseException as panic:  # llguidance's are not Exceptions
            error = f"the grammar cannot be compiled ({type(panic).__name__})"
        theirs.sendall(f"{error}\n".encode())


def main(arguments: list[str]) -> None:
    path, theirs = Path(arguments[0]), socket.socket(fileno=int(arguments[1]))
    engine, tokenizer = Engine.open(path), Tokenizer(path)
    grammars = Grammars(tokenizer, engine.model.vocab_size, end_tokens(engine, tokenizer))
    grammars.prepare()
    os.nice(10)  # ranks need the cores more
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + _CHECK_BYTES
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    threading.stack_size(_CHECK_STACK)
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_answer, args=(grammars, asked, theirs), daemon=True).start()
    theirs.sendall(b"\n")
    connection = wire.Connection(theirs, "the HTTP process")
    try:
        while True:
            asked.put(connection.receive())
    except wire.Closed:
        os._exit(0)  # though a grammar may still be compiled


if __name__ == "__main__":
    main(sys.argv[1:])
