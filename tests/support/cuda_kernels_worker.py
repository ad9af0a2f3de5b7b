"""Run on a GPU host with PyTorch: the kernels of a decode step against PyTorch in float64, on random shapes.

usage: cuda_kernels_worker.py SEED CASES [CHECK]

CHECK is `kernels` (the default: every kernel on its own), `swiglu`, or one of those that delay blocks. They need a
library built with CQIL_TEST_DELAYS=ON, which CQIL_TRT_PLUGINS names:

  joins    attention whose earlier spans start late
  overlap  a decoder's steps, launched back to back and in graphs
  repeat   attention on one cache again and again, without cqil_advance
  limit    attention that waits longer than its limit: ends with an error that says so
"""

import ctypes
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from cqil_trt.gpu import abi, kernel_library
from cqil_trt.sampling import SamplingConfig, sample

library = kernel_library.load()
# Rounding of inputs is the same on both sides; what is left is that of results and of the rotated queries and keys.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def call(name, *arguments):
    pointers = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    stream = torch.cuda.current_stream().cuda_stream
    if getattr(library, f"cqil_{name}")(*pointers, stream):
        raise RuntimeError(f"{name}: {library.cqil_last_error().decode()}")


def code(dtype):
    return abi.dtype_code(str(dtype).removeprefix("torch."))


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def check_norm(pick, dtype):
    rows, hidden = pick(1, 40), 8 * pick(1, 1200)
    delta, x = (torch.randn(rows, hidden, device="cuda").to(dtype) for _ in range(2))
    weight = (1 + 0.2 * torch.randn(hidden, device="cuda")).to(dtype)
    total, normed, alone = (torch.empty_like(x) for _ in range(3))
    call("residual_norm", delta, x, weight, total, normed, rows, hidden, 1e-5, code(dtype))
    call("residual_norm", None, x, weight, None, alone, rows, hidden, 1e-5, code(dtype))
    assert torch.equal(total, (delta.double() + x.double()).to(dtype))
    added = torch.empty_like(x)
    call("add", delta, x, added, x.numel(), code(dtype))
    assert torch.equal(added, total)
    wide = weight.double()
    errors = [relative(normed, rms_norm(total.double(), wide, 1e-5)), relative(alone, rms_norm(x.double(), wide, 1e-5))]
    return max(errors)


def check_swiglu(pick, dtype):
    rows, inner = pick(1, 40), pick(1, 12000)
    gate_up = 2 * torch.randn(rows, 2 * inner, device="cuda").to(dtype)
    out = torch.empty(rows, inner, dtype=dtype, device="cuda")
    call("swiglu", gate_up, out, rows, inner, code(dtype))
    gate, up = gate_up.double().chunk(2, -1)
    return relative(out, torch.nn.functional.silu(gate) * up)


def check_gather(pick, dtype):
    size, rows, hidden = pick(1, 999), pick(1, 40), pick(1, 5000)
    table = torch.randn(size, hidden, device="cuda").to(dtype)
    indices = torch.randint(size, (rows,), dtype=torch.int32, device="cuda")
    out = torch.empty(rows, hidden, dtype=dtype, device="cuda")
    call("gather_rows", table, indices, out, rows, hidden, code(dtype))
    assert torch.equal(out, table[indices.long()])
    return 0.0


def check_choice(pick, dtype):
    rows, width, offset = pick(1, 9), pick(1, 60000), pick(0, 999)
    logits = torch.randn(rows, width, device="cuda").half().to(dtype)  # many equal values
    value, index = torch.empty(rows, device="cuda"), torch.empty(rows, dtype=torch.int32, device="cuda")
    call("row_argmax", logits, rows, width, offset, code(dtype), value, index)
    best = logits.amax(-1)
    first = (logits == best[:, None]).int().argmax(-1) + offset
    assert torch.equal(value, best.float()) and torch.equal(index.long(), first)
    tokens, past = torch.zeros_like(index), torch.full_like(index, 5)
    past[0] = 7
    step, history = (
        torch.full((1,), 6, dtype=torch.int32, device="cuda"),
        torch.zeros(4, 12, dtype=torch.int64).pin_memory(),
    )
    call("advance", index, tokens, past, rows, 7, step, history, 4, 12)
    assert torch.equal(tokens, index) and past[0] == 7 and (past[1:] == 6).all() and step.item() == 7
    assert torch.equal(history[2, :rows], (7 << 32) + index.cpu().long()) and history.count_nonzero() == rows
    return 0.0


