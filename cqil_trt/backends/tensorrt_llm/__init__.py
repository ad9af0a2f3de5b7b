"""Backend tensorrt-llm: directories that TensorRT-LLM builds or serves, for one of its two runtimes (`--target`).

export.py     both targets: what is refused, how the ranks' layers map to TensorRT-LLM's, the ranks' files
names.py      a rank's tensors under either target's names
versions.py   which releases have which runtime
engine/       target `engine`: a checkpoint for trtllm-build and, where tensorrt_llm is installed, its engines
pytorch/      target `pytorch`: a checkpoint for its PyTorch backend, and the model to load it with
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cqil_trt import formats
from cqil_trt.backends import Backend, Compilation, CompiledEngine, Description, Option
from cqil_trt.config import EngineLimits
from cqil_trt.model import ModelConfig
from cqil_trt.shard import RankPlan

if TYPE_CHECKING:
    from cqil_trt.engine import Engine
    from cqil_trt.session import Session

# Ours (the runtime's process must share a workspace), or TensorRT-LLM's own.
COLLECTIVES = ("plugin", "trtllm")


class TensorRtLlmBackend(Backend):
    name = "tensorrt-llm"
    head_formats = (formats.DENSE,)
    formats = (formats.DENSE, "int4")
    packages = {"tensorrt_llm": "tensorrt-llm", "tensorrt": "tensorrt-llm"}
    options = (
        Option(name="collective", help="what joins ranks (default plugin where possible)", choices=COLLECTIVES),
        Option(
            name="target",
            help="engine (TensorRT-LLM 0.20 to 1.2) or pytorch (1.2 and later): its runtime (default engine, and "
            "pytorch where a release without engines is installed)",
        ),
    )

    def rank_files(self, rank: int) -> tuple[str, ...]:
        return (f"checkpoint/rank{rank}.safetensors",)

    def check_model(self, model: ModelConfig, limits: EngineLimits) -> None:
        from cqil_trt.backends.tensorrt_llm.export import check_format, check_rope

        check_format(limits)
        super().check_model(model, limits)
        check_rope(model)

    def describe(self, limits: EngineLimits, options: Mapping[str, Any], ranks: tuple[RankPlan, ...]) -> Description:
        from cqil_trt.backends.tensorrt_llm.export import describe

        return describe(options, ranks)

    def compile(self, compilation: Compilation) -> None:
        from cqil_trt.backends.tensorrt_llm.export import write_rank

        write_rank(compilation)

    def finish(self, compiled: CompiledEngine) -> None:
        from cqil_trt.backends.tensorrt_llm.export import target

        target(compiled.description.build).finish(compiled)

    def check_runnable(self, engine: Engine, device: str) -> None:
        from cqil_trt.backends.tensorrt_llm.export import target

        target(engine.build).check_runnable(engine, device)

    def open_session(self, engine: Engine, comm: Any, device: str, number: int, slots: int) -> Session:
        self.check_runnable(engine, device)
        from cqil_trt.backends.tensorrt_llm.engine.session import TensorRtLlmSession

        return TensorRtLlmSession(engine, comm, number)


BACKEND = TensorRtLlmBackend()
