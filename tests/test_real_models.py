"""Plans of published models, whose sizes are no powers of two: every weight is on the ranks that need it, once."""

from math import prod

import pytest
from support import write_json

from cqil_trt import families
from cqil_trt.config import CqilConfig
from cqil_trt.families.layout import checkpoint_shapes
from cqil_trt.model import ModelConfig
from cqil_trt.schedule import Layer
from cqil_trt.shard import plan


def sizes(layers, hidden, inner, heads, kv_heads, vocabulary, **more):
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        **more,
    }


FACTORS = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
LONGROPE = {"max_position_embeddings": 131072, "rope_scaling": {"type": "longrope", **FACTORS}}
# Fields of their config.json, and the parameters that they are published with (None: not compared).
MODELS = {
    "gemma-2-2b": ("gemma2", sizes(26, 2304, 9216, 8, 4, 256000, head_dim=256), 2_614_341_888),
    "gemma-2-27b": (
        "gemma2",
        sizes(46, 4608, 36864, 32, 16, 256000, head_dim=128, query_pre_attn_scalar=144),
        27_227_128_320,
    ),
    "gemma-3-1b": (
        "gemma3_text",
        sizes(26, 1152, 6912, 4, 1, 262144, head_dim=256, sliding_window=512, sliding_window_pattern=6),
        999_885_952,
    ),
    "SmolLM3-3B": ("smollm3", sizes(36, 2048, 11008, 16, 4, 128256), 3_075_098_624),
    "granite-3.3-8b": ("granite", sizes(40, 4096, 12800, 32, 8, 49159, tie_word_embeddings=True), None),
    "OLMo-2-13B": ("olmo2", sizes(40, 5120, 13824, 40, 40, 100352), None),
    "OLMo-2-32B": ("olmo2", sizes(64, 5120, 27648, 40, 8, 100352), None),
    "Olmo-3-7B": ("olmo3", sizes(32, 4096, 11008, 32, 32, 100278, sliding_window=4096), None),
    "Phi-3.5-mini": ("phi3", sizes(32, 3072, 8192, 32, 32, 32064, **LONGROPE), 3_821_079_552),
    "Phi-4-mini": (
        "phi3",
        sizes(32, 3072, 8192, 24, 8, 200064, partial_rotary_factor=0.75, tie_word_embeddings=True, **LONGROPE),
        3_836_021_760,
    ),
    "Phi-4": ("phi3", sizes(40, 5120, 17920, 40, 10, 100352), 14_659_507_200),
    "Ministral-8B": (
        "ministral",
        sizes(36, 4096, 12288, 32, 8, 131072, head_dim=128, sliding_window=32768),
        8_019_808_256,
    ),
    "Mistral-Nemo": (
        "mistral",
        sizes(40, 5120, 14336, 32, 8, 131072, head_dim=128, sliding_window=None),
        12_247_782_400,
    ),
    "Qwen2.5-14B": ("qwen2", sizes(48, 5120, 13824, 40, 8, 152064), 14_770_033_664),
    "Qwen3-0.6B": ("qwen3", sizes(28, 1024, 3072, 16, 8, 151936, tie_word_embeddings=True), 596_049_920),
}


@pytest.fixture(params=MODELS)
def published(request, tmp_path):
    kind, fields, parameters = MODELS[request.param]
    path = write_json(tmp_path / "config.json", {"model_type": kind, **fields})
    return families.read_config(path), parameters


def test_a_checkpoint_has_as_many_parameters_as_the_published_model(published):
    model, parameters = published
    assert parameters in (None, sum(prod(shape) for shape in checkpoint_shapes(model).values()))


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("placement", ["sharded", "leader", "tensor"])
def test_every_weight_is_where_it_is_needed(p, placement, published):
    model, _ = published
    assert isinstance(model, ModelConfig)
    cqil = CqilConfig.choose(model.num_layers, p, placement=placement)
    ranks, shapes = plan(model, cqil, "bfloat16"), checkpoint_shapes(model)
    read: dict[str, list] = {name: [] for name in shapes}
    for rank in ranks:
        for tensor in rank.tensors:
            assert tensor.elements == sum(part_elements(piece, shapes[piece.source]) for piece in tensor.pieces)
            for piece in tensor.pieces:
                read[piece.source].append((rank.rank, piece))
    split = {step.index for step in ranks[0].schedule.layers if isinstance(step, Layer) and step.split}
    for name, parts in read.items():
        if ".layers." not in name:
            assert parts
            continue
        layer = int(name.split(".")[2])
        shape, readers = shapes[name], {rank for rank, _ in parts}
        assert len(readers) == (p if layer in split else 1), name
        if len(shape) == 1 and shape[0] in (model.hidden_size, model.head_dim):
            continue  # a norm: every reader has all of it, or its heads of it
        rows = sorted(piece.rows or (0, shape[0]) for _, piece in parts)
        columns = sorted(piece.columns or (0, shape[1]) for _, piece in parts) if len(shape) == 2 else [(0, 1)]
        assert covered(rows) == (0, shape[0]) and covered(columns)[0] == 0
        assert len(shape) == 1 or covered(columns)[1] == shape[1]
    spans = [rank.vocabulary for rank in ranks if rank.schedule.predicts]
    assert covered(spans) == (0, model.vocab_size)
    assert sum(last - first for first, last in spans) == model.vocab_size


def part_elements(piece, shape):
    rows = piece.rows or (0, shape[0])
    columns = (piece.columns or (0, shape[1])) if len(shape) == 2 else (0, 1)
    assert 0 <= rows[0] <= rows[1] <= shape[0] and (len(shape) == 1 or 0 <= columns[0] <= columns[1] <= shape[1])
    return (rows[1] - rows[0]) * (columns[1] - columns[0])


def covered(spans):
    """The span that these spans cover without a gap."""
    first, last = spans[0]
    for start, end in spans[1:]:
        assert start <= last, spans
        last = max(last, end)
    return first, last
