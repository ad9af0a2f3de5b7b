"""Runs Python scripts one after another in a process, or in the ranks of an MPI job, that has its imports already.

usage: [mpirun -n RANKS] python warm_interpreter.py DIRECTORY, started by support.interpreters

Rank 0 reads requests from standard input, a JSON line each: [script, arguments, working directory]. What rank N prints
goes to DIRECTORY/N.out and N.err. Rank 0 answers with a line: the exit codes of all ranks, OR-ed as mpirun does.

Without MPI a script runs in a fork of this process, so that it finds nothing of the one before. Ranks cannot fork: they
put back what a script changes in the libraries that it shares with the next.
"""

import atexit
import gc
import json
import os
import random
import runpy
import signal
import sys
import threading
import time
import traceback
import warnings
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import numpy
import torch

DIRECTORY, HOME, ENVIRONMENT, STREAMS = Path(sys.argv[1]), os.getcwd(), dict(os.environ), (sys.stdout, sys.stderr)
COMM = None
if any(name in os.environ for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")):
    from mpi4py import MPI

    COMM = MPI.COMM_WORLD.Dup()
RANK = COMM.Get_rank() if COMM else 0
TORCH = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state(), torch.is_grad_enabled()
# The imports that take seconds.
for module in ("cqil_trt.commands.build", "cqil_trt.commands.run", "cqil_trt.reference", "cqil_trt.checkpoint", "peft"):
    with suppress(ImportError):
        import_module(module)
FILTERS = list(warnings.filters)
gc.freeze()  # forks need not copy the objects that collections would mark


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


def redirect(number, path, flags=os.O_WRONLY | os.O_CREAT | os.O_TRUNC):
    """Makes file descriptor `number` one of the file."""
    file = os.open(path, flags)
    os.dup2(file, number)
    os.close(file)


def restore(path):
    """Puts back what the next script would find in a new process."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    sys.stdout, sys.stderr = STREAMS
    sys.path[:] = path
    os.chdir(HOME)
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.resetwarnings()  # which also forgets what was shown once
    warnings.filters[:] = FILTERS
    random.seed()
    numpy.random.seed()
    threads, dtype, state, grad = TORCH
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_rng_state(state)
    torch.set_grad_enabled(grad)
    gc.collect()


answers = os.fdopen(os.dup(1), "w")
if RANK == 0:
    print("ready", file=answers, flush=True)
while request := receive():
    script, arguments, directory = request
    fork = 0 if COMM else os.fork()
    if fork:
        _, status = os.waitpid(fork, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
        continue
    for number, name in ((1, "out"), (2, "err")):
        redirect(number, DIRECTORY / f"{RANK}.{name}")
    os.chdir(directory)
    sys.argv, path, sys.path[0] = [script, *arguments], list(sys.path), os.path.dirname(script)
    if not COMM:
        redirect(0, os.devnull, os.O_RDONLY)
        code = run(script, arguments)
        # What the interpreter does at its end, but for freeing every object, which takes a second.
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    code = run(script, arguments)
    restore(path)
    codes = COMM.gather(code)
    if RANK == 0:
        for other in codes:
            code |= other
        print(code, file=answers, flush=True)
