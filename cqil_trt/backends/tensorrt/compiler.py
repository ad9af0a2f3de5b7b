"""Compiles a rank's network with TensorRT or TensorRT-RTX.

Build options: `target` (compute capabilities for TensorRT-RTX, which needs no GPU to build), `collective` ("plugin" or
"nccl"), `timing_cache` (a file name prefix, next to the engine unless absolute), `save_network_json`, `verbose`.
"""

from __future__ import annotations

import glob
import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cqil_trt.backends import Compilation, Description, lacking
from cqil_trt.backends.tensorrt import BACKEND
from cqil_trt.backends.tensorrt.network import Lowering, add_profiles, define_network, describe_network
from cqil_trt.config import AUTO, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.gpu import tensorrt_plugins
from cqil_trt.gpu.fused_ops import too_large
from cqil_trt.gpu.sources import source_version
from cqil_trt.model import Feature
from cqil_trt.schedule import Group
from cqil_trt.shard import RankPlan

# Compute capabilities that TensorRT-RTX can build for, and its names for them.
TARGETS = {"7.5": "SM75", "8.0": "SM80", "8.6": "SM86", "8.9": "SM89", "12.0": "SM120", "12.1": "SM121"}
_PORTABLE = "8.0,8.6,8.9,12.0"
_PACKAGES = ("tensorrt", "tensorrt_rtx")
_COLLECTIVES = next(option.choices or () for option in BACKEND.options if option.name == "collective")


def import_package(names: tuple[str, ...] = _PACKAGES) -> Any:
    """The first of the packages that is installed. Raises ModuleNotFoundError."""
    for name in names[:-1]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    return importlib.import_module(names[-1])


def version(trt: Any) -> str:
    return f"{trt.__name__} {trt.__version__}"


def describe(limits: EngineLimits, options: Mapping[str, Any], ranks: tuple[RankPlan, ...]) -> Description:
    """Chooses the package and the collective. Raises UserError for what they cannot do."""
    target = options.get("target")
    trt = import_package(("tensorrt_rtx",) if target else _PACKAGES)
    lowering = Lowering.of(trt)
    if limits.dtype == "bfloat16" and not hasattr(trt, "bfloat16"):
        raise UserError(f"--dtype bfloat16: TensorRT {trt.__version__} does not have it: use float16 or float32")
    model = ranks[0].model
    if lowering.native and Feature.ATTENTION_CAP in model.features(limits.max_seq_len):
        missing = lacking(model, [Feature.ATTENTION_CAP], BACKEND.name)
        raise UserError(f"--backend tensorrt with {version(trt)}: {missing}, or TensorRT before 10.15")
    if limits.kv_dtype != AUTO and lowering.native:
        raise UserError(
            f"--kv-dtype {limits.kv_dtype}: attention of {version(trt)} takes a KV cache of the engine's type: "
            "use backend torch, or TensorRT 8.5 to 10.14 with our plugins"
        )
    if not lowering.native and (found := too_large(model)):
        raise UserError(f"--backend tensorrt with {version(trt)}: the model has {found}: use backend torch on CPUs")
    collective = options.get("collective") or ("plugin" if lowering.plugins else "nccl")
    if collective not in _COLLECTIVES:
        raise UserError(f"--collective must be one of {', '.join(_COLLECTIVES)}, found {collective}")
    if collective == "plugin" and not lowering.plugins:
        raise UserError(f"--collective plugin: the Python interface of {version(trt)} takes no plugins: use nccl")
    if collective == "nccl" and not lowering.nccl:
        raise UserError(f"--collective nccl: {version(trt)} has no collective layer: use plugin")
    # A join of a part of the ranks takes all of them there (network.py), so all must have it.
    joins = {tuple(step.all_reduces for step in rank.schedule.layers if isinstance(step, Group)) for rank in ranks}
    if collective == "nccl" and len(joins) > 1:
        raise UserError(
            "--collective nccl: --drop-attention-join must name all layers of a group or none, because NCCL's join "
            "takes all ranks"
        )
    built = {"collective": collective}
    if lowering.plugins:
        built["plugins"] = source_version()
    # TensorRT's layer that updates a cache writes positions one after the other only (KVCacheMode has LINEAR alone).
    circles = not lowering.native
    return Description(version=version(trt), architecture=_architecture(trt, target), build=built, circles=circles)


def _architecture(trt: Any, target: str | None) -> str:
    """The compute capabilities an engine will run on, like "8.6, 8.9"."""
    if trt.__name__ == "tensorrt":
        from cqil_trt.gpu import cuda

        if not cuda.device_count():
            raise UserError(
                "TensorRT compiles on the GPU it compiles for, and there is none: --target uses TensorRT-RTX"
            )
        cuda.use_device(0)
        return cuda.compute_capability()
    parts = (_PORTABLE if target in (None, "portable") else target).split(",")
    chosen = list(dict.fromkeys(part.strip() for part in parts))
    for part in chosen:
        if not hasattr(trt.ComputeCapability, TARGETS.get(part, "")):
            raise UserError(f"--target {part}: TensorRT-RTX builds for portable or a list of {', '.join(TARGETS)}")
    return ", ".join(chosen)


