"""Backend tensorrt-llm: a TensorRT-LLM checkpoint and, where tensorrt_llm is installed, engines built from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cqil_trt.backends import Backend, Compilation, CompiledEngine, Description, Option
from cqil_trt.config import EngineLimits
from cqil_trt.shard import RankPlan

if TYPE_CHECKING:
    from cqil_trt.engine import Engine
    from cqil_trt.session import Session

# Ours (the runtime's process must share a workspace), or TensorRT-LLM's own.
COLLECTIVES = ("plugin", "trtllm")


class TensorRtLlmBackend(Backend):
    name = "tensorrt-llm"
    packages = {"tensorrt_llm": "tensorrt-llm", "tensorrt": "tensorrt-llm", "cuda": "tensorrt-llm"}
    options = (Option(name="collective", help="what joins ranks (default plugin where possible)", choices=COLLECTIVES),)

    def rank_files(self, rank: int) -> tuple[str, ...]:
        return (f"checkpoint/rank{rank}.safetensors",)

    def describe(self, limits: EngineLimits, options: Mapping[str, Any], ranks: tuple[RankPlan, ...]) -> Description:
        from cqil_trt.backends.tensorrt_llm.checkpoint import describe

        return describe(options, ranks)

    def compile(self, compilation: Compilation) -> None:
        from cqil_trt.backends.tensorrt_llm.checkpoint import write_rank

        write_rank(compilation)

    def finish(self, compiled: CompiledEngine) -> None:
        from cqil_trt.backends.tensorrt_llm.checkpoint import finish

        finish(compiled)

    def open_session(self, engine: Engine, comm: Any, device: str, number: int, slots: int) -> Session:
        from cqil_trt.backends.tensorrt_llm.checkpoint import check_runnable

        check_runnable(engine, device)
        from cqil_trt.backends.tensorrt_llm.session import TensorRtLlmSession

        return TensorRtLlmSession(engine, comm, number)


BACKEND = TensorRtLlmBackend()
