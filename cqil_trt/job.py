"""The MPI job that a command runs in: its ranks, their agreement on errors, and its end."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from cqil_trt.errors import JobError, UserError
from cqil_trt.packages import missing

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")

# mpirun may lose what a rank says just before it ends the job, and may itself wait for a core.
HEARD_SECONDS = 1.0

# Environment variables in which the launchers of MPICH, Open MPI and PMIx pass the number of ranks, or just a rank.
_SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
_LAUNCH_VARIABLES = (*_SIZE_VARIABLES, "PMI_RANK", "PMIX_RANK")


class Job:
    """All ranks started by one mpirun, or a single process started without it."""

    def __init__(self) -> None:
        self.comm: MPI.Intracomm | None = None
        self.rank, self.size = 0, 1
        if _launched():
            try:
                # It waits for all ranks, and Python's handlers would wait for it.
                with _signals_end():
                    from mpi4py import MPI
            except (ImportError, RuntimeError) as error:
                raise UserError(
                    f"started by mpirun, but mpi4py cannot load an MPI library ({error}): is .venv activated?"
                ) from None
            self.comm = MPI.COMM_WORLD
            self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()
            started = next((int(os.environ[name]) for name in _SIZE_VARIABLES if name in os.environ), self.size)
            if started != self.size:
                raise UserError(
                    f"mpirun started {started} ranks but mpi4py's MPI library sees {self.size}: they belong to "
                    "different MPIs (use the mpirun of the environment that mpi4py is in)"
                )

    def share(self, make: Callable[[], T]) -> T:
        """Runs `make` on rank 0 and returns its result on every rank; its UserError is raised on every rank."""
        return self.broadcast(self._agree(make if self.rank == 0 else lambda: None))

    def agree(self, make: Callable[[], T]) -> T:
        """Runs `make` on every rank; if any raises UserError, every rank raises the first one."""
        return self._agree(make)

    def _agree(self, make: Callable[[], Any]) -> Any:
        result: Any = None
        failure: str | None = None
        try:
            result = make()
        except UserError as error:
            failure = str(error)
        except OSError as error:
            if error.filename is None:
                raise
            failure = f"{error.filename}: {error.strerror}"
        except ModuleNotFoundError as error:
            failure = missing(error)
            if failure is None:
                raise
        self.wait()
        if self.comm is not None:
            failures = self.comm.allgather(failure)
            failure = next((text for text in failures if text is not None), None)
        if failure is not None:
            raise UserError(failure)
        return result

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank; the other ranks' values are ignored."""
        return value if self.comm is None else self.comm.bcast(value, root=0)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        return [value] if self.comm is None else self.comm.allgather(value)

    def wait(self) -> None:
        """A barrier that sleeps, so that waiting ranks do not take cores from working ones."""
        if self.comm is not None:
            request = self.comm.Ibarrier()
            while not request.Test():
                time.sleep(0.005)

    def group(self, size: int) -> tuple[Any, int, int]:
        """Splits the job into replicas of `size` consecutive ranks.

        Returns this replica's mpi4py communicator (None for one rank), this rank in it, and the replica's number.

        Raises UserError when the ranks are not a multiple of `size`.
        """
        if self.size % size:
            raise UserError(
                f"the engine needs {size} MPI ranks (or a multiple, for replicas), found {self.size}: "
                f"start with mpirun -n {size}"
            )
        if self.comm is None or size == 1:
            return None, 0, self.rank
        return self.comm.Split(self.rank // size, self.rank), self.rank % size, self.rank // size


def _launched() -> bool:
    """Whether a launcher of ranks started this process."""
    return any(name in os.environ for name in _LAUNCH_VARIABLES)


@contextmanager
def _signals_end() -> Iterator[None]:
    """SIGINT and SIGTERM end the process at once. Outside the main thread they are left as they are."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(signal.getsignal(number)):
                before[number] = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt(number)


@contextmanager
def command(job: Job | None = None) -> Iterator[None]:
    """Reports a command's errors: a UserError is one line and exit code 2; any other exception ends all ranks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Under mpirun stdout is a pipe; without line buffering, output would appear only at the end, after errors.
        sys.stdout.reconfigure(line_buffering=True)
    if job is None:
        # SIGTERM is handled like Ctrl-C, so that partial output is removed.
        signal.signal(signal.SIGTERM, _interrupt)
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as a script has it while it imports
            signal.signal(signal.SIGINT, signal.default_int_handler)
    else:
        # Python's handlers would wait for the current collective, which may never return if another rank has ended.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    except UserError as error:
        if job is None or job.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        number = signal.Signals(interrupt.args[0]) if interrupt.args else signal.SIGINT
        if number != signal.SIGINT:  # whoever presses Ctrl-C knows
            print(f"error: ended by {number.name}", file=sys.stderr)
        if _launched():
            # mpirun ends the other ranks when one ends by a signal, but not when one exits before MPI has started.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        sys.exit(128 + number)
    except BrokenPipeError:
        # The reader of our output is gone (`| head`); flushing at exit would fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (lacking := missing(error)):
            if job is None or job.rank == 0:
                print(f"error: {lacking}", file=sys.stderr)
            sys.exit(2)
        if isinstance(error, OSError) and error.filename and (job is None or job.comm is None):
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
            sys.exit(2)
        if isinstance(error, JobError):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        if job is not None and job.comm is not None:
            sys.stderr.flush()
            time.sleep(HEARD_SECONDS)
            job.comm.Abort(1)
        sys.exit(1)
