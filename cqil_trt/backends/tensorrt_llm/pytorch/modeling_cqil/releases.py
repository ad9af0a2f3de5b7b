"""What differs between releases of TensorRT-LLM's PyTorch backend, from 1.2 on."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

from tensorrt_llm.mapping import Mapping


def _module(*places: str) -> Any:
    """The first of these modules that exists: attention moved to a package of its own in 2026, its backends later."""
    for place in places:
        try:
            return import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise  # it is there, and what it needs is not
    raise ImportError(f"this release of tensorrt_llm has none of {', '.join(places)}: cqil-trt does not know it")


_attention = _module("tensorrt_llm._torch.attention.attention", "tensorrt_llm._torch.modules.attention")
_interface = _module(
    "tensorrt_llm._torch.attention.backends.interface", "tensorrt_llm._torch.attention_backend.interface"
)
Attention = _attention.Attention
PositionalEmbeddingParams, RopeParams = _interface.PositionalEmbeddingParams, _interface.RopeParams


def dtype(config: Any) -> Any:
    """The model's torch.dtype, which transformers 5 renamed."""
    return getattr(config, "dtype", None) or config.torch_dtype


def on_one_rank(model_config: Any) -> Any:
    """The configuration of modules that are not split over the ranks, although the model is.

    A copy that shares `extra_attrs`, in which attention modules register. Configurations are frozen once they are
    loaded.
    """
    own = copy.copy(model_config)
    own._frozen = False
    own.mapping = Mapping(world_size=1, rank=0, tp_size=1)
    own._frozen = True
    return own


def set_attention_layers(config: Any, kv_heads: list[int]) -> None:
    """Tells the executor, which makes the KV cache, what attention layers there are: `kv_heads` of each.

    It takes a list there, as Nemotron-NAS has one. transformers 5 checks types when attributes are set, and has a
    number there.
    """
    vars(config).update(num_hidden_layers=len(kv_heads), num_key_value_heads=kv_heads)
