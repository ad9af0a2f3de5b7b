"""Families that are often asked for and are not supported, and why."""

# By model_type.
REASONS = {
    "gemma3n": "its layers share KV caches and take an embedding each",
    "llama4": "its MLPs are mixtures of experts, and its attention is in chunks",
    "llama4_text": "its MLPs are mixtures of experts, and its attention is in chunks",
    "mistral3": "it reads images, and its text model scales queries by their positions",
    "ministral3": "it scales queries by their positions",
    "qwen3_moe": "its MLPs are mixtures of experts",
    "qwen3_vl": "it reads images: positions have three parts, and its first layers add features of the image",
    "qwen3_vl_moe": "it reads images, and its MLPs are mixtures of experts",
    "qwen3_vl_text": "positions have three parts, and its first layers add features of an image",
}
# By class in transformers, of configurations without a model_type.
TYPES = {
    "Llama4ForCausalLM": "llama4_text",
    "Llama4ForConditionalGeneration": "llama4",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
}
