"""The definition of CQIL in float64, from raw weights: no module of transformers or of this project."""

import torch
import torch.nn.functional as F


class Formulas:
    """A decoder with the weights `state`, under Hugging Face's names, which may require gradients.

    `config`: the Hugging Face model's.
    """

    def __init__(self, config, state):
        self.w = {name: tensor.double() for name, tensor in state.items()}
        self.layers, self.heads, self.kv_heads = (
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.dim, self.eps = config.head_dim, config.rms_norm_eps
        self.theta = config.rope_parameters["rope_theta"]

    def norm(self, x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.w[f"{name}.weight"]

    def rotate(self, x):
        positions = torch.arange(x.shape[-2]).double()[:, None]
        angles = positions * self.theta ** (-2 * torch.arange(self.dim // 2).double() / self.dim)
        pairs = torch.complex(x[..., : self.dim // 2], x[..., self.dim // 2 :]) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.cat((pairs.real, pairs.imag), -1)

    def columns(self, x, name, first, last, bias):
        """x [..., columns from first to last] by these columns of a matrix."""
        out = x @ self.w[f"{name}.weight"][:, first:last].T
        return out + self.w[f"{name}.bias"] if bias and f"{name}.bias" in self.w else out

    def rows(self, x, name, first=0, last=None):
        out = x @ self.w[f"{name}.weight"][first:last].T
        return out + self.w[f"{name}.bias"][first:last] if f"{name}.bias" in self.w else out

    def attention(self, x, i, part=0, parts=1):
        """The contribution of a rank's heads, where `parts` ranks share the layer; of all heads by default."""
        block = f"model.layers.{i}.self_attn"

        def project(name, heads):
            out = self.rows(x, f"{block}.{name}_proj").unflatten(-1, (heads, self.dim)).transpose(1, 2)
            return self.norm(out, f"{block}.{name}_norm") if f"{block}.{name}_norm.weight" in self.w else out

        q, k, v = project("q", self.heads), project("k", self.kv_heads), project("v", self.kv_heads)
        q, k = self.rotate(q), self.rotate(k)
        first, last = self.heads * part // parts, self.heads * (part + 1) // parts
        out = [x.new_zeros(*x.shape[:2], 0)]
        for h in range(first, last):
            group = h * self.kv_heads // self.heads
            scores = q[:, h] @ k[:, group].transpose(1, 2) / self.dim**0.5
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
            out.append(scores.softmax(-1) @ v[:, group])
        return self.columns(
            torch.cat(out, -1), f"{block}.o_proj", first * self.dim, last * self.dim, bias=part == parts - 1
        )

    def mlp(self, x, i, part=0, parts=1):
        """The contribution of a rank's neurons to the MLP of normalised x."""
        block = f"model.layers.{i}.mlp"
        size = len(self.w[f"{block}.gate_proj.weight"])
        first, last = size * part // parts, size * (part + 1) // parts
        gate, up = (self.rows(x, f"{block}.{name}_proj", first, last) for name in ("gate", "up"))
        return self.columns(F.silu(gate) * up, f"{block}.down_proj", first, last, bias=part == parts - 1)

    def dropped(self, x, i, parts):
        """What layer i adds to x if `parts` ranks share it without a join after attention."""
        delta = 0
        for part in range(parts):
            a = self.attention(self.norm(x, f"model.layers.{i}.input_layernorm"), i, part, parts)
            normed = self.norm(x + a, f"model.layers.{i}.post_attention_layernorm")
            delta = delta + a + self.mlp(normed, i, part, parts)
        return delta

    def logits(
        self,
        ids,
        p=1,
        d=0,
        start=0,
        end=0,
        bypass="mlp",
        placement="sharded",
        drop_attention_join=(),
        ranks_per_layer=1,
    ):
        """Logits [B, T, vocabulary] of ids [B, T]. The placement changes nothing."""
        x = self.w["model.embed_tokens.weight"][ids]
        i = 0
        while i < self.layers:
            grouped = p > 1 and start <= i < end
            if i in drop_attention_join and not grouped:
                x, i = x + self.dropped(x, i, p * ranks_per_layer), i + 1
                continue
            group = range(i, i + (p if start <= i < end else 1))
            a = [self.attention(self.norm(x, f"model.layers.{layer}.input_layernorm"), layer) for layer in group]
            delta = 0
            for j, layer in enumerate(group):
                if layer in drop_attention_join:
                    assert d == 0
                    delta = delta + self.dropped(x, layer, ranks_per_layer)
                    continue
                b = sum(a[max(0, j - d) : j], torch.zeros_like(x))
                m = self.mlp(self.norm(x + a[j] + b, f"model.layers.{layer}.post_attention_layernorm"), layer)
                delta = delta + a[j] + m + (b if bypass == "residual" else 0)
            x, i = x + delta, i + len(group)
        head = "lm_head" if "lm_head.weight" in self.w else "model.embed_tokens"
        return self.norm(x, "model.norm") @ self.w[f"{head}.weight"].T
