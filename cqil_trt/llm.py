"""A loaded engine, the interface for `runtime/run.py` and Python users."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cqil_trt import backends, cores
from cqil_trt.engine import Engine, find_engine, rank_file
from cqil_trt.errors import UserError
from cqil_trt.generate import Completion, GenerationConfig, generate
from cqil_trt.job import Job
from cqil_trt.packages import missing
from cqil_trt.runner import Runner
from cqil_trt.sampling import SamplingConfig
from cqil_trt.scheduler import check_prompt
from cqil_trt.session import Session
from cqil_trt.speculation import Speculation
from cqil_trt.startup import Startup
from cqil_trt.tokenizer import Conversation, Tokenizer, has_tokenizer


def newest_engine(ranks: int, device: str) -> Path:
    """The newest engine under engines/ that so many ranks run on this host. Raises UserError when there is none."""

    return find_engine(Path("engines"), ranks, lambda engine: why_not_here(engine, device) is None)


def why_not_here(engine: Engine, device: str = "auto") -> str | None:
    """Why an engine cannot be executed on this host; None if it can."""
    try:
        backends.load(engine.backend).check_runnable(engine, device)
    except UserError as error:
        return str(error)
    except ModuleNotFoundError as error:
        return missing(error) or str(error)
    return None


class Llm:
    """One rank's part of a loaded engine. Every rank of the job makes one and calls its methods together.

    If the job has a multiple of the ranks that the engine needs, consecutive ranks form replicas, and prompts are
    assigned to replicas round-robin. `device`: "cpu", "cuda" (each rank takes the next GPU), or "auto". `slots`: the
    sequences that the KV cache holds, by default as many as the engine runs at a time; fewer where memory is short.
    `speculation`: how tokens are drafted, None for not at all; UserError where the backend cannot verify drafts.
    `wait`: for the weights; otherwise `wait` must be called before anything but a warm-up.

    `startup`: how long this took.
    """

    def __init__(
        self,
        directory: Path | None = None,
        job: Job | None = None,
        device: str = "auto",
        slots: int | None = None,
        speculation: Speculation | None = None,
        wait: bool = True,
    ):
        if device not in backends.DEVICES:
            raise UserError(f"device must be one of {', '.join(backends.DEVICES)}, found {device!r}")
        self.startup = Startup()
        self.job = job or Job()
        # Only rank 0 searches, so that ranks cannot disagree while a build finishes.
        path = self.job.share(lambda: directory or newest_engine(self.job.size, device))
        self.engine = self.job.agree(lambda: Engine.open(path))
        comm, self.rank, self.replica = self.job.group(self.engine.world_size)
        backend = backends.load(self.engine.backend)
        self.job.agree(lambda: verify_files(self.engine, backend, self.rank))
        self.startup.end("files")
        wanted = slots or self.engine.limits.max_batch_size
        with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as thread:
            tokenizer = thread.submit(Tokenizer, path) if has_tokenizer(path) else None
            self.session: Session = self.job.agree(
                lambda: backend.open_session(self.engine, comm, device, self.job.rank, wanted)
            )
            _share_cores(self.job)
            self.startup.end("session", self.session.seconds)
            self.tokenizer = None if tokenizer is None else tokenizer.result()
        if slots is None and self.session.slots < wanted and self.job.rank == 0:
            print(f"the KV cache has room for {self.session.slots} of {wanted} sequences", file=sys.stderr)
        self.speculation = speculation
        self.runner = self.job.agree(self.new_runner)
        self.startup.end("tokenizer")
        if wait:
            try:
                self.wait()
            except UserError:
                self.close()  # the process may open another
                raise

    def wait(self) -> None:
        """Waits for the weights, then measures what drafts cost. Raises UserError for a damaged file."""
        self.startup.end("weights", self.job.agree(self.session.wait))
        if self.speculation is not None:
            self.session.measure_steps()
            self.startup.end("step costs")

    def new_runner(self) -> Runner:
        """A runner whose scheduler knows of nothing in the cache: needed after the session was used without it."""
        # Closed sets of prompts: nobody waits for the next token of one while another is read.
        return Runner.of(self.session, "throughput", speculation=self.speculation)

    @property
    def replicas(self) -> int:
        return self.job.size // self.engine.world_size

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text: those of the model's configuration, and the tokenizer's EOS."""
        return end_tokens(self.engine, self.tokenizer)

    def encode(self, prompts: Sequence[str | Conversation | Sequence[int]], chat: bool = False) -> list[list[int]]:
        """Token ids of prompts (texts, conversations or token ids); `chat`: each text is a user's message.

        Raises UserError for an empty prompt, one the engine cannot hold, or a text without a tokenizer.
        """
        if isinstance(prompts, str):
            raise UserError("prompts must be a list: put the text into brackets")
        encoded: list[list[int]] = []
        for number, prompt in enumerate(prompts, 1):
            ids: Sequence[int]
            if isinstance(prompt, (str, Conversation)):
                if not prompt:
                    raise UserError(f"prompt {number} is empty")
                tokenizer = self.tokenizer or Tokenizer(self.engine.path)
                ids = tokenizer.chat(prompt) if chat or isinstance(prompt, Conversation) else tokenizer.encode(prompt)
            else:
                ids = prompt
            model, limits = self.engine.model, self.engine.limits
            check_prompt(ids, f"prompt {number}", model.vocab_size, limits.max_seq_len)
            encoded.append(list(ids))
        return encoded

    def generate(
        self,
        prompts: Sequence[str | Conversation | Sequence[int]],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        chat: bool = False,
        ignore_eos: bool = False,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Completes prompts (text, conversations, or lists of token ids); greedy unless `temperature` is above 0.

        Every rank gives the same arguments and receives all completions, in the order of the prompts. `on_text(index,
        text)` is called on the first rank of the replica that runs the prompt. Raises UserError on every rank.
        """
        ids = self.job.agree(lambda: self.encode(prompts, chat))
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_ids=() if ignore_eos else self.ends,
            stop=tuple(stop),
            sampling=SamplingConfig(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                seed=seed,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
            ),
        )
        mine = range(self.replica, len(ids), self.replicas)
        report = None
        if on_text is not None and self.rank == 0:

            def report(index: int, text: str) -> None:
                on_text(mine[index], text)

        completions = generate(self.runner, [ids[i] for i in mine], config, self.tokenizer, report)
        return self.merge(completions, len(ids))

    def merge(self, mine: list[Any], count: int) -> list[Any]:
        """The results of all `count` items in order, on every rank; `mine`: this replica's, every `replicas`-th one."""
        if self.replicas == 1:
            return mine
        return merge_replicas(self.job.gather(mine), self.engine.world_size, count)

    def close(self) -> None:
        """Releases the engine's memory, on every rank together. No method can be called afterwards."""
        self.session.close()


def verify_files(engine: Engine, backend: backends.Backend, rank: int) -> None:
    """Verifies the files that a rank loads, before it opens its session. Raises UserError for a damaged one."""
    engine.verify_rank(rank, backend.rank_files(rank), but=[rank_file(rank)] if backend.verifies_weights else [])


def end_tokens(engine: Engine, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """As `Llm.ends`."""
    eos = None if tokenizer is None else tokenizer.special("eos_token")
    return tuple(sorted({*engine.model.eos_token_ids, *([] if eos is None else [eos])}))


def merge_replicas(by_rank: Sequence[Sequence[Any]], world_size: int, count: int) -> list[Any]:
    """The results of all `count` prompts in order; `by_rank`: each rank's results for its replica's prompts."""
    replicas = by_rank[::world_size]
    return [replicas[i % len(replicas)][i // len(replicas)] for i in range(count)]


def load(directory: str | Path | None = None, device: str = "auto", speculate: str = "none") -> Llm:
    """Loads an engine inside an MPI job (or, for p = 1, in a single process); default the newest that fits.

    `device`: as `Llm`'s. `speculate`: as run.py's --speculate. Raises UserError, on every rank, for a missing or
    damaged engine or a wrong number of ranks.
    """
    path = None if directory is None else Path(directory)
    return Llm(path, device=device, speculation=Speculation.parse(speculate))


def _share_cores(job: Job) -> None:
    """Splits the host's cores among its ranks if PyTorch is in use, unless the user has set OMP_NUM_THREADS."""
    torch = sys.modules.get("torch")
    if torch is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores.usable() // job.size))
