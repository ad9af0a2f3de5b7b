"""The method of the published CQIL wrapper, as a baseline: Hugging Face's layers, eager, joined by torch.distributed.

Rank 0 runs the layers outside the groups. It broadcasts its hidden states before the first group, and after every group
an all-reduce adds up the changes of all ranks' layers. There is no KV cache: every token takes a pass over all before.
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

    Supports only d = 0: the published wrapper ignores what its bypass receives.
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
            # The class's own forward, because the rank's layer may have been replaced just now.
            mine = layers[group[rank]]
            layers[group[0]].forward = _group(type(mine).forward.__get__(mine), number == 0)

    @torch.inference_mode()
    def next_token(self, tokens: Sequence[int]) -> tuple[int, torch.Tensor]:
        """The most likely token after `tokens`, and the logits [vocabulary]; meaningful on rank 0."""
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
