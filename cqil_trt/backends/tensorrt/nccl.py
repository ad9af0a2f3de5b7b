"""An NCCL communicator for TensorRT's own collective layer, from the NCCL library that the process finds."""

from __future__ import annotations

import ctypes
from typing import Any

from cqil_trt.errors import UserError


class _UniqueId(ctypes.Structure):
    """ncclUniqueId of nccl.h: 128 bytes, passed by value."""

    _fields_ = [("internal", ctypes.c_char * 128)]


def communicator(comm: Any) -> int:
    """The address of an ncclComm_t over the ranks of an mpi4py communicator, on the current device.

    Raises UserError when there is no NCCL library or it fails.
    """
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError as error:
        raise UserError(f"the engine joins ranks with NCCL, which is not here ({error})") from None
    library.ncclGetErrorString.restype = ctypes.c_char_p

    def check(result: int) -> None:
        if result:
            raise UserError(f"NCCL: {library.ncclGetErrorString(result).decode()}")

    unique = _UniqueId()
    if comm.Get_rank() == 0:
        check(library.ncclGetUniqueId(ctypes.byref(unique)))
    raw = comm.bcast(bytes(unique), root=0)
    handle = ctypes.c_void_p()
    size, rank = comm.Get_size(), comm.Get_rank()
    check(library.ncclCommInitRank(ctypes.byref(handle), size, _UniqueId.from_buffer_copy(raw), rank))
    if handle.value is None:
        raise UserError("NCCL: made no communicator")
    return handle.value
