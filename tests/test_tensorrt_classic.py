"""The classic TensorRT lowering without TensorRT: each layer is computed as it is added, plugins by the words of
plugins/tensorrt_plugins.cpp. (The engines themselves need a GPU: test_tensorrt_gpu.py.)"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import SEED
from support.cases import ARCHITECTURES, GPU_FAMILIES, assert_close, rank_shapes
from support.checkpoints import make_model, rank_weights
from support.fake_ops import Alone, HostKernels, capped, gate, norm
from support.needs import need

from cqil_trt.backends.tensorrt.network import Lowering, define_network
from cqil_trt.backends.torch.ops import TorchOps
from cqil_trt.checkpoint import Checkpoint
from cqil_trt.config import CqilConfig, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.gpu.fused_ops import rotary_names
from cqil_trt.network.decoder import decode
from cqil_trt.network.rotary import rotary_tables
from cqil_trt.schedule import Peers
from cqil_trt.shard import plan

BATCH, CAPACITY = 2, 32
LOWERING = Lowering(native=False, typed=False, plugins=True, nccl=False)


class Tensor:
    def __init__(self, name, value, dtype):
        self.name, self.value, self.dtype, self.shape = name, value, dtype, tuple(value.shape)


class Layer:
    """A plugin with its outputs, or the identity of a rank with nothing to do: classic networks have nothing else."""

    def __init__(self, network, *values):
        self._outputs = [Tensor(f"layer {network.count()}.{i}", value, "float32") for i, value in enumerate(values)]

    def get_output(self, index):
        return self._outputs[index]


class Network:
    """INetworkDefinition, as far as the classic lowering uses it. `given`: the value of every input, by name.

    `packed`: what packed weights are, by name.
    """

    def __init__(self, given, caches, rank, packed=()):
        self._given, self._caches, self._rank, self._packed = given, caches, rank, dict(packed)
        self.taken = set()
        self._count, self.outputs, self.plugins = 0, {}, []

    def count(self):
        self._count += 1
        return self._count

    def add_input(self, name, dtype, shape):
        pointed = name.startswith(("workspace", "cache.")) or (name in self._packed and dtype == "int32")
        value = torch.tensor([-1]) if pointed else self._given[name]
        assert len(shape) == value.dim() and all(s in (-1, n) for s, n in zip(shape, value.shape)), (name, shape)
        return Tensor(name, value, dtype)

    def mark_output(self, tensor):
        self.outputs[tensor.name] = tensor.value

    def add_identity(self, x):
        return Layer(self, x.value)

    def add_plugin_v2(self, inputs, plugin):
        name, fields = plugin
        self.plugins.append(name)
        values = getattr(self, name)(SimpleNamespace(**fields), [tensor.value for tensor in inputs], inputs)
        return Layer(self, *values)

    def CqilGather(self, f, x, _):
        return [x[0][x[1].long().flatten()]]

    def CqilNorm(self, f, x, _):
        total = x[0] + x[1] if f.delta else x[0]
        return [norm(total, x[1 + f.delta], f.eps, f.kind)]

    def CqilPostNorm(self, f, x, _):
        delta, before, *rest = x
        assert len(rest) == f.residual + f.next
        total = norm(delta, before, f.eps, f.kind) + (rest.pop(0) if f.residual else 0)
        return [total, *(norm(total, weight, f.eps, f.kind) for weight in rest)]

    def CqilAdd(self, f, x, _):
        assert len(x) == max(1 + getattr(f, "after", 0), f.terms)
        return [x[0] + x[1] if f.terms else torch.zeros_like(x[0])]

    def CqilScale(self, f, x, _):
        return [capped(x[0] * f.factor, f.cap)]

    def CqilHeadSquares(self, f, x, _):
        rows, keys = len(x[0]), slice(f.heads + f.first_key, f.heads + f.last_key)
        if not f.heads:
            return [torch.zeros(rows, 2)]
        squares = x[0].view(rows, f.heads + 2 * f.kv_heads, f.head_dim).square()
        factors = torch.tensor([f.query_factor, f.key_factor])
        return [torch.stack([part.sum((1, 2)) for part in (squares[:, : f.heads], squares[:, keys])], 1) * factors]

    def CqilLinear(self, f, x, inputs):
        if getattr(f, "weights", 0):
            name = inputs[1 + f.delta].name
            matrix = x[1 + f.delta] = self._packed[name]
            assert (f.outputs * (1 + bool(f.gated)), f.weights, f.group) == (len(matrix), 3, 32), name
            self.taken.add(name)
        given = iter(x)
        value = next(given)
        if f.delta:
            value = value + next(given)
        weight = next(given)
        bias = next(given) if f.bias else None
        if f.norm:
            value = norm(value, next(given), f.eps)
        value = F.linear(value, weight, bias)
        value = gate(value, f.gated) if f.gated else value * getattr(f, "scale", 1.0)
        total = value + next(given) if f.residual else value
        assert next(given, None) is None
        return [value, total] if getattr(f, "sum", 0) else [total]

    def CqilAttention(self, f, x, inputs):
        qkv, *given, past, slots, _ = x
        tables = (None, None) if f.unrotated else (given.pop(0), given.pop(0))
        norms = (given.pop(0), given.pop(0)) if f.head_norms else (None, None)
        squares = given.pop(0) if f.joint else None
        assert not given
        (batch, entries), length = past.shape, len(qkv) // len(past)
        assert past.shape == slots.shape and entries in (1, length)
        s = SimpleNamespace(
            batch=batch,
            length=length,
            max_batch=f.max_batch,
            drafts=entries > 1,
            **{
                name: getattr(f, name)
                for name in ("heads", "kv_heads", "head_dim", "capacity", "positions", "group", "first", "eps")
            },
            **{name: getattr(f, name) for name in ("window", "rotary", "norm", "scale", "cap")},
        )
        integers = past.to(torch.int32), slots.to(torch.int32)
        values = [t if t is None else t.contiguous() for t in (qkv, *integers, *tables, *norms, squares)]
        out = torch.full((len(qkv), f.heads * f.head_dim), torch.nan)
        pointers = [t if t is None else t.data_ptr() for t in values]
        self._caches.cqil_attention(s, *pointers, inputs[-1].name, out.data_ptr(), None, None)
        return [out]

    def CqilAllReduce(self, f, x, _):
        if f.mode == 0:
            return [x[0]]
        total = x[1] + x[0]
        return [total] if f.mode == 1 else [total, norm(total, x[2], f.eps)]

    def CqilBroadcast(self, f, x, _):
        if f.rank == 0:
            return [x[0]]
        assert f.flat == 1 and x[0].dim() == 2
        given = torch.linspace(-1, 1, x[0].numel() * f.hidden).view(BATCH, -1, f.hidden)  # of the slots in order
        return [given[self._given["slots"][:, 0]].view(-1, f.hidden)]

    def CqilBypass(self, f, x, _):
        return [0.5 * x[0] if self._rank else torch.zeros_like(x[0])]


def package():
    """The part of the Python module `tensorrt` that the lowering touches."""
    creator = lambda name: SimpleNamespace(create_plugin=lambda _, fields: (name, fields))  # noqa: E731
    return SimpleNamespace(
        int32="int32",
        float32="float32",
        float16="float16",
        PluginFieldType=SimpleNamespace(INT32=np.int32, FLOAT32=np.float32),
        PluginField=lambda name, array, kind: (name, array.astype(kind).item()),
        PluginFieldCollection=dict,
        get_plugin_registry=lambda: SimpleNamespace(get_plugin_creator=lambda name, version, space: creator(name)),
    )


def tables_of(checkpoint, length=CAPACITY):
    """The rotary tables, by the names of the network's inputs."""
    found = {}
    for which in range(len(checkpoint.model.ropes)):
        tables = rotary_tables(checkpoint.model, checkpoint.rotary, length, which)
        found |= zip(rotary_names(which), map(torch.from_numpy, tables))
    return found


