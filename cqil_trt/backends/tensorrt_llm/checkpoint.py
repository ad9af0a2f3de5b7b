"""The checkpoint directory of either target: how CQIL maps to TensorRT-LLM's ranks, and the ranks' files.

TensorRT-LLM runs tensor parallelism: every rank has the same list of attention layers. Outside the groups a rank has
its share of every layer; a group takes one place in the list, where each rank has a whole layer of its own.

    checkpoint/config.json           TensorRT-LLM's keys, and ours under `cqil`
    checkpoint/rank{r}.safetensors   the rank's tensors
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cqil_trt.backends.tensorrt_llm.names import Names, tensors
from cqil_trt.engine import tensor_header, tensor_spans
from cqil_trt.model import ModelConfig
from cqil_trt.schedule import Group
from cqil_trt.shard import RankPlan

CHECKPOINT = "checkpoint"


def cqil_section(ranks: tuple[RankPlan, ...], collective: str) -> dict[str, Any]:
    """What a checkpoint's config.json says under `cqil`: which places of the list are groups, and what joins ranks."""
    model, steps = ranks[0].model, ranks[0].schedule.layers
    return {
        **ranks[0].cqil.to_dict(),
        "grouped": [isinstance(step, Group) for step in steps],
        "one_join": [isinstance(step, Group) or step.drops_join for step in steps],
        "collective": collective,
        "qkv_bias": model.qkv_bias,
        "o_bias": model.o_bias,
        "mlp_bias": model.mlp_bias,
    }


def rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    """As config.json states it under either target. None where nothing is scaled."""
    rope = model.rope
    # dynamic is the same within the original context, and engines go no further
    if rope.kind in ("default", "dynamic"):
        return None
    scaling = {"type": rope.kind, "rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    return scaling


def copy_tensors(plan: RankPlan, names: Names, source: Path, path: Path) -> None:
    """Writes a rank's safetensors file under these names from the one that the builder wrote."""
    parts, spans = list(tensors(plan, names)), tensor_spans(source)
    with open(source, "rb") as read, open(path, "wb") as write:
        write.write(tensor_header(parts))
        for part in parts:
            for block in part.blocks(read, spans):
                write.write(block)
