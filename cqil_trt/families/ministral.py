"""Ministral: Mistral whose layers may attend to everything or to a window each."""

from cqil_trt.families.family import Family

FAMILY = Family(
    architecture="MinistralForCausalLM",
    model_type="ministral",
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    sliding_window="always",
    window_layers="all",
    lora_targets=(),  # PEFT names none
)
