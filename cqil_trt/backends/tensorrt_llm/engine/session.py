"""Runs a TensorRT-LLM engine with TensorRT-LLM's C++ runner, one process per rank.

Rank 0 enqueues requests, the other ranks' executors work on them, and rank 0 broadcasts the results. A sequence's
tokens are one request and come all at once, when the first of them is collected: the runner cannot cancel a request,
and an abandoned one would disturb the next. Later steps hand out the tokens. The logits of a prompt are a request for
one token.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from cqil_trt.backends.tensorrt_llm.engine import ENGINES
from cqil_trt.backends.tensorrt_llm.versions import load_plugins
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.gpu import cuda
from cqil_trt.gpu.workspace import Workspace
from cqil_trt.sampling import Choice, SamplingConfig
from cqil_trt.scheduler import Outcome, Start, Step
from cqil_trt.session import Session


class TensorRtLlmSession(Session):
    """`device`: the GPU's number, modulo the number of GPUs. Raises UserError if the runner cannot load the engine."""

    def __init__(self, engine: Engine, comm: Any, device: int):
        rank = 0 if comm is None else comm.Get_rank()
        super().__init__(engine, rank, engine.limits.max_batch_size)
        # All prompts of a batch are known before the first of its tokens is asked for.
        self.ahead = self.slots
        # The runner generates at least one token, so a prompt must not fill the engine.
        self.limits = replace(engine.limits, max_seq_len=engine.limits.max_seq_len - 1)
        self._comm, self._workspace = comm, None
        cuda.use_device(device)
        # Before the engine is read: it contains our plugins, which look for a workspace when they run.
        if engine.build["collective"] == "plugin" and comm is not None:
            load_plugins()
            self._workspace = Workspace(comm)
            self._workspace.share()
        from tensorrt_llm.runtime import ModelRunnerCpp

        try:
            self._runner = ModelRunnerCpp.from_dir(
                str(engine.path / ENGINES), rank=rank, max_batch_size=engine.limits.max_batch_size
            )
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"{engine.path / ENGINES}: TensorRT-LLM cannot load it: {error}") from None
        self._sequences: dict[int, _Sequence] = {}  # by slot
        self._flying: deque[tuple[Step, dict[int, tuple[_Sequence, int]], np.ndarray | None]] = deque()

    def submit(self, step: Step) -> None:
        for start in step.starts:
            _check_sampling(start.sampling)
            self._sequences[start.slot] = _Sequence(start)
        chunk, scored = step.chunk, None
        if chunk is not None and chunk.scored:
            end = chunk.past + len(chunk.tokens)
            scored = self._ask(list(self._sequences[chunk.slot].start.prompt))[end - chunk.predict : end]
        # Which of its sequence's tokens each slot is to give.
        places = {}
        for slot in step.choosing:
            sequence = self._sequences[slot]
            places[slot] = sequence, sequence.given
            sequence.given += 1
        self._flying.append((step, places, scored))

    def choose(self, masks: Mapping[int, np.ndarray]) -> None:
        raise RuntimeError("TensorRT-LLM's runner takes no masks")

    def collect(self) -> Outcome:
        step, places, scored = self._flying.popleft()
        if any(sequence.tokens is None for sequence, _ in places.values()):
            self._complete([s for s in self._sequences.values() if s.tokens is None and s.start.room])
        choices = {}
        for slot, (sequence, place) in places.items():
            tokens = sequence.tokens or []
            # After its end a sequence repeats its last token.
            choices[slot] = [Choice(tokens[min(place, len(tokens) - 1)])]
        return self._note(Outcome(choices=choices, logits=scored))

    def _ask(self, prompt: list[int]) -> np.ndarray:
        """The logits after every token, float32 [tokens, vocabulary], on every rank."""
        # Several at a time are not possible: the runner confuses the logits of prompts of different lengths.
        found = self._generate([prompt], 1)
        logits = np.zeros((len(prompt), self.vocab_size), np.float32)
        if self._plan.rank == 0:
            logits[:] = found["context_logits"][0][: len(prompt)].float().cpu().numpy()
        return logits if self._comm is None else self._comm.bcast(logits)

    def _generate(self, prompts: list[list[int]], count: int, **options: Any) -> Any:
        """The runner's results, on rank 0 only."""
        import torch

        options = {"end_id": -1, "pad_id": 0, "return_dict": True, "output_sequence_lengths": True, **options}
        ids = [torch.tensor(prompt, dtype=torch.int32) for prompt in prompts]
        return self._runner.generate(ids, max_new_tokens=count, **options)

    def _complete(self, sequences: Sequence[_Sequence]) -> None:
        """Generates all tokens of these sequences. TensorRT-LLM samples: a seed gives other tokens than elsewhere."""
        found: list[list[int]] = [[] for _ in sequences]
        # The runner generates the same number of tokens for all prompts of a call, and samples them alike.
        kinds: dict[Any, list[int]] = {}
        for row, sequence in enumerate(sequences):
            kinds.setdefault((sequence.start.room, sequence.start.ends, sequence.start.sampling), []).append(row)
        for (room, ends, sampling), rows in sorted(kinds.items(), key=lambda kind: kind[0][0]):
            options: dict[str, Any] = {"top_k": 1}
            if sampling.temperature:
                options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
                options["random_seed"] = sampling.seed
            if ends:
                options["end_id"] = ends[0]
            if len(ends) > 1:
                options["stop_words_list"] = [[[end] for end in ends[1:]]] * len(rows)
            prompts = [list(sequences[row].start.prompt) for row in rows]
            answer = self._generate(prompts, room, **options)
            for i, row in enumerate(rows if self._plan.rank == 0 else ()):
                end = int(answer["sequence_lengths"][i][0])
                found[row] = answer["output_ids"][i][0][len(prompts[i]) : end].tolist()
        found = found if self._comm is None else self._comm.bcast(found)
        for sequence, tokens in zip(sequences, found):
            sequence.tokens = tokens

    def joined(self) -> bytes:
        return b""

    def logits(self) -> np.ndarray:
        raise RuntimeError("TensorRT-LLM's runner gives the logits of prompts only")

    def load(self, prompt: Sequence[int], slot: int = 0) -> int:
        self._sequences[slot] = sequence = _Sequence(
            Start(slot=slot, prompt=tuple(prompt), sampling=SamplingConfig(), room=1)
        )
        self._complete([sequence])
        return (sequence.tokens or [])[0]

    def time_decode(self, slots: Sequence[int], steps: int, drafted: int = 0) -> list[float]:
        """As `Session.time_decode`, but every entry is the mean: the runner does not report times per token.

        The time of a completion of one token, which is mostly the prompt's, is subtracted.
        """
        if drafted:
            raise UserError("this backend does not verify drafts")
        starts = [self._sequences[slot].start for slot in slots]

        def took(count: int) -> float:
            began = time.perf_counter()
            self._complete([_Sequence(replace(start, room=count)) for start in starts])
            if self._comm is not None:
                self._comm.Barrier()  # rank 0 has the answer before the others are done
            return (time.perf_counter() - began) * 1e3

        room = min(steps + 1, self.limits.max_seq_len + 1 - max(len(start.prompt) for start in starts))
        first, whole = took(1), took(room)
        return [(whole - first) / max(room - 1, 1)] * steps

    def close(self) -> None:
        super().close()
        self._runner = None
        if self._workspace is not None:
            self._workspace.close()


class _Sequence:
    """`tokens`: all that it generates, None before; `given`: how many of them the steps submitted so far hand out."""

    def __init__(self, start: Start):
        self.start = start
        self.tokens: list[int] | None = None
        self.given = 0


def _check_sampling(sampling: SamplingConfig) -> None:
    """Raises UserError for what this session does not ask the runner for."""
    asked = {"temperature", "top_k", "top_p", "seed"}
    for field in fields(SamplingConfig):
        if field.name not in asked and getattr(sampling, field.name) != field.default:
            raise UserError(f"backend tensorrt-llm: {field.name} is not supported")
