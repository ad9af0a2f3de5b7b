"""Run by mpirun in the tests: runs engines on prompts and saves what they computed, from every rank.

usage: mpi_worker.py CASES.json; CASES is a list of {engine, device, prompts, steps, out}
"""

import json
import sys
from pathlib import Path

import numpy as np
from batches import Batch, score
from draws import SAMPLED

from cqil_trt.job import Job, command
from cqil_trt.llm import Llm
from cqil_trt.runner import Runner

job = Job()
with command(job):
    for case in json.loads(Path(sys.argv[1]).read_text()):
        llm = Llm(Path(case["engine"]), job, case["device"])
        prompts, steps = case["prompts"], case["steps"]
        result, joined = {}, []
        for i, prompt in enumerate(prompts):
            result[f"score{i}"] = score(llm.session, prompt)
            joined.append(np.frombuffer(llm.session.joined(), np.uint8))
        # The batch, with the logits that every token was chosen from.
        batch = Batch(llm.session, prompts)
        logits, tokens = [batch.logits], [batch.tokens]
        for _ in range(steps):
            batch.decode(tokens[-1])
            joined.append(np.frombuffer(llm.session.joined(), np.uint8))
            logits.append(batch.logits)
            tokens.append(batch.tokens)
        # The residual stream itself, which each rank adds up on its own.
        result["joined"] = np.concatenate(joined)
        result |= {"logits": np.stack(logits, 1), "tokens": np.stack(tokens, 1)}
        # The batch used the slots without the scheduler's knowledge.
        llm.runner = Runner.of(llm.session, "throughput")
        for i, prompt in enumerate(prompts):
            alone = llm.generate([prompt], steps + 1, ignore_eos=True)[0].tokens
            result[f"alone{i}"] = np.array(alone)
        sampled = {**SAMPLED, "ignore_eos": True}
        drawn = llm.generate(prompts, steps, **sampled)
        for i, prompt in enumerate(prompts):
            result[f"sampled{i}"] = np.array(drawn[i].tokens)
            result[f"sampled_alone{i}"] = np.array(llm.generate([prompt], steps, **sampled)[0].tokens)
        np.savez(f"{case['out']}-{job.rank}.npz", **result)
