"""Backend onnx: each rank's network as an ONNX file, for inspection and as the input of other compilers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cqil_trt.backends import Backend, Compilation, Description
from cqil_trt.config import KV_DTYPES, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.model import Feature
from cqil_trt.shard import RankPlan

if TYPE_CHECKING:
    from cqil_trt.engine import Engine
    from cqil_trt.session import Session


class OnnxBackend(Backend):
    name = "onnx"
    packages = {"onnx": "onnx"}
    features = frozenset(Feature)
    kv_dtypes = KV_DTYPES

    def rank_files(self, rank: int) -> tuple[str, ...]:
        return f"rank{rank}.safetensors", f"rank{rank}.onnx"

    def describe(self, limits: EngineLimits, options: Mapping[str, Any], ranks: tuple[RankPlan, ...]) -> Description:
        import onnx

        return Description(version=f"onnx {onnx.__version__}")

    def compile(self, compilation: Compilation) -> None:
        from cqil_trt.backends.onnx.network import write_network

        write_network(compilation)

    def open_session(self, engine: Engine, comm: Any, device: str, number: int, slots: int) -> Session:
        if device == "cuda":
            raise UserError("--device cuda: this backend computes on the CPU")
        from cqil_trt.backends.onnx.session import OnnxSession

        return OnnxSession(engine, comm, slots)


BACKEND = OnnxBackend()
