"""What the GPU executes in a step, by CUDA itself: the nodes of a captured graph, and the times of its kernels (CUPTI).

Needs cuda-bindings, and for times libcupti, which comes with CUDA's toolkit and with PyTorch; not PyTorch itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from cuda.bindings import driver
from measuring import kernel_name

from cqil_trt.errors import UserError
from cqil_trt.gpu import cuda


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of a CUDA graph.

    `name`: of its kernel, or what else it is. `overlaps`: whether it may start before its predecessor has ended
    (programmatic dependent launch); None for a node without a predecessor. `joins`: of how many nodes it waits for.
    """

    name: str
    overlaps: bool | None
    joins: int


def captured(stream: Any, record: Callable[[], None]) -> list[Node]:
    """The nodes of the graph of what `record` enqueues on a stream, in an order in which they can run."""
    mode = cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    cuda.call("StreamBeginCapture", stream, mode)
    try:
        record()
    finally:
        graph = cuda.call("StreamEndCapture", stream)
    found = _nodes(driver.CUgraph(int(graph)))
    cuda.call("GraphDestroy", graph)
    return found


def _call(name: str, *arguments: Any) -> tuple[Any, ...]:
    # cuda-bindings 12 has the edges with what is said about them under a name of its own.
    error, *values = getattr(driver, f"{name}_v2", getattr(driver, name))(*arguments)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise cuda.CudaError(f"{name}: {error.name}")
    return tuple(values)


def _nodes(graph: Any) -> list[Node]:
    *_, count = _call("cuGraphGetNodes", graph)
    nodes = {int(node): node for node in _call("cuGraphGetNodes", graph, count)[0]}
    *_, count = _call("cuGraphGetEdges", graph)
    sources, targets, data, _ = _call("cuGraphGetEdges", graph, count)
    programmatic = int(driver.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC)
    before: dict[int, list[tuple[int, bool]]] = {key: [] for key in nodes}
    after: dict[int, list[int]] = {key: [] for key in nodes}
    for source, target, about in zip(sources, targets, data):
        before[int(target)].append((int(source), about.type == programmatic))
        after[int(source)].append(int(target))
    waiting = {key: len(edges) for key, edges in before.items()}
    ready, found = [key for key, count in waiting.items() if not count], []
    while ready:
        key = ready.pop()
        edges = before[key]
        overlaps = all(early for _, early in edges) if edges else None
        found.append(Node(name=_name(nodes[key]), overlaps=overlaps, joins=len(edges)))
        for target in after[key]:
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)
    return found


def _name(node: Any) -> str:
    kind = _call("cuGraphNodeGetType", node)[0]
    if kind != driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
        return kind.name.removeprefix("CU_GRAPH_NODE_TYPE_").lower()
    about = _call("cuGraphKernelNodeGetParams", node)[0]
    if int(about.func):
        return kernel_name(_call("cuFuncGetName", about.func)[0].decode())
    return kernel_name(_call("cuKernelGetName", about.kern)[0].decode())


def node_rows(nodes: list[Node]) -> list[tuple[str, ...]]:
    """Rows of a table: a node's name, the name before it, how it follows that, and how often."""
    pairs = []
    for previous, node in zip([None, *nodes], nodes):
        if node.overlaps is None:
            follows = "first"
        elif node.joins > 1:
            follows = f"waits for {node.joins}"
        else:
            follows = "overlaps" if node.overlaps else "waits"
        pairs.append((previous.name[:60] if previous else "", node.name[:60], follows))
    return [(*pair, str(len(list(alike)))) for pair, alike in groupby(sorted(pairs))]


# CUPTI, from cupti_activity.h of CUDA 13.0. Records begin with their kind; all of these have their times at the same
# place, and kernels their name, since CUDA 11.
_MEMCPY, _MEMSET, _KERNEL, _CONCURRENT_KERNEL = 1, 2, 3, 10
_START, _END, _KERNEL_NAME = 16, 24, 104
_FORCED = 1  # CUPTI_ACTIVITY_FLAG_FLUSH_FORCED
_BUFFER_BYTES = 8 << 20
_LIBRARIES = "libcupti.so.13", "libcupti.so.12", "libcupti.so"
_PLACES = "", "/usr/local/cuda/lib64/", "/usr/local/cuda/extras/CUPTI/lib64/"

_Request = ctypes.CFUNCTYPE(
    None, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)
)
_Complete = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)


def find_cupti(*directories: Path) -> str | None:
    """A libcupti that can be loaded: from one of the directories, else from where the loader and CUDA have it."""
    given = (str(path) for directory in directories for path in sorted(directory.glob("**/libcupti.so.*")))
    for path in (*given, *(place + name for place in _PLACES for name in _LIBRARIES)):
        try:
            ctypes.CDLL(path)
        except OSError:
            continue
        return path
    return None


@contextmanager
def kernel_times(path: str) -> Iterator[list[tuple[str, float]]]:
    """Collects what the GPU executes inside: the symbol of each kernel (or copy, fill) and its end in microseconds.

    `path`: of libcupti. The list is filled at the end. Raises UserError when CUPTI refuses, as it does where the
    driver keeps it to the administrator.
    """
    library = ctypes.CDLL(path)
    buffers: dict[int, Any] = {}
    events: list[tuple[str, float]] = []

    @_Request
    def request(buffer: Any, size: Any, records: Any) -> None:
        memory = (ctypes.c_uint64 * (_BUFFER_BYTES // 8))()
        buffers[ctypes.addressof(memory)] = memory
        buffer[0], size[0], records[0] = ctypes.addressof(memory), _BUFFER_BYTES, 0

    @_Complete
    def complete(_context: Any, _stream: int, buffer: int, _size: int, valid: int) -> None:
        record = ctypes.c_void_p()
        while not library.cuptiActivityGetNextRecord(
            ctypes.c_void_p(buffer), ctypes.c_size_t(valid), ctypes.byref(record)
        ):
            at = record.value or 0
            kind = ctypes.c_uint32.from_address(at).value
            end = ctypes.c_uint64.from_address(at + _END).value / 1e3
            if kind in (_KERNEL, _CONCURRENT_KERNEL):
                name = ctypes.c_char_p.from_address(at + _KERNEL_NAME).value or b"?"
                events.append((name.decode(errors="replace"), end))
            elif kind in (_MEMCPY, _MEMSET):
                events.append(("a copy" if kind == _MEMCPY else "a fill", end))
        buffers.pop(buffer, None)

    def check(result: int, what: str) -> None:
        if result:
            raise UserError(f"{path}: {what} fails with CUPTI's error {result}")

    kinds = _MEMCPY, _MEMSET, _CONCURRENT_KERNEL
    check(library.cuptiActivityRegisterCallbacks(request, complete), "cuptiActivityRegisterCallbacks")
    for kind in kinds:
        check(library.cuptiActivityEnable(kind), "cuptiActivityEnable")
    try:
        yield events
    finally:
        for kind in kinds:
            library.cuptiActivityDisable(kind)
        library.cuptiActivityFlushAll(_FORCED)
