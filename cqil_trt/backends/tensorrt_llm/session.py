"""Runs a TensorRT-LLM engine with TensorRT-LLM's C++ runner, one process per rank.

Rank 0 enqueues requests, the other ranks' executors work on them, and rank 0 broadcasts the results. Generation is one
request per sequence, and all its tokens come at once: the runner cannot cancel a request, and an abandoned one would
disturb the next. Validation needs the logits of every token and single decode steps. These are requests for one token,
with everything before it as the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cqil_trt.backends.tensorrt_llm.checkpoint import ENGINES
from cqil_trt.backends.tensorrt_llm.versions import load_plugins
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.gpu import cuda
from cqil_trt.gpu.workspace import Workspace
from cqil_trt.sampling import SamplingConfig
from cqil_trt.session import Session


class TensorRtLlmSession(Session):
    """`device`: the GPU's number, modulo the number of GPUs. Raises UserError if the runner cannot load the engine."""

    def __init__(self, engine: Engine, comm: Any, device: int):
        rank = 0 if comm is None else comm.Get_rank()
        super().__init__(engine, rank)
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
        self._history: list[list[int]] = []  # every token of each sequence
        self._found = np.zeros((0, 0, 0), np.float32)
        self._kept: np.ndarray | None = None  # the prediction, once it was asked for

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        self.check(prompts)
        self._history, self._kept = [list(prompt) for prompt in prompts], None
        self._past = np.array([len(prompt) for prompt in prompts])

    def _start(self, lengths: np.ndarray) -> None:
        self._history = [[] for _ in lengths]

    def _forward(self, tokens: np.ndarray, past: np.ndarray, select: np.ndarray) -> None:
        for history, length, new in zip(self._history, past, tokens):
            history[length:] = new.tolist()
        logits = self._ask(self._history)
        rows = np.arange(len(tokens))[:, None]
        self._found = logits[rows, past[:, None] + select]

    def _ask(self, prompts: list[list[int]]) -> np.ndarray:
        """The logits after every token, float32 [B, longest, vocabulary], on every rank."""
        logits = np.zeros((len(prompts), max(map(len, prompts)), self._plan.model.vocab_size), np.float32)
        for row, prompt in zip(logits, prompts):
            # One at a time: the runner confuses the logits of prompts of different lengths.
            found = self._generate([prompt], 1)
            if self._plan.rank == 0:
                row[: len(prompt)] = found["context_logits"][0][: len(prompt)].float().cpu().numpy()
        return logits if self._comm is None else self._comm.bcast(logits)

    def _generate(self, prompts: list[list[int]], count: int, **options: Any) -> Any:
        """The runner's results, on rank 0 only."""
        import torch

        options = {"end_id": -1, "pad_id": 0, "return_dict": True, "output_sequence_lengths": True, **options}
        ids = [torch.tensor(prompt, dtype=torch.int32) for prompt in prompts]
        return self._runner.generate(ids, max_new_tokens=count, **options)

    def _mine(self, logits: np.ndarray) -> np.ndarray:
        """This rank's share of the columns."""
        return logits[..., self._offset : self._offset + self._widths[self._plan.rank]]

    def _keep(self, rows: np.ndarray) -> None:
        """Predictions come from `_predict`."""

    def _last_logits(self) -> np.ndarray:
        return self._mine(self._found)

    def _predict(self) -> np.ndarray:
        if self._kept is None:
            logits, last = self._ask(self._history), [len(history) - 1 for history in self._history]
            self._kept = logits[np.arange(len(last)), last]
        return self._kept

    def _prediction(self) -> np.ndarray:
        return self._mine(self._predict())

    def _step(self, tokens: np.ndarray, past: np.ndarray) -> None:
        for history, token in zip(self._history, tokens):
            history[self.limits.max_seq_len - 1 :] = []  # a full sequence stays at its last position
            history.append(int(token))
        self._kept = None

    def greedy(self) -> np.ndarray:
        return self._predict().argmax(-1)

    def _gather(self, columns: np.ndarray) -> np.ndarray:
        return columns if self._comm is None else np.concatenate(self._comm.allgather(columns), axis=1)

    def joined(self) -> bytes:
        return b""

    def tokens(
        self, sampling: SamplingConfig, uniforms: np.ndarray, ends: tuple[int, ...] = ()
    ) -> Iterator[np.ndarray]:
        """As `Session.tokens`, but TensorRT-LLM samples: a seed gives other tokens than with other backends."""
        options: dict[str, Any] = {"top_k": 1}
        if sampling.temperature:
            seed = int(uniforms[0, 0] * 2**31)
            options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "random_seed": seed}
            options["top_k"] = sampling.top_k
        if ends:
            options["end_id"] = ends[0]
        found = self._continue(len(uniforms), ends, options)
        found = found if self._comm is None else self._comm.bcast(found)
        for step in range(len(uniforms)):
            # After its end a sequence repeats its last token.
            yield np.array([tokens[min(step, len(tokens) - 1)] for tokens in found], np.int64)

    def _continue(self, steps: int, ends: tuple[int, ...], options: dict[str, Any]) -> list[list[int]]:
        """Up to `steps` tokens of every sequence, at least one; on rank 0."""
        found: list[list[int]] = [[] for _ in self._history]
        room = [min(steps, self.limits.max_seq_len + 1 - len(history)) for history in self._history]
        # The runner generates the same number of tokens for all prompts of a call, and each needs room for them.
        for count in sorted(set(room)):
            rows = [row for row, size in enumerate(room) if size == count]
            words = {"stop_words_list": [[[end] for end in ends[1:]]] * len(rows)} if len(ends) > 1 else {}
            answer = self._generate([self._history[row] for row in rows], count, **options, **words)
            for i, row in enumerate(rows if self._plan.rank == 0 else ()):
                end = int(answer["sequence_lengths"][i][0])
                found[row] = answer["output_ids"][i][0][len(self._history[row]) : end].tolist()
        return found

    def time_decode(self, steps: int) -> list[float]:
        """As `Session.time_decode`, but every entry is the mean: the runner does not report times per token.

        The time of a completion of one token, which is mostly the prompt's, is subtracted.
        """

        def took(count: int) -> float:
            began = time.perf_counter()
            self._continue(count, (), {"top_k": 1})
            if self._comm is not None:
                self._comm.Barrier()  # rank 0 has the answer before the others are done
            return (time.perf_counter() - began) * 1e3

        room = min(steps + 1, self.limits.max_seq_len + 1 - max(map(len, self._history)))
        first, whole = took(1), took(room)
        return [(whole - first) / max(room - 1, 1)] * steps

    def close(self) -> None:
        super().close()
        self._runner = None
        if self._workspace is not None:
            self._workspace.close()
