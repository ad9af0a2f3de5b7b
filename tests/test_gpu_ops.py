"""What CudaOps asks of the kernels, without a GPU: host memory, and kernels in PyTorch by the words of cqil_trt.h.

The kernels themselves are judged on GPUs (test_kernels.py). This judges the calls: addresses, shapes, flags,
order, and that memory is not used again while its value is needed.
"""

import ctypes
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import SEED
from support.cases import ARCHITECTURES, GPU_FAMILIES, assert_close, rank_shapes
from support.checkpoints import make_model, rank_weights
from support.fake_ops import Alone, HostKernels, at, norm

from cqil_trt.backends.torch import gpu_ops
from cqil_trt.backends.torch.gpu_ops import CudaOps, Matrix
from cqil_trt.backends.torch.ops import TorchOps
from cqil_trt.checkpoint import Checkpoint
from cqil_trt.config import CqilConfig, EngineLimits
from cqil_trt.errors import JobError
from cqil_trt.gpu import abi, cuda
from cqil_trt.gpu.fused_ops import rotary_names
from cqil_trt.gpu.packed import DeviceMatrix, quantized_matrices
from cqil_trt.gpu.session import prompt_lengths
from cqil_trt.network.decoder import decode
from cqil_trt.network.rotary import rotary_tables
from cqil_trt.schedule import Peers
from cqil_trt.shard import plan

BATCH, CAPACITY, CIRCLE = 2, 32, 64


class HostWorkspace:
    """A rank without the others, as `Alone`."""

    def __init__(self, rank, eps):
        self._rank, self._eps = rank, eps

    def call(self, name, *arguments):
        getattr(self, name)(*arguments)

    def all_reduce(self, delta, residual, out, count, dtype, stream):
        at(out, count)[:] = at(delta, count) + (0 if residual is None else at(residual, count))

    def all_reduce_residual_norm(self, delta, residual, weight, out, normed, rows, hidden, eps, dtype, stream):
        assert eps == self._eps
        self.all_reduce(delta, residual, out, rows * hidden, dtype, stream)
        at(normed, rows, hidden)[:] = norm(at(out, rows, hidden), at(weight, hidden), eps)

    def all_reduce_norms(self, delta, before, residual, weight, out, normed, rows, hidden, eps, kind, dtype, stream):
        assert eps == self._eps and (weight is None) == (normed is None)
        added = at(delta, rows, hidden)
        added = added if before is None else norm(added, at(before, hidden), eps, kind)
        at(out, rows, hidden)[:] = at(residual, rows, hidden) + added
        if weight is not None:
            at(normed, rows, hidden)[:] = norm(at(out, rows, hidden), at(weight, hidden), eps, kind)

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


