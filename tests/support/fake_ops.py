"""One rank without the others, and the CUDA kernels' functions in PyTorch on host memory."""

import ctypes

import numpy as np
import torch
import torch.nn.functional as F

from cqil_trt.collectives import LocalCommunicator
from cqil_trt.gpu import abi
from cqil_trt.schedule import Peers


class Alone(LocalCommunicator):
    """One rank of several, without the others: a sum that has but its own part is as good a check."""

    def __init__(self, rank):
        self.rank = rank

    @classmethod
    def of(cls, schedule):
        """One for each kind of peers, with the rank's place among them."""
        return {kind: cls(schedule.peers(kind).index(schedule.rank)) for kind in Peers}

    def broadcast(self, x):
        return x if self.rank == 0 else torch.linspace(-1, 1, x.numel()).view_as(x)

    def bypass(self, x, d):
        return 0.5 * x if self.rank else None


def at(address, *shape, dtype=torch.float32):
    """Host memory as a tensor."""
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.frombuffer((ctypes.c_byte * size).from_address(address), dtype=dtype).view(shape)


def norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class HostKernels:
    """The functions of the C interface that CudaOps calls, float32. `packed`: what packed weights are, by address."""

    def __init__(self):
        self.caches, self.packed = {}, {}

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

    def cqil_linear_rows(self, dtype):
        return 1

    def cqil_linear_scratch_bytes(self, shape):
        return 64

    def cqil_packed_rows(self):
        return 4

    def cqil_unpack(self, s, packed, out, stream):
        assert s.weights == abi.cqil_weights.CQIL_INT4 and s.group == 64
        at(out, s.outputs * (1 + s.gated), s.inputs)[:] = self.packed[packed]
        return 0

    def cqil_linear(self, s, x, delta, weight, bias, norm_weight, residual, out, total, scratch, stream):
        assert (residual or not total) and out != x and not (s.gated and residual) and (norm_weight or not delta)
        value, wide = at(x, s.rows, s.inputs), s.outputs * (1 + s.gated)
        if delta is not None:
            value = value + at(delta, s.rows, s.inputs)
        if norm_weight is not None:
            value = norm(value, at(norm_weight, s.inputs), s.eps)
        assert (weight in self.packed) == (s.weights != abi.cqil_weights.CQIL_DENSE) and s.rows <= 4
        matrix = self.packed[weight] if s.weights else at(weight, wide, s.inputs)
        value = F.linear(value, matrix, None if bias is None else at(bias, wide))
        if s.gated:
            gate, up = value.chunk(2, -1)
            value = F.silu(gate) * up
        added = 0 if residual is None else at(residual, s.rows, s.outputs)
        if total is None:
            value = value + added
        else:
            at(total, s.rows, s.outputs)[:] = value + added
        at(out, s.rows, s.outputs)[:] = value
        return 0

    def cqil_attention_scratch_bytes(self, shape):
        return 4 * shape.batch * shape.length * shape.heads * shape.head_dim

    def cqil_attention(self, s, qkv, past, slots, cos, sin, q_norm, k_norm, cache, out, scratch, stream):
        dim, heads = s.head_dim, s.heads + 2 * s.kv_heads
        q, k, v = at(qkv, s.batch, s.length, heads, dim).split([s.heads, s.kv_heads, s.kv_heads], 2)
        if q_norm is not None:
            q, k = norm(q, at(q_norm, dim), s.eps), norm(k, at(k_norm, dim), s.eps)
        each = s.length if s.drafts else 1  # entries of a sequence, of which the first counts
        pasts, rows = (at(entries, s.batch, each, dtype=torch.int32)[:, 0].long() for entries in (past, slots))
        where = pasts[:, None] + torch.arange(s.length)
        c, n = (at(table, s.capacity, dim // 2)[where][:, :, None] for table in (cos, sin))

        def rotated(x):
            a, b = x.chunk(2, -1)
            return torch.cat((a * c - b * n, b * c + a * n), -1)

        q = rotated(q)
        keys, values = self.caches.setdefault(cache, torch.zeros(2, s.max_batch, s.capacity, s.kv_heads, dim))
        for b in range(s.batch):
            keys[rows[b], where[b]], values[rows[b], where[b]] = rotated(k)[b], v[b]
        if out is None:
            at(scratch, s.batch, s.length, s.heads, dim)[:] = q
        else:
            self.attend(s, q, where, keys[rows], values[rows], at(out, s.batch, s.length, s.heads, dim))
        return 0

    @staticmethod
    def attend(s, q, where, keys, values, out):
        reads = [(head + s.first) // s.group for head in range(s.heads)]
        for b in range(q.shape[0]):
            seen = torch.arange(keys.shape[1]) <= where[b][:, None]
            scores = torch.einsum("thd,khd->htk", q[b], keys[b][:, reads]) / q.shape[-1] ** 0.5
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            out[b] = torch.einsum("htk,khd->thd", weights, values[b][:, reads])
