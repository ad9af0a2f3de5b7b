"""What CudaOps asks of the kernels, without a GPU: host memory, and kernels in PyTorch by the words of cqil_trt.h.

The kernels themselves are judged on GPUs (test_kernels.py). This judges the calls: addresses, shapes, flags,
order, and that memory is not used again while its value is needed.
"""

import ctypes

import numpy as np
import pytest
import torch
from support import SEED
from support.cases import ARCHITECTURES, RANK_SHAPES
from support.checkpoints import make_model, rank_weights
from support.fake_ops import Alone, HostKernels, at, norm

from cqil_trt.backends.torch import gpu_ops
from cqil_trt.backends.torch.gpu_ops import CudaOps, Matrix
from cqil_trt.backends.torch.gpu_session import prompt_lengths
from cqil_trt.backends.torch.ops import TorchOps
from cqil_trt.checkpoint import Checkpoint
from cqil_trt.config import CqilConfig, EngineLimits
from cqil_trt.gpu import cuda
from cqil_trt.network.decoder import decode
from cqil_trt.network.rotary import rotary_tables
from cqil_trt.shard import plan

BATCH, CAPACITY = 2, 32


class HostLibrary:
    """`gpu_ops.Library`. `chunk`: past and slot of the next one."""

    def __init__(self, kernels, model):
        self._kernels, self._model = kernels, model
        self.chunk = 0, 0

    def multiply(self, x, weight, added, out):
        value = at(x.address, x.rows, x.width) @ at(weight.address, weight.rows, weight.width).T
        at(out.address, out.rows, out.width)[:] = (
            value if added is None else value + at(added.address, added.rows, added.width)
        )

    def attend(self, queries, cache, shard, out):
        past, slot = self.chunk
        dim, length = self._model.head_dim, queries.rows
        shape = 1, length, shard.num_heads, dim
        where = (past + torch.arange(length))[None]
        q, to = at(queries.address, *shape).clone(), at(out.address, *shape)
        size = self._model.group_size
        described = type("Shape", (), {"heads": shard.num_heads, "group": size, "first": shard.first_in_group(size)})
        keys, values = self._kernels.caches[cache][:, slot : slot + 1]
        self._kernels.attend(described, q, where, keys, values, to)


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
        gpu_ops.cuda, "call", lambda name, address, value, size, stream: ctypes.memset(address, 0, size)
    )
    return kept


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cuda_ops_ask_for_what_the_decoder_means(name, tmp_path, host_memory):
    architecture, changes = ARCHITECTURES[name]
    directory = make_model(tmp_path, architecture, seed=SEED, rms_norm_eps=1e-2, **changes)
    checkpoint = Checkpoint(directory, None)
    model, limits = checkpoint.model, EngineLimits(max_batch_size=BATCH, max_seq_len=CAPACITY)
    for shape in RANK_SHAPES:
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
            library = HostLibrary(kernels, model)
            ops = CudaOps(rank, limits, memory, workspace, kernels, 0, library, BATCH)
            width = rank.vocabulary[1] - rank.vocabulary[0]
            # Prompts one at a time, in slots that are not in order, then both sequences, then one of them.
            prompts = [(new, past, (slot,)) for new, past in ((7, 0), (3, 7)) for slot in (1, 0)]
            for new, past, places in (*prompts, (1, 10, (1, 0)), (1, 11, (1,))):
                batch = len(places)
                tokens = torch.randint(model.vocab_size, (batch, new), dtype=torch.int32)
                pasts, select = torch.full((batch,), past, dtype=torch.int32), torch.full((batch, 1), new - 1)
                plain.begin(places, None)
                expected = decode(plain, tokens.long(), pasts.long(), select)
                rows = (torch.arange(batch) * new + new - 1).to(torch.int32)
                logits, slots = torch.full((batch, width), torch.nan), torch.tensor(places, dtype=torch.int32)
                addresses = (t.data_ptr() for t in (pasts, slots, logits))
                library.chunk = past, places[0]
                ops.begin(batch, new, *addresses)
                given = Matrix(tokens.data_ptr(), batch * new, 1), None, Matrix(rows.data_ptr(), batch, 1)
                decode(ops, *given)
                if rank.schedule.predicts:
                    torch.testing.assert_close(logits, expected[:, 0], rtol=1e-4, atol=1e-5)
                if rank.schedule.all_reduces:
                    joined = buffers["joined"].view(-1)[: plain.joined.numel()].view_as(plain.joined)
                    torch.testing.assert_close(joined, plain.joined, rtol=1e-4, atol=1e-5)
            # What a pass needed, the next of its shape finds.
            before = len(host_memory)
            ops.begin(1, 1, *(t.data_ptr() for t in (pasts, slots, logits)))
            decode(ops, *given)
            assert len(host_memory) == before


@pytest.mark.parametrize("most", [1, 8, 16, 17, 64, 100, 128, 500, 1024, 2048, 5000])
def test_lengths_of_chunks_that_are_graphs(most):
    lengths = prompt_lengths(most)
    assert lengths == sorted(set(lengths)) and lengths[-1] == most
    for count in range(1, most + 1):
        full = next(length for length in lengths if length >= count)
        assert full - count < max(16, count / 2), "too much would be computed in vain"
