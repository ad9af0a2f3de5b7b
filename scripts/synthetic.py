"""Checkpoints with random weights in the shapes of real models, for measurements."""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from tqdm import tqdm

from cqil_trt import families
from cqil_trt.config import CqilConfig, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.families.layout import checkpoint_shapes
from cqil_trt.model import ModelConfig
from cqil_trt.network.rotary import inverse_frequencies
from cqil_trt.shard import plan

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent

# The fields of the published checkpoints' config.json that determine shapes.
SHAPES = {
    "llama-7b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float16",
    },
    "llama-33b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 6656,
        "intermediate_size": 17920,
        "num_attention_heads": 52,
        "num_key_value_heads": 52,
        "num_hidden_layers": 60,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "float16",
    },
    "qwen1.5-14b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 5120,
        "intermediate_size": 13696,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "num_hidden_layers": 40,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "torch_dtype": "float16",
    },
    "gemma3-4b": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "num_hidden_layers": 34,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "torch_dtype": "float16",
    },
    "phi-4": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "num_hidden_layers": 40,
        "vocab_size": 100352,
        "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "rope_theta": 250000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    },
}


def write_config(directory: Path, name: str, layers: int | None = None) -> Path:
    """Writes the config.json of a model of SHAPES; `layers` replaces its depth."""
    path = directory / "config.json"
    path.write_text(json.dumps({**SHAPES[name], "num_hidden_layers": layers or SHAPES[name]["num_hidden_layers"]}))
    return path


def model_config(name: str, layers: int | None = None) -> ModelConfig:
    """The configuration of a model of SHAPES; `layers` replaces its depth."""
    with tempfile.TemporaryDirectory() as directory:
        return families.read_config(write_config(Path(directory), name, layers))


def make_checkpoint(directory: Path, name: str, layers: int | None = None) -> dict[str, tuple[int, ...]]:
    """Writes a float16 checkpoint in the model's shapes, one file per layer; returns the shapes of its tensors.

    Random numbers come from a GPU if available. `layers` replaces the model's depth.
    """
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    model = families.read_config(write_config(directory, name, layers))
    shapes, norm = checkpoint_shapes(model), norm_weight(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    by_file: dict[str, list[str]] = {}
    for tensor in shapes:
        part = int(tensor.split(".")[2]) if tensor.startswith("model.layers.") else model.num_layers
        by_file.setdefault(f"model-{part:05}.safetensors", []).append(tensor)
    for file, names in tqdm(by_file.items(), desc="making the checkpoint", disable=not sys.stderr.isatty()):
        save_file({tensor: _weights(tensor, shapes[tensor], device, norm) for tensor in names}, directory / file)
    weight_map = {tensor: file for file, names in by_file.items() for tensor in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return shapes


def check_space(directory: Path, name: str, layers: int | None, times: float) -> None:
    """Raises UserError unless the disk of `directory` has room for `times` the weights of the model."""
    needed = times * 2 * sum(math.prod(shape) for shape in checkpoint_shapes(model_config(name, layers)).values())
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"{directory.resolve()}: {free / 1e9:.0f} GB of disk are free, {needed / 1e9:.0f} are needed: choose "
            "another --directory, or fewer --layers"
        )


def engine_of(
    model: ModelConfig, cqil: CqilConfig, limits: EngineLimits, rotary: Sequence[float] | None = None
) -> SimpleNamespace:
    """What a session asks of an engine, without an engine directory.

    `rotary`: the inverse frequencies, which take PyTorch to compute.
    """
    ranks = plan(model, cqil, limits.dtype, limits.weights)
    return SimpleNamespace(
        model=model,
        cqil=cqil,
        limits=limits,
        rotary=tuple(inverse_frequencies(model) if rotary is None else rotary),
        world_size=cqil.ranks,
        plan=lambda rank: ranks[rank],
        path=f"the engine of {cqil.placement}",
    )


def norm_weight(model: ModelConfig) -> float:
    """With which a norm multiplies by 1."""
    return 0.0 if model.offset_norms else 1.0


def _weights(name: str, shape: tuple[int, ...], device: str, norm: float) -> torch.Tensor:
    import torch

    if "norm" in name:
        return torch.full(shape, norm, dtype=torch.float16)
    return (torch.randn(shape, device=device) * 0.02).half().cpu()
