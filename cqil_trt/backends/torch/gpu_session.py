"""Backend torch on a GPU: our kernels execute the decoder, and PyTorch's libraries the operations with many rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from cqil_trt.backends.torch.gpu_ops import CudaOps, Matrix
from cqil_trt.engine import Engine
from cqil_trt.gpu import cuda, kernel_library
from cqil_trt.gpu.session import BUFFERS, CudaSession, Phase
from cqil_trt.gpu.weights import DeviceWeights
from cqil_trt.network.decoder import decode
from cqil_trt.shard import LayerShard

_MAX_VIEWS = 4096
# 32-bit words that describe a chunk, and as many for each number of key/value heads: 16 bytes, as kernels align them.
_CHUNK_WORDS = 4
# The lengths of chunks that are graphs: from an entry's first up to the next entry's first, in its steps. The padding
# of a chunk is computed in vain.
_LENGTH_STEPS = ((16, 16), (64, 32), (128, 64), (512, 128), (2048, 256))


def use_device(number: int) -> None:
    """`cuda.use_device`, for PyTorch too."""
    cuda.use_device(number)
    torch.cuda.set_device(int(cuda.call("GetDevice")))


class TorchCudaSession(CudaSession):
    """`device`: the GPU's number, modulo the number of GPUs. It becomes PyTorch's current device in this process.

    `weights`: of this rank on that GPU, which may still be loaded.

    Raises UserError for too little memory, GPUs that cannot reach each other, or a missing plugin library.
    """

    # Two H200, LLaMA-7B, `sharded`: scripts/benchmark.py --drafts 7.
    _ROW_COST, _PACKED_ROW_COST = 0.035, 0.08
    row_cost = _ROW_COST
    _draft_rows = 16  # what products take whose rows do not depend on each other

    def __init__(self, engine: Engine, comm: Any, device: int, slots: int, weights: DeviceWeights):
        use_device(device)
        super().__init__(engine, comm, kernel_library.load(), slots)
        self._heads = sorted({shard.num_kv_heads for shard in self._plan.layers.values() if shard.num_heads})
        if takes_flash(engine):
            self._prompt_lengths = prompt_lengths(min(engine.limits.prefill_chunk, engine.limits.max_seq_len))
        self._load(engine, weights)
        self._torch_stream = torch.cuda.ExternalStream(int(self._stream))
        if any(matrix.packed for matrix in self._quantized.values()):
            self.row_cost = self._PACKED_ROW_COST
        kernels = self._memory, self._workspaces, self._library, int(self._stream)
        self._torch_library = TorchLibrary(engine, self.slots, self._memory["chunk"], self._heads)
        self._ops = CudaOps(self._plan, engine.limits, *kernels, self._torch_library, self.slots, self._quantized)
        self._complete()

    def _extra_sizes(self) -> dict[str, int]:
        return {"chunk": 4 * _CHUNK_WORDS * (len(self._heads) + 1)}

    def _describe_chunk(self, count: int, past: int, slot: int) -> None:
        self._torch_library.chunk = past, slot
        words = [[0, count, past + count, 0]]
        for heads in self._heads:
            first = slot * heads * self.limits.max_seq_len
            words.append([first, first + self.limits.max_seq_len, 0, 0])
        self._upload("chunk", words)

    def _execute(self, phase: Phase, batch: int, length: int, rows: int) -> None:
        address = {
            name: self._memory[BUFFERS[phase].get(name, name)]
            for name in ("tokens", "past", "slots", "select", "logits")
        }
        decodes = phase is not Phase.PREFILL
        self._ops.begin(batch, length, address["past"], address["slots"], address["logits"], decodes)
        tokens, select = Matrix(address["tokens"], batch * length, 1), Matrix(address["select"], rows, 1)
        with self._guard(), torch.inference_mode(), torch.cuda.stream(self._torch_stream):
            # `CudaOps` has the positions from `begin`.
            decode(self._ops, tokens, Matrix(address["past"], batch, 1), select)

    def close(self) -> None:
        super().close()
        self._ops.close()


def prompt_lengths(most: int) -> list[int]:
    """The lengths of chunks that are graphs, up to `most`."""
    ends = [first for first, _ in _LENGTH_STEPS[1:]] + [most + 1]
    found = [n for (first, step), end in zip(_LENGTH_STEPS, ends) for n in range(first, min(end, most + 1), step)]
    return found if most in found else [*found, most]


def takes_flash(engine: Engine) -> bool:
    """Whether PyTorch's flash kernels attend for the engine: they read from memory where a chunk is."""
    dim = engine.model.head_dim
    return engine.limits.dtype != "float32" and dim % 8 == 0 and dim <= 256