@pytest.mark.parametrize("name", [*ARCHITECTURES, *GPU_FAMILIES])
def test_classic_networks_compute_what_the_decoder_means(name, tmp_path):
    architecture, changes = {**ARCHITECTURES, **GPU_FAMILIES}[name]
    checkpoint = Checkpoint(make_model(tmp_path, architecture, seed=SEED, rms_norm_eps=1e-2, **changes), None)
    model, limits = (
        checkpoint.model,
        EngineLimits(max_batch_size=BATCH, max_seq_len=CAPACITY, dtype="float32", prefill_chunk=8),
    )
    constants = tables_of(checkpoint)
    for shape in rank_shapes(model):
        for rank in plan(model, CqilConfig(**shape)):
            weights = rank_weights(rank, checkpoint.reader)
            plain = TorchOps(rank, weights, Alone.of(rank.schedule), limits, checkpoint.rotary)
            caches = HostKernels()
            for new, past in ((7, 0), (3, 7), (1, 10)):
                tokens = torch.randint(model.vocab_size, (BATCH, new))
                pasts, select = torch.full((BATCH,), past), torch.full((BATCH, 1), new - 1)
                expected = decode(plain, tokens, pasts, select)
                rows = torch.arange(BATCH) * new + new - 1
                slots = torch.randperm(BATCH)  # a sequence keeps its slot, not its row
                inputs = {"tokens": tokens[slots], "past": pasts[:, None], "slots": slots[:, None], "select": rows}
                given = inputs | constants | weights
                network = Network(given, caches, rank.schedule.peers(Peers.PART).index(rank.rank))
                define_network(package(), network, LOWERING, rank, limits, checkpoint.rotary, nccl=False)
                collectives = [p for p in network.plugins if p in ("CqilAllReduce", "CqilBroadcast")]
                assert len(collectives) == rank.all_reduces + rank.schedule.broadcasts
                if rank.schedule.predicts:
                    assert_close(name, network.outputs["logits"], expected[slots, 0])
                if rank.schedule.all_reduces:
                    joined = network.outputs["joined"].view_as(plain.joined)
                    assert_close(name, joined, plain.joined[slots])


