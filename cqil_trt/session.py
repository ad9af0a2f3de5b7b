"""Prefill and decode on one rank, independent of the backend; results are numpy arrays, the same on all ranks."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.sampling import SamplingConfig, sample


class Session(ABC):
    """Runs batches of sequences through this rank's network. All ranks of an engine call the methods together.

    After `prefill` and after `decode` the session holds each sequence's next-token prediction; `greedy` and `logits`
    read it, with the same result on every rank. B: sequences, T: tokens of one pass, K: tokens to predict from.
    """

    def __init__(self, engine: Engine, rank: int):
        self.limits = engine.limits
        self._plan = engine.plan(rank)
        spans = [engine.plan(other).vocabulary for other in range(engine.world_size)]
        self._offset = spans[rank][0]
        # The number of logits that each rank computes.
        self._widths = [last - first for first, last in spans]
        self._past = np.zeros(0, np.int64)

    # What a backend provides

    @abstractmethod
    def _start(self, lengths: np.ndarray) -> None:
        """Starts a new batch of prompts with these lengths, int64 [B]."""

    @abstractmethod
    def _forward(self, tokens: np.ndarray, past: np.ndarray, select: np.ndarray) -> None:
        """One forward pass: int64 tokens [B, T], past [B], select [B, K]; its logits stay with the backend."""

    @abstractmethod
    def _keep(self, rows: np.ndarray) -> None:
        """Makes the logits of the last pass, which had K = 1, the prediction in these rows (bool [B])."""

    @abstractmethod
    def _last_logits(self) -> np.ndarray:
        """This rank's logits of the last pass, float32 [B, K, width]; width 0 on a rank that predicts nothing."""

    @abstractmethod
    def _prediction(self) -> np.ndarray:
        """This rank's logits of every sequence's next token, float32 [B, width]."""

    @abstractmethod
    def _step(self, tokens: np.ndarray, past: np.ndarray) -> None:
        """Appends one token to every sequence (int64 [B]) and predicts the next."""

    @abstractmethod
    def greedy(self) -> np.ndarray:
        """The most likely next token of every sequence, int64 [B]; the smallest id among equals."""

    @abstractmethod
    def _gather(self, columns: np.ndarray) -> np.ndarray:
        """Every rank's columns (float32 [rows, width]) side by side, on every rank."""

    @abstractmethod
    def joined(self) -> bytes:
        """The residual stream after the last all-reduce of the last call, as bytes, which must be equal on all ranks.

        Empty if the ranks join nothing. Logits would prove little: all ranks receive them from the same senders.
        """

    def tokens(
        self, sampling: SamplingConfig, uniforms: np.ndarray, ends: tuple[int, ...] = ()
    ) -> Iterator[np.ndarray]:
        """Decodes: yields the next token of every sequence, int64 [B], at most len(uniforms) times.

        `uniforms`, float64 [steps, B], are drawn from [0, 1) and consumed by sampling. Tokens of a sequence after one
        of `ends` are meaningless. A caller may stop early; the session may then be a few steps ahead.
        """
        for step, draws in enumerate(uniforms, 1):
            if sampling.temperature == 0:
                chosen = self.greedy()
            else:
                pairs = zip(self.logits(), draws)
                chosen = np.array([sample(row, sampling, draw) for row, draw in pairs], dtype=np.int64)
            yield chosen
            if step < len(uniforms):
                self.decode(chosen)

    def time_decode(self, steps: int) -> list[float]:
        """Milliseconds of each of `steps` greedy decode steps, starting from the current prediction."""
        times = []
        tokens = self.greedy()
        for _ in range(steps):
            began = time.perf_counter()
            self.decode(tokens)
            tokens = self.greedy()
            times.append((time.perf_counter() - began) * 1e3)
        return times

    def close(self) -> None:
        """Releases the session's resources, on all ranks together. The session cannot be used afterwards."""
        self._past = np.zeros(0, np.int64)

    # What is built on it

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Starts a new batch of prompts (token ids) of any lengths.

        Raises UserError for an empty prompt, one longer than the engine, an unknown token, or too many prompts.
        """
        self.check(prompts)
        lengths = np.array([len(prompt) for prompt in prompts])
        longest, chunk = int(lengths.max()), self.limits.prefill_chunk
        tokens = np.zeros((len(prompts), longest), np.int64)
        for row, prompt in zip(tokens, prompts):
            row[: len(prompt)] = prompt
        self._start(lengths)
        for first in range(0, longest, chunk):
            part = tokens[:, first : first + chunk]
            # A prompt that has ended is padded, after every position that it is asked about.
            select = np.clip(lengths - 1 - first, 0, part.shape[1] - 1)[:, None]
            self._forward(part, np.full(len(prompts), first), select)
            self._keep((lengths > first) & (lengths <= first + chunk))
        self._past = np.minimum(lengths, self.limits.max_seq_len - 1)

    def decode(self, tokens: np.ndarray) -> None:
        """Appends one token to every sequence (int64 [B]).

        A full sequence stays at its last position, where its predictions are meaningless; the other sequences of the
        batch continue.
        """
        self._step(tokens, self._past)
        self._past = np.minimum(self._past + 1, self.limits.max_seq_len - 1)

    def logits(self) -> np.ndarray:
        """The next-token logits of every sequence, float32 [B, vocabulary]."""
        return self._gather(self._prediction())

    def score(self, prompt: Sequence[int], first: int = 0) -> np.ndarray:
        """The logits after every token of one prompt from `first` on, float32 [tokens - first, vocabulary].

        This ends the current batch and leaves no prediction: continue with `prefill`.
        """
        self.check([prompt])
        tokens, chunk = np.array([list(prompt)]), self.limits.prefill_chunk
        self._start(np.array([len(prompt)]))
        parts = []
        for begin in range(0, len(prompt), chunk):
            part = tokens[:, begin : begin + chunk]
            # A part before `first` predicts from one token, which is ignored: every pass predicts from at least one.
            asked = min(max(first - begin, 0), part.shape[1])
            select = np.arange(min(asked, part.shape[1] - 1), part.shape[1])
            self._forward(part, np.array([begin]), select[None])
            if asked < part.shape[1]:
                parts.append(self._gather(self._last_logits()[0]))
        self._past = np.array([min(len(prompt), self.limits.max_seq_len - 1)])
        return np.concatenate(parts)

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises UserError unless the engine can take these prompts in one batch."""
        if len(prompts) > self.limits.max_batch_size:
            raise UserError(f"{len(prompts)} prompts, the engine takes {self.limits.max_batch_size} at a time")
        for number, prompt in enumerate(prompts, 1):
            check_prompt(prompt, f"prompt {number}", self._plan.model.vocab_size, self.limits.max_seq_len)


def check_prompt(prompt: Sequence[int], name: str, vocab_size: int, max_seq_len: int) -> None:
    """Raises UserError for token ids that an engine does not accept as a prompt; `name` names them in the message."""
    if not prompt:
        raise UserError(f"{name} is empty")
    if len(prompt) > max_seq_len:
        raise UserError(f"{name} has {len(prompt)} tokens, the engine takes {max_seq_len} (build with --max-seq-len)")
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise UserError(f"{name}: {token!r:.40} is not a token id from 0 to {vocab_size - 1}")