def logger(trt: Any, verbose: bool = False) -> Any:
    """A logger of that package that keeps the first error, as later ones only follow from it.

    `verbose`: warnings and errors go to standard error as well.
    """

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.first_error = ""

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                self.first_error = self.first_error or message.strip()
            if verbose and int(severity) <= int(trt.ILogger.WARNING):
                print(f"{trt.__name__}: {message.strip()}", file=sys.stderr)

    return Log()


def compile_rank(compilation: Compilation) -> None:
    """Builds rank{r}.engine. Raises UserError with TensorRT's first error."""
    package = compilation.description.version.split()[0]
    trt = import_package((package,))
    library = None
    if package == "tensorrt":
        from cqil_trt.gpu import cuda

        # Processes that build at the same time take a GPU each.
        cuda.use_device(compilation.plan.rank)
        library = tensorrt_plugins.register(trt)
    log, lowering = logger(trt, bool(compilation.options.get("verbose"))), Lowering.of(trt)
    builder = trt.Builder(log)
    flags = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED if lowering.typed else flags.EXPLICIT_BATCH))
    nccl = compilation.description.build["collective"] == "nccl"
    # Held until the engine is built: the network's constants live in it.
    given = compilation.plan, compilation.limits, compilation.rotary
    ops = define_network(trt, network, lowering, *given, nccl, library)
    if compilation.options.get("save_network_json"):
        compilation.file("network.json").write_text(json.dumps(describe_network(network), indent=1) + "\n")

    config = builder.create_builder_config()
    _set_flags(trt, config, lowering, compilation)
    add_profiles(trt, builder, config, network, compilation.limits)
    _show_progress(trt, config, compilation)
    if library is not None:
        library.cqil_set_building(1)
    # Plugins are not timed, so classic networks have no timings to cache.
    timings = _use_timing_cache(config, compilation) if lowering.native else None
    log.first_error = ""  # of a timing cache that does not fit
    try:
        serialized = builder.build_serialized_network(network, config)
    finally:
        if library is not None:
            library.cqil_set_building(0)
    if serialized is None:
        raise UserError(f"TensorRT could not build rank {ops.plan.rank}: {log.first_error or 'it gave no reason'}")
    if timings is not None:
        _save_timing_cache(config, timings)
    with open(compilation.file("engine"), "wb") as file:
        file.write(serialized)


def _set_flags(trt: Any, config: Any, lowering: Lowering, compilation: Compilation) -> None:
    # Validation compares float32 engines with a float32 reference.
    config.clear_flag(trt.BuilderFlag.TF32)
    if not lowering.typed:
        if compilation.limits.dtype == "float16":
            config.set_flag(trt.BuilderFlag.FP16)
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        # With plugins in the network it would load cuBLAS and cuDNN, which it does not use.
        config.set_tactic_sources(0)
        features = getattr(trt, "PreviewFeature", None)
        if features is not None and hasattr(features, "DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805"):
            config.set_preview_feature(features.DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805, True)
    if trt.__name__ == "tensorrt_rtx":
        targets = compilation.description.architecture.split(", ")
        config.num_compute_capabilities = len(targets)
        for i, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, TARGETS[target]), i)


def _show_progress(trt: Any, config: Any, compilation: Compilation) -> None:
    if not compilation.progress:
        return
    if not hasattr(trt, "IProgressMonitor"):
        print(f"compiling rank {compilation.plan.rank} with {version(trt)} ...", file=sys.stderr)
        return
    from tqdm import tqdm

    class Progress(trt.IProgressMonitor):
        """A bar for the outermost phase. It names the phase that is running."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._bars: dict[str, Any] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._bars[name] = tqdm(total=steps, desc=f"rank {compilation.plan.rank}: {name}", leave=False)
            for bar in self._bars.values():
                bar.set_postfix_str(name if parent else "")

        def step_complete(self, name: str, step: int) -> bool:
            if name in self._bars:
                self._bars[name].update(step + 1 - self._bars[name].n)
            return True

        def phase_finish(self, name: str) -> None:
            if name in self._bars:
                self._bars.pop(name).close()

    config.progress_monitor = Progress()


def _use_timing_cache(config: Any, compilation: Compilation) -> Path:
    """Gives the builder the timings that earlier builds measured; returns the file for those of this one.

    One file per rank, because ranks are built by separate processes. A rank without a file starts from another's.
    """
    tag = f"{compilation.description.version}-{compilation.description.architecture}".replace(", ", "-").replace(
        " ", ""
    )
    name = compilation.options.get("timing_cache") or f".timing-{tag}"
    path = compilation.directory.parent / f"{name}.rank{compilation.plan.rank}"
    path.parent.mkdir(parents=True, exist_ok=True)
    others = sorted(path.parent.glob(f"{glob.escape(path.stem)}.rank*"))
    known = next((file for file in (path, *others) if file.exists()), None)
    cache = config.create_timing_cache(known.read_bytes() if known else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return path


def _save_timing_cache(config: Any, path: Path) -> None:
    cache = config.get_timing_cache()
    if cache is not None:
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_bytes(bytes(cache.serialize()))
        temporary.rename(path)