@pytest.mark.parametrize("name", ["gemma3", "mistral-windows"])
def test_caches_that_are_circles(name, tmp_path):
    """To the last position, in chunks and single tokens of both sequences."""
    architecture, changes = GPU_FAMILIES[name]
    checkpoint = Checkpoint(make_model(tmp_path, architecture, seed=SEED, rms_norm_eps=1e-2, **changes), None)
    whole = EngineLimits(max_batch_size=BATCH, max_seq_len=200, prefill_chunk=40)
    limits, constants = replace(whole, circle=64), tables_of(checkpoint, 200)
    for shape in ({"p": 1}, {"p": 2, "start": 1, "end": 5}):
        rank = plan(checkpoint.model, CqilConfig(**shape))[0]
        weights, caches = rank_weights(rank, checkpoint.reader), HostKernels()
        plain = TorchOps(rank, weights, Alone.of(rank.schedule), whole, checkpoint.rotary)
        past, slots = 0, torch.tensor([1, 0])
        for new in (33, 40, 1, 40, 40, 40, 5, 1):
            tokens = torch.randint(checkpoint.model.vocab_size, (BATCH, new))
            pasts, select = torch.full((BATCH,), past), torch.full((BATCH, 1), new - 1)
            expected = decode(plain, tokens, pasts, select)
            rows = torch.arange(BATCH) * new + new - 1
            inputs = {"tokens": tokens[slots], "past": pasts[:, None], "slots": slots[:, None], "select": rows}
            network = Network(inputs | constants | weights, caches, rank.rank)
            define_network(package(), network, LOWERING, rank, limits, checkpoint.rotary, nccl=False)
            assert_close(name, network.outputs["logits"], expected[slots, 0])
            past += new
        assert past == 200


