"""Which layers run concurrently (`CqilConfig`), and what an engine is built for (`EngineLimits`). No tensors."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cqil_trt.errors import UserError
from cqil_trt.json_fields import Fields, read_json
from cqil_trt.model import ModelConfig

DTYPES = ("float32", "float16", "bfloat16")
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "float8_e4m3fn": 1}
PLACEMENTS = ("sharded", "leader", "tensor")
BYPASSES = ("mlp", "residual")
MAX_RANKS = 8
# The file in a PEFT adapter's directory that holds the CQIL configuration it was trained for.
ADAPTER_FILE = "cqil_config.json"


@dataclass(frozen=True, kw_only=True)
class CqilConfig:
    """Which layers run concurrently and where the others run.

    Groups of `p` consecutive layers fill `[start, end)`; layer j of a group also receives the attention
    outputs of the `d` layers just before it. The number of ranks is always `p`.
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
            return cls(p=p, placement=placement)
        cls(p=p, d=d, bypass=bypass, placement=placement)  # p and d are checked before they are divided by
        if start is None:
            limit = num_layers if end is None else end
            start = min(int(0.4 * num_layers), limit)
            if end is not None:
                start += (end - start) % p
        if end is None:
            limit = num_layers - max(1, num_layers // 16)
            end = start + max(0, limit - start) // p * p
        config = cls(p=p, d=d, start=start, end=end, bypass=bypass, placement=placement)
        config.check_depth(num_layers)
        return config

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save_with_adapter(self, directory: Path) -> None:
        """Writes the configuration, without the placement, into the directory of an adapter trained for it."""
        values = {name: value for name, value in asdict(self).items() if name != "placement"}
        (directory / ADAPTER_FILE).write_text(json.dumps(values, indent=1) + "\n")

    @classmethod
    def of_adapter(cls, directory: Path) -> CqilConfig | None:
        """What the adapter in `directory` was trained for; None if it does not say. Raises UserError if malformed."""
        path = directory / ADAPTER_FILE
        if not path.exists():
            return None
        values = Fields(read_json(path), str(path))
        try:
            return cls(
                p=values.integer("p", low=0),
                d=values.integer("d", low=0),
                start=values.integer("start", low=0),
                end=values.integer("end", low=0),
                bypass=values.text("bypass", "mlp"),
            )
        except UserError as error:
            message = str(error)
            raise UserError(message if str(path) in message else f"{path}: {message}") from None


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """What an engine is built for: sequences, tokens per sequence (prompt and generated together), numeric type.

    `dtype`: of weights, activations and the KV cache. A prompt longer than `prefill_chunk` tokens takes several forward
    passes, which bounds the memory of each. `weights`: the format in which projections are stored (`formats.names()`);
    those of the layers `keep` are stored dense.
    """

    max_batch_size: int = 8
    max_seq_len: int = 2048
    dtype: str = "float32"
    prefill_chunk: int = 512
    weights: str = "dense"
    keep: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.max_batch_size <= 4096:
            raise UserError(f"--max-batch-size must be from 1 to 4096, found {self.max_batch_size}")
        if self.max_seq_len < 1:
            raise UserError(f"--max-seq-len must be at least 1, found {self.max_seq_len}")
        if self.prefill_chunk < 1:
            raise UserError(f"--prefill-chunk must be at least 1, found {self.prefill_chunk}")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, found {self.dtype}")

    def check_model(self, model: ModelConfig) -> None:
        """Raises UserError if the model's computation differs from ours at these lengths."""
        if self.max_seq_len > model.context:
            raise UserError(f"--max-seq-len {self.max_seq_len} is beyond the model's {model.context} positions")
        if model.sliding_window is not None and self.max_seq_len > model.sliding_window:
            raise UserError(
                f"the model uses sliding-window attention ({model.sliding_window} tokens), which is not supported: "
                f"--max-seq-len {model.sliding_window} or less keeps it out of use"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
