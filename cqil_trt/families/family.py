"""How families of decoders differ, as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from cqil_trt.json_fields import Fields
from cqil_trt.model import ModelConfig

# The parts of a layer, and their modules in transformers' decoders, within `model.layers.N`. Families with a norm after
# attention or MLP also have the parts `attention_post_norm` and `mlp_post_norm`; a family may lack parts.
HUGGING_FACE_LAYER: Mapping[str, str] = MappingProxyType(
    {
        "attention_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "o": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
)
# With norms before and after attention and MLP, and only after them.
SANDWICH_LAYER: Mapping[str, str] = MappingProxyType(
    {
        **HUGGING_FACE_LAYER,
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
)
POST_NORM_LAYER: Mapping[str, str] = MappingProxyType(
    {part: module for part, module in SANDWICH_LAYER.items() if part not in ("attention_norm", "mlp_norm")}
)
# Transformers' name of GELU in its form with tanh, and ours.
GATED_GELU: Mapping[str, str] = MappingProxyType({"gelu_pytorch_tanh": "gelu_tanh"})
# The same parts in a GGUF file: tensors within `blk.N`.
GGUF_LAYER: Mapping[str, str] = MappingProxyType(
    {
        "attention_norm": "attn_norm",
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "q_norm": "attn_q_norm",
        "k_norm": "attn_k_norm",
        "o": "attn_output",
        "mlp_norm": "ffn_norm",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    }
)
GGUF_POST_NORMS: Mapping[str, str] = MappingProxyType(
    {"attention_post_norm": "post_attention_norm", "mlp_post_norm": "post_ffw_norm"}
)
GGUF_POST_NORM_LAYER: Mapping[str, str] = MappingProxyType(
    {part: name for part, name in {**GGUF_LAYER, **GGUF_POST_NORMS}.items() if part in POST_NORM_LAYER}
)
# Parts that occur once in a model: their modules in a checkpoint, and their tensors in a GGUF file.
EMBEDDING, FINAL_NORM, LM_HEAD = "model.embed_tokens", "model.norm", "lm_head"
GGUF_TOP = MappingProxyType({"token_embd": EMBEDDING, "output_norm": FINAL_NORM, "output": LM_HEAD})


@dataclass(frozen=True)
class Number:
    """A number under `name` in config.json, or in a GGUF file. `ModelConfig` has it to the power `power`.

    `whole`: it is an integer.
    """

    name: str
    power: float = 1.0
    whole: bool = False

    def read(self, config: Fields, default: float | None) -> float | None:
        """The value of ModelConfig's field: `default` if there is no such number; None if it is null."""
        if self.name not in config.values:
            return default
        return None if config.values[self.name] is None else config.number(self.name) ** self.power

    def write(self, value: float | None) -> float | None:
        """The number in config.json."""
        if value is None:
            return None
        number = value ** (1 / self.power)
        return round(number) if self.whole else number


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """How llama.cpp stores a family.

    Attributes:
        architecture: `general.architecture` of the metadata.
        layer: part → tensor within `blk.N`, as `Family.layer`.
        interleaved: whether the rows of q and k are reordered for a rotary embedding that rotates neighbouring pairs;
            transformers rotates the two halves of a head.
        frequency_factors: whether `rope_freqs.weight` is applied. `longrope`: whether `rope_factors_short.weight` and
            `rope_factors_long.weight` are.
        requires: a key of the metadata that tells the family from another with the same `architecture`.
        numbers: fields of `ModelConfig`, and their keys in the metadata. `defaults`: values of keys that may be
            missing.
        window_pattern: all layers but every so many-th have the window, if the file does not list them; 0: all layers.
        local_theta: the rotary base of layers with a window, whose rotary embedding is not scaled, if the file does not
            say; 0: that of the other layers.
        no_rope_interval: every so many-th layer has no rotary embedding; 0: none.
        hidden_query_scale: the depths of models whose scores are divided by the square root of the hidden size per
            head, not of `head_dim`.
    """

    architecture: str
    layer: Mapping[str, str] = field(default_factory=lambda: GGUF_LAYER)
    interleaved: bool = False
    frequency_factors: bool = False
    longrope: bool = False
    requires: str = ""
    numbers: Mapping[str, Number] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    window_pattern: int = 0
    local_theta: float = 0.0
    no_rope_interval: int = 0
    hidden_query_scale: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of decoders. All differences between families are attributes of this class.

    Attributes:
        architecture: the class in transformers; `model_type`: its name in config.json.
        defaults: values of fields that config.json may omit and that differ between families: the defaults of
            transformers' configuration class.
        layer: part of a layer → its module in a checkpoint, within `model.layers.N`. Parts with the same module are
            stacked in it, in the order of this mapping (a fused projection): write the mapping out where the order is
            another one. Heads of q, k and v that alternate within one matrix cannot be described.
        activation: the field of config.json that names the activation; `activations`: its values that are supported,
            and what `ModelConfig` calls them.
        qkv_bias, o_bias, mlp_bias: whether those projections have a bias; a string names the field of config.json that
            decides.
        qk_norm: whether queries and keys get an RMSNorm per head, or with `joint_qk_norm` one over all heads.
        offset_norms, wide_norms: as in `ModelConfig`.
        sliding_window: whether layers attend to only `sliding_window` tokens: never, always (unless the field is null),
            or if `use_sliding_window` is set.
        window_layers: which ones do, where config.json has no `layer_types`: all, all but every
            `sliding_window_pattern`-th, those from `max_window_layers` on, or those without rotary embedding; "every"
            is all whatever `layer_types` says.
        local_theta: the field of config.json with the rotary base of the layers with a window; empty if they have the
            same rotary embedding as the others.
        no_rope_layers: whether a field of this name lists layers without rotary embedding.
        partial_rotary: whether `partial_rotary_factor` may be other than 1. `rope_aliases`: other names of rope types.
        embedding_scale: whether embeddings are multiplied by the square root of the hidden size.
        numbers: fields of `ModelConfig` that config.json has under another name.
        refused: switches of config.json that must not be set.
        becomes: fields of config.json that make it one of another family, and that family's `model_type`.
        inside: the `model_type` of models that read more than text, whose text model is of this family: described by
            `text_config`, with its tensors under `language_model`.
        lora_targets: the modules that PEFT adapts by default; empty if PEFT has no default for the family.
        gguf: how llama.cpp stores the family; None if it stores it under another name, or not at all.
        reference: further arguments of transformers' configuration class, for a reference made from sizes alone.
    """

    architecture: str
    model_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    layer: Mapping[str, str] = field(default_factory=lambda: HUGGING_FACE_LAYER)
    activation: str = "hidden_act"
    activations: Mapping[str, str] = field(default_factory=lambda: {"silu": "silu", "swish": "silu"})
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    joint_qk_norm: bool = False
    offset_norms: bool = False
    wide_norms: bool = False
    sliding_window: Literal["never", "always", "switched"] = "never"
    window_layers: Literal["every", "all", "pattern", "last", "unrotated"] = "every"
    local_theta: str = ""
    no_rope_layers: bool = False
    partial_rotary: bool = False
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    embedding_scale: bool = False
    numbers: Mapping[str, Number] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    becomes: Mapping[str, str] = field(default_factory=dict)
    inside: str | None = None
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    gguf: Gguf | None = None
    reference: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fused = {part for part in self.layer if list(self.layer.values()).count(self.layer[part]) > 1}
        if self.gguf is None:
            return
        names = list(self.gguf.layer.values())
        if fused != {part for part in self.layer if names.count(self.gguf.layer[part]) > 1}:
            raise ValueError(f"{self.architecture}: a GGUF file must fuse the same parts as a checkpoint")
        if self.gguf.interleaved and fused & {"q", "k"}:
            raise ValueError(f"{self.architecture}: rows of a fused q, k and v cannot be interleaved")

    def features(self, hidden_size: int) -> dict[str, Any]:
        """The fields of `ModelConfig` that all models of the family share."""
        return {
            "qk_norm": self.qk_norm,
            "joint_qk_norm": self.joint_qk_norm,
            "pre_norms": "attention_norm" in self.layer,
            "post_norms": "attention_post_norm" in self.layer,
            "offset_norms": self.offset_norms,
            "wide_norms": self.wide_norms,
            **({"embedding_scale": hidden_size**0.5} if self.embedding_scale else {}),
        }

    def switches(self, model: ModelConfig) -> dict[str, bool]:
        """The fields of config.json that decide about biases, and what they are for this model."""
        decided = ((self.qkv_bias, model.qkv_bias), (self.o_bias, model.o_bias), (self.mlp_bias, model.mlp_bias))
        return {switch: bias for switch, bias in decided if isinstance(switch, str)}

    def place(self, part: str, sizes: Mapping[str, int]) -> tuple[str, int]:
        """The module that holds a part of a layer, and the part's first row in it; `sizes`: the rows of each part."""
        module, first = self.layer[part], 0
        for other, found in self.layer.items():
            if other == part:
                break
            first += sizes[other] if found == module else 0
        return module, first

    @property
    def linear_modules(self) -> tuple[str, ...]:
        """The last names of a layer's matrices in a checkpoint, as LoRA's `target_modules` lists them."""
        parts = ("q", "k", "v", "o", "gate", "up", "down")
        return tuple(dict.fromkeys(self.layer[part].rpartition(".")[2] for part in parts))

    def gguf_names(self) -> Iterator[tuple[str, str]]:
        """Tensors of a layer in a GGUF file (within `blk.N`), and their modules in a checkpoint (`model.layers.N`)."""
        if self.gguf is not None:
            yield from {self.gguf.layer[part]: module for part, module in self.layer.items()}.items()

    def in_transformers(self, model: ModelConfig) -> bool:
        """Whether transformers' class can hold the model: a GGUF may have one of two biases that one field sets."""
        decided: dict[str, bool] = {}
        for switch, bias in ((self.qkv_bias, model.qkv_bias), (self.o_bias, model.o_bias)):
            if isinstance(switch, str) and decided.setdefault(switch, bias) != bias:
                return False
        return True
