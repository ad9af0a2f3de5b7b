"""Scales of keys and values that quantized checkpoints carry for a KV cache in FP8."""

from __future__ import annotations

import math

from cqil_trt.errors import UserError
from cqil_trt.weights.reader import WeightReader

# The two numbers of a layer, by whose files have them: compressed-tensors, its older releases, ModelOpt and AutoFP8,
# and files with one number for both. All are what vLLM reads.
_NAMES = (
    ("k_scale", "v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
    ("k_proj.k_scale", "v_proj.v_scale"),
    ("kv_scale", "kv_scale"),
)
SUFFIXES = tuple({f".self_attn.{name}" for names in _NAMES for name in names})


def has_kv_scales(reader: WeightReader) -> bool:
    """Whether the checkpoint has any such scale, in whatever shape."""
    return any(name.endswith(SUFFIXES) for name in reader.shapes())


def kv_scales(reader: WeightReader, num_layers: int) -> tuple[tuple[float, float], ...]:
    """The scales of each layer's keys and values: a cache holds what these are divided by their scale.

    Empty if the checkpoint has none. Raises UserError if some are missing, more than a number, or not above 0.
    """
    shapes = reader.shapes()

    def names_of(layer: int) -> tuple[str, ...] | None:
        attention = f"model.layers.{layer}.self_attn"
        known = (tuple(f"{attention}.{name}" for name in names) for names in _NAMES)
        return next((names for names in known if {*names} & shapes.keys()), None)

    def number(name: str) -> float:
        if math.prod(shapes.get(name, (0,))) != 1:
            found = f"has shape {shapes[name]}" if name in shapes else "is missing"
            raise UserError(f"{reader.source}: {name} {found}: an FP8 KV cache takes one number for each layer")
        value = float(reader.read(name).float())
        if not 0 < value < math.inf:
            raise UserError(f"{reader.source}: {name} is {value}: scales of a KV cache are above 0")
        return value

    layers = [names_of(layer) for layer in range(num_layers)]
    if not any(layers):
        return ()
    missing = next((layer for layer, names in enumerate(layers) if names is None), None)
    if missing is not None:
        raise UserError(f"{reader.source}: layer {missing} has no scales of the KV cache, and others have them")
    return tuple((number(keys), number(values)) for keys, values in filter(None, layers))
