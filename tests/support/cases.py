"""The models and shapes that whole engines and single ranks are judged on, and how they are compared."""

import numpy as np
import torch

# Changes to a small model, by name.
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 6}),
    "llama-gqa": ("LlamaForCausalLM", {}),
    "llama-tied-bias": (
        "LlamaForCausalLM",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-linear-rope": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama-llama3-rope": (
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    # Nine query and three key/value heads, as SmolLM2 has: no even split on two or four ranks.
    "llama-odd-heads": (
        "LlamaForCausalLM",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "intermediate_size": 91},
    ),
    # Fewer heads than ranks: some ranks hold none.
    "llama-few-heads": ("LlamaForCausalLM", {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 128}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 12}),
    "qwen2-yarn": (
        "Qwen2ForCausalLM",
        {
            "max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    # q, k and v in one matrix of the checkpoint, gate and up in another.
    "phi3": ("Phi3ForCausalLM", {}),
}
_FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
# What LLaMA does not have, which not every backend computes. Windows are shorter than the tests' sequences; groups have
# layers with and without them.
FAMILIES = {
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            "sliding_window": 9,
            "head_dim": 12,
            "query_pre_attn_scalar": 18,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 20.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "sliding_window": 9,
            "head_dim": 12,
            "query_pre_attn_scalar": 18,
            "sliding_window_pattern": 3,
            "tie_word_embeddings": True,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
        },
    ),
    "smollm3": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 1, 0, 1, 1, 0], "tie_word_embeddings": True}),
    "granite": (
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
            "attention_bias": True,
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24}),
    "olmo3": ("Olmo3ForCausalLM", {"sliding_window": 9}),
    "mistral-windows": ("MistralForCausalLM", {"sliding_window": 9}),
    "ministral": (
        "MinistralForCausalLM",
        {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "full_attention"] * 2},
    ),
    "qwen2-windows": ("Qwen2ForCausalLM", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3}),
    "qwen3-windows": (
        "Qwen3ForCausalLM",
        {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3, "head_dim": 12},
    ),
    "phi3-partial": (
        "Phi3ForCausalLM",
        {"partial_rotary_factor": 0.75, "hidden_size": 96, "head_dim": 16, "sliding_window": 9},
    ),
    "phi3-longrope": (
        "Phi3ForCausalLM",
        {
            "partial_rotary_factor": 0.75,
            "hidden_size": 96,
            "head_dim": 16,
            "original_max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **_FACTORS},
        },
    ),
}
# Those that GPUs compute at any length of the tests.
GPU_FAMILIES = {name: family for name, family in FAMILIES.items() if name != "phi3-longrope"}
# For engines with quantized weights or KV caches: two ranks cut the groups of down's columns at 352, so they are packed
# in smaller ones; three ranks have numbers of columns that are no multiples of 8, which are dequantized.
QUANTIZED_SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "head_dim": 32}
# Every number of ranks, bypass and range that engines are built with.
SHAPES = [
    {"p": 1},
    {"p": 2, "d": 0, "start": 1, "end": 5},
    {"p": 2, "d": 1, "start": 2, "end": 6},
    {"p": 2, "d": 1, "start": 0, "end": 4, "bypass": "residual"},
    {"p": 3, "d": 2, "start": 0, "end": 6},
    {"p": 4, "d": 0, "start": 1, "end": 5},
    {"p": 4, "d": 1, "start": 2, "end": 6, "bypass": "residual"},
    {"p": 4, "d": 3, "start": 1, "end": 5},
]
# One of each kind of schedule that a rank can have.
RANK_SHAPES = [
    {"p": 1},
    {"p": 2, "start": 1, "end": 5},
    {"p": 2, "d": 1, "start": 2, "end": 6, "bypass": "residual"},
    {"p": 4, "d": 1, "start": 1, "end": 5, "placement": "leader"},
    {"p": 4, "placement": "tensor", "drop_attention_join": (1, 4)},
    {"p": 2, "ranks_per_layer": 2, "d": 1, "start": 1, "end": 5},
]


def rank_shapes(model):
    """RANK_SHAPES, as far as the model has them: joins before a norm cannot be dropped."""
    for shape in RANK_SHAPES:
        yield {k: v for k, v in shape.items() if k != "drop_attention_join" or not model.post_norms}


def assert_close(name, found, expected):
    """Float32 results of one computation in two orders.

    Of FAMILIES' random models, alone on their ranks, some amplify a rounding of weights (6e-8) beyond 1e-5.
    """
    if name in ARCHITECTURES:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    else:
        assert relative(found.detach().numpy(), expected.double().numpy()) < 1e-3


def identifier(case):
    name, shape = case

    def part(key, value):
        return value if key in ("bypass", "placement", "dtype") else f"{key}{value}"

    return name + "-" + "-".join(part(*item) for item in shape.items())


def ranks_of(shape):
    return shape["p"] * shape.get("ranks_per_layer", 1)


def relative(found, expected):
    return np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64))
