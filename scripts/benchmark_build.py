#!/usr/bin/env python
"""Build time and memory at full size: a LLaMA-7B-shaped float16 checkpoint with a LoRA adapter, against a file copy.

Makes the checkpoint (13.5 GB, random weights) and an r=32 adapter on all seven projections of every layer, copies the
checkpoint file to file, builds an engine for p=2 with the adapter merged, copies again, and prints how many times
longer the build took than the mean of the two copies (disks vary), and its peak memory. Needs about 42 GB of free disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import installed  # noqa: F401
import torch
from safetensors.torch import save_file
from synthetic import ROOT, check_space, make_checkpoint

from cqil_trt.commands import Parser, check_at_least, check_file
from cqil_trt.errors import UserError
from cqil_trt.files import write_json
from cqil_trt.job import command
from cqil_trt.table import table

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 32


def make_adapter(directory: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    directory.mkdir()
    tensors = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in PROJECTIONS:
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, shape[1]) * 0.02
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(shape[0], RANK) * 0.02
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 64, "target_modules": list(PROJECTIONS)}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def copy(source: Path, target: Path) -> float:
    """Seconds to copy every file of `source` to new files in `target`, which is then removed."""
    target.mkdir()
    began = time.perf_counter()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
    elapsed = time.perf_counter() - began
    shutil.rmtree(target)
    os.sync()
    return elapsed


def build(model: Path, adapter: Path, output: Path) -> tuple[float, float]:
    """Seconds and peak resident memory in bytes of build.py, in a separate process."""
    arguments = [sys.executable, ROOT / "builders" / "build.py", "--model", model, "--lora", adapter]
    began = time.perf_counter()
    process = subprocess.Popen([str(c) for c in [*arguments, "--p", 2, "--output", output]])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError("the build failed")
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def main() -> None:
    with command():
        run(parser().parse_args())


def parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--directory", type=Path, default=Path("."), help="working directory, on the disk to be measured"
    )
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick look")
    parser.add_argument("--json", metavar="F", type=Path)
    return parser


def run(options: argparse.Namespace) -> None:
    check_at_least(options, 2, "layers")
    check_file(options.json, "--json")
    check_space(options.directory, "llama-7b", options.layers, 3.1)
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="benchmark-build-") as work:
        root = Path(work)
        shapes = make_checkpoint(root / "model", "llama-7b", options.layers)
        make_adapter(root / "adapter", shapes)
        size = sum(file.stat().st_size for file in (root / "model").iterdir())
        os.sync()
        copies = [copy(root / "model", root / "copy")]
        seconds, memory = build(root / "model", root / "adapter", root / "engine")
        shutil.rmtree(root / "engine")
        os.sync()
        copies.append(copy(root / "model", root / "copy"))
    result = {
        "bytes": size,
        "copy_seconds": copies,
        "build_seconds": seconds,
        "ratio": seconds * len(copies) / sum(copies),
        "peak_rss_bytes": memory,
    }
    rows = [
        ("copy, before", f"{copies[0]:.1f}", f"{size / copies[0] / 1e9:.2f}", ""),
        ("build p=2 with adapter", f"{seconds:.1f}", f"{size / seconds / 1e9:.2f}", f"{memory / 1e9:.2f}"),
        ("copy, after", f"{copies[1]:.1f}", f"{size / copies[1] / 1e9:.2f}", ""),
    ]
    print(table(("step", "seconds", "GB/s", "peak GB"), rows))
    print(f"the build took {result['ratio']:.2f}x the mean copy of the same {size / 1e9:.1f} GB")
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
