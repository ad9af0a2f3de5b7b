"""The part of CUDA's runtime API that an engine's runtime needs, through cuda-bindings; errors are exceptions."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

import numpy as np
from cuda.bindings import runtime

from cqil_trt.errors import UserError

_KIND = runtime.cudaMemcpyKind
# TensorRT requires addresses with this alignment.
ALIGNMENT = 256


class CudaError(RuntimeError):
    """An error that CUDA reports."""


def call(name: str, *arguments: Any) -> Any:
    """cudaNAME(...): its result, or nothing. Raises CudaError."""
    error, *values = getattr(runtime, f"cuda{name}")(*arguments)
    if error != runtime.cudaError_t.cudaSuccess:
        _, text = runtime.cudaGetErrorString(error)
        raise CudaError(f"cuda{name}: {text.decode()}")
    return values[0] if values else None


def is_done(stream: Any) -> bool:
    """Whether all that was enqueued on a stream has been executed. Raises CudaError when some of it failed."""
    error = runtime.cudaStreamQuery(stream)[0]
    if error == runtime.cudaError_t.cudaErrorNotReady:
        return False
    call("StreamQuery", stream)
    return True


def device_count() -> int:
    """How many GPUs this process sees; 0 without a driver."""
    error, count = runtime.cudaGetDeviceCount()
    return int(count) if error == runtime.cudaError_t.cudaSuccess else 0


def use_device(number: int) -> None:
    """Makes GPU `number` modulo the number of GPUs the current one. Raises UserError without a GPU."""
    count = device_count()
    if not count:
        raise UserError("no CUDA GPU here (nvidia-smi lists those that the driver sees)")
    call("SetDevice", number % count)


def compute_capability() -> str:
    """Of the current device, like "9.0"."""
    device = call("GetDevice")
    attribute = runtime.cudaDeviceAttr
    major = call("DeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, device)
    minor = call("DeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, device)
    return f"{major}.{minor}"


def device_name() -> str:
    return call("GetDeviceProperties", call("GetDevice")).name.decode()


def new_stream() -> Any:
    """A stream that neither waits for the default stream nor lets it wait."""
    return call("StreamCreateWithFlags", runtime.cudaStreamNonBlocking)


class Arena:
    """One allocation of device memory, handed out in aligned pieces. Raises UserError when the GPU is too small."""

    def __init__(self, size: int, what: str):
        self.size, self._used = max(size, ALIGNMENT), 0
        try:
            self.address = int(call("Malloc", self.size))
        except CudaError as error:
            raise UserError(f"no GPU memory for {what} ({size / 1e9:.2f} GB): {error}") from None

    def take(self, size: int) -> int:
        """The address of the next `size` bytes."""
        address = self.address + self._used
        self._used += aligned(size)
        if self._used > self.size:
            raise MemoryError(f"{self._used} bytes taken of an arena of {self.size}")
        return address

    def clear(self) -> None:
        """Takes all pieces back."""
        self._used = 0

    def free(self) -> None:
        """Gives the memory back; no piece of it may be in use."""
        call("Free", self.address)


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array in page-locked host memory, which kernels can write to; it lives until `free_pinned`."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    address = int(call("MallocHost", max(size, 1)))
    return np.frombuffer((ctypes.c_byte * size).from_address(address), dtype).reshape(shape)


def free_pinned(array: np.ndarray) -> None:
    call("FreeHost", array.ctypes.data)


def upload(address: int, array: np.ndarray, stream: Any) -> None:
    """Copies an array to the device; it may be changed when this returns unless it is pinned."""
    array = np.ascontiguousarray(array)
    call("MemcpyAsync", address, array.ctypes.data, array.nbytes, _KIND.cudaMemcpyHostToDevice, stream)


def download(array: np.ndarray, address: int, stream: Any) -> None:
    """Copies device memory into a contiguous array, which holds it once the stream has reached this point."""
    call("MemcpyAsync", array.ctypes.data, address, array.nbytes, _KIND.cudaMemcpyDeviceToHost, stream)


def copy(target: int, source: int, size: int, stream: Any) -> None:
    call("MemcpyAsync", target, source, size, _KIND.cudaMemcpyDeviceToDevice, stream)


def copy_rows(target: int, source: int, pitch: int, width: int, rows: int, stream: Any) -> None:
    """Copies the first `width` bytes of each of `rows` rows, which are `pitch` bytes apart in both places."""
    call("Memcpy2DAsync", target, pitch, source, pitch, width, rows, _KIND.cudaMemcpyDeviceToDevice, stream)


class Graph:
    """What `record` enqueues on a stream, as a CUDA graph."""

    def __init__(self, stream: Any, record: Any):
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("StreamBeginCapture", stream, mode)
        try:
            record()
        except BaseException:
            with suppress(CudaError):  # which says only that something went wrong before
                call("StreamEndCapture", stream)
            raise
        graph = call("StreamEndCapture", stream)
        self._graph = call("GraphInstantiate", graph, 0)
        call("GraphDestroy", graph)

    def launch(self, stream: Any) -> None:
        call("GraphLaunch", self._graph, stream)

    def upload(self, stream: Any) -> None:
        """Does what the first launch would otherwise do first."""
        call("GraphUpload", self._graph, stream)

    def destroy(self) -> None:
        call("GraphExecDestroy", self._graph)
