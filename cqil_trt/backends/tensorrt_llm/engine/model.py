"""The decoder as a TensorRT-LLM model, for `trtllm-build --model_cls_file THIS --model_cls_name CqilForCausalLM`.

This is a second, thin definition next to network/decoder.py. TensorRT-LLM's modules own the parameters, their names and
the KV cache, and its attention module includes the projections, so an `Ops` would have nothing left to do. It differs
from the stock LLaMA model in what joins the ranks. Outside the groups, layers are tensor-parallel. Inside a group, each
rank runs one whole layer, at the same place in its list, and one all-reduce joins the group (docs/tensorrt-llm.md).

The checkpoint's config.json says under `cqil` which layers are grouped, and which join the ranks only once;
checkpoint.py writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorrt as trt
from tensorrt_llm._common import default_trtnet
from tensorrt_llm.functional import (
    AttentionMaskType,
    PositionEmbeddingType,
    Tensor,
    _create_tensor,
    allreduce,
)
from tensorrt_llm.layers import Attention, ColumnLinear, Embedding, GatedMLP, RmsNorm
from tensorrt_llm.models.modeling_utils import DecoderLayerList, DecoderModelForCausalLM
from tensorrt_llm.module import Module

from cqil_trt.backends.tensorrt_llm.versions import attention_arguments, load_plugins
from cqil_trt.gpu import abi, tensorrt_plugins

# Our plugins must be registered before a network uses them, and before an engine that has them is read.
load_plugins()


class CqilDecoderLayer(Module):
    """Place `layer_idx` in a rank's list: its share of a layer, or a layer of a concurrent group.

    Takes and returns the residual stream and its norm, both [tokens, hidden] (or [batch, length, hidden]): the join
    after a layer also computes the next layer's norm. `following`: that norm's module.
    """

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        cqil, mapping = config.cqil, config.mapping
        self.grouped = cqil["grouped"][layer_idx]
        # Older checkpoints do not have it: no join was dropped.
        self._one_join = cqil.get("one_join", cqil["grouped"])[layer_idx]
        self._cqil, self._group = cqil, mapping.tp_group
        self._dtype = config.dtype
        # A layer of a group is not split. `_join` joins the ranks, never the matrices.
        split = {"tp_group": None, "tp_size": 1 if self.grouped else mapping.tp_size}
        norm = {"normalized_shape": config.hidden_size, "eps": config.norm_epsilon, "dtype": config.dtype}
        self.input_layernorm = RmsNorm(**norm)
        self.attention = Attention(
            **attention_arguments(Attention, config, layer_idx),
            local_layer_idx=layer_idx,
            hidden_size=config.hidden_size,
            attention_head_size=config.head_size,
            num_attention_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            dtype=config.dtype,
            attention_mask_type=AttentionMaskType.causal,
            bias=cqil["qkv_bias"],
            dense_bias=cqil["o_bias"],
            position_embedding_type=PositionEmbeddingType.rope_gpt_neox,
            rotary_embedding_base=config.rotary_base,
            rotary_embedding_scaling=config.rotary_scaling,
            tp_rank=0 if self.grouped else mapping.tp_rank,
            quant_mode=config.quant_mode,
            **split,
        )
        self.post_layernorm = RmsNorm(**norm)
        self.mlp = GatedMLP(
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            bias=cqil["mlp_bias"],
            dtype=config.dtype,
            quant_mode=config.quant_mode,
            **split,
        )
        self.following: list[RmsNorm] = []  # a list, so that it is not this module's child

    def forward(
        self,
        hidden_states: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        spec_decoding_params: Any = None,
        kv_cache_params: Any = None,
        attention_params: Any = None,
        **_: Any,
    ) -> Any:
        x, normed = hidden_states
        attended = self.attention(
            normed,
            attention_mask=attention_mask,
            use_cache=use_cache,
            spec_decoding_params=spec_decoding_params,
            kv_cache_params=kv_cache_params,
            attention_params=attention_params,
        )
        attended, presents = attended if use_cache else (attended, None)
        if self._one_join:
            delta = self._own_change(x, attended)
        else:
            x, normed = self._join(attended, x, self.post_layernorm)
            delta = self.mlp(normed)
        joined = self._join(delta, x, self.following[0])
        return (joined, presents) if use_cache else joined

    def _own_change(self, x: Tensor, a: Tensor) -> Tensor:
        """The change that this rank's layer of a group, or its share of a layer, makes before any join."""
        distance = self._cqil["d"] if self.grouped else 0
        attended = a + self._bypass(a, distance) if distance else a
        changed = self.mlp(self.post_layernorm(x + attended))
        return changed + (attended if self._cqil["bypass"] == "residual" else a)

    def _join(self, delta: Tensor, residual: Tensor, norm: RmsNorm) -> tuple[Tensor, Tensor]:
        """residual + the sum of every rank's delta, and its norm."""
        if self._cqil["collective"] == "plugin":
            fields = {"mode": 2, "eps": norm.eps, "dtype": abi.dtype_code(self._dtype), "shared": 1}
            total, normed = _plugin("CqilAllReduce", [delta, residual, norm.weight.value], fields)
            return total, normed
        total = residual + allreduce(delta, self._group)
        return total, norm(total)

    def _bypass(self, x: Tensor, distance: int) -> Tensor:
        fields = {"distance": distance, "dtype": abi.dtype_code(self._dtype), "shared": 1}
        return _plugin("CqilBypass", [x], fields)[0]


