"""TensorRT-LLM's own LLM class on an exported directory: greedy tokens and the logits of the prompt, as JSON.

python tests/support/trtllm_pytorch_llm.py DIRECTORY PROMPT.json COUNT RANKS OUT.json
"""

import importlib
import json
import sys
from pathlib import Path

# In the workers too, which mpi4py gives this file.
sys.path.insert(0, sys.argv[1])
importlib.import_module("modeling_cqil")

if __name__ == "__main__":
    from tensorrt_llm import LLM, SamplingParams
    from tensorrt_llm.llmapi import KvCacheConfig

    directory, prompt, count, ranks = Path(sys.argv[1]), json.load(open(sys.argv[2])), *map(int, sys.argv[3:5])
    llm = LLM(
        model=str(directory / "checkpoint"),
        skip_tokenizer_init=True,
        tensor_parallel_size=ranks,
        max_batch_size=4,
        max_seq_len=96,
        kv_cache_config=KvCacheConfig(free_gpu_memory_fraction=0.1),
    )
    sampling = SamplingParams(max_tokens=count, end_id=-1, pad_id=0, top_k=1, return_context_logits=True)
    [found] = llm.generate([{"prompt_token_ids": prompt}], sampling)
    logits = found.context_logits.float().cpu().tolist()
    Path(sys.argv[5]).write_text(json.dumps({"tokens": list(found.outputs[0].token_ids), "logits": logits}))
