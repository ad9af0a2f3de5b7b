"""Which slices of which tensors a rank stores, and what they weigh. Pure Python: no tensor, no backend.

Checkpoint tensors are named as Hugging Face names them; engine tensors have the shorter names below. The q, k and v
projections are stored as one matrix `qkv`, gate and up as one matrix `gate_up`, so that each is one product.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from cqil_trt.config import DTYPE_BYTES, CqilConfig, ModelConfig
from cqil_trt.schedule import Layer, RankSchedule, Step, schedule


def even_split(size: int, parts: int, index: int) -> tuple[int, int]:
    """The half-open range of part `index` when `size` items are dealt to `parts` as evenly as possible."""
    return size * index // parts, size * (index + 1) // parts


@dataclass(frozen=True)
class Piece:
    """Rows and columns of a checkpoint tensor; None means all of them."""

    source: str
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class RankTensor:
    """A tensor of a rank's engine: its pieces stacked along the first axis."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class LayerShard:
    """A rank's share of one decoder layer.

    `heads` and `kv_heads` are half-open ranges of the model's heads; `kv_index[i]` is the local key/value head that
    local query head i reads. `adds_bias`: this rank adds the biases of the o and down projections (one rank must; the
    last, as an even split leaves the first parts empty when there are more parts than heads).
    """

    index: int
    heads: tuple[int, int]
    kv_heads: tuple[int, int]
    neurons: tuple[int, int]
    kv_index: tuple[int, ...]
    adds_bias: bool

    @property
    def num_heads(self) -> int:
        return self.heads[1] - self.heads[0]

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads[1] - self.kv_heads[0]

    def first_in_group(self, group_size: int) -> int:
        """Where its first query head stands among those that read the same key/value head."""
        return self.heads[0] - self.kv_heads[0] * group_size

    @property
    def num_neurons(self) -> int:
        return self.neurons[1] - self.neurons[0]

    @property
    def grouped(self) -> bool:
        """Whether every key/value head is read by equally many consecutive query heads."""
        size, rest = divmod(self.num_heads, max(self.num_kv_heads, 1))
        return not rest and self.kv_index == tuple(head // size for head in range(self.num_heads))

    @property
    def query_slots(self) -> tuple[int, ...]:
        """The query head in each slot, where every key/value head has equally many slots, one after the other.

        For kernels that take grouped heads in equal groups only: it repeats query heads, which are small, where
        repeating the key/value heads would copy the cache. Unused slots hold a head again; `slot_of` names the first.
        """
        groups = [[i for i, kv in enumerate(self.kv_index) if kv == head] for head in range(self.num_kv_heads)]
        size = max(map(len, groups), default=0)
        return tuple(group[min(i, len(group) - 1)] for group in groups for i in range(size))

    @property
    def slot_of(self) -> tuple[int, ...]:
        """For each query head the slot of `query_slots` whose result it takes."""
        return tuple(self.query_slots.index(head) for head in range(self.num_heads))

    @classmethod
    def of(cls, model: ModelConfig, index: int, part: int, parts: int) -> LayerShard:
        """Part `part` of `parts` of layer `index`.

        Query heads are dealt as evenly as possible and the part keeps the key/value heads they read, so that two
        parts may both keep one. A part may be empty when there are more parts than heads.
        """
        group = model.group_size
        first, last = heads = even_split(model.num_heads, parts, part)
        kv_heads = (first // group, (last - 1) // group + 1) if last > first else (0, 0)
        kv_index = tuple(head // group - kv_heads[0] for head in range(first, last))
        return cls(
            index, heads, kv_heads, even_split(model.intermediate_size, parts, part), kv_index, part == parts - 1
        )


@dataclass(frozen=True)
class RankPlan:
    """Everything that decides one rank's network: the model, the rank's schedule and its share of each layer."""

    model: ModelConfig
    cqil: CqilConfig
    schedule: RankSchedule
    layers: dict[int, LayerShard] = field(compare=False)

    @property
    def rank(self) -> int:
        return self.schedule.rank

    @property
    def world_size(self) -> int:
        return self.schedule.world_size

    @property
    def bypasses(self) -> int:
        """Exchanges of attention outputs within groups for each forward pass."""
        return len(self.cqil.groups) if self.cqil.d else 0

    @property
    def collectives(self) -> int:
        """How often this rank meets others in each forward pass, but for the choice of a token."""
        return self.schedule.all_reduces + self.schedule.broadcasts + self.bypasses

    @property
    def vocabulary(self) -> tuple[int, int]:
        """The half-open range of token ids whose logits this rank computes."""
        if not self.schedule.predicts:
            return 0, 0
        if not self.schedule.split_vocabulary:
            return 0, self.model.vocab_size
        return even_split(self.model.vocab_size, self.world_size, self.rank)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that the network reads, by name: a shared last projection has a name of its own."""
        shapes = {tensor.name: tensor.shape for tensor in self.tensors}
        if self.shares_embedding:
            first, last = self.vocabulary
            shapes["lm_head.weight"] = (last - first, self.model.hidden_size)
        return shapes

    @property
    def shares_embedding(self) -> bool:
        """Whether the last projection is a view of the rank's embedding table, and so is not stored twice."""
        return self.model.tie_embeddings and self.schedule.embeds and self.schedule.predicts

    @cached_property
    def tensors(self) -> tuple[RankTensor, ...]:
        """What the rank stores, in the order the network reads it."""
        model, hidden = self.model, self.model.hidden_size
        tensors: list[RankTensor] = []
        if self.schedule.embeds:
            source = "model.embed_tokens.weight"
            tensors.append(RankTensor("embedding.weight", (model.vocab_size, hidden), (Piece(source),)))
        for step in self.schedule.layers:
            tensors += self._layer_tensors(self.layers[step.index])
        if self.schedule.predicts:
            tensors.append(RankTensor("final_norm.weight", (hidden,), (Piece("model.norm.weight"),)))
            if not self.shares_embedding:
                first, last = self.vocabulary
                source = "model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"
                tensors.append(RankTensor("lm_head.weight", (last - first, hidden), (Piece(source, (first, last)),)))
        return tuple(tensors)

    def _layer_tensors(self, shard: LayerShard) -> list[RankTensor]:
        model, hidden, dim = self.model, self.model.hidden_size, self.model.head_dim
        ours, theirs = f"layers.{shard.index}", f"model.layers.{shard.index}"
        q_rows = (shard.heads[0] * dim, shard.heads[1] * dim)
        kv_rows = (shard.kv_heads[0] * dim, shard.kv_heads[1] * dim)
        qkv_sources = (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
        qkv_size = q_rows[1] - q_rows[0] + 2 * (kv_rows[1] - kv_rows[0])

        def norm(name: str, source: str, size: int) -> RankTensor:
            return RankTensor(f"{ours}.{name}.weight", (size,), (Piece(f"{theirs}.{source}.weight"),))

        def stacked(name: str, kind: str, shape: tuple[int, ...], sources) -> RankTensor:
            pieces = tuple(Piece(f"{theirs}.{source}.{kind}", rows) for source, rows in sources)
            return RankTensor(f"{ours}.{name}.{kind}", shape, pieces)

        def columns(name: str, source: str, span: tuple[int, int]) -> RankTensor:
            piece = Piece(f"{theirs}.{source}.weight", None, span)
            return RankTensor(f"{ours}.{name}.weight", (hidden, span[1] - span[0]), (piece,))

        tensors = [norm("attention_norm", "input_layernorm", hidden)]
        if shard.num_heads:
            qkv = [(f"self_attn.{source}", rows) for source, rows in qkv_sources]
            tensors.append(stacked("qkv", "weight", (qkv_size, hidden), qkv))
            if model.qkv_bias:
                tensors.append(stacked("qkv", "bias", (qkv_size,), qkv))
            if model.qk_norm:
                tensors.append(norm("q_norm", "self_attn.q_norm", dim))
                tensors.append(norm("k_norm", "self_attn.k_norm", dim))
            tensors.append(columns("o", "self_attn.o_proj", q_rows))
            if model.o_bias and shard.adds_bias:
                tensors.append(stacked("o", "bias", (hidden,), [("self_attn.o_proj", None)]))
        tensors.append(norm("mlp_norm", "post_attention_layernorm", hidden))
        if shard.num_neurons:
            gate_up = [("mlp.gate_proj", shard.neurons), ("mlp.up_proj", shard.neurons)]
            tensors.append(stacked("gate_up", "weight", (2 * shard.num_neurons, hidden), gate_up))
            if model.mlp_bias:
                tensors.append(stacked("gate_up", "bias", (2 * shard.num_neurons,), gate_up))
            tensors.append(columns("down", "mlp.down_proj", shard.neurons))
            if model.mlp_bias and shard.adds_bias:
                tensors.append(stacked("down", "bias", (hidden,), [("mlp.down_proj", None)]))
        return tensors

    def stored_bytes(self, dtype: str) -> int:
        return sum(t.elements for t in self.tensors) * DTYPE_BYTES[dtype]

    def bytes_per_token(self, dtype: str) -> int:
        """Weight bytes a decode step reads: all but the embedding table, of which one row is read."""
        elements = sum(t.elements for t in self.tensors if t.name != "embedding.weight")
        if self.shares_embedding:
            first, last = self.vocabulary
            elements += (last - first) * self.model.hidden_size
        return elements * DTYPE_BYTES[dtype]

    def cache_bytes_per_token(self, dtype: str) -> int:
        """KV cache bytes one token takes on this rank."""
        heads = sum(shard.num_kv_heads for shard in self.layers.values())
        return 2 * heads * self.model.head_dim * DTYPE_BYTES[dtype]


def plan(model: ModelConfig, cqil: CqilConfig) -> tuple[RankPlan, ...]:
    """The plan of every rank. Raises UserError when the groups reach beyond the model."""

    def shard(step: Step, rank: RankSchedule) -> LayerShard:
        if isinstance(step, Layer) and step.split:
            return LayerShard.of(model, step.index, rank.rank, rank.world_size)
        return LayerShard.of(model, step.index, 0, 1)

    return tuple(
        RankPlan(model, cqil, rank, {step.index: shard(step, rank) for step in rank.layers})
        for rank in schedule(cqil, model.num_layers)
    )


def checkpoint_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this model must hold, and its shape."""
    hidden, dim = model.hidden_size, model.head_dim
    q, kv, inner = model.num_heads * dim, model.num_kv_heads * dim, model.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, hidden)}
    projections = {
        "self_attn.q_proj": (q, hidden, model.qkv_bias),
        "self_attn.k_proj": (kv, hidden, model.qkv_bias),
        "self_attn.v_proj": (kv, hidden, model.qkv_bias),
        "self_attn.o_proj": (hidden, q, model.o_bias),
        "mlp.gate_proj": (inner, hidden, model.mlp_bias),
        "mlp.up_proj": (inner, hidden, model.mlp_bias),
        "mlp.down_proj": (hidden, inner, model.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if model.qk_norm:
        norms |= {"self_attn.q_norm": dim, "self_attn.k_norm": dim}
    for index in range(model.num_layers):
        prefix = f"model.layers.{index}"
        for name, (rows, columns, bias) in projections.items():
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}.{name}.bias"] = (rows,)
        for name, size in norms.items():
            shapes[f"{prefix}.{name}.weight"] = (size,)
    shapes["model.norm.weight"] = (hidden,)
    if not model.tie_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, hidden)
    return shapes
