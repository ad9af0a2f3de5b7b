"""Qwen3: LLaMA with an RMSNorm on every query and key head."""

from cqil_trt.families.family import Family, Gguf

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "head_dim": 128,
    },
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    qk_norm=True,
    sliding_window="switched",
    window_layers="last",
    gguf=Gguf(architecture="qwen3"),
)
