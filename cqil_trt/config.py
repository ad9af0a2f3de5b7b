"""Validated, immutable descriptions of the model, of CQIL and of the engine. No tensors, no heavy imports."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cqil_trt.errors import UserError
from cqil_trt.rope import RopeConfig

DTYPES = ("float32", "float16", "bfloat16")
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
BACKENDS = ("torch", "tensorrt", "tensorrt-llm", "onnx")
# Who joins the ranks inside a compiled network: our plugins, TensorRT's own collective layer (NCCL), or TensorRT-LLM's.
COLLECTIVES = ("plugin", "nccl", "trtllm")
PLACEMENTS = ("sharded", "leader", "tensor")
BYPASSES = ("mlp", "residual")
MAX_RANKS = 8
# In a PEFT adapter's directory: the CQIL configuration the adapter was trained for.
ADAPTER_FILE = "cqil_config.json"
# A configuration file is a few kilobytes; a larger one is not a configuration.
MAX_JSON_BYTES = 16 << 20


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError when it is missing, too large or not an object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: {path.stat().st_size} bytes is too large for a configuration file")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class Fields:
    """Typed access to a JSON object; every failure names the source and the field."""

    def __init__(self, values: Mapping[str, Any], source: str):
        self.values = values
        self.source = source

    def fail(self, name: str, expected: str) -> UserError:
        found = repr(self.values.get(name))
        return UserError(f"{self.source}: {name} must be {expected}, found {found[:60]}")

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def with_defaults(self, **values: Any) -> Fields:
        """The same object with `values` for fields it does not have; one that is null it has."""
        return Fields({**values, **self.values}, self.source)

    def integer(self, name: str, default: int | None = None, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(name, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = None, low: float = 0.0) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(name, "a number")
        try:
            value = float(value)
        except OverflowError:
            raise self.fail(name, "a number") from None
        if not (math.isfinite(value) and value > low):
            raise self.fail(name, f"a finite number above {low:g}")
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.fail(name, "a string")
        return value

    def object(self, name: str) -> Fields:
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.fail(name, "an object")
        return Fields(value, f"{self.source}: {name}")

    def integers(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them, as Hugging Face writes eos_token_id."""
        value = self.get(name, [])
        value = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in value):
            raise self.fail(name, "a token id or a list of them")
        return tuple(value)


# What a config.json that leaves the field out means, by architecture: the defaults of transformers' own classes.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    "Qwen3ForCausalLM": {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "head_dim": 128,
    },
}
ARCHITECTURES = tuple(_DEFAULTS)
# transformers chooses the class by model_type.
_MODEL_TYPES = dict(zip(("llama", "mistral", "qwen2", "qwen3"), ARCHITECTURES))


