"""builders/build.py, cqil-build: checkpoint (+ adapter) → engine directory."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from cqil_trt import __version__, backends, formats
from cqil_trt.builder import PROBES, STORED, BuildRequest, prepare, write
from cqil_trt.commands import RankParser, add_cqil_flags, run_ranks, started_by
from cqil_trt.config import AUTO, DTYPES, KV_DTYPES, PLACEMENTS, layer_list
from cqil_trt.job import Job
from cqil_trt.llm import why_not_here
from cqil_trt.table import counted, size, table


def parser() -> RankParser:
    p = RankParser(description="Compile a LLaMA-family model with CQIL for a few ranks of one host.")
    p.add_argument(
        "--model",
        metavar="PATH",
        help="Hugging Face directory, GGUF file, org/name[@revision] on the hub, or an engine of backend torch "
        "(default: the demo)",
    )
    p.add_argument(
        "--lora",
        metavar="DIR",
        help="PEFT LoRA adapter to merge: a directory, or org/name[@revision] on the hub; an adapter made by "
        "finetune.py sets --p … --bypass. The demo model gets its bundled adapter unless this is none",
    )
    add_cqil_flags(p)
    p.add_argument("--placement", choices=PLACEMENTS, help="how the ranks run the other layers (default sharded)")
    p.add_argument("--dtype", choices=DTYPES, help="type of weights and cache (default: --config's, the checkpoint's)")
    p.add_argument(
        "--quantize",
        choices=[formats.DENSE, *formats.choices(), STORED],
        help="quantize the matrices of the layers, after the adapter is merged; stored: keep those of a quantized "
        "checkpoint (docs/quantization.md); default --config's, or dense",
    )
    p.add_argument("--keep", metavar="LIST", help="layers that stay as they are, like layers.0,layers.30-31")
    p.add_argument(
        "--quantize-head",
        choices=(formats.DENSE, *formats.choices()),
        help="quantize the last projection as well, also without --quantize (default --config's, or dense: it stays as "
        "it is)",
    )
    p.add_argument(
        "--kv-dtype",
        choices=KV_DTYPES,
        help="type of the KV cache: fp8 (E4M3) holds twice as many tokens as 16 bits (default --config's, or auto: "
        "--dtype)",
    )
    p.add_argument("--backend", choices=backends.names(), default=backends.PLAIN)
    p.add_argument("--max-batch-size", type=int, metavar="N", help="concurrent sequences (default 8)")
    p.add_argument("--max-seq-len", type=int, metavar="N", help="prompt and generated tokens (default up to 2048)")
    p.add_argument("--prefill-chunk", type=int, metavar="N", help="prompt tokens per forward pass (default 512)")
    p.add_argument(
        "--probes",
        choices=PROBES,
        default="auto",
        help="store the reference's answers to a few prompts for --validate without PyTorch (auto: small models)",
    )
    p.add_argument(
        "--no-tokenizer",
        dest="tokenizer",
        action="store_false",
        help="omit the tokenizer: the engine accepts token ids only",
    )
    own = p.add_argument_group("backend-specific options")
    for option, _ in backends.all_options().values():
        keywords = dict(option.keywords) if option.choices is None else {**option.keywords, "choices": option.choices}
        text = option.help.replace("%", "%%")  # argparse formats it
        own.add_argument(f"--{option.name.replace('_', '-')}", help=text, **keywords)
    p.add_argument("--output", metavar="DIR", help="engine directory to create (default engines/NAME)")
    p.add_argument("--force", action="store_true", help="replace the engine at --output")
    p.add_argument("--dry-run", action="store_true", help="check everything and print the plan, and write nothing")
    p.add_argument("--version", action="version", version=f"cqil-trt {__version__}")
    p.add_argument("--json", action="store_true", help="print the plan as JSON instead of a table")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    run_ranks(parser, build, arguments)


def build(arguments: argparse.Namespace, job: Job) -> None:
    options = vars(arguments)
    as_json, dry = options.pop("json"), options.pop("dry_run")
    say: Callable[[str], None] = print if job.rank == 0 else lambda text: None
    if options["model"] is None:
        from cqil_trt.demo import demo_model

        options["model"] = job.share(demo_model)
    request = BuildRequest.of(**options).locate(job)
    plan = job.agree(lambda: prepare(request))
    description = plan.to_dict()
    if not as_json:
        say(describe(description))
    if dry:
        say(json.dumps(description, indent=1) if as_json else f"\nit would be written to {plan.output}")
        return
    engine = write(plan, progress=sys.stderr.isatty() and job.rank == 0, job=job)
    if as_json:
        say(json.dumps({**description, "output": str(engine.path.resolve())}, indent=1))
    else:
        run = started_by("cqil-run", "runtime/run.py")
        command = f"mpirun -n {engine.world_size} {run} --engine {shlex.quote(str(engine.path))}"
        reason = why_not_here(engine)
        say(
            f"\nbuilt {engine.path}\n" + (f"run it: {command}" if reason is None else f"it does not run here: {reason}")
        )


def describe(plan: dict[str, Any]) -> str:
    """The plan as text for the terminal."""
    cqil, limits = plan["cqil"], plan["limits"]
    commits = {name: f", commit {plan[f'{name}_commit'][:12]}" for name in ("model", "lora") if plan[f"{name}_commit"]}
    model, adapter = (f"{plan[name]}{commits.get(name, '')}" for name in ("model", "lora"))
    lines = [f"model      {model} ({plan['architecture']}, {counted(plan['layers'], 'layer')})"]
    if plan["lora"]:
        lines.append(f"adapter    {adapter}")
    groups = (cqil["end"] - cqil["start"]) // cqil["p"] if cqil["p"] > 1 else 0
    shape = (
        f"{counted(groups, 'group')} of {cqil['p']} layers in [{cqil['start']}, {cqil['end']})"
        if groups
        else "no groups"
    )
    bypass = f", d={cqil['d']} ({cqil['bypass']})" if cqil["d"] else ", d=0" if groups else ""
    shared = f", {cqil['ranks_per_layer']} ranks per layer" if cqil["ranks_per_layer"] > 1 else ""
    lines.append(f"CQIL       p={cqil['p']}{bypass}: {shape}{shared}, placement {cqil['placement']}")
    if cqil["drop_attention_join"]:
        layers = layer_list(cqil["drop_attention_join"])
        lines.append(f"dropped    the all-reduce after attention in layers {layers}")
    if limits["weights"] != formats.DENSE:
        kept = f", {counted(len(limits['keep']), 'layer')} kept in {limits['dtype']}" if limits["keep"] else ""
        lines.append(f"weights    {limits['weights']}{kept}")
    if limits["head"] != formats.DENSE:
        lines.append(f"head       {limits['head']}")
    cache = [limits["kv_dtype"]] if limits["kv_dtype"] != AUTO else []
    if limits["circle"]:
        cache.append(f"{limits['circle']} of {limits['max_seq_len']} positions in layers with a window")
    if cache:
        lines.append(f"KV cache   {', '.join(cache)}")
    lines.append(
        f"limits     batch {limits['max_batch_size']}, {counted(limits['max_seq_len'], 'token')}, {limits['dtype']}, "
        f"backend {limits['backend']}"
    )
    if plan["gpus"] != "any":
        lines.append(f"compiler   {plan['backend_version']}, for GPUs of compute capability {plan['gpus']}")
    lines += [f"note       {note}" for note in plan["notes"]]
    rows = [
        (
            rank["rank"],
            size(rank["weight_bytes"]),
            size(rank["bytes_per_token"]),
            size(rank["kv_cache_bytes_per_token"]),
            size(rank["kv_cache_bytes_per_sequence"]),
            rank["all_reduces_per_token"],
            rank["broadcasts_per_token"],
            rank["bypasses_per_token"],
            rank["steps"],
        )
        for rank in plan["ranks"]
    ]
    header = (
        "rank",
        "weights",
        "read/token",
        "KV/token",
        "KV/sequence",
        "all-reduces",
        "broadcasts",
        "bypasses",
        "layers",
    )
    lines += ["", table(header, rows), ""]
    one, critical = plan["bytes_per_token_one_rank"], plan["bytes_per_token_critical_path"]
    saving = round(plan["saving"], 3)
    lines.append(
        f"weights read per token on the slowest rank: {size(critical)}, against {size(one)} on one rank alone "
        + (f"({-saving:+.1%})" if saving else "(the same)")
    )
    return "\n".join(lines)
