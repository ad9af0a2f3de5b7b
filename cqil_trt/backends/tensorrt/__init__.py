"""Backend tensorrt: compiles a rank's network with TensorRT or TensorRT-RTX, and executes it on GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cqil_trt import formats
from cqil_trt.backends import Backend, Compilation, Description, Option
from cqil_trt.config import KV_DTYPES, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.model import Feature
from cqil_trt.shard import RankPlan

if TYPE_CHECKING:
    from cqil_trt.engine import Engine
    from cqil_trt.session import Session


class TensorRtBackend(Backend):
    name = "tensorrt"
    packages = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}
    formats = formats.names()
    # With our plugins; TensorRT's own attention layers have no caps (`compiler.describe`).
    features = frozenset(Feature)
    kv_dtypes = KV_DTYPES  # in our plugins (`compiler.describe`)
    verifies_weights = True
    options = (
        Option(
            name="target",
            help='build with TensorRT-RTX, for "portable" or compute capabilities like 8.6,8.9',
            keywords={"metavar": "LIST"},
        ),
        Option(
            name="collective",
            help="what the ranks communicate through (default: plugin where possible)",
            choices=("plugin", "nccl"),
        ),
        Option(
            name="timing_cache",
            help="timing cache file (default: next to the engine)",
            keywords={"metavar": "NAME"},
        ),
        Option(
            name="save_network_json",
            help="write the names, shapes and types of all layers to a JSON file",
            keywords={"action": "store_true"},
        ),
        Option(name="verbose", help="show TensorRT's own warnings and errors", keywords={"action": "store_true"}),
    )

    def rank_files(self, rank: int) -> tuple[str, ...]:
        return f"rank{rank}.safetensors", f"rank{rank}.engine"

    def describe(self, limits: EngineLimits, options: Mapping[str, Any], ranks: tuple[RankPlan, ...]) -> Description:
        from cqil_trt.backends.tensorrt.compiler import describe

        return describe(limits, options, ranks)

    def compile(self, compilation: Compilation) -> None:
        from cqil_trt.backends.tensorrt.compiler import compile_rank

        compile_rank(compilation)

    def check_runnable(self, engine: Engine, device: str) -> None:
        if device == "cpu":
            raise UserError("--device cpu: a TensorRT engine runs on a GPU")
        from cqil_trt.gpu import cuda

        if not cuda.device_count():
            raise UserError(f"{engine.path}: a TensorRT engine runs on a GPU, and there is none here")

    def open_session(self, engine: Engine, comm: Any, device: str, number: int, slots: int) -> Session:
        self.check_runnable(engine, device)
        from cqil_trt.backends.tensorrt.session import TensorRtSession

        return TensorRtSession(engine, comm, number)


BACKEND = TensorRtBackend()
