"""4-bit weights as TensorRT-LLM stores them: its algorithm W4A16_AWQ, with zero points and no scales of inputs.

Of our matrix, (codes - zeros) * scales with codes [outputs, inputs] from 0 to 15, its checkpoint has

    NAME.weight                 int8 [outputs / 2, inputs]: codes - 8, signed; the lower half of a byte is the even row
    NAME.weights_scaling_factor [outputs, groups]: the scales
    NAME.zero                   [groups, outputs]: (8 - zeros) * scales, which its kernels add

The layout is that of ModelOpt's `pack_int4_in_uint8`; TensorRT-LLM's loader arranges it for the GPU
(`preprocess_perlayer_weights`). Zero points are as in its loaders of GPTQ checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from cqil_trt import formats
from cqil_trt.backends.tensorrt_llm.names import Names, Part, Spans, read
from cqil_trt.config import DTYPE_BYTES
from cqil_trt.errors import UserError
from cqil_trt.formats import DENSE
from cqil_trt.schedule import Layer
from cqil_trt.shard import RankPlan

FORMAT = "int4"
_GROUPS = (64, 128)  # its kernels have no others
_TILE = 64  # WeightOnlyGroupwiseQuantLinear fills matrices up to multiples of this
_BLOCK_BYTES = 16 << 20


def group_size(plan: RankPlan) -> int:
    """Columns of a group; 0 for dense weights."""
    return 0 if plan.weights == DENSE else int(getattr(formats.load(plan.weights), "group", 0))


def check(ranks: tuple[RankPlan, ...]) -> None:
    """Raises UserError for quantized weights that TensorRT-LLM's layers do not take as they are."""
    plan, p = ranks[0], ranks[0].cqil.p
    group, model = group_size(plan), plan.model
    if not group:
        return
    said = f"--quantize {plan.weights}: TensorRT-LLM's"
    if group not in _GROUPS:
        raise UserError(f"{said} kernels take groups of 64 or 128 columns")
    if plan.dtype == "float32":
        raise UserError(f"{said} kernels compute in float16 or bfloat16: --dtype")
    if p > 1 and (model.o_bias or model.mlp_bias):
        raise UserError(f"{said} loader drops biases of the o and down projections on ranks other than 0")
    steps = plan.schedule.layers
    for parts in sorted({p if isinstance(step, Layer) and step.split else 1 for step in steps}):
        multiple = max(_TILE, group) * parts
        heads = model.num_heads + 2 * max(model.num_kv_heads, parts)
        for name, size in (
            ("hidden elements", model.hidden_size),
            ("query elements", model.num_heads * model.head_dim),
            ("query, key and value elements", heads * model.head_dim),
            ("MLP neurons", model.intermediate_size),
        ):
            if size % multiple:
                raise UserError(f"{said} layers would fill up {size} {name} to a multiple of {multiple}")
    mixed = [place for place, kept in enumerate(_kept(ranks)) if len(kept) > 1]
    if mixed:
        raise UserError(f"{said} configuration is the same for all ranks: --keep whole groups of layers or none of one")


def _kept(ranks: tuple[RankPlan, ...]) -> list[set[bool]]:
    """For each place in the ranks' lists of layers, whether they keep theirs dense."""
    return [
        {step.index in rank.keep for rank, step in zip(ranks, steps)}
        for steps in zip(*(r.schedule.layers for r in ranks))
    ]


def configuration(ranks: tuple[RankPlan, ...]) -> dict[str, Any]:
    """The checkpoint's `quantization`."""
    group = group_size(ranks[0])
    if not group:
        return {"quant_algo": None, "kv_cache_quant_algo": None}
    kept = [f"transformer.layers.{place}.*" for place, found in enumerate(_kept(ranks)) if True in found]
    return {
        "quant_algo": "W4A16_AWQ",
        "kv_cache_quant_algo": None,
        "group_size": group,
        "has_zero_point": True,
        "pre_quant_scale": False,
        "exclude_modules": ["*lm_head", "*vocab_embedding", *kept],
    }


@dataclass(frozen=True, kw_only=True)
class QuantizableNames(Names):
    """Names of layers that take 4-bit weights."""

    def matrix(
        self, plan: RankPlan, layer: int, name: str, ours: str, first: int, shape: tuple[int, int]
    ) -> Iterator[Part]:
        group = group_size(plan)
        if not group or layer in plan.keep:
            yield from super().matrix(plan, layer, name, ours, first, shape)
            return
        rows, columns = shape
        groups = columns // group
        yield _Codes(
            name=f"{name}.weight", shape=(rows // 2, columns), dtype="int8", source=f"{ours}.weight", first=first
        )
        scale = f"{ours}.scale"
        shape = (rows, groups)
        yield Part(
            name=f"{name}.weights_scaling_factor", shape=shape, dtype=plan.dtype, source=scale, first=first * groups
        )
        yield _Zeros(name=f"{name}.zero", shape=(groups, rows), dtype=plan.dtype, source=ours, first=first)


@dataclass(frozen=True, kw_only=True)
class _Codes(Part):
    """`source`: our codes, two columns in a byte. `first`: a row of them."""

    def blocks(self, file: BinaryIO, spans: Spans) -> Iterator[bytes]:
        pairs, columns = self.shape
        file.seek(spans[str(self.source)][0] + self.first * columns // 2)
        step = max(1, _BLOCK_BYTES // columns)
        for pair in range(0, pairs, step):
            count = min(step, pairs - pair)
            packed = np.frombuffer(read(file, count * columns), np.uint8).reshape(2 * count, columns // 2)
            codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(count, 2, columns) ^ 8
            yield (codes[:, 0] | codes[:, 1] << 4).tobytes()


@dataclass(frozen=True, kw_only=True)
class _Zeros(Part):
    """`source`: our projection, with scales and zero points. `first`: a row of them."""

    def blocks(self, file: BinaryIO, spans: Spans) -> Iterator[bytes]:
        groups, rows = self.shape

        def take(part: str, size: int, kind: Any) -> np.ndarray:
            file.seek(spans[f"{self.source}.{part}"][0] + self.first * groups * size)
            return np.frombuffer(read(file, rows * groups * size), kind).reshape(rows, groups)

        zeros = take("zero", 1, np.uint8).astype(np.float32)
        scales = take("scale", DTYPE_BYTES[self.dtype], np.float16 if self.dtype == "float16" else np.uint16)
        if self.dtype == "float16":
            yield ((8 - zeros) * scales.astype(np.float32)).astype(np.float16).T.tobytes()
            return
        product = (8 - zeros) * (scales.astype(np.uint32) << 16).view(np.float32)
        # To the nearest bfloat16, which is half of a float32, and to the even one of two.
        bits = product.view(np.uint32)
        yield ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).T.tobytes()
