"""Predicts decode latency on GPUs from the schedule, to choose a configuration before building it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cqil_trt import formats
from cqil_trt.config import AUTO, CqilConfig, EngineLimits
from cqil_trt.formats import DENSE
from cqil_trt.formats.quantized import MatrixPart
from cqil_trt.model import ModelConfig
from cqil_trt.shard import RankPlan, plan

# Tokens in the KV cache that attention reads within `Machine.layer`.
SHORT = 200


@dataclass(frozen=True)
class Machine:
    """The components of decode latency at batch 1: bytes per second, and seconds.

    The defaults are for two H200 over NVLink with the torch backend's kernels. `bandwidth` is that of a
    device-to-device copy; `collective` and `layer` (norms, attention at a short context, launches) were fitted to
    measurements of LLaMA-7B, and predict Qwen1.5-14B within 2% in every placement (see docs/performance.md).
    `quantized`: the part of the bandwidth at which quantized weights are read, by format. Fitted to LLaMA-7B too (int8
    as fp8), and within 3% of every placement (docs/quantization.md). `cache`: the part of the bandwidth at which
    attention reads a KV cache beyond SHORT tokens; fitted to what LLaMA-7B and Qwen1.5-14B take more at 4,096 tokens in
    16 bits, and within 3% and 12% of it in every placement. `dropped`, `dropped_quantized`: what a dropped join still
    takes, because the product that follows computes the norm. Of one of four ranks of LLaMA-7B without its peers, which
    add 0.7 µs to a join, dropping one saved nothing in float16 and 2.5 to 2.9 µs in int4 (docs/performance.md).
    """

    bandwidth: float = 4.3e12
    collective: float = 4.5e-6
    layer: float = 14e-6
    quantized: Mapping[str, float] = field(default_factory=lambda: {"fp8": 1.0, "int8": 1.0, "int4": 0.73}, hash=False)
    cache: float = 0.84
    dropped: float = 3.8e-6
    dropped_quantized: float = 1.0e-6


H200 = Machine()
# Two H100 (80 GB, NVLink): the bandwidth that they read with, everything else as on H200s. Within 5% of every placement
# of LLaMA-7B there (docs/performance.md).
H100 = Machine(bandwidth=3.03e12)
# By the names that `similarity.py --gpu` takes.
MACHINES: Mapping[str, Machine] = {"h200": H200, "h100": H100}


def decode_seconds(
    model: ModelConfig,
    cqil: CqilConfig,
    dtype: str,
    machine: Machine = H200,
    weights: str = DENSE,
    context: int = SHORT,
    kv_dtype: str = AUTO,
    head: str = DENSE,
) -> float:
    """Predicted seconds per token at batch 1: the slowest rank's weights, its KV cache, its layers, its collectives.

    `weights`: the format of the layers' matrices. `context`: tokens in the cache. `kv_dtype`, `head`: as in
    `EngineLimits`.
    """
    cached = EngineLimits(dtype=dtype, kv_dtype=kv_dtype).cache_dtype
    more = max(0, context - SHORT) / (machine.cache * machine.bandwidth)
    return max(
        _rank_seconds(rank, machine) + more * rank.cache_bytes_per_token(cached)
        for rank in plan(model, cqil, dtype, weights, head=head)
    )


def critical_bytes(model: ModelConfig, cqil: CqilConfig, dtype: str, weights: str = DENSE) -> int:
    """Weight bytes per token of the rank that reads the most."""
    return max(rank.bytes_per_token for rank in plan(model, cqil, dtype, weights))


def _rank_seconds(rank: RankPlan, machine: Machine) -> float:
    codes = [tensor for tensor in rank.tensors if isinstance(tensor, MatrixPart)]
    head = sum(tensor.nbytes for tensor in codes if tensor.name.startswith("lm_head."))
    layers = sum(tensor.nbytes for tensor in codes) - head

    def rate(stored: str) -> float:
        return machine.quantized.get(formats.base(stored), 1.0) * machine.bandwidth

    dropped = sum(step.drops_join for step in rank.schedule.layers)
    return (
        (rank.bytes_per_token - layers - head) / machine.bandwidth
        + layers / rate(rank.weights)
        + head / rate(rank.head)
        + len(rank.schedule.layers) * machine.layer
        + rank.collectives * machine.collective
        + dropped * (machine.dropped_quantized if layers else machine.dropped)
    )
