"""Engine against reference: errors, thresholds, report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cqil_trt import cores, probes
from cqil_trt.config import AUTO, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.probes import Probe
from cqil_trt.runner import Runner
from cqil_trt.scheduler import Request
from cqil_trt.tokenizer import find_tokenizer

if TYPE_CHECKING:
    from cqil_trt.llm import Llm

STEPS = 64


@dataclass(frozen=True)
class Threshold:
    """`relative_l2`: the maximum for prefill logits. `tokens`: greedy tokens that must be equal, None for all.

    Unless all must be equal, an earlier difference passes if it is a near tie: if the reference prefers its own token
    by no more than the measured error.
    """

    relative_l2: float
    tokens: int | None


# float16 and bfloat16 keep 11 and 8 significant bits; an engine in them is compared with a float32 reference.
THRESHOLDS = {
    "float32": Threshold(1e-5, None),
    "float16": Threshold(2e-2, 32),
    "bfloat16": Threshold(1e-1, 32),
}


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The result for one prompt. `gap`: the reference's logit margin for its own token at the first difference."""

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


def threshold_of(limits: EngineLimits) -> Threshold:
    """The threshold for an engine with these limits.

    With an FP8 cache it is that of the next coarser type: keys and values that differ from the reference's by a little
    may have neighbouring codes, which are far apart.
    """
    coarser = {"float32": "float16", "float16": "bfloat16"}
    return THRESHOLDS[limits.dtype if limits.kv_dtype == AUTO else coarser.get(limits.dtype, limits.dtype)]


def compare(engine_logits: np.ndarray, engine_tokens: Sequence[int], probe: Probe, threshold: Threshold) -> Parity:
    """Compares one prompt.

    Args:
        engine_logits: prefill logits, float32 [tokens, vocabulary].
        engine_tokens: the greedy continuation, as long as the probe's.
        probe: the reference's answer.
        threshold: as `threshold_of` gives it.
    """
    difference = engine_logits.astype(np.float64) - probe.logits
    relative = float(np.linalg.norm(difference) / np.linalg.norm(probe.logits.astype(np.float64)))
    max_abs = float(np.abs(difference).max())
    top1 = float((engine_logits.argmax(-1) == probe.logits.argmax(-1)).mean())
    steps = len(probe.tokens)
    equal = next((i for i in range(steps) if engine_tokens[i] != probe.tokens[i]), steps)
    gap = probe.gap(equal, engine_tokens[equal]) if equal < steps else 0.0
    needed = steps if threshold.tokens is None else min(threshold.tokens, steps)
    # Both logits of a pair may be off by the measured error, in opposite directions.
    same_tokens = equal >= needed or (threshold.tokens is not None and gap <= 2 * max_abs)
    # A NaN compares false, so it fails.
    passed = relative <= threshold.relative_l2 and same_tokens
    return Parity(
        prompt_tokens=len(engine_logits),
        relative_l2=relative,
        max_abs=max_abs,
        top1=top1,
        equal_tokens=equal,
        steps=steps,
        gap=gap,
        passed=passed,
    )


