"""Collectives on GPUs of one host: our kernels over memory that MPI processes share by CUDA IPC."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cqil_trt.collectives.base import Communicator
from cqil_trt.config import DTYPE_BYTES
from cqil_trt.errors import CollectiveError, UserError
from cqil_trt.gpu import abi, kernel_library
from cqil_trt.schedule import Peers, RankSchedule

if TYPE_CHECKING:
    import torch

_MAX_ROW_BYTES = 32 << 10
TIMEOUT_SECONDS = 30.0


def fuses_norms(hidden: int, dtype: str) -> bool:
    """Whether cqil_all_reduce_norms supports rows of this many elements."""
    return fuses_norm(hidden, dtype) and hidden * DTYPE_BYTES[dtype] <= _MAX_ROW_BYTES // 2


def fuses_norm(hidden: int, dtype: str) -> bool:
    """Whether cqil_all_reduce_residual_norm supports rows of this many elements."""
    row_bytes = hidden * DTYPE_BYTES[dtype]
    return row_bytes % 16 == 0 and row_bytes <= _MAX_ROW_BYTES


def workspace_input(schedule: RankSchedule, peers: Peers) -> str:
    """The input of a compiled network that the workspace of these peers is bound to."""
    everyone = len(schedule.peers(peers)) == schedule.world_size
    return "workspace" if everyone else f"workspace.{peers.value}"


def attention_failure(library: ctypes.CDLL) -> CollectiveError | None:
    """Why attention gave up waiting for one of its own blocks, if it did; call it when CUDA reports an error."""
    text = library.cqil_attention_failure()
    return None if text is None else CollectiveError(text.decode())


@contextmanager
def guard(library: ctypes.CDLL, *workspaces: Workspace) -> Iterator[None]:
    """Inside, a CUDA error that a kernel's time limit caused becomes a CollectiveError that says who waited for whom.

    `workspaces`: those that the kernels may use.

    Kernels run asynchronously, so the block should end in a synchronisation.
    """
    try:
        yield
    except RuntimeError as error:
        failures = (workspace.failure() for workspace in workspaces)
        raise next(filter(None, failures), None) or attention_failure(library) or error from None


class Workspace:
    """This rank's share of the communication memory, on the current CUDA device. Needs neither torch nor TensorRT.

    `comm` is an mpi4py communicator of the ranks, in rank order. `timeout` bounds every wait on a peer, in seconds (0:
    for ever). `ranks`: their numbers in the engine, where these are some of its ranks. Raises UserError when the GPUs
    cannot reach each other's memory, on every rank.
    """

    def __init__(
        self,
        comm: Any,
        timeout: float = TIMEOUT_SECONDS,
        one_shot_bytes: int = 0,
        max_bytes: int = 0,
        library: ctypes.CDLL | None = None,
        ranks: Sequence[int] | None = None,
    ):
        self.rank, self.world_size = comm.Get_rank(), comm.Get_size()
        self._comm, self._ranks = comm, range(self.world_size) if ranks is None else ranks
        self._workspace = ctypes.c_void_p()
        handle = ctypes.create_string_buffer(abi.CQIL_HANDLE_BYTES)
        create = (self.rank, self.world_size, one_shot_bytes, max_bytes, timeout, ctypes.byref(self._workspace))

        def prepare() -> int:
            self.library = library or kernel_library.load()
            failed = self.library.cqil_workspace_create(*create)
            return failed or self.library.cqil_workspace_handle(self._workspace, handle)

        self._together(prepare)
        # Gathering is also the barrier after which every rank's memory is ready to be written to.
        handles, sizes = zip(*comm.allgather((handle.raw, (one_shot_bytes, max_bytes))))
        if len(set(sizes)) > 1:  # peers write at offsets that follow from them
            self.close()
            raise UserError(f"the ranks ask for workspaces of different sizes: {sorted(set(sizes))}")
        self._together(lambda: self.library.cqil_workspace_open(self._workspace, b"".join(handles)))

    def _together(self, call: Callable[[], int]) -> None:
        """If the call fails on any rank, every rank raises."""
        try:
            failure = None if call() == 0 else self._message()
        except UserError as error:
            failure = str(error)
        failure = next((text for text in self._comm.allgather(failure) if text), None)
        if failure is not None:
            self.close()
            raise UserError(failure)

    def _message(self) -> str:
        return self.library.cqil_last_error().decode()

    def call(self, name: str, *arguments: Any) -> None:
        """Calls cqil_NAME on this workspace. Raises ValueError for arguments it does not take."""
        if getattr(self.library, f"cqil_{name}")(self._workspace, *arguments):
            raise self.failure() or ValueError(f"{name}: {self._message()}")

    @property
    def address(self) -> int:
        """The address to bind to the TensorRT plugins' input `workspace`."""
        return self.library.cqil_workspace_address(self._workspace)

    def share(self) -> None:
        """Makes this the process's workspace, for engines whose runtime binds no input to our plugins."""
        self.library.cqil_workspace_share(self._workspace)

    def failure(self) -> CollectiveError | None:
        """Why a kernel gave up, if one did; call it when CUDA reports an error."""
        record = abi.cqil_failure()
        self.library.cqil_workspace_failure(self._workspace, record)
        if not record.code:
            return attention_failure(self.library)
        what = f"{_describe(record.operation)} number {record.sequence}"
        missing = "its data" if record.code == 1 else "its acknowledgement"
        rank, peer = self._ranks[record.rank], self._ranks[record.peer]
        return CollectiveError(
            f"rank {rank} gave up waiting for rank {peer} in {what}: {missing} did not come within the time limit (did "
            "that rank stop, or call something else?)"
        )

    @contextmanager
    def guard(self) -> Iterator[None]:
        """As `guard`, for this workspace's kernels."""
        with guard(self.library, self):
            yield

    def close(self) -> None:
        """Releases the memory. All ranks call it together. After a failure, the end of the process does it."""
        if self._workspace:
            self.library.cqil_workspace_close(self._workspace)
        self._comm.Barrier()  # memory that a peer still maps must not be freed
        if self._workspace:
            self.library.cqil_workspace_destroy(self._workspace)
        self._workspace = ctypes.c_void_p()


