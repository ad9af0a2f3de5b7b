"""An engine and the reference as models of lm-evaluation-harness.

The harness runs on rank 0; the other ranks serve it, because all ranks must call the engine together.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from cqil_trt.errors import UserError
from cqil_trt.llm import Llm
from cqil_trt.quality.perplexity import negative_log_likelihood
from cqil_trt.reference import device_of
from cqil_trt.tokenizer import Tokenizer

# The maximum of generated tokens if a task does not set one.
_MAX_GENERATED = 256
# Requests between two updates of the progress bar.
_SHARE = 64


class EngineLM(TemplateLM):
    """A loaded engine. Every rank makes one; rank 0 gives it to the harness, the others call `serve`."""

    def __init__(self, llm: Llm):
        super().__init__()
        self.llm = llm
        self._tokens = llm.tokenizer or Tokenizer(llm.engine.path)
        self.max_length = llm.engine.limits.max_seq_len

    @property
    def eot_token_id(self) -> int:
        token = self._tokens.special("eos_token")
        if token is None:
            raise UserError(
                f"{self.llm.engine.path}: its tokenizer has no EOS token, which lm-evaluation-harness needs"
            )
        return token

    @property
    def prefix_token_id(self) -> int:
        token = self._tokens.special("bos_token")
        return self.eot_token_id if token is None else token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return _encode(self._tokens, string, self.prefix_token_id, add_special_tokens)

    # Called by the harness, on rank 0

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        # One pass answers all one-token choices after the same text.
        places: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(f"an answer has {len(continuation)} tokens, more than the maximum of {self.max_length}")
            # The last token is only predicted; a text that is too long loses its beginning.
            taken = (context + continuation)[-self.max_length - 1 :][:-1]
            places.setdefault(tuple(taken), []).append(number)
        questions = [(list(text), [requests[number][2] for number in numbers]) for text, numbers in places.items()]
        found = self._in_shares("score", questions, "scoring", disable_tqdm)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for numbers, several in zip(places.values(), found):
            for number, answer in zip(numbers, several):
                answers[number] = answer
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
                )
            ]
            for request in requests
        ]
        scores = iter(self._loglikelihood_tokens([window for text in windows for window in text], disable_tqdm))
        return [sum(next(scores)[0] for _ in text) for text in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        by_options: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_options.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        texts = [""] * len(requests)
        for numbers in by_options.values():
            options = normalize_gen_kwargs(requests[numbers[0]].args[1], _MAX_GENERATED)
            room = self.max_length - options["max_gen_toks"]
            if room < 1:
                raise UserError(
                    f"a task generates up to {options['max_gen_toks']} tokens, and the maximum is {self.max_length}: "
                    "give a larger --max-length, and build the engine with a larger --max-seq-len"
                )
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            stop = [text for text in options["until"] if text]
            given = {
                "max_new_tokens": options["max_gen_toks"],
                "stop": stop,
                "temperature": options["temperature"] if options["do_sample"] else 0.0,
            }
            for number, text in zip(numbers, self._on_all_ranks("complete", prompts, given)):
                texts[number] = postprocess_generated_text(text, stop, None)
        return texts

    def _in_shares(self, method: str, items: list[Any], label: str, quiet: bool) -> list[Any]:
        found: list[Any] = []
        size = _SHARE * self.llm.replicas
        with tqdm(total=len(items), desc=label, disable=quiet, leave=False) as bar:
            for first in range(0, len(items), size):
                found += self._on_all_ranks(method, items[first : first + size])
                bar.update(len(found) - bar.n)
        return found

    # Run on all ranks together

    def _on_all_ranks(self, method: str, *arguments: Any) -> Any:
        """Calls the method of this name on every rank. To be called on rank 0, while the others are in `serve`."""
        self.llm.job.wait()
        self.llm.job.broadcast((method, arguments))
        return getattr(self, method)(*arguments)

    def serve(self) -> None:
        """Runs rank 0's calls until it sends "stop". Raises UserError if rank 0 stopped because of an error."""
        while True:
            self.llm.job.wait()
            method, arguments = self.llm.job.broadcast(None)
            if method == "stop":
                (error,) = arguments
                if error is not None:
                    raise UserError(error)
                return
            # A UserError is raised on every rank, and rank 0 sends "stop" next.
            with suppress(UserError):
                getattr(self, method)(*arguments)

    def finish(self, error: str | None = None) -> None:
        """Ends `serve` on the other ranks, which raise `error` if there is one."""
        self.llm.job.wait()
        self.llm.job.broadcast(("stop", (error,)))

    def score(self, questions: Sequence[tuple[list[int], list[list[int]]]]) -> list[list[tuple[float, bool]]]:
        """For each text and its continuations: their log-likelihoods, and whether greedy decoding gives them.

        The text includes the continuations except their last tokens.
        """
        mine = questions[self.llm.replica :: self.llm.replicas]
        found = self.llm.job.agree(lambda: [self._score_one(*question) for question in mine])
        return self.llm.merge(found, len(questions))

    def _score_one(self, text: list[int], continuations: list[list[int]]) -> list[tuple[float, bool]]:
        longest = max(map(len, continuations))
        logits = self.llm.runner.score(text, first=len(text) - longest)
        likeliest = logits.argmax(-1)
        return [
            (
                -float(negative_log_likelihood(logits[-len(tokens) :], tokens).sum(dtype=np.float64)),
                bool((likeliest[-len(tokens) :] == tokens).all()),
            )
            for tokens in map(np.array, continuations)
        ]

    def complete(self, prompts: Sequence[list[int]], options: Mapping[str, Any]) -> list[str]:
        # Not the completion's text, which ends before a stop text: the harness truncates it itself.
        return [self._tokens.decode(completion.tokens) for completion in self.llm.generate(prompts, **options)]


