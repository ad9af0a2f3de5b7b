"""Decides where an engine is computed, and loads it while PyTorch is imported: this module does without PyTorch."""

from __future__ import annotations

import runpy
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cqil_trt.collectives import agree
from cqil_trt.engine import Engine, rank_file
from cqil_trt.errors import UserError
from cqil_trt.gpu import kernel_library
from cqil_trt.session import Session


def open_session(engine: Engine, comm: Any, device: str, number: int, slots: int) -> Session:
    """As `Backend.open_session`."""
    with ThreadPoolExecutor(1, thread_name_prefix="import") as thread:
        importing = thread.submit(_import_pytorch)
        missing = "the CPU was chosen" if device == "cpu" else _missing_for_cuda(engine)
        if missing is None:
            session = _open_on_gpu(engine, comm, number, slots)
        elif device == "cuda":
            raise UserError(f"--device cuda: {missing}")
        else:
            if device == "auto" and number == 0 and kernel_library.this_gpu() is not None:
                print(f"computing on the CPU, though there is a GPU: {missing}", file=sys.stderr)
            session = _open_on_cpu(engine, comm, slots, importing)
    session.seconds["PyTorch"] = importing.result()
    return session


def _import_pytorch() -> float:
    """Seconds that it took."""
    began = time.perf_counter()
    import torch  # noqa: F401

    return time.perf_counter() - began


def _open_on_gpu(engine: Engine, comm: Any, number: int, slots: int) -> Session:
    from cqil_trt.backends.torch.gpu_session import TorchCudaSession
    from cqil_trt.gpu.weights import DeviceWeights

    weights = DeviceWeights(engine, _rank(comm), number, kernel_library.load())
    with weights.closed_on_failure():
        return TorchCudaSession(engine, comm, number, slots, weights)


def _open_on_cpu(engine: Engine, comm: Any, slots: int, importing: Future[float]) -> Session:
    with ThreadPoolExecutor(1, thread_name_prefix="verification") as thread:
        verifying = thread.submit(engine.verify, rank_file(_rank(comm)))
        importing.result()
        from cqil_trt.backends.torch.session import TorchSession

        began = time.perf_counter()
        agree(comm, verifying.result)
    waited = time.perf_counter() - began
    session = TorchSession(engine, comm, slots)
    session.seconds["waiting for the verification"] = waited
    return session


def _rank(comm: Any) -> int:
    return 0 if comm is None else comm.Get_rank()


def _missing_for_cuda(engine: Engine) -> str | None:
    """Why this process cannot compute the engine on a GPU, None when it can."""
    if engine.limits.max_seq_len > engine.model.fixed_context:
        context = engine.model.fixed_context
        kind = engine.model.rope.kind
        return f"{kind} rope beyond {context} tokens is computed on CPUs only: build with --max-seq-len {context}"
    gpu = kernel_library.this_gpu()
    runtime = _pytorch_cuda()
    if gpu is None or runtime is None:
        return "this PyTorch sees no GPU (is it a build for CUDA?)"
    if runtime > gpu.cuda:
        return f"this PyTorch is a build for CUDA {runtime}, the driver runs CUDA {gpu.cuda}"
    if gpu.capability < 80:
        return f"the kernels need compute capability 8.0, this GPU has {gpu.capability / 10}"
    try:
        import cuda.bindings  # noqa: F401
    except ModuleNotFoundError:
        return "cuda-bindings is not installed: pip install cuda-bindings"
    try:
        kernel_library.library_path()
    except UserError as error:
        return str(error)
    return None


def _pytorch_cuda() -> int | None:
    """The major version of CUDA that the installed PyTorch is built for; None for a build without it, or no PyTorch."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return None
    version = runpy.run_path(str(Path(found.origin).with_name("version.py")))["cuda"]
    return None if version is None else int(version.partition(".")[0])
