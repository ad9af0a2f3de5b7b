"""One rank without the others, and the CUDA kernels' functions in PyTorch on host memory."""

import ctypes
from functools import partial

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


def norm(x, weight, eps, kind=0, mean=None):
    """An RMSNorm; `kind`: a cqil_norm. `mean`: of the squares, if it is not that of x."""
    mean = x.square().mean(-1, keepdim=True) if mean is None else mean
    return x * torch.rsqrt(mean + eps) * (weight + 1 if kind == abi.cqil_norm.CQIL_NORM_OFFSET else weight)


def gate(gate_up, gating):
    """What a cqil_gating makes of gate and up."""
    gate, up = gate_up.chunk(2, -1)
    kinds = abi.cqil_gating
    act = {kinds.CQIL_SWIGLU: F.silu, kinds.CQIL_GEGLU: partial(F.gelu, approximate="tanh")}[gating]
    return act(gate) * up


def capped(x, cap):
    return cap * torch.tanh(x / cap) if cap else x


class HostKernels:
    """The functions of the C interface that CudaOps calls, float32. `packed`: what packed weights are, by address."""

    def __init__(self):
        self.caches, self.packed = {}, {}

    def cqil_gather_rows(self, table, indices, out, rows, hidden, dtype, stream):
        found = at(indices, rows, dtype=torch.int32).long()
        at(out, rows, hidden)[:] = at(table, int(found.max()) + 1, hidden)[found]
        return 0

    def cqil_residual_norm(
        self, delta, delta_norm, residual, weight, total, normed, rows, hidden, eps, kind, dtype, stream
    ):
        x = torch.zeros(rows, hidden) if residual is None else at(residual, rows, hidden)
        if delta is not None:
            added = at(delta, rows, hidden)
            x = x + (added if delta_norm is None else norm(added, at(delta_norm, hidden), eps, kind))
            at(total, rows, hidden)[:] = x
        assert delta_norm is not None or (residual is not None and weight is not None)
        if weight is not None:
            at(normed, rows, hidden)[:] = norm(x, at(weight, hidden), eps, kind)
        return 0

    def cqil_add(self, x, y, out, count, dtype, stream):
        at(out, count)[:] = at(x, count) + at(y, count)
        return 0

    def cqil_scale(self, x, out, count, factor, cap, dtype, stream):
        at(out, count)[:] = capped(at(x, count) * factor, cap)
        return 0

    def cqil_head_squares(
        self, qkv, out, rows, heads, kv_heads, dim, first, last, query_factor, key_factor, dtype, stream
    ):
        if not heads:
            at(out, rows, 2)[:] = 0
            return 0
        squares = at(qkv, rows, heads + 2 * kv_heads, dim).square()
        at(out, rows, 2)[:, 0] = squares[:, :heads].sum((1, 2)) * query_factor
        at(out, rows, 2)[:, 1] = squares[:, heads + first : heads + last].sum((1, 2)) * key_factor
        return 0

    def cqil_linear_scratch_bytes(self, shape):
        return 64

    def cqil_packed_rows(self):
        return 4

    def cqil_unpack(self, s, packed, out, stream):
        assert s.weights == abi.cqil_weights.CQIL_INT4 and s.group == 64
        at(out, s.outputs * (1 + bool(s.gated)), s.inputs)[:] = self.packed[packed]
        return 0

    def cqil_linear(self, s, x, delta, weight, bias, norm_weight, residual, out, total, scratch, stream):
        assert (residual or not total) and out != x and not (s.gated and residual) and (norm_weight or not delta)
        value, wide = at(x, s.rows, s.inputs), s.outputs * (1 + bool(s.gated))
        if delta is not None:
            value = value + at(delta, s.rows, s.inputs)
        if norm_weight is not None:
            value = norm(value, at(norm_weight, s.inputs), s.eps)
        packed = s.weights != abi.cqil_weights.CQIL_DENSE
        assert (weight in self.packed) == packed and (s.rows <= 4 or not packed)
        matrix = self.packed[weight] if s.weights else at(weight, wide, s.inputs)
        value = F.linear(value, matrix, None if bias is None else at(bias, wide))
        assert not (s.gated and s.scale)
        value = gate(value, s.gated) if s.gated else value * (s.scale or 1)
        added = 0 if residual is None else at(residual, s.rows, s.outputs)
        if total is None:
            value = value + added
        else:
            at(total, s.rows, s.outputs)[:] = value + added
        at(out, s.rows, s.outputs)[:] = value
        return 0

    def cqil_attention_scratch_bytes(self, shape):
        return 4 * shape.batch * shape.length * shape.heads * shape.head_dim

    def cqil_attention(self, s, qkv, past, slots, cos, sin, q_norm, k_norm, squares, cache, out, scratch, stream):
        dim, heads = s.head_dim, s.heads + 2 * s.kv_heads
        q, k, v = at(qkv, s.batch, s.length, heads, dim).split([s.heads, s.kv_heads, s.kv_heads], 2)
        if squares is not None:
            means = at(squares, s.batch, s.length, 2)[..., None, None].unbind(2)
            q, k = (
                norm(x, at(weight, x.shape[2], dim), s.eps, s.norm, mean)
                for x, weight, mean in zip((q, k), (q_norm, k_norm), means)
            )
        elif q_norm is not None:
            q, k = norm(q, at(q_norm, dim), s.eps, s.norm), norm(k, at(k_norm, dim), s.eps, s.norm)
        each = s.length if s.drafts else 1  # entries of a sequence, of which the first counts
        pasts, rows = (at(entries, s.batch, each, dtype=torch.int32)[:, 0].long() for entries in (past, slots))
        where = pasts[:, None] + torch.arange(s.length)
        inside = where < s.positions  # what is beyond is not appended, and means nothing
        half = (s.rotary or dim) // 2

        def rotated(x):
            if cos is None:
                return x
            c, n = (at(table, s.positions, half)[where * inside][:, :, None] for table in (cos, sin))
            a, b, rest = x.split([half, half, dim - 2 * half], -1)
            return torch.cat((a * c - b * n, b * c + a * n, rest), -1)

        q = rotated(q)
        cached = self.caches.setdefault(cache, torch.zeros(2, s.max_batch, s.capacity, s.kv_heads, dim))
        assert s.positions == s.capacity or (s.capacity % 64 == 0 and s.capacity >= s.window + s.length - 1)
        for b in range(s.batch):
            at_row = rows[b], where[b][inside[b]] % s.capacity
            cached[0][at_row], cached[1][at_row] = rotated(k)[b][inside[b]], v[b][inside[b]]
        keys, values = (torch.stack([self.in_order(s, *pair) for pair in zip(part[rows], where)]) for part in cached)
        self.attend(s, q, where, keys, values, at(out, s.batch, s.length, s.heads, dim))
        return 0

    @staticmethod
    def in_order(s, kept, where):
        """What a cache keeps of a sequence by position, NaN where it was overwritten."""
        found = torch.full((s.positions, *kept.shape[1:]), torch.nan)
        last = min(int(where[-1]), s.positions - 1)
        every = torch.arange(max(0, last + 1 - s.capacity), last + 1)
        found[every] = kept[every % s.capacity]
        return found

    @staticmethod
    def attend(s, q, where, keys, values, out):
        reads = [(head + s.first) // s.group for head in range(s.heads)]
        for b in range(q.shape[0]):
            index = torch.arange(keys.shape[1])
            seen = index <= where[b][:, None]
            if s.window:
                seen &= index > where[b][:, None] - s.window
            scores = torch.einsum("thd,khd->htk", q[b], keys[b][:, reads]) * (s.scale or q.shape[-1] ** -0.5)
            scores = capped(scores, s.cap)
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            seen = seen.any(0)  # what was overwritten, or was not written, is NaN
            out[b] = torch.einsum("htk,khd->thd", weights[..., seen], values[b][seen][:, reads])