def _encode(tokenizer: Tokenizer, text: str, prefix: int, special: bool | None) -> list[int]:
    """Token ids as in the harness's own models: no special tokens if the text already begins with the prefix."""
    if special is None:
        special = not text.startswith(tokenizer.text_of(prefix))
    return tokenizer.encode(text, special)


class _ReferenceLM(HFLM):
    """The harness's transformers model with the engines' token ids: transformers' tokenizer classes read some files
    differently."""

    def __init__(self, tokens: Tokenizer, **options: Any):
        self._tokens = tokens
        super().__init__(**options)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        return _encode(self._tokens, string, self.prefix_token_id, add_special_tokens)[-(left_truncate_len or 0) :]

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        width, left = max(map(len, rows)), padding_side == "left"
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            place = slice(width - len(tokens), width) if left else slice(len(tokens))
            ids[row, place], mask[row, place] = torch.tensor(tokens), 1
        return ids, mask

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        tokens = [tokens] if isinstance(tokens, int) else list(map(int, tokens))
        return self._tokens.decode(tokens) if skip_special_tokens else "".join(map(self._tokens.text_of, tokens))


def reference_lm(network: Any, tokenizer: Any, tokens: Tokenizer, max_length: int, batch_size: int) -> HFLM:
    """A Hugging Face model (or one with CQIL's forward pass) as the harness's transformers model.

    `tokenizer`: the checkpoint's in transformers, for everything except token ids; `tokens`: ours, for those.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about models that are already loaded
    options = {"max_length": max_length, "batch_size": batch_size}
    lm = _ReferenceLM(tokens, pretrained=network, tokenizer=tokenizer, **options)
    lm._device = device_of(network)  # by default that of the weights, which have none in a model in pieces
    return lm


def task_manager(names: Sequence[str], directory: Path | None) -> TaskManager:
    """The harness's tasks, with those of `directory`. Raises UserError for an unknown name."""
    if directory is not None and not directory.is_dir():
        raise UserError(f"--task-path {directory}: no such directory")
    manager = TaskManager(include_path=None if directory is None else str(directory))
    for name in names:
        if not manager.match_tasks([name]):
            raise UserError(f"--tasks {name}: no task or group of this name (lm-eval ls tasks lists them)")
    return manager


def run_tasks(
    lm: Any, manager: TaskManager, names: Sequence[str], num_fewshot: int | None, limit: int | None
) -> dict[str, Any]:
    """The harness's results of the tasks: `results`, and `samples` with every item's answer.

    Raises UserError if a task's data or packages are not available, or its questions do not fit.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        found = simple_evaluate(
            lm, tasks=list(names), num_fewshot=num_fewshot, limit=limit, task_manager=manager, bootstrap_iters=1000
        )
    # OSError and ValueError: `datasets`, without network and cached copy; ImportError: tasks that need other packages;
    # AssertionError: the harness, about tasks that do not fit the lengths.
    except (OSError, ValueError, ImportError, AssertionError) as error:
        raise UserError(f"--tasks {','.join(names)}: {' '.join(str(error).split())[:300]}") from None
    if found is None:
        raise RuntimeError("lm-evaluation-harness returned no results: it was not called on rank 0")
    return found
