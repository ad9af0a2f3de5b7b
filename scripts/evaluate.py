#!/usr/bin/env python
"""What CQIL costs in quality: perplexity on a text and tasks of lm-evaluation-harness, configurations side by side.

    python scripts/evaluate.py --model path/to/model --lora adapters/mine --text heldout.txt --tasks sciq,arc_easy
    mpirun -n 2 python scripts/evaluate.py --engine engines/mine --text heldout.txt        # a compiled engine

The reference (Hugging Face's modules) is evaluated unchanged, with CQIL, and with CQIL and the adapter; engines are
evaluated next to it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")  # the only way to hide the harness's bars

import installed  # noqa: F401
import numpy as np

from cqil_trt import formats
from cqil_trt.backends import DEVICES
from cqil_trt.commands import (
    RankParser,
    add_cqil_flags,
    check_at_least,
    check_file,
    check_texts,
    chosen_model,
    cqil_flags,
    run_ranks,
)
from cqil_trt.config import AUTO, KV_DTYPES, CqilConfig, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.files import write_json
from cqil_trt.hub import find_adapter
from cqil_trt.job import Job
from cqil_trt.quality.perplexity import CELLS, WON_BACK, Scores, won_back
from cqil_trt.table import table

UNCHANGED, CQIL, ADAPTED = "unchanged", "CQIL", "CQIL + adapter"


def parser() -> RankParser:
    p = RankParser(prog="evaluate.py", description=__doc__.split("\n")[0])
    p.add_argument(
        "--model",
        metavar="PATH",
        help="Hugging Face directory, GGUF file, or org/name[@revision] (default, without --engine: the demo)",
    )
    p.add_argument(
        "--lora",
        metavar="DIR",
        help="PEFT adapter, or org/name[@revision]; one made by finetune.py sets --p … --bypass",
    )
    add_cqil_flags(p)
    p.add_argument(
        "--quantize",
        choices=(formats.DENSE, *formats.choices()),
        help="quantize the reference's matrices as build.py --quantize does, for engines in float16 or --config's type",
    )
    p.add_argument(
        "--quantize-head",
        choices=(formats.DENSE, *formats.choices()),
        help="the same of the last projection (default --config's, or dense)",
    )
    p.add_argument(
        "--kv-dtype",
        choices=KV_DTYPES,
        help="round the reference's keys and values as build.py --kv-dtype does (default --config's, or auto)",
    )
    p.add_argument("--engine", metavar="DIR", type=Path, action="append", default=[], help="an engine; may be repeated")
    p.add_argument("--device", choices=DEVICES, default="auto", help="where engines compute")
    text = p.add_argument_group("perplexity")
    text.add_argument(
        "--text", metavar="PATH", type=Path, nargs="+", help="text files, .jsonl, directories; .npy of tokens"
    )
    text.add_argument("--column", default="text", help="field of .jsonl and datasets that holds the text")
    text.add_argument("--text-tokens", metavar="N", type=int, help="at most N tokens of the text")
    text.add_argument("--block", metavar="N", type=int, default=1024, help="tokens per block, each scored separately")
    tasks = p.add_argument_group("tasks")
    tasks.add_argument(
        "--tasks", metavar="NAME,NAME", help="tasks of lm-evaluation-harness: sciq,winogrande,arc_easy,mmlu, …"
    )
    tasks.add_argument("--task-path", metavar="DIR", type=Path, help="directory with your own task files (.yaml)")
    tasks.add_argument(
        "--num-fewshot", metavar="N", type=int, help="examples before each question (default: the task's)"
    )
    tasks.add_argument("--limit", metavar="N", type=int, help="at most N questions per task")
    tasks.add_argument("--max-length", metavar="N", type=int, default=2048, help="maximum tokens of a question")
    tasks.add_argument("--batch-size", metavar="N", type=int, default=8, help="questions per batch of the reference")
    p.add_argument("--samples", action="store_true", help="include every question's answers in --json")
    p.add_argument("--json", metavar="F", type=Path, help="write all measurements to this file")
    return p


class Column:
    """One configuration: how it scores blocks of tokens and tasks. `label`: the header of its column."""

    def __init__(self, label: str, cqil: CqilConfig):
        self.label, self.cqil = label, cqil
        self.scores: Scores | None = None
        self.tasks: dict[str, Any] = {}


def bar_of(column: Column) -> str | None:
    """The label of the progress bar while a configuration is scored, if there is a terminal to show it."""
    return f"scoring, {column.label}" if sys.stderr.isatty() else None


def announce(label: str) -> None:
    """Says what is evaluated next where no progress bar does."""
    if not sys.stderr.isatty():
        print(f"evaluating {label} ...", flush=True)


def main() -> None:
    run_ranks(parser, evaluate)


def check(options: argparse.Namespace) -> None:
    """Checks the options: errors should be reported before hours of evaluation, not after."""
    from cqil_trt.engine import Engine

    if not (options.text or options.tasks):
        raise UserError("what to evaluate on? Give --text PATH … or --tasks NAME,NAME")
    if options.tasks and not options.tasks.strip(","):
        raise UserError(f"--tasks {options.tasks}: names no task")
    for of, names in {"text": ("text_tokens",), "tasks": ("task_path", "num_fewshot", "limit", "samples")}.items():
        for name in names:
            value = getattr(options, name)
            # A switch that was left out is False; 0 is a value.
            if not getattr(options, of) and value is not None and value is not False:
                raise UserError(f"--{name.replace('_', '-')} needs --{of}")
    if options.samples and options.json is None:
        raise UserError("--samples needs --json, the file that has them")
    check_at_least(options, 2, "block", "max_length")
    check_at_least(options, 1, "text_tokens", "limit", "batch_size")
    check_at_least(options, 0, "num_fewshot")
    check_file(options.json, "--json")
    check_texts(options.text, "--text")
    if options.engine and not (options.model or options.lora):
        more = {name: getattr(options, name) for name in ("config", "quantize", "quantize_head", "kv_dtype")}
        for name, value in {**cqil_flags(options), **more}.items():
            if value is not None:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} is for the reference, engines are as they were built: give --model too")
    for path in options.engine:
        limit = Engine.open(path).limits.max_seq_len
        if options.text and options.block - 1 > limit:
            raise UserError(f"--block {options.block}: {path} holds {limit} tokens (at most --block {limit + 1})")


def evaluate(options: argparse.Namespace, job: Job) -> None:
    job.share(lambda: check(options))
    names = [name for name in (options.tasks or "").split(",") if name]
    manager = None
    if names:
        from cqil_trt.quality.harness import task_manager

        manager = job.agree(lambda: task_manager(names, options.task_path) if job.rank == 0 else None)
    columns: list[Column] = []
    if options.model or options.lora or not options.engine:
        # The other ranks are not needed for the reference: they sleep.
        columns += job.agree(lambda: list(references(options, names, manager)) if job.rank == 0 else [])
    columns += engines(options, names, manager, job)
    if job.rank == 0:
        report(options, columns)


def references(options: argparse.Namespace, names: list[str], manager: Any) -> Iterator[Column]:
    """Evaluates the reference in every configuration, in this process."""
    from cqil_trt import reference
    from cqil_trt.builder import choose_cqil, read_config
    from cqil_trt.checkpoint import Checkpoint
    from cqil_trt.quality import open_tokenizer, text_blocks, transformers_tokenizer
    from cqil_trt.quality.perplexity import score_reference

    path = chosen_model(options.model).path
    lora = None if options.lora is None else find_adapter(options.lora).path
    checkpoint = Checkpoint(path, None)
    adapted = None if lora is None else Checkpoint(path, lora)
    model = checkpoint.model
    config = read_config(options.config, model, options.preset)
    stored = EngineLimits(dtype="float16")
    if config is not None:
        stored = replace(stored, dtype=config.dtype, **config.stored)
    kv_dtype = options.kv_dtype or stored.kv_dtype
    limits = EngineLimits(
        dtype=stored.dtype,
        weights=options.quantize or stored.weights,
        head=options.quantize_head or stored.head,
        kv_dtype=kv_dtype,
        kv_scales=() if kv_dtype == AUTO else checkpoint.kv_scales,
    )
    for each in filter(None, (checkpoint, adapted)):
        each.quantize(limits)
    pieces = not limits.quantized
    trained = None if lora is None else CqilConfig.of_adapter(lora)
    notes: list[str] = []
    cqil = choose_cqil(model, cqil_flags(options), notes, trained, config)
    for note in notes:
        print(f"note: {note}")
    blocks = None
    if options.text:
        length = min(options.block, model.max_position)
        blocks = text_blocks(options.text, open_tokenizer(path), model, length, options.text_tokens, options.column)

    tokenizers = (transformers_tokenizer(path), open_tokenizer(path)) if names else ()

    def run(network: Any, column: Column) -> Column:
        announce(column.label)
        if blocks is not None:
            column.scores = score_reference(network, blocks, bar_of(column))
        if names:
            from cqil_trt.quality.harness import reference_lm, run_tasks

            longest = min(options.max_length, model.max_position)
            lm = reference_lm(network, *tokenizers, longest, options.batch_size)
            column.tasks = run_tasks(lm, manager, names, options.num_fewshot, options.limit)
        return column

    network = reference.with_kv_cache(reference.from_reader(model, checkpoint.reader, pieces=pieces), limits)
    yield run(network, Column(UNCHANGED, CqilConfig(p=1)))
    if cqil.changed_layers:
        reference.with_cqil(network, cqil)
        yield run(network, Column(CQIL, cqil))
    if adapted is not None:
        del network
        network = reference.from_reader(adapted.model, adapted.reader, pieces=pieces)
        reference.with_kv_cache(network, limits)
        reference.with_cqil(network, cqil)
        yield run(network, Column(ADAPTED if cqil.changed_layers else "adapter", cqil))
    del network
    reference.free_memory()  # an engine allocates its memory outside PyTorch


def engines(options: argparse.Namespace, names: list[str], manager: Any, job: Job) -> Iterator[Column]:
    """Evaluates every engine, on all ranks."""
    from cqil_trt.llm import Llm
    from cqil_trt.quality import text_blocks
    from cqil_trt.quality.perplexity import score_engine

    for path in options.engine:
        if job.rank == 0:
            announce(str(path))
        with closing(Llm(path, job, options.device)) as llm:
            engine = llm.engine
            column = Column(str(path), engine.cqil)
            if options.text:
                length = min(options.block, engine.model.max_position)

                def blocks(llm: Llm = llm, length: int = length) -> np.ndarray:
                    if llm.tokenizer is None:
                        raise UserError(f"{llm.engine.path}: has no tokenizer, which texts need")
                    model = llm.engine.model
                    return text_blocks(options.text, llm.tokenizer, model, length, options.text_tokens, options.column)

                column.scores = score_engine(llm, job.share(blocks), bar_of(column))
            if names:
                column.tasks = engine_tasks(llm, manager, names, options)
            yield column


def engine_tasks(llm: Any, manager: Any, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Runs the harness on rank 0, while every rank serves the engine."""
    from cqil_trt.quality.harness import EngineLM, run_tasks

    lm = EngineLM(llm)
    lm.max_length = min(lm.max_length, options.max_length)
    if llm.job.rank:
        lm.serve()
        return {}
    try:
        found = run_tasks(lm, manager, names, options.num_fewshot, options.limit)
    except UserError as error:
        lm.finish(str(error))
        raise
    lm.finish()
    return found


