"""Stand-ins for the parts of TensorRT-LLM's PyTorch backend that the exported model uses, on CPUs and MPI.

They do what its developer guide, its docstrings and its out-of-tree example say of each module, in float32, and check
every call against the signatures in trtllm_pytorch_api.json. What is easily got wrong is as it is there: models are
made with their parameters on the meta device, weights do not exist before the model is complete, configurations are
frozen, a norm with a residual writes to its arguments, and the KV cache is paged, with as many heads for each layer as
the configuration says for all ranks together.
"""

from __future__ import annotations

import copy
import enum
import importlib.machinery
import json
import math
import sys
import time
import types
from collections import Counter
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any_only

from support.trtllm_contract import Contract

API = json.loads((Path(__file__).parent / "trtllm_pytorch_api.json").read_text())
PAGE = 4  # tokens


class Signatures(Contract):
    """One release's signatures, and the modules that its symbols are in."""

    def __init__(self, version: str):
        self.symbols, self.called = API[version]["symbols"], Counter()
        self.modules_of = API[version]["modules"]

    def taken(self, symbol: str, arguments: Any, keywords: Any) -> dict[str, Any]:
        return self.bind(symbol, *arguments, **keywords).arguments


class MetaInit(TorchDispatchMode):
    """Inside, empty tensors are made on the meta device, and nothing may be computed with them."""

    made = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function in self.made:
            return function(*arguments, **{**keywords, "device": "meta"})
        if tree_any_only(torch.Tensor, lambda x: x.is_meta, (arguments, keywords)):
            raise RuntimeError(f"a parameter without a value is used in {function}")
        return function(*arguments, **keywords)


class Mapping:
    def __init__(self, world_size=1, rank=0, gpus_per_node=8, *, tp_size=1, pp_size=1, cp_size=1, **others):
        if tp_size * pp_size * cp_size != world_size or not 0 <= rank < world_size:
            raise ValueError("world_size must equal to tp_size * pp_size * cp_size")
        self.world_size, self.rank, self.tp_size, self.pp_size, self.cp_size = (
            *(world_size, rank),
            *(tp_size, pp_size, cp_size),
        )
        self.enable_attention_dp = others.get("enable_attention_dp", False)
        self.tp_rank = rank % tp_size


class ModelConfig:
    """What the executor gives a model. Frozen once it is made."""

    _frozen = False

    def __init__(self, pretrained_config: Any, mapping: Mapping):
        self.pretrained_config, self.mapping = pretrained_config, mapping
        self.allreduce_strategy, self.extra_attrs = "AUTO", {}
        self._frozen = True

    def __setattr__(self, name, value):
        if self._frozen and name != "_frozen":
            raise AttributeError(f"Cannot modify ModelConfig.{name} - instance is frozen")
        object.__setattr__(self, name, value)