class TorchLibrary:
    """`gpu_ops.Library` by cuBLAS and PyTorch's attention, on PyTorch's current stream.

    For an engine in float32 it switches TF32 off, in the whole process: validation compares with float32.

    `chunk`, for flash attention: the address of int32 words about the chunk, _CHUNK_WORDS for each line: 0, its tokens,
    and the tokens of its sequence with it; then for each number of key/value heads in `heads` the first row of the slot
    in a layer's keys [slots * heads * capacity, head_dim], and the row after a head's last one.
    """

    def __init__(self, engine: Engine, slots: int, chunk: int, heads: list[int]):
        self._dtype = getattr(torch, engine.limits.dtype)
        if self._dtype == torch.float32:
            torch.backends.cuda.matmul.allow_tf32 = False
        self._limits, self._head_dim, self._slots = engine.limits, engine.model.head_dim, slots
        self._views: dict[tuple[int, ...], torch.Tensor] = {}
        self._flash = takes_flash(engine)
        self.chunk = 0, 0  # its past and slot, for other attention
        # Graphs hold addresses of what attention allocates, so nobody else may get them.
        self._pool = torch.cuda.MemPool()
        words = device_tensor(chunk, (len(heads) + 1, _CHUNK_WORDS), torch.int32)
        self._queries_end, self._keys_end = words[0, :2], words[0, 2:3]
        self._keys = {count: words[line + 1, :2] for line, count in enumerate(heads)}

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

    def attend(self, queries: Matrix, cache: int, shard: LayerShard, out: Matrix) -> None:
        shape = queries.rows, shard.num_heads, self._head_dim
        q, to = (self.view(matrix.address, *shape) for matrix in (queries, out))
        if self._flash:
            with torch.cuda.use_mem_pool(self._pool):
                to.copy_(self._flash_attention(q, cache, shard.num_kv_heads))
        else:
            to.copy_(self._plain_attention(q, cache, shard.num_kv_heads))

    def _flash_attention(self, q: torch.Tensor, cache: int, heads: int) -> torch.Tensor:
        length, dim, capacity = len(q), self._head_dim, self._limits.max_seq_len
        every = self.view(cache, 2, self._slots * heads * capacity, dim)
        # Row i of a head comes `capacity` rows after row i of the head before.
        rows = self._slots * heads * capacity - (heads - 1) * capacity
        keys, values = (part.as_strided((rows, heads, dim), (dim, capacity * dim, 1)) for part in every)
        ends = self._queries_end, self._keys[heads], length, capacity
        found, *_ = torch.ops.aten._flash_attention_forward(
            q, keys, values, *ends, 0.0, True, False, seqused_k=self._keys_end
        )
        return found

    def _plain_attention(self, q: torch.Tensor, cache: int, heads: int) -> torch.Tensor:
        # Its import takes as long as all of PyTorch, and most engines never come here.
        from torch.nn.attention.bias import causal_lower_right

        (past, slot), length = self.chunk, len(q)
        shape = 2, self._slots, heads, self._limits.max_seq_len, self._head_dim
        keys, values = self.view(cache, *shape)[:, slot : slot + 1, :, : past + length]
        mask = None if past == 0 else causal_lower_right(length, past + length)
        gqa = q.shape[1] != heads
        q = q.transpose(0, 1)[None]
        found = F.scaled_dot_product_attention(q, keys, values, mask, is_causal=mask is None, enable_gqa=gqa)
        return found[0].transpose(0, 1)


def device_tensor(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Device memory as a tensor that does not own it."""
    # The interface has no bfloat16: bits of the same size.
    kind, bits = ("<i4", torch.int32) if dtype.itemsize == 4 else ("<i2", torch.int16)
    described = {"version": 3, "shape": shape, "typestr": kind, "data": (address, False)}
    memory = SimpleNamespace(__cuda_array_interface__=described)
    return torch.as_tensor(memory, device="cuda", dtype=bits).view(dtype)