def report(options: argparse.Namespace, columns: list[Column]) -> None:
    result: dict[str, Any] = {"columns": [{"label": c.label, "cqil": c.cqil.to_dict()} for c in columns]}
    scored = [(column, column.scores) for column in columns if column.scores is not None]
    if scored:
        base = scored[0][1]
        rows = [(column.label, describe(column.cqil), *scores.cells(base)) for column, scores in scored]
        print(f"perplexity of {base.nll.size} tokens")
        print(table(("model", "CQIL", *CELLS), rows))
        by_label = {column.label: scores for column, scores in scored}
        for entry, (_, scores) in zip(result["columns"], scored):
            entry |= scores.to_dict(base)
        if all(label in by_label for label in (UNCHANGED, CQIL, ADAPTED)):
            share = won_back(by_label[UNCHANGED], by_label[CQIL], by_label[ADAPTED])
            print(WON_BACK.format(share))
            result["won_back"] = share
    if options.tasks:
        print(task_table(columns))
        for entry, column in zip(result["columns"], columns):
            entry["tasks"] = column.tasks["results"]
            if options.samples:
                entry["samples"] = column.tasks["samples"]
    if options.json is not None:
        write_json(options.json, result, default=str)


def describe(cqil: CqilConfig) -> str:
    return cqil.summary if cqil.changed_layers else "none"


def task_table(columns: list[Column]) -> str:
    """A row per task and metric, a column per configuration; the standard error follows ±."""
    rows = []
    for task, first in columns[0].tasks["results"].items():
        for metric, value in first.items():
            name, _, how = metric.partition(",")
            if not isinstance(value, (int, float)) or not how or name.endswith("_stderr"):
                continue
            cells = []
            for column in columns:
                found = column.tasks["results"][task]
                error = found.get(f"{name}_stderr,{how}")
                spread = f" ± {error:.4f}" if isinstance(error, (int, float)) else ""
                cells.append(f"{found[metric]:.4f}{spread}")
            rows.append((task, name, *cells))
    return "\n" + table(("task", "metric", *(column.label for column in columns)), rows)


if __name__ == "__main__":
    main()