def _architecture(config: Fields) -> str:
    """The class that transformers takes for a config.json: by its model_type, whatever `architectures` says.

    A file without model_type, which transformers refuses, goes by its architecture; case does not matter
    (LLaMAForCausalLM, as in 2023). Raises UserError for one that is not supported.
    """
    kind = config.get("model_type")
    if kind is None:
        names = config.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise UserError(f"{config.source}: no model_type and no architectures: not a model's configuration")
        kind = names[0].lower().removesuffix("forcausallm")
        if kind not in _MODEL_TYPES:
            raise UserError(
                f"{config.source}: {names[0][:80]} is not supported (supported: {', '.join(ARCHITECTURES)})"
            )
    elif not isinstance(kind, str) or kind not in _MODEL_TYPES:
        raise UserError(f"{config.source}: model_type {kind!r:.80} is not supported ({', '.join(_MODEL_TYPES)} are)")
    return _MODEL_TYPES[kind]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the LLaMA family. Sizes are counts of elements; `dtype` is the checkpoint's."""

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
        """How many query heads read one key/value head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def from_hugging_face(cls, path: Path) -> ModelConfig:
        """Reads `config.json` (and `generation_config.json` beside it, for the stop tokens).

        Raises UserError for an architecture, or a feature in use, that would be computed wrongly.
        """
        raw = read_json(path)
        architecture = _architecture(Fields(raw, str(path)))
        if raw.get("quantization_config") is not None:
            raise UserError(f"{path}: quantized checkpoints (quantization_config) are not supported")
        config = Fields({**_DEFAULTS[architecture], **raw}, str(path))
        activation = config.text("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise UserError(f"{path}: activation '{activation}' is not supported (silu is)")

        qwen2, qwen3 = architecture == "Qwen2ForCausalLM", architecture == "Qwen3ForCausalLM"
        attention_bias = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and config.boolean("attention_bias")
        heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
        # A field that is present but null means "as many as query heads"; one left out means the class default.
        kv_heads = heads if raw.get("num_key_value_heads", 0) is None else config.integer("num_key_value_heads", heads)
        eos = config.integers("eos_token_id")
        generation = path.parent / "generation_config.json"
        if generation.exists():
            eos = Fields(read_json(generation), str(generation)).integers("eos_token_id") or eos
        dtype = config.text("dtype", config.text("torch_dtype", "float32"))
        head_dim = config.integer("head_dim", max(hidden // heads, 1))
        max_position = config.integer("max_position_embeddings", 2048)
        try:
            return cls(
                architecture=architecture,
                num_layers=config.integer("num_hidden_layers", high=1000),
                hidden_size=hidden,
                intermediate_size=config.integer("intermediate_size"),
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                vocab_size=config.integer("vocab_size"),
                max_position=max_position,
                rms_norm_eps=config.number("rms_norm_eps", 1e-6),
                rope=RopeConfig.from_hugging_face(config, max_position, head_dim),
                tie_embeddings=config.boolean("tie_word_embeddings"),
                qkv_bias=qwen2 or attention_bias,
                o_bias=attention_bias,
                mlp_bias=architecture == "LlamaForCausalLM" and config.boolean("mlp_bias"),
                qk_norm=qwen3,
                sliding_window=_sliding_window(config, raw, architecture),
                dtype=dtype if dtype in DTYPES else "float32",
                eos_token_ids=eos,
            )
        except UserError as error:
            message = str(error)
            raise UserError(message if str(path) in message else f"{path}: {message}") from None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in values.items() if k in known}
        return cls(
            **{
                **values,
                "rope": RopeConfig.from_dict(values["rope"]),
                "eos_token_ids": tuple(values["eos_token_ids"]),
            }
        )


def _sliding_window(config: Fields, raw: Mapping[str, Any], architecture: str) -> int | None:
    """The smallest attention window any layer uses, or None when every layer attends to everything."""
    if architecture == "LlamaForCausalLM" or raw.get("sliding_window", 0) is None:
        return None
    if architecture != "MistralForCausalLM" and not config.boolean("use_sliding_window"):
        return None
    kinds = config.get("layer_types", ["sliding_attention"])
    if not isinstance(kinds, list):
        raise config.fail("layer_types", "a list")
    return config.integer("sliding_window") if "sliding_attention" in kinds else None


@dataclass(frozen=True)
class CqilConfig:
    """Which layers run concurrently and where the others run.

    Groups of `p` consecutive layers fill `[start, end)`; layer j of a group receives, besides the group's input, the
    attention outputs of the `d` layers just before it. The number of ranks is always `p`.
    """

    p: int
    d: int = 0
    start: int = 0
    end: int = 0
    bypass: str = "mlp"
    placement: str = "sharded"

    def __post_init__(self) -> None:
        if not 1 <= self.p <= MAX_RANKS:
            raise UserError(f"--p must be from 1 to {MAX_RANKS}, found {self.p}")
        if not 0 <= self.d < self.p:
            raise UserError(f"--d must be at least 0 and below --p {self.p}, found {self.d}")
        if not 0 <= self.start <= self.end:
            raise UserError(f"--start {self.start} and --end {self.end}: need 0 <= start <= end")
        if (self.end - self.start) % self.p:
            raise UserError(
                f"--p {self.p} does not divide the {self.end - self.start} layers of [{self.start}, {self.end}): "
                f"try --end {self.end - (self.end - self.start) % self.p}"
            )
        if self.bypass not in BYPASSES:
            raise UserError(f"--bypass must be one of {', '.join(BYPASSES)}, found {self.bypass}")
        if self.placement not in PLACEMENTS:
            raise UserError(f"--placement must be one of {', '.join(PLACEMENTS)}, found {self.placement}")
        if self.placement == "tensor" and (self.start != self.end or self.d):
            raise UserError("--placement tensor has no groups: start must equal end and d must be 0")

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The layers of each concurrent group; empty when p == 1, where a group is an ordinary layer."""
        if self.p == 1:
            return ()
        return tuple(tuple(range(i, i + self.p)) for i in range(self.start, self.end, self.p))

    def check_depth(self, num_layers: int) -> None:
        """Raises UserError when the range reaches beyond a model of `num_layers` layers."""
        if self.end > num_layers:
            raise UserError(f"--end {self.end} is beyond the model, which has {num_layers} layers")

    @classmethod
    def choose(
        cls,
        num_layers: int,
        p: int,
        d: int = 0,
        start: int | None = None,
        end: int | None = None,
        bypass: str = "mlp",
        placement: str = "sharded",
    ) -> CqilConfig:
        """A configuration for a model of `num_layers` layers; `start` and `end` default to its middle.

        The middle is where neighbouring layers' inputs are most alike. The first 40% of the layers and the last
        sixteenth stay sequential, close to what the authors published (12..30 of 32 layers, 17..37 of 40).
        """
        if placement == "tensor":
            return cls(p, placement=placement)
        cls(p, d, bypass=bypass, placement=placement)  # p and d are checked before they are divided by
        if start is None:
            limit = num_layers if end is None else end
            start = min(int(0.4 * num_layers), limit)
            if end is not None:
                start += (end - start) % p
        if end is None:
            limit = num_layers - max(1, num_layers // 16)
            end = start + max(0, limit - start) // p * p
        config = cls(p, d, start, end, bypass, placement)
        config.check_depth(num_layers)
        return config

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save_with_adapter(self, directory: Path) -> None:
        """Writes into a PEFT adapter's directory what it was trained for; where layers run is no part of that."""
        values = {name: value for name, value in asdict(self).items() if name != "placement"}
        (directory / ADAPTER_FILE).write_text(json.dumps(values, indent=1) + "\n")

    @classmethod
    def of_adapter(cls, directory: Path) -> CqilConfig | None:
        """What the adapter in `directory` says it was trained for; None when it does not. Raises UserError if wrong."""
        path = directory / ADAPTER_FILE
        if not path.exists():
            return None
        values = Fields(read_json(path), str(path))
        numbers = (values.integer(name, low=0) for name in ("p", "d", "start", "end"))
        try:
            return cls(*numbers, bypass=values.text("bypass", "mlp"))
        except UserError as error:
            message = str(error)
            raise UserError(message if str(path) in message else f"{path}: {message}") from None


@dataclass(frozen=True)
class EngineConfig:
    """Limits and numeric type of an engine: sequences, tokens per sequence (prompt and generated together).

    Longer prompts than `prefill_chunk` tokens are taken in several forward passes, which bounds the memory of one.
    """

    max_batch_size: int = 8
    max_seq_len: int = 2048
    dtype: str = "float32"
    backend: str = "torch"
    prefill_chunk: int = 512

    def __post_init__(self) -> None:
        if not 1 <= self.max_batch_size <= 4096:
            raise UserError(f"--max-batch-size must be from 1 to 4096, found {self.max_batch_size}")
        if self.max_seq_len < 1:
            raise UserError(f"--max-seq-len must be at least 1, found {self.max_seq_len}")
        if self.prefill_chunk < 1:
            raise UserError(f"--prefill-chunk must be at least 1, found {self.prefill_chunk}")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, found {self.dtype}")
        if self.backend not in BACKENDS:
            raise UserError(f"--backend must be one of {', '.join(BACKENDS)}, found {self.backend}")

    def check_model(self, model: ModelConfig) -> None:
        """Raises UserError when the model would compute something else at these lengths."""
        if self.max_seq_len > model.context:
            raise UserError(f"--max-seq-len {self.max_seq_len} is beyond the model's {model.context} positions")
        if self.backend != "torch" and self.max_seq_len > model.rope.fixed_context:
            raise UserError(
                f"--backend {self.backend}: the model's dynamic rope rotates a longer prompt than "
                f"{model.rope.fixed_context} tokens by its length, which only backend torch on CPUs does: "
                f"--max-seq-len {model.rope.fixed_context} or less keeps it out of use"
            )
        if model.sliding_window is not None and self.max_seq_len > model.sliding_window:
            raise UserError(
                f"the model uses sliding-window attention ({model.sliding_window} tokens), which is not supported: "
                f"--max-seq-len {model.sliding_window} or less keeps it out of use"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
