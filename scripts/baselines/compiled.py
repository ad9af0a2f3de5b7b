"""A plain tensor-parallel decoder under torch.compile, as a baseline: static KV cache, one token per pass.

It uses only what PyTorch offers: NCCL's all-reduce after attention and MLP, CUDA graphs by mode="reduce-overhead".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import nn

from cqil_trt.shard import RankPlan


class TensorParallelDecoder(nn.Module):
    """One rank's part. `weights`: the tensors of a plan of placement tensor, or of one rank, by name; batch 1.

    `rotary`: inverse frequencies [head_dim / 2].
    """

    def __init__(self, plan: RankPlan, weights: Mapping[str, torch.Tensor], rotary: torch.Tensor, length: int):
        super().__init__()
        self._plan, self._weights = plan, weights
        some = next(iter(weights.values()))
        angles = torch.arange(length, device=some.device)[:, None] * rotary.to(some.device).float()
        scale = plan.model.rope.attention_factor
        self.register_buffer("_cos", (scale * angles.cos()).repeat(1, 2).to(some.dtype))
        self.register_buffer("_sin", (scale * angles.sin()).repeat(1, 2).to(some.dtype))
        self.register_buffer("_positions", torch.arange(length, device=some.device))
        dim = plan.model.head_dim
        self._cache = {
            index: some.new_zeros(2, 1, shard.num_kv_heads, length, dim) for index, shard in plan.layers.items()
        }

    def forward(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The logits [vocabulary] of the token after `token` [1], which is at `position` [1]."""
        w, model = self._weights, self._plan.model
        x = F.embedding(token, w["embedding.weight"])
        for index, shard in self._plan.layers.items():
            name = f"layers.{index}"
            normed = self._norm(x, w[f"{name}.attention_norm.weight"])
            qkv = F.linear(normed, w[f"{name}.qkv.weight"], w.get(f"{name}.qkv.bias"))
            heads = qkv.view(1, 1, -1, model.head_dim).transpose(1, 2)
            q, k, v = heads.split([shard.num_heads, shard.num_kv_heads, shard.num_kv_heads], dim=1)
            keys, values = self._cache[index]
            keys.index_copy_(2, position, self._rotate(k, position))
            values.index_copy_(2, position, v)
            seen = (self._positions <= position)[None, None, None]
            grouped = shard.num_heads != shard.num_kv_heads
            attended = F.scaled_dot_product_attention(self._rotate(q, position), keys, values, seen, enable_gqa=grouped)
            x = x + self._sum(F.linear(attended.transpose(1, 2).reshape(1, -1), w[f"{name}.o.weight"]))
            normed = self._norm(x, w[f"{name}.mlp_norm.weight"])
            gate, up = F.linear(normed, w[f"{name}.gate_up.weight"]).chunk(2, -1)
            x = x + self._sum(F.linear(F.silu(gate) * up, w[f"{name}.down.weight"]))
        logits = F.linear(self._norm(x, w["final_norm.weight"]), w["lm_head.weight"])[0]
        if self._plan.world_size == 1:
            return logits
        return functional.all_gather_tensor(logits, 0, dist.group.WORLD)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._plan.model.rms_norm_eps)
        return weight * wide.to(x.dtype)

    def _rotate(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * self._cos[position] + torch.cat((-second, first), -1) * self._sin[position]

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._plan.world_size == 1 else functional.all_reduce(x, "sum", dist.group.WORLD)
