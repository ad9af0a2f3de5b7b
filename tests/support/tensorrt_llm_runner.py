"""TensorRT-LLM's own runner on an engine directory, with nothing of cqil_trt: greedy tokens after a prompt, as JSON.

mpirun -n 2 python tests/support/tensorrt_llm_runner.py ENGINE/trtllm PROMPT.json COUNT
"""

import json
import sys

import tensorrt_llm
import torch
from tensorrt_llm.runtime import ModelRunnerCpp

directory, prompt, count = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3])
rank = tensorrt_llm.mpi_rank()
torch.cuda.set_device(rank % torch.cuda.device_count())
runner = ModelRunnerCpp.from_dir(directory, rank=rank)
ids = [torch.tensor(prompt, dtype=torch.int32)]
found = runner.generate(ids, max_new_tokens=count, end_id=-1, pad_id=0, return_dict=True, top_k=1)
if rank == 0:
    print(json.dumps(found["output_ids"][0][0][len(prompt) : len(prompt) + count].tolist()))
