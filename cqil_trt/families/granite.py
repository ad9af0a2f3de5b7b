"""Granite: LLaMA with multipliers of embeddings, attention scores, sub-layers and logits."""

from cqil_trt.families.family import Family, Gguf, Number

FAMILY = Family(
    architecture="GraniteForCausalLM",
    model_type="granite",
    defaults={"attention_multiplier": 1.0},
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    lora_targets=(),  # PEFT names none
    numbers={
        "embedding_scale": Number("embedding_multiplier"),
        "residual_scale": Number("residual_multiplier"),
        "query_scale": Number("attention_multiplier"),
        "logits_scale": Number("logits_scaling", -1.0),
    },
    gguf=Gguf(
        architecture="granite",
        interleaved=True,
        frequency_factors=True,
        numbers={
            "embedding_scale": Number("embedding_scale"),
            "residual_scale": Number("residual_scale"),
            "query_scale": Number("attention.scale"),
            "logits_scale": Number("logit_scale", -1.0),
        },
    ),
)
