"""Engine against reference: errors, thresholds, report."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cqil_trt.errors import UserError

if TYPE_CHECKING:
    from cqil_trt.llm import Llm

STEPS = 64
PROBES = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "Water boils at 100 degrees Celsius at sea level. At higher altitudes the air pressure is lower, so",
)


@dataclass(frozen=True)
class Threshold:
    """`relative_l2` of the prefill logits at most; `tokens`: greedy tokens that must be equal, None for all.

    Later tokens may differ only where the reference itself hardly prefers its token: by less than the measured error.
    """

    relative_l2: float
    tokens: int | None


# float16 and bfloat16 keep 11 and 8 significant bits; an engine in them is compared with a float32 reference.
THRESHOLDS = {
    "float32": Threshold(1e-5, None),
    "float16": Threshold(2e-2, 32),
    "bfloat16": Threshold(1e-1, 32),
}


@dataclass(frozen=True)
class Parity:
    """How one prompt compares. `gap`: how much more the reference likes its own token at the first difference."""

    prompt_tokens: int
    relative_l2: float
    max_abs: float
    top1: float
    equal_tokens: int
    steps: int
    gap: float
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    engine_logits: np.ndarray,
    reference_logits: np.ndarray,
    engine_tokens: Sequence[int],
    reference_tokens: Sequence[int],
    step_logits: np.ndarray,
    dtype: str,
) -> Parity:
    """Judges one prompt.

    Args:
        engine_logits, reference_logits: prefill logits, float32 [tokens, vocabulary].
        engine_tokens, reference_tokens: greedy continuations of equal length.
        step_logits: the reference logits that its tokens were chosen from, float32 [steps, vocabulary].
        dtype: the engine's, which decides the threshold.
    """
    threshold = THRESHOLDS[dtype]
    difference = engine_logits.astype(np.float64) - reference_logits
    relative = float(np.linalg.norm(difference) / np.linalg.norm(reference_logits.astype(np.float64)))
    max_abs = float(np.abs(difference).max())
    top1 = float((engine_logits.argmax(-1) == reference_logits.argmax(-1)).mean())
    steps = len(reference_tokens)
    equal = next((i for i in range(steps) if engine_tokens[i] != reference_tokens[i]), steps)
    gap = 0.0
    if equal < steps:
        gap = float(step_logits[equal, reference_tokens[equal]] - step_logits[equal, engine_tokens[equal]])
    needed = steps if threshold.tokens is None else min(threshold.tokens, steps)
    # Both logits of a pair may be off by the measured error, in opposite directions.
    same_tokens = equal >= needed or (threshold.tokens is not None and gap <= 2 * max_abs)
    # A NaN compares false, and so fails.
    passed = relative <= threshold.relative_l2 and same_tokens
    return Parity(len(engine_logits), relative, max_abs, top1, equal, steps, gap, passed)


def validate(llm: Llm, prompts: Sequence[Sequence[int]], steps: int = STEPS) -> list[Parity]:
    """Compares the loaded engine with the reference on prompts of token ids, on every rank of the job.

    The reference runs in float32 on rank 0, on the checkpoint (and adapter) the engine was built from. Raises
    UserError when that cannot be loaded, or when ranks or replicas disagree about a logit or a token.
    """
    state = hashlib.sha256()
    engine_logits: list[np.ndarray] = []
    engine_tokens: list[list[int]] = []
    lengths = [min(steps, llm.engine.limits.max_seq_len - len(prompt) + 1) for prompt in prompts]
    for prompt, length in zip(prompts, lengths):
        engine_logits.append(llm.session.score(prompt))
        state.update(llm.session.joined())
        llm.session.prefill([prompt])
        tokens = [llm.session.greedy()]
        for _ in range(length - 1):
            llm.session.decode(tokens[-1])
            state.update(llm.session.joined())
            tokens.append(llm.session.greedy())
        engine_tokens.append([int(token[0]) for token in tokens])

    # Residual streams after every forward pass, tokens and logits: of all ranks, and so of all replicas.
    state.update(repr(engine_tokens).encode())
    for logits in engine_logits:
        state.update(logits.tobytes())
    if len(set(llm.job.gather(state.hexdigest()))) > 1:
        raise UserError("the ranks do not hold the same bits: their residual streams, logits or tokens differ")

    def judge() -> list[Parity]:
        import torch

        from cqil_trt import reference

        # The other ranks sleep meanwhile.
        threads = torch.get_num_threads()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        source, cqil = llm.engine.source, llm.engine.cqil
        network = reference.load_hugging_face(source.model, source.lora)
        if cqil.groups:
            network = reference.CqilModel(network, cqil.p, cqil.d, cqil.start, cqil.end, cqil.bypass)
        results = []
        for prompt, length, logits, tokens in zip(prompts, lengths, engine_logits, engine_tokens):
            expected = reference.score(network, prompt).numpy()
            expected_tokens, step_logits = reference.greedy(network, prompt, length)
            dtype = llm.engine.limits.dtype
            results.append(compare(logits, expected, tokens, expected_tokens, step_logits.numpy(), dtype))
        torch.set_num_threads(threads)
        return results

    return llm.job.share(judge)
