"""What CudaOps asks of the kernels, without a GPU: host memory, and kernels in PyTorch by the words of cqil_trt.h.

The kernels themselves are judged on GPUs (cuda_kernels_worker.py). This judges the calls: addresses, shapes, flags,
order, and that memory is not used again while its value is needed.
"""

import ctypes

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SEED, make_model, rank_weights
from test_fused_ops import SHAPES, Alone
from test_parity import ARCHITECTURES

from cqil_trt.backends.torch import gpu_ops as cuda_ops
from cqil_trt.backends.torch.gpu_ops import CudaOps, Matrix
from cqil_trt.backends.torch.ops import TorchOps
from cqil_trt.checkpoint import Checkpoint
from cqil_trt.config import CqilConfig, EngineLimits
from cqil_trt.gpu import cuda
from cqil_trt.network.decoder import decode
from cqil_trt.network.rotary import rotary_tables
from cqil_trt.shard import plan

BATCH, CAPACITY = 2, 32


def at(address, *shape, dtype=torch.float32):
    """Host memory as a tensor."""
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.frombuffer((ctypes.c_byte * size).from_address(address), dtype=dtype).view(shape)


def norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class HostKernels:
    """The functions of the C interface that CudaOps calls, float32."""

    def __init__(self):
        self.caches = {}

    def cqil_gather_rows(self, table, indices, out, rows, hidden, dtype, stream):
        found = at(indices, rows, dtype=torch.int32).long()
        at(out, rows, hidden)[:] = at(table, int(found.max()) + 1, hidden)[found]
        return 0

    def cqil_residual_norm(self, delta, residual, weight, total, normed, rows, hidden, eps, dtype, stream):
        x = at(residual, rows, hidden)
        if delta is not None:
            x = x + at(delta, rows, hidden)
            at(total, rows, hidden)[:] = x
        at(normed, rows, hidden)[:] = norm(x, at(weight, hidden), eps)
        return 0

    def cqil_add(self, x, y, out, count, dtype, stream):
        at(out, count)[:] = at(x, count) + at(y, count)
        return 0

    def cqil_swiglu(self, gate_up, out, rows, inner, dtype, stream):
        gate, up = at(gate_up, rows, 2 * inner).chunk(2, -1)
        at(out, rows, inner)[:] = F.silu(gate) * up
        return 0

    def cqil_linear_scratch_bytes(self, shape):
        return 64

    def cqil_linear(self, s, x, delta, weight, bias, norm_weight, residual, out, scratch, stream):
        assert out != x and not (s.gated and residual) and (norm_weight or not delta)
        value, wide = at(x, s.rows, s.inputs), s.outputs * (1 + s.gated)
        if delta is not None:
            value = value + at(delta, s.rows, s.inputs)
        if norm_weight is not None:
            value = norm(value, at(norm_weight, s.inputs), s.eps)
        value = F.linear(value, at(weight, wide, s.inputs), None if bias is None else at(bias, wide))
        if s.gated:
            gate, up = value.chunk(2, -1)
            value = F.silu(gate) * up
        at(out, s.rows, s.outputs)[:] = value if residual is None else value + at(residual, s.rows, s.outputs)
        return 0

    def cqil_attention_scratch_bytes(self, shape):
        return 4 * shape.batch * shape.length * shape.heads * shape.head_dim

    def cqil_attention(self, s, qkv, past, cos, sin, q_norm, k_norm, cache, out, scratch, stream):
        dim, heads = s.head_dim, s.heads + 2 * s.kv_heads
        q, k, v = at(qkv, s.batch, s.length, heads, dim).split([s.heads, s.kv_heads, s.kv_heads], 2)
        if q_norm is not None:
            q, k = norm(q, at(q_norm, dim), s.eps), norm(k, at(k_norm, dim), s.eps)
        pasts = at(past, s.batch, dtype=torch.int32).long()
        where = pasts[:, None] + torch.arange(s.length)
        c, n = (at(table, s.capacity, dim // 2)[where][:, :, None] for table in (cos, sin))

        def rotated(x):
            a, b = x.chunk(2, -1)
            return torch.cat((a * c - b * n, b * c + a * n), -1)

        q = rotated(q)
        keys, values = self.caches.setdefault(cache, torch.zeros(2, s.max_batch, s.capacity, s.kv_heads, dim))
        for b in range(s.batch):
            keys[b, where[b]], values[b, where[b]] = rotated(k)[b], v[b]
        if out is None:
            at(scratch, s.batch, s.length, s.heads, dim)[:] = q
        else:
            self.attend(s, q, where, keys, values, at(out, s.batch, s.length, s.heads, dim))
        return 0

    @staticmethod
    def attend(s, q, where, keys, values, out):
        reads = [(head + s.first) // s.group for head in range(s.heads)]
        for b in range(q.shape[0]):
            seen = torch.arange(keys.shape[1]) <= where[b][:, None]
            scores = torch.einsum("thd,khd->htk", q[b], keys[b][:, reads]) / q.shape[-1] ** 0.5
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            out[b] = torch.einsum("htk,khd->thd", weights, values[b][:, reads])


class HostLibrary:
    """`cuda_ops.Library`."""

    def __init__(self, kernels, model):
        self._kernels, self._model = kernels, model

    def multiply(self, x, weight, added, out):
        value = at(x.address, x.rows, x.width) @ at(weight.address, weight.rows, weight.width).T
        at(out.address, out.rows, out.width)[:] = (
            value if added is None else value + at(added.address, added.rows, added.width)
        )

    def attend(self, queries, cache, past, batch, shard, out):
        dim, length = self._model.head_dim, queries.rows // batch
        shape = batch, length, shard.num_heads, dim
        where = (past + torch.arange(length)).expand(batch, length)
        q, to = at(queries.address, *shape).clone(), at(out.address, *shape)
        size = self._model.group_size
        described = type("Shape", (), {"heads": shard.num_heads, "group": size, "first": shard.first_in_group(size)})
        self._kernels.attend(described, q, where, *self._kernels.caches[cache], to)


class HostWorkspace:
    """A rank without the others, as `Alone`."""

    def __init__(self, rank, eps):
        self._rank, self._eps = rank, eps

    def call(self, name, *arguments):
        getattr(self, name)(*arguments)

    def all_reduce(self, delta, residual, out, count, dtype, stream):
        at(out, count)[:] = at(residual, count) + at(delta, count)

    def all_reduce_residual_norm(self, delta, residual, weight, out, normed, rows, hidden, eps, dtype, stream):
        assert eps == self._eps
        self.all_reduce(delta, residual, out, rows * hidden, dtype, stream)
        at(normed, rows, hidden)[:] = norm(at(out, rows, hidden), at(weight, hidden), eps)

    def broadcast(self, given, out, count, dtype, stream):
        assert (given is None) == (self._rank > 0) and (out is None) == (self._rank == 0)
        if out is not None:
            at(out, count)[:] = torch.linspace(-1, 1, count)

    def bypass(self, x, out, count, distance, dtype, stream):
        if out is not None:
            at(out, count)[:] = 0.5 * at(x, count)


@pytest.fixture
def host_memory(monkeypatch):
    """Memory that is handed out is host memory, full of NaN; returns what keeps it."""
    kept = []

    class HostArena:
        def __init__(self, size, what):
            kept.append(np.full(-(-size // 4), np.nan, np.float32))
            self.address = kept[-1].ctypes.data

    monkeypatch.setattr(cuda, "Arena", HostArena)
    monkeypatch.setattr(
        cuda_ops.cuda, "call", lambda name, address, value, size, stream: ctypes.memset(address, 0, size)
    )
    return kept


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cuda_ops_ask_for_what_the_decoder_means(name, tmp_path, host_memory):
    architecture, changes = ARCHITECTURES[name]
    directory = make_model(tmp_path, architecture, seed=SEED, rms_norm_eps=1e-2, **changes)
    checkpoint = Checkpoint(directory, None)
    model, limits = checkpoint.model, EngineLimits(max_batch_size=BATCH, max_seq_len=CAPACITY)
    for shape in SHAPES:
        for rank in plan(model, CqilConfig(**shape)):
            weights = rank_weights(rank, checkpoint.reader)
            plain = TorchOps(rank, weights, Alone(rank.rank), limits, checkpoint.rotary)

            kernels = HostKernels()
            buffers = {"joined": torch.zeros(BATCH * 16, model.hidden_size)}
            buffers |= dict(
                zip(
                    ("rotary.cos", "rotary.sin"),
                    map(torch.from_numpy, rotary_tables(checkpoint.model, checkpoint.rotary, CAPACITY)),
                )
            )
            buffers |= {f"cache.{index}": torch.zeros(1) for index in rank.layers}
            memory = {key: value.data_ptr() for key, value in (weights | buffers).items()}
            workspace = HostWorkspace(rank.rank, model.rms_norm_eps) if shape["p"] > 1 else None
            ops = CudaOps(rank, limits, memory, workspace, kernels, 0, HostLibrary(kernels, model))
            width = rank.vocabulary[1] - rank.vocabulary[0]
            for new, past in ((7, 0), (3, 7), (1, 10), (1, 11)):
                batch = 1 if past == 11 else BATCH
                tokens = torch.randint(model.vocab_size, (batch, new), dtype=torch.int32)
                pasts, select = torch.full((batch,), past, dtype=torch.int32), torch.full((batch, 1), new - 1)
                expected = decode(plain, tokens.long(), pasts.long(), select)
                rows = (torch.arange(batch) * new + new - 1).to(torch.int32)
                logits = torch.full((batch, width), torch.nan)
                ops.begin(batch, new, pasts.data_ptr(), logits.data_ptr(), past)
                given = Matrix(tokens.data_ptr(), batch * new, 1), None, Matrix(rows.data_ptr(), batch, 1)
                decode(ops, *given)
                if rank.schedule.predicts:
                    torch.testing.assert_close(logits, expected[:, 0], rtol=1e-4, atol=1e-5)
                if rank.schedule.all_reduces:
                    joined = buffers["joined"].view(-1)[: plain.joined.numel()].view_as(plain.joined)
                    torch.testing.assert_close(joined, plain.joined, rtol=1e-4, atol=1e-5)
            # What a pass needed, the next of its shape finds.
            before = len(host_memory)
            ops.begin(1, 1, pasts.data_ptr(), logits.data_ptr(), 11)
            decode(ops, *given)
            assert len(host_memory) == before
