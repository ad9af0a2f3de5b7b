"""Chooses the next token from logits; plugins/sampling.cu does the same on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cqil_trt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen. Temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature must be at least 0, found {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"--top-k must be at least 0, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must be above 0 and at most 1, found {self.top_p}")
        if self.seed < 0:
            raise UserError(f"--seed must be at least 0, found {self.seed}")


def sample(logits: np.ndarray, config: SamplingConfig, uniform: float) -> int:
    """One token from float32 logits [vocabulary]: temperature, then top-k, then top-p, as Hugging Face orders them.

    `uniform` is drawn from [0, 1). Tokens are ordered by probability, equal ones by id; top-p keeps the smallest set of
    most likely tokens that reaches it.
    """
    # A stable sort makes ties go to the smaller id, on every rank alike.
    order = np.argsort(-logits, kind="stable")
    if config.top_k:
        order = order[: config.top_k]
    ordered = logits[order].astype(np.float64)
    weights = np.exp((ordered - ordered[0]) / config.temperature)
    cumulative = np.cumsum(weights)
    cumulative /= cumulative[-1]
    keep = int(np.searchsorted(cumulative, config.top_p)) + 1 if config.top_p < 1 else len(order)
    kept = cumulative[:keep]
    return int(order[np.searchsorted(kept, uniform * kept[-1], side="right").clip(max=len(kept) - 1)])
