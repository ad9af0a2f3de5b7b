"""A rank that is killed while another waits for it: the other ends with an error that names it.

usage: cuda_failure.py RANK DIRECTORY; started twice, without mpirun, which would end the survivor before it can speak.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from cqil_trt.gpu.workspace import CollectiveError, CudaCommunicator


class FileComm:
    """The part of an MPI communicator that a workspace uses, over files."""

    def __init__(self, rank, size, directory):
        self.rank, self.size, self.directory, self.count = rank, size, Path(directory), 0

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return self.size

    def allgather(self, value):
        self.count += 1
        mine = self.directory / f"{self.count}-{self.rank}"
        mine.with_suffix(".part").write_text(repr(value))
        mine.with_suffix(".part").rename(mine)
        paths = [self.directory / f"{self.count}-{rank}" for rank in range(self.size)]
        while not all(path.exists() for path in paths):
            time.sleep(0.01)
        return [eval(path.read_text()) for path in paths]

    def Barrier(self):
        self.allgather(None)


rank = int(sys.argv[1])
torch.cuda.set_device(rank % torch.cuda.device_count())
communicator = CudaCommunicator(FileComm(rank, 2, sys.argv[2]), timeout=3)
x = torch.ones(4096, device="cuda", dtype=torch.float16)
for _ in range(100):
    communicator.all_reduce(x)
torch.cuda.synchronize()
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
began = time.monotonic()
try:
    with communicator.workspace.guard():
        communicator.all_reduce(x)
        torch.cuda.synchronize()
except CollectiveError as error:
    print(error)
    print(f"after {time.monotonic() - began:.1f} s")
    os._exit(3)  # the CUDA context is lost, and with it an orderly exit
sys.exit("the all-reduce returned although its peer is gone")
