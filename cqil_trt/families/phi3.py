"""Phi-3, Phi-3.5 and Phi-4: LLaMA whose checkpoints hold q, k and v in one matrix, and gate and up in another."""

from cqil_trt.families.family import GGUF_LAYER, HUGGING_FACE_LAYER, Family, Gguf

_QKV, _GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"

FAMILY = Family(
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    layer={**HUGGING_FACE_LAYER, "q": _QKV, "k": _QKV, "v": _QKV, "gate": _GATE_UP, "up": _GATE_UP},
    sliding_window="always",
    partial_rotary=True,
    # Names from before it was called longrope.
    rope_aliases={"su": "longrope", "yarn": "longrope"},
    lora_targets=(),  # PEFT names none
    gguf=Gguf(
        architecture="phi3",
        layer={**GGUF_LAYER, "q": "attn_qkv", "k": "attn_qkv", "v": "attn_qkv", "gate": "ffn_up", "up": "ffn_up"},
        longrope=True,
    ),
    # Its default padding token is beyond a small vocabulary.
    reference={"pad_token_id": None},
)