# Texts that reveal an inexactly read tokenizer: spaces, lines, digits, scripts, marks, symbols.
TEXTS = (
    "", " ", "  ", "a", " a", "  a", "a ", "a  ", "\n", "\n\n", "a\nb", "a\n\n  b", "\ta\t\tb", "a\r\nb",
    "Hello, world!", "it's WE'LL I'd", "0 12 345 6789 3.14 1,000,000", "héllo naïve ǅ ß ſ",
    "e\u0301 \u200d \u00a0 \u3000 \ufeff", "你好，世界", "こんにちは カタカナ", "안녕하세요", "Привет, мир",
    "مرحبا ٣٤", "नमस्ते", "😀 👩‍👩‍👧 🇫🇷", "½ Ⅷ 𝟘 ™", "def f(x):\n    return x  # ok\n",
    "<0x41> ▁ ▁a", "https://example.org/?q=a%20b&c=d", "a" * 40, "$$ == != -> … — “quoted”",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TokenParity:
    """How many test texts have the same token ids in the engine's tokenizer and in the checkpoint's.

    `judge`: where the checkpoint's tokenizer is. `first`: the first text that differs.
    """

    judge: str
    texts: int
    equal: int
    first: str | None

    @property
    def passed(self) -> bool:
        return self.equal == self.texts


@dataclass(frozen=True)
class Validation:
    """The result for every prompt. `reference`: "live" (the checkpoint, now) or "stored" (at build time).

    `tokens`: the result for the tokenizer; None without one, or if the checkpoint's is not available.
    """

    results: list[Parity]
    reference: str
    tokens: TokenParity | None

    @property
    def passed(self) -> bool:
        right = bool(self.results) and all(result.passed for result in self.results)
        return right and (self.tokens is None or self.tokens.passed)


def validate(llm: Llm, prompts: Sequence[Sequence[int]] | None = None, steps: int = STEPS) -> Validation:
    """Compares the loaded engine with the reference on prompts of token ids, on every rank of the job.

    The reference runs in float32 on rank 0, on the checkpoint (and adapter) that the engine was built from. Without
    `prompts`, built-in ones are used; if PyTorch or the checkpoint is missing, they are compared with the answers
    stored at build time. Raises UserError if neither is available, or if ranks or replicas disagree about a logit or a
    token.
    """
    limits = llm.engine.limits
    stored = llm.job.share(lambda: _stored(llm)) if prompts is None else None
    if stored is None:
        if prompts is None:
            prompts = probes.prompts(llm.engine.path, llm.engine.model.vocab_size, limits.max_seq_len)
        lengths = [min(steps, limits.max_seq_len - len(prompt) + 1) for prompt in prompts]
    else:
        prompts, lengths = [probe.prompt for probe in stored], [len(probe.tokens) for probe in stored]

    state = hashlib.sha256()
    engine_logits: list[np.ndarray] = []
    engine_tokens: list[list[int]] = []
    for prompt, length in zip(prompts, lengths):
        logits, tokens = answer(llm.runner, prompt, length, state.update)
        engine_logits.append(logits)
        engine_tokens.append(tokens)

    # Residual streams after every forward pass, tokens and logits must agree on all ranks, hence on all replicas.
    state.update(repr(engine_tokens).encode())
    for logits in engine_logits:
        state.update(logits.tobytes())
    if len(set(llm.job.gather(state.hexdigest()))) > 1:
        raise UserError("the ranks do not hold the same bits: their residual streams, logits or tokens differ")

    def judge() -> Validation:
        answers = _live(llm, prompts, lengths) if stored is None else stored
        results = [
            compare(logits, tokens, probe, threshold_of(limits))
            for logits, tokens, probe in zip(engine_logits, engine_tokens, answers)
        ]
        return Validation(results, "live" if stored is None else "stored", compare_tokens(llm))

    return llm.job.share(judge)


def compare_tokens(llm: Llm) -> TokenParity | None:
    """Compares token ids with those of the checkpoint that the engine was built from; None if that is impossible."""
    source = llm.engine.source
    model, lora = Path(source.model), None if source.lora is None else Path(source.lora)
    if llm.tokenizer is None or not model.exists() or not (lora is None or lora.exists()):
        return None
    found = find_tokenizer(model, lora)
    if found is None:
        return None
    encode, specials, others = found.judge()
    texts = [
        *TEXTS,
        *(form.replace("{}", special) for special in specials[:32] for form in ("{}", "a {} b", "a{}b\n ")),
    ]
    texts = [text for text in texts if not any(other in text for other in others)]
    differing = [text for text in texts if llm.tokenizer.encode(text, special=False) != list(encode(text))]
    return TokenParity(
        judge=str(found.place),
        texts=len(texts),
        equal=len(texts) - len(differing),
        first=next(iter(differing), None),
    )


def answer(
    runner: Runner, prompt: Sequence[int], steps: int, joined: Callable[[bytes], Any] = lambda state: None
) -> tuple[np.ndarray, list[int]]:
    """The engine's logits after every token of a prompt, float32 [tokens, vocabulary], and `steps` greedy tokens.

    `joined` is called with `Session.joined()`, which must agree on all ranks, after each step.
    """
    number = runner.scheduler.add(Request(prompt=tuple(prompt), max_new_tokens=steps, scored=0))
    logits: list[np.ndarray] = []
    tokens: list[int] = []
    finished = False
    while not finished:
        for event in runner.turn():
            if event.number == number:
                logits += [] if event.logits is None else [event.logits]
                tokens += [choice.token for choice in event.choices]
                finished = bool(event.finish_reason)
        joined(runner.session.joined())
    return np.concatenate(logits), tokens


def _stored(llm: Llm) -> list[probes.Probe] | None:
    """The stored probes that fit into this engine; None if the live reference is available."""
    source = llm.engine.source
    if Path(source.model).exists() and all(find_spec(name) for name in ("torch", "transformers")):
        return None
    longest = llm.engine.limits.max_seq_len
    kept = [probe for probe in probes.load(llm.engine.path) if len(probe.prompt) + len(probe.tokens) - 1 <= longest]
    if not kept:
        raise UserError(
            f"--validate needs PyTorch and {source.model} here, or an engine built with --probes always: "
            "this one has no stored reference"
        )
    return kept


def _live(llm: Llm, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[probes.Probe]:
    import torch

    from cqil_trt import reference
    from cqil_trt.checkpoint import Checkpoint

    # The other ranks sleep meanwhile.
    threads = torch.get_num_threads()
    torch.set_num_threads(cores.usable())
    source, limits = llm.engine.source, llm.engine.limits
    if not limits.quantized:
        network = reference.load_hugging_face(source.model, source.lora)
    else:
        checkpoint = Checkpoint(Path(source.model), None if source.lora is None else Path(source.lora), tokenizer=False)
        checkpoint.quantize(limits)
        network = reference.from_reader(checkpoint.model, checkpoint.reader, pieces=False)
    network = reference.with_kv_cache(reference.with_cqil(network, llm.engine.cqil), limits)
    found = reference.probe(network, prompts, lengths, progress=False)
    torch.set_num_threads(threads)
    return found
