"""OLMo 2: norms only after each sub-layer, and norms of queries and keys over all heads."""

from cqil_trt.families.family import GGUF_POST_NORM_LAYER, POST_NORM_LAYER, Family, Gguf

FAMILY = Family(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    defaults={"rms_norm_eps": 1e-5},
    layer=POST_NORM_LAYER,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    qk_norm=True,
    joint_qk_norm=True,
    wide_norms=True,
    lora_targets=(),  # PEFT names none
    gguf=Gguf(architecture="olmo2", layer=GGUF_POST_NORM_LAYER),
)
