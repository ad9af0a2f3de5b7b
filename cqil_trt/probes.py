"""The float32 reference's answers to a few prompts, stored in the engine for validation without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cqil_trt.errors import UserError
from cqil_trt.tokenizer import Tokenizer, has_tokenizer

FILE = "reference.npz"
STEPS = 32
# Most likely tokens whose logits are stored per step; a token below all of them is wrong.
TOP = 64
TEXTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "Water boils at 100 degrees Celsius at sea level. At higher altitudes the air pressure is lower, so",
)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One prompt and its answer.

    Attributes:
        prompt: token ids.
        logits: after every token of the prompt, float32 [tokens, vocabulary].
        tokens: the greedy continuation.
        top_tokens, top_logits: each step's most likely tokens and their logits, [steps, up to TOP], in that order.
    """

    prompt: list[int]
    logits: np.ndarray
    tokens: list[int]
    top_tokens: np.ndarray
    top_logits: np.ndarray

    def gap(self, step: int, token: int) -> float:
        """The reference's logit margin of its own token at `step` over `token`; a lower bound if that is not stored."""
        found = np.flatnonzero(self.top_tokens[step] == token)
        place = int(found[0]) if len(found) else self.top_logits.shape[1] - 1
        return float(self.top_logits[step, 0] - self.top_logits[step, place])


def prompts(directory: Path, vocab_size: int, max_seq_len: int) -> list[list[int]]:
    """The default prompts: built-in texts, or random tokens if the engine has no tokenizer."""
    if has_tokenizer(directory):
        tokenizer = Tokenizer(directory)
        found = [tokenizer.encode(text) for text in TEXTS]
    else:
        random = np.random.default_rng(0)
        found = [random.integers(vocab_size, size=length).tolist() for length in (6, 20, 33)]
    # A small engine gets only their beginning, and has room to continue.
    return [prompt[: max(1, max_seq_len // 2)] for prompt in found]


def save(directory: Path, probes: Sequence[Probe]) -> Path:
    arrays: dict[str, Any] = {}
    for number, probe in enumerate(probes):
        for name, value in vars(probe).items():
            arrays[f"{number}.{name}"] = np.asarray(value)
    path = directory / FILE
    np.savez(path, **arrays)
    return path


def load(directory: Path) -> list[Probe]:
    """The probes of an engine directory; empty if it was built without. Raises UserError for a damaged file."""
    path = directory / FILE
    if not path.exists():
        return []
    try:
        with np.load(path, allow_pickle=False) as arrays:
            count = len({name.partition(".")[0] for name in arrays})
            return [
                Probe(
                    prompt=arrays[f"{number}.prompt"].tolist(),
                    logits=arrays[f"{number}.logits"],
                    tokens=arrays[f"{number}.tokens"].tolist(),
                    top_tokens=arrays[f"{number}.top_tokens"],
                    top_logits=arrays[f"{number}.top_logits"],
                )
                for number in range(count)
            ]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}): rebuild the engine") from None
