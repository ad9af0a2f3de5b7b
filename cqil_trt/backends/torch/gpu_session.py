"""Backend torch on a GPU: our kernels execute the decoder, and PyTorch's libraries the operations with many rows."""

from __future__ import annotations

from typing import Any

from cqil_trt.backends.torch.gpu_ops import CudaOps, Matrix, reads_cache
from cqil_trt.config import EngineLimits
from cqil_trt.engine import Engine
from cqil_trt.gpu import cuda, kernel_library
from cqil_trt.gpu.session import BUFFERS, CudaSession, Phase, prompt_lengths
from cqil_trt.gpu.weights import DeviceWeights
from cqil_trt.model import ModelConfig
from cqil_trt.network.decoder import decode

# 32-bit words that describe a chunk, and as many for each size of a layer's cache: 16 bytes, as kernels align them.
CHUNK_WORDS = 4


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
        cuda.use_device(device)
        super().__init__(engine, comm, kernel_library.load(), slots)
        model, limits = self._plan.model, engine.limits
        # Key/value heads and positions of the layers' caches.
        self._sizes = sorted(
            {
                (shard.num_kv_heads, limits.cache_length(model.window_of(index)))
                for index, shard in self._plan.layers.items()
                if shard.num_heads
            }
        )
        if takes_flash(engine):
            self._prompt_lengths = prompt_lengths(min(engine.limits.prefill_chunk, engine.limits.max_seq_len))
        self._load(engine, weights)
        # By now, whoever opened the session may have imported PyTorch; until then, nothing needed it.
        from cqil_trt.backends.torch.gpu_library import TorchLibrary

        self._torch_library = TorchLibrary(engine, self.slots, self._memory["chunk"], self._sizes, int(self._stream))
        if any(matrix.packed for matrix in self._quantized.values()):
            self.row_cost = self._PACKED_ROW_COST
        kernels = self._memory, self._workspaces, self._library, int(self._stream)
        self._ops = CudaOps(self._plan, engine.limits, *kernels, self._torch_library, self.slots, self._quantized)
        self._complete()

    def _extra_sizes(self) -> dict[str, int]:
        read = max((heads * length for heads, length in self._sizes if reads_cache(self.limits, length)), default=0)
        return {
            "chunk": 4 * CHUNK_WORDS * (len(self._sizes) + 1),
            "read": 2 * read * self._plan.model.head_dim * self._bytes,
        }

    def _describe_chunk(self, count: int, past: int, slot: int) -> None:
        self._torch_library.chunk = past, slot
        words = [[0, count, 0, 0]]
        for heads, length in self._sizes:
            first = 0 if reads_cache(self.limits, length) else slot * heads * length
            seen = past + count - first_read(self._plan.model, self.limits, length, past)
            words.append([first, first + length, seen, 0])
        self._upload("chunk", words)

    def _execute(self, phase: Phase, batch: int, length: int, rows: int) -> None:
        address = {
            name: self._memory[BUFFERS[phase].get(name, name)]
            for name in ("tokens", "past", "slots", "select", "logits")
        }
        decodes = phase is not Phase.PREFILL
        self._ops.begin(batch, length, address["past"], address["slots"], address["logits"], decodes)
        tokens, select = Matrix(address["tokens"], batch * length, 1), Matrix(address["select"], rows, 1)
        with self._guard(), self._torch_library.executing():
            # `CudaOps` has the positions from `begin`.
            decode(self._ops, tokens, Matrix(address["past"], batch, 1), select)

    def close(self) -> None:
        super().close()
        self._ops.close()


def first_read(model: ModelConfig, limits: EngineLimits, length: int, past: int) -> int:
    """The position of the first key that a library gets, of a cache of that length, for tokens after `past`."""
    circle = length < limits.max_seq_len
    return max(past + 1 - model.sliding_window, 0) if circle and model.sliding_window is not None else 0


def takes_flash(engine: Engine) -> bool:
    """Whether PyTorch's flash kernels attend for the engine: they read from memory where a chunk is."""
    dim = engine.model.head_dim
    return engine.limits.dtype != "float32" and dim % 8 == 0 and dim <= 256
