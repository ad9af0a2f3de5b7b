"""The torch backend on a GPU: our own kernels execute the decoder, and PyTorch's libraries what has many rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from cqil_trt import cuda, plugins
from cqil_trt.backends.cuda_session import BUFFERS, CudaSession, Phase
from cqil_trt.engine import Engine
from cqil_trt.network.cuda_ops import CudaOps, Matrix
from cqil_trt.network.decoder import decode
from cqil_trt.shard import LayerShard


class TorchCudaSession(CudaSession):
    """`device`: which GPU, modulo those there are."""

    def __init__(self, engine: Engine, comm: Any, device: int):
        cuda.use_device(device)
        torch.cuda.set_device(int(cuda.call("GetDevice")))
        super().__init__(engine, comm, plugins.load())
        self._allocate()
        self._load_constants(engine)
        self._load_weights(engine)
        library = TorchLibrary(engine, self._stream)
        kernels = self._memory, self._workspace, self._library, int(self._stream)
        self._ops = CudaOps(self._plan, engine.limits, *kernels, library)

    def _execute(self, phase: Phase, batch: int, length: int, rows: int) -> None:
        address = {
            name: self._memory[BUFFERS[phase].get(name, name)] for name in ("tokens", "past", "select", "logits")
        }
        self._ops.begin(batch, length, address["past"], address["logits"], self._common_past)
        tokens, select = Matrix(address["tokens"], batch * length, 1), Matrix(address["select"], rows, 1)
        decode(self._ops, tokens, None, select)


class TorchLibrary:
    """`cuda_ops.Library` by cuBLAS and PyTorch's attention (flash where it applies), on the session's stream."""

    def __init__(self, engine: Engine, stream: Any):
        self._stream = torch.cuda.ExternalStream(int(stream))
        self._dtype = getattr(torch, engine.limits.dtype)
        self._limits, self._head_dim = engine.limits, engine.model.head_dim
        self._views: dict[tuple[int, ...], torch.Tensor] = {}

    def _view(self, address: int, *shape: int) -> torch.Tensor:
        key = address, *shape
        if key not in self._views:
            # Without bfloat16 in the interface, its bits; float32 and float16 alike.
            bits = torch.int32 if self._dtype.itemsize == 4 else torch.int16
            self._views[key] = torch.as_tensor(_Memory(address, shape, bits), device="cuda").view(self._dtype)
        return self._views[key]

    def multiply(self, x: Matrix, weight: Matrix, added: Matrix | None, out: Matrix) -> None:
        left, right, to = (self._view(m.address, m.rows, m.width) for m in (x, weight, out))
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            if added is None:
                torch.mm(left, right.T, out=to)
            else:
                torch.addmm(self._view(added.address, added.rows, added.width), left, right.T, out=to)

    def attend(self, queries: Matrix, cache: int, past: int, batch: int, shard: LayerShard, out: Matrix) -> None:
        length, dim, limits = queries.rows // batch, self._head_dim, self._limits
        shape = 2, limits.max_batch_size, shard.num_kv_heads, limits.max_seq_len, dim
        keys, values = self._view(cache, *shape)[:, :batch, :, : past + length]
        q, to = (self._view(m.address, batch, length, shard.num_heads, dim) for m in (queries, out))
        mask = None if past == 0 else causal_lower_right(length, past + length)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            found = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                keys,
                values,
                mask,
                is_causal=mask is None,
                enable_gqa=shard.num_heads != shard.num_kv_heads,
            )
            to.copy_(found.transpose(1, 2))


class _Memory:
    """Device memory that somebody else owns, for torch.as_tensor."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: torch.dtype):
        kind = {torch.int32: "<i4", torch.int16: "<i2"}[dtype]
        self.__cuda_array_interface__ = {"version": 3, "shape": shape, "typestr": kind, "data": (address, False)}
