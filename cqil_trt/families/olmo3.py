"""OLMo 3: OLMo 2 with a window in three of four layers, whose rotary embedding is not scaled."""

from cqil_trt.families.family import GGUF_POST_NORM_LAYER, POST_NORM_LAYER, Family, Gguf

FAMILY = Family(
    architecture="Olmo3ForCausalLM",
    model_type="olmo3",
    defaults={
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        # Not a field of config.json: transformers gives these layers its default.
        "rope_local_base_freq": 5e5,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    layer=POST_NORM_LAYER,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    qk_norm=True,
    joint_qk_norm=True,
    wide_norms=True,
    sliding_window="always",
    window_layers="pattern",
    local_theta="rope_local_base_freq",
    lora_targets=(),  # PEFT names none
    gguf=Gguf(
        architecture="olmo2",
        layer=GGUF_POST_NORM_LAYER,
        requires="attention.sliding_window",
        window_pattern=4,
    ),
)
