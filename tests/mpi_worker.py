"""Run by mpirun in the tests: runs engines on prompts and saves what they computed, from every rank.

usage: mpi_worker.py CASES.json; CASES is a list of {engine, prompts, steps, out}
"""

import json
import sys
from pathlib import Path

import numpy as np

from cqil_trt.job import Job, command
from cqil_trt.llm import Llm

job = Job()
with command(job):
    for case in json.loads(Path(sys.argv[1]).read_text()):
        llm = Llm(Path(case["engine"]), job)
        prompts, steps = case["prompts"], case["steps"]
        result = {f"score{i}": llm.session.score(prompt) for i, prompt in enumerate(prompts)}
        # The batch, with the logits that every token was chosen from.
        llm.session.prefill(prompts)
        logits, tokens = [llm.session.logits()], [llm.session.greedy()]
        for _ in range(steps):
            llm.session.decode(tokens[-1])
            logits.append(llm.session.logits())
            tokens.append(llm.session.greedy())
        result |= {"logits": np.stack(logits, 1), "tokens": np.stack(tokens, 1)}
        for i, prompt in enumerate(prompts):
            alone = llm.generate([prompt], steps + 1, ignore_eos=True)[0].tokens
            result[f"alone{i}"] = np.array(alone)
        sampled = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 5, "ignore_eos": True}
        batch = llm.generate(prompts, steps, **sampled)
        for i, prompt in enumerate(prompts):
            result[f"sampled{i}"] = np.array(batch[i].tokens)
            result[f"sampled_alone{i}"] = np.array(llm.generate([prompt], steps, **sampled)[0].tokens)
        np.savez(f"{case['out']}-{job.rank}.npz", **result)
