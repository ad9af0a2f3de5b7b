#!/usr/bin/env python
"""vLLM beside ours: decode steps and first tokens in the shapes of a published model, with random weights.

    python scripts/benchmark_vllm.py --tensor-parallel 2

For an environment with vLLM (`pip install vllm`, run with 0.25.0; it pins its own PyTorch) in which this checkout is on
PYTHONPATH. vLLM makes the weights itself and is used as it is, except that its prefix cache is off: prompts are random
token ids. There is no HTTP, no text and no sampling. A first token is the wall-clock time of generating one token. A
decode step is the difference between the times of a longer and a shorter generation, divided by the difference in
tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import installed  # noqa: F401
import numpy as np
from synthetic import SHAPES, write_config
from tqdm import tqdm

from cqil_trt.commands import Parser, check_at_least, check_file, numbers
from cqil_trt.errors import UserError
from cqil_trt.files import write_json
from cqil_trt.job import command
from cqil_trt.table import table

# Tokens of the shorter generation: the first steps after a prompt are not counted.
_FIRST_STEPS = 8

Generate = Callable[[list[list[int]], int], None]


def parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="llama-7b", help="(default %(default)s)")
    parser.add_argument("--layers", type=int, help="fewer for a quick look")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs (default 1)")
    parser.add_argument("--quantization", metavar="NAME", help="as vLLM's, e.g. fp8")
    parser.add_argument("--context", type=int, default=200, help="tokens before the measured steps (default 200)")
    parser.add_argument("--batches", default="1,4,8", help="sequences that decode together (default %(default)s)")
    parser.add_argument("--prefills", default="20,128,1024", help="prompt lengths (default %(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="decode steps of a measurement (default 64)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of which the median counts (default 5)")
    parser.add_argument("--json", metavar="F", type=Path)
    return parser


def start(options: argparse.Namespace, directory: Path) -> tuple[Generate, str]:
    """vLLM with a model of random weights: a function that generates this many tokens for each prompt, its version."""
    try:
        import vllm
    except ImportError as error:
        raise UserError(f"vLLM cannot be imported ({error}): pip install vllm, in an environment of its own") from None
    write_config(directory, options.shapes, options.layers)
    longest = max([options.context + _FIRST_STEPS + options.steps, *(length + 1 for length in options.prefills)])
    engine = vllm.LLM(
        model=str(directory),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="float16",
        quantization=options.quantization,
        tensor_parallel_size=options.tensor_parallel,
        max_model_len=longest,
        max_num_seqs=max(options.batches),
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], count: int) -> None:
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        found = {len(answer.outputs[0].token_ids) for answer in answers}
        if found != {count}:
            raise UserError(f"vLLM gave {sorted(found)} tokens, {count} were asked for")

    return generate, vllm.__version__


def measure(options: argparse.Namespace, generate: Generate) -> dict[str, dict[int, float]]:
    """Milliseconds: of a decode step, by batch; to the first token, by the prompt's length."""
    random = np.random.default_rng(0)
    vocabulary = SHAPES[options.shapes]["vocab_size"]

    def timed(batch: int, length: int, count: int) -> float:
        """The median milliseconds, after a round that warms up."""
        times = []
        for _ in range(options.rounds + 1):
            prompts = random.integers(vocabulary, size=(batch, length)).tolist()
            began = time.perf_counter()
            generate(prompts, count)
            times.append((time.perf_counter() - began) * 1e3)
        return statistics.median(times[1:])

    found: dict[str, dict[int, float]] = {"decode": {}, "first_token": {}}
    bar = tqdm(total=len(options.batches) + len(options.prefills), disable=not sys.stderr.isatty(), leave=False)
    for batch in options.batches:
        short, long = (timed(batch, options.context, _FIRST_STEPS + more) for more in (0, options.steps))
        found["decode"][batch] = (long - short) / options.steps
        bar.update()
    for length in options.prefills:
        found["first_token"][length] = timed(1, length, 1)
        bar.update()
    bar.close()
    return found


def run(options: argparse.Namespace) -> None:
    check_at_least(options, 1, "layers", "tensor_parallel", "context", "steps", "rounds")
    options.batches = numbers(options.batches, "--batches", 1, 1024)
    options.prefills = numbers(options.prefills, "--prefills", 1, 1 << 17)
    check_file(options.json, "--json")
    with tempfile.TemporaryDirectory(prefix="benchmark-vllm-") as directory:
        generate, version = start(options, Path(directory))
        found = measure(options, generate)
    weights = options.quantization or "dense"
    title = f"vLLM {version}, {options.shapes}, float16, {weights} weights, {options.tensor_parallel} GPUs"
    print(f"{title}; medians, milliseconds\n")
    header = [*(f"step, batch {n}" for n in found["decode"]), *(f"first token, {n}" for n in found["first_token"])]
    print(table(header, [[f"{ms:.2f}" for times in found.values() for ms in times.values()]]))
    if options.json:
        chosen = {name: getattr(options, name) for name in ("shapes", "layers", "tensor_parallel", "quantization")}
        write_json(options.json, {"vllm": version, **chosen, "context": options.context, "milliseconds": found})


if __name__ == "__main__":
    with command():
        run(parser().parse_args())
