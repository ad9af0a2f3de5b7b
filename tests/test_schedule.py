"""The schedule and the shards, as properties of any configuration."""

from hypothesis import given
from hypothesis import strategies as st

from cqil_trt.config import CqilConfig
from cqil_trt.model import ModelConfig
from cqil_trt.rope import RopeConfig
from cqil_trt.schedule import Group, Layer, Peers, Receive, schedule
from cqil_trt.shard import plan


@st.composite
def configurations(draw):
    p = draw(st.integers(1, 8))
    shared = draw(st.integers(1, 8 // p))
    groups = draw(st.integers(0, 4))
    start = draw(st.integers(0, 5))
    layers = start + groups * p + draw(st.integers(0, 5)) or 1
    placement = draw(st.sampled_from(["sharded", "leader", "tensor"]))
    if placement == "tensor":
        config = CqilConfig(p=p, ranks_per_layer=shared, placement="tensor")
    else:
        d = draw(st.integers(0, p - 1))
        shared = 1 if placement == "leader" else shared
        config = CqilConfig(p=p, ranks_per_layer=shared, d=d, start=start, end=start + groups * p, placement=placement)
    split = config.split_layers(layers)
    if shared > 1 and not config.d:
        split = range(layers)
    return config.dropping(draw(st.sets(st.sampled_from(split))) if split else (), layers), layers


@given(configurations())
def test_every_layer_runs_where_it_should_and_collectives_line_up(configuration):
    cqil, layers = configuration
    ranks = schedule(cqil, layers)
    grouped = {layer for group in cqil.groups for layer in group}
    outside = [i for i in range(layers) if i not in grouped]
    collectives = []
    for rank in ranks:
        run = [step.index for step in rank.layers]
        assert run == sorted(set(run))
        assert {i for i in run if i in grouped} == {group[rank.rank // cqil.ranks_per_layer] for group in cqil.groups}
        alone = [step.index for step in rank.steps if isinstance(step, Layer)]
        if cqil.placement == "leader":
            assert alone == (outside if rank.rank == 0 else [])
            assert rank.all_reduces == len(cqil.groups) and rank.broadcasts == bool(cqil.groups)
        else:
            assert alone == outside
            twice = set(outside) - set(cqil.drop_attention_join)
            joins = len(cqil.groups) + len(outside) + len(twice)
            own = {i for i in run if i in grouped} - set(cqil.drop_attention_join)
            joins += len(own) if cqil.ranks_per_layer > 1 else 0
            assert rank.all_reduces == (0 if cqil.ranks == 1 else joins)
            assert cqil.split_layers(layers) == (() if cqil.ranks == 1 else tuple(outside))
        collectives.append([s for s in rank.steps if isinstance(s, (Receive, Group)) or s.split])
        # Who joins with whom is agreed on, and those that share a layer of a group run the same ones.
        for kind in Peers:
            for other in rank.peers(kind):
                assert ranks[other].peers(kind) == rank.peers(kind) and rank.rank in rank.peers(kind)
        for other in rank.peers(Peers.LAYER) if cqil.groups else ():
            own = [(s.index, s.all_reduces) for s in rank.steps if isinstance(s, Group)]
            assert own == [(s.index, s.all_reduces) for s in ranks[other].steps if isinstance(s, Group)]
    shapes = [
        [type(s).__name__ + str(getattr(s, "layers", getattr(s, "all_reduces", ""))) for s in steps]
        for steps in collectives
    ]
    assert all(shape == shapes[0] for shape in shapes)


@given(st.integers(1, 8), st.data())
def test_without_groups_ranks_per_layer_are_tensor_parallelism(p, data):
    shared, layers = data.draw(st.integers(1, 8 // p)), data.draw(st.integers(1, 9))
    start = data.draw(st.integers(0, layers))
    found = schedule(CqilConfig(p=p, ranks_per_layer=shared, start=start, end=start), layers)
    expected = schedule(CqilConfig(p=p * shared, placement="tensor"), layers)
    assert [rank.steps for rank in found] == [rank.steps for rank in expected]


@given(configurations(), st.integers(1, 4), st.integers(1, 12), st.integers(1, 40), st.booleans())
def test_shards_of_a_layer_cover_it_exactly_once(configuration, kv_heads, group, neurons, tied):
    cqil, layers = configuration
    model = ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=layers,
        hidden_size=16,
        intermediate_size=neurons,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=4,
        vocab_size=37,
        max_position=64,
        rms_norm_eps=1e-6,
        rope=RopeConfig(),
        tie_embeddings=tied,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        qk_norm=False,
        sliding_window=None,
        dtype="float32",
    )
    ranks = plan(model, cqil)
    assert sum(b - a for a, b in (rank.vocabulary for rank in ranks)) == model.vocab_size
    for layer in range(layers):
        shards = [rank.layers[layer] for rank in ranks if layer in rank.layers]
        heads = [head for shard in shards for head in range(*shard.heads)]
        assert heads == list(range(model.num_heads))
        assert [n for shard in shards for n in range(*shard.neurons)] == list(range(neurons))
        assert sum(shard.adds_bias for shard in shards) == 1
        assert all(shard.num_heads and shard.num_neurons for shard in shards if shard.adds_bias)
        sizes = [shard.num_heads for shard in shards]
        assert max(sizes) - min(sizes) <= 1
        for shard in shards:
            # Every query head reads the key/value head it reads in the whole model.
            read = [shard.kv_heads[0] + shard.kv_index[i] for i in range(shard.num_heads)]
            assert read == [head // group for head in range(*shard.heads)]
            assert set(read) == set(range(*shard.kv_heads))
