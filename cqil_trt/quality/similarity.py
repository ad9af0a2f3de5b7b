"""Which layers receive nearly the same input, and which ranges of them are recommended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cqil_trt.config import CqilConfig

if TYPE_CHECKING:
    from torch import nn


def input_similarity(model: nn.Module, blocks: np.ndarray, progress: bool = False) -> np.ndarray:
    """Cosine similarity of the inputs of each pair of layers, mean over all tokens, float64 [layers, layers].

    The criterion of the CQIL paper (Zou et al., ACL 2024). `model`: the unchanged Hugging Face model; `blocks`: token
    ids, int [N, T].
    """
    import torch
    from tqdm import tqdm

    from cqil_trt.reference import device_of

    device = device_of(model)
    layers = len(model.get_submodule("model.layers"))
    total = torch.zeros(layers, layers, dtype=torch.float64)
    with torch.inference_mode():
        for block in tqdm(blocks, desc="similarity", disable=not progress, leave=False):
            tokens = torch.from_numpy(block.astype(np.int64))[None].to(device)
            states = model.model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
            inputs = torch.stack(states[:layers]).float().squeeze(1)  # [layers, tokens, hidden]
            inputs = torch.nn.functional.normalize(inputs, dim=-1)
            total += torch.einsum("ith,jth->ij", inputs, inputs).double().cpu() / inputs.shape[1]
    return (total / len(blocks)).numpy()


def lowest_in_groups(similarity: np.ndarray, cqil: CqilConfig) -> float:
    """The lowest similarity of a layer's input to that of its group's first layer, which replaces it in CQIL."""
    return min(float(similarity[group[0], list(group[1:])].min()) for group in cqil.groups)


def ranges(first: int, num_layers: int, p: int) -> Iterator[tuple[int, int]]:
    """Every (start, end) from layer `first` on that groups of `p` layers can fill in a model of `num_layers`."""
    for start in range(first, num_layers - p + 1):
        for end in range(start + p, num_layers + 1, p):
            yield start, end


@dataclass(frozen=True)
class Choice:
    """A configuration and the lowest similarity within its groups."""

    cqil: CqilConfig
    similarity: float


def recommend(similarity: np.ndarray, p: int, threshold: float, first: int) -> Choice | None:
    """The longest range from layer `first` on in which every group's similarity reaches `threshold`; None without one.

    The longest range is the fastest, because each group saves the same; among equals the most similar one is chosen.
    """
    configs = [CqilConfig(p=p, start=start, end=end) for start, end in ranges(first, len(similarity), p)]
    found = [Choice(cqil, lowest_in_groups(similarity, cqil)) for cqil in configs]
    fitting = [choice for choice in found if choice.similarity >= threshold]
    return max(fitting, key=lambda choice: (choice.cqil.end - choice.cqil.start, choice.similarity), default=None)


def frontier(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """The points that no other point beats in both, in order of cost."""
    best: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], losses[i])):
        if not best or losses[index] < losses[best[-1]]:
            best.append(index)
    return best
