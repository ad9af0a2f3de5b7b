"""What the scripts that measure sessions on GPUs share. Needs no PyTorch, but for its profiler and for reading."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import installed  # noqa: F401
import numpy as np
from tqdm import tqdm

from cqil_trt.gpu import cuda
from cqil_trt.model import ModelConfig

# The kernels of plugins/ that multiply.
_PRODUCTS = "few_rows_kernel", "packed_nibbles_kernel", "packed_bytes_kernel"


def add_pause_flag(parser: Any) -> None:
    parser.add_argument(
        "--pause",
        type=int,
        default=0,
        metavar="MS",
        help="milliseconds before each prompt that is measured (default 0: back to back, where a GPU at its "
        "power limit lowers its clock)",
    )


def use_device(number: int) -> None:
    """Makes GPU `number` modulo the number of GPUs this thread's, for PyTorch too."""
    import torch

    cuda.use_device(number)
    torch.cuda.set_device(int(cuda.call("GetDevice")))


def read_bandwidth() -> float:
    """TB/s at which this GPU reads 2 GiB, with PyTorch."""
    import torch

    data = torch.zeros(1 << 29, device="cuda")
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        data.sum()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(data.nbytes / np.median(times) / 1e9)


def measure(session: Any, model: ModelConfig, options: Any, title: str | None) -> dict[str, Any]:
    """Milliseconds: decode by context, decode by batch, decode with drafts, prefill by length; all samples.

    `options`: with contexts, batches, batch_context, drafts, prefills, pause (milliseconds) and steps. `title`: of the
    progress bar; None: without one.
    """
    random = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return random.integers(model.vocab_size, size=count).tolist()

    work: list[tuple[str, int, Callable[[], list[float]]]] = []
    for context in options.contexts:
        work.append(("decode", context, lambda n=context: decode(session, [tokens(n)], options.steps)))
    for batch in options.batches:
        some = [tokens(options.batch_context) for _ in range(batch)]
        work.append(("batch", batch, lambda some=some: decode(session, some, options.steps)))
    for drafted in options.drafts:
        some = [tokens(options.batch_context)]
        work.append(("drafts", drafted, lambda n=drafted, some=some: decode(session, some, options.steps, n)))
    for length in options.prefills:
        work.append(("prefill", length, lambda n=length: prefill(session, tokens(n), options.pause / 1e3)))
    found: dict[str, Any] = {"decode": {}, "batch": {}, "drafts": {}, "prefill": {}}
    for kind, size, run in tqdm(work, desc=title, disable=title is None or not sys.stderr.isatty(), leave=False):
        found[kind][size] = run()
    return found


def decode(session: Any, prompts: list[list[int]], steps: int, drafted: int = 0) -> list[float]:
    """Milliseconds of each of `steps` decode steps after these prompts."""
    slots = range(len(prompts))
    for warming in (steps // 2, 4):  # the first steps after a prefill see the clocks and caches that it left
        for slot, prompt in zip(slots, prompts):
            session.load(prompt, slot)
        session.time_decode(slots, warming, drafted)
    return session.time_decode(slots, steps, drafted)


def prefill(session: Any, prompt: list[int], pause: float) -> list[float]:
    """Milliseconds from a prompt to its first token on the host, five times, each after `pause` seconds of idling."""
    times = []
    for _ in range(6):
        end = time.perf_counter() + pause
        time.sleep(pause * 0.9)
        while time.perf_counter() < end:  # ranks that sleep wake up at different times
            pass
        began = time.perf_counter()
        session.load(prompt)
        times.append((time.perf_counter() - began) * 1e3)
    return times[1:]


def kernel_name(symbol: str) -> str:
    """The name of one of our kernels in its symbol or its demangled form; that of another as it is."""
    found = re.search(r"(?<![a-z_])([a-z][a-z_]*_kernel)(?![a-z_])", symbol)
    return found[1] if found else symbol


def kernel_shares(events: Sequence[tuple[str, float]], steps: int) -> list[tuple[str, float, float]]:
    """Kernels of a decode step: (name, number, microseconds each), of the kernels of `steps` steps.

    `events`: each one's symbol (or demangled form) and its end in microseconds. Kernels overlap, so each counts from
    the end of the previous one to its own end: these times add up to the step.
    """
    events = sorted(events, key=lambda event: event[1])
    names = [kernel_name(symbol) for symbol, _ in events]
    # Of a product's template arguments, the first that is true or false says whether it is gated.
    gated = [
        re.findall(r"\b(true|false)\b|L(b[01])E", symbol)[:1] in ([("true", "")], [("", "b1")]) for symbol, _ in events
    ]
    shares: dict[str, list[float]] = {}
    for i in range(1, len(events) - 1):
        before, name, after = names[i - 1 : i + 2]
        if name in _PRODUCTS and gated[i]:
            name = "gate+up"
        elif name in _PRODUCTS:
            last = after == "row_argmax_kernel"
            name = "last projection" if last else "qkv" if "attend" in after else "o" if "attend" in before else "down"
        shares.setdefault(name, []).append(events[i][1] - events[i - 1][1])
    # Kernels of split and whole layers differ: use the mean. A kernel that runs once per step may begin a graph, which
    # starts late under the profiler: use the median.
    return [
        (name, len(times) / steps, float(np.mean(times) if len(times) > steps else np.median(times)))
        for name, times in shares.items()
    ]


def profile(session: Any, prompt: list[int], steps: int = 16) -> list[tuple[str, float, float]]:
    """Kernels of a decode step, as `kernel_shares`, from the torch profiler."""
    import torch

    session.load(prompt)
    session.time_decode((0,), 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        session.time_decode((0,), steps)
    events = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    # time_decode takes one step more than it times.
    return kernel_shares([(event.name, event.time_range.end) for event in events], steps + 1)


def kernel_rows(kernels: Sequence[tuple[str, float, float]]) -> list[tuple[str, ...]]:
    """Rows of a table from `kernel_shares`: name, per step, µs each, µs per step, share; from 0.5 µs per step on."""
    ordered = sorted(kernels, key=lambda kernel: -kernel[1] * kernel[2])
    step = sum(count * each for _, count, each in ordered)
    return [
        (name[:60], f"{count:.0f}", f"{each:.2f}", f"{count * each:.0f}", f"{count * each / step:.0%}")
        for name, count, each in ordered
        if count * each >= 0.5
    ]
