"""Measures the quality of configurations for a search: the reference on a text, compared with the unchanged model."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cqil_trt import reference
from cqil_trt.checkpoint import Checkpoint
from cqil_trt.config import AUTO, CqilConfig, EngineLimits
from cqil_trt.formats import DENSE
from cqil_trt.quality.perplexity import Scores, reference_logits, score_reference
from cqil_trt.quality.search import Candidate, Quality

if TYPE_CHECKING:
    from torch import nn

# Networks up to this size, in bytes, stay in memory for every format; of larger ones only the last.
_KEPT_BYTES = 2 << 30


class Measure:
    """Measures candidates for a model (a directory or .gguf file) on blocks of token ids, int [N, T].

    `network`: the model, unchanged, as `reference.from_reader` makes it. Matrices in another format are rounded as a
    build for engines in `dtype` rounds them, and everywhere keys and values for KV caches in `kv_dtype`. `by`: one of
    `search.MEASURES`, the cost of a candidate: the rise of its log-perplexity, or its divergence from the unchanged
    model, KL(unchanged || candidate). Both are in nats per token.
    """

    def __init__(self, path: Path, network: nn.Module, blocks: np.ndarray, dtype: str, by: str, kv_dtype: str = AUTO):
        self._path, self._blocks, self._by = path, blocks, by
        scales = () if kv_dtype == AUTO else Checkpoint(path, tokenizer=False).kv_scales
        self._limits = EngineLimits(dtype=dtype, kv_dtype=kv_dtype, kv_scales=scales)
        reference.with_kv_cache(network, self._limits)
        self._networks = {(DENSE, DENSE): reference.CqilModel.of(network, CqilConfig(p=1))}  # undoes any other
        self._logits = reference_logits(network, blocks) if by == "divergence" else None
        begun = time.perf_counter()
        self.unchanged = score_reference(network, blocks)
        self.seconds = time.perf_counter() - begun

    def __call__(self, candidate: Candidate) -> Quality:
        # Applied to the unchanged configuration too: it undoes the one before.
        network = reference.CqilModel.of(self._network(candidate.weights, candidate.head), candidate.cqil)
        return self.quality(score_reference(network, self._blocks, against=self._logits))

    def quality(self, scores: Scores) -> Quality:
        values = scores.to_dict(self.unchanged)
        if self._by == "perplexity":
            return Quality(cost=scores.log_perplexity - self.unchanged.log_perplexity, values=values)
        divergence = scores.divergence or 0.0  # that of the unchanged model from itself
        return Quality(cost=divergence, values={**values, "divergence": divergence})

    def _network(self, weights: str, head: str) -> nn.Module:
        if (weights, head) not in self._networks:
            if sum(p.nbytes for each in self._networks.values() for p in each.parameters()) > _KEPT_BYTES:
                self._networks.clear()
                reference.free_memory()
            checkpoint = Checkpoint(self._path, tokenizer=False)
            limits = replace(self._limits, weights=weights, head=head)
            checkpoint.quantize(limits)
            pieces = False if limits.quantized else None
            network = reference.from_reader(checkpoint.model, checkpoint.reader, pieces=pieces)
            self._networks[weights, head] = reference.with_kv_cache(network, limits)
        return self._networks[weights, head]
