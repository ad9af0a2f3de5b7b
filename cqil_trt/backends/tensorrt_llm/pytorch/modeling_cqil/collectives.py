"""What joins the ranks: TensorRT-LLM's all-reduce, or cqil-trt's, with the residual and the next norm fused in."""

from __future__ import annotations

from typing import Any

import torch
from tensorrt_llm._torch.distributed import AllReduce, AllReduceFusionOp, AllReduceParams, allgather
from tensorrt_llm._utils import mpi_comm, mpi_disabled
from tensorrt_llm.logger import logger

# For a peer: while TensorRT-LLM starts, a rank may compile or tune kernels as the others wait for it.
_TIMEOUT_SECONDS = 300.0


class Join(torch.nn.Module):
    """TensorRT-LLM's own collectives. One rank has nothing to join."""

    def __init__(self, model_config: Any):
        super().__init__()
        self._mapping = model_config.mapping
        self._all_reduce = AllReduce(mapping=self._mapping, strategy=model_config.allreduce_strategy)

    def forward(self, delta: torch.Tensor, residual: torch.Tensor, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """residual + every rank's delta, and its RMSNorm. [tokens, hidden]; the arguments may be overwritten."""
        if self._mapping.tp_size == 1:
            normed, total = norm(delta, residual)
            return total, normed
        fused = AllReduceParams(
            fusion_op=AllReduceFusionOp.RESIDUAL_RMS_NORM,
            residual=residual,
            norm_weight=norm.weight,
            eps=norm.variance_epsilon,
        )
        normed, total = self._all_reduce(delta, all_reduce_params=fused)
        return total, normed

    def bypass(self, x: torch.Tensor, distance: int) -> torch.Tensor:
        """The sum of the x of the `distance` ranks just before this one; zeros on rank 0."""
        rank = self._mapping.tp_rank
        every = allgather(x, self._mapping, dim=0).view(self._mapping.tp_size, *x.shape)
        return every[max(0, rank - distance) : rank].sum(0)


class CqilJoin(torch.nn.Module):
    """cqil-trt's collectives, over memory that the ranks share by CUDA IPC."""

    def __init__(self, communicator: Any):
        super().__init__()
        self._communicator = communicator

    def forward(self, delta: torch.Tensor, residual: torch.Tensor, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self._communicator.all_reduce_residual_norm(delta, residual, norm.weight, norm.variance_epsilon)

    def bypass(self, x: torch.Tensor, distance: int) -> torch.Tensor:
        found = self._communicator.bypass(x, distance)
        return torch.zeros_like(x) if found is None else found


def cqil_join(model_config: Any, hidden_size: int, dtype: str) -> CqilJoin | None:
    """cqil-trt's collectives, if they load on every rank; None, with a line in the log, otherwise.

    All ranks call it together, when the GPU is chosen and no graph is captured.
    """
    p = model_config.mapping.tp_size
    if p == 1 or mpi_disabled() or mpi_comm().Get_size() != p:
        return None
    reason = _missing(hidden_size, dtype)
    reasons = [reason for reason in mpi_comm().allgather(reason) if reason]
    if not reasons:
        from cqil_trt.errors import UserError
        from cqil_trt.gpu.workspace import CudaCommunicator

        try:
            return CqilJoin(CudaCommunicator(mpi_comm(), timeout=_TIMEOUT_SECONDS))
        except UserError as error:  # on every rank
            reasons = [str(error)]
    if mpi_comm().Get_rank() == 0:
        logger.warning(f"cqil-trt's all-reduce is not used ({reasons[0]}): TensorRT-LLM's is")
    return None


def _missing(hidden_size: int, dtype: str) -> str | None:
    """Why this rank cannot use cqil-trt's kernels."""
    try:
        from cqil_trt.errors import UserError
        from cqil_trt.gpu import kernel_library
        from cqil_trt.gpu.workspace import fuses_norm
    except ImportError as error:
        return str(error)
    try:
        kernel_library.load()
    except UserError as error:
        return str(error)
    return None if fuses_norm(hidden_size, dtype) else f"its kernels do not take rows of {hidden_size} elements"