def pack(weights, kernels):
    """As if the projections were quantized: what CudaOps is told of them, and nothing at their addresses."""
    quantized = {}
    for name in [
        name
        for name in weights
        if name.endswith(("qkv.weight", "o.weight", "gate_up.weight", "down.weight", "lm_head.weight"))
    ]:
        matrix, weights[name] = weights[name], torch.full((1,), torch.nan)
        kernels.packed[weights[name].data_ptr()] = matrix
        quantized[name.removesuffix(".weight")] = DeviceMatrix(
            parts=(name, f"{name}.scale"),
            rows=len(matrix),
            inputs=matrix.shape[1],
            gated="gate_up" in name,
            kind=int(abi.cqil_weights.CQIL_INT4),
            size=192,
            first=0,
            group=64,
            packed=True,
            dtype="float32",
        )
    return quantized


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, *GPU_FAMILIES])
def test_cuda_ops_ask_for_what_the_decoder_means(name, packed, tmp_path, host_memory):
    architecture, changes = {**ARCHITECTURES, **GPU_FAMILIES}[name]
    directory = make_model(tmp_path, architecture, seed=SEED, rms_norm_eps=1e-2, **changes)
    checkpoint = Checkpoint(directory, None)
    model, limits = checkpoint.model, EngineLimits(max_batch_size=BATCH, max_seq_len=CAPACITY)
    for shape in rank_shapes(checkpoint.model):
        for rank in plan(model, CqilConfig(**shape)):
            weights = rank_weights(rank, checkpoint.reader)
            plain = TorchOps(rank, weights, Alone.of(rank.schedule), limits, checkpoint.rotary)

            kernels = HostKernels()
            quantized = pack(weights := dict(weights), kernels) if packed else None
            buffers = {"joined": torch.zeros(BATCH * 16, model.hidden_size)}
            for which in range(len(model.ropes)):
                tables = rotary_tables(model, checkpoint.rotary, CAPACITY, which)
                buffers |= zip(rotary_names(which), map(torch.from_numpy, tables))
            buffers |= {f"cache.{index}": torch.zeros(1) for index in rank.layers}
            if packed:
                buffers["dense"] = torch.empty(max(matrix.numel() for matrix in kernels.packed.values()))
            memory = {key: value.data_ptr() for key, value in (weights | buffers).items()}
            places = {kind: rank.schedule.peers(kind).index(rank.rank) for kind in Peers}
            workspaces = {kind: HostWorkspace(place, model.rms_norm_eps) for kind, place in places.items()}
            ops = CudaOps(rank, limits, memory, workspaces, kernels, 0, BATCH, quantized)
            width = rank.vocabulary[1] - rank.vocabulary[0]
            # Prompts one at a time, in slots that are not in order, then both sequences, then one of them, then both
            # with drafts, which is a step that predicts from all tokens.
            prompts = [(new, past, (slot,)) for new, past in ((7, 0), (3, 7)) for slot in (1, 0)]
            for new, past, places in (*prompts, (1, 10, (1, 0)), (1, 11, (1,)), (3, 11, (1, 0))):
                batch, drafts = len(places), past >= 10 and new > 1
                tokens = torch.randint(model.vocab_size, (batch, new), dtype=torch.int32)
                pasts, select = torch.full((batch,), past, dtype=torch.int32), torch.full((batch, 1), new - 1)
                if drafts:
                    select = torch.arange(new).repeat(batch, 1)
                plain.begin(places, None)
                expected = decode(plain, tokens.long(), pasts.long(), select)
                rows = (torch.arange(batch)[:, None] * new + select).flatten().to(torch.int32)
                logits, slots = torch.full((rows.numel(), width), torch.nan), torch.tensor(places, dtype=torch.int32)
                if drafts:
                    pasts, slots = (pasts[:, None] + torch.arange(new)).int(), slots.repeat_interleave(new)
                addresses = (t.data_ptr() for t in (pasts, slots, logits))
                ops.begin(batch, new, *addresses, decodes=past >= 10)
                given = Matrix(tokens.data_ptr(), batch * new, 1), None, Matrix(rows.data_ptr(), rows.numel(), 1)
                decode(ops, *given)
                if rank.schedule.predicts:
                    assert_close(name, logits.view_as(expected), expected)
                if rank.schedule.all_reduces and not model.post_norms:  # else the stream itself, which is not kept here
                    joined = buffers["joined"].view(-1)[: plain.joined.numel()].view_as(plain.joined)
                    assert_close(name, joined, plain.joined)
            # What a pass needed, the next of its shape finds.
            before = len(host_memory)
            ops.begin(2, 3, *(t.data_ptr() for t in (pasts, slots, logits)), decodes=True)
            decode(ops, *given)
            assert len(host_memory) == before


