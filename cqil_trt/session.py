"""Executes steps on one rank, independent of the backend; results are numpy arrays, the same on all ranks."""

from __future__ import annotations

import time
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.sampling import Choice, Sampler, SamplingConfig
from cqil_trt.scheduler import Chunk, Circle, Outcome, Start, Step
from cqil_trt.speculation import MAX_TOKENS, StepCosts


def cache_bytes(engine: Engine, rank: int) -> int:
    """Bytes of a rank's KV cache per sequence."""
    return engine.plan(rank).cache_bytes(engine.limits)


def available_memory() -> int:
    """Bytes of the host's memory that programs can still take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/meminfo has no MemAvailable: Linux 3.14 or newer is needed")


def fitting_slots(wanted: int, free: int, each: int, comm: Any) -> int:
    """How many of the wanted sequences fit into `free` bytes on every rank, at `each` bytes per sequence.

    `comm`: an mpi4py communicator of the ranks, None for one. Raises UserError on every rank when none fits.
    """
    mine = min(wanted, free // each) if each else wanted
    found = mine if comm is None else min(comm.allgather(mine))
    if found < 1:
        raise UserError(
            f"no memory for the KV cache of one sequence ({each / 1e9:.2f} GB on this rank, {free / 1e9:.2f} GB free): "
            "build with a smaller --max-seq-len"
        )
    return found


class Session(ABC):
    """Runs this rank's network over sequences in slots of a KV cache. All ranks of an engine call its methods together.

    `submit` begins a step, `collect` returns the outcome of the oldest one whose outcome was not collected. A step with
    guided slots needs `choose` in between.

    `slots`: sequences that the cache holds. `ahead`: steps that are worth submitting before the oldest is collected.
    `step_costs`: how long decode steps take, by their rows; None where no drafts are verified, because a decode step
    takes one token of each sequence. `drafts_penalized`: whether drafts of a sequence with penalties can be verified.
    B: sequences of a pass, T: tokens of each, K: tokens to predict from.
    """

    ahead = 0
    step_costs: StepCosts | None = None
    drafts_penalized = True
    on_gpu = False

    def __init__(self, engine: Engine, rank: int, slots: int):
        self.limits, self.slots = engine.limits, slots
        self.vocab_size = engine.model.vocab_size
        # Keys of earlier tokens depend on the length of their prompt where dynamic rope rotates by it.
        self.reuses = engine.limits.max_seq_len <= engine.model.fixed_context
        # What the caches of layers with a window hold, where they are circles.
        self.circle = Circle.of(engine.model.sliding_window, engine.limits)
        self._plan = engine.plan(rank)
        spans = [engine.plan(other).vocabulary for other in range(engine.world_size)]
        self._offset = spans[rank][0]
        # The number of logits that each rank computes.
        self._widths = [last - first for first, last in spans]
        # Of all chosen tokens, to be compared with that of other ranks.
        self.digest = 0
        # How long parts of its start took, of which some ran at the same time.
        self.seconds: dict[str, float] = {}

    @abstractmethod
    def submit(self, step: Step) -> None:
        """Begins a step. Its slots hold what earlier steps left there."""

    @abstractmethod
    def choose(self, masks: Mapping[int, np.ndarray]) -> None:
        """Ends the step submitted last: chooses tokens, of which `masks` (`Matcher.mask`) allow some, by slot."""

    @abstractmethod
    def collect(self) -> Outcome:
        """The outcome of the oldest step that was not collected."""

    @abstractmethod
    def joined(self) -> bytes:
        """The residual stream after the last all-reduce of the last call, as bytes, which must be equal on all ranks.

        Empty if the ranks join nothing. Logits would prove little: all ranks receive them from the same senders.
        """

    @abstractmethod
    def logits(self) -> np.ndarray:
        """The logits after the last step, of the last token of each of its sequences, float32 [B, vocabulary]."""

    def close(self) -> None:  # noqa: B027 (optional)
        """Releases the session's resources, on all ranks together. The session cannot be used afterwards."""

    def draft_width(self, sequences: int) -> int:
        """The most tokens of each of so many sequences that a decode step takes."""
        return 1 + MAX_TOKENS

    def padded_width(self, width: int) -> int:
        """The rows that are computed for each sequence in a decode step of `width` tokens of each."""
        return width

    def padded_chunk(self, count: int, past: int) -> int:
        """The rows that are computed for a chunk of `count` tokens after `past`, at most; at most `prefill_chunk`."""
        return count

    def wait(self) -> dict[str, float]:
        """Waits for the weights, which may still be loaded when a session opens; results before that mean nothing.

        All ranks call it together. Returns the seconds of what went on meanwhile. Raises UserError for a damaged file.
        """
        return {}

    def warm_up(self, rows: int, chunk: int, drafts: bool = False) -> dict[str, float]:
        """Prepares decode steps of 1 to `rows` sequences, with `drafts` or without, and chunks of up to `chunk` tokens.

        All ranks call it together; nothing may be running. It needs no weights. Returns the seconds of its parts.
        """
        return {}

    def measure_steps(self) -> None:  # noqa: B027 (optional)
        """Measures `step_costs`, which are an estimate before, where that is quick and drafts are verified.

        All ranks call it together, with the weights there and before any sequence: it leaves nothing in the cache.
        """

    def _note(self, outcome: Outcome) -> Outcome:
        """Counts an outcome that is about to be collected into the digest."""
        for slot, choices in outcome.choices.items():
            for choice in choices:
                self.digest = zlib.crc32(b"%d %d" % (slot, choice.token), self.digest)
        return outcome

    # For measurements: a scheduler of the session must not be in use

    def load(self, prompt: Sequence[int], slot: int = 0) -> int:
        """Reads a prompt into a slot; returns its greedy next token."""
        start = Start(slot=slot, prompt=tuple(prompt), sampling=SamplingConfig(), room=self.limits.max_seq_len)
        size, starts = self.limits.prefill_chunk, [start]
        outcome = Outcome()
        for first in range(0, len(prompt), size):
            tokens = tuple(prompt[first : first + size])
            ends = first + len(tokens) == len(prompt)
            chunk = Chunk(slot=slot, tokens=tokens, past=first, length=len(prompt), choose=ends)
            self.submit(Step(starts=tuple(starts), chunk=chunk))
            outcome, starts = self.collect(), []
        return outcome.choices[slot][0].token

    def time_decode(self, slots: Sequence[int], steps: int, drafted: int = 0) -> list[float]:
        """Milliseconds of each of `steps` decode steps of the sequences in these slots, from where they are.

        `drafted`: tokens drafted for each of them, which are unlikely to be accepted.
        """
        step, times = Step.of(slots, drafted), []
        for _ in range(steps):
            began = time.perf_counter()
            self.submit(step)
            self.collect()
            times.append((time.perf_counter() - began) * 1e3)
        return times


