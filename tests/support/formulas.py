"""The definition of CQIL in float64, from raw weights: no module of transformers or of this project."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}


class Formulas:
    """A decoder with the weights `state`, under Hugging Face's names, which may require gradients.

    `config`: the Hugging Face model's, of any family without scaled rotary embedding. `kv_scales`: of the keys and
    values of each layer, where a cache stores them in FP8.
    """

    def __init__(self, config, state, kv_scales=None):
        self.kv_scales = kv_scales
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim, self.eps = getattr(config, "head_dim", config.hidden_size // self.heads), config.rms_norm_eps
        self.w = {name: tensor.double() for name, tensor in self.apart(state).items()}
        self.layers = config.num_hidden_layers
        number = {name: getattr(config, name, None) for name in (*MULTIPLIERS, *CAPS, "query_pre_attn_scalar")}
        self.embedding, self.residual, self.query, logits = (number[name] or 1 for name in MULTIPLIERS)
        self.logit_scale = 1 / logits
        self.attention_cap, self.logits_cap = (number[name] for name in CAPS)
        gemma = config.model_type.startswith("gemma")
        self.offset = 1 if gemma else 0
        if gemma:
            self.embedding = config.hidden_size**0.5
            self.query = number["query_pre_attn_scalar"] ** -0.5
            self.attention_cap = self.attention_cap if config.model_type == "gemma2" else None  # Gemma 3 ignores it
        elif number["attention_multiplier"] is None:
            self.query = self.dim**-0.5
        self.activation = ACTIVATIONS[config.hidden_activation if gemma else config.hidden_act]
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * self.layers
        window = getattr(config, "sliding_window", None)
        self.windows = [window if kind == "sliding_attention" else None for kind in kinds]
        rope = config.rope_parameters
        self.thetas = [rope.get(kind, rope).get("rope_theta") for kind in kinds]
        rotated = getattr(config, "no_rope_layers", None) or [1] * self.layers
        share = rope.get("partial_rotary_factor", 1)
        self.turning = [int(self.dim * share) if turns else 0 for turns in rotated[: self.layers]]

    def apart(self, state):
        """The weights with fused matrices taken apart."""
        found = {}
        for name, tensor in state.items():
            if "qkv_proj" in name:
                sizes, parts = [self.heads * self.dim, *[self.kv_heads * self.dim] * 2], ("q_proj", "k_proj", "v_proj")
            elif "gate_up_proj" in name:
                sizes, parts = [len(tensor) // 2] * 2, ("gate_proj", "up_proj")
            else:
                found[name] = tensor
                continue
            fused = "qkv_proj" if "qkv_proj" in name else "gate_up_proj"
            found |= {name.replace(fused, part): piece for part, piece in zip(parts, tensor.split(sizes))}
        return found

    def has(self, name):
        return f"{name}.weight" in self.w

    def norm(self, x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * (self.w[f"{name}.weight"] + self.offset)

    def rotate(self, x, i):
        turning, rest = x[..., : self.turning[i]], x[..., self.turning[i] :]
        half = self.turning[i] // 2
        positions = torch.arange(x.shape[-2]).double()[:, None]
        angles = positions * self.thetas[i] ** (-torch.arange(half).double() / max(half, 1))
        pairs = torch.complex(turning[..., :half], turning[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((pairs.real, pairs.imag, rest), -1)

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
            out, norm = self.rows(x, f"{block}.{name}_proj"), f"{block}.{name}_norm"
            whole = self.has(norm) and len(self.w[f"{norm}.weight"]) == heads * self.dim > self.dim
            out = self.norm(out, norm) if whole else out
            out = out.unflatten(-1, (heads, self.dim)).transpose(1, 2)
            return self.norm(out, norm) if self.has(norm) and not whole else out

        q, k, v = project("q", self.heads), project("k", self.kv_heads), project("v", self.kv_heads)
        q, k = self.rotate(q, i), self.rotate(k, i)
        if self.kv_scales is not None:
            k, v = (fp8(x, scale) for x, scale in zip((k, v), self.kv_scales[i]))
        first, last = self.heads * part // parts, self.heads * (part + 1) // parts
        distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        hidden = (distance < 0) | (distance >= (self.windows[i] or len(distance)))
        out = [x.new_zeros(*x.shape[:2], 0)]
        for h in range(first, last):
            group = h * self.kv_heads // self.heads
            scores = cap(q[:, h] @ k[:, group].transpose(1, 2) * self.query, self.attention_cap)
            out.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, group])
        out = self.columns(
            torch.cat(out, -1), f"{block}.o_proj", first * self.dim, last * self.dim, bias=part == parts - 1
        )
        return self.contribution(out, i, "attention")

    def mlp(self, x, i, part=0, parts=1):
        """The contribution of a rank's neurons to the MLP, of x as `mlp_input` gives it."""
        block = f"model.layers.{i}.mlp"
        size = len(self.w[f"{block}.gate_proj.weight"])
        first, last = size * part // parts, size * (part + 1) // parts
        gate, up = (self.rows(x, f"{block}.{name}_proj", first, last) for name in ("gate", "up"))
        out = self.columns(self.activation(gate) * up, f"{block}.down_proj", first, last, bias=part == parts - 1)
        return self.contribution(out, i, "feedforward")

    def contribution(self, out, i, part):
        """What is added of a sub-layer's output."""
        follows = self.has(f"model.layers.{i}.post_feedforward_layernorm")
        return (self.norm(out, f"model.layers.{i}.post_{part}_layernorm") if follows else out) * self.residual

    def attention_input(self, x, i):
        name = f"model.layers.{i}.input_layernorm"
        return self.norm(x, name) if self.has(name) else x

    def mlp_input(self, x, i):
        if self.has(f"model.layers.{i}.pre_feedforward_layernorm"):
            return self.norm(x, f"model.layers.{i}.pre_feedforward_layernorm")
        follows = self.has(f"model.layers.{i}.post_feedforward_layernorm")
        return x if follows else self.norm(x, f"model.layers.{i}.post_attention_layernorm")

    def dropped(self, x, i, parts):
        """What layer i adds to x if `parts` ranks share it without a join after attention."""
        delta = 0
        for part in range(parts):
            a = self.attention(self.attention_input(x, i), i, part, parts)
            delta = delta + a + self.mlp(self.mlp_input(x + a, i), i, part, parts)
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
        x = self.w["model.embed_tokens.weight"][ids] * self.embedding
        i = 0
        while i < self.layers:
            grouped = p > 1 and start <= i < end
            if i in drop_attention_join and not grouped:
                x, i = x + self.dropped(x, i, p * ranks_per_layer), i + 1
                continue
            group = range(i, i + (p if start <= i < end else 1))
            a = [self.attention(self.attention_input(x, layer), layer) for layer in group]
            delta = 0
            for j, layer in enumerate(group):
                if layer in drop_attention_join:
                    assert d == 0
                    delta = delta + self.dropped(x, layer, ranks_per_layer)
                    continue
                b = sum(a[max(0, j - d) : j], torch.zeros_like(x))
                m = self.mlp(self.mlp_input(x + a[j] + b, layer), layer)
                delta = delta + a[j] + m + (b if bypass == "residual" else 0)
            x, i = x + delta, i + len(group)
        head = "lm_head" if self.has("lm_head") else "model.embed_tokens"
        return cap(self.norm(x, "model.norm") @ self.w[f"{head}.weight"].T * self.logit_scale, self.logits_cap)


MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def fp8(x, scale):
    """The values that an FP8 cache holds for x: E4M3, as PyTorch rounds to it, up to the largest number of it."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale


def cap(x, limit):
    return x if limit is None else limit * torch.tanh(x / limit)
