"""Predicts decode latency on GPUs from the schedule, to choose a configuration before building it."""

from __future__ import annotations

from dataclasses import dataclass

from cqil_trt.config import CqilConfig
from cqil_trt.formats import DENSE
from cqil_trt.model import ModelConfig
from cqil_trt.shard import RankPlan, plan


@dataclass(frozen=True)
class Machine:
    """The components of decode latency at batch 1: bytes per second, and seconds.

    The defaults are for two H200 over NVLink with the torch backend's kernels. `bandwidth` is that of a
    device-to-device copy; `collective` and `layer` (norms, attention at a short context, launches) were fitted to
    measurements of LLaMA-7B, and predict Qwen1.5-14B within 2% in every placement (see docs/performance.md).
    """

    bandwidth: float = 4.3e12
    collective: float = 4.5e-6
    layer: float = 14e-6


H200 = Machine()


def decode_seconds(
    model: ModelConfig, cqil: CqilConfig, dtype: str, machine: Machine = H200, weights: str = DENSE
) -> float:
    """Predicted seconds per token at batch 1: the slowest rank's weights, its layers, its collectives.

    `weights`: the format of the layers' matrices. For quantized ones it supposes kernels that read them as fast.
    """
    return max(_rank_seconds(rank, machine) for rank in plan(model, cqil, dtype, weights))


def critical_bytes(model: ModelConfig, cqil: CqilConfig, dtype: str, weights: str = DENSE) -> int:
    """Weight bytes per token of the rank that reads the most."""
    return max(rank.bytes_per_token for rank in plan(model, cqil, dtype, weights))


def _rank_seconds(rank: RankPlan, machine: Machine) -> float:
    return (
        rank.bytes_per_token / machine.bandwidth
        + len(rank.schedule.layers) * machine.layer
        + rank.collectives * machine.collective
    )
