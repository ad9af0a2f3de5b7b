"""Prefill and decode on one rank: the engine's weights, its KV cache, and what the ranks say together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cqil_trt.collectives import Communicator
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.network.decoder import decode
from cqil_trt.network.torch_ops import TorchOps


class Session:
    """Runs batches of sequences through this rank's network. All ranks of an engine call the methods together.

    After `prefill` and after `decode` the session holds each sequence's next-token prediction; `greedy` and `logits`
    read it, and give the same on every rank.
    """

    def __init__(self, engine: Engine, communicator: Communicator):
        from safetensors.torch import load_file

        self.limits = engine.limits
        self._communicator = communicator
        self._plan = engine.plan(communicator.rank)
        weights = load_file(engine.rank_file(communicator.rank))
        first, last = self._plan.vocabulary
        if self._plan.shares_embedding:
            weights["lm_head.weight"] = weights["embedding.weight"][first:last]
        self._offset = first
        self._widths = [b - a for a, b in (engine.plan(rank).vocabulary for rank in range(engine.world_size))]
        dtype = getattr(torch, engine.limits.dtype)
        limits = engine.limits
        self._ops = TorchOps(self._plan, weights, communicator, limits.max_batch_size, limits.max_seq_len, dtype)
        self._past = torch.zeros(0, dtype=torch.long)
        self._output = torch.empty(0)

    @torch.inference_mode()
    def _forward(self, tokens: torch.Tensor, past: torch.Tensor, select: torch.Tensor) -> torch.Tensor:
        """This rank's logits, float32 [B, K, width]; width 0 on a rank that predicts nothing."""
        out = decode(self._ops, tokens, past, select)
        if not self._plan.schedule.predicts:
            return torch.empty(*select.shape, 0)
        return out.float()

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Starts over with these prompts (token ids), of any lengths, in one forward pass.

        Raises UserError for an empty prompt, one longer than the engine, an unknown token, or too many prompts.
        """
        self.check(prompts)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row, prompt in zip(tokens, prompts):
            row[: len(prompt)] = torch.tensor(prompt)
        self._output = self._forward(tokens, torch.zeros_like(lengths), lengths[:, None] - 1)[:, 0]
        self._past = lengths.clamp(max=self.limits.max_seq_len - 1)

    def decode(self, tokens: np.ndarray) -> None:
        """Appends one token to every sequence (int64 [B]).

        A sequence that is full stays at its last position: its predictions mean nothing from there on, and the others
        in the batch go on.
        """
        new = torch.from_numpy(tokens)[:, None]
        self._output = self._forward(new, self._past, torch.zeros_like(new))[:, 0]
        self._past = (self._past + 1).clamp(max=self.limits.max_seq_len - 1)

    def greedy(self) -> np.ndarray:
        """The most likely next token of every sequence, int64 [B]; the smallest id among equals."""
        if self._output.shape[-1]:
            values, indices = self._output.max(dim=-1)
            # max returns any of equal values; argmax of the whole would be the first.
            indices = (self._output == values[:, None]).int().argmax(dim=-1)
        else:
            values = torch.full((len(self._past),), -torch.inf)
            indices = torch.zeros(len(self._past), dtype=torch.long)
        return self._communicator.argmax(values, indices + self._offset).numpy()

    def logits(self) -> np.ndarray:
        """The next-token logits of every sequence, float32 [B, vocabulary]."""
        return self._communicator.gather_columns(self._output, self._widths).numpy()

    def score(self, prompt: Sequence[int]) -> np.ndarray:
        """The logits after every token of one prompt, float32 [tokens, vocabulary]. Starts over, as `prefill` does."""
        self.check([prompt])
        tokens = torch.tensor([list(prompt)])
        out = self._forward(tokens, torch.zeros(1, dtype=torch.long), torch.arange(len(prompt))[None])
        self._past = torch.tensor([len(prompt)]).clamp(max=self.limits.max_seq_len - 1)
        self._output = out[:, -1]
        return self._communicator.gather_columns(out[0], self._widths).numpy()

    def joined(self) -> bytes:
        """The residual stream after the last all-reduce of the last call, as bytes: every rank must hold the same.

        Empty where ranks join nothing. Logits prove little here, as all ranks receive them from the same senders.
        """
        if self._ops.joined is None:
            return b""
        return self._ops.joined.contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises UserError unless the engine can take these prompts in one batch."""
        if len(prompts) > self.limits.max_batch_size:
            raise UserError(f"{len(prompts)} prompts, the engine takes {self.limits.max_batch_size} at a time")
        for number, prompt in enumerate(prompts, 1):
            check_prompt(prompt, f"prompt {number}", self._plan.model.vocab_size, self.limits.max_seq_len)


def check_prompt(prompt: Sequence[int], name: str, vocab_size: int, max_seq_len: int) -> None:
    """Raises UserError for token ids that an engine cannot start from; `name` is what the message calls them."""
    if not prompt:
        raise UserError(f"{name} is empty")
    if len(prompt) > max_seq_len:
        raise UserError(f"{name} has {len(prompt)} tokens, the engine takes {max_seq_len} (build with --max-seq-len)")
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise UserError(f"{name}: {token!r:.40} is not a token id from 0 to {vocab_size - 1}")
