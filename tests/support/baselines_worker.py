"""Run by mpirun in the tests: the baselines of the benchmark on the CPU, against the reference.

usage: baselines_worker.py MODEL START END, with scripts/ on the PYTHONPATH
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from baselines.compiled import TensorParallelDecoder
from baselines.published import PublishedCqil
from mpi4py import MPI

from cqil_trt.checkpoint import Checkpoint
from cqil_trt.config import CqilConfig
from cqil_trt.reference import from_reader, score, with_cqil
from cqil_trt.shard import plan
from support.checkpoints import rank_weights

comm = MPI.COMM_WORLD
rank, ranks = comm.Get_rank(), comm.Get_size()
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": comm.bcast(str(20000 + os.getpid() % 20000))}
dist.init_process_group("gloo", rank=rank, world_size=ranks)
checkpoint = Checkpoint(Path(sys.argv[1]), None)
model, start, end = checkpoint.model, int(sys.argv[2]), int(sys.argv[3])
tokens = torch.randint(3, model.vocab_size, (17,), generator=torch.Generator().manual_seed(start)).tolist()

cqil = CqilConfig(p=ranks, start=start, end=end, placement="leader")
published = PublishedCqil(from_reader(model, checkpoint.reader), cqil)
if rank == 0:
    expected = score(with_cqil(from_reader(model, checkpoint.reader), cqil), tokens)
for count in (1, 9, 17):
    token, logits = published.next_token(tokens[:count])
    if rank == 0:
        torch.testing.assert_close(logits, expected[count - 1], rtol=1e-4, atol=1e-4)
        assert token == int(expected[count - 1].argmax())

mine = plan(model, CqilConfig(p=ranks, placement="tensor"))[rank]
weights = rank_weights(mine, checkpoint.reader)
decoder = TensorParallelDecoder(mine, weights, torch.tensor(checkpoint.rotary), 32)
expected = score(from_reader(model, checkpoint.reader), tokens)
with torch.inference_mode():
    for position, token in enumerate(tokens):
        logits = decoder(torch.tensor([token]), torch.tensor([position]))
        torch.testing.assert_close(logits, expected[position], rtol=1e-4, atol=1e-4)
dist.destroy_process_group()
comm.Barrier()  # rank 0 holds the store that the others take leave from
if rank == 0:
    print("the baselines compute what the reference does")
