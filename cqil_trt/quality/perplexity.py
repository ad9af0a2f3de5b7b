"""How well a model predicts a text: perplexity, and agreement with another model on the most likely token."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
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
    [N, T - 1], and the model's most likely tokens there `top1`, int32 [N, T - 1]. `divergence`: the Kullback-Leibler
    divergence from another model's distributions there, mean in nats per token, if it was asked for."""

    nll: np.ndarray
    top1: np.ndarray
    divergence: float | None = None

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


def score_reference(
    model: nn.Module, blocks: np.ndarray, progress: str | None = None, against: np.ndarray | None = None
) -> Scores:
    """Scores of a Hugging Face model (a CqilModel too) on blocks of token ids, int [N, T].

    `progress`: the label of a progress bar on standard error; None for no bar. `against`: another model's
    `reference_logits` there, to take the divergence from.
    """
    import torch

    nll, top1, diverged = [], [], 0.0
    for first, tokens, logits in _batches(model, blocks, progress):
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        nll.append(loss.view(len(tokens), -1).cpu().numpy())
        top1.append(logits.argmax(-1).int().cpu().numpy())
        if against is not None:
            from cqil_trt.quality.distillation import divergence

            theirs = torch.from_numpy(against[first : first + len(tokens)]).to(logits.device)
            diverged += float(divergence(theirs, logits)) * len(tokens)
    divergence_of_all = None if against is None else diverged / len(blocks)
    return Scores(np.concatenate(nll), np.concatenate(top1), divergence_of_all)


def reference_logits(model: nn.Module, blocks: np.ndarray) -> np.ndarray:
    """Logits of a Hugging Face model after all tokens of blocks [N, T] but the last of each: float32 [N, T - 1,
    vocabulary], in a temporary file that is gone when the array is."""
    shape = len(blocks), blocks.shape[1] - 1, model.config.vocab_size
    with tempfile.TemporaryFile() as file:
        found = np.memmap(file, np.float32, "w+", shape=shape)
        for first, tokens, logits in _batches(model, blocks):
            found[first : first + len(tokens)] = logits.cpu().numpy()
    return found


def _batches(model: nn.Module, blocks: np.ndarray, progress: str | None = None) -> Iterator[tuple[int, Any, Any]]:
    """For some blocks at a time the place of the first, the tokens int64 [n, T] and the logits float32 [n, T - 1,
    vocabulary] after all but the last of each."""
    import torch

    from cqil_trt.reference import device_of

    device = device_of(model)
    batch = max(1, _LOGITS // (blocks.shape[1] * model.config.vocab_size))
    with _bar(len(blocks), progress) as bar:
        for first in range(0, len(blocks), batch):
            with torch.inference_mode():
                tokens = torch.from_numpy(blocks[first : first + batch].astype(np.int64)).to(device)
                logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
            yield first, tokens, logits
            bar.update(len(tokens))


def score_engine(llm: Llm, blocks: np.ndarray, progress: str | None = None) -> Scores:
    """Scores of a loaded engine on blocks of token ids, int [N, T]. All ranks call it together and get the same.

    `progress`: as in `score_reference`; rank 0 shows the bar.
    """
    mine = blocks[llm.replica :: llm.replicas]
    found = []
    with _bar(len(mine), progress if llm.job.rank == 0 else None) as bar:
        for block in mine:
            # The last token is only predicted.
            logits = llm.runner.score(block[:-1].tolist())
            found.append((negative_log_likelihood(logits, block[1:]), logits.argmax(-1).astype(np.int32)))
            bar.update()
    found = llm.merge(found, len(blocks))
    return Scores(np.stack([nll for nll, _ in found]), np.stack([top1 for _, top1 in found]))


def negative_log_likelihood(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[token] of each row, float32 [T], from float32 logits [T, vocabulary]."""
    peak = logits.max(axis=1)
    normaliser = np.log(np.exp(logits - peak[:, None]).sum(axis=1, dtype=np.float64)) + peak
    return (normaliser - logits[np.arange(len(tokens)), tokens]).astype(np.float32)


def _bar(blocks: int, label: str | None) -> Any:
    from tqdm import tqdm

    return tqdm(total=blocks, unit="block", desc=label, disable=label is None, leave=False)
