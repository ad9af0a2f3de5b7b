"""A rank's weights in device memory. They are loaded by a thread of their own, while the process does other things.

    threads  read the file, block by block, into a ring of page-locked buffers
    one      enqueues the copy of each block to the GPU, and hashes the block while it is copied
    the GPU  copies and packs, in the order of a stream

So disk, PCIe and hashing overlap, host memory has no more of the file than the ring, and it is read once. The file is
known to be undamaged when all of it has been copied: what is computed before `wait` has returned means nothing. Until
then weights are zeros, or some of them, so graphs can be captured and libraries set up meanwhile.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np

from cqil_trt.config import DTYPE_BYTES
from cqil_trt.engine import Engine, rank_file
from cqil_trt.errors import UserError
from cqil_trt.formats import RankTensor
from cqil_trt.gpu import cuda
from cqil_trt.gpu.packed import DeviceMatrix, quantized_matrices

# As many threads read, each into a buffer.
_BUFFERS, _BUFFER_BYTES = 8, 16 << 20


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a stored tensor is copied to. `completed`: the quantized matrix whose last part it is."""

    tensor: RankTensor
    address: int
    completed: DeviceMatrix | None = None


class DeviceWeights:
    """Begins to load a rank's weights on GPU number `device`, modulo the number of GPUs.

    `library`: of the kernels. `packs`: whether the network multiplies with packed weights. `unpacks`: whether it needs
    `dense`, room for a dense copy of any packed matrix.

    What `allocated` and `wait` raise, they raise each time.
    """

    def __init__(
        self,
        engine: Engine,
        rank: int,
        device: int,
        library: ctypes.CDLL,
        packs: bool = True,
        unpacks: bool = True,
    ):
        self._engine, self._rank, self._device = engine, rank, device
        self._library, self._packs, self._unpacks = library, packs, unpacks
        self._plan = engine.plan(rank)
        self._closed = False
        self._arenas: list[cuda.Arena] = []
        self.memory: dict[str, int] = {}  # addresses by name, once allocated
        self.quantized: dict[str, DeviceMatrix] = {}  # as `quantized_matrices`, once allocated
        self.seconds: dict[str, float] = {}  # how long the parts took, once they are over
        thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._allocated = thread.submit(self._allocate)
        self._loaded = thread.submit(self._load)
        thread.shutdown(wait=False)

    def allocated(self) -> None:
        """Waits for the addresses. Raises UserError when the GPU is too small."""
        self._allocated.result()

    def wait(self) -> None:
        """Waits for the weights. Raises UserError when the file is damaged."""
        self._allocated.result()
        self._loaded.result()

    @contextmanager
    def closed_on_failure(self) -> Iterator[None]:
        """Ends the loading if what is done with the weights fails, so that the process need not wait for it."""
        try:
            yield
        except UserError:
            self.close()
            raise
        except BaseException:
            self._closed = True  # the device may be lost: nothing is freed
            raise

    def close(self) -> None:
        """Frees the memory, also of weights that are still being loaded."""
        self._closed = True
        self._loaded.exception()
        for arena in self._arenas:
            arena.free()
        self._arenas.clear()

    def _allocate(self) -> None:
        began = time.perf_counter()
        cuda.use_device(self._device)  # makes the context
        self.seconds["context"] = time.perf_counter() - began
        plan, library = self._plan, self._library
        self.quantized = quantized_matrices(plan, library if self._packs else None)
        matrices = {part: matrix for matrix in self.quantized.values() for part in matrix.parts}
        first, last = plan.vocabulary
        row = plan.model.hidden_size * DTYPE_BYTES[plan.dtype]
        # A rank's rows of a shared embedding may begin where no matrix may.
        copied = plan.shares_embedding and first * row % cuda.ALIGNMENT != 0
        dense = 0
        if self._unpacks:
            dense = max((matrix.dense_bytes for matrix in self.quantized.values() if matrix.packed), default=0)
        sizes = {tensor.name: tensor.nbytes for tensor in plan.tensors if tensor.name not in matrices}
        sizes |= {matrix.parts[0]: matrix.nbytes(library) for matrix in self.quantized.values()}
        sizes |= {"dense": dense} | ({"lm_head.weight": (last - first) * row} if copied else {})
        size = sum(map(cuda.aligned, sizes.values()))
        arena = self._arena(size, "the weights")
        # What runs before they are there computes with numbers, not with NaN that would become a token's number.
        cuda.call("Memset", arena.address, 0, size)
        cuda.call("DeviceSynchronize")
        self.memory = {name: arena.take(size) for name, size in sizes.items()}
        self._copied = None
        if plan.shares_embedding:
            source = self.memory["embedding.weight"] + first * row
            if copied:
                self._copied = self.memory["lm_head.weight"], source, (last - first) * row
            else:
                self.memory["lm_head.weight"] = source
        # Room for the parts of one matrix, as they are stored: they follow each other.
        stored = {tensor.name: cuda.aligned(tensor.nbytes) for tensor in plan.tensors}
        most = max((sum(stored[part] for part in matrix.parts) for matrix in self.quantized.values()), default=0)
        room = self._arena(most, "a matrix while it is packed") if most else None
        self._places, self._parts = [], {}  # the latter: where the parts of quantized matrices are packed from
        for tensor in plan.tensors:
            matrix = matrices.get(tensor.name)
            if matrix is None or room is None:
                self._places.append(Place(tensor=tensor, address=self.memory[tensor.name]))
                continue
            if tensor.name == matrix.parts[0]:
                room.clear()
            completed = matrix if tensor.name == matrix.parts[-1] else None
            address = self._parts[tensor.name] = room.take(tensor.nbytes)
            self._places.append(Place(tensor=tensor, address=address, completed=completed))

    def _arena(self, size: int, what: str) -> cuda.Arena:
        self._arenas.append(cuda.Arena(size, what))
        return self._arenas[-1]

    def _load(self) -> None:
        if self._allocated.exception() is not None:
            return
        began = time.perf_counter()
        # Kernels of other streams must not wait for the copies, nor the copies for them.
        stream = cuda.new_stream()
        try:
            self._copy(stream)
            if self._copied is not None:
                cuda.copy(*self._copied, stream)
        finally:
            cuda.call("StreamSynchronize", stream)
            cuda.call("StreamDestroy", stream)
        if len(self._arenas) > 1:  # the room to pack in
            self._arenas.pop().free()
        self.seconds["weights"] = time.perf_counter() - began

    def _copy(self, stream: Any) -> None:
        """Enqueues the copies from the file, and the packing."""
        offsets = self._engine.weight_offsets(self._rank)
        remaining = list(zip(offsets, self._places))[::-1]
        name = rank_file(self._rank)
        size = min(_BUFFER_BYTES, self._engine.files[name]["size"])
        ring = cuda.pinned((_BUFFERS, size), np.uint8)
        events = [cuda.call("EventCreate") for _ in range(2)]  # of two blocks, as `Engine.read` waits for the first
        copied = cycle(events)

        def use(offset: int, block: memoryview) -> Callable[[], None]:
            if self._closed:
                raise _Closed
            source, end = np.frombuffer(block, np.uint8), offset + len(block)
            while remaining and remaining[-1][0] < end:
                begin, place = remaining[-1]
                stop = begin + place.tensor.nbytes
                start = max(begin, offset)
                if start < min(stop, end):
                    cuda.upload(place.address + start - begin, source[start - offset : min(stop, end) - offset], stream)
                if stop > end:
                    break
                remaining.pop()
                self._complete(place, stream)
            event = next(copied)
            cuda.call("EventRecord", event, stream)
            return lambda: cuda.call("EventSynchronize", event)

        try:
            self._engine.read(name, [memoryview(buffer) for buffer in ring], use)
        except _Closed:
            pass
        finally:
            cuda.call("StreamSynchronize", stream)
            for event in events:
                cuda.call("EventDestroy", event)
            cuda.free_pinned(ring)

    def _complete(self, place: Place, stream: Any) -> None:
        """Packs the matrix whose parts are all there, if there is one. The next one's follow in the stream's order."""
        if (matrix := place.completed) is not None:
            parts = {name: self._parts[name] for name in matrix.parts}
            matrix.load(self._library, parts, self.memory[matrix.parts[0]], int(stream))


class _Closed(Exception):
    """Nobody wants the weights any more."""
