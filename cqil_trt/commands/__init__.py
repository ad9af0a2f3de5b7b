"""The commands parse and print; the library does the work."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from cqil_trt.config import BYPASSES
from cqil_trt.errors import UserError
from cqil_trt.hub import Found, find_model
from cqil_trt.job import Job, command
from cqil_trt.presets import PRESETS
from cqil_trt.speculation import DEFAULT_TOKENS

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument like any other error, on one line. No path is empty, and a number may be like -1e30."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.register("type", Path, _path)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # argparse takes what starts with a dash for a flag, unless it is a number in digits.
        joined: list[str] = []
        for argument in sys.argv[1:] if args is None else args:
            flag = joined[-1] if joined else ""
            if flag.startswith("--") and flag != "--" and "=" not in flag and _negative(argument):
                joined[-1] = f"{flag}={argument}"
            else:
                joined.append(argument)
        return super().parse_known_args(joined, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return Path(text)


def _negative(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.startswith("-")


def started_by(name: str, script: str) -> str:
    """How the user starts another of our commands: its script where the called one is a script, or as installed.

    `name` is like cqil-run, `script` like runtime/run.py; the path is relative if that of the called script is.
    """
    path = os.path.normpath(os.path.join(os.path.dirname(sys.argv[0]), "..", script))
    return f"python {shlex.quote(path)}" if os.path.isfile(path) else name


class RankParser(Parser):
    """Every rank parses the same arguments; only one of them prints help."""

    speaks = True

    def print_help(self, file: Any = None) -> None:
        if self.speaks:
            super().print_help(file)


def run_ranks(
    parser: Callable[[], RankParser],
    run: Callable[[argparse.Namespace, Job], T],
    arguments: Sequence[str] | None = None,
) -> T:
    """Parses the arguments and calls `run(options, job)` on every rank; errors end the command as in `command`."""
    with command():
        job = Job()
    with command(job if job.size > 1 else None):
        cli = parser()
        cli.speaks = job.rank == 0
        result = run(cli.parse_args(arguments), job)
        job.wait()
    return result


def add_cqil_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that choose a CQIL configuration, as `builder.choose_cqil` takes them."""
    parser.add_argument("--preset", metavar="NAME", help=f"a published configuration: {', '.join(PRESETS)}")
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="a configuration that similarity.py --search --write found, instead of a preset; other flags override it",
    )
    parser.add_argument("--p", type=int, help="concurrent layers per group (default 2)")
    parser.add_argument(
        "--ranks-per-layer",
        type=int,
        metavar="T",
        help="ranks that share each layer of a group (default 1); an engine has p x T ranks",
    )
    parser.add_argument("--d", type=int, help="bypass distance: attention outputs passed on, 0 <= d < p (default 0)")
    parser.add_argument("--start", type=int, help="first concurrent layer (default: the middle of the model)")
    parser.add_argument("--end", type=int, help="first layer after the concurrent ones")
    parser.add_argument("--bypass", choices=BYPASSES, help="where the bypass goes when d > 0 (default mlp)")
    parser.add_argument(
        "--drop-attention-join",
        metavar="LAYERS",
        help="split layers without the all-reduce after attention: layers like 4-11,28-31, auto:N, or none (default)",
    )


def add_speculate_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --speculate, which `Speculation.parse` reads."""
    parser.add_argument(
        "--speculate",
        metavar="METHOD[:N]",
        default="none",
        help="draft tokens and verify them in one step, with the same answers: ngram drafts what followed the last "
        f"tokens earlier in the text, at most N (default {DEFAULT_TOKENS}) at a time; none (default): no drafts",
    )


def cqil_flags(options: argparse.Namespace) -> dict[str, Any]:
    """The values of the flags that `add_cqil_flags` adds, but --config; None where one was not given."""
    names = ("preset", "p", "ranks_per_layer", "d", "start", "end", "bypass", "drop_attention_join")
    return {name: getattr(options, name) for name in names}


def chosen_model(name: str | None) -> Found:
    """The model that --model names, by default the demo model; downloaded if necessary. Prints its note, if any."""
    if name is None:
        from cqil_trt.demo import demo_model

        name = str(demo_model())
    found = find_model(name)
    if found.note:
        print(f"note: {name}: {found.note}")
    return found


def check_at_least(options: argparse.Namespace, low: int, *names: str) -> None:
    """Raises UserError when one of these options is given and below `low`."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < low:
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}, found {value}")


def numbers(text: str, flag: str, low: int, high: int) -> list[int]:
    """The comma-separated numbers given with `flag`. Raises UserError unless all are from `low` to `high`."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(low <= number <= high for number in found):
        raise UserError(f"{flag} {text}: expected numbers from {low} to {high}, like {low},{high}")
    return found


def check_texts(paths: Sequence[Path] | None, flag: str) -> None:
    """Raises UserError for a file or directory that does not exist."""
    for path in paths or ():
        if not path.exists():
            raise UserError(f"{flag} {path}: no such file or directory")


def check_file(path: Path | None, flag: str) -> None:
    """Raises UserError unless a file can be written at `path`, given with `flag`."""
    if path is None:
        return
    directory = path.resolve().parent
    if not directory.is_dir():
        raise UserError(f"{flag} {path}: its directory does not exist")
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a directory")
    if not os.access(path if path.exists() else directory, os.W_OK):
        raise UserError(f"{flag} {path}: cannot be written")