class HostSession(Session):
    """A session that computes at once, in `submit` and `choose`, and chooses tokens on the host."""

    # An estimate for every model, since a step may take seconds: scripts/benchmark_speculation.py, on two cores.
    step_costs: StepCosts | None = StepCosts(steps=(1.0, 1.15))

    def __init__(self, engine: Engine, rank: int, slots: int):
        super().__init__(engine, rank, slots)
        self._samplers: dict[int, Sampler] = {}
        # By slot: the token to append next, and the tokens that the cache holds.
        self._next, self._past = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
        self._outcomes: deque[Outcome] = deque()
        self._choosing: tuple[Step, np.ndarray | None] | None = None

    @abstractmethod
    def _forward(
        self, tokens: np.ndarray, past: np.ndarray, select: np.ndarray, slots: np.ndarray, length: int | None
    ) -> None:
        """One forward pass: int64 tokens [B, T], past [B], select [B, K], slots [B]; its logits stay with the backend.

        `length`: of the whole prompt whose tokens these are, None when the sequences decode.
        """

    @abstractmethod
    def _last_logits(self) -> np.ndarray:
        """This rank's logits of the last pass, float32 [B, K, width]; width 0 on a rank that predicts nothing."""

    @abstractmethod
    def _greedy(self, count: int) -> np.ndarray:
        """The likeliest next tokens after the last `count` of the last pass's K tokens, int64 [B, count].

        Among equals it is the smallest id.
        """

    @abstractmethod
    def _copy(self, source: int, target: int, count: int) -> None:
        """Copies the first `count` tokens of a slot's cache to another slot."""

    @abstractmethod
    def _gather(self, columns: np.ndarray) -> np.ndarray:
        """Every rank's columns (float32 [rows, width]) side by side, on every rank."""

    def submit(self, step: Step) -> None:
        self._start(step.starts)
        chunk = step.chunk
        if chunk is not None:
            select = np.arange(len(chunk.tokens) - chunk.predict, len(chunk.tokens))[None]
            slot = np.array([chunk.slot])
            self._forward(np.array([chunk.tokens]), np.array([chunk.past]), select, slot, chunk.length)
            self._past[chunk.slot] = chunk.past + len(chunk.tokens)
        else:
            slots, width = np.array(step.decode), step.width
            tokens = np.zeros((len(slots), width), np.int64)
            tokens[:, 0] = step.given or self._next[slots]
            for row, draft in zip(tokens, step.drafts):
                row[1 : 1 + len(draft)] = draft  # the padding comes after the draft; the next step overwrites it
            self._forward(tokens, self._past[slots], np.tile(np.arange(width), (len(slots), 1)), slots, None)
        scored = self._gather(self._last_logits()[0]) if chunk is not None and chunk.scored else None
        self._choosing = step, scored
        if not step.guided:
            self.choose({})

    def _start(self, starts: Sequence[Start]) -> None:
        for start in starts:
            if start.cached and start.source != start.slot:
                self._copy(start.source, start.slot, start.cached)
            self._samplers[start.slot] = Sampler(start.sampling, start.prompt, self.vocab_size)

    def choose(self, masks: Mapping[int, np.ndarray]) -> None:
        waiting = self._choosing
        if waiting is None:
            raise RuntimeError("no step waits for masks")
        (step, scored), self._choosing = waiting, None
        slots = step.choosing
        choices: dict[int, list[Choice]] = {}
        if slots:
            plain = all(self._samplers[slot].config.plain for slot in slots)
            rows = self._greedy(step.width) if plain else self._to_choose_from(step.width, scored)
            for slot, row, draft in zip(slots, rows, step.drafts or repeat(())):
                choices[slot] = []
                for prediction, expected in zip(row, (*draft, None)):
                    if plain:
                        choice = Choice(int(prediction))
                    else:
                        choice = self._samplers[slot].choose(prediction, masks.get(slot))
                    choices[slot].append(choice)
                    if choice.token != expected:
                        break
        for slot, chosen in choices.items():
            self._next[slot] = chosen[-1].token
        for slot in step.decode:
            # A full sequence stays at its last position, where its predictions are meaningless.
            self._past[slot] = min(self._past[slot] + len(choices[slot]), self.limits.max_seq_len - 1)
        self._outcomes.append(Outcome(choices=choices, logits=scored))

    def _to_choose_from(self, count: int, scored: np.ndarray | None) -> np.ndarray:
        """The logits after the last `count` tokens of each sequence, [B, count, vocabulary]; `scored`: of a chunk."""
        if scored is not None:
            return scored[None, -count:]
        last = self._last_logits()[:, -count:]
        rows, width = last.shape[0] * last.shape[1], last.shape[2]  # a rank may predict nothing: width 0
        return self._gather(last.reshape(rows, width)).reshape(*last.shape[:2], self.vocab_size)

    def collect(self) -> Outcome:
        return self._note(self._outcomes.popleft())

    def logits(self) -> np.ndarray:
        return self._gather(self._last_logits()[:, -1])