@pytest.mark.parametrize("name", ["gemma2", "mistral-windows", "olmo3"])
def test_cuda_ops_go_round_a_circle(name, tmp_path, host_memory):
    """Chunks of prompts, single tokens and drafts, to the last position."""
    architecture, changes = GPU_FAMILIES[name]
    checkpoint = Checkpoint(make_model(tmp_path, architecture, seed=SEED, rms_norm_eps=1e-2, **changes), None)
    model, length = checkpoint.model, 200
    whole = EngineLimits(max_batch_size=BATCH, max_seq_len=length)
    limits = replace(whole, circle=CIRCLE)
    for shape in ({"p": 1}, {"p": 2, "placement": "tensor"}):
        rank = plan(model, CqilConfig(**shape))[-1]
        weights = rank_weights(rank, checkpoint.reader)
        plain = TorchOps(rank, weights, Alone.of(rank.schedule), whole, checkpoint.rotary)
        kernels, buffers = HostKernels(), {"joined": torch.zeros(BATCH * 64, model.hidden_size)}
        for which in range(len(model.ropes)):
            tables = rotary_tables(model, checkpoint.rotary, length, which)
            buffers |= zip(rotary_names(which), map(torch.from_numpy, tables))
        buffers |= {f"cache.{index}": torch.zeros(1) for index in rank.layers}
        memory = {key: value.data_ptr() for key, value in (weights | buffers).items()}
        place = rank.schedule.peers(Peers.ALL).index(rank.rank)
        workspaces = dict.fromkeys(Peers, HostWorkspace(place, model.rms_norm_eps))
        ops = CudaOps(rank, limits, memory, workspaces, kernels, 0, BATCH)
        past = 0
        for new in (7, 40, 40, -1, -5, 40, 40, -16, 10, -1):
            new, drafts = abs(new), new < 0
            tokens = torch.randint(model.vocab_size, (1, new), dtype=torch.int32)
            pasts, select = torch.tensor([past], dtype=torch.int32), torch.arange(new)[None]
            plain.begin((1,), None)
            expected = decode(plain, tokens.long(), pasts.long(), select)
            slots = torch.ones(new if drafts else 1, dtype=torch.int32)
            if drafts:
                pasts = (pasts + torch.arange(new)).int()
            rows = torch.arange(new, dtype=torch.int32)
            logits = torch.full(expected.shape, torch.nan)
            ops.begin(1, new, *(t.data_ptr() for t in (pasts, slots, logits)), decodes=drafts)
            decode(ops, Matrix(tokens.data_ptr(), new, 1), None, Matrix(rows.data_ptr(), new, 1))
            assert_close(name, logits, expected)
            past += new
        assert past == length


class Attending:
    """The kernels of attention; `shape` is the last one that was asked for."""

    def cqil_attention_scratch_bytes(self, shape):
        return 64

    def cqil_attention(self, shape, *arguments):
        self.shape = shape
        return 0


def test_attention_is_told_that_a_cache_is_in_fp8(tmp_path, host_memory):
    model = Checkpoint(make_model(tmp_path), tokenizer=False).model
    scales = tuple((0.5 + i, 2.5 + i) for i in range(model.num_layers))
    limits = EngineLimits(max_batch_size=BATCH, max_seq_len=CAPACITY, kv_dtype="fp8", kv_scales=scales)
    [rank], kernels = plan(model, CqilConfig(p=1)), Attending()
    memory = dict.fromkeys(rank.shapes, 1) | {"rotary.cos": 2, "rotary.sin": 3, "cache.3": 40}
    ops = CudaOps(rank, limits, memory, {}, kernels, 60, BATCH)
    for length, drafts in ((7, False), (1, False), (3, True)):
        ops.begin(1, length, 10, 20, 30, decodes=drafts)
        ops.attention(Matrix(70, length, 80), None, rank.layers[3])
        shape = kernels.shape
        assert (shape.length, shape.drafts) == (length, drafts)
        assert (shape.cache, shape.key_scale, shape.value_scale) == (abi.cqil_cache.CQIL_CACHE_FP8, 3.5, 5.5)


def test_without_memory_for_activations_the_job_ends_in_one_line(monkeypatch):
    def refuse(name, size):
        raise cuda.CudaError("cudaMalloc: out of memory")

    monkeypatch.setattr(cuda, "call", refuse)
    with pytest.raises(JobError, match=r"^no GPU memory for activations \(0.00 GB\).*smaller --prefill-chunk"):
        gpu_ops.Pool().take(1000)


def test_a_recording_that_fails_says_why(monkeypatch):
    def call(name, *arguments):
        if name == "StreamEndCapture":
            raise cuda.CudaError("cudaStreamEndCapture: operation failed due to a previous error during capture")

    monkeypatch.setattr(cuda, "call", call)
    with pytest.raises(JobError, match="^the first error$"):
        cuda.Graph(1, lambda: (_ for _ in ()).throw(JobError("the first error")))


