"""The parameters of a model's rotary position embedding, read as transformers reads them. No tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cqil_trt.errors import UserError

if TYPE_CHECKING:
    from cqil_trt.json_fields import Fields

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
_MOST_POSITIONS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: `kind` is one of KINDS (the names Hugging Face uses), `theta` the base.

    `factor`: extends the context. `original_max_position`: the context, in tokens, before that. `attention_factor`:
    multiplies cosine and sine. `low_freq_factor` and `high_freq_factor` belong to llama3, `beta_fast`, `beta_slow` and
    `truncate` to yarn. `divisors`: one per frequency, which is divided by it last (GGUF's rope_freqs); empty for none.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    divisors: tuple[float, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RopeConfig:
        return cls(**{**values, "divisors": tuple(values.get("divisors", ()))})

    @classmethod
    def from_hugging_face(cls, config: Fields, max_position: int, head_dim: int) -> RopeConfig:
        """The parameters in a config.json, by the rules of transformers 5 (RotaryEmbeddingConfigMixin).

        `rope_scaling`, unless empty, replaces `rope_parameters`; the default of `rope_theta` is the top level's.
        `rope_type` precedes `type`, and without both nothing is scaled. The original context is the top level's
        `original_max_position_embeddings`, else that of the parameters, else the model's (for dynamic always the
        model's). A null field is not the same as a missing one.

        Args:
            config: the file's fields.
            max_position: the model's positions without scaling.
            head_dim: elements of a head.

        Raises:
            UserError: for a type that is not supported, or parameters that transformers cannot use.
        """
        rope = config.object("rope_scaling" if config.get("rope_scaling") else "rope_parameters")
        if any(isinstance(value, dict) for value in rope.values.values()):
            raise UserError(f"{rope.source}: rope parameters that differ by layer are not supported")
        rope = rope.with_defaults(rope_theta=config.values.get("rope_theta", 10000.0))
        kind = rope.with_defaults(rope_type=rope.values.get("type", "default")).text("rope_type")
        if kind not in KINDS:
            raise UserError(f"{rope.source}: rope type '{kind[:40]}' is not supported ({', '.join(KINDS)} are)")
        if rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0)) != 1.0:
            raise UserError(f"{rope.source}: partial rotary embedding (partial_rotary_factor) is not supported")
        theta = rope.number("rope_theta")
        if kind == "default":
            return cls(theta=theta)
        if kind == "dynamic":
            if head_dim == 2:
                raise UserError(f"{rope.source}: dynamic rope needs heads of more than 2 elements")
            return cls(theta=theta, kind=kind, factor=rope.number("factor"), original_max_position=max_position)
        if kind == "linear":
            return cls(theta=theta, kind=kind, factor=rope.number("factor"))
        # transformers gives priority to the top level when it computes, whatever the parameters say.
        outer = config if "original_max_position_embeddings" in config.values else rope
        original = outer.with_defaults(original_max_position_embeddings=max_position).integer(
            "original_max_position_embeddings"
        )
        if kind == "yarn":
            return cls._yarn(rope, max_position, original)
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise rope.fail("high_freq_factor", "greater than low_freq_factor")
        return cls(
            theta=theta,
            kind=kind,
            factor=rope.number("factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position=original,
        )

    @classmethod
    def _yarn(cls, rope: Fields, max_position: int, original: int) -> RopeConfig:
        if "factor" not in rope.values:
            raise rope.fail("factor", "a number")

        def chosen(name: str, default: float) -> float:
            return rope.number(name) if rope.get(name) else default  # transformers also takes 0 for "not given"

        factor = rope.number("factor", max_position / original)
        mscale, mscale_all_dim = chosen("mscale", 0.0), chosen("mscale_all_dim", 0.0)
        if rope.get("attention_factor") is not None:
            attention = rope.number("attention_factor")
        elif mscale and mscale_all_dim:
            attention = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all_dim)
        else:
            attention = yarn_magnitude(factor)
        return cls(
            theta=rope.number("rope_theta", low=1.0),
            kind="yarn",
            factor=factor,
            original_max_position=original,
            attention_factor=attention,
            beta_fast=chosen("beta_fast", 32.0),
            beta_slow=chosen("beta_slow", 1.0),
            truncate=rope.boolean("truncate") if "truncate" in rope.values else True,
        )

    def context(self, max_position: int) -> int:
        """The context, in tokens, of a model of `max_position` positions with this scaling.

        A checkpoint may state the positions before scaling (Qwen's recipe for long contexts) or after it (Llama 3.1),
        so this is the larger of the two.
        """
        stretched = {
            "linear": self.factor * max_position,
            "dynamic": self.factor * max_position,
            "yarn": self.factor * self.original_max_position,
        }.get(self.kind, 0.0)
        return max(max_position, int(min(stretched, _MOST_POSITIONS)))

    @property
    def fixed_context(self) -> int:
        """The longest sequence, in tokens, whose frequencies do not depend on its length."""
        return self.original_max_position if self.kind == "dynamic" else _MOST_POSITIONS


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's scale of cosine and sine (arXiv 2309.00071, section 3.4) for a context `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
