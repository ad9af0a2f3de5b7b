"""Run on a GPU host with PyTorch: the kernels of a decode step against PyTorch in float64, on random shapes.

usage: cuda_kernels_worker.py SEED CASES
"""

import ctypes
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from cqil_trt.gpu import kernel_library
from cqil_trt.gpu.workspace import DTYPES
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
    return DTYPES[str(dtype).removeprefix("torch.")]


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
    settings = torch.frombuffer(kernel_library.Sampling(config.temperature, top_p, top_k), dtype=torch.uint8).cuda()
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
    shape = kernel_library.LinearShape(rows, outputs, inputs, gated, code(dtype), 1e-5)
    scratch = torch.empty(library.cqil_linear_scratch_bytes(shape), dtype=torch.uint8, device="cuda")
    given = [x, delta if normed == 2 else None, weight, bias if biased else None, norm if normed else None]
    call("linear", ctypes.byref(shape), *given, residual if added else None, out, scratch)
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
    shape = kernel_library.AttentionShape(
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
        call("attention", ctypes.byref(shape), qkv, past, cos, sin, *weights, cache, out, scratch)
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


def main(seed, cases):
    random = torch.Generator().manual_seed(seed)
    worst = {}

    def pick(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=random))

    torch.manual_seed(seed)
    for case in range(cases):
        for check in (
            check_norm,
            check_swiglu,
            check_gather,
            check_choice,
            check_sample,
            check_linear,
            check_attention,
        ):
            for dtype, tolerance in TOLERANCE.items():
                error = check(pick, dtype)
                name = f"{check.__name__} {dtype}"
                worst[name] = max(worst.get(name, 0.0), error)
                assert error <= tolerance, f"case {case}, {name}: relative error {error:.2e}"
    for name, error in worst.items():
        print(f"{name}: {error:.1e}")
    print(f"{cases} cases of each kernel and type agree with float64")


main(int(sys.argv[1]), int(sys.argv[2]))
