#!/usr/bin/env python
"""What speculation saves on texts that quote their prompt, and what it costs on others.

    mpirun -n 2 python scripts/benchmark_speculation.py --engine engines/ENGINE

Each prompt is answered greedily with and without drafts, in turns; the answers must be equal. Also measures what one
more row costs in a decode step, and says what it is taken to cost where tokens are drafted, which on GPUs was measured
at the start.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import installed  # noqa: F401

from cqil_trt.backends import DEVICES
from cqil_trt.commands import RankParser, check_at_least, check_file, run_ranks
from cqil_trt.errors import UserError
from cqil_trt.files import write_json
from cqil_trt.job import Job
from cqil_trt.llm import Llm
from cqil_trt.runner import Runner
from cqil_trt.scheduler import Request, Step
from cqil_trt.speculation import Speculation
from cqil_trt.table import table

PASSAGE = (
    "The harbour of Lindau was closed on Monday after a sailing boat had sunk at its entrance. The three sailors were "
    "taken aboard by a ferry, which was on its way to Bregenz. A diver fastened two balloons to the hull, and by the "
    "evening the boat was afloat again. The police think that a valve had been left open. It is the third accident at "
    "the entrance this year, and the town now wants to put up a second light."
)
CODE = """def mean(values):
    total = 0.0
    count = 0
    for value in values:
        if value is None:
            continue
        total += value
        count += 1
    if count == 0:
        return None
    return total / count
"""
# By what the answer does.
TASKS = {
    "repeats": f"Repeat this text word for word:\n\n{PASSAGE}",
    "edits a text": f"Replace Lindau by Konstanz in this text, and write out the whole text:\n\n{PASSAGE}",
    "edits code": f"Rename the function to average, and write out the whole function:\n\n```python\n{CODE}```",
    "summarizes with quotes": f"Summarize this text in three sentences, with quotes from it:\n\n{PASSAGE}",
    "is free": "Tell a story about a lighthouse keeper who collects maps.",
    "is free, too": "Why do leaves change their colour in autumn?",
}


def parser() -> RankParser:
    parser = RankParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", type=Path, help="default: the newest under engines/ that fits the ranks")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--speculate", metavar="METHOD[:N]", default="ngram")
    parser.add_argument("--new-tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="F", type=Path)
    return parser


def run(options: argparse.Namespace, job: Job) -> None:
    job.share(lambda: check(options))
    speculation = Speculation.parse(options.speculate)
    llm = Llm(options.engine, job, options.device, speculation=speculation)
    if llm.tokenizer is None:
        raise UserError("the engine has no tokenizer, which the prompts need")
    rows = []
    report: dict[str, list[dict[str, object]]] = {"answers": [], "rows": []}
    for name, task in TASKS.items():
        (prompt,) = llm.encode([task], chat=True)
        results = {True: [], False: []}
        for _ in range(options.rounds):
            for drafting in (False, True):
                results[drafting].append(answer(llm, prompt, options.new_tokens, speculation if drafting else None))
        plain, drafted = results[False][0], results[True][0]
        before, after = (median(r["ms"] for r in results[drafting]) for drafting in (False, True))
        tokens = len(plain["tokens"])
        rows.append(
            (
                name,
                tokens,
                drafted["steps"],
                f"{drafted['accepted']}/{drafted['drafted']}",
                f"{before:.2f}",
                f"{after:.2f}",
                f"{after / before - 1:+.1%}",
                "equal" if drafted["tokens"] == plain["tokens"] else "DIFFER",
            )
        )
        report["answers"].append(
            {
                "answer": name,
                "tokens": tokens,
                **{key: drafted[key] for key in ("steps", "drafted", "accepted")},
                "ms_per_token": before,
                "ms_per_token_drafted": after,
                "equal": drafted["tokens"] == plain["tokens"],
            }
        )
    prices = price(llm, options.rounds)
    costs = llm.session.step_costs
    assumed = {count: 0.0 if costs is None else costs.step(count) - 1 for count in prices}
    report["rows"] = [{"tokens": count, "ms": ms, "taken_for": assumed[count]} for count, ms in prices.items()]
    if job.rank:
        return
    header = ("the answer", "tokens", "steps", "accepted", "ms a token", "drafted", "", "tokens")
    print(table(header, rows))
    more = {count: ms / prices[1] - 1 for count, ms in prices.items()}
    lines = [
        (n, f"{ms:.2f}", f"{more[n]:+.1%}", f"{more[n] / max(n - 1, 1):.3f}", f"{assumed[n]:+.1%}")
        for n, ms in prices.items()
    ]
    print(table(("tokens in a step", "ms", "more", "a token", "taken for"), lines))
    if costs is not None:
        print(f"a wait for the step before is taken for {costs.wait:.1%} of a step")
    if options.json:
        write_json(options.json, report)


def answer(llm: Llm, prompt: list[int], count: int, speculation: Speculation | None) -> dict:
    """Tokens, steps and milliseconds of a token after the first."""
    runner = Runner.of(llm.session, "latency", speculation=speculation)
    runner.scheduler.add(Request(prompt=tuple(prompt), max_new_tokens=count, eos_token_ids=llm.ends))
    found = {"tokens": [], "steps": 0, "drafted": 0, "accepted": 0}
    began = time.perf_counter()
    while not runner.scheduler.idle:
        for news in runner.turn():
            if not found["steps"]:
                began = time.perf_counter()
            found["tokens"] += [choice.token for choice in news.choices]
            found["steps"] += 1
            found["drafted"] += news.drafted
            found["accepted"] += news.accepted
    found["ms"] = (time.perf_counter() - began) * 1e3 / max(len(found["tokens"]) - 1, 1)
    return found


def price(llm: Llm, rounds: int) -> dict[int, float]:
    """Milliseconds of a decode step of one sequence, by its tokens: the median of alternating measurements."""
    session = llm.session
    widths = [count for count in (1, 2, 4, 8, 16) if session.step_costs is not None or count == 1]
    context = min(200, session.limits.max_seq_len - max(widths) * len(widths))
    if context < 1:
        raise UserError(
            f"the engine holds {session.limits.max_seq_len} tokens, too few to measure steps of {max(widths)}"
        )
    times: dict[int, list[float]] = {count: [] for count in widths}
    for _ in range(4 * rounds):
        session.load([5] * context)
        for count in widths:
            draft = (0,) * (count - 1)
            began = time.perf_counter()
            session.submit(Step(decode=(0,), drafts=(draft,) if draft else ()))
            session.collect()
            times[count].append((time.perf_counter() - began) * 1e3)
    return {count: median(values) for count, values in times.items()}


def check(options: argparse.Namespace) -> None:
    check_at_least(options, 1, "new_tokens", "rounds")
    check_file(options.json, "--json")


if __name__ == "__main__":
    run_ranks(parser, run)
