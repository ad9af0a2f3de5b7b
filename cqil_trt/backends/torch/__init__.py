"""Backend torch: the weights are the engine. PyTorch executes it on CPUs, our kernels on GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cqil_trt import formats
from cqil_trt.backends import Backend, Description
from cqil_trt.config import KV_DTYPES, EngineLimits
from cqil_trt.model import Feature
from cqil_trt.shard import RankPlan

if TYPE_CHECKING:
    from cqil_trt.engine import Engine
    from cqil_trt.session import Session


class TorchBackend(Backend):
    name = "torch"
    packages = {"torch": "torch"}
    dynamic_rope = True
    features = frozenset(Feature)
    verifies_weights = True
    formats = formats.names()
    kv_dtypes = KV_DTYPES

    def describe(self, limits: EngineLimits, options: Mapping[str, Any], ranks: tuple[RankPlan, ...]) -> Description:
        import torch

        notes: tuple[str, ...] = ()
        if limits.quantized and limits.dtype != "bfloat16":
            notes = (f"on CPUs in {limits.dtype}, quantized matrices are dequantized when the engine is loaded",)
        return Description(version=f"torch {torch.__version__}", notes=notes, circles=True)

    def open_session(self, engine: Engine, comm: Any, device: str, number: int, slots: int) -> Session:
        from cqil_trt.backends.torch.opening import open_session

        return open_session(engine, comm, device, number, slots)


BACKEND = TorchBackend()
