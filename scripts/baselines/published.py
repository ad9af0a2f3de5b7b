"""The method of the published CQIL wrapper, as a baseline: Hugging Face's layers, eager, joined by torch.distributed.

Rank 0 runs what is outside the groups. At the first group it broadcasts its hidden states, behind every group all ranks
add up what their layers changed. There is no KV cache: every token is a pass over all before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cqil_trt.config import CqilConfig


class PublishedCqil:
    """`network`: the Hugging Face model, whole, on every rank of torch's default process group; it is changed.

    Takes d = 0 only: the published wrapper's bypass sends what it then ignores.
    """

    def __init__(self, network: nn.Module, cqil: CqilConfig):
        if cqil.d:
            raise ValueError(f"the published wrapper has no working bypass: d must be 0, found {cqil.d}")
        self._network = network
        rank, layers = dist.get_rank(), network.get_submodule("model.layers")
        for layer in layers if rank else ():
            layer.forward = MethodType(_pass_on, layer)
        for number, group in enumerate(cqil.groups):
            for index in group[1:]:
                layers[index].forward = MethodType(_pass_on, layers[index])
            # The class's own forward, as the rank's layer may be one that was just replaced.
            mine = layers[group[rank]]
            layers[group[0]].forward = _group(type(mine).forward.__get__(mine), number == 0)

    @torch.inference_mode()
    def next_token(self, tokens: Sequence[int]) -> tuple[int, torch.Tensor]:
        """The likeliest token behind `tokens` and its logits [vocabulary]; of meaning on rank 0."""
        device = next(self._network.parameters()).device
        ids = torch.tensor([list(tokens)], device=device)
        logits = self._network(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        return int(logits.argmax()), logits


def _pass_on(self: nn.Module, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return hidden_states


def _group(layer: Any, first: bool) -> Any:
    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = hidden_states.contiguous()
        if first:
            dist.broadcast(x, 0)
        delta = layer(x, **kwargs) - x
        dist.all_reduce(delta)
        return x + delta

    return forward