def check_sample(pick, dtype):
    """Against the sampler in Python, which tests/test_generate.py compares with transformers."""
    rows, width, steps = pick(1, 9), (pick(1, 300), pick(1000, 60000))[pick(0, 1)], 8
    logits = (2.5 * torch.randn(rows, width, device="cuda")).half().to(dtype)  # many equal values
    top_k, top_p = (0, pick(1, width))[pick(0, 1)], (1.0, pick(1, 999) / 1000)[pick(0, 1)]
    config = SamplingConfig(temperature=pick(1, 30) / 10, top_k=top_k, top_p=top_p)
    chosen = abi.cqil_sampling(temperature=config.temperature, top_p=top_p, top_k=top_k)
    settings = torch.frombuffer(chosen, dtype=torch.uint8).cuda()
    uniforms = torch.rand(steps, rows, dtype=torch.double, device="cuda")
    index = torch.empty(rows, dtype=torch.int32, device="cuda")
    parts, whole = torch.empty_like(logits), torch.empty_like(logits)
    first = pick(0, width)
    part = logits[:, first:].contiguous()
    call("spread", part, whole, rows, width - first, first, width, code(dtype))
    call("spread", logits[:, :first].contiguous(), parts, rows, first, 0, width, code(dtype))
    assert torch.equal(whole + parts, logits)
    wide = logits.float().cpu().numpy()
    for number in range(steps):
        step = torch.full((1,), number, dtype=torch.int32, device="cuda")
        call("sample", logits, rows, width, code(dtype), settings, uniforms, step, rows, index)
        for row in range(rows):
            draw = float(uniforms[number, row])
            # Weights are rounded to 24 bits here: a draw at the border of two tokens may fall on either side.
            near = (min(max(draw + offset, 0.0), 1 - 1e-12) for offset in (0.0, -2e-6, 2e-6))
            assert index[row].item() in {sample(wide[row], config, uniform) for uniform in near}
    return 0.0


def check_linear(pick, dtype):
    rows = (1, pick(2, 8), pick(9, 16), pick(17, 64), pick(65, 300))[pick(0, 4)]
    # Widths that no 16 bytes divide take another kernel, and one row of a large width one with a shorter ring.
    widest = 3500 if rows == 1 and pick(0, 2) == 0 else 400
    outputs, inputs = pick(1, 3000), pick(1, widest) * 8 + (pick(1, 7) if pick(0, 3) == 0 else 0)
    gated, biased, added = (bool(pick(0, 1)) for _ in range(3))
    added = added and not gated
    normed = pick(0, 2)  # 0: no norm, 2: of a sum
    x, delta = (torch.randn(rows, inputs, device="cuda").to(dtype) for _ in range(2))
    weight = (torch.randn(outputs * (1 + gated), inputs, device="cuda") / inputs**0.5).to(dtype)
    bias = torch.randn(outputs * (1 + gated), device="cuda").to(dtype)
    norm = (1 + 0.2 * torch.randn(inputs, device="cuda")).to(dtype)
    residual = torch.randn(rows, outputs, device="cuda").to(dtype)
    out = torch.empty_like(residual)
    shape = abi.cqil_linear_shape(rows=rows, outputs=outputs, inputs=inputs, gated=gated, dtype=code(dtype), eps=1e-5)
    scratch = torch.empty(library.cqil_linear_scratch_bytes(shape), dtype=torch.uint8, device="cuda")
    given = [x, delta if normed == 2 else None, weight, bias if biased else None, norm if normed else None]
    call("linear", shape, *given, residual if added else None, out, scratch)
    wide = x.double() if normed < 2 else (x.double() + delta.double()).to(dtype).double()
    if normed:
        wide = rms_norm(wide, norm.double(), 1e-5)
    expected = wide @ weight.double().T + (bias.double() if biased else 0)
    if gated:
        gate, up = expected.chunk(2, -1)
        expected = torch.nn.functional.silu(gate) * up
    return relative(out, expected + residual.double() if added else expected)


