"""Writes a TensorRT-LLM checkpoint and, where tensorrt_llm is installed, has it build engines.

checkpoint/config.json, checkpoint/rank{r}.safetensors   what trtllm-build takes
trtllm/config.json, trtllm/rank{r}.engine                what it made
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cqil_trt.backends import Compilation, CompiledEngine, Description
from cqil_trt.backends.tensorrt_llm import COLLECTIVES, names, versions
from cqil_trt.config import EngineLimits
from cqil_trt.engine import Engine, tensor_header, tensor_spans
from cqil_trt.errors import UserError
from cqil_trt.model import ModelConfig
from cqil_trt.schedule import Group
from cqil_trt.shard import RankPlan

CHECKPOINT, ENGINES = "checkpoint", "trtllm"
MODEL_FILE = Path(__file__).parent / "model.py"
_COPY_BYTES = 16 << 20


def describe(options: Mapping[str, Any], ranks: tuple[RankPlan, ...]) -> Description:
    """Raises UserError for what TensorRT-LLM cannot express."""
    model, cqil = ranks[0].model, ranks[0].cqil
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
    if model.qk_norm:
        raise UserError("--backend tensorrt-llm: head norms (Qwen3) are not supported there: use --backend tensorrt")
    rope = model.rope
    # Its attention module has no attention factor and takes no frequencies.
    if rope.kind == "yarn" or rope.divisors or rope.attention_factor != 1:
        what = "frequency factors (rope_freqs)" if rope.divisors else f"{rope.kind} rope with an attention factor"
        raise UserError(f"--backend tensorrt-llm: {what} is not supported there: use --backend tensorrt")
    for name, size in (("query heads", model.num_heads), ("MLP neurons", model.intermediate_size)):
        if size % cqil.p:
            raise UserError(f"--backend tensorrt-llm: {size} {name} cannot be split evenly over {cqil.p} ranks")
    if model.num_kv_heads % cqil.p and cqil.p % model.num_kv_heads:
        raise UserError(f"--backend tensorrt-llm: {model.num_kv_heads} key/value heads do not fit {cqil.p} ranks")
    if model.vocab_size % cqil.p:
        raise UserError(f"--backend tensorrt-llm: a vocabulary of {model.vocab_size} is not a multiple of {cqil.p}")
    collective = options.get("collective") or "plugin"
    if collective not in COLLECTIVES:
        raise UserError(f"--collective must be one of {', '.join(COLLECTIVES)} here, found {collective}")
    if cqil.d and collective != "plugin":
        raise UserError(f"--collective {collective}: TensorRT-LLM has nothing for a bypass (d > 0): use plugin")
    version = versions.installed()
    if version is None:
        note = "tensorrt_llm is not installed here: only its checkpoint is written (docs/tensorrt-llm.md goes on)"
        return Description(version="a checkpoint", build={"collective": collective}, notes=(note,))
    return Description(version=f"tensorrt_llm {version}", build={"collective": collective})


def configuration(ranks: tuple[RankPlan, ...], limits: EngineLimits, collective: str) -> dict[str, Any]:
    """The checkpoint's config.json: TensorRT-LLM's keys, and ours under `cqil`."""
    model, cqil = ranks[0].model, ranks[0].cqil
    steps = ranks[0].schedule.layers
    grouped = [isinstance(step, Group) for step in steps]
    return {
        # Every part of TensorRT-LLM can read the stock class's configuration. The model's class is ours.
        "architecture": "LlamaForCausalLM",
        "dtype": limits.dtype,
        "logits_dtype": "float32",
        "num_hidden_layers": len(grouped),
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        # The runtime divides this by the number of ranks, rounding up. A layer of a group is whole on its rank.
        "num_kv_heads_per_layer": [model.num_kv_heads * (cqil.p if whole else 1) for whole in grouped],
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "head_size": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position,
        "position_embedding_type": "rope_gpt_neox",
        "hidden_act": "silu",
        "norm_epsilon": model.rms_norm_eps,
        "rotary_base": model.rope.theta,
        "rotary_scaling": _rotary_scaling(model),
        "attn_bias": model.qkv_bias,
        "mlp_bias": model.mlp_bias,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "has_partial_lora_mask": False,
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
        "mapping": {"world_size": cqil.p, "tp_size": cqil.p, "pp_size": 1},
        "cqil": {
            **cqil.to_dict(),
            "grouped": grouped,
            "one_join": [isinstance(step, Group) or step.drops_join for step in steps],
            "collective": collective,
            "qkv_bias": model.qkv_bias,
            "o_bias": model.o_bias,
            "mlp_bias": model.mlp_bias,
        },
    }


def _rotary_scaling(model: ModelConfig) -> dict[str, Any] | None:
    rope = model.rope
    if rope.kind in (
        "default",
        "dynamic",
    ):  # dynamic is the same within the original context, and engines go no further
        return None
    scaling = {"type": rope.kind, "rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    return scaling


def write_rank(compilation: Compilation) -> None:
    """Writes the rank's checkpoint from its weights, and removes the weights."""
    source, directory = compilation.file("safetensors"), compilation.directory / CHECKPOINT
    directory.mkdir(exist_ok=True)
    _write(compilation.plan, source, directory / source.name)
    source.unlink()


def _write(plan: RankPlan, source: Path, target: Path) -> None:
    """Copies tensors, or parts of them, from one safetensors file to another, under TensorRT-LLM's names."""
    parts = list(names.parts(plan))
    spans = tensor_spans(source)
    with open(source, "rb") as read, open(target, "wb") as write:
        write.write(tensor_header(parts))
        for part in parts:
            for block in _blocks(read, part, spans):
                write.write(block)


def _blocks(file: Any, part: names.Part, spans: Mapping[str, tuple[int, int]]) -> Iterator[bytes]:
    left = part.nbytes
    if part.source is not None:
        file.seek(spans[part.source][0] + part.first * part.nbytes // part.elements)
    while left:
        length = min(left, _COPY_BYTES)
        block = bytes(length) if part.source is None else file.read(length)
        if len(block) != length:
            raise UserError(f"{file.name}: truncated while reading {part.source}")
        yield block
        left -= length


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
    if versions.installed() is None:
        raise UserError("tensorrt_llm is not installed here: docs/tensorrt-llm.md says which and how")
