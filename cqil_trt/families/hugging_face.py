"""A Hugging Face config.json → `ModelConfig`, by rules shared by all families and the family's own data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from cqil_trt.config import DTYPES
from cqil_trt.errors import UserError
from cqil_trt.families.family import Family
from cqil_trt.json_fields import Fields, read_json
from cqil_trt.model import ModelConfig
from cqil_trt.rope import RopeConfig, given_parameters

# Next to config.json, and their `quant_method`: where tools other than transformers say how weights are quantized.
QUANTIZATION_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq"}


# The names of `layer_types`.
_FULL, _WINDOWED = "full_attention", "sliding_attention"


def read_model(config: Fields, family: Family) -> ModelConfig:
    """The model that the fields of a config.json describe. Raises UserError for what is not supported."""
    config = config.with_defaults(**family.defaults)
    activation = config.text(family.activation, next(iter(family.activations)))
    if activation not in family.activations:
        known = " or ".join(family.activations)
        raise UserError(f"{config.source}: activation '{activation:.40}' is not supported ({known} is)")
    for switch in family.refused:
        if config.boolean(switch):
            raise UserError(f"{config.source}: {switch} is not supported")
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    layers = config.integer("num_hidden_layers", high=1000)
    # A field that is present but null means "as many as query heads"; one left out means the class default.
    null = config.values.get("num_key_value_heads", 0) is None
    dtype = config.text("dtype", config.text("torch_dtype", "float32"))
    head_dim = config.integer("head_dim", max(hidden // heads, 1))
    max_position = config.integer("max_position_embeddings", 2048)
    unrotated = _unrotated(config, layers) if family.no_rope_layers else ()
    window, windowed = _windows(config, family, layers, unrotated)
    defaults: dict[str, Any] = {field.name: field.default for field in fields(ModelConfig)}
    numbers: dict[str, Any] = {name: n.read(config, defaults[name]) for name, n in family.numbers.items()}
    try:
        rotated_dim = _rotated_dim(config, family, head_dim)
        rope, local_rope = _ropes(config, family, max_position, rotated_dim or head_dim)
        return ModelConfig(
            architecture=family.architecture,
            num_layers=layers,
            hidden_size=hidden,
            intermediate_size=config.integer("intermediate_size"),
            num_heads=heads,
            num_kv_heads=heads if null else config.integer("num_key_value_heads", heads),
            head_dim=head_dim,
            vocab_size=config.integer("vocab_size"),
            max_position=max_position,
            rms_norm_eps=config.number("rms_norm_eps", 1e-6),
            rope=rope,
            tie_embeddings=config.boolean("tie_word_embeddings"),
            qkv_bias=_switch(config, family.qkv_bias),
            o_bias=_switch(config, family.o_bias),
            mlp_bias=_switch(config, family.mlp_bias),
            sliding_window=window,
            windowed=windowed,
            unrotated=unrotated,
            local_rope=local_rope,
            rotated_dim=rotated_dim,
            dtype=dtype if dtype in DTYPES else "float32",
            eos_token_ids=_ends(config),
            activation=family.activations[activation],
            **family.features(hidden),
            **numbers,
        )
    except UserError as error:
        message = str(error)
        raise UserError(message if config.source in message else f"{config.source}: {message}") from None


def written(model: ModelConfig, family: Family) -> dict[str, Any]:
    """The fields of a config.json for what only some families have: what `read_model` reads back."""
    values: dict[str, Any] = dict(family.switches(model))
    values |= {number.name: number.write(getattr(model, name)) for name, number in family.numbers.items()}
    values[family.activation] = next(name for name, ours in family.activations.items() if ours == model.activation)
    values["sliding_window"] = model.sliding_window
    if family.sliding_window == "switched":
        values["use_sliding_window"] = model.sliding_window is not None
    if family.window_layers != "every":
        kinds = [_WINDOWED if i in model.windowed else _FULL for i in range(model.num_layers)]
        values["layer_types"] = kinds
    if family.no_rope_layers:
        values["no_rope_layers"] = [int(i not in model.unrotated) for i in range(model.num_layers)]
    rope = model.rope.to_hugging_face()
    if family.partial_rotary:
        rope["partial_rotary_factor"] = model.rotary_dim / model.head_dim
    if model.rope.kind == "longrope":
        values["original_max_position_embeddings"] = model.rope.original_max_position
    if model.local_rope is not None:
        return {**values, "rope_parameters": {_FULL: rope, _WINDOWED: model.local_rope.to_hugging_face()}}
    return {**values, "rope_theta": model.rope.theta, "rope_parameters": rope}


def _switch(config: Fields, value: bool | str) -> bool:
    return config.boolean(value) if isinstance(value, str) else value


def _ends(config: Fields) -> tuple[int, ...]:
    """The tokens that end a text; those of generation_config.json take precedence."""
    found = config.integers("eos_token_id")
    generation = Path(config.source).parent / "generation_config.json"
    if generation.exists():
        found = Fields(read_json(generation), str(generation)).integers("eos_token_id") or found
    return found


def _unrotated(config: Fields, layers: int) -> tuple[int, ...]:
    """The layers without rotary embedding: those with a 0 in `no_rope_layers`, or every `no_rope_layer_interval`-th."""
    if config.get("no_rope_layers") is None:
        interval = config.integer("no_rope_layer_interval", 4)
        return tuple(i for i in range(layers) if (i + 1) % interval == 0)
    given = config.integers("no_rope_layers", "a list of 0 and 1, one for each layer")
    if len(given) < layers:
        raise config.fail("no_rope_layers", f"a list of {layers} numbers")
    return tuple(i for i in range(layers) if not given[i])


def _windows(
    config: Fields, family: Family, layers: int, unrotated: tuple[int, ...]
) -> tuple[int | None, tuple[int, ...]]:
    """The attention window in tokens, and the layers that have it; None and none where every layer sees everything."""
    if family.sliding_window == "never" or config.values.get("sliding_window", 0) is None:
        return None, ()
    if family.sliding_window == "switched" and not config.boolean("use_sliding_window"):
        return None, ()
    windowed: Iterable[int] = range(layers)
    kinds = None if family.window_layers == "every" else config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) < layers:
            raise config.fail("layer_types", f"a list of {layers} names")
        if unknown := [kind for kind in kinds if kind not in (_FULL, _WINDOWED)]:
            raise UserError(f"{config.source}: layer_types: {unknown[0]!r:.40} is not supported")
        windowed = (i for i in range(layers) if kinds[i] == _WINDOWED)
    elif family.window_layers == "pattern":
        pattern = config.integer("sliding_window_pattern")
        windowed = (i for i in range(layers) if (i + 1) % pattern)
    elif family.window_layers == "last":
        windowed = range(min(config.integer("max_window_layers", low=0), layers), layers)
    elif family.window_layers == "unrotated":
        windowed = unrotated
    found = tuple(windowed)
    return (config.integer("sliding_window"), found) if found else (None, ())


def _rotated_dim(config: Fields, family: Family, head_dim: int) -> int | None:
    """How many elements of a head are rotated; None for all."""
    factor = given_parameters(config).number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if factor != 1 and not family.partial_rotary:
        raise UserError(f"{config.source}: partial rotary embedding (partial_rotary_factor) is not supported")
    return None if factor == 1 else int(head_dim * factor)


def _ropes(config: Fields, family: Family, max_position: int, rotary_dim: int) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotary embedding, and where layers with a window have another one, theirs.

    transformers has the latter's parameters under `sliding_attention`; `rope_scaling` is for the other layers.
    """
    if not family.local_theta:
        return RopeConfig.from_hugging_face(config, max_position, rotary_dim, family.rope_aliases), None
    given = config.object("rope_parameters")
    if unknown := given.values.keys() - {_FULL, _WINDOWED}:
        raise UserError(f"{given.source}: {min(unknown):.40} must be given for {_FULL} or {_WINDOWED}")
    scaling = config.object("rope_scaling").values
    found = []
    for kind, theta in ((_FULL, "rope_theta"), (_WINDOWED, family.local_theta)):
        own = {**given.object(kind).values, **(scaling if kind == _FULL else {})}
        values = {"rope_theta": config.values[theta], "rope_parameters": own}
        found.append(RopeConfig.from_hugging_face(Fields(values, config.source), max_position, rotary_dim))
    return found[0], found[1]
