"""Gemma 2: norms before and after each sub-layer, soft caps of scores and logits, a window in every other layer."""

from cqil_trt.families.family import GATED_GELU, GGUF_LAYER, GGUF_POST_NORMS, SANDWICH_LAYER, Family, Gguf, Number

FAMILY = Family(
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    defaults={
        "head_dim": 256,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    layer=SANDWICH_LAYER,
    activation="hidden_activation",
    activations=GATED_GELU,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    offset_norms=True,
    wide_norms=True,
    sliding_window="always",
    window_layers="pattern",
    embedding_scale=True,
    numbers={
        "query_scale": Number("query_pre_attn_scalar", -0.5, whole=True),
        "attention_cap": Number("attn_logit_softcapping"),
        "logits_cap": Number("final_logit_softcapping"),
    },
    refused=("use_bidirectional_attention",),
    gguf=Gguf(
        architecture="gemma2",
        layer={**GGUF_LAYER, **GGUF_POST_NORMS},
        numbers={
            "attention_cap": Number("attn_logit_softcapping"),
            "logits_cap": Number("final_logit_softcapping"),
        },
        defaults={
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "attention.sliding_window": 4096,
        },
        window_pattern=2,
        hidden_query_scale=(46,),
    ),
)
