"""LLaMA 1 to 3, and everything that calls itself LlamaForCausalLM: Yi, SmolLM2, TinyLlama, …"""

from cqil_trt.families.family import Family, Gguf

FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    gguf=Gguf(architecture="llama", interleaved=True, frequency_factors=True),
)
