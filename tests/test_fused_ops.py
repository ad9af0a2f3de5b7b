"""Deferring and joining operations changes nothing of what the decoder computes, on any rank of any schedule."""

import pytest
import torch
from support import SEED
from support.cases import ARCHITECTURES, FAMILIES, assert_close, rank_shapes
from support.checkpoints import make_model, rank_weights
from support.fake_ops import Alone

from cqil_trt.backends.torch.ops import TorchOps
from cqil_trt.checkpoint import Checkpoint
from cqil_trt.config import CqilConfig, EngineLimits
from cqil_trt.gpu.fused_ops import FusedOps
from cqil_trt.network.decoder import decode
from cqil_trt.shard import plan


class FusedTorchOps(FusedOps, TorchOps):
    """What the kernels are defined to compute, in PyTorch; counts them."""

    calls = 0

    def fused_project(self, x, name, norm=None, delta=None, residual=None, gated=None, scale=1.0):
        self.calls += 1
        assert norm is None or not self.plan.model.wide_norms
        if norm is not None:
            x = TorchOps.rms_norm(self, x if delta is None else x + delta, norm)
        out = TorchOps.project(self, x, name)
        if gated:
            out = {"silu": TorchOps.swiglu, "gelu_tanh": TorchOps.geglu}[gated](self, out)
        return scale * out if residual is None else scale * out + residual

    def project_and_add(self, x, name, residual, scale):
        out = self.fused_project(x, name, scale=scale)
        return out, out + residual

    def fused_norm(self, x, delta, name):
        self.calls += 1
        return TorchOps.rms_norm(self, x if delta is None else x + delta, name)

    def fused_post_norm(self, delta, name, residual, following):
        self.calls += 1
        total = residual + TorchOps.rms_norm(self, delta, name)
        return total, total if following is None else TorchOps.rms_norm(self, total, following)

    def fused_scale(self, x, factor, cap):
        self.calls += 1
        x = x * factor
        return x if cap is None else TorchOps.soft_cap(self, x, cap)

    def fused_add(self, x, y):
        self.calls += 1
        return x + y

    def rows(self, x, indices):
        return TorchOps.select(self, x, indices)

    def zeros_like(self, x):
        return super().zeros_like(self.keep(x))

    positions, cached_attention = TorchOps.positions, TorchOps.cached_attention

    def attention(self, qkv, positions, shard):
        return TorchOps.attention(self, self.keep(qkv), positions, shard)

    def split_heads(self, qkv, shard):
        return TorchOps.split_heads(self, qkv, shard)

    def rotary(self, x, positions, which):
        return TorchOps.rotary(self, self.keep(x), positions, which)

    def head_squares(self, q, k, like, shard):
        return TorchOps.head_squares(self, q, k, self.keep(like), shard)

    def zeros_after(self, x, squares):
        return TorchOps.zeros_after(self, self.keep(x), squares)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *FAMILIES])
def test_fused_operations_compute_the_same(name, tmp_path):
    architecture, changes = {**ARCHITECTURES, **FAMILIES}[name]
    directory = make_model(tmp_path, architecture, seed=SEED, rms_norm_eps=1e-2, **changes)
    checkpoint = Checkpoint(directory, None)
    limits = EngineLimits(max_batch_size=2, max_seq_len=32)
    for shape in rank_shapes(checkpoint.model):
        for rank in plan(checkpoint.model, CqilConfig(**shape)):
            weights = rank_weights(rank, checkpoint.reader)
            plain, fused = (
                kind(rank, weights, Alone.of(rank.schedule), limits, checkpoint.rotary)
                for kind in (TorchOps, FusedTorchOps)
            )
            for new, past in ((7, 0), (1, 7), (1, 8)):
                tokens = torch.randint(checkpoint.model.vocab_size, (2, new))
                select = torch.full((2, 1), new - 1)
                given = tokens, torch.full((2,), past), select
                expected, found = decode(plain, *given), decode(fused, *given)
                assert isinstance(found, torch.Tensor)
                if expected.is_floating_point():
                    assert_close(name, found, expected)


@pytest.mark.parametrize("shape", [{"p": 1}, {"p": 2, "start": 0, "end": 6}])
def test_a_layer_takes_four_products_and_nothing_else(shape, tmp_path):
    """Also a layer of a group, next to the all-reduce at its end."""
    checkpoint = Checkpoint(make_model(tmp_path, seed=SEED), None)
    rank = plan(checkpoint.model, CqilConfig(**shape))[0]
    weights = rank_weights(rank, checkpoint.reader)
    ops = FusedTorchOps(
        rank,
        weights,
        Alone.of(rank.schedule),
        EngineLimits(max_batch_size=1, max_seq_len=32),
        checkpoint.rotary,
    )
    decode(
        ops, torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
    )
    layers = checkpoint.model.num_layers // shape["p"]
    assert ops.calls == 4 * layers + 1  # and the last projection