def test_packed_weights_are_pointed_to_and_others_are_dense(tmp_path):
    """Groups of 32 of 96 columns: halves of the neurons begin within a group, which kernels do not take."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
    checkpoint = Checkpoint(make_model(tmp_path, seed=SEED, **sizes), None)
    limits = EngineLimits(max_batch_size=BATCH, max_seq_len=CAPACITY, dtype="float16", weights="int4g32")
    checkpoint.quantize(limits)
    config, kernels = CqilConfig(p=2, start=2, end=4), SimpleNamespace(cqil_packed_rows=lambda: 32)
    constants = tables_of(checkpoint)
    for rank, dense in zip(plan(checkpoint.model, config, "float16", "int4g32"), plan(checkpoint.model, config)):
        weights = rank_weights(dense, checkpoint.reader)  # dequantized
        single = EngineLimits(max_batch_size=BATCH, max_seq_len=CAPACITY, dtype="float32")
        plain = TorchOps(dense, weights, Alone.of(rank.schedule), single, checkpoint.rotary)
        tokens, rows = torch.randint(checkpoint.model.vocab_size, (BATCH, 7)), torch.arange(BATCH) * 7 + 6
        pasts = torch.zeros(BATCH, dtype=torch.long)
        expected = decode(plain, tokens, pasts, torch.full((BATCH, 1), 6))
        slots = torch.arange(BATCH)
        given = {"tokens": tokens, "past": pasts[:, None], "slots": slots[:, None], "select": rows}
        given |= constants | weights
        matrices = {n: m for n, m in weights.items() if n.startswith("layers.") and n.endswith(".weight")}
        network = Network(given, HostKernels(), rank.rank, matrices)
        define_network(package(), network, LOWERING, rank, limits, checkpoint.rotary, False, kernels)
        torch.testing.assert_close(network.outputs["logits"], expected[:, 0], rtol=1e-4, atol=1e-5)
        projections = {name for name in matrices if "norm" not in name}
        split = {f"layers.{i}.down.weight" for i in (0, 1, 4, 5)}
        assert network.taken == projections - (split if rank.rank else set())


def test_a_servers_steps_are_those_of_each_sequence_alone(tmp_path):
    """Prompts one by one into slots, then decode steps of some of 16 sequences, also with drafts, as profiles allow."""
    checkpoint = Checkpoint(make_model(tmp_path, seed=SEED, rms_norm_eps=1e-2), None)
    slots, model = 16, checkpoint.model
    limits = EngineLimits(max_batch_size=slots, max_seq_len=CAPACITY, dtype="float32", prefill_chunk=8)
    tables = map(torch.from_numpy, rotary_tables(model, checkpoint.rotary, CAPACITY))
    constants = dict(zip(("rotary.cos", "rotary.sin"), tables))
    for rank in (plan(model, CqilConfig(p=1))[0], plan(model, CqilConfig(p=2, placement="tensor"))[1]):
        weights, caches = rank_weights(rank, checkpoint.reader), HostKernels()
        alone = [TorchOps(rank, weights, Alone.of(rank.schedule), limits, checkpoint.rotary) for _ in range(slots)]
        past = torch.zeros(slots, dtype=torch.long)

        def step(chosen, length, drafts=False, rank=rank, weights=weights, caches=caches, alone=alone, past=past):
            tokens = torch.randint(model.vocab_size, (len(chosen), length))
            wanted = torch.arange(length)[None] if drafts else torch.tensor([[length - 1]])
            expected = [decode(alone[s], tokens[i : i + 1], past[s : s + 1], wanted)[0] for i, s in enumerate(chosen)]
            rows = (torch.arange(len(chosen))[:, None] * length + wanted).flatten()
            pasts, slots = past[chosen][:, None], torch.tensor(chosen)[:, None]
            if drafts:
                pasts, slots = pasts + wanted, slots.repeat(1, length)
            inputs = {"tokens": tokens, "past": pasts, "slots": slots, "select": rows}
            network = Network(inputs | constants | weights, caches, rank.rank)
            define_network(package(), network, LOWERING, rank, limits, checkpoint.rotary, nccl=False)
            torch.testing.assert_close(network.outputs["logits"], torch.cat(expected), rtol=1e-4, atol=1e-5)
            past[chosen] += length

        for slot in torch.randperm(slots).tolist():
            for _ in range(1 + slot % 2):  # a chunk, or two
                step([slot], int(torch.randint(2, 9, ())))
        for count, drafted in ((slots, 0), (5, 0), (8, 1), (1, 0), (2, 7), (slots, 0)):
            step(torch.randperm(slots)[:count].tolist(), 1 + drafted, drafts=drafted > 0)


def test_every_rank_hears_of_a_gpu_that_the_engine_was_not_compiled_for(monkeypatch):
    """Of two ranks with different GPUs one cannot go on; the other must not wait for it."""
    need("cuda-bindings", "cuda-pathfinder")
    from cqil_trt.backends.tensorrt import session

    trt = SimpleNamespace(__name__="tensorrt", __version__="10.14.1")
    engine = SimpleNamespace(path="e", backend_version="tensorrt 10.14.1", build={}, architecture="9.0")
    monkeypatch.setattr(session, "import_package", lambda names: trt)
    monkeypatch.setattr(session.cuda, "use_device", lambda number: None)
    monkeypatch.setattr(session.cuda, "device_name", lambda: "a GPU")
    for here, there, said in (
        ("9.0", "rank 1's", "^rank 1's$"),
        ("8.6", None, "^e: compiled for .* 9.0, a GPU has 8.6"),
    ):
        monkeypatch.setattr(session.cuda, "compute_capability", lambda found=here: found)
        comm = SimpleNamespace(allgather=lambda mine, other=there: [mine, other])
        with pytest.raises(UserError, match=said):
            session.TensorRtSession(engine, comm, 0)
