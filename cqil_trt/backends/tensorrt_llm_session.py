"""Runs a TensorRT-LLM engine with TensorRT-LLM's own C++ runner, one process a rank.

Rank 0 enqueues requests, the other ranks' executors take part, and rank 0 tells them what came out. Generation is one
request for each sequence. What validation asks for (logits of every token, one decode step at a time) is answered by
requests of one token, each with everything before it as its prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cqil_trt import cuda
from cqil_trt.backends.tensorrt_llm import ENGINES
from cqil_trt.backends.tensorrt_llm_versions import load_plugins
from cqil_trt.collectives.cuda import Workspace
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.sampling import SamplingConfig
from cqil_trt.session import Session


class TensorRtLlmSession(Session):
    """`device`: which GPU, modulo those there are. Raises UserError where the runner cannot load the engine."""

    def __init__(self, engine: Engine, comm: Any, device: int):
        rank = 0 if comm is None else comm.Get_rank()
        super().__init__(engine, rank)
        self._comm, self._workspace = comm, None
        cuda.use_device(device)
        # Before the engine is read: it names plugins of ours, and they look for a workspace when they run.
        if engine.build["collective"] == "plugin" and comm is not None:
            load_plugins()
            self._workspace = Workspace(comm)
            self._workspace.share()
        from tensorrt_llm.runtime import ModelRunnerCpp

        limits = engine.limits
        try:
            self._runner = ModelRunnerCpp.from_dir(
                str(engine.path / ENGINES),
                rank=rank,
                max_batch_size=limits.max_batch_size,
                max_input_len=max(1, limits.max_seq_len - 1),
                max_output_len=limits.max_seq_len,
                enable_chunked_context=False,
            )
        except RuntimeError as error:
            raise UserError(f"{engine.path / ENGINES}: TensorRT-LLM cannot load it: {error}") from None
        self._history: list[list[int]] = []  # every token of each sequence
        self._found = np.zeros((0, 0, 0), np.float32)
        self._kept: np.ndarray | None = None  # the prediction, once somebody asked for it

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        super().check(prompts)
        longest, limit = max(map(len, prompts)), self.limits.max_seq_len - 1
        if longest > limit:
            raise UserError(f"a prompt has {longest} tokens, TensorRT-LLM takes {limit}: it generates one at least")

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        self.check(prompts)
        self._history, self._kept = [list(prompt) for prompt in prompts], None
        self._past = np.array([len(prompt) for prompt in prompts])

    def _start(self, batch: int, longest: int) -> None:
        self._history = [[] for _ in range(batch)]

    def _forward(self, tokens: np.ndarray, past: np.ndarray, select: np.ndarray) -> None:
        for history, length, new in zip(self._history, past, tokens):
            history[length:] = new.tolist()
        logits = self._ask(self._history)
        rows = np.arange(len(tokens))[:, None]
        self._found = logits[rows, past[:, None] + select]

    def _ask(self, prompts: list[list[int]]) -> np.ndarray:
        """The logits behind every token, float32 [B, longest, vocabulary], on every rank."""
        found = self._generate(prompts, 1, return_dict=True)
        logits = found["context_logits"].float().cpu().numpy() if self._plan.rank == 0 else None
        return logits if self._comm is None else self._comm.bcast(logits)

    def _generate(self, prompts: list[list[int]], count: int, **options: Any) -> Any:
        """What the runner gives: on ranks other than 0 nothing."""
        import torch

        options = {"end_id": -1, "pad_id": 0, **options}
        ids = [torch.tensor(prompt, dtype=torch.int32) for prompt in prompts]
        return self._runner.generate(ids, max_new_tokens=count, **options)

    def _mine(self, logits: np.ndarray) -> np.ndarray:
        """The columns this rank is asked for: together the ranks are asked for all."""
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
            history[self.limits.max_seq_len - 2 :] = []  # one that is full stays at its last position
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
        """As `Session.tokens`, but TensorRT-LLM draws for itself: a seed gives other tokens than other backends do."""
        options: dict[str, Any] = {"streaming": True, "return_dict": True, "output_sequence_lengths": True}
        if ends:
            options["end_id"] = ends[0]
        if sampling.temperature:
            options |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
            options["random_seed"] = int(uniforms[0, 0] * 2**31) if len(uniforms) else 0
        else:
            options["top_k"] = 1
        prompts = self._history
        stream = self._generate(prompts, len(uniforms), **options)
        steps = self._steps(iter(stream), [len(prompt) for prompt in prompts], len(uniforms), ends)
        for _ in range(len(uniforms)):
            chosen = next(steps) if self._plan.rank == 0 else None
            yield chosen if self._comm is None else self._comm.bcast(chosen)

    def _steps(
        self, stream: Iterator[Any], lengths: list[int], count: int, ends: tuple[int, ...]
    ) -> Iterator[np.ndarray]:
        """Tokens of all sequences step by step; one that has ended repeats its end."""
        last = ends[0] if ends else -1
        found: list[list[int]] = [[] for _ in lengths]
        for step in range(count):
            while any(len(tokens) <= step and tokens[-1:] != [last] for tokens in found):
                answer = next(stream, None)
                if answer is None:
                    break
                ids, sizes = answer["output_ids"][:, 0].tolist(), answer["sequence_lengths"][:, 0].tolist()
                found = [row[start:end] for row, start, end in zip(ids, lengths, sizes)]
            yield np.array([tokens[step] if step < len(tokens) else last for tokens in found], np.int64)

    def close(self) -> None:
        super().close()
        self._runner = None
        if self._workspace is not None:
            self._workspace.close()
