"""A Hugging Face config.json → `ModelConfig`, by rules shared by all families and the family's own data."""

from __future__ import annotations

from pathlib import Path

from cqil_trt.config import DTYPES
from cqil_trt.errors import UserError
from cqil_trt.families.family import Family
from cqil_trt.json_fields import Fields, read_json
from cqil_trt.model import ModelConfig
from cqil_trt.rope import RopeConfig

# Next to config.json, and their `quant_method`: where tools other than transformers say how weights are quantized.
QUANTIZATION_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq"}


def read_model(config: Fields, family: Family) -> ModelConfig:
    """The model that the fields of a config.json describe. Raises UserError for what is not supported."""
    config = config.with_defaults(**family.defaults)
    activation = config.text("hidden_act", "silu")
    if activation not in family.activations:
        raise UserError(f"{config.source}: activation '{activation}' is not supported (silu is)")
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    # A field that is present but null means "as many as query heads"; one left out means the class default.
    null = config.values.get("num_key_value_heads", 0) is None
    dtype = config.text("dtype", config.text("torch_dtype", "float32"))
    head_dim = config.integer("head_dim", max(hidden // heads, 1))
    max_position = config.integer("max_position_embeddings", 2048)
    try:
        return ModelConfig(
            architecture=family.architecture,
            num_layers=config.integer("num_hidden_layers", high=1000),
            hidden_size=hidden,
            intermediate_size=config.integer("intermediate_size"),
            num_heads=heads,
            num_kv_heads=heads if null else config.integer("num_key_value_heads", heads),
            head_dim=head_dim,
            vocab_size=config.integer("vocab_size"),
            max_position=max_position,
            rms_norm_eps=config.number("rms_norm_eps", 1e-6),
            rope=RopeConfig.from_hugging_face(config, max_position, head_dim),
            tie_embeddings=config.boolean("tie_word_embeddings"),
            qkv_bias=_switch(config, family.qkv_bias),
            o_bias=_switch(config, family.o_bias),
            mlp_bias=_switch(config, family.mlp_bias),
            qk_norm=family.qk_norm,
            sliding_window=_sliding_window(config, family),
            dtype=dtype if dtype in DTYPES else "float32",
            eos_token_ids=_ends(config),
        )
    except UserError as error:
        message = str(error)
        raise UserError(message if config.source in message else f"{config.source}: {message}") from None


def _switch(config: Fields, value: bool | str) -> bool:
    return config.boolean(value) if isinstance(value, str) else value


def _ends(config: Fields) -> tuple[int, ...]:
    """The tokens that end a text; those of generation_config.json take precedence."""
    found = config.integers("eos_token_id")
    generation = Path(config.source).parent / "generation_config.json"
    if generation.exists():
        found = Fields(read_json(generation), str(generation)).integers("eos_token_id") or found
    return found


def _sliding_window(config: Fields, family: Family) -> int | None:
    """The smallest attention window any layer uses, or None when every layer attends to everything."""
    if family.sliding_window == "never" or config.values.get("sliding_window", 0) is None:
        return None
    if family.sliding_window == "switched" and not config.boolean("use_sliding_window"):
        return None
    kinds = config.get("layer_types", ["sliding_attention"])
    if not isinstance(kinds, list):
        raise config.fail("layer_types", "a list")
    return config.integer("sliding_window") if "sliding_attention" in kinds else None
