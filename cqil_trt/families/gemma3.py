"""Gemma 3, its text models: Gemma 2 with head norms in place of soft caps, and a rotary base of layers with windows.

transformers reads a cap of attention scores and does not apply it.
"""

from cqil_trt.families.family import GATED_GELU, GGUF_LAYER, GGUF_POST_NORMS, SANDWICH_LAYER, Family, Gguf, Number

FAMILY = Family(
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    inside="gemma3",
    defaults={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "head_dim": 256,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
    },
    layer=SANDWICH_LAYER,
    activation="hidden_activation",
    activations=GATED_GELU,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    qk_norm=True,
    offset_norms=True,
    wide_norms=True,
    sliding_window="always",
    window_layers="pattern",
    local_theta="rope_local_base_freq",
    embedding_scale=True,
    numbers={
        "query_scale": Number("query_pre_attn_scalar", -0.5, whole=True),
        "logits_cap": Number("final_logit_softcapping"),
    },
    refused=("use_bidirectional_attention",),
    gguf=Gguf(
        architecture="gemma3",
        layer={**GGUF_LAYER, **GGUF_POST_NORMS},
        numbers={"logits_cap": Number("final_logit_softcapping")},
        window_pattern=6,
        local_theta=1e4,
        hidden_query_scale=(62,),
    ),
)
