"""trtllm-serve with the model of this directory: python serve.py checkpoint --tp_size P [options of trtllm-serve].

The workers that TensorRT-LLM starts run this file too (mpi4py imports the main program into them), so the model is
registered in every process.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("tensorrt_llm") is None:
    print("error: TensorRT-LLM 1.2 or later is needed here, and tensorrt_llm is not installed", file=sys.stderr)
    sys.exit(2)
sys.path.insert(0, str(Path(__file__).resolve().parent))
importlib.import_module("modeling_cqil")

if __name__ == "__main__":
    from tensorrt_llm.commands.serve import main

    main()
