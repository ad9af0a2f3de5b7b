"""Run by mpirun in the tests: executes exported models on stand-ins for TensorRT-LLM's modules.

usage: trtllm_pytorch_worker.py CASES.json; CASES is a list of {engine, version, kernels, prompts, steps, out}

A case runs on the first ranks, as many as its checkpoint is for. Saved are the logits after every token of the prompts,
which are one batch, and after each decoded token; from every rank the bits of the last norm's outputs.
With `kernels`, cqil-trt's collectives load, and are those over MPI: its kernels need GPUs.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from mpi4py import MPI

from cqil_trt.collectives.host import HostCommunicator
from cqil_trt.errors import UserError
from cqil_trt.gpu import kernel_library, workspace
from support.trtllm_pytorch import Executor, install, rms_norm


class Communicator(HostCommunicator):
    def __init__(self, comm, timeout):
        super().__init__(comm)

    def all_reduce_residual_norm(self, delta, residual, weight, eps):
        total = self.all_reduce_residual(delta, residual)
        return total, rms_norm(total, weight, eps)


def not_built():
    raise UserError("not built")


def run(case, comm, p):
    engine, prompts = Path(case["engine"]), dict(enumerate(case["prompts"]))
    stand_ins = install(case["version"], comm)
    kernel_library.load = (lambda: None) if case["kernels"] else not_built
    sys.path.insert(0, str(engine))
    import modeling_cqil

    sys.path.remove(str(engine))
    assert Path(modeling_cqil.__file__).parent.parent == engine
    executor = Executor(engine / "checkpoint", stand_ins, comm.rank, p)
    hidden = []
    executor.model.model.register_forward_hook(lambda module, inputs, output: hidden.append(output.numpy().tobytes()))
    logits = executor.run(prompts, every=True).split([len(prompt) for prompt in prompts.values()])
    steps, tokens = [], [[int(rows[-1].argmax()) for rows in logits]]
    for _ in range(case["steps"]):
        rows = executor.run({i: [token] for i, token in zip(prompts, tokens[-1])})
        steps.append(rows.numpy())
        tokens.append(rows.argmax(-1).tolist())
    np.savez(
        f"{case['out']}-{comm.rank}.npz",
        steps=np.stack(steps),
        tokens=np.array(tokens),
        hidden=np.frombuffer(b"".join(hidden), np.uint8),
        calls=np.array(json.dumps(stand_ins.contract.called)),
        heads=np.array(executor.cache.heads),
        warnings=np.array(stand_ins.logger.warnings or [""]),
        **{f"prompt{i}": rows.numpy() for i, rows in enumerate(logits)},
    )


torch.set_num_threads(1)
workspace.CudaCommunicator = Communicator
world = MPI.COMM_WORLD
cases = json.loads(Path(sys.argv[1]).read_text())
ranks = [json.loads((Path(case["engine"]) / "checkpoint" / "config.json").read_text())["cqil"]["p"] for case in cases]
groups = {p: world.Split(0 if world.rank < p else MPI.UNDEFINED) for p in sorted(set(ranks))}
for case, p in zip(cases, ranks):
    if world.rank < p:
        try:
            run(case, groups[p], p)
        except BaseException:
            traceback.print_exc()
            world.Abort(1)  # the others would wait for this rank
done = world.Ibarrier()
while not done.Test():  # a rank that waits in MPI keeps a core from those that compute
    time.sleep(0.05)
