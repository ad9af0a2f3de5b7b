"""Mistral: LLaMA with sliding windows. llama.cpp stores it as llama."""

from cqil_trt.families.family import Family

FAMILY = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    sliding_window="always",
    becomes={"layer_types": "ministral"},
)
