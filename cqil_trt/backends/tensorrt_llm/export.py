"""An export from the request to the finished directory: what either target refuses, and which of them does the rest.

A target is a module with `NAMES`, `check`, `notes`, `finish` and `check_runnable`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from cqil_trt import backends
from cqil_trt.backends import Compilation, Description
from cqil_trt.backends.tensorrt_llm import COLLECTIVES, engine, pytorch, versions
from cqil_trt.backends.tensorrt_llm.checkpoint import CHECKPOINT, copy_tensors
from cqil_trt.config import AUTO, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.model import ModelConfig
from cqil_trt.shard import RankPlan


def target(build: Mapping[str, Any]) -> ModuleType:
    """The target that an engine was built for, by its `build`. Older engines name none."""
    return {versions.ENGINE: engine, versions.PYTORCH: pytorch}[build.get("target", versions.ENGINE)]


# Why quantized weights of these formats cannot be exported.
_FORMATS = {
    "int8": "TensorRT-LLM rounds 8-bit integers itself, to other codes, or wants them arranged for one kind of GPU",
    "fp8": "TensorRT-LLM's FP8 layers round activations too, which our engines do not",
}

_ROPE = ("default", "linear", "dynamic", "llama3")


def check_format(limits: EngineLimits) -> None:
    """Raises UserError for weights or a KV cache that neither target expresses."""
    if limits.kv_dtype != AUTO:
        able = " or ".join(name for name in backends.names() if limits.kv_dtype in backends.load(name).kv_dtypes)
        raise UserError(
            f"--kv-dtype {limits.kv_dtype}: TensorRT-LLM's executor owns the KV cache, and neither --target hands it "
            f"the scales of an {limits.kv_dtype.upper()} one: leave it out, or use backend {able}"
        )
    if limits.weights in _FORMATS:
        raise UserError(
            f"--quantize {limits.weights}: {_FORMATS[limits.weights]}: int4 and int4g64 can be exported "
            "(--target engine)"
        )


def check_rope(model: ModelConfig) -> None:
    """Raises UserError for a rotary embedding that neither runtime can express."""
    rope = model.rope
    # Their attention modules have no attention factor of this kind and take no frequencies.
    if rope.kind not in _ROPE or rope.divisors or rope.attention_factor != 1:
        what = "frequency factors (rope_freqs)" if rope.divisors else f"{rope.kind} rope with an attention factor"
        raise UserError(f"--backend tensorrt-llm: {what} is not supported there: use --backend tensorrt")


def describe(options: Mapping[str, Any], ranks: tuple[RankPlan, ...]) -> Description:
    """Raises UserError for what TensorRT-LLM cannot express."""
    model, cqil = ranks[0].model, ranks[0].cqil
    version = versions.installed()
    chosen = options.get("target") or versions.default_target(version)
    if chosen not in versions.TARGETS:
        raise UserError(f"--target must be one of {', '.join(versions.TARGETS)} here, found {chosen}")
    if version is not None:
        versions.check(version, chosen)
    if cqil.placement == "leader":
        raise UserError(
            "--backend tensorrt-llm: its executor wants the same attention layers on every rank: --placement sharded "
            "or tensor, or --backend tensorrt for leader"
        )
    if cqil.ranks_per_layer > 1:
        raise UserError(
            f"--backend tensorrt-llm: --ranks-per-layer {cqil.ranks_per_layer}: its executor's attention takes either "
            "all heads of a layer or an even share over all ranks: use --backend torch or tensorrt"
        )
    if model.vocab_size % cqil.p:
        raise UserError(f"--backend tensorrt-llm: a vocabulary of {model.vocab_size} is not a multiple of {cqil.p}")
    collective = options.get("collective") or "plugin"
    if collective not in COLLECTIVES:
        raise UserError(f"--collective must be one of {', '.join(COLLECTIVES)} here, found {collective}")
    build = {"target": chosen, "collective": collective}
    target(build).check(ranks, collective)
    notes = target(build).notes(version)
    return Description(
        version="a checkpoint" if version is None else f"tensorrt_llm {version}", build=build, notes=notes
    )


def write_rank(compilation: Compilation) -> None:
    """Writes the rank's checkpoint from its weights, under the target's names, and removes the weights."""
    source, directory = compilation.file("safetensors"), compilation.directory / CHECKPOINT
    directory.mkdir(exist_ok=True)
    copy_tensors(compilation.plan, target(compilation.description.build).NAMES, source, directory / source.name)
    source.unlink()
