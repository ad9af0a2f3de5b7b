"""Backend torch on a GPU: our kernels execute the decoder, and PyTorch's libraries the operations with many rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from cqil_trt.backends.torch.gpu_ops import CudaOps, Matrix
from cqil_trt.engine import Engine
from cqil_trt.gpu import cuda, kernel_library
from cqil_trt.gpu.session import BUFFERS, CudaSession, Phase
from cqil_trt.network.decoder import decode
from cqil_trt.shard import LayerShard

_MAX_VIEWS = 4096


def use_device(number: int) -> None:
    """`cuda.use_device`, for PyTorch too."""
    cuda.use_device(number)
    torch.cuda.set_device(int(cuda.call("GetDevice")))


class TorchCudaSession(CudaSession):
    """`device`: the GPU's number, modulo the number of GPUs. It becomes PyTorch's current device in this process.

    Raises UserError for too little memory, GPUs that cannot reach each other, or a missing plugin library.
    """

    def __init__(self, engine: Engine, comm: Any, device: int, slots: int):
        use_device(device)
        super().__init__(engine, comm, kernel_library.load(), slots)
        self._load(engine)
        self._torch_stream = torch.cuda.ExternalStream(int(self._stream))
        kernels = self._memory, self._workspace, self._library, int(self._stream)
        self._ops = CudaOps(self._plan, engine.limits, *kernels, TorchLibrary(engine, self.slots), self.slots)

    def _execute(self, phase: Phase, batch: int, length: int, rows: int) -> None:
        address = {
            name: self._memory[BUFFERS[phase].get(name, name)]
            for name in ("tokens", "past", "slots", "select", "logits")
        }
        prompt = self._common_past, self._slot
        self._ops.begin(batch, length, address["past"], address["slots"], address["logits"], prompt)
        tokens, select = Matrix(address["tokens"], batch * length, 1), Matrix(address["select"], rows, 1)
        with self._guard(), torch.inference_mode(), torch.cuda.stream(self._torch_stream):
            # `CudaOps` has the positions from `begin`.
            decode(self._ops, tokens, Matrix(address["past"], batch, 1), select)

    def close(self) -> None:
        super().close()
        self._ops.close()


class TorchLibrary:
    """`gpu_ops.Library` by cuBLAS and PyTorch's attention (flash where it applies), on PyTorch's current stream.

    For an engine in float32 it switches TF32 off, in the whole process: validation compares with float32.
    """

    def __init__(self, engine: Engine, slots: int):
        self._dtype = getattr(torch, engine.limits.dtype)
        if self._dtype == torch.float32:
            torch.backends.cuda.matmul.allow_tf32 = False
        self._limits, self._head_dim, self._slots = engine.limits, engine.model.head_dim, slots
        self._views: dict[tuple[int, ...], torch.Tensor] = {}

    def view(self, address: int, *shape: int) -> torch.Tensor:
        """Device memory as a tensor of the engine's type."""
        key = address, *shape
        if key not in self._views:
            if len(self._views) == _MAX_VIEWS:  # prompts of many lengths
                self._views.clear()
            self._views[key] = device_tensor(address, shape, self._dtype)
        return self._views[key]

    def multiply(self, x: Matrix, weight: Matrix, added: Matrix | None, out: Matrix) -> None:
        left, right, to = (self.view(m.address, m.rows, m.width) for m in (x, weight, out))
        if added is None:
            torch.mm(left, right.T, out=to)
        else:
            torch.addmm(self.view(added.address, added.rows, added.width), left, right.T, out=to)

    def attend(self, queries: Matrix, cache: int, past: int, slot: int, shard: LayerShard, out: Matrix) -> None:
        length, dim = queries.rows, self._head_dim
        shape = 2, self._slots, shard.num_kv_heads, self._limits.max_seq_len, dim
        keys, values = self.view(cache, *shape)[:, slot : slot + 1, :, : past + length]
        q, to = (self.view(m.address, 1, length, shard.num_heads, dim) for m in (queries, out))
        mask = None if past == 0 else causal_lower_right(length, past + length)
        gqa = shard.num_heads != shard.num_kv_heads
        q = q.transpose(1, 2)
        found = F.scaled_dot_product_attention(q, keys, values, mask, is_causal=mask is None, enable_gqa=gqa)
        to.copy_(found.transpose(1, 2))


def device_tensor(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Device memory as a tensor that does not own it."""
    # The interface has no bfloat16: bits of the same size.
    kind, bits = ("<i4", torch.int32) if dtype.itemsize == 4 else ("<i2", torch.int16)
    described = {"version": 3, "shape": shape, "typestr": kind, "data": (address, False)}
    memory = SimpleNamespace(__cuda_array_interface__=described)
    return torch.as_tensor(memory, device="cuda", dtype=bits).view(dtype)
