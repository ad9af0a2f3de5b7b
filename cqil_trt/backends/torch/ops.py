"""Executes the decoder on the CPU: PyTorch computes each operation as the decoder calls it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from cqil_trt.backends.torch.kv_cache import Fp8Values, fp8_codes
from cqil_trt.collectives import Communicator
from cqil_trt.config import KV_FP8, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.network.ops import Ops
from cqil_trt.network.rotary import Tables, decode_tables, prompt_tables
from cqil_trt.schedule import Peers
from cqil_trt.shard import LayerShard, RankPlan


@dataclass(frozen=True, kw_only=True)
class TorchPositions:
    """Positions of the new tokens, shared by all layers of a forward pass.

    `slots`: their places in the KV cache, a slice where they are neighbours. `past` is the common number of cached
    tokens, or None when sequences differ; queries see cached positions from `first` up to `length`; `mask`
    [B, 1, T, length - first] True where a query sees a key, None when `causal` or everything is seen. `rotary`: cos and
    sin (negative in the first half) of each of the model's rotary embeddings, [B or 1, 1, T, D], for each rotated
    element of a head. `windowed`: the same for layers with a window; None where it is as long as the past. Its `index`,
    `past`, `first` and `length` are places in the cache, which differ from positions where that is a circle.
    """

    index: torch.Tensor  # [B, T]
    slots: slice | torch.Tensor
    past: int | None
    length: int
    rotary: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    mask: torch.Tensor | None
    causal: bool
    first: int = 0
    windowed: TorchPositions | None = None


def _zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory when they are used: numpy asks for them with calloc, where PyTorch writes them."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class TorchOps(Ops[torch.Tensor]):
    """Executes on the device the weights are on.

    `rotary`: as in `Engine`. `slots`: sequences that the KV cache holds, by default as many as a pass takes.
    `products`: those of projections without a dense matrix. `communicators`: for the kinds of peers that the rank has.
    Without `begin`, sequence b of a pass is in slot b, and its tokens are generated.
    """

    def __init__(
        self,
        plan: RankPlan,
        weights: Mapping[str, torch.Tensor],
        communicators: Mapping[Peers, Communicator],
        limits: EngineLimits,
        rotary: Sequence[float],
        slots: int | None = None,
        products: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    ):
        slots, max_seq_len = slots or limits.max_batch_size, limits.max_seq_len
        dtype = getattr(torch, limits.dtype)
        self.plan = plan
        self._weights, self._products = self._with_offsets(weights), products or {}
        self._communicators = communicators
        self._dtype = dtype
        # The last value that all ranks hold, so that validation can compare their bits.
        self.joined: torch.Tensor | None = None
        self._eps = plan.model.rms_norm_eps
        self._epsilon = torch.tensor(self._eps)
        self._frequencies = rotary
        self._ropes = range(len(plan.model.ropes))
        self._decoding = tuple(self._rows(decode_tables(plan.model, rotary, max_seq_len, i)) for i in self._ropes)
        self._tables = self._decoding
        self._slots: Sequence[int] | None = None
        self._limits = limits
        self._fp8_values = Fp8Values(dtype) if limits.kv_dtype == KV_FP8 else None
        cached = torch.uint8 if self._fp8_values else dtype
        # Zeros, not uninitialised memory: a masked position has weight 0, and 0 * NaN is NaN.
        try:
            self._cache = {
                index: _zeros(2, slots, shard.num_kv_heads, length, plan.model.head_dim, dtype=cached).unbind()
                for index, shard in plan.layers.items()
                if shard.num_heads
                for length in (limits.cache_length(plan.model.window_of(index)),)
            }
        except MemoryError:
            raise UserError(
                f"no memory for the KV cache of {slots} sequences of {max_seq_len} tokens: build with a smaller "
                "--max-batch-size or --max-seq-len"
            ) from None
        self._kv_index = {
            index: torch.tensor(shard.kv_index) for index, shard in plan.layers.items() if not shard.grouped
        }

    def _rows(self, tables: Tables) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [1 or B, 1, positions, D], for each element of a head."""
        cos, sin = (torch.from_numpy(table).reshape(-1, 1, *table.shape[-2:]) for table in tables)
        return torch.cat((cos, cos), -1).to(self._dtype), torch.cat((-sin, sin), -1).to(self._dtype)

    def _with_offsets(self, weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The weights, those of norms as what they multiply by."""
        model = self.plan.model
        if not model.wide_norms:
            return weights
        offset = 1.0 if model.offset_norms else 0.0
        return {name: w.float() + offset if name.endswith("_norm.weight") else w for name, w in weights.items()}

    def begin(self, slots: Sequence[int], length: int | None) -> None:
        """The next passes take sequences in these slots: part of a prompt of `length` tokens, or generated ones."""
        self._tables = tuple(self._prompt_rows(i, length) or self._decoding[i] for i in self._ropes)
        self._slots = slots

    def _prompt_rows(self, which: int, length: int | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The rows of a prompt that have other frequencies than generated tokens."""
        tables = None if length is None else prompt_tables(self.plan.model, self._frequencies, [length], which)
        return None if tables is None else self._rows(tables)

    def positions(self, tokens: torch.Tensor, past: torch.Tensor) -> TorchPositions:
        batch, new = tokens.shape
        numbers = range(batch) if self._slots is None else self._slots
        first = numbers[0]
        together = list(numbers) == list(range(first, first + batch))
        slots = slice(first, first + batch) if together else torch.tensor(numbers)
        pasts = past.tolist()
        common = pasts[0] if len(set(pasts)) == 1 else None
        length = max(pasts) + new
        if common is not None:
            index = torch.arange(common, length)[None, :]
            rotary = tuple((cos[:, :, common:length], sin[:, :, common:length]) for cos, sin in self._tables)
            causal = common == 0 and new > 1
            masked = new > 1 and not causal
        else:
            index = past[:, None] + torch.arange(new)
            rotary = tuple((cos[0, 0, index][:, None], sin[0, 0, index][:, None]) for cos, sin in self._tables)
            causal, masked = False, True
        mask = (torch.arange(length) <= index[..., None])[:, None] if masked else None
        found = TorchPositions(
            index=index, slots=slots, past=common, length=length, rotary=rotary, mask=mask, causal=causal
        )
        window = self.plan.model.sliding_window
        if window is None or length <= window:
            return found
        first = max(0, min(pasts) + 1 - window)
        # A single token of each sequence sees all from `first` on, if their pasts are equal.
        hidden = masked or causal
        keys = torch.arange(first, length)[None]
        windowed = replace(found, first=first, causal=False)
        circle = self._limits.cache_length(window)
        if length > circle:
            index, begin = index % circle, first % circle
            if begin + length - first <= circle:  # what is seen lies together
                windowed = replace(windowed, first=begin, length=begin + length - first)
            else:
                # In every place the last position that was written there, or one that nobody sees.
                last = past[:, None] + (new - 1)
                keys, hidden = last - (last - torch.arange(circle)) % circle, True
                keys[keys < 0] = length
                windowed = replace(windowed, first=0, length=circle)
            start = None if common is None or common % circle + new > circle else common % circle
            windowed = replace(windowed, index=index, past=start)
        seen = (keys[:, None] <= found.index[..., None]) & (keys[:, None] > found.index[..., None] - window)
        return replace(found, windowed=replace(windowed, mask=seen[:, None] if hidden else None))

    def embedding(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self._weights["embedding.weight"])

    def project(self, x: torch.Tensor, name: str) -> torch.Tensor:
        bias = self._weights.get(f"{name}.bias")
        product = self._products.get(name)
        if product is None:
            return F.linear(x, self._weights[f"{name}.weight"], bias)
        return product(x) if bias is None else product(x) + bias

    def rms_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self._weights[f"{name}.weight"]
        if x.dtype == torch.float32:
            squares = (x * x).sum(-1, keepdim=True)
            return x.mul(torch.add(self._epsilon, squares, alpha=1 / x.shape[-1]).rsqrt_()).mul_(weight)
        # Rounded before the weight, as Hugging Face does for most families.
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        return (wide * weight).to(x.dtype) if self.plan.model.wide_norms else weight * wide.to(x.dtype)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def geglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    def soft_cap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        return (x / cap).tanh_() * cap

    def zeros_like(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    def select(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))

    def split_heads(self, qkv: torch.Tensor, shard: LayerShard) -> tuple[torch.Tensor, ...]:
        batch, new, _ = qkv.shape
        heads = qkv.view(batch, new, -1, self.plan.model.head_dim).transpose(1, 2)
        return heads.split([shard.num_heads, shard.num_kv_heads, shard.num_kv_heads], dim=1)

    def head_squares(
        self, q: torch.Tensor | None, k: torch.Tensor | None, like: torch.Tensor, shard: LayerShard
    ) -> torch.Tensor:
        if q is None or k is None:
            return like.new_zeros(like.shape[0], 1, like.shape[1], 2, dtype=torch.float32)
        k = k[:, slice(*shard.owned_kv_heads(self.plan.model.group_size))]
        return torch.cat([x.float().square().sum((1, 3), keepdim=True) for x in (q, k)], -1)

    def zeros_after(self, x: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    def scale_heads(self, x: torch.Tensor, squares: torch.Tensor, which: int, name: str) -> torch.Tensor:
        model = self.plan.model
        count = (model.num_kv_heads if which else model.num_heads) * model.head_dim
        factor = torch.rsqrt(squares[..., which, None] / count + self._eps)
        weight = self._weights[f"{name}.weight"].view(x.shape[1], 1, x.shape[3])
        return (x.float() * factor * weight).to(x.dtype)

    def rotary(self, x: torch.Tensor, positions: TorchPositions, which: int) -> torch.Tensor:
        cos, sin = positions.rotary[which]
        dim = cos.shape[-1]
        if dim < x.shape[-1]:
            turning, rest = x.split([dim, x.shape[-1] - dim], -1)
            return torch.cat((torch.addcmul(turning * cos, torch.roll(turning, dim // 2, -1), sin), rest), -1)
        return torch.addcmul(x * cos, torch.roll(x, dim // 2, -1), sin)

    def attention(self, qkv: torch.Tensor, positions: TorchPositions, shard: LayerShard) -> torch.Tensor:
        which = self.plan.model.rope_of(shard.index)
        if self.plan.model.qk_norm or which is None:
            return super().attention(qkv, positions, shard)
        # Queries and keys are adjacent and rotate together: every operation counts in a decode step.
        batch, new, _ = qkv.shape
        heads = qkv.view(batch, new, -1, self.plan.model.head_dim).transpose(1, 2)
        turning, v = heads.split([shard.num_heads + shard.num_kv_heads, shard.num_kv_heads], dim=1)
        q, k = self.rotary(turning, positions, which).split([shard.num_heads, shard.num_kv_heads], dim=1)
        return self.cached_attention(q, k, v, positions, shard)

    def cached_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: TorchPositions, shard: LayerShard
    ) -> torch.Tensor:
        model = self.plan.model
        if positions.windowed is not None and model.window_of(shard.index) is not None:
            positions = positions.windowed
        batch, heads, new, dim = q.shape
        keys, values = self._cache[shard.index]
        key_scale, value_scale = self._limits.scales_of(shard.index)
        if self._fp8_values is not None:
            k, v = fp8_codes(k, key_scale), fp8_codes(v, value_scale)
        slots = positions.slots
        if positions.past is not None and isinstance(slots, slice):
            keys[slots].narrow(2, positions.past, new).copy_(k)
            values[slots].narrow(2, positions.past, new).copy_(v)
        else:
            rows = torch.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots
            keys[rows[:, None], :, positions.index] = k.transpose(1, 2)
            values[rows[:, None], :, positions.index] = v.transpose(1, 2)
        # A slice is a view; slots that are apart are copied.
        seen = positions.first, positions.length - positions.first
        keys, values = (part.narrow(2, *seen)[slots] for part in (keys, values))
        if not shard.grouped:
            index = self._kv_index[shard.index]
            keys, values = keys[:, index], values[:, index]
        elif new == 1:
            # Treats the query heads of a key/value head as its queries, so the cache is not copied for grouped heads.
            q = q.view(batch, shard.num_kv_heads, -1, dim)
        scale = model.query_scale
        if self._fp8_values is not None:
            # Scores and results are scaled, not keys and values.
            keys, values = self._fp8_values(keys), self._fp8_values(values)
            scale = key_scale * (model.head_dim**-0.5 if scale is None else scale)
        if model.attention_cap is not None:
            out = self._capped_attention(q, keys, values, positions, scale, model.attention_cap)
        else:
            gqa = keys.shape[1] != q.shape[1]
            out = F.scaled_dot_product_attention(
                q, keys, values, positions.mask, is_causal=positions.causal, enable_gqa=gqa, scale=scale
            )
        if value_scale != 1:
            out = out * value_scale
        if new > 1:
            out = out.transpose(1, 2)
        return out.reshape(batch, new, heads * dim)

    def _capped_attention(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: TorchPositions,
        scale: float | None,
        cap: float,
    ) -> torch.Tensor:
        """Attention whose scores are capped before they are masked, which PyTorch's own does not do."""
        scale = scale or self.plan.model.head_dim**-0.5
        if keys.shape[1] != q.shape[1]:
            keys, values = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (keys, values))
        scores = self.soft_cap(q @ keys.transpose(2, 3) * scale, cap)
        mask = positions.mask
        if positions.causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            scores.masked_fill_(~mask, -torch.inf)
        return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values

    def copy_cache(self, source: int, target: int, count: int) -> None:
        """Copies the first `count` tokens of a slot to another one."""
        for parts in self._cache.values():
            for part in parts:
                part[target, :, :count] = part[source, :, :count]

    def all_reduce_residual(
        self, delta: torch.Tensor, residual: torch.Tensor, peers: Peers = Peers.ALL
    ) -> torch.Tensor:
        out = self._communicators[peers].all_reduce_residual(delta, residual)
        if peers is Peers.ALL:
            self.joined = out
        return out

    def all_reduce(self, x: torch.Tensor, peers: Peers = Peers.ALL) -> torch.Tensor:
        out = self._communicators[peers].all_reduce(x)
        if peers is Peers.ALL:
            self.joined = out
        return out

    def all_reduce_squares(self, x: torch.Tensor, peers: Peers) -> torch.Tensor:
        return self._communicators[peers].all_reduce(x)

    def broadcast(self, x: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
        if x is None:
            x = torch.empty(*tokens.shape, self.plan.model.hidden_size, dtype=self._dtype)
        return self._communicators[Peers.ALL].broadcast(x)

    def bypass(self, x: torch.Tensor, d: int) -> torch.Tensor | None:
        return self._communicators[Peers.PART].bypass(x, d)
