"""Target `engine`: a checkpoint for trtllm-build and, where tensorrt_llm is installed, the engines that it builds.

    checkpoint/                              as `checkpoint.py` says, under the names of TensorRT-LLM's layers
    trtllm/config.json, trtllm/rank{r}.engine   what trtllm-build made

`model.py` is the model's class for trtllm-build, `session.py` runs the engines.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cqil_trt.backends import CompiledEngine
from cqil_trt.backends.tensorrt_llm import versions
from cqil_trt.backends.tensorrt_llm.checkpoint import CHECKPOINT, cqil_section, rope_scaling
from cqil_trt.backends.tensorrt_llm.engine import int4
from cqil_trt.backends.tensorrt_llm.engine.int4 import QuantizableNames
from cqil_trt.config import EngineLimits
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.shard import RankPlan

ENGINES = "trtllm"
MODEL_FILE = Path(__file__).parent / "model.py"
# models/llama in TensorRT-LLM 0.17 and its `LLaMAForCausalLM` since. Its gated MLP calls the matrix that the activation
# follows `fc` (gate_proj in checkpoints) and the other one `gate` (up_proj).
NAMES = QuantizableNames(
    embedding="transformer.vocab_embedding",
    final_norm="transformer.ln_f",
    lm_head="lm_head",
    layer="transformer.layers.{place}",
    attention_norm="input_layernorm",
    qkv=("attention.qkv",),
    q_norm="attention.q_layernorm",
    k_norm="attention.k_layernorm",
    o="attention.dense",
    mlp_norm="post_layernorm",
    gate="mlp.fc",
    up="mlp.gate",
    down="mlp.proj",
)


def check(ranks: tuple[RankPlan, ...], collective: str) -> None:
    """Raises UserError for what the engines cannot express."""
    model, cqil = ranks[0].model, ranks[0].cqil
    if model.qk_norm:
        raise UserError(
            "--target engine: head norms (Qwen3) are not supported there: use --target pytorch or --backend tensorrt"
        )
    for name, size in (("query heads", model.num_heads), ("MLP neurons", model.intermediate_size)):
        if size % cqil.p:
            raise UserError(
                f"--target engine: {size} {name} cannot be split evenly over {cqil.p} ranks: --target pytorch can"
            )
    if model.num_kv_heads % cqil.p and cqil.p % model.num_kv_heads:
        raise UserError(f"--target engine: {model.num_kv_heads} key/value heads do not fit {cqil.p} ranks")
    if cqil.d and collective != "plugin":
        raise UserError(f"--collective {collective}: TensorRT-LLM's engines have no bypass (d > 0): use plugin")
    int4.check(ranks)


def notes(version: str | None) -> tuple[str, ...]:
    """What the plan says. `version`: of the installed TensorRT-LLM."""
    if version is not None:
        return ()
    return ("tensorrt_llm is not installed here: only its checkpoint is written (docs/tensorrt-llm.md goes on)",)


def configuration(ranks: tuple[RankPlan, ...], limits: EngineLimits, collective: str) -> dict[str, Any]:
    """The checkpoint's config.json: TensorRT-LLM's keys, and ours under `cqil`."""
    model, cqil = ranks[0].model, ranks[0].cqil
    section = cqil_section(ranks, collective)
    return {
        # Every part of TensorRT-LLM can read the stock class's configuration. The model's class is ours.
        "architecture": "LlamaForCausalLM",
        "dtype": limits.dtype,
        "logits_dtype": "float32",
        "num_hidden_layers": len(section["grouped"]),
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        # The runtime divides this by the number of ranks, rounding up. A layer of a group is whole on its rank.
        "num_kv_heads_per_layer": [model.num_kv_heads * (cqil.p if whole else 1) for whole in section["grouped"]],
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "head_size": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position,
        "position_embedding_type": "rope_gpt_neox",
        "hidden_act": "silu",
        "norm_epsilon": model.rms_norm_eps,
        "rotary_base": model.rope.theta,
        "rotary_scaling": rope_scaling(model),
        "attn_bias": model.qkv_bias,
        "mlp_bias": model.mlp_bias,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "has_partial_lora_mask": False,
        "quantization": int4.configuration(ranks),
        "mapping": {"world_size": cqil.p, "tp_size": cqil.p, "pp_size": 1},
        "cqil": section,
    }


def finish(compiled: CompiledEngine) -> None:
    """When every rank's checkpoint is there: its configuration, and the engines where TensorRT-LLM is installed."""
    directory, limits = compiled.directory, compiled.limits
    config = configuration(compiled.ranks, limits, compiled.description.build["collective"])
    (directory / CHECKPOINT / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if versions.installed() is None:
        return
    done = subprocess.run(
        build_command(directory / CHECKPOINT, directory / ENGINES, limits), capture_output=True, text=True
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise UserError(f"trtllm-build failed: {lines[-1]}")


def build_command(checkpoint: Path, engines: Path, limits: EngineLimits) -> list[str]:
    """trtllm-build as this process's Python runs it; `max_input_len` is a prompt that leaves room for a token."""
    plugin = limits.dtype
    return [
        *(sys.executable, "-m", "tensorrt_llm.commands.build"),
        *("--checkpoint_dir", str(checkpoint), "--output_dir", str(engines)),
        *("--model_cls_file", str(MODEL_FILE), "--model_cls_name", "CqilForCausalLM"),
        *("--max_batch_size", str(limits.max_batch_size), "--max_seq_len", str(limits.max_seq_len)),
        *("--max_input_len", str(max(1, limits.max_seq_len - 1))),
        *("--max_num_tokens", str(max(limits.prefill_chunk, limits.max_batch_size, limits.max_seq_len))),
        *("--gpt_attention_plugin", plugin, "--gemm_plugin", plugin, "--remove_input_padding", "enable"),
        *("--kv_cache_type", "paged", "--gather_context_logits", "--workers", "1"),
        # These would replace our collectives or modules.
        *("--reduce_fusion", "disable", "--use_fused_mlp", "disable"),
    ]


def check_runnable(engine: Engine, device: str) -> None:
    """Raises UserError for an engine that cannot run on this host."""
    if device == "cpu":
        raise UserError("--device cpu: a TensorRT-LLM engine runs on a GPU")
    if not (engine.path / ENGINES / "config.json").exists():
        command = " ".join(build_command(engine.path / CHECKPOINT, engine.path / ENGINES, engine.limits)[1:])
        raise UserError(
            f"{engine.path}: a checkpoint without engines: build it where tensorrt_llm is installed (python {command})"
        )
    version = versions.installed()
    if version is None:
        raise UserError("tensorrt_llm is not installed here: docs/tensorrt-llm.md says which and how")
    versions.check(version, versions.ENGINE)
