"""Decides where an engine is computed, and loads it. PyTorch is imported for a CPU only: GPUs do without it."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cqil_trt.collectives import agree
from cqil_trt.engine import Engine, rank_file
from cqil_trt.errors import UserError
from cqil_trt.gpu import kernel_library
from cqil_trt.gpu.fused_ops import too_large
from cqil_trt.session import Session


def open_session(engine: Engine, comm: Any, device: str, number: int, slots: int) -> Session:
    """As `Backend.open_session`."""
    missing = "the CPU was chosen" if device == "cpu" else _missing_for_cuda(engine)
    if missing is None:
        return _open_on_gpu(engine, comm, number, slots)
    if device == "cuda":
        raise UserError(f"--device cuda: {missing}")
    if device == "auto" and number == 0 and kernel_library.this_gpu() is not None:
        print(f"computing on the CPU, though there is a GPU: {missing}", file=sys.stderr)
    return _open_on_cpu(engine, comm, slots)


def _open_on_gpu(engine: Engine, comm: Any, number: int, slots: int) -> Session:
    from cqil_trt.backends.torch.gpu_session import TorchCudaSession
    from cqil_trt.gpu.weights import DeviceWeights

    weights = DeviceWeights(engine, _rank(comm), number, kernel_library.load())
    with weights.closed_on_failure():
        return TorchCudaSession(engine, comm, number, slots, weights)


def _open_on_cpu(engine: Engine, comm: Any, slots: int) -> Session:
    with ThreadPoolExecutor(1, thread_name_prefix="verification") as thread:
        verifying = thread.submit(engine.verify, rank_file(_rank(comm)))
        began = time.perf_counter()
        from cqil_trt.backends.torch.session import TorchSession

        imported = time.perf_counter()
        agree(comm, verifying.result)
    waited = time.perf_counter() - imported
    session = TorchSession(engine, comm, slots)
    session.seconds |= {"PyTorch": imported - began, "waiting for the verification": waited}
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
    if gpu is None:
        return "there is no CUDA GPU (nvidia-smi lists those that the driver sees)"
    if gpu.capability < 80:
        return f"the kernels need compute capability 8.0, this GPU has {gpu.capability / 10}"
    if gpu.cuda < 12:
        return f"the driver runs CUDA {gpu.cuda}, and CUDA 12 is needed: install a driver of 525 or newer"
    try:
        import cuda.bindings
        import cuda.pathfinder  # noqa: F401
    except ModuleNotFoundError as error:
        lacking = "cuda-pathfinder" if error.name == "cuda.pathfinder" else "cuda-bindings"
        return f"{lacking} is not installed: pip install 'cuda-bindings~={gpu.cuda}.0' cuda-pathfinder"
    if int(cuda.bindings.__version__.partition(".")[0]) > gpu.cuda:
        found, fitting = cuda.bindings.__version__, f"pip install 'cuda-bindings~={gpu.cuda}.0'"
        return f"cuda-bindings {found} is newer than the driver, which runs CUDA {gpu.cuda}: {fitting}"
    try:
        kernel_library.library_path()
    except UserError as error:
        return str(error)
    found = too_large(engine.model)
    return None if found is None else f"the model has {found}"
