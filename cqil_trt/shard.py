"""Which slices of which tensors a rank stores, and how large they are. Pure Python: no tensor, no backend.

A checkpoint's tensors are named by the model's family; an engine's have the shorter names below. The q, k and v
projections are stored as one matrix `qkv`, gate and up as one matrix `gate_up`: each is one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from cqil_trt import formats
from cqil_trt.config import DTYPE_BYTES, CqilConfig, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.families.family import EMBEDDING, FINAL_NORM, LM_HEAD
from cqil_trt.families.layout import LayerLayout
from cqil_trt.formats import DENSE, Piece, Projection, RankTensor
from cqil_trt.model import ModelConfig
from cqil_trt.schedule import Group, Layer, Peers, RankSchedule, schedule

if TYPE_CHECKING:
    import torch

    from cqil_trt.weights import WeightReader


def even_split(size: int, parts: int, index: int) -> tuple[int, int]:
    """The half-open range of part `index` when `size` items are split into `parts` as evenly as possible."""
    return size * index // parts, size * (index + 1) // parts


@dataclass(frozen=True, kw_only=True)
class LayerShard:
    """A rank's share of one decoder layer.

    `heads` and `kv_heads` are half-open ranges of the model's heads; `kv_index[i]` is the local key/value head that
    local query head i reads. `adds_bias`: this rank adds the biases of the o and down projections. Only the last part
    does: an even split with more parts than heads leaves the first ones empty. `parts`: the ranks that share the layer.
    """

    index: int
    heads: tuple[int, int]
    kv_heads: tuple[int, int]
    neurons: tuple[int, int]
    kv_index: tuple[int, ...]
    adds_bias: bool
    parts: int

    @property
    def num_heads(self) -> int:
        return self.heads[1] - self.heads[0]

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads[1] - self.kv_heads[0]

    def first_in_group(self, group_size: int) -> int:
        """The position of its first query head among those that read the same key/value head."""
        return self.heads[0] - self.kv_heads[0] * group_size

    def owned_kv_heads(self, group_size: int) -> tuple[int, int]:
        """The half-open range of its local key/value heads whose first query head it has, so no other part has that.

        Every key/value head of the model is owned by one part.
        """
        first, last = (-(-head // group_size) - self.kv_heads[0] for head in self.heads)
        return first, last

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
        """The query head in each slot, with the same number of consecutive slots for every key/value head.

        For kernels that need equal groups of heads. Repeating query heads is cheap; repeating key/value heads would
        copy the cache. Unused slots repeat a head, and `slot_of` gives its first slot.
        """
        groups = [[i for i, kv in enumerate(self.kv_index) if kv == head] for head in range(self.num_kv_heads)]
        size = max(map(len, groups), default=0)
        return tuple(group[min(i, len(group) - 1)] for group in groups for i in range(size))

    @property
    def slot_of(self) -> tuple[int, ...]:
        """The slot in `query_slots` that holds each query head's result."""
        return tuple(self.query_slots.index(head) for head in range(self.num_heads))

    @classmethod
    def of(cls, model: ModelConfig, index: int, part: int, parts: int) -> LayerShard:
        """Part `part` of `parts` of layer `index`.

        Query heads are split as evenly as possible, and a part keeps the key/value heads that they read, so two parts
        may keep the same one. A part may be empty when there are more parts than heads.
        """
        group = model.group_size
        first, last = heads = even_split(model.num_heads, parts, part)
        kv_heads = (first // group, (last - 1) // group + 1) if last > first else (0, 0)
        kv_index = tuple(head // group - kv_heads[0] for head in range(first, last))
        return cls(
            index=index,
            heads=heads,
            kv_heads=kv_heads,
            neurons=even_split(model.intermediate_size, parts, part),
            kv_index=kv_index,
            adds_bias=part == parts - 1,
            parts=parts,
        )


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """Everything that determines one rank's network: the model, the rank's schedule and its share of each layer.

    `dtype`: of activations, and of everything that the format `weights` stores in no other type. `keep`: the
    layers whose projections are dense all the same. `head`: the format of the last projection.
    """

    model: ModelConfig
    cqil: CqilConfig
    schedule: RankSchedule
    layers: dict[int, LayerShard] = field(compare=False)
    dtype: str
    weights: str
    keep: tuple[int, ...] = ()
    head: str = DENSE

    @property
    def rank(self) -> int:
        return self.schedule.rank

    @property
    def world_size(self) -> int:
        return self.schedule.world_size

    @property
    def bypasses(self) -> int:
        """Exchanges of attention outputs within groups, per forward pass."""
        return len(self.cqil.groups) if self.cqil.d else 0

    @property
    def all_reduces(self) -> int:
        """This rank's all-reduces per forward pass, with those that norms of split outputs and heads need."""
        found = self.stream_all_reduces
        if self.model.joint_qk_norm:
            found += sum(shard.parts > 1 for shard in self.layers.values())
        return found

    @property
    def stream_all_reduces(self) -> int:
        """Those of them that join the residual stream, or what is added to it."""
        found = self.schedule.all_reduces
        if self.model.post_norms:  # of the MLP's whole output, where several ranks share a layer of a group
            found += sum(isinstance(step, Group) and step.parts > 1 for step in self.schedule.layers)
        return found

    @property
    def collectives(self) -> int:
        """This rank's collectives per forward pass, without those that choose the next token."""
        return self.all_reduces + self.schedule.broadcasts + self.bypasses

    @property
    def peers(self) -> dict[Peers, range]:
        """The ranks, this one included, that it joins with, by kind. All ranks have the same kinds."""
        kinds = [Peers.ALL]
        if self.cqil.groups and self.cqil.ranks_per_layer > 1:
            kinds.append(Peers.LAYER)
        if self.bypasses:
            kinds.append(Peers.PART)
        return {kind: self.schedule.peers(kind) for kind in kinds}

    @property
    def vocabulary(self) -> tuple[int, int]:
        """The half-open range of token ids whose logits this rank computes."""
        if not self.schedule.predicts:
            return 0, 0
        if not self.schedule.split_vocabulary:
            return 0, self.model.vocab_size
        return even_split(self.model.vocab_size, self.world_size, self.rank)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors that the network reads, by name; a shared last projection has its own name."""
        shapes = {tensor.name: tensor.shape for tensor in self.tensors}
        if self.shares_embedding:
            first, last = self.vocabulary
            shapes["lm_head.weight"] = (last - first, self.model.hidden_size)
        return shapes

    @property
    def shares_embedding(self) -> bool:
        """Whether the last projection is a view of the rank's embedding table and is not stored."""
        shared = self.model.tie_embeddings and self.head == DENSE
        return shared and self.schedule.embeds and self.schedule.predicts

    @cached_property
    def tensors(self) -> tuple[RankTensor, ...]:
        """The tensors that the rank stores, in the order in which the network reads them."""
        model, hidden = self.model, self.model.hidden_size
        tensors: list[RankTensor] = []
        if self.schedule.embeds:
            shape = (model.vocab_size, hidden)
            tensors.append(self._plain("embedding.weight", shape, Piece(f"{EMBEDDING}.weight")))
        for step in self.schedule.layers:
            tensors += self._layer_tensors(self.layers[step.index])
        if self.schedule.predicts:
            tensors.append(self._plain("final_norm.weight", (hidden,), Piece(f"{FINAL_NORM}.weight")))
            if not self.shares_embedding:
                # A quantized one is a matrix of its own, even where the model shares it.
                tied = model.tie_embeddings and self.head == DENSE
                rows = Piece(f"{EMBEDDING if tied else LM_HEAD}.weight", self.vocabulary)
                first, last = self.vocabulary
                projection = Projection(name="lm_head", outputs=last - first, inputs=hidden, weight=(rows,))
                tensors += formats.load(self.head).tensors(projection, self.dtype)
        return tuple(tensors)

    def _plain(self, name: str, shape: tuple[int, ...], piece: Piece) -> RankTensor:
        """A tensor that is stored as it is, whatever the format."""
        return RankTensor(name=name, shape=shape, dtype=self.dtype, pieces=(piece,))

    def _layer_tensors(self, shard: LayerShard) -> list[RankTensor]:
        layout, ours = LayerLayout(self.model, shard.index), f"layers.{shard.index}"
        stored = formats.load(DENSE if shard.index in self.keep else self.weights)
        model, hidden, dim = self.model, self.model.hidden_size, self.model.head_dim
        q_rows = (shard.heads[0] * dim, shard.heads[1] * dim)
        kv_rows = (shard.kv_heads[0] * dim, shard.kv_heads[1] * dim)

        def norm(name: str, size: int, rows: tuple[int, int] | None = None) -> RankTensor:
            return self._plain(f"{ours}.{name}.weight", (size,), layout.piece(name, "weight", rows))

        def by_rows(name: str, bias: bool, **rows: tuple[int, int]) -> tuple[RankTensor, ...]:
            """A projection split over the ranks by outputs, made of stacked parts."""
            return stored.tensors(
                Projection(
                    name=f"{ours}.{name}",
                    outputs=sum(last - first for first, last in rows.values()),
                    inputs=hidden,
                    weight=tuple(layout.piece(part, "weight", own) for part, own in rows.items()),
                    bias=tuple(layout.piece(part, "bias", own) for part, own in rows.items() if bias),
                ),
                self.dtype,
            )

        def by_columns(name: str, bias: bool, span: tuple[int, int]) -> tuple[RankTensor, ...]:
            """A projection split over the ranks by inputs; only one of them adds the bias."""
            return stored.tensors(
                Projection(
                    name=f"{ours}.{name}",
                    outputs=hidden,
                    inputs=span[1] - span[0],
                    weight=(layout.piece(name, "weight", columns=span),),
                    bias=(layout.piece(name, "bias"),) if bias and shard.adds_bias else (),
                ),
                self.dtype,
            )

        def head_norm(name: str, rows: tuple[int, int]) -> RankTensor:
            return norm(name, rows[1] - rows[0], rows) if model.joint_qk_norm else norm(name, dim)

        tensors = [norm("attention_norm", hidden)] if model.pre_norms else []
        if shard.num_heads:
            tensors += by_rows("qkv", model.qkv_bias, q=q_rows, k=kv_rows, v=kv_rows)
            if model.qk_norm:
                tensors += [head_norm("q_norm", q_rows), head_norm("k_norm", kv_rows)]
            tensors += by_columns("o", model.o_bias, q_rows)
        if model.post_norms:
            tensors.append(norm("attention_post_norm", hidden))
        if model.pre_norms:
            tensors.append(norm("mlp_norm", hidden))
        if shard.num_neurons:
            tensors += by_rows("gate_up", model.mlp_bias, gate=shard.neurons, up=shard.neurons)
            tensors += by_columns("down", model.mlp_bias, shard.neurons)
        if model.post_norms:
            tensors.append(norm("mlp_post_norm", hidden))
        return tensors

    def blocks(self, reader: WeightReader) -> Iterator[torch.Tensor]:
        """The elements of the rank's tensors, in the order of `tensors`, in contiguous blocks of bounded size."""
        for tensor in self.tensors:
            yield from tensor.blocks(reader)

    @property
    def stored_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bytes_per_token(self) -> int:
        """Weight bytes that a decode step reads: everything except the embedding table, of which it reads one row."""
        read = sum(tensor.nbytes for tensor in self.tensors if tensor.name != "embedding.weight")
        if self.shares_embedding:
            first, last = self.vocabulary
            read += (last - first) * self.model.hidden_size * DTYPE_BYTES[self.dtype]
        return read

    def cache_bytes_per_token(self, cache_dtype: str) -> int:
        """KV cache bytes per token on this rank, of a cache in this type."""
        heads = sum(shard.num_kv_heads for shard in self.layers.values())
        return 2 * heads * self.model.head_dim * DTYPE_BYTES[cache_dtype]

    def cache_bytes(self, limits: EngineLimits) -> int:
        """KV cache bytes of a sequence on this rank."""
        rows = sum(
            shard.num_kv_heads * limits.cache_length(self.model.window_of(index))
            for index, shard in self.layers.items()
        )
        return 2 * rows * self.model.head_dim * DTYPE_BYTES[limits.cache_dtype]


def plan(
    model: ModelConfig,
    cqil: CqilConfig,
    dtype: str = "float32",
    weights: str = DENSE,
    keep: tuple[int, ...] = (),
    head: str = DENSE,
) -> tuple[RankPlan, ...]:
    """The plan of every rank of an engine in `dtype`.

    It stores the projections of layers in the format `weights`, except in `keep`, and the last one in the format
    `head`.

    Raises UserError when a layer of the configuration is beyond the model, or a join cannot be dropped.
    """
    if cqil.drop_attention_join and model.post_norms:
        raise UserError(
            f"--drop-attention-join: {model.architecture} normalises attention outputs before they are added, which "
            "takes the sum over all ranks: none of its joins can be dropped"
        )

    def shard(step: Layer | Group, rank: RankSchedule) -> LayerShard:
        if isinstance(step, Layer) and step.split:
            return LayerShard.of(model, step.index, rank.rank, rank.world_size)
        if isinstance(step, Group):
            return LayerShard.of(model, step.index, step.part, step.parts)
        return LayerShard.of(model, step.index, 0, 1)

    return tuple(
        RankPlan(
            model=model,
            cqil=cqil,
            schedule=rank,
            layers={step.index: shard(step, rank) for step in rank.layers},
            dtype=dtype,
            weights=weights,
            keep=keep,
            head=head,
        )
        for rank in schedule(cqil, model.num_layers)
    )