def _describe(operation: int) -> str:
    """A cqil_operation in words."""
    if operation == abi.cqil_operation.CQIL_DIRECTED:
        return "broadcast or bypass"
    names = {known.value: known.name for known in abi.cqil_operation}
    return names.get(operation, "an operation").removeprefix("CQIL_").lower()


class CudaCommunicator(Communicator):
    """`Communicator` for torch tensors on this rank's GPU; runs on torch's current stream and inside CUDA graphs."""

    def __init__(self, comm: Any, **options: Any):
        self.workspace = Workspace(comm, **options)
        self.rank, self.world_size = self.workspace.rank, self.workspace.world_size

    def all_reduce_residual(self, delta: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        out = delta.new_empty(delta.shape)
        self._call("all_reduce", _pointer(delta), _pointer(residual), _pointer(out), delta.numel(), _dtype(delta))
        return out

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x."""
        return self.all_reduce_residual(x, None)

    def all_reduce_residual_norm(
        self, delta: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """residual + the deltas of all ranks, and its RMSNorm times weight, over the last axis; one kernel."""
        out, normed = delta.new_empty(delta.shape), delta.new_empty(delta.shape)
        hidden = delta.shape[-1]
        pointers = [_pointer(t) for t in (delta, residual, weight, out, normed)]
        self._call("all_reduce_residual_norm", *pointers, delta.numel() // hidden, hidden, eps, _dtype(delta))
        return out, normed

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        root = self.rank == 0
        out = x if root else x.new_empty(x.shape)
        self._call("broadcast", _pointer(x if root else None), _pointer(None if root else out), x.numel(), _dtype(x))
        return out

    def bypass(self, x: torch.Tensor, d: int) -> torch.Tensor | None:
        receives = d > 0 and self.rank > 0
        out = x.new_empty(x.shape) if receives else None
        self._call("bypass", _pointer(x), _pointer(out), x.numel(), d, _dtype(x))
        return out

    def argmax(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        import torch

        local = indices.to(torch.int32)
        value, index = torch.empty_like(values), torch.empty_like(local)
        self._call("argmax", *(_pointer(t) for t in (values, local, value, index)), values.numel())
        return index.long()

    def gather_columns(self, x: torch.Tensor, widths: list[int]) -> torch.Tensor:
        # Each rank contributes its columns and zeros elsewhere. x + 0 is exact, so the sum gathers the columns.
        first = sum(widths[: self.rank])
        whole = x.new_zeros(x.shape[0], sum(widths))
        whole[:, first : first + x.shape[1]] = x
        return self.all_reduce(whole)

    def _call(self, name: str, *arguments: Any) -> None:
        import torch

        self.workspace.call(name, *arguments, torch.cuda.current_stream().cuda_stream)


def _pointer(tensor: torch.Tensor | None) -> int | None:
    if tensor is None:
        return None
    if not tensor.is_contiguous() or not tensor.is_cuda:
        raise ValueError("collectives take contiguous tensors on the GPU")
    return tensor.data_ptr()


def _dtype(tensor: torch.Tensor) -> int:
    return abi.dtype_code(str(tensor.dtype).removeprefix("torch."))
