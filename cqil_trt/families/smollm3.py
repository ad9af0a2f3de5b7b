"""SmolLM3: LLaMA with layers that have no rotary embedding."""

from cqil_trt.families.family import Family, Gguf

FAMILY = Family(
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_theta": 2e6,
        "sliding_window": None,
    },
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    lora_targets=(),  # PEFT names none
    sliding_window="switched",
    window_layers="unrotated",
    no_rope_layers=True,
    # Its default padding token is beyond a small vocabulary.
    reference={"pad_token_id": None},
    gguf=Gguf(architecture="smollm3", interleaved=True, frequency_factors=True, no_rope_interval=4),
)
