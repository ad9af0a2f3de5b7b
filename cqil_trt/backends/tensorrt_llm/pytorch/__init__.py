"""Target `pytorch`: a checkpoint for TensorRT-LLM's PyTorch backend, and the model that it loads it with.

    checkpoint/        as `checkpoint.py` says, with the names of Hugging Face's modules behind `rank{r}.`, and the
                       tokenizer
    modeling_cqil/     the model, for `trtllm-serve --custom_module_dirs` or an import; needs nothing of this package
    serve.py           trtllm-serve with the model

TensorRT-LLM's loader reads every safetensors file of the checkpoint on every rank, through memory maps; the model takes
its own rank's tensors.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from cqil_trt import probes
from cqil_trt.backends import CompiledEngine
from cqil_trt.backends.tensorrt_llm.checkpoint import CHECKPOINT, cqil_section, rope_scaling
from cqil_trt.backends.tensorrt_llm.names import Names
from cqil_trt.config import EngineLimits
from cqil_trt.engine import LOCK, Engine
from cqil_trt.errors import UserError
from cqil_trt.families.family import EMBEDDING, FINAL_NORM, HUGGING_FACE_LAYER, LM_HEAD
from cqil_trt.formats import DENSE
from cqil_trt.model import ModelConfig
from cqil_trt.schedule import Layer
from cqil_trt.shard import LayerShard, RankPlan

MODULE = "modeling_cqil"
LAUNCHER = "serve.py"
_SOURCES = Path(__file__).parent
NAMES = Names(
    embedding=f"rank{{rank}}.{EMBEDDING}",
    final_norm=f"rank{{rank}}.{FINAL_NORM}",
    lm_head=f"rank{{rank}}.{LM_HEAD}",
    layer="rank{rank}.model.layers.{place}",
    qkv=tuple(HUGGING_FACE_LAYER[part] for part in "qkv"),
    **{part: name for part, name in HUGGING_FACE_LAYER.items() if part not in "qkv"},
)


def check(ranks: tuple[RankPlan, ...], collective: str) -> None:
    """Raises UserError for what the model cannot express."""
    model, p = ranks[0].model, ranks[0].cqil.p
    if ranks[0].weights != DENSE:
        raise UserError(f"--quantize {ranks[0].weights}: --target pytorch has dense weights only")
    split = any(isinstance(step, Layer) and step.split for step in ranks[0].schedule.layers)
    for name, size in (("query heads", model.num_heads), ("MLP neurons", model.intermediate_size)):
        if split and size < p:
            raise UserError(f"--target pytorch: {size} {name} leave some of {p} ranks without any in split layers")


def notes(version: str | None) -> tuple[str, ...]:
    """What the plan says. `version`: of the installed TensorRT-LLM."""
    return (f"TensorRT-LLM runs it: {LAUNCHER} in the directory (docs/tensorrt-llm.md)",)


def configuration(ranks: tuple[RankPlan, ...], limits: EngineLimits, collective: str) -> dict[str, Any]:
    """The checkpoint's config.json: LlamaConfig's keys, which every release reads, and ours under `cqil`.

    It describes the model; modeling_cqil makes of it what TensorRT-LLM's executor has to know about a rank.
    """
    model = ranks[0].model
    return {
        "architectures": ["CqilForCausalLM"],
        "model_type": "llama",
        "torch_dtype": limits.dtype,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position,
        "hidden_act": "silu",
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope.theta,
        "rope_scaling": rope_scaling(model),
        "attention_bias": model.qkv_bias,
        "mlp_bias": model.mlp_bias,
        # Every rank has the whole table, and its share of the last projection.
        "tie_word_embeddings": False,
        "eos_token_id": list(model.eos_token_ids) or None,
        "cqil": {
            **cqil_section(ranks, collective),
            "qk_norm": model.qk_norm,
            "whole": _share(LayerShard.of(model, 0, 0, 1)),
            "split": [_share(LayerShard.of(model, 0, rank.rank, rank.world_size)) for rank in ranks],
        },
    }


def _share(shard: LayerShard) -> dict[str, Any]:
    """How much of a layer a rank has. `query_slots`: as in `LayerShard`, because attention wants equal groups."""
    return {
        "num_kv_heads": shard.num_kv_heads,
        "num_neurons": shard.num_neurons,
        "query_slots": list(shard.query_slots),
    }


def finish(compiled: CompiledEngine) -> None:
    """When every rank's tensors are there: configuration, tokenizer and model."""
    directory, model = compiled.directory, compiled.ranks[0].model
    checkpoint = directory / CHECKPOINT
    for path in directory.iterdir():
        if path.is_file() and path.name not in (probes.FILE, LOCK):
            shutil.copy(path, checkpoint / path.name)
        elif path.is_dir() and path != checkpoint:
            shutil.copytree(path, checkpoint / path.name)
    config = configuration(compiled.ranks, compiled.limits, compiled.description.build["collective"])
    _write_json(checkpoint / "config.json", config)
    _write_json(checkpoint / "generation_config.json", _generation(model))
    shutil.copytree(_SOURCES / MODULE, directory / MODULE, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(_SOURCES / LAUNCHER, directory / LAUNCHER)


def _generation(model: ModelConfig) -> dict[str, Any]:
    return {"eos_token_id": list(model.eos_token_ids)} if model.eos_token_ids else {}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


def serve_command(engine: Engine) -> str:
    """The command that serves the directory."""
    limits = engine.limits
    return (
        f"python {engine.path / LAUNCHER} {engine.path / CHECKPOINT} --tp_size {engine.world_size} "
        f"--max_batch_size {limits.max_batch_size} --max_seq_len {limits.max_seq_len}"
    )


def check_runnable(engine: Engine, device: str) -> None:
    """Raises UserError: only TensorRT-LLM's own executor runs the model."""
    raise UserError(f"{engine.path}: --target pytorch is run by TensorRT-LLM itself: {serve_command(engine)}")
