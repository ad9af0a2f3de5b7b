"""The sizes and features of a model of any family. No tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from cqil_trt.errors import UserError
from cqil_trt.rope import RopeConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of the LLaMA family. Sizes are counts of elements; `dtype` is the checkpoint's.

    `architecture`: its class in transformers, which also identifies the family (`families.of`).
    `qk_norm`: queries and keys get an RMSNorm per head. `sliding_window`: the smallest attention window of any
    layer, in tokens; None when every layer attends to everything.
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

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd: rotary embedding needs pairs")

    @property
    def context(self) -> int:
        """The longest sequence, in tokens, that the model's rotary embedding is meant for."""
        return self.rope.context(self.max_position)

    @property
    def group_size(self) -> int:
        """The number of query heads that read one key/value head."""
        return self.num_heads // self.num_kv_heads

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in values.items() if k in known}
        rope = RopeConfig.from_dict(values["rope"])
        return cls(**{**values, "rope": rope, "eos_token_ids": tuple(values["eos_token_ids"])})