def check_attention(pick, dtype):
    kv_heads, group, dim = pick(1, 4), pick(1, 5), (8, 16, 20, 24, 64, 80, 96, 128, 256)[pick(0, 8)]
    # A rank's share of the heads may begin and end inside a group.
    first = pick(0, group - 1)
    heads = pick((kv_heads - 1) * group + 1, kv_heads * group) - first
    if heads < 1 or (heads - 1 + first) // group != kv_heads - 1:
        first, heads = 0, kv_heads * group
    capacity, max_batch = pick(40, 700), pick(1, 5)
    batch, norms, eps = pick(1, max_batch), bool(pick(0, 1)), 1e-6
    shape = abi.cqil_attention_shape(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        capacity=capacity,
        max_batch=max_batch,
        group=group,
        first=first,
        dtype=code(dtype),
        eps=eps,
    )
    cache = torch.zeros(library.cqil_attention_cache_bytes(shape), dtype=torch.uint8, device="cuda")
    angles = torch.arange(capacity)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    cos, sin = angles.cos().cuda(), angles.sin().cuda()
    q_norm, k_norm = ((1 + 0.2 * torch.randn(dim, device="cuda")).to(dtype) for _ in range(2))
    seen = [([], []) for _ in range(batch)]
    past = torch.zeros(batch, dtype=torch.int32, device="cuda")
    kv_of = torch.tensor([(i + first) // group for i in range(heads)], device="cuda")
    worst = 0.0

    def rotate(x, position):
        x = x.double()
        if x.shape[0] == 0:
            return x
        a, b = x.chunk(2, -1)
        c, s = cos[position].double(), sin[position].double()
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    for length in (pick(1, capacity // 2), 1, pick(1, 9), 1, 1):
        qkv = torch.randn(batch, length, heads + 2 * kv_heads, dim, device="cuda").to(dtype)
        shape.batch, shape.length = batch, length
        scratch = torch.empty(library.cqil_attention_scratch_bytes(shape), dtype=torch.uint8, device="cuda")
        out = torch.empty(batch, length, heads, dim, dtype=dtype, device="cuda")
        weights = (q_norm, k_norm) if norms else (None, None)
        call("attention", shape, qkv, past, cos, sin, *weights, cache, out, scratch)
        expected = torch.empty(batch, length, heads, dim, dtype=torch.double, device="cuda")
        for b in range(batch):
            for t in range(length):
                position = int(past[b]) + t
                q, k, v = qkv[b, t].double().split([heads, kv_heads, kv_heads])
                if norms:
                    q, k = rms_norm(q, q_norm.double(), eps), rms_norm(k, k_norm.double(), eps)
                keys, values = seen[b]
                keys.append(rotate(k, position))
                values.append(v)
            all_keys, all_values = torch.stack(keys), torch.stack(values)
            for t in range(length):
                position = int(past[b]) + t
                q = qkv[b, t, :heads].double()
                q = rotate(rms_norm(q, q_norm.double(), eps) if norms else q, position)
                k, v = all_keys[: position + 1, kv_of], all_values[: position + 1, kv_of]
                scores = torch.einsum("hd,khd->hk", q, k) / dim**0.5
                expected[b, t] = torch.einsum("hk,khd->hd", scores.softmax(-1), v)
        worst = max(worst, relative(out, expected))
        past += length
    return worst


def finite(dtype):
    """All finite values of a half type; for float32 those of float16, and more of where silu is steep."""
    if dtype == torch.float32:
        return torch.cat((finite(torch.float16).float(), torch.linspace(-110, 110, 100_001, device="cuda")))
    values = torch.arange(1 << 16, device="cuda").to(torch.int16).view(dtype)
    return values[values.isfinite()].contiguous()


def check_one_swiglu(pick, dtype):
    """SwiGLU is one function, whichever kernel computes it, and exact to the type's rounding."""
    gate = finite(dtype)
    count = len(gate)
    up = (1, -1)[pick(0, 1)] * (torch.rand(count, device="cuda") / 2 + 0.5).to(dtype)
    direct = torch.empty(count, dtype=dtype, device="cuda")
    call("swiglu", torch.cat((gate, up)), direct, 1, count, code(dtype))
    # A product with a row that is 1 and zeros is the weight's first column.
    weight = torch.zeros(2 * count, 8, dtype=dtype, device="cuda")
    weight[:, 0] = torch.cat((gate, up))
    for rows in (1, 3):
        x = torch.zeros(rows, 8, dtype=dtype, device="cuda")
        x[:, 0] = 1
        shape = abi.cqil_linear_shape(rows=rows, outputs=count, inputs=8, gated=1, dtype=code(dtype), eps=1e-5)
        scratch = torch.empty(library.cqil_linear_scratch_bytes(shape), dtype=torch.uint8, device="cuda")
        out = torch.empty(rows, count, dtype=dtype, device="cuda")
        call("linear", shape, x, None, weight, None, None, None, out, scratch)
        different = int((out != direct).sum())
        assert different == 0, f"{different} of {out.numel()} elements of {rows} rows differ from cqil_swiglu's"
    wide = gate.double()
    exact = wide / (1 + (-wide).exp()) * up.double()
    # Half a unit in the last place of 11 and of 8 significant bits, with room for float32's own rounding. Below the
    # floor float32 flushes to zero.
    bound = {torch.float32: 5e-7, torch.float16: 2.0**-11 * 1.01, torch.bfloat16: 2.0**-8 * 1.01}[dtype]
    floor = {torch.float32: 2e-36, torch.float16: 2.0**-25 * 1.01, torch.bfloat16: 2e-36}[dtype]
    wrong = (direct.double() - exact).abs() > bound * exact.abs() + floor
    assert not wrong.any(), f"{int(wrong.sum())} of {count} gates beyond rounding, e.g. {gate[wrong][0].item()}"
    return relative(direct, exact)


# Checks of kernels that overlap, with delays that make unlucky orders happen


def delay(place, nanoseconds):
    """Block i of every kernel sleeps nanoseconds[i % len] at its start (place 0) or after its predecessor (place 1)."""
    torch.cuda.synchronize()
    if library.cqil_test_delays(place, (ctypes.c_uint32 * len(nanoseconds))(*nanoseconds), len(nanoseconds)):
        raise RuntimeError(f"test_delays: {library.cqil_last_error().decode()}")


def rotate_half(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention:
    """One layer's attention, one token at a time, and the same in float64."""

    def __init__(self, dtype, batch, heads, kv_heads, dim, capacity, filled):
        self.dtype, self.batch, self.heads, self.kv_heads, self.dim = dtype, batch, heads, kv_heads, dim
        self.shape = abi.cqil_attention_shape(
            batch=batch,
            length=1,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=dim,
            capacity=capacity,
            max_batch=batch,
            group=heads // kv_heads,
            first=0,
            dtype=code(dtype),
            eps=1e-6,
        )
        size = library.cqil_attention_cache_bytes(self.shape)
        self.memory = torch.zeros(size, dtype=torch.uint8, device="cuda")
        self.cache = self.memory[: 2 * batch * kv_heads * capacity * dim * dtype.itemsize].view(dtype)
        self.cache = self.cache.view(2, batch, kv_heads, capacity, dim)
        self.cache[..., :filled, :] = torch.randn(2, batch, kv_heads, filled, dim, device="cuda").to(dtype)
        self.seen = self.cache.double()
        angles = torch.arange(capacity)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        self.cos, self.sin = angles.cos().cuda(), angles.sin().cuda()

    def __call__(self, qkv, past, out, length=1, scratch=None):
        self.shape.length = length
        call("attention", self.shape, qkv, past, self.cos, self.sin, None, None, self.memory, out, scratch)

    def expected(self, qkv, position):
        """Of one more token of every sequence at `position`."""
        rows = qkv.double().view(self.batch, self.heads + 2 * self.kv_heads, self.dim)
        q, k, v = rows.split([self.heads, self.kv_heads, self.kv_heads], 1)
        angle = self.cos[position].double(), self.sin[position].double()
        q, k = (rotate_half(x, *angle).to(self.dtype).double() for x in (q, k))
        self.seen[0, :, :, position], self.seen[1, :, :, position] = k, v
        keys, values = (x[:, :, : position + 1].repeat_interleave(self.heads // self.kv_heads, 1) for x in self.seen)
        weights = (torch.einsum("bhd,bhkd->bhk", q, keys) / self.dim**0.5).softmax(-1)
        return torch.einsum("bhk,bhkd->bhd", weights, values).reshape(self.batch, self.heads * self.dim)


class Ending:
    """What cqil_advance needs, and the positions it advances."""

    def __init__(self, batch, position):
        self.batch = batch
        self.next, self.tokens = (torch.zeros(batch, dtype=torch.int32, device="cuda") for _ in range(2))
        self.past = torch.full((batch,), position, dtype=torch.int32, device="cuda")
        self.step = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.history = torch.zeros(4, batch, dtype=torch.int64).pin_memory()

    def advance(self):
        state = self.next, self.tokens, self.past, self.batch, 1 << 30, self.step
        call("advance", *state, self.history, 4, self.batch)


def check_joins(pick, dtype):
    """The blocks of a head's earlier spans start after that of its last span has come to where it waits for them."""
    batch, kv_heads, group, dim = pick(1, 2), pick(1, 2), pick(1, 3), (64, 80, 128)[pick(0, 2)]
    heads, steps, position = kv_heads * group, 24, pick(200, 900)
    attention = Attention(dtype, batch, heads, kv_heads, dim, position + steps, position)
    ending = Ending(batch, position)
    qkv = torch.randn(steps, batch, (heads + 2 * kv_heads) * dim, device="cuda").to(dtype)
    out = torch.empty(steps, batch, heads * dim, dtype=dtype, device="cuda")
    for step in range(steps):
        if step % 4 == 0:  # three steps follow without the host
            late = pick(1, 4)  # spans
            delay(0, [pick(100_000, 400_000) if block // heads < late else 0 for block in range(8 * heads)])
        attention(qkv[step], ending.past, out[step])
        ending.advance()
    torch.cuda.synchronize()
    delay(0, [])
    expected = torch.stack([attention.expected(qkv[step], position + step) for step in range(steps)])
    assert torch.equal(attention.cache[1].double(), attention.seen[1])
    return max(relative(out[step], expected[step]) for step in range(steps))


class Decoder:
    """Layers that a token passes through by this library's kernels alone, so that each launch may overlap the last."""

    HIDDEN, INNER, WORDS, HEADS, KV_HEADS, DIM = 256, 688, 512, 4, 2, 64

    def __init__(self, dtype, layers, steps, position):
        def weight(*shape):
            return (torch.randn(shape, device="cuda") / shape[-1] ** 0.5).to(dtype)

        self.dtype, self.steps, self.position = dtype, steps, position
        width, rows = (self.HEADS + 2 * self.KV_HEADS) * self.DIM, self.HEADS * self.DIM
        self.table = torch.randn(self.WORDS, self.HIDDEN, device="cuda").to(dtype)
        self.layers = [
            {
                "norm": 1 + weight(self.HIDDEN),
                "qkv": weight(width, self.HIDDEN),
                "o": weight(self.HIDDEN, rows),
                "mlp_norm": 1 + weight(self.HIDDEN),
                "gate_up": weight(2 * self.INNER, self.HIDDEN),
                "down": weight(self.HIDDEN, self.INNER),
                "attention": Attention(dtype, 1, self.HEADS, self.KV_HEADS, self.DIM, position + steps + 1, position),
            }
            for _ in range(layers)
        ]
        self.caches = [layer["attention"].memory.clone() for layer in self.layers]
        self.x = torch.empty(self.HIDDEN, dtype=dtype, device="cuda")
        self.qkv = torch.empty(width, dtype=dtype, device="cuda")
        self.attended = torch.empty(rows, dtype=dtype, device="cuda")
        self.inner = torch.empty(self.INNER, dtype=dtype, device="cuda")
        self.logits = torch.empty(self.WORDS, dtype=dtype, device="cuda")
        self.value = torch.empty(1, device="cuda")
        self.zeros = torch.zeros(self.HIDDEN, dtype=dtype, device="cuda")
        self.zero_index = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.scratch = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
        self.found = torch.empty(steps, self.HIDDEN, dtype=dtype, device="cuda")
        self.tokens = torch.empty(steps, dtype=torch.int32, device="cuda")
        self.ending = Ending(1, position)

    def begin(self):
        for layer, cache in zip(self.layers, self.caches):
            layer["attention"].memory.copy_(cache)
        self.ending.tokens.fill_(7)
        self.ending.past.fill_(self.position)
        self.ending.step.zero_()
        self.found.fill_(-1)
        self.tokens.fill_(-1)
        torch.cuda.synchronize()

    def linear(self, x, weight, out, norm=None, residual=None, gated=0):
        shape = abi.cqil_linear_shape(
            rows=1,
            outputs=weight.shape[0] // (1 + gated),
            inputs=weight.shape[1],
            gated=gated,
            dtype=code(self.dtype),
            eps=1e-5,
        )
        assert library.cqil_linear_scratch_bytes(shape) <= self.scratch.numel()
        call("linear", shape, x, None, weight, None, norm, residual, out, self.scratch)

    def run(self, after=lambda: None):
        """All steps; `after` is called after each kernel."""
        kind, x = code(self.dtype), self.x
        for step in range(self.steps):
            call("gather_rows", self.table, self.ending.tokens, x, 1, self.HIDDEN, kind)
            after()
            for layer in self.layers:
                self.linear(x, layer["qkv"], self.qkv, norm=layer["norm"])
                after()
                layer["attention"](self.qkv, self.ending.past, self.attended)
                after()
                self.linear(self.attended, layer["o"], x, residual=x)
                after()
                self.linear(x, layer["gate_up"], self.inner, norm=layer["mlp_norm"], gated=1)
                after()
                self.linear(self.inner, layer["down"], x, residual=x)
                after()
            call("add", x, self.zeros, self.found[step], self.HIDDEN, kind)
            after()
            self.linear(x, self.table, self.logits)
            after()
            call("row_argmax", self.logits, 1, self.WORDS, 0, kind, self.value, self.ending.next)
            after()
            self.ending.advance()
            after()
            call("gather_rows", self.ending.tokens, self.zero_index, self.tokens[step], 1, 1, 0)
            after()

    def expected(self, tokens):
        """In float64, rounded where a kernel stores its result; `tokens` are those that were chosen."""

        def stored(x):
            return x.to(self.dtype).double()

        found = []
        for step, token in enumerate([7, *tokens[:-1]]):
            x = self.table[token].double()
            for layer in self.layers:
                wide = {name: value.double() for name, value in layer.items() if name != "attention"}
                normed = stored(stored(rms_norm(x, 1, 1e-5)) * wide["norm"])
                qkv = stored(wide["qkv"] @ normed)
                attended = stored(layer["attention"].expected(qkv, self.position + step))[0]
                x = stored(wide["o"] @ attended + x)
                normed = stored(stored(rms_norm(x, 1, 1e-5)) * wide["mlp_norm"])
                gate, up = stored(wide["gate_up"] @ normed).chunk(2)
                x = stored(wide["down"] @ stored(torch.nn.functional.silu(gate) * up) + x)
            found.append(x)
        return torch.stack(found)


def check_overlap(pick, dtype):
    """Steps of back-to-back launches give the bits of launches that wait for each other, and those are right."""
    decoder = Decoder(dtype, layers=pick(2, 6), steps=pick(8, 20), position=pick(1, 400))
    decoder.begin()
    decoder.run(after=torch.cuda.synchronize)
    right, tokens = decoder.found.clone(), decoder.tokens.tolist()

    def compare(how):
        torch.cuda.synchronize()
        same = torch.equal(decoder.found, right) and decoder.tokens.tolist() == tokens
        assert same, f"{how}: {int((decoder.found != right).any(-1).sum())} of {decoder.steps} steps differ"

    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    decoder.begin()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        decoder.run()
    for late in (False, True, True):
        if late:  # work is late everywhere, and starts are late here and there
            delay(1, [pick(0, 3) * 4000 for _ in range(97)])
            delay(0, [pick(0, 20) // 20 * 20_000 for _ in range(89)])
        how = "with delays" if late else "without delays"
        decoder.begin()
        decoder.run()
        compare(f"back to back, {how}")
        for _ in range(3):
            decoder.begin()
            graph.replay()
            compare(f"in a graph, {how}")
    delay(0, [])
    delay(1, [])
    return relative(right, decoder.expected(tokens)) / 4  # some ten roundings lie between a token and its result


def check_repeat(pick, dtype):
    """Calls on one cache without cqil_advance between them: a prefill, then tokens whose positions lie ready."""
    kv_heads, group, dim, prompt, steps = pick(1, 2), pick(1, 2), 64, pick(2, 9), 12
    heads, width = kv_heads * group, (kv_heads * group + 2 * kv_heads) * dim
    attention = Attention(dtype, 1, heads, kv_heads, dim, prompt + steps, 0)
    past = torch.cat((torch.zeros(1), torch.arange(prompt, prompt + steps))).to(torch.int32).cuda()
    # 16 bytes apart, as pointers are aligned.
    past = torch.nn.functional.pad(past[:, None], (0, 3)).contiguous()
    qkv = torch.randn(prompt + steps, width, device="cuda").to(dtype)
    out = torch.empty(prompt + steps, heads * dim, dtype=dtype, device="cuda")
    scratch = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    delay(1, [200_000])
    attention(qkv[:prompt], past[0], out[:prompt], prompt, scratch)
    for step in range(steps):
        attention(qkv[prompt + step], past[1 + step], out[prompt + step])
    torch.cuda.synchronize()
    delay(1, [])
    expected = torch.cat([attention.expected(qkv[i], i) for i in range(prompt + steps)])
    return max(relative(found, right) for found, right in zip(out, expected))


def check_limit(pick, dtype):
    """A wait that exceeds the limit ends the kernel, and everything that can name the reason names it."""
    attention, ending = Attention(dtype, 1, 2, 1, 64, 600, 500), Ending(1, 500)
    qkv, out = torch.randn(256, device="cuda").to(dtype), torch.empty(128, dtype=dtype, device="cuda")
    assert library.cqil_attention_timeout(-1.0) != 0
    assert library.cqil_attention_timeout(0.5) == 0
    attention(qkv, ending.past, out)
    ending.advance()
    torch.cuda.synchronize()
    assert library.cqil_attention_failure() is None
    delay(0, [0, 3_000_000_000, 0, 0])  # span 0 of head 1, among others
    began = time.monotonic()
    try:
        attention(qkv, ending.past, out)
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"after {time.monotonic() - began:.1f} s CUDA reports: {str(error).splitlines()[0]}")
    else:
        raise AssertionError("attention did not give up")
    assert time.monotonic() - began < 2.9
    said = library.cqil_attention_failure().decode()
    print(said)
    assert "attention gave up waiting" in said and "head 1 of sequence 0" in said
    assert library.cqil_advance(*[None] * 3, 1, 1, None, None, 1, 1, None) != 0
    assert said in library.cqil_last_error().decode(), library.cqil_last_error()
    print("the limit ends the wait and is named")
    sys.stdout.flush()
    os._exit(0)  # the CUDA context is lost, and with it an orderly exit


CHECKS = {
    "kernels": (
        check_norm,
        check_swiglu,
        check_gather,
        check_choice,
        check_sample,
        check_linear,
        check_attention,
    ),
    "swiglu": (check_one_swiglu,),
    "joins": (check_joins,),
    "overlap": (check_overlap,),
    "repeat": (check_repeat,),
    "limit": (check_limit,),
}


def main(seed, cases, checks="kernels"):
    random = torch.Generator().manual_seed(seed)
    worst = {}

    def pick(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=random))

    torch.manual_seed(seed)
    for case in range(cases):
        for check in CHECKS[checks]:
            for dtype, tolerance in TOLERANCE.items():
                error = check(pick, dtype)
                name = f"{check.__name__} {dtype}"
                worst[name] = max(worst.get(name, 0.0), error)
                assert error <= tolerance, f"case {case}, {name}: relative error {error:.2e}"
    for name, error in worst.items():
        print(f"{name}: {error:.1e}")
    print(f"{cases} cases of each kernel and type agree with float64")


# Nothing overlaps on the default stream.
with torch.cuda.stream(torch.cuda.Stream()):
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
