"""The decoder as a model of TensorRT-LLM's PyTorch backend.

Outside the groups every rank has its share of a layer; in a group it runs a whole layer of its own, at the same place
in the list, and one all-reduce joins the group. The modules within a layer know nothing of the other ranks: each is
built with this rank's sizes, so any number of heads can be shared out, and only `Join` and the last projection
communicate. config.json says under `cqil` what a rank has; tensors are named `rank{r}.…`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensorrt_llm._torch.models.modeling_utils import DecoderModel, DecoderModelForCausalLM, register_auto_model
from tensorrt_llm._torch.modules.embedding import Embedding
from tensorrt_llm._torch.modules.gated_mlp import GatedMLP
from tensorrt_llm._torch.modules.rms_norm import RMSNorm
from tensorrt_llm.functional import PositionEmbeddingType
from torch import nn

from . import releases
from .collectives import Join, cqil_join

# FlashInfer's activation kernels take rows of multiples of 16 bytes. Added neurons are zeros.
_NEURON_MULTIPLE = 8


class CqilAttention(releases.Attention):
    """Attention of a rank's own heads, with an RMSNorm of every query and key head where the model has them.

    TensorRT-LLM's kernels want the same number of query heads for every key/value head. Where a rank's heads differ,
    some are computed more than once (`slots`), and the output projection ignores the copies.
    """

    def __init__(self, model_config: Any, place: int, share: Mapping[str, Any]):
        config, cqil = model_config.pretrained_config, model_config.pretrained_config.cqil
        rope = releases.RopeParams.from_config(config)
        super().__init__(
            hidden_size=config.hidden_size,
            num_attention_heads=len(share["query_slots"]),
            num_key_value_heads=share["num_kv_heads"],
            max_position_embeddings=config.max_position_embeddings,
            bias=cqil["qkv_bias"],
            pos_embd_params=releases.PositionalEmbeddingParams(type=PositionEmbeddingType.rope_gpt_neox, rope=rope),
            layer_idx=place,
            dtype=releases.dtype(config),
            dense_bias=cqil["o_bias"],
            config=model_config,
        )
        self.slots: list[int] = share["query_slots"]
        self.has_norms = cqil["qk_norm"]
        if self.has_norms:
            self.q_norm, self.k_norm = (_norm(config, config.head_dim) for _ in range(2))

    def apply_rope(self, q: Any, k: Any, v: Any, position_ids: Any) -> Any:
        """The place that TensorRT-LLM's attention names for norms of heads."""
        if self.has_norms:
            q, k, v = self.split_qkv(q, k, v)
            q, k = (
                norm(x.reshape(-1, self.head_dim)).view(x.shape) for norm, x in ((self.q_norm, q), (self.k_norm, k))
            )
        return super().apply_rope(q, k, v, position_ids)

    def load(self, own: _Tensors) -> None:
        """`own`: the tensors of this module."""
        dim = self.head_dim
        q = own.linear("q_proj")
        self.qkv_proj.load_weights(
            [{kind: _rows(x, self.slots, dim) for kind, x in q.items()}, own.linear("k_proj"), own.linear("v_proj")]
        )
        o = own.linear("o_proj")
        weight = o["weight"].new_zeros(o["weight"].shape[0], len(self.slots) * dim)
        for head in range(o["weight"].shape[1] // dim):
            slot = self.slots.index(head)
            weight[:, slot * dim : (slot + 1) * dim] = o["weight"][:, head * dim : (head + 1) * dim]
        self.o_proj.load_weights([{**o, "weight": weight}])
        if self.has_norms:
            _copy(self.q_norm.weight, own["q_norm.weight"])
            _copy(self.k_norm.weight, own["k_norm.weight"])


class CqilDecoderLayer(nn.Module):
    """Place `place` in a rank's list: its share of a layer, or a layer of a concurrent group.

    Takes and returns the residual stream and its norm, both [tokens, hidden]: the join after a layer also computes the
    next layer's norm, `following[0]`.
    """

    def __init__(self, model_config: Any, place: int, rank: int):
        super().__init__()
        config, cqil = model_config.pretrained_config, model_config.pretrained_config.cqil
        grouped = cqil["grouped"][place]
        self._distance = cqil["d"] if grouped else 0
        self._one_join, self._bypass_stays = cqil["one_join"][place], cqil["bypass"] == "residual"
        share = cqil["whole"] if grouped else cqil["split"][rank]
        self.input_layernorm = _norm(config, config.hidden_size)
        self.self_attn = CqilAttention(model_config, place, share)
        self.post_attention_layernorm = _norm(config, config.hidden_size)
        self._neurons = -(-share["num_neurons"] // _NEURON_MULTIPLE) * _NEURON_MULTIPLE
        self.mlp = GatedMLP(
            hidden_size=config.hidden_size,
            intermediate_size=self._neurons,
            bias=cqil["mlp_bias"],
            dtype=releases.dtype(config),
            config=model_config,
            layer_idx=place,
        )
        self.following: list[nn.Module] = []  # a list, so that it is not this module's child

    def forward(
        self, position_ids: torch.Tensor, x: torch.Tensor, normed: torch.Tensor, attn_metadata: Any, join: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        a = self.self_attn(position_ids=position_ids, hidden_states=normed, attn_metadata=attn_metadata)
        if self._one_join:
            delta = self._own_change(x, a, join)
        else:
            x, normed = join(a, x, self.post_attention_layernorm)
            delta = self.mlp(normed)
        return join(delta, x, self.following[0])

    def _own_change(self, x: torch.Tensor, a: torch.Tensor, join: Any) -> torch.Tensor:
        """The change that this rank's layer of a group, or its share of a layer, makes before any join."""
        attended = a + join.bypass(a, self._distance) if self._distance else a
        # Not the norm with a residual: it may write to its arguments, and the join needs x.
        changed = self.mlp(self.post_attention_layernorm(x + attended))
        return changed + (attended if self._bypass_stays else a)

    def load(self, own: _Tensors) -> None:
        _copy(self.input_layernorm.weight, own["input_layernorm.weight"])
        _copy(self.post_attention_layernorm.weight, own["post_attention_layernorm.weight"])
        self.self_attn.load(own.of("self_attn"))
        mlp = own.of("mlp")
        gate, up, down = mlp.linear("gate_proj"), mlp.linear("up_proj"), mlp.linear("down_proj")
        missing = self._neurons - gate["weight"].shape[0]
        pad = nn.functional.pad
        rows = [{kind: pad(x, (0, 0) * (x.ndim - 1) + (0, missing)) for kind, x in part.items()} for part in (gate, up)]
        self.mlp.gate_up_proj.load_weights(rows)
        self.mlp.down_proj.load_weights([{**down, "weight": pad(down["weight"], (0, missing))}])


class CqilModel(DecoderModel):
    """Embedding, layers and the last norm."""

    def __init__(self, model_config: Any):
        super().__init__(model_config)
        config, rank = model_config.pretrained_config, model_config.mapping.tp_rank
        alone = releases.on_one_rank(model_config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=releases.dtype(config))
        places = range(len(config.cqil["grouped"]))
        self.layers = nn.ModuleList([CqilDecoderLayer(alone, place, rank) for place in places])
        self.norm = _norm(config, config.hidden_size)
        norms = [*(layer.input_layernorm for layer in self.layers), self.norm]
        for layer, norm in zip(self.layers, norms[1:]):
            layer.following.append(norm)
        self.join: nn.Module = Join(model_config)

    def forward(
        self,
        attn_metadata: Any,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        lora_params: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        """The norm of the residual stream after the last layer, [tokens, hidden]."""
        if lora_params:
            raise ValueError("adapters are merged when cqil-trt builds: none can be added here")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        normed = self.layers[0].input_layernorm(x)
        for layer in self.layers:
            x, normed = layer(position_ids, x, normed, attn_metadata, self.join)
        return normed


@register_auto_model("CqilForCausalLM")
class CqilForCausalLM(DecoderModelForCausalLM[CqilModel, Any]):
    """The model that config.json names."""

    def __init__(self, model_config: Any):
        config, mapping = model_config.pretrained_config, model_config.mapping
        cqil = getattr(config, "cqil", None)
        if not cqil:
            raise ValueError("config.json has no `cqil`: not a checkpoint of cqil-trt")
        if mapping.tp_size != cqil["p"] or mapping.pp_size != 1 or mapping.cp_size != 1 or mapping.enable_attention_dp:
            raise ValueError(
                f"this checkpoint is for tensor_parallel_size {cqil['p']}, and for no other parallelism: found "
                f"{mapping.tp_size} ranks of tensor, {mapping.pp_size} of pipeline and {mapping.cp_size} of context "
                f"parallelism, attention data parallelism {'on' if mapping.enable_attention_dp else 'off'}"
            )
        own = cqil["split"][mapping.tp_rank]
        kv_heads = [(cqil["whole"] if grouped else own)["num_kv_heads"] for grouped in cqil["grouped"]]
        # The cache's manager divides by the number of ranks.
        releases.set_attention_layers(config, [heads * mapping.tp_size for heads in kv_heads])
        super().__init__(
            CqilModel(model_config),
            config=model_config,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
        )

    def load_weights(self, weights: Mapping[str, Any]) -> None:
        """`weights`: the tensors of all ranks by name. All ranks call it together."""
        config = self.model_config.pretrained_config
        own = _Tensors(weights, f"rank{self.model_config.mapping.tp_rank}")
        self.model.embed_tokens.load_weights([own.linear("model.embed_tokens")])
        for place, layer in enumerate(self.model.layers):
            layer.load(own.of(f"model.layers.{place}"))
        _copy(self.model.norm.weight, own["model.norm.weight"])
        _copy(self.lm_head.weight, own["lm_head.weight"])
        if config.cqil["collective"] == "plugin":
            dtype = str(releases.dtype(config)).removeprefix("torch.")
            self.model.join = cqil_join(self.model_config, config.hidden_size, dtype) or self.model.join


class _Tensors:
    """The tensors of a checkpoint whose names begin with `prefix`."""

    def __init__(self, weights: Mapping[str, Any], prefix: str):
        self._weights, self._prefix = weights, prefix

    def of(self, module: str) -> _Tensors:
        return _Tensors(self._weights, f"{self._prefix}.{module}")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._weights[f"{self._prefix}.{name}"][:]  # [:] reads what a loader may have left in the file

    def linear(self, name: str) -> dict[str, torch.Tensor]:
        """Weight and, if there is one, bias of a projection."""
        kinds = [kind for kind in ("weight", "bias") if f"{self._prefix}.{name}.{kind}" in self._weights]
        return {kind: self[f"{name}.{kind}"] for kind in kinds}


def _rows(x: torch.Tensor, heads: list[int], dim: int) -> torch.Tensor:
    """The rows of these heads, in this order."""
    return x.view(-1, dim, *x.shape[1:])[heads].flatten(0, 1)


def _norm(config: Any, size: int) -> RMSNorm:
    return RMSNorm(hidden_size=size, eps=config.rms_norm_eps, dtype=releases.dtype(config))


def _copy(parameter: torch.Tensor, value: torch.Tensor) -> None:
    parameter.data.copy_(value)
