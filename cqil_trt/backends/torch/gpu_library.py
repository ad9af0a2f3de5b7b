"""What PyTorch's libraries compute on a GPU: products and attention of many rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from cqil_trt.backends.torch.gpu_ops import Matrix, reads_cache
from cqil_trt.backends.torch.gpu_session import CHUNK_WORDS, first_read, takes_flash
from cqil_trt.engine import Engine
from cqil_trt.gpu import cuda
from cqil_trt.shard import LayerShard

_MAX_VIEWS = 4096


def use_device(number: int) -> None:
    """`cuda.use_device`, for PyTorch too."""
    cuda.use_device(number)
    torch.cuda.set_device(int(cuda.call("GetDevice")))


class TorchLibrary:
    """`gpu_ops.Library` by cuBLAS and PyTorch's attention, on `stream` inside `executing`.

    The current GPU becomes PyTorch's. For an engine in float32 it switches TF32 off, in the whole process: validation
    compares with float32.

    `chunk`, for flash attention: the address of int32 words about the chunk, CHUNK_WORDS for each line: 0 and its
    tokens; then for each of `sizes`, key/value heads and positions of a layer's cache, the first row of the slot in the
    layer's keys [slots * heads * positions, head_dim], the row after a head's last one, and the keys that the chunk's
    last token sees, of a circle those from the first one that the first token sees.
    """

    def __init__(self, engine: Engine, slots: int, chunk: int, sizes: list[tuple[int, int]], stream: int):
        torch.cuda.set_device(int(cuda.call("GetDevice")))
        self._stream = torch.cuda.ExternalStream(stream)
        self._dtype = getattr(torch, engine.limits.dtype)
        if self._dtype == torch.float32:
            torch.backends.cuda.matmul.allow_tf32 = False
        self._limits, self._model = engine.limits, engine.model
        self._slots = slots
        self._head_dim = engine.model.head_dim
        self._views: dict[tuple[int, ...], torch.Tensor] = {}
        self._flash = takes_flash(engine)
        self.chunk = 0, 0  # its past and slot, for other attention
        # Graphs hold addresses of what attention allocates, so nobody else may get them.
        self._pool = torch.cuda.MemPool()
        words = device_tensor(chunk, (len(sizes) + 1, CHUNK_WORDS), torch.int32)
        self._queries_end = words[0, :2]
        self._keys = {size: (words[line, :2], words[line, 2:3]) for line, size in enumerate(sizes, 1)}

    @contextmanager
    def executing(self) -> Iterator[None]:
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            yield

    def view(self, address: int, *shape: int) -> torch.Tensor:
        """Device memory as a tensor of the engine's type."""
        key = address, *shape
        if key not in self._views:
            if len(self._views) == _MAX_VIEWS:  # prompts of many lengths
                self._views.clear()
            self._views[key] = device_tensor(address, shape, self._dtype)
        return self._views[key]

    def multiply(
        self, x: Matrix, weight: Matrix, added: Matrix | None, out: Matrix, alpha: float = 1.0, beta: float = 1.0
    ) -> None:
        left, right, to = (self.view(m.address, m.rows, m.width) for m in (x, weight, out))
        if added is not None:
            old = self.view(added.address, added.rows, added.width)
            torch.addmm(old, left, right.T, alpha=alpha, beta=beta, out=to)
        elif alpha == 1:
            torch.mm(left, right.T, out=to)
        else:
            torch.addmm(to, left, right.T, alpha=alpha, beta=0, out=to)  # without what is in `to`, not even NaN

    def attend(self, queries: Matrix, cache: int, shard: LayerShard, out: Matrix) -> None:
        shape = queries.rows, shard.num_heads, self._head_dim
        q, to = (self.view(matrix.address, *shape) for matrix in (queries, out))
        window, (key_scale, value_scale) = self._model.window_of(shard.index), self._limits.scales_of(shard.index)
        scale = key_scale * (self._model.query_scale or self._head_dim**-0.5)
        size = shard.num_kv_heads, self._limits.cache_length(window)
        if self._flash:
            with torch.cuda.use_mem_pool(self._pool):
                to.copy_(self._flash_attention(q, cache, size, scale, window))
        else:
            to.copy_(self._plain_attention(q, cache, size, scale, window))
        if value_scale != 1:
            to.mul_(value_scale)

    def _flash_attention(
        self, q: torch.Tensor, cache: int, size: tuple[int, int], scale: float, window: int | None
    ) -> torch.Tensor:
        length, dim, (heads, capacity) = len(q), self._head_dim, size
        slots = 1 if reads_cache(self._limits, capacity) else self._slots
        every = self.view(cache, 2, slots * heads * capacity, dim)
        # Row i of a head comes `capacity` rows after row i of the head before.
        rows = slots * heads * capacity - (heads - 1) * capacity
        keys, values = (part.as_strided((rows, heads, dim), (dim, capacity * dim, 1)) for part in every)
        keys_at, keys_end = self._keys[size]
        ends = self._queries_end, keys_at, length, capacity
        seen = {} if window is None or window >= capacity else {"window_size_left": window - 1, "window_size_right": 0}
        found, *_ = torch.ops.aten._flash_attention_forward(
            q, keys, values, *ends, 0.0, True, False, scale=scale, **seen, seqused_k=keys_end
        )
        return found

    def _plain_attention(
        self, q: torch.Tensor, cache: int, size: tuple[int, int], scale: float, window: int | None
    ) -> torch.Tensor:
        # Its import takes as long as all of PyTorch, and most engines never come here.
        from torch.nn.attention.bias import causal_lower_right

        (past, slot), length, (heads, capacity) = self.chunk, len(q), size
        slots, slot = (1, 0) if reads_cache(self._limits, capacity) else (self._slots, slot)
        past -= first_read(self._model, self._limits, capacity, past)
        shape = 2, slots, heads, capacity, self._head_dim
        keys, values = self.view(cache, *shape)[:, slot : slot + 1, :, : past + length]
        mask = None if past == 0 else causal_lower_right(length, past + length)
        if window is not None and window < past + length:
            index = torch.arange(past + length, device="cuda")
            mask = (index <= index[past:, None]) & (index > index[past:, None] - window)
        gqa = q.shape[1] != heads
        q = q.transpose(0, 1)[None]
        found = F.scaled_dot_product_attention(
            q, keys, values, mask, is_causal=mask is None, enable_gqa=gqa, scale=scale
        )
        return found[0].transpose(0, 1)


def device_tensor(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Device memory as a tensor that does not own it."""
    # The interface has no bfloat16: bits of the same size.
    kind, bits = ("<i4", torch.int32) if dtype.itemsize == 4 else ("<i2", torch.int16)
    described = {"version": 3, "shape": shape, "typestr": kind, "data": (address, False)}
    memory = SimpleNamespace(__cuda_array_interface__=described)
    return torch.as_tensor(memory, device="cuda", dtype=bits).view(dtype)
