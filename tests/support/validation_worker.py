"""Run by mpirun in the tests: compiles engines, validates and measures them, one after the other.

usage: validation_worker.py CASES.json, by support.validation, where CASES is explained

A case's verdict is written when it is there; an error ends the job, with the reason on standard error.
"""

import json
import sys
from pathlib import Path

from cqil_trt import probes
from cqil_trt.commands import build, run
from cqil_trt.job import Job, command
from cqil_trt.llm import Llm
from cqil_trt.validate import validate

job = Job()
with command(job):
    for case in json.loads(Path(sys.argv[1]).read_text()):
        if "source" in case:
            made = "--model", case["source"], "--backend", "tensorrt", "--output", case["engine"]
            build.build(build.parser().parse_args(made), job)
        llm = Llm(Path(case["engine"]), job, case["device"])
        limits, prompts = llm.engine.limits, case.get("prompts")
        verdict, found = validate(llm, prompts), {}
        prompts = prompts or probes.prompts(llm.engine.path, llm.engine.model.vocab_size, limits.max_seq_len)
        run.benchmark(llm, prompts[:1], [1], 16, lambda text: None, found)
        llm.generate(prompts, 16)
        llm.close()
        found |= {"passed": verdict.passed, "prompts": [result.to_dict() for result in verdict.results]}
        if job.rank == 0:
            Path(case["out"]).write_text(json.dumps(found))
