"""A CQIL model for TensorRT-LLM's PyTorch backend. Importing this registers it (architecture CqilForCausalLM).

The directory that cqil-trt writes takes this package along. It needs tensorrt_llm, and cqil_trt only for cqil-trt's own
all-reduce, which it does without where that is not installed.
"""

from .modeling import CqilForCausalLM

__all__ = ["CqilForCausalLM"]
