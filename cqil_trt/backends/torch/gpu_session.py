"""Backend torch on a GPU: our kernels and cuBLASLt execute the decoder, without PyTorch."""

from __future__ import annotations

from typing import Any

from cqil_trt.backends.torch.gpu_ops import CudaOps, Matrix
from cqil_trt.engine import Engine
from cqil_trt.gpu import cuda, kernel_library
from cqil_trt.gpu.session import BUFFERS, CudaSession, Phase
from cqil_trt.gpu.weights import DeviceWeights
from cqil_trt.network.decoder import decode


class TorchCudaSession(CudaSession):
    """`device`: the GPU's number, modulo the number of GPUs.

    `weights`: of this rank on that GPU, which may still be loaded.

    Raises UserError for too little memory, GPUs that cannot reach each other, or a missing plugin library.
    """

    def __init__(self, engine: Engine, comm: Any, device: int, slots: int, weights: DeviceWeights):
        cuda.use_device(device)
        super().__init__(engine, comm, kernel_library.load(), slots)
        with self._released_on_failure():
            self._use_plugins()
            self._load(engine, weights)
            kernels = self._memory, self._workspaces, self._library, int(self._stream)
            self._ops = CudaOps(self._plan, engine.limits, *kernels, self.slots, self._quantized)

    def _execute(self, phase: Phase, batch: int, length: int, rows: int) -> None:
        address = {
            name: self._memory[BUFFERS[phase].get(name, name)]
            for name in ("tokens", "past", "slots", "select", "logits")
        }
        decodes = phase is not Phase.PREFILL
        self._ops.begin(batch, length, address["past"], address["slots"], address["logits"], decodes)
        tokens, select = Matrix(address["tokens"], batch * length, 1), Matrix(address["select"], rows, 1)
        with self._guard():
            # `CudaOps` has the positions from `begin`.
            decode(self._ops, tokens, Matrix(address["past"], batch, 1), select)

    def close(self) -> None:
        super().close()
        self._ops.close()