def _plugin(name: str, inputs: list[Tensor], fields: Mapping[str, int | float]) -> list[Tensor]:
    """The outputs of one of our plugins. It uses the process's shared workspace (field `shared`)."""
    plugin = tensorrt_plugins.create(trt, name, dict(fields))
    layer = default_trtnet().add_plugin_v2([tensor.trt_tensor for tensor in inputs], plugin)
    return [_create_tensor(layer.get_output(i), layer) for i in range(layer.num_outputs)]


class CqilTransformer(Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config: Any):
        super().__init__()
        self.vocab_embedding = Embedding(config.vocab_size, config.hidden_size, dtype=config.dtype)
        self.layers = DecoderLayerList(CqilDecoderLayer, config)
        self.ln_f = RmsNorm(normalized_shape=config.hidden_size, eps=config.norm_epsilon, dtype=config.dtype)
        layers = list(self.layers)
        norms = [layer.input_layernorm for layer in layers[1:]] + [self.ln_f]
        for layer, norm in zip(layers, norms):
            layer.following.append(norm)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
        attention_mask: Tensor | None = None,
        kv_cache_params: Any = None,
        attention_params: Any = None,
        hidden_states: Tensor | None = None,
        **_: Any,
    ) -> Any:
        x = self.vocab_embedding(input_ids)
        first = next(iter(self.layers))
        found = self.layers.forward(
            (x, first.input_layernorm(x)),
            use_cache=use_cache,
            attention_mask=attention_mask,
            kv_cache_params=kv_cache_params,
            attention_params=attention_params,
            position_ids=position_ids,
        )
        (_, normed), presents = found if use_cache else (found, None)
        return (normed, tuple(presents or ())) if use_cache else normed


class CqilForCausalLM(DecoderModelForCausalLM):
    """The model for trtllm-build. config.json names LlamaForCausalLM, which every runtime knows."""

    def __init__(self, config: Any):
        mapping = config.mapping
        if not getattr(config, "cqil", None):
            raise ValueError("config.json has no `cqil`: not a checkpoint of cqil-trt")
        if mapping.pp_size != 1 or mapping.cp_size != 1:
            raise ValueError("CQIL spreads layers over the ranks itself: neither pipeline nor context parallelism")
        lm_head = ColumnLinear(
            config.hidden_size,
            config.vocab_size,
            bias=False,
            dtype=config.dtype,
            tp_group=mapping.tp_group,
            tp_size=mapping.tp_size,
            gather_output=True,
        )
        super().__init__(config, CqilTransformer(config), lm_head)

    def prepare_attention_inputs(self, *arguments: Any, **keywords: Any) -> Any:
        """Layers of a group have more key/value heads per rank than split layers."""
        heads = list(self.config.num_kv_heads_per_layer)
        keywords |= {"attn_layer_idx": list(range(len(heads))), "num_kv_heads_per_layer": heads}
        return super().prepare_attention_inputs(*arguments, **keywords)
