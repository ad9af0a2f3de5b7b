"""How well a model predicts a text: perplexity, and agreement with another model on the most likely token."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import nn

    from cqil_trt.llm import Llm

# Logits in memory at a time, in elements.
_LOGITS = 1 << 28
# The headers of `Scores.cells`.
CELLS = ("perplexity", "log", "top-1 as the first")


@dataclass(frozen=True)
class Scores:
    """For blocks [N, T], without the first token of each: the tokens' negative log-likelihoods `nll`, float32
    [N, T - 1], and the model's most likely tokens there `top1`, int32 [N, T - 1]."""

    nll: np.ndarray
    top1: np.ndarray

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(self.log_perplexity)

    @property
    def log_perplexity(self) -> float:
        return float(self.nll.mean(dtype=np.float64))

    def agreement(self, other: Scores) -> float:
        """The share of positions with the same most likely token; NaN if the scores are of different blocks."""
        return float((self.top1 == other.top1).mean()) if self.top1.shape == other.top1.shape else math.nan

    def cells(self, base: Scores) -> tuple[str, ...]:
        """The cells of a table row; `base`: the scores of its first row."""
        return f"{self.perplexity:.4f}", f"{self.log_perplexity:.5f}", f"{self.agreement(base):.2%}"

    def to_dict(self, base: Scores) -> dict[str, float]:
        return {"perplexity": self.perplexity, "top1_equal": self.agreement(base)}


WON_BACK = "the adapter wins back {:.1%} of what CQIL cost in log-perplexity"


def won_back(base: Scores, without: Scores, with_adapter: Scores) -> float:
    """The share of CQIL's loss in log-perplexity that the adapter recovers: 1 is all of it."""
    return (without.log_perplexity - with_adapter.log_perplexity) / (without.log_perplexity - base.log_perplexity)


def score_reference(model: nn.Module, blocks: np.ndarray, progress: bool = False) -> Scores:
    """Scores of a Hugging Face model (a CqilModel too) on blocks of token ids, int [N, T]."""
    import torch

    from cqil_trt.reference import device_of

    device = device_of(model)
    batch = max(1, _LOGITS // (blocks.shape[1] * model.config.vocab_size))
    nll, top1 = [], []
    with torch.inference_mode():
        for first in _bar(range(0, len(blocks), batch), progress):
            tokens = torch.from_numpy(blocks[first : first + batch].astype(np.int64)).to(device)
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            nll.append(loss.view(len(tokens), -1).cpu().numpy())
            top1.append(logits.argmax(-1).int().cpu().numpy())
    return Scores(np.concatenate(nll), np.concatenate(top1))


def score_engine(llm: Llm, blocks: np.ndarray, progress: bool = False) -> Scores:
    """Scores of a loaded engine on blocks of token ids, int [N, T]. All ranks call it together and get the same."""
    mine = blocks[llm.replica :: llm.replicas]
    found = []
    for block in _bar(mine, progress and llm.job.rank == 0):
        # The last token is only predicted.
        logits = llm.runner.score(block[:-1].tolist())
        found.append((negative_log_likelihood(logits, block[1:]), logits.argmax(-1).astype(np.int32)))
    found = llm.merge(found, len(blocks))
    return Scores(np.stack([nll for nll, _ in found]), np.stack([top1 for _, top1 in found]))


def negative_log_likelihood(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[token] of each row, float32 [T], from float32 logits [T, vocabulary]."""
    peak = logits.max(axis=1)
    normaliser = np.log(np.exp(logits - peak[:, None]).sum(axis=1, dtype=np.float64)) + peak
    return (normaliser - logits[np.arange(len(tokens)), tokens]).astype(np.float32)


def _bar(items: Iterable[Any], progress: bool) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, desc="scoring", disable=not progress, leave=False)
