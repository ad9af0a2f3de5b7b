"""Which layers run concurrently (`CqilConfig`), and what an engine is built for (`EngineLimits`). No tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cqil_trt.errors import UserError
from cqil_trt.json_fields import Fields, read_json
from cqil_trt.model import ModelConfig

DTYPES = ("float32", "float16", "bfloat16")
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "float8_e4m3fn": 1}
# How the KV cache is stored: in the engine's type, or in FP8 (E4M3).
KV_DTYPES = AUTO, KV_FP8 = ("auto", "fp8")
PLACEMENTS = ("sharded", "leader", "tensor")
BYPASSES = ("mlp", "residual")
MAX_RANKS = 8
# What kernels have room for in a grid (cqil_attention).
_MAX_CHUNK = 65535
# The first split layers, whose attention joins `auto:N` drops last.
KEPT_JOINED = 3
# The file in a PEFT adapter's directory that holds the CQIL configuration it was trained for.
ADAPTER_FILE = "cqil_config.json"


def layer_list(layers: Sequence[int]) -> str:
    """Ascending layers in short form: 4, 5, 6, 28 become `4-6,28`."""
    runs: list[tuple[int, int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], layer
        else:
            runs.append((layer, layer))
    return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)


@dataclass(frozen=True, kw_only=True)
class CqilConfig:
    """Which layers run concurrently and where the others run.

    Groups of `p` consecutive layers fill `[start, end)`; layer j of a group also receives the attention
    outputs of the `d` layers just before it. Each layer of a group is split over `ranks_per_layer` ranks, so there are
    `p * ranks_per_layer` ranks. `drop_attention_join`: split layers without the all-reduce after attention, in
    ascending order (docs/architecture.md).
    """

    p: int
    d: int = 0
    start: int = 0
    end: int = 0
    bypass: str = "mlp"
    placement: str = "sharded"
    drop_attention_join: tuple[int, ...] = ()
    ranks_per_layer: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "drop_attention_join", tuple(sorted(self.drop_attention_join)))
        if not 1 <= self.p <= MAX_RANKS:
            raise UserError(f"--p must be from 1 to {MAX_RANKS}, found {self.p}")
        if self.ranks_per_layer < 1:
            raise UserError(f"--ranks-per-layer must be at least 1, found {self.ranks_per_layer}")
        if self.ranks > MAX_RANKS:
            raise UserError(
                f"--p {self.p} times --ranks-per-layer {self.ranks_per_layer} is {self.ranks} ranks: at most "
                f"{MAX_RANKS} are supported"
            )
        if not 0 <= self.d < self.p:
            raise UserError(f"--d must be at least 0 and below --p {self.p}, found {self.d}")
        if not 0 <= self.start <= self.end:
            raise UserError(f"--start {self.start} and --end {self.end}: need 0 <= start <= end")
        if (self.end - self.start) % self.p:
            layers = self.end - self.start
            if layers > self.p:
                fits = f"--end {self.end - layers % self.p}"
            else:  # fewer than one group
                smaller = f"--p {layers}, or " if layers > 1 else ""
                fits = f"{smaller}--end {self.start + self.p} if there are so many layers"
            raise UserError(
                f"--p {self.p} does not divide the {layers} layers of [{self.start}, {self.end}): try {fits}"
            )
        if self.bypass not in BYPASSES:
            raise UserError(f"--bypass must be one of {', '.join(BYPASSES)}, found {self.bypass}")
        if self.placement not in PLACEMENTS:
            raise UserError(f"--placement must be one of {', '.join(PLACEMENTS)}, found {self.placement}")
        if self.placement == "tensor" and (self.start != self.end or self.d):
            raise UserError("--placement tensor has no groups: start must equal end and d must be 0")
        if self.placement == "leader" and self.ranks_per_layer > 1:
            raise UserError(
                f"--ranks-per-layer {self.ranks_per_layer}: placement leader runs whole layers on each rank: use "
                "placement sharded"
            )
        if self.drop_attention_join:
            self._check_dropped()

    def _check_dropped(self) -> None:
        dropped = self.drop_attention_join
        said = f"--drop-attention-join {layer_list(dropped)}"
        if not self._splits:
            why = "--p 1" if self.ranks == 1 else f"--placement {self.placement}"
            raise UserError(f"{said}: with {why} no layer is split over the ranks, so there is no join to drop")
        for layer, following in zip(dropped, (*dropped[1:], None)):
            if layer < 0:
                raise UserError(f"{said}: there is no layer {layer}")
            if layer == following:
                raise UserError(f"{said}: names layer {layer} more than once")
            if not self._grouped(layer):
                continue
            if self.ranks_per_layer == 1:
                raise UserError(
                    f"{said}: layer {layer} is in a group of [{self.start}, {self.end}), and only the split layers "
                    "outside the groups have a join after attention"
                )
            if self.d:
                raise UserError(
                    f"{said}: layer {layer} is in a group of [{self.start}, {self.end}), whose bypass (--d {self.d}) "
                    "adds up whole attention outputs: only layers outside the groups can do without the join"
                )

    @property
    def ranks(self) -> int:
        """How many ranks an engine has."""
        return self.p * self.ranks_per_layer

    @property
    def _splits(self) -> bool:
        """Whether the ranks share the layers outside the groups."""
        return self.ranks > 1 and self.placement != "leader"

    def split_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers outside the groups that all ranks share, in a model of `num_layers` layers."""
        return tuple(i for i in range(num_layers) if self._splits and not self._grouped(i))

    def sharing(self, layer: int) -> int:
        """How many ranks share a layer."""
        if self._grouped(layer):
            return self.ranks_per_layer
        return self.ranks if self._splits else 1

    def _grouped(self, layer: int) -> bool:
        """Whether a layer is in a group."""
        return self.p > 1 and self.start <= layer < self.end

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The layers of each concurrent group; empty when p == 1, where a group is an ordinary layer."""
        if self.p == 1:
            return ()
        return tuple(tuple(range(i, i + self.p)) for i in range(self.start, self.end, self.p))

    @property
    def summary(self) -> str:
        """The configuration without the placement: `p=2 d=1 mlp [12, 30), attention joins dropped in 4-11`.

        With several ranks per layer, `p=2x2 d=0 [12, 30)`; where no layers run concurrently, `p=1 d=0, no groups`.
        """
        bypass = f" {self.bypass}" if self.d else ""
        dropped = f", attention joins dropped in {layer_list(drop)}" if (drop := self.drop_attention_join) else ""
        layers = f" [{self.start}, {self.end})" if self.groups else ", no groups"
        return f"p={self._size} d={self.d}{bypass}{layers}{dropped}"

    @property
    def _size(self) -> str:
        return f"{self.p}x{self.ranks_per_layer}" if self.ranks_per_layer > 1 else f"{self.p}"

    @property
    def name(self) -> str:
        """As part of a directory's name, without bypass and placement: `p2-d1-12-30-drop4-11_30`, `p2x2-d0-12-30`."""
        dropped = layer_list(self.drop_attention_join).replace(",", "_")
        return f"p{self._size}-d{self.d}-{self.start}-{self.end}" + (f"-drop{dropped}" if dropped else "")

    @property
    def changed_layers(self) -> tuple[int, ...]:
        """The layers that compute something else than in the original model, in ascending order."""
        grouped = (layer for group in self.groups for layer in group)
        return tuple(sorted((*grouped, *self.drop_attention_join)))

    def computes_as(self, other: CqilConfig) -> bool:
        """Whether both change the model in the same way, wherever they place its layers."""
        return self._computation() == other._computation()

    def _computation(self) -> dict[str, Any]:
        """The fields that decide what is computed."""
        values = {name: value for name, value in asdict(self).items() if name != "placement"}
        if not self.drop_attention_join:  # else the number of ranks does
            del values["ranks_per_layer"]
        elif not self.groups:
            values |= {"p": self.ranks, "ranks_per_layer": 1, "start": 0, "end": 0}
        return values

    def check_depth(self, num_layers: int) -> None:
        """Raises UserError when a layer is beyond a model of `num_layers` layers."""
        if self.end > num_layers:
            raise UserError(f"--end {self.end} is beyond the model, which has {num_layers} layers")
        if self.drop_attention_join and (last := self.drop_attention_join[-1]) >= num_layers:
            raise UserError(
                f"--drop-attention-join: layer {last} is beyond the model, whose layers are 0 to {num_layers - 1}"
            )

    def dropping(self, wanted: str | Iterable[int], num_layers: int) -> CqilConfig:
        """The same configuration with the attention joins of the layers `wanted` dropped, and no others.

        `wanted`: layers; or text, `4-11,28-31`, `none`, or `auto:N`: N of the layers that all ranks share, from their
        middle, where it costs least, and the first KEPT_JOINED only when there are no others (measured in
        docs/quality.md; layers of a group are dropped only by number). Raises UserError
        for layers that have no such join, or are beyond a model of `num_layers` layers.
        """
        layers = self._parse_dropped(wanted, num_layers) if isinstance(wanted, str) else tuple(wanted)
        config = replace(self, drop_attention_join=layers)
        config.check_depth(num_layers)
        return config

    def _parse_dropped(self, text: str, num_layers: int) -> tuple[int, ...]:
        if text == "none":
            return ()
        if match := re.fullmatch(r"auto:(\d{1,4})", text):
            split, count = self.split_layers(num_layers), int(match[1])
            if count > len(split):
                none = "no layers are split over the ranks, which takes placement sharded or tensor and two ranks"
                only = f"only {len(split)} layers are split over the ranks"
                raise UserError(f"--drop-attention-join {text}: {only if split else none}")
            left = len(split) - count
            first = min(max(left // 2, KEPT_JOINED), left)
            return split[first : first + count]
        layers: list[int] = []
        for part in text.split(","):
            match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if first > last:
                raise UserError(f"--drop-attention-join {text:.60}: expected layers like 4-11,28-31, auto:N or none")
            layers += range(first, last + 1)
        return tuple(layers)

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
        drop_attention_join: str | Iterable[int] = (),
        ranks_per_layer: int = 1,
    ) -> CqilConfig:
        """A configuration for a model of `num_layers` layers; `start` and `end` default to its middle.

        `drop_attention_join`: as `dropping` takes it.

        The middle is where neighbouring layers' inputs are most alike. The first 40% of the layers and the last
        sixteenth stay sequential, close to what the authors published (12..30 of 32 layers, 17..37 of 40).
        """
        if end is not None and end > num_layers:
            raise UserError(f"--end {end} is beyond the model, which has {num_layers} layers")
        fixed: dict[str, Any] = {"p": p, "ranks_per_layer": ranks_per_layer, "placement": placement}
        if placement == "tensor":
            return cls(**fixed).dropping(drop_attention_join, num_layers)
        cls(**fixed, d=d, bypass=bypass)  # p and d are checked before they are divided by
        if start is None:
            limit = num_layers if end is None else end
            start = min(int(0.4 * num_layers), limit)
            if end is not None:
                start += (end - start) % p
        if end is None:
            limit = num_layers - max(1, num_layers // 16)
            end = start + max(0, limit - start) // p * p
        config = cls(**fixed, d=d, start=start, end=end, bypass=bypass)
        return config.dropping(drop_attention_join, num_layers)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save_with_adapter(self, directory: Path) -> None:
        """Writes what is computed, not where, into the directory of an adapter trained for it."""
        (directory / ADAPTER_FILE).write_text(json.dumps(self._computation(), indent=1) + "\n")

    @classmethod
    def of_adapter(cls, directory: Path) -> CqilConfig | None:
        """What the adapter in `directory` was trained for; None if it does not say. Raises UserError if malformed."""
        path = directory / ADAPTER_FILE
        if not path.exists():
            return None
        return cls.of_fields(Fields(read_json(path), str(path)))

    @classmethod
    def of_fields(cls, values: Fields) -> CqilConfig:
        """The configuration in a JSON object as `to_dict` makes it; only the numbers p, d, start and end must be there.

        Raises UserError, naming the source, for a malformed one.
        """
        try:
            return cls(
                p=values.integer("p", low=0),
                d=values.integer("d", low=0),
                start=values.integer("start", low=0),
                end=values.integer("end", low=0),
                bypass=values.text("bypass", "mlp"),
                placement=values.text("placement", "sharded"),
                drop_attention_join=values.integers("drop_attention_join", "a layer or a list of them"),
                ranks_per_layer=values.integer("ranks_per_layer", 1, low=0),
            )
        except UserError as error:
            message = str(error)
            raise UserError(message if values.source in message else f"{values.source}: {message}") from None


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """What an engine is built for: sequences, tokens per sequence (prompt and generated together), numeric type.

    `dtype`: of weights and activations, and of the KV cache where `kv_dtype`, one of KV_DTYPES, is "auto". `kv_scales`:
    the scales of an FP8 cache's keys and values, by layer; empty where all are 1. A prompt longer than `prefill_chunk`
    tokens takes several forward passes, which bounds the memory of each. `weights`: the format in which projections are
    stored (`formats.names()`); those of the layers `keep` are stored dense. `head`: the format of the last projection.
    `circle`: how many positions the cache of a layer with a window holds of a sequence, position p at p % circle; None:
    max_seq_len, as those of other layers (`scheduler.Circle`).
    """

    max_batch_size: int = 8
    max_seq_len: int = 2048
    dtype: str = "float32"
    prefill_chunk: int = 512
    weights: str = "dense"
    keep: tuple[int, ...] = ()
    head: str = "dense"
    kv_dtype: str = AUTO
    kv_scales: tuple[tuple[float, float], ...] = ()
    circle: int | None = None

    @property
    def cache_dtype(self) -> str:
        """The type of the KV cache's elements, one of DTYPE_BYTES."""
        return self.dtype if self.kv_dtype == AUTO else "float8_e4m3fn"

    def cache_length(self, window: int | None) -> int:
        """How many positions of a sequence the cache of a layer with this window (None: without) holds."""
        return self.max_seq_len if window is None or self.circle is None else self.circle

    def scales_of(self, layer: int) -> tuple[float, float]:
        """The scales of a layer's keys and values: the cache holds what they are divided by these."""
        return self.kv_scales[layer] if self.kv_scales else (1.0, 1.0)

    @property
    def quantized(self) -> bool:
        """Whether any matrix is stored in another format than dense."""
        return {self.weights, self.head} != {"dense"}

    def __post_init__(self) -> None:
        if not 1 <= self.max_batch_size <= 4096:
            raise UserError(f"--max-batch-size must be from 1 to 4096, found {self.max_batch_size}")
        if self.max_seq_len < 1:
            raise UserError(f"--max-seq-len must be at least 1, found {self.max_seq_len}")
        if not 1 <= self.prefill_chunk <= _MAX_CHUNK:
            raise UserError(f"--prefill-chunk must be from 1 to {_MAX_CHUNK}, found {self.prefill_chunk}")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, found {self.dtype}")
        if self.circle is not None and not 0 < self.circle < self.max_seq_len:
            raise ValueError(f"a circle of {self.circle} positions, sequences of {self.max_seq_len}")
        if self.kv_dtype == AUTO and self.kv_scales:
            raise ValueError("scales of a KV cache that has none")
        if self.kv_dtype not in KV_DTYPES:
            raise UserError(f"--kv-dtype must be one of {', '.join(KV_DTYPES)}, found {self.kv_dtype}")

    def check_model(self, model: ModelConfig) -> None:
        """Raises UserError if the model's computation differs from ours at these lengths."""
        if self.max_seq_len > model.context:
            raise UserError(f"--max-seq-len {self.max_seq_len} is beyond the model's {model.context} positions")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineLimits:
        """What `to_dict` made, also after JSON. Raises TypeError, ValueError or KeyError for something else."""
        scales = tuple((float(keys), float(of_values)) for keys, of_values in values.get("kv_scales", ()))
        return cls(**{**values, "keep": tuple(values["keep"]), "kv_scales": scales})