@pytest.mark.parametrize("most", [1, 8, 16, 17, 64, 100, 128, 500, 1024, 2048, 5000])
def test_lengths_of_chunks_that_are_graphs(most):
    lengths = prompt_lengths(most)
    assert lengths == sorted(set(lengths)) and lengths[-1] == most
    for count in range(1, most + 1):
        full = next(length for length in lengths if length >= count)
        assert full - count < max(16, count / 2), "too much would be computed in vain"


class Loader:
    """The kernels' library while an engine is loaded: `calls` has what was asked."""

    def __init__(self, rows):
        self._rows, self.calls = rows, []

    def cqil_packed_rows(self):
        return self._rows

    def cqil_packed_bytes(self, shape):
        return 1000

    def cqil_pack(self, *arguments):
        self.calls.append(("pack", *arguments))
        return 0

    def cqil_dequantize(self, *arguments):
        self.calls.append(("dequantize", *arguments))
        return 0


def test_quantized_matrices_are_packed_where_kernels_take_them(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "head_dim": 32}
    model = Checkpoint(make_model(tmp_path, **sizes), tokenizer=False).model

    def groups(p, rank, stored="int4", dtype="float16", rows=32):
        [*ranks] = plan(model, CqilConfig(p=p, placement="tensor"), dtype, stored)
        found = quantized_matrices(ranks[rank], Loader(rows))
        of = {name.removeprefix("layers.0."): m for name, m in found.items() if name.startswith("layers.0.")}
        return {name: matrix.shape().group if matrix.packed else None for name, matrix in of.items()}

    assert groups(1, 0) == {"qkv": 128, "o": 128, "gate_up": 128, "down": 128}
    # The second half of 704 columns begins 96 columns into a group.
    assert groups(2, 1) == {"qkv": 128, "o": 128, "gate_up": 128, "down": 32}
    # A third of them is 235 columns; a third of the heads begins in the middle of a group.
    assert groups(3, 1) == {"qkv": 128, "o": 64, "gate_up": 128, "down": None}
    assert groups(2, 1, "int4g32") == {"qkv": 32, "o": 32, "gate_up": 32, "down": 32}
    assert groups(2, 1, "int4g48")["down"] is None
    assert set(groups(2, 1, "int8").values()) == {0}
    assert set(groups(1, 0, dtype="float32").values()) == {None}
    assert set(groups(1, 0, rows=0).values()) == {None}  # the GPU is too old
    assert quantized_matrices(plan(model, CqilConfig(p=1), "float16")[0], None) == {}


def test_quantized_matrices_are_made_from_what_the_engine_stores(tmp_path):
    model = Checkpoint(make_model(tmp_path), tokenizer=False).model
    kinds = abi.cqil_weights
    for stored, kind, zeros in (("int4g16", kinds.CQIL_INT4, 30), ("fp8", kinds.CQIL_FP8, None)):
        rank = plan(model, CqilConfig(p=2, placement="tensor"), "bfloat16", stored)[1]
        for name, parts in (("gate_up", (88, 48)), ("down", (48, 44))):
            loader = Loader(32)
            matrix = quantized_matrices(rank, loader)[f"layers.0.{name}"]
            assert (matrix.rows, matrix.inputs) == parts
            addresses = dict(zip(matrix.parts, (10, 20, 30)))
            matrix.load(loader, addresses, 40, 50)
            [(call, shape, *arguments)] = loader.calls
            first = 44 % 16 if name == "down" and zeros else 0
            assert arguments == [10, 20, zeros, 16 if zeros else 0, first, 40, 50]
            assert (shape.weights, shape.dtype, shape.inputs) == (kind, abi.dtype_code("bfloat16"), parts[1])
            assert (shape.outputs, shape.gated) == ((44, 1) if name == "gate_up" else (48, 0))
            # 44 columns, and groups of 16, are not packed.
            assert call == ("pack" if not zeros and name == "gate_up" else "dequantize")
            assert matrix.nbytes(loader) == (1000 if matrix.packed else 2 * parts[0] * parts[1])
