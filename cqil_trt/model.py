"""The sizes and features of a model of any family. No tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

from cqil_trt.errors import UserError
from cqil_trt.rope import RopeConfig


class Feature(Enum):
    """What some families compute and LLaMA does not. A backend names those that it computes."""

    WINDOWS = "sliding windows"
    UNROTATED = "layers without rotary embedding"
    LOCAL_ROPE = "two rotary embeddings"
    PARTIAL_ROPE = "partial rotary embedding"
    GELU = "GELU"
    POST_NORMS = "norms after sub-layers"
    JOINT_QK_NORM = "norms over all query heads"
    OFFSET_NORMS = "norms that multiply by 1 + weight"
    QUERY_SCALE = "a query scale"
    ATTENTION_CAP = "soft caps of attention scores"
    SCALED_EMBEDDING = "a scaled embedding"
    SCALED_RESIDUAL = "scaled sub-layers"
    SCALED_LOGITS = "scaled or capped logits"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of LLaMA's form. Sizes are counts of elements; `dtype` is the checkpoint's.

    The defaults of the last fields are LLaMA's.

    Attributes:
        architecture: its class in transformers, which also identifies the family (`families.of`).
        qk_norm: queries and keys get an RMSNorm per head; `joint_qk_norm`: one over all heads together instead.
        sliding_window: how many tokens the layers `windowed` attend to, their own included; None without such layers.
        unrotated: layers whose queries and keys are not rotated.
        local_rope: the rotary embedding of the layers `windowed`; None: that of the others.
        rotated_dim: elements of a head that are rotated, the first ones; None: all.
        activation: of the MLP's gate, "silu" or "gelu_tanh".
        pre_norms: whether attention and MLP get the RMSNorm of the residual stream, or the stream itself.
        post_norms: whether what they return gets an RMSNorm before it is added.
        offset_norms: RMSNorms multiply by 1 + weight. `wide_norms`: they multiply before rounding, not after.
        embedding_scale: multiplies embeddings. `residual_scale`: what attention and MLP return.
        query_scale: multiplies attention scores; None: head_dim^-0.5.
        attention_cap, logits_cap: s → cap * tanh(s / cap), of scores and logits; None without.
        logits_scale: multiplies logits.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    dtype: str
    eos_token_ids: tuple[int, ...] = ()
    joint_qk_norm: bool = False
    windowed: tuple[int, ...] = ()
    unrotated: tuple[int, ...] = ()
    local_rope: RopeConfig | None = None
    rotated_dim: int | None = None
    activation: str = "silu"
    pre_norms: bool = True
    post_norms: bool = False
    offset_norms: bool = False
    wide_norms: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    query_scale: float | None = None
    attention_cap: float | None = None
    logits_scale: float = 1.0
    logits_cap: float | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            what = f"head_dim {self.head_dim} is odd" if self.rotated_dim is None else f"rotating {self.rotated_dim}"
            raise UserError(f"{what}: rotary embedding needs pairs of a head's elements")

    @property
    def context(self) -> int:
        """The longest sequence, in tokens, that the model's rotary embedding is meant for."""
        return self.rope.context(self.max_position)

    @property
    def group_size(self) -> int:
        """The number of query heads that read one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def rotary_dim(self) -> int:
        """How many elements of a head are rotated."""
        return self.head_dim if self.rotated_dim is None else self.rotated_dim

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The model's different rotary embeddings."""
        return (self.rope,) if self.local_rope is None else (self.rope, self.local_rope)

    def rope_of(self, layer: int) -> int | None:
        """Which of `ropes` rotates the layer's queries and keys; None: none does."""
        if layer in self.unrotated:
            return None
        return 1 if self.local_rope is not None and layer in self.windowed else 0

    def window_of(self, layer: int) -> int | None:
        """How many tokens a query of the layer sees, its own included; None: all before it."""
        return self.sliding_window if layer in self.windowed else None

    @property
    def fixed_context(self) -> int:
        """The longest sequence, in tokens, whose rotary frequencies do not depend on its length."""
        return min(rope.fixed_context for rope in self.ropes)

    def features(self, length: int) -> tuple[Feature, ...]:
        """What the model computes on sequences of up to `length` tokens that LLaMA does not."""
        used = {
            Feature.WINDOWS: self.sliding_window is not None and length > self.sliding_window,
            Feature.UNROTATED: self.unrotated,
            Feature.LOCAL_ROPE: self.local_rope,
            Feature.PARTIAL_ROPE: self.rotary_dim != self.head_dim,
            Feature.GELU: self.activation != "silu",
            Feature.POST_NORMS: self.post_norms,
            Feature.JOINT_QK_NORM: self.joint_qk_norm,
            Feature.OFFSET_NORMS: self.offset_norms,
            Feature.QUERY_SCALE: self.query_scale,
            Feature.ATTENTION_CAP: self.attention_cap,
            Feature.SCALED_EMBEDDING: self.embedding_scale != 1,
            Feature.SCALED_RESIDUAL: self.residual_scale != 1,
            Feature.SCALED_LOGITS: self.logits_scale != 1 or self.logits_cap,
        }
        return tuple(feature for feature, needed in used.items() if needed)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in values.items() if k in known}
        lists = ("eos_token_ids", "windowed", "unrotated")
        changed = {name: tuple(values.get(name, ())) for name in lists}
        ropes = {name: RopeConfig.from_dict(values[name]) for name in ("rope", "local_rope") if values.get(name)}
        return cls(**{**values, **changed, **ropes})
