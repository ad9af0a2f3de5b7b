"""runtime/run.py, cqil-run: engine directory → text, parity, latency. Started by mpirun, on every rank."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from cqil_trt import __version__, cores
from cqil_trt.backends import DEVICES
from cqil_trt.commands import RankParser, add_speculate_flag, check_file, numbers, run_ranks, started_by
from cqil_trt.config import AUTO
from cqil_trt.errors import UserError
from cqil_trt.files import write_file, write_json
from cqil_trt.formats import DENSE
from cqil_trt.job import Job
from cqil_trt.speculation import Speculation
from cqil_trt.table import counted, table
from cqil_trt.tokenizer.chat import Conversation

# Decode steps before each of the prompts that --benchmark measures between decode steps.
_STEPS_BETWEEN = 16


def parser() -> RankParser:
    called = started_by("cqil-run", "runtime/run.py")
    p = RankParser(description=f"Run an engine: mpirun -n P {called} [options]")
    p.add_argument("--engine", metavar="DIR", type=Path, help="default: the newest under engines/ that fits the ranks")
    p.add_argument("--device", choices=DEVICES, default="auto", help="where to compute (default: a GPU if available)")
    p.add_argument("--prompt", metavar="TEXT", action="append", help="may be repeated")
    p.add_argument("--prompt-file", metavar="F", help="one prompt per line, or a .json list of texts")
    p.add_argument(
        "--messages",
        metavar="F.json",
        action="append",
        default=[],
        help="a conversation to render with the model's chat template: a list of messages, or an object with messages "
        "and tools; may be repeated",
    )
    p.add_argument("--token-ids", metavar="F.json", help="a JSON list of token ids, or a list of such lists")
    p.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    p.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    p.add_argument("--top-k", type=int, default=0, help="sample from the K most likely tokens; 0 for all")
    p.add_argument("--top-p", type=float, default=1.0, help="sample from the most likely tokens that together reach P")
    p.add_argument("--min-p", type=float, default=0.0, help="leave out tokens with less than P times the top's chance")
    p.add_argument("--repetition-penalty", type=float, default=1.0, help="divides logits of tokens that occurred")
    p.add_argument("--presence-penalty", type=float, default=0.0, help="subtracted for generated tokens")
    p.add_argument(
        "--frequency-penalty", type=float, default=0.0, help="subtracted for each time a token was generated"
    )
    p.add_argument("--seed", type=int, default=0)
    add_speculate_flag(p)
    p.add_argument("--stop", metavar="TEXT", action="append", default=[], help="stop before this text; may be repeated")
    p.add_argument("--chat", action="store_true", help="render each prompt with the model's chat template")
    p.add_argument("--stream", action="store_true", help="print text as it is generated")
    p.add_argument("--validate", action="store_true", help="compare with the PyTorch reference; exit 1 on failure")
    p.add_argument("--benchmark", action="store_true", help="measure prefill and decode latency")
    p.add_argument(
        "--contexts",
        metavar="N,N",
        help="lengths of the random prompts for --benchmark (default: the first prompt)",
    )
    p.add_argument("--batches", metavar="N,N", help="for --benchmark: sequences in a decode step (default 1)")
    p.add_argument(
        "--logits-out", metavar="F.npy", type=Path, help="the first prompt's logits, float32 [tokens, vocabulary]"
    )
    p.add_argument("--version", action="version", version=f"cqil-trt {__version__}")
    p.add_argument("--json", metavar="F", type=Path, help="write measurements and completions to this file")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    sys.exit(0 if run_ranks(parser, run, arguments) else 1)


def run(options: argparse.Namespace, job: Job) -> bool:
    """Runs the command on every rank. Returns False if validation failed."""
    # Ranks share this host's cores. OpenMP and OpenBLAS read the variable when they are loaded, which is later.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores.usable() // job.size)))
    from cqil_trt import probes
    from cqil_trt.generate import GenerationConfig
    from cqil_trt.llm import Llm
    from cqil_trt.sampling import SamplingConfig
    from cqil_trt.scheduler import check_prompt

    for name in ("contexts", "batches"):
        if getattr(options, name) is not None and not options.benchmark:
            raise UserError(f"--{name} needs --benchmark")
    texts = job.share(lambda: read_prompts(options))
    # A wrong flag should be reported before the engine is loaded. Some objects are constructed only for their checks.
    job.share(lambda: check_file(options.json, "--json"))
    job.share(lambda: check_file(options.logits_out, "--logits-out"))
    names = [field.name for field in fields(SamplingConfig) if hasattr(options, field.name)]
    sampling = SamplingConfig(**{name: getattr(options, name) for name in names})
    GenerationConfig(max_new_tokens=options.max_new_tokens, stop=tuple(options.stop), sampling=sampling)
    speculation = Speculation.parse(options.speculate)

    llm = Llm(options.engine, job, options.device, speculation=speculation)
    if (options.chat or options.messages) and llm.tokenizer is None:
        raise UserError(
            f"{'--chat' if options.chat else '--messages'} needs a tokenizer, which this engine does not have"
        )
    limits, model = llm.engine.limits, llm.engine.model

    def encode() -> list[list[int]]:
        if not texts:
            return probes.prompts(llm.engine.path, model.vocab_size, limits.max_seq_len)[:1]
        for number, ids in enumerate((text for text in texts if isinstance(text, list)), 1):
            check_prompt(ids, f"--token-ids {options.token_ids}: list {number}", model.vocab_size, limits.max_seq_len)
        return llm.encode(texts, options.chat)

    prompts = job.agree(encode)
    measured = random_prompts(options.contexts, model.vocab_size, limits.max_seq_len)
    say: Callable[[str], None] = print if job.rank == 0 else lambda text: None
    report: dict[str, Any] = {"engine": str(llm.engine.path), "ranks": job.size, "replicas": llm.replicas}
    report["startup_seconds"] = llm.startup.report
    cqil = llm.engine.cqil
    stored = limits.dtype if limits.weights == DENSE else f"{limits.weights}, {limits.dtype}"
    stored += "" if limits.kv_dtype == AUTO else f", KV cache {limits.kv_dtype}"
    say(
        f"{llm.engine.path}: {cqil.summary}, {cqil.placement}, {stored}, "
        f"{llm.engine.backend}, {counted(job.size, 'rank')}"
        + (f", {llm.replicas} replicas" if llm.replicas > 1 else "")
    )

    passed = True
    if options.logits_out is not None:
        write_logits(llm, prompts[0], options.logits_out)
    if options.validate:
        passed = validate(llm, prompts if texts else None, say, report)
    if options.benchmark:
        batches = numbers("1" if options.batches is None else options.batches, "--batches", 1, limits.max_batch_size)
        benchmark(llm, measured or prompts[:1], batches, options.max_new_tokens, say, report)
    if texts or not (options.validate or options.benchmark):
        complete(llm, texts or None, prompts, options, say, report)
    if options.json is not None:
        job.share(lambda: write_json(options.json, report))
    return passed


def read_prompts(options: argparse.Namespace) -> list[Any]:
    """The prompts of --prompt, --prompt-file, --messages and --token-ids, in that order; empty when none is given."""
    for flag, texts in (("--prompt", options.prompt or []), ("--stop", options.stop)):
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError:
                shown = os.fsencode(text).decode(errors="replace")
                raise UserError(f"{flag} {shown:.40}: not UTF-8 text") from None
    prompts: list[Any] = list(options.prompt or [])
    if options.prompt_file is not None:
        text = read_file(options.prompt_file)
        # No other character ends a line: a prompt may contain form feeds and Unicode's separators.
        found: Any = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
        if options.prompt_file.endswith(".json"):
            found = parse_json(options.prompt_file, text)
        if not isinstance(found, list) or not found or not all(isinstance(item, str) for item in found):
            raise UserError(f"--prompt-file {options.prompt_file}: expected at least one prompt")
        prompts += found
    for name in options.messages:
        label = f"--messages {name}"
        prompts.append(Conversation.of_json(parse_json(label, read_file(name)), label))
    if options.token_ids is not None:
        found = parse_json(options.token_ids, read_file(options.token_ids))
        if isinstance(found, list) and found and all(isinstance(item, int) for item in found):
            found = [found]
        if not isinstance(found, list) or not found or not all(isinstance(item, list) for item in found):
            raise UserError(f"--token-ids {options.token_ids}: expected a list of token ids, or a list of such lists")
        if [] in found:
            raise UserError(f"--token-ids {options.token_ids}: list {found.index([]) + 1} has no token ids")
        prompts += found
    return prompts


def read_file(name: str) -> str:
    """The text of a UTF-8 file without its byte order mark. Raises UserError if it cannot be read."""
    try:
        return Path(name).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text ({error.reason})") from None


def parse_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON ({error})") from None


def write_logits(llm: Any, prompt: list[int], path: Path) -> None:
    import io

    import numpy as np

    logits = llm.runner.score(prompt)

    def write() -> None:
        buffer = io.BytesIO()
        np.save(buffer, logits)
        write_file(path, buffer.getvalue())

    llm.job.share(write)


def validate(llm: Any, prompts: list[list[int]] | None, say: Callable[[str], None], report: dict[str, Any]) -> bool:
    from cqil_trt.validate import threshold_of
    from cqil_trt.validate import validate as compare_with_reference

    say("validating against the PyTorch reference (float32, Hugging Face modules) ...")
    verdict = compare_with_reference(llm, prompts)
    if verdict.reference == "stored":
        say("no PyTorch or no checkpoint here: comparing with the reference's answers stored when the engine was built")
    limits = llm.engine.limits
    threshold, cache = threshold_of(limits), "" if limits.kv_dtype == AUTO else f" with a KV cache in {limits.kv_dtype}"
    rows = [
        (
            number,
            r.prompt_tokens,
            f"{r.relative_l2:.2e}",
            f"{r.max_abs:.2e}",
            f"{r.top1:.1%}",
            f"{r.equal_tokens}/{r.steps}",
            "pass" if r.passed else "FAIL",
        )
        for number, r in enumerate(verdict.results, 1)
    ]
    header = ("prompt", "tokens", "relative L2", "max abs", "top-1 equal", "greedy equal", "verdict")
    passed = verdict.passed
    tokens = "all" if threshold.tokens is None else f"{threshold.tokens} (or a logit gap within the error)"
    say(table(header, rows))
    say(f"threshold for {limits.dtype}{cache}: relative L2 <= {threshold.relative_l2:g}, greedy tokens equal: {tokens}")
    for number, r in enumerate(verdict.results, 1):
        if r.equal_tokens < r.steps:
            say(
                f"prompt {number}: where its greedy tokens first differ, the reference's logits for the two are "
                f"{r.gap:.1e} apart"
            )
    if verdict.tokens is not None:
        t = verdict.tokens
        differs = "" if t.passed else f"; the first that differs: {t.first!r:.80}"
        say(f"token ids of {t.texts} texts against {t.judge}: {t.equal} equal{differs}")
    say("validation passed: all ranks hold identical bits" if passed else "validation FAILED")
    report["validation"] = {
        "passed": passed,
        "tokens": None if verdict.tokens is None else asdict(verdict.tokens),
        "reference": verdict.reference,
        "prompts": [r.to_dict() for r in verdict.results],
    }
    return passed


def random_prompts(contexts: str | None, vocab_size: int, max_seq_len: int) -> list[list[int]]:
    """Random prompts of the lengths in --contexts, each of which leaves room for a token."""
    import numpy as np

    lengths = [] if contexts is None else numbers(contexts, "--contexts", 1, max_seq_len - 1)
    random = np.random.default_rng(0)
    return [random.integers(vocab_size, size=length).tolist() for length in lengths]


def benchmark(
    llm: Any,
    prompts: list[list[int]],
    batches: list[int],
    steps: int,
    say: Callable[[str], None],
    report: dict[str, Any],
) -> None:
    """Measures on rank 0 how long a prompt takes, and a decode step: wall clock, or CUDA events on a GPU."""
    import numpy as np

    rows: list[tuple[Any, ...]] = []
    report["benchmark"] = []
    for prompt in prompts:
        count = min(max(steps, 1), llm.engine.limits.max_seq_len - len(prompt))
        if count < 1:
            raise UserError("--benchmark: the prompt fills the engine, so there is no token to decode")

        def prefill(prompt: list[int] = prompt) -> float:
            began = time.perf_counter()
            llm.session.load(prompt)
            return (time.perf_counter() - began) * 1e3

        prefill()  # warm up
        prefills = [prefill() for _ in range(5)]
        measured = [("prefill", 1, prefills)]
        for size in batches:
            for warming in (count, 0):
                for slot in range(size):
                    llm.session.load(prompt, slot)
                if warming:
                    llm.session.time_decode(range(size), warming)
            measured.append(("decode", size, llm.session.time_decode(range(size), count)))
        # As a server reads a prompt: caches hold other things by then, and the GPU's clock may have changed.
        amid = []
        prefill()
        for _ in range(5):
            llm.session.time_decode((0,), min(count, _STEPS_BETWEEN))
            amid.append(prefill())
        measured.append(("prefill amid decode", 1, amid))
        for step, size, times in measured:
            low, median, high = np.percentile(times, (10, 50, 90))
            tokens = size if step == "decode" else len(prompt)
            spread = (f"{median:.3f}", f"{low:.3f}", f"{high:.3f}")
            rows.append((step, len(prompt), size, *spread, f"{tokens / median * 1e3:.0f}"))
            report["benchmark"].append(
                {"step": step, "prompt_tokens": len(prompt), "batch": size, "median_ms": median, "ms": times}
            )
    # The measurements used the cache without the scheduler's knowledge.
    llm.runner = llm.new_runner()
    say(table(("step", "prompt", "batch", "median ms", "10%", "90%", "tokens/s"), rows))


def complete(
    llm: Any,
    texts: list[Any] | None,
    prompts: list[list[int]],
    options: argparse.Namespace,
    say: Callable[[str], None],
    report: dict[str, Any],
) -> None:
    single = len(prompts) == 1

    lines: dict[int, str] = {}

    def stream(index: int, text: str) -> None:
        if single:
            print(text, end="", flush=True)
            return
        # Prompts advance concurrently: print each one line by line, or every 60 characters.
        lines[index] = lines.get(index, "") + text
        while len(lines[index]) >= 60 or "\n" in lines[index]:
            line, _, rest = lines[index].partition("\n")
            if len(line) >= 60:
                line, rest = lines[index][:60], lines[index][60:]
            print(f"[{index + 1}] {line}", flush=True)
            lines[index] = rest

    completions = llm.generate(
        prompts,
        options.max_new_tokens,
        options.temperature,
        options.top_k,
        options.top_p,
        options.seed,
        options.stop,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        on_text=stream if options.stream else None,
    )
    shown = texts if texts is not None else [None] * len(prompts)
    for number, (text, completion) in enumerate(zip(shown, completions), 1):
        prompt = str(text) if isinstance(text, (str, Conversation)) else ""
        if not prompt and llm.tokenizer is not None:
            prompt = llm.tokenizer.decode(completion.prompt)
        answer = completion.text if llm.tokenizer else " ".join(map(str, completion.tokens))
        if options.stream and llm.tokenizer is not None:
            say("" if single else f"[{number}] {lines.get(number - 1, '')}")
        else:
            say(f"\n--- prompt {number}: {prompt or counted(len(completion.prompt), 'token')}\n{answer.strip()}")
        ending = f"--- {counted(len(completion.tokens), 'token')}, {completion.finish_reason}"
        if completion.finish_reason == "length" and len(completion.tokens) < options.max_new_tokens:
            ending += f" (the engine holds {llm.engine.limits.max_seq_len} tokens: build with --max-seq-len)"
        if completion.drafted:
            ending += (
                f", {counted(completion.steps, 'step')}, {completion.accepted} of {completion.drafted} drafts taken"
            )
        say(ending)
    report["completions"] = [
        {
            "prompt": text if isinstance(text, str) else None,
            "prompt_tokens": completion.prompt,
            "tokens": completion.tokens,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "steps": completion.steps,
            "drafted_tokens": completion.drafted,
            "accepted_tokens": completion.accepted,
        }
        for text, completion in zip(shown, completions)
    ]