class KVCacheManager:
    """Pages of a layer's keys and values. `num_kv_heads`: of all ranks together, for every layer."""

    def __init__(self, *, num_layers: int, num_kv_heads: Any, head_dim: int, mapping: Mapping):
        if isinstance(num_kv_heads, int):
            num_kv_heads = [num_kv_heads] * num_layers
        assert len(num_kv_heads) == num_layers
        self.heads = [-(-heads // mapping.tp_size) for heads in num_kv_heads]
        self.pools = [torch.full((64, 2, PAGE, heads, head_dim), math.nan) for heads in self.heads]
        self._free = list(range(64))[::-1]
        self.pages: dict[int, list[int]] = {}

    def extend(self, request: int, length: int) -> None:
        pages = self.pages.setdefault(request, [])
        while len(pages) * PAGE < length:
            pages.append(self._free.pop())


class AttentionMetadata:
    """A batch in packed form: each request's tokens, new and cached, in order."""

    def __init__(self, manager: KVCacheManager, requests: list[int], new: list[int], cached: list[int]):
        self.kv_cache_manager, self.request_ids, self.seq_lens, self.cached = manager, requests, new, cached
        self.num_tokens = sum(new)
        for request, length, past in zip(requests, new, cached):
            manager.extend(request, length + past)


class PositionEmbeddingType(enum.IntEnum):
    learned_absolute = 0
    rope_gptj = 1
    rope_gpt_neox = 2


class AllReduceFusionOp(enum.IntEnum):
    NONE = 0
    RESIDUAL_RMS_NORM = 1


class Kinds(enum.Enum):
    VANILLA, QKV, GATE_UP = 1, 3, 2
    COLUMN, ROW = "column", "row"


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def install(version: str, comm: Any) -> types.SimpleNamespace:
    """Puts the stand-ins of a release into sys.modules, for the ranks of `comm`.

    Returns what a test plays the executor with: `models` (by architecture) and `contract`.
    """
    contract, models = Signatures(version), {}

    def ranks(x: torch.Tensor) -> torch.Tensor:
        """Every rank's x, [ranks, …]."""
        parts = torch.empty(comm.Get_size(), *x.shape)
        done = comm.Iallgather(x.contiguous().numpy(), parts.numpy())
        while not done.Test():
            time.sleep(0)  # there may be more ranks than cores
        return parts

    def summed(x: torch.Tensor) -> torch.Tensor:
        total, *others = ranks(x)
        for part in others:
            total = total + part
        return total

    class AllReduceParams:
        def __init__(self, *arguments, **keywords):
            taken = contract.taken("AllReduceParams.__init__", arguments, keywords)
            self.fusion_op = taken.get("fusion_op", AllReduceFusionOp.NONE)
            self.residual, self.norm_weight = taken.get("residual"), taken.get("norm_weight")
            self.eps = taken.get("eps", 1e-6)

    class AllReduce(nn.Module):
        def __init__(self, *arguments, **keywords):
            super().__init__()
            self.mapping = contract.taken("AllReduce.__init__", arguments, keywords)["mapping"]

        def forward(self, *arguments, **keywords):
            taken = contract.taken("AllReduce.forward", arguments, keywords)
            x, params = taken["input"], taken.get("all_reduce_params")
            if self.mapping.tp_size == 1:
                return x
            total = summed(x)
            if params is None or params.fusion_op == AllReduceFusionOp.NONE:
                return total
            total = total + params.residual
            return rms_norm(total, params.norm_weight, params.eps), total

    def allgather(*arguments, **keywords):
        taken = contract.taken("allgather", arguments, keywords)
        return torch.cat(list(ranks(taken["input"])), dim=taken.get("dim", -1))

    class Linear(nn.Module):
        """Sizes are those of all ranks of `mapping`. Weights exist from `create_weights` on."""

        def __init__(self, inputs, outputs, bias, mapping, mode, kind=Kinds.VANILLA, gather=False):
            super().__init__()
            self.mapping, self.mode, self.kind, self.gather = mapping, mode, kind, gather
            p = mapping.tp_size
            self.shape = (-(-outputs // p), inputs) if mode is Kinds.COLUMN else (outputs, inputs // p)
            self.has_bias, self.weight, self.bias = bias, None, None
            self.all_reduce = AllReduce(mapping=mapping)

        def create_weights(self):
            if self.weight is None:
                self.weight = nn.Parameter(torch.empty(self.shape), requires_grad=False)
                self.bias = nn.Parameter(torch.empty(self.shape[0]), requires_grad=False) if self.has_bias else None

        def load_weights(self, *arguments, **keywords):
            parts = contract.taken("Linear.load_weights", arguments, keywords)["weights"]
            assert self.weight is not None and len(parts) == self.kind.value
            assert self.mapping.tp_size == 1, "this stand-in splits nothing while loading"
            self.weight.data.copy_(torch.cat([part["weight"] for part in parts]))
            if self.bias is not None:
                self.bias.data.copy_(torch.cat([part["bias"] for part in parts]))

        def forward(self, x):
            bias = None if self.mode is Kinds.ROW and self.mapping.tp_rank else self.bias
            x = F.linear(x, self.weight, bias)
            if self.mode is Kinds.ROW:
                return self.all_reduce(x)
            return allgather(x, self.mapping) if self.gather and self.mapping.tp_size > 1 else x

    class Embedding(nn.Module):
        def __init__(self, *arguments, **keywords):
            super().__init__()
            taken = contract.taken("Embedding.__init__", arguments, keywords)
            assert taken.get("mapping") is None
            self.weight = nn.Parameter(torch.empty(taken["num_embeddings"], taken["embedding_dim"]))

        def load_weights(self, *arguments, **keywords):
            [part] = contract.taken("LMHead.load_weights", arguments, keywords)["weights"]
            self.weight.data.copy_(part["weight"])

        def forward(self, tokens):
            return F.embedding(tokens, self.weight)

    class RMSNorm(nn.Module):
        def __init__(self, *arguments, **keywords):
            super().__init__()
            taken = contract.taken("RMSNorm.__init__", arguments, keywords)
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(taken["hidden_size"])), taken["eps"]

        def forward(self, *arguments, **keywords):
            taken = contract.taken("RMSNorm.forward", arguments, keywords)
            x, residual = taken["hidden_states"], taken.get("residual", ...)
            if residual is ...:
                return rms_norm(x, self.weight, self.variance_epsilon)
            residual += x
            x.copy_(rms_norm(residual, self.weight, self.variance_epsilon))
            return x, residual

    class GatedMLP(nn.Module):
        def __init__(self, *arguments, **keywords):
            super().__init__()
            taken = contract.taken("GatedMLP.__init__", arguments, keywords)
            hidden, neurons, bias = taken["hidden_size"], taken["intermediate_size"], taken["bias"]
            mapping = taken["config"].mapping
            assert neurons * 2 % 16 == 0  # FlashInfer's activation, in half precision
            self.gate_up_proj = Linear(hidden, 2 * neurons, bias, mapping, Kinds.COLUMN, Kinds.GATE_UP)
            self.down_proj = Linear(neurons, hidden, bias, mapping, Kinds.ROW)

        def forward(self, *arguments, **keywords):
            x = contract.taken("GatedMLP.forward", arguments, keywords)["x"]
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            return self.down_proj(F.silu(gate) * up)

    class RopeParams:
        """The frequencies that transformers computes."""

        @staticmethod
        def from_config(*arguments, **keywords):
            from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

            made = RopeParams()
            config = contract.taken("RopeParams.from_config", arguments, keywords)["config"]
            made.rotary = LlamaRotaryEmbedding(config)
            return made

        def rotate(self, positions, *x):
            """[tokens, heads * dim] each."""
            from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

            cos, sin = self.rotary(x[0], positions.view(1, -1))
            dim = cos.shape[-1]
            q, k = (part.view(1, len(part), -1, dim) for part in x)
            q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
            return [part.reshape(len(like), -1) for part, like in zip((q, k), x)]

    class PositionalEmbeddingParams:
        def __init__(self, *arguments, **keywords):
            taken = contract.taken("PositionalEmbeddingParams.__init__", arguments, keywords)
            assert taken["type"] is PositionEmbeddingType.rope_gpt_neox
            self.rope = taken["rope"]

    class Attention(nn.Module):
        # Whether rotation happens in the attention kernel, which then takes q, k and v in one.
        fused = "_torch.modules" in contract.modules_of["Attention"]

        def __init__(self, *arguments, **keywords):
            super().__init__()
            taken = contract.taken("Attention.__init__", arguments, keywords)
            config, mapping = taken["config"], taken["config"].mapping
            self.layer_idx, self.rope = taken["layer_idx"], taken["pos_embd_params"].rope
            config.extra_attrs.setdefault("attn_layers", {})[str(self.layer_idx)] = self
            heads, kv_heads, p = taken["num_attention_heads"], taken["num_key_value_heads"], mapping.tp_size
            assert heads % p == 0 and heads % kv_heads == 0
            self.head_dim = config.pretrained_config.head_dim
            self.num_heads, self.num_key_value_heads = heads // p, -(-kv_heads // p)
            self.q_size, self.kv_size = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
            hidden, bias = taken["hidden_size"], taken["bias"]
            dense_bias = bias if taken.get("dense_bias") is None else taken["dense_bias"]
            outputs = p * (self.q_size + 2 * self.kv_size)
            self.qkv_proj = Linear(hidden, outputs, bias, mapping, Kinds.COLUMN, Kinds.QKV)
            self.o_proj = Linear(p * self.q_size, hidden, dense_bias, mapping, Kinds.ROW)

        def split_qkv(self, q, k=None, v=None):
            return q.split([self.q_size, self.kv_size, self.kv_size], dim=-1) if k is None else (q, k, v)

        def apply_rope(self, q, k, v, position_ids):
            if not self.fused:
                q, k, v = self.split_qkv(q, k, v)
                q, k = self.rope.rotate(position_ids, q, k)
            return q, k, v

        def forward(self, *arguments, **keywords):
            taken = contract.taken("Attention.forward", arguments, keywords)
            metadata = taken["attn_metadata"]
            q, k, v = self.apply_rope(self.qkv_proj(taken["hidden_states"]), None, None, taken["position_ids"])
            if k is not None and self.fused:
                q, k, v = torch.cat([q, k, v], dim=-1), None, None
            q, k, v = self.split_qkv(q, k, v)
            return self.o_proj(torch.cat([*self._attend(q, k, v, metadata)]))

        def _attend(self, q, k, v, metadata):
            pool = metadata.kv_cache_manager.pools[self.layer_idx]
            assert pool.shape[3:] == (self.num_key_value_heads, self.head_dim)
            first = 0
            for request, new, past in zip(metadata.request_ids, metadata.seq_lens, metadata.cached):
                own, positions = slice(first, first + new), torch.arange(past, past + new)
                first += new
                queries, keys = q[own], k[own]
                if self.fused:
                    queries, keys = self.rope.rotate(positions, queries, keys)
                pages = metadata.kv_cache_manager.pages[request]
                for i, position in enumerate(positions.tolist()):
                    page, offset = pages[position // PAGE], position % PAGE
                    pool[page, 0, offset] = keys[i].view(-1, self.head_dim)
                    pool[page, 1, offset] = v[own][i].view(-1, self.head_dim)
                cached = pool[pages].transpose(0, 1).flatten(1, 2)[:, : past + new]
                group = self.num_heads // self.num_key_value_heads
                keys, values = cached.repeat_interleave(group, dim=2).transpose(1, 2)
                queries = queries.view(new, self.num_heads, self.head_dim).transpose(0, 1)
                mask = torch.arange(past + new) <= positions[:, None]
                found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
                yield found.transpose(0, 1).reshape(new, -1)

    class DecoderModel(nn.Module):
        def __init__(self, *arguments, **keywords):
            super().__init__()
            self.model_config = contract.taken("DecoderModel.__init__", arguments, keywords)["model_config"]

    class Complete(type):
        def __call__(cls, *arguments, **keywords):
            made = super().__call__(*arguments, **keywords)
            for module in made.modules():
                if callable(getattr(module, "create_weights", None)):
                    module.create_weights()
            return made

    model_type, config_type = TypeVar("model_type"), TypeVar("config_type")

    class DecoderModelForCausalLM(nn.Module, Generic[model_type, config_type], metaclass=Complete):
        def __init__(self, *arguments, **keywords):
            super().__init__()
            taken = contract.taken("DecoderModelForCausalLM.__init__", arguments, keywords)
            self.model, self.model_config = taken["model"], taken["config"]
            mapping, vocabulary = self.model_config.mapping, taken["vocab_size"]
            self.lm_head = Linear(taken["hidden_size"], vocabulary, False, mapping, Kinds.COLUMN, gather=True)
            self.lm_head.create_weights()
            assert not self.model_config.pretrained_config.tie_word_embeddings

        def forward(self, attn_metadata, input_ids, position_ids, return_context_logits=False):
            """Logits after each request's last token, or after every token."""
            hidden = self.model(
                attn_metadata=attn_metadata,
                input_ids=input_ids,
                position_ids=position_ids,
                inputs_embeds=None,
                spec_metadata=None,
                lora_params=None,
            )
            last = torch.tensor(attn_metadata.seq_lens).cumsum(0) - 1
            return self.lm_head(hidden if return_context_logits else hidden[last]).float()

    def register_auto_model(*arguments, **keywords):
        name = contract.taken("register_auto_model", arguments, keywords)["name"]
        return lambda cls: models.setdefault(name, cls)

    class CheckedMapping(Mapping):
        def __init__(self, *arguments, **keywords):
            contract.taken("Mapping.__init__", arguments, keywords)
            super().__init__(*arguments, **keywords)

    def known(name, value):
        def call(*arguments, **keywords):
            contract.taken(name, arguments, keywords)
            return value

        return call

    values = {
        **{kind.__name__: kind for kind in (AllReduce, AllReduceParams, Attention, DecoderModel, Embedding, GatedMLP)},
        **{kind.__name__: kind for kind in (DecoderModelForCausalLM, RMSNorm, RopeParams, PositionalEmbeddingParams)},
        "Mapping": CheckedMapping,
        "allgather": allgather,
        "register_auto_model": register_auto_model,
        "mpi_comm": known("mpi_comm", comm),
        "mpi_disabled": known("mpi_disabled", False),
    }
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tensorrt_llm", "modeling_cqil")]:
        del sys.modules[name]
    for name, value in values.items():
        setattr(_module(contract.modules_of[name]), name, value)
    functional, distributed = _module("tensorrt_llm.functional"), _module("tensorrt_llm._torch.distributed")
    functional.PositionEmbeddingType, functional.AllReduceFusionOp = PositionEmbeddingType, AllReduceFusionOp
    for name in ("AllReduce", "AllReduceParams", "allgather"):  # as its __init__ does
        setattr(distributed, name, values[name])
    distributed.AllReduceFusionOp = AllReduceFusionOp
    logger = types.SimpleNamespace(warnings=[])
    logger.warning = logger.warnings.append
    _module("tensorrt_llm.logger").logger = logger
    return types.SimpleNamespace(models=models, contract=contract, logger=logger)


def _module(name: str) -> types.ModuleType:
    """The module in sys.modules, made where it is missing, like the packages that it is in."""
    if name not in sys.modules:
        module = sys.modules[name] = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(_module(parent), last, module)
    return sys.modules[name]


class Executor:
    """What TensorRT-LLM's executor does with a model: makes it, loads it, gives it a KV cache, and runs batches."""

    def __init__(self, checkpoint: Path, stand_ins: types.SimpleNamespace, rank: int, p: int):
        from safetensors.torch import load_file
        from transformers import AutoConfig

        config = ModelConfig(AutoConfig.from_pretrained(checkpoint), Mapping(p, rank, tp_size=p))
        self._embedded: list[torch.Tensor] = []
        with MetaInit():
            self.model = stand_ins.models[config.pretrained_config.architectures[0]](copy.deepcopy(config))
        self.model._apply(lambda x: torch.full_like(x, math.nan, device="cpu") if x.is_meta else x)
        weights: dict[str, torch.Tensor] = {}
        for path in sorted(checkpoint.glob("*.safetensors")):
            weights |= load_file(path)
        self.model.load_weights(weights)
        made = self.model.model_config.pretrained_config
        self.cache = KVCacheManager(
            num_layers=made.num_hidden_layers,
            num_kv_heads=made.num_key_value_heads,
            head_dim=made.head_dim,
            mapping=config.mapping,
        )
        self._cached: dict[int, int] = {}

    @torch.inference_mode()
    def run(self, batch: dict[int, list[int]], every: bool = False) -> torch.Tensor:
        """Logits after each request's new tokens, or after `every` token. `batch`: the new tokens by request."""
        new = [len(tokens) for tokens in batch.values()]
        past = [self._cached.get(request, 0) for request in batch]
        metadata = AttentionMetadata(self.cache, list(batch), new, past)
        positions = torch.cat([torch.arange(first, first + count) for first, count in zip(past, new)])
        for request, first, count in zip(batch, past, new):
            self._cached[request] = first + count
        tokens = torch.tensor([token for own in batch.values() for token in own])
        return self.model.forward(metadata, tokens, positions[None], return_context_logits=every)
