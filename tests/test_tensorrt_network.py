"""The network definition, emitted into TensorRT-RTX and built on a machine without a GPU; engines are read back."""

import numpy as np
import pytest
import torch
from conftest import SEED, make_model
from test_parity import ARCHITECTURES

from cqil_trt.builder import rank_tensors
from cqil_trt.config import CqilConfig, EngineConfig
from cqil_trt.network.rotary import rotary_tables
from cqil_trt.network.tensorrt_ops import add_profiles, define_network
from cqil_trt.shard import plan
from cqil_trt.weights import open_checkpoint

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

SHAPES = [
    {"p": 1},
    {"p": 2, "start": 1, "end": 5, "placement": "leader"},
    {"p": 2, "d": 1, "start": 1, "end": 5},
    {"p": 2, "placement": "tensor"},
    {"p": 4, "d": 1, "start": 1, "end": 5, "bypass": "residual"},
    {"p": 4, "d": 0, "start": 2, "end": 6, "placement": "leader"},
]
CASES = [(name, shape) for i, name in enumerate(ARCHITECTURES) for j, shape in enumerate(SHAPES) if (i + j) % 6 == 0]
CASES += [("llama-odd-heads", shape) for shape in SHAPES[1:]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        name: make_model(root / name, architecture, seed=SEED, **changes)
        for name, (architecture, changes) in ARCHITECTURES.items()
    }


def rank_arrays(rank, reader, dtype):
    """The rank's tensors as numpy arrays, put together from the builder's blocks."""
    flat = torch.cat([block.reshape(-1) for block in rank_tensors(rank, reader, dtype)])
    arrays = {}
    for tensor, values in zip(rank.tensors, flat.split([tensor.elements for tensor in rank.tensors])):
        arrays[tensor.name] = values.numpy().reshape(tensor.shape)
    if rank.shares_embedding:
        arrays["lm_head.weight"] = arrays["embedding.weight"][slice(*rank.vocabulary)]
    return arrays


def expected_collectives(rank):
    cqil = rank.cqil
    bypasses = len(cqil.groups) if cqil.d else 0
    return rank.schedule.all_reduces + rank.schedule.broadcasts + bypasses


@pytest.mark.parametrize("name, shape", CASES, ids=[f"{n}-{'-'.join(map(str, s.values()))}" for n, s in CASES])
def test_every_rank_builds_and_reads_back(name, shape, models):
    model, reader = open_checkpoint(models[name])
    cqil = CqilConfig(**shape)
    limits = EngineConfig(max_batch_size=3, max_seq_len=64, dtype="float16", backend="torch")
    rotary = tuple(table.numpy() for table in rotary_tables(model, limits.max_seq_len))
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    for rank in plan(model, cqil):
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        arrays = rank_arrays(rank, reader, limits.dtype)
        ops = define_network(trt, network, rank, arrays, rotary, limits)
        kinds = [network.get_layer(i).type for i in range(network.num_layers)]
        assert kinds.count(trt.LayerType.DIST_COLLECTIVE) == expected_collectives(rank)
        assert not ops._arrays, f"tensors that no layer reads: {sorted(ops._arrays)}"
        config = builder.create_builder_config()
        add_profiles(trt, builder, config, network, limits)
        serialized = builder.build_serialized_network(network, config)
        assert serialized is not None

        caches = {f"cache.{i}.{part}" for i, s in rank.layers.items() if s.num_heads for part in ("key", "value")}
        inputs = {network.get_input(i).name for i in range(network.num_inputs)}
        outputs = {network.get_output(i).name for i in range(network.num_outputs)}
        predicts = rank.schedule.predicts
        assert inputs == {"tokens", "past"} | caches | ({"select"} if predicts else set())
        assert outputs == {"logits" if predicts else "hidden"} | {f"{cache}.updated" for cache in caches}
        assert np.prod(network.get_output(0).shape[-1:]) == (
            rank.vocabulary[1] - rank.vocabulary[0] if predicts else model.hidden_size
        )


def test_weights_are_stored_once_for_both_profiles(tmp_path):
    """A model whose weights outweigh the engine's fixed parts by far."""
    model, reader = open_checkpoint(
        make_model(tmp_path, hidden_size=768, intermediate_size=3072, num_attention_heads=12, head_dim=64)
    )
    [rank] = plan(model, CqilConfig(1))
    limits = EngineConfig(max_batch_size=2, max_seq_len=64, dtype="float16")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    rotary = tuple(table.numpy() for table in rotary_tables(model, limits.max_seq_len))
    ops = define_network(trt, network, rank, rank_arrays(rank, reader, limits.dtype), rotary, limits)
    config = builder.create_builder_config()
    add_profiles(trt, builder, config, network, limits)
    size = builder.build_serialized_network(network, config).nbytes
    assert ops.plan is rank  # the arrays live in it until here
    stored = rank.stored_bytes(limits.dtype)
    assert stored > 80e6 and stored < size < 1.2 * stored
