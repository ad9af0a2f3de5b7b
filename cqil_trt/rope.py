"""The parameters of a model's rotary position embedding, read as transformers reads them. No tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cqil_trt.errors import UserError

if TYPE_CHECKING:
    from cqil_trt.json_fields import Fields

KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_MOST_POSITIONS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: `kind` is one of KINDS (the names Hugging Face uses), `theta` the base.

    `factor`: extends the context. `original_max_position`: the context, in tokens, before that. `attention_factor`:
    multiplies cosine and sine. `low_freq_factor` and `high_freq_factor` belong to llama3, `beta_fast`, `beta_slow` and
    `truncate` to yarn. `divisors`: one per frequency, which is divided by it last (GGUF's rope_freqs); empty for none.
    `short_factors` and `long_factors` belong to longrope, one per frequency, which is divided by it: by the short ones
    within the original context, by the long ones beyond.
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
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RopeConfig:
        lists = ("divisors", "short_factors", "long_factors")
        return cls(**{**values, **{name: tuple(values.get(name, ())) for name in lists}})

    @classmethod
    def from_hugging_face(
        cls, config: Fields, max_position: int, rotary_dim: int, aliases: Mapping[str, str] | None = None
    ) -> RopeConfig:
        """The parameters in a config.json, by the rules of transformers 5 (RotaryEmbeddingConfigMixin).

        `rope_scaling`, unless empty, replaces `rope_parameters`; the default of `rope_theta` is the top level's.
        `rope_type` precedes `type`, and without both nothing is scaled. The original context is the top level's
        `original_max_position_embeddings`, else that of the parameters, else the model's (for dynamic always the
        model's). A null field is not the same as a missing one.

        Args:
            config: the file's fields.
            max_position: the model's positions without scaling.
            rotary_dim: rotated elements of a head.
            aliases: other names of types.

        Raises:
            UserError: for a type that is not supported, or parameters that transformers cannot use.
        """
        rope = given_parameters(config)
        if any(isinstance(value, dict) for value in rope.values.values()):
            raise UserError(f"{rope.source}: rope parameters that differ by layer are not supported")
        rope = rope.with_defaults(rope_theta=config.values.get("rope_theta", 10000.0))
        kind = rope.with_defaults(rope_type=rope.values.get("type", "default")).text("rope_type")
        kind = (aliases or {}).get(kind, kind)
        if kind not in KINDS:
            raise UserError(f"{rope.source}: rope type '{kind[:40]}' is not supported ({', '.join(KINDS)} are)")
        theta = rope.number("rope_theta")
        if kind == "default":
            return cls(theta=theta)
        if kind == "dynamic":
            if rotary_dim == 2:
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
        if kind == "longrope":
            return cls._longrope(rope, max_position, original, rotary_dim)
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

    @classmethod
    def _longrope(cls, rope: Fields, max_position: int, original: int, rotary_dim: int) -> RopeConfig:
        factor = rope.number("factor", max_position / original)
        attention = longrope_magnitude(factor, original)
        if rope.get("attention_factor") is not None:
            attention = rope.number("attention_factor")
        return cls(
            theta=rope.number("rope_theta"),
            kind="longrope",
            factor=factor,
            original_max_position=original,
            attention_factor=attention,
            short_factors=rope.numbers("short_factor", rotary_dim // 2),
            long_factors=rope.numbers("long_factor", rotary_dim // 2),
        )

    def to_hugging_face(self) -> dict[str, Any]:
        """The parameters as transformers takes them; it has none for `divisors`."""
        names = {
            "linear": ("factor",),
            "dynamic": ("factor",),
            "yarn": ("factor", "original_max_position", "attention_factor", "beta_fast", "beta_slow", "truncate"),
            "llama3": ("factor", "original_max_position", "low_freq_factor", "high_freq_factor"),
            "longrope": ("factor", "original_max_position", "attention_factor", "short_factors", "long_factors"),
        }.get(self.kind, ())
        theirs = {"original_max_position": "original_max_position_embeddings"}
        theirs |= {"short_factors": "short_factor", "long_factors": "long_factor"}
        found = {theirs.get(name, name): getattr(self, name) for name in names}
        found = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
        return {"rope_type": self.kind, "rope_theta": self.theta, **found}

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
        return self.original_max_position if self.kind in ("dynamic", "longrope") else _MOST_POSITIONS


def given_parameters(config: Fields) -> Fields:
    """The rope parameters in a config.json: `rope_scaling`, unless empty, else `rope_parameters`."""
    return config.object("rope_scaling" if config.get("rope_scaling") else "rope_parameters")


def longrope_magnitude(factor: float, original: int) -> float:
    """LongRoPE's scale of cosine and sine (arXiv 2402.13753, as in transformers) for a context `factor` times as long.

    `original`: the context before that, in tokens.
    """
    return 1.0 if factor <= 1 or original == 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's scale of cosine and sine (arXiv 2309.00071, section 3.4) for a context `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
