"""Runs Python scripts one after another in a process, or in the ranks of an MPI job, that has its imports already.

usage: [mpirun -n RANKS] python warm_interpreter.py DIRECTORY, started by support.interpreters

Rank 0 reads requests from standard input, a JSON line each: [script, arguments, working directory]. What rank N prints
goes to DIRECTORY/N.out and N.err. Rank 0 answers with a line: the exit codes of all ranks, OR-ed as mpirun does.
"""

import gc
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

DIRECTORY, HOME, ENVIRONMENT, STREAMS = Path(sys.argv[1]), os.getcwd(), dict(os.environ), (sys.stdout, sys.stderr)
COMM = None
if any(name in os.environ for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")):
    from mpi4py import MPI

    COMM = MPI.COMM_WORLD.Dup()
RANK = COMM.Get_rank() if COMM else 0


def receive():
    """The next request, on every rank; None at the end. Ranks sleep while they wait."""
    line = sys.stdin.readline() if RANK == 0 else None
    if COMM:
        barrier = COMM.Ibarrier()
        while not barrier.Test():
            time.sleep(0.002)
        line = COMM.bcast(line)
    return json.loads(line) if line else None


def run(script, arguments):
    """The script's exit code, as the interpreter would have ended with it."""
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def capture(number, path):
    """Sends file descriptor `number` to a new file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, number)
    os.close(file)


answers = os.fdopen(os.dup(1), "w")
if RANK == 0:
    print("ready", file=answers, flush=True)
while request := receive():
    script, arguments, directory = request
    for number, name in ((1, "out"), (2, "err")):
        capture(number, DIRECTORY / f"{RANK}.{name}")
    os.chdir(directory)
    sys.argv, path, sys.path[0] = [script, *arguments], list(sys.path), os.path.dirname(script)
    code = run(script, arguments)
    # As the next script would find a new process.
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    sys.stdout, sys.stderr = STREAMS
    sys.path[:] = path
    os.chdir(HOME)
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.collect()
    codes = COMM.gather(code) if COMM else [code]
    if RANK == 0:
        for other in codes:
            code |= other
        print(code, file=answers, flush=True)
