"""Qwen1.5, Qwen2 and Qwen2.5: LLaMA with biases on q, k and v."""

from cqil_trt.families.family import Family, Gguf

FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    qkv_bias=True,
    sliding_window="switched",
    window_layers="last",
    gguf=Gguf(architecture="qwen2"),
)
