"""Run on a GPU host with PyTorch: the kernels of a decode step against PyTorch in float64, on random shapes.

usage: cuda_kernels_worker.py SEED CASES [CHECK]

CHECK is `kernels` (the default: every kernel on its own), `forms` (what families other than LLaMA compute), `gates`,
`rows` (that they do not depend on each other, and drafts), `packed` (products with quantized weights), `cache`
(attention over a cache in FP8), or one of those that delay blocks. They need a library built with CQIL_TEST_DELAYS=ON,
which CQIL_TRT_PLUGINS names:

  joins    attention whose earlier spans start late
  overlap  a decoder's steps, launched back to back and in graphs
  repeat   attention on one cache again and again, without cqil_advance or cqil_arrange
  limit    attention that waits longer than its limit: ends with an error that says so
"""

import ctypes
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from cqil_trt.gpu import abi, kernel_library

library = kernel_library.load()
FP8 = torch.float8_e4m3fn
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
    rows, hidden = pick(1, 40), (pick(1, 20_000), 8 * pick(1, 1200))[pick(0, 1)]
    delta, x = (torch.randn(rows, hidden, device="cuda").to(dtype) for _ in range(2))
    weight = (1 + 0.2 * torch.randn(hidden, device="cuda")).to(dtype)
    total, normed, alone = (torch.empty_like(x) for _ in range(3))
    shape = rows, hidden, 1e-5, abi.cqil_norm.CQIL_NORM_ROUNDED, code(dtype)
    call("residual_norm", delta, None, x, weight, total, normed, *shape)
    call("residual_norm", None, None, x, weight, None, alone, *shape)
    assert torch.equal(total, (delta.double() + x.double()).to(dtype))
    added = torch.empty_like(x)
    call("add", delta, x, added, x.numel(), code(dtype))
    assert torch.equal(added, total)
    wide = weight.double()
    errors = [relative(normed, rms_norm(total.double(), wide, 1e-5)), relative(alone, rms_norm(x.double(), wide, 1e-5))]
    return max(errors)


def check_post_norm(pick, dtype):
    """The norm of what is added to the residual stream, and that of the sum, of every kind."""
    kinds = abi.cqil_norm
    kind = (kinds.CQIL_NORM_WIDE, kinds.CQIL_NORM_OFFSET, kinds.CQIL_NORM_ROUNDED)[pick(0, 2)]
    longest = 8 * (pick(1, 400), pick(400, 1024), pick(1025, 2048))[pick(0, 2)]
    rows, hidden, eps = pick(1, 20), longest - (pick(1, 7) if pick(0, 2) == 0 else 0), 1e-5
    offset = kind == kinds.CQIL_NORM_OFFSET
    delta, x = (torch.randn(rows, hidden, device="cuda").mul(pick(1, 9)).to(dtype) for _ in range(2))
    before, after = ((0.3 * torch.randn(hidden, device="cuda") + (not offset)).to(dtype) for _ in range(2))
    shape = rows, hidden, eps, kind, code(dtype)
    added, total, normed, alone, of_sum = (torch.full_like(x, torch.nan) for _ in range(5))

    def wide(norm):
        return norm.double() + offset

    call("residual_norm", delta, before, None, None, added, None, *shape)
    errors = [relative(added, rms_norm(delta.double(), wide(before), eps))]
    with_residual, following = bool(pick(0, 1)), bool(pick(0, 1))
    out = normed if following else None
    given = x if with_residual else None
    call("residual_norm", delta, before, given, after if following else None, total, out, *shape)
    assert torch.equal(total, (added.double() + x.double()).to(dtype) if with_residual else added)
    if following:
        errors.append(relative(normed, rms_norm(total.double(), wide(after), eps)))
    call("residual_norm", None, None, x, after, None, alone, *shape)
    call("residual_norm", delta, None, x, after, total, of_sum, *shape)
    assert torch.equal(total, (delta.double() + x.double()).to(dtype))
    errors += [relative(alone, rms_norm(x.double(), wide(after), eps))]
    errors += [relative(of_sum, rms_norm(total.double(), wide(after), eps))]
    # A row has the same bits in every batch, and the sum may take the place of an operand.
    row, expected = pick(0, rows - 1), (added.double() + x.double()).to(dtype)
    part = [t[row : row + 1].contiguous() for t in (delta, x)]
    one, place = (torch.full((1, hidden), torch.nan, dtype=dtype, device="cuda") for _ in range(2))
    call("residual_norm", part[0], before, part[1], after, one, place, 1, *shape[1:])
    call("residual_norm", delta, before, x, after, (x, delta)[pick(0, 1)], normed, *shape)
    assert torch.equal(x, expected) or torch.equal(delta, expected)
    assert torch.equal(one[0], expected[row]) and torch.equal(place[0], normed[row])
    return max(errors)


def check_scale(pick, dtype):
    x = 3 * torch.randn((pick(1, 90_000), 8 * pick(1, 11_000))[pick(0, 1)], device="cuda").to(dtype)
    factor, cap = pick(1, 90) / 10, (0, pick(1, 60) / 2)[pick(0, 1)]
    expected = x.double() * factor
    expected = cap * torch.tanh(expected / cap) if cap else expected
    out = (x, torch.empty_like(x))[pick(0, 1)]
    call("scale", x, out, x.numel(), factor, cap, code(dtype))
    return relative(out, expected)


def check_head_squares(pick, dtype):
    rows, heads, kv_heads, dim = pick(1, 40), pick(1, 12), pick(1, 5), 2 * pick(1, 128)
    first = pick(0, kv_heads)
    last = pick(first, kv_heads)
    qkv = torch.randn(rows, heads + 2 * kv_heads, dim, device="cuda").to(dtype)
    out = torch.full((rows, 2), torch.nan, device="cuda")
    call("head_squares", qkv, out, rows, heads, kv_heads, dim, first, last, 0.25, 0.5, code(dtype))
    squares = qkv.double().square()
    queries, keys = squares[:, :heads].sum((1, 2)), squares[:, heads + first : heads + last].sum((1, 2))
    return relative(out, torch.stack((queries / 4, keys / 2), 1)) if last > first else relative(out[:, 0], queries / 4)


def activation(gating):
    """What a cqil_gating makes of gate and up, in float64."""
    if gating == abi.cqil_gating.CQIL_SWIGLU:
        return torch.nn.functional.silu
    return lambda x: torch.nn.functional.gelu(x, approximate="tanh")


def check_gate(pick, dtype):
    rows, inner, gating = pick(1, 40), (pick(1, 12_000), 8 * pick(1, 1500))[pick(0, 1)], pick(1, 2)
    gate_up = 2 * torch.randn(rows, 2 * inner, device="cuda").to(dtype)
    out = torch.empty(rows, inner, dtype=dtype, device="cuda")
    call("gate", gate_up, out, rows, inner, gating, code(dtype))
    gate, up = gate_up.double().chunk(2, -1)
    return relative(out, activation(gating)(gate) * up)


def check_gather(pick, dtype):
    size, rows, hidden = pick(1, 999), pick(1, 40), pick(1, 5000)
    table = torch.randn(size, hidden, device="cuda").to(dtype)
    indices = torch.randint(size, (rows,), dtype=torch.int32, device="cuda")
    out = torch.empty(rows, hidden, dtype=dtype, device="cuda")
    call("gather_rows", table, indices, out, rows, hidden, code(dtype))
    assert torch.equal(out, table[indices.long()])
    return 0.0


def some_slots(pick, rows):
    """How many slots there are, and which of them each row has."""
    slots = rows + pick(0, 4)
    return slots, torch.randperm(slots, device="cuda")[:rows].int()


def some_step(pick):
    """A counter of advances, also just before its sign as an int32 changes and before it begins again; and a copy."""
    before = ((1 << 31) - 1, (1 << 32) - 1, pick(0, 999))[pick(0, 2)]
    return before, torch.from_numpy(np.array([before], np.uint32).view(np.int32)).cuda()


def check_told(before, step, history, tokens):
    """The counter went on by one, and the history has the tokens in their place, and nothing else."""
    after = before + 1 & 0xFFFFFFFF
    assert step.item() & 0xFFFFFFFF == after
    expected = np.zeros(history.shape, np.uint64)
    expected[before % len(history), : len(tokens)] = (after << 32) + tokens.cpu().numpy().astype(np.uint64)
    assert (history.numpy().view(np.uint64) == expected).all()


def check_choice(pick, dtype):
    """The likeliest tokens become the input of the next step, and of a later one with other rows."""
    rows, width, offset = pick(1, 9), pick(1, 60000), pick(0, 999)
    logits = torch.randn(rows, width, device="cuda").half().to(dtype)  # many equal values
    value, index = torch.empty(rows, device="cuda"), torch.empty(rows, dtype=torch.int32, device="cuda")
    call("row_argmax", logits, rows, width, offset, code(dtype), value, index)
    best = logits.amax(-1)
    first = (logits == best[:, None]).int().argmax(-1) + offset
    assert torch.equal(value, best.float()) and torch.equal(index.long(), first)

    slots, slot_of = some_slots(pick, rows)
    slot_tokens = torch.randint(1 << 30, (slots,), dtype=torch.int32, device="cuda")
    slot_past = torch.randint(8, (slots,), dtype=torch.int32, device="cuda")
    tokens, past = torch.full_like(index, -1), torch.full_like(index, -1)

    def arrange(slot_of, rows):
        call("arrange", slot_of, slot_tokens, slot_past, None, tokens, past, rows, 1, 1 << 30)
        chosen = slot_of[:rows].long()
        assert torch.equal(tokens[:rows], slot_tokens[chosen]) and torch.equal(past[:rows], slot_past[chosen])

    arrange(slot_of, rows)
    before, step = some_step(pick)
    history = torch.zeros(4, 12, dtype=torch.int64).pin_memory()
    vocabulary, counted = width + offset, bool(pick(0, 1))
    counts = torch.randint(-(1 << 31), (1 << 31) - 1, (slots, vocabulary), device="cuda").int()
    expected = slot_tokens.clone(), slot_past.clone(), counts.clone()
    at = slot_of.long()
    expected[0][at], expected[1][at] = index, (slot_past[at] + 1).clamp(max=7)
    if counted:
        expected[2][at, index.long()] += 1
    state = index, slot_of, tokens, past, slot_tokens, slot_past, counts if counted else None, vocabulary
    call("advance", *state, rows, 7, step, history, 4, 12)
    assert torch.equal(tokens, index) and torch.equal(past, expected[1][at])
    assert all(torch.equal(*pair) for pair in zip((slot_tokens, slot_past, counts), expected))
    check_told(before, step, history, index)
    arrange(slot_of.flip(0).contiguous(), pick(1, rows))
    return 0.0


def check_spread(pick, dtype):
    rows, width = pick(1, 9), pick(1, 60000)
    first = pick(0, width)
    logits = torch.randn(rows, width, device="cuda").to(dtype)
    parts, whole = torch.empty_like(logits), torch.empty_like(logits)
    part = logits[:, first:].contiguous()
    call("spread", part, whole, rows, width - first, first, width, code(dtype))
    call("spread", logits[:, :first].contiguous(), parts, rows, first, 0, width, code(dtype))
    assert torch.equal(whole + parts, logits)
    return 0.0


def some_logits(pick, rows, width, dtype):
    """Many equal values, both zeros, and in some rows many tokens that must not be chosen."""
    logits = 2.5 * torch.randn(rows, width, device="cuda").half().to(dtype)
    for zero in (0.0, -0.0):
        logits[torch.rand(rows, width, device="cuda") < 0.02] = zero
    forbidden = torch.rand(rows, 1, device="cuda") * pick(0, 1)
    logits[torch.rand(rows, width, device="cuda") < forbidden] = -torch.inf
    return logits


def settings_of(slots, make):
    """One cqil_sampling for each slot, whose fields `make` gives, in both memories."""
    host = (abi.cqil_sampling * slots)(*(abi.cqil_sampling(**make()) for _ in range(slots)))
    return host, torch.frombuffer(host, dtype=torch.uint8).cuda()


def check_adjust(pick, dtype):
    rows, width = pick(1, 9), (pick(1, 300), pick(1000, 60000))[pick(0, 1)]
    slots, slot_of = some_slots(pick, rows)
    logits, adjusted = some_logits(pick, rows, width, dtype), pick(0, 3) > 0

    def make():
        penalised, masked, biased = (adjusted and pick(0, 1) for _ in range(3))
        neutral = {"repetition_penalty": 1, "temperature": pick(0, 1), "top_p": 1, "logprobs": -1}
        penalties = {
            "repetition_penalty": (1, pick(1, 30) / 10)[pick(0, 1)],
            "presence_penalty": (0, pick(-20, 20) / 10)[pick(0, 1)],
            "frequency_penalty": (0, pick(-20, 20) / 10)[pick(0, 1)],
        }
        return neutral | (penalties if penalised else {}) | {"masked": masked, "biased": biased}

    host, settings = settings_of(slots, make)
    generated = torch.randint(5, (slots, width), device="cuda") * (torch.rand(slots, width, device="cuda") < 0.3)
    prompt = torch.rand(slots, width, device="cuda") < 0.3
    counts = (generated - (prompt.long() << 31)).int()  # the upper bit of 32 is the sign
    bias = torch.randn(slots, width, device="cuda")
    mask = torch.randint(-(1 << 31), 1 << 31, (slots, -(-width // 32)), device="cuda").int()
    allowed = (mask[..., None] >> torch.arange(32, device="cuda") & 1).view(slots, -1)[:, :width] == 1
    expected = []
    for row, slot in enumerate(slot_of.tolist()):
        how, x, often = host[slot], logits[row].double(), generated[slot]
        if how.biased:
            x = x + bias[slot].double()
        scaled = torch.where(x > 0, x / how.repetition_penalty, x * how.repetition_penalty)
        x = torch.where(prompt[slot] | (often > 0), scaled, x)
        x = x - how.frequency_penalty * often - how.presence_penalty * (often > 0)
        expected.append(x.masked_fill(~allowed[slot], -torch.inf) if how.masked else x)
    for slot in range(slots):
        if not host[slot].biased:
            bias[slot] = torch.nan  # which would show
    used = (counts, bias, mask) if adjusted else (None, None, None)
    out = logits if dtype == torch.float32 and pick(0, 1) else torch.empty(rows, width, device="cuda")
    call("adjust", logits, rows, width, code(dtype), settings, slot_of, *used, out)
    expected = torch.stack(expected)
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-5)
    kept = expected.isfinite()
    return relative(out[kept], expected[kept]) if kept.any() else 0.0


def allowed_places(weights, how, uniform):
    """The first and the last place, among tokens from the likeliest down, that a draw may fall on.

    The kernel computes weights in float32 and rounds them to 40 bits, so a draw at the border of two tokens may fall on
    either side, and so may the ends of the sets that are kept.
    """
    masses = np.cumsum(weights)

    def place(slack):
        keep = min(how.top_k, len(weights)) if how.top_k else len(weights)
        ends = [keep]
        if how.top_p < 1:
            goal = min(max(how.top_p + slack, 0), 1) * masses[keep - 1]
            ends.append(int(np.searchsorted(masses, goal)) + 1)
        if how.min_p > 0:
            ends.append(int((weights >= how.min_p * (1 - 3 * slack)).sum()))
        kept = masses[: max(min(ends), 1)]
        draw = min(max(uniform + slack, 0), 1) * kept[-1]
        return min(int(np.searchsorted(kept, draw, side="right")), len(kept) - 1)

    return place(-2e-6), place(2e-6)


def check_sample(pick, dtype):
    rows, width, steps = pick(1, 9), (pick(1, 300), pick(1000, 60000))[pick(0, 1)], 8
    slots, slot_of = some_slots(pick, rows)
    logits = some_logits(pick, rows, width, dtype).float()
    if pick(0, 2) == 0:
        logits[0] = (-torch.inf, torch.nan)[pick(0, 1)]
    elif pick(0, 2) == 0:
        logits[torch.rand(rows, width, device="cuda") < 0.01] = torch.nan

    def make():
        return {
            "temperature": pick(0, 3) and pick(1, 30) / 10,
            "top_k": (0, pick(1, width), pick(1, 40))[pick(0, 2)],
            "top_p": (1, pick(1, 999) / 1000)[pick(0, 1)],
            "min_p": (0, pick(1, 1000) / 1000, pick(1, 100) / 1000)[pick(0, 2)],
            "repetition_penalty": 1,
            "logprobs": -1,
        }

    host, settings = settings_of(slots, make)
    stride = pick(steps, 2 * steps)
    uniforms = torch.rand(slots, stride, dtype=torch.double, device="cuda")
    uniforms[torch.rand(slots, stride, device="cuda") < 0.1] = 0
    uniforms[torch.rand(slots, stride, device="cuda") < 0.1] = 1 - 2.0**-53
    index, again = (torch.full((rows,), -1, dtype=torch.int32, device="cuda") for _ in range(2))
    sorted_rows = []
    for row, slot in enumerate(slot_of.tolist()):
        values = logits[row].double().cpu().numpy()
        values = np.where(np.isnan(values), -np.inf, values)
        order = np.argsort(-values, kind="stable")
        order = order[: int((values > -np.inf).sum())]
        kept = values[order]
        weights = np.exp((kept - kept[:1]) / (host[slot].temperature or 1))
        sorted_rows.append((slot, order, weights))
    for _ in range(steps):
        past = torch.randint(stride, (rows,), dtype=torch.int32, device="cuda")
        call("sample", logits, rows, width, settings, slot_of, uniforms, stride, past, index)
        call("sample", logits, rows, width, settings, slot_of, uniforms, stride, past, again)
        assert torch.equal(index, again)
        for row, (slot, order, weights) in enumerate(sorted_rows):
            found, how = index[row].item(), host[slot]
            if not len(order):
                assert found == 0
            elif how.temperature == 0:
                assert found == order[0], (found, order[0])
            else:
                low, high = allowed_places(weights, how, uniforms[slot, past[row].item()].item())
                assert found in order[low : high + 1], (found, low, high, np.flatnonzero(order == found))
    return 0.0


def check_logprobs(pick, dtype):
    rows, width = pick(1, 9), (pick(1, 300), pick(1000, 130000))[pick(0, 1)]
    limit = (pick(0, 20), pick(0, 256))[pick(0, 1)]
    slots, slot_of = some_slots(pick, rows)
    logits = some_logits(pick, rows, width, dtype)
    logits[:, pick(0, width - 1)] = 1  # not all -infinity
    host, settings = settings_of(slots, lambda: {"logprobs": pick(-1, limit + 3), "temperature": pick(0, 2)})
    chosen = torch.randint(width, (rows,), dtype=torch.int32, device="cuda")
    ids = torch.full((rows, limit + 1), -7, dtype=torch.int32, device="cuda")
    values = torch.full((rows, limit + 1), 7.0, device="cuda")
    expected_ids, expected = ids.cpu().numpy(), values.double().cpu().numpy()
    exact = logits.double().log_softmax(-1).cpu().numpy()
    for row, slot in enumerate(slot_of.tolist()):
        wanted = host[slot].logprobs
        if wanted >= 0:
            order = np.argsort(-logits[row].double().cpu().numpy(), kind="stable")[: min(wanted, limit)]
            reported = [chosen[row].item(), *order]
            expected_ids[row, : len(reported)], expected[row, : len(reported)] = reported, exact[row, reported]
    call("logprobs", logits, rows, width, code(dtype), settings, slot_of, chosen, limit, ids, values)
    assert np.array_equal(ids.cpu().numpy(), expected_ids)
    found = values.double().cpu().numpy()
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)
    finite = np.isfinite(expected)  # a token that cannot be chosen may be all that is reported
    differences, sizes = np.abs(found[finite] - expected[finite]), np.abs(expected[finite])
    return float(differences.max(initial=0) / (1 + sizes.max(initial=0)))


def check_linear(pick, dtype):
    # PyTorch has loaded cuBLASLt; without it our kernels multiply many rows too.
    by_library = pick(0, 1)
    assert library.cqil_linear_library(by_library) == by_library, library.cqil_last_error()
    rows = (1, pick(2, 8), pick(9, 16), pick(17, 64), pick(65, 300))[pick(0, 4)]
    # Widths that no 16 bytes divide take another kernel, and one row of a large width one with a shorter ring.
    widest = 3500 if rows == 1 and pick(0, 2) == 0 else 400
    outputs, inputs = pick(1, 3000), pick(1, widest) * 8 + (pick(1, 7) if pick(0, 3) == 0 else 0)
    gating, (biased, added) = pick(0, 2), (bool(pick(0, 1)) for _ in range(2))
    gated, scale = gating > 0, 0.0 if gating else (0, pick(1, 30) / 10)[pick(0, 1)]
    added = added and not gated
    normed = pick(0, 2)  # 0: no norm, 2: of a sum
    x, delta = (torch.randn(rows, inputs, device="cuda").to(dtype) for _ in range(2))
    weight = (torch.randn(outputs * (1 + gated), inputs, device="cuda") / inputs**0.5).to(dtype)
    bias = torch.randn(outputs * (1 + gated), device="cuda").to(dtype)
    norm = (1 + 0.2 * torch.randn(inputs, device="cuda")).to(dtype)
    residual = torch.randn(rows, outputs, device="cuda").to(dtype)
    out = torch.empty_like(residual)
    total = torch.empty_like(residual) if added and pick(0, 1) else None
    sizes = {"rows": rows, "outputs": outputs, "inputs": inputs}
    shape = abi.cqil_linear_shape(**sizes, gated=gating, dtype=code(dtype), eps=1e-5, scale=scale)
    scratch = torch.empty(library.cqil_linear_scratch_bytes(shape), dtype=torch.uint8, device="cuda")
    given = [x, delta if normed == 2 else None, weight, bias if biased else None, norm if normed else None]
    call("linear", shape, *given, residual if added else None, out, total, scratch)
    if pick(0, 7) == 0:  # the same in a graph
        torch.cuda.synchronize()
        direct, graph = out.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            call("linear", shape, *given, residual if added else None, out, total, scratch)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, direct)
    wide = x.double() if normed < 2 else (x.double() + delta.double()).to(dtype).double()
    if normed:
        wide = rms_norm(wide, norm.double(), 1e-5)
    expected = wide @ weight.double().T + (bias.double() if biased else 0)
    if gated:
        gate, up = expected.chunk(2, -1)
        expected = activation(gating)(gate) * up
    expected = expected * (scale or 1)
    if total is not None:
        assert torch.equal(total, (out.float() + residual.float()).to(dtype))
        added = False
    return relative(out, expected + residual.double() if added else expected)


def check_attention(pick, dtype):
    kv_heads, group, dim = pick(1, 4), pick(1, 5), (8, 16, 20, 24, 64, 80, 96, 128, 256)[pick(0, 8)]
    # A rank's share of the heads may begin and end inside a group.
    first = pick(0, group - 1)
    heads = pick((kv_heads - 1) * group + 1, kv_heads * group) - first
    if heads < 1 or (heads - 1 + first) // group != kv_heads - 1:
        first, heads = 0, kv_heads * group
    capacity, max_batch = pick(40, 700), pick(1, 5)
    slots, norms, eps = pick(1, max_batch), bool(pick(0, 1)), 1e-6
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
    in_order = pick(0, 3) == 0  # row b is in slot b
    used = list(range(slots)) if in_order else torch.randperm(max_batch)[:slots].tolist()
    seen = {slot: ([], []) for slot in used}
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
        batch = pick(1, slots)
        slot_of = used[:batch] if in_order else [used[i] for i in torch.randperm(slots)[:batch].tolist()]
        pasts = [len(seen[slot][0]) for slot in slot_of]
        past, rows = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (pasts, slot_of))
        qkv = torch.randn(batch, length, heads + 2 * kv_heads, dim, device="cuda").to(dtype)
        shape.batch, shape.length = batch, length
        scratch = torch.empty(library.cqil_attention_scratch_bytes(shape), dtype=torch.uint8, device="cuda")
        out = torch.empty(batch, length, heads, dim, dtype=dtype, device="cuda")
        weights = (q_norm, k_norm) if norms else (None, None)
        call("attention", shape, qkv, past, None if in_order else rows, cos, sin, *weights, None, cache, out, scratch)
        expected = torch.empty(batch, length, heads, dim, dtype=torch.double, device="cuda")
        for b in range(batch):
            for t in range(length):
                position = pasts[b] + t
                q, k, v = qkv[b, t].double().split([heads, kv_heads, kv_heads])
                if norms:
                    q, k = rms_norm(q, q_norm.double(), eps), rms_norm(k, k_norm.double(), eps)
                keys, values = seen[slot_of[b]]
                keys.append(rotate(k, position))
                values.append(v)
            all_keys, all_values = torch.stack(keys), torch.stack(values)
            for t in range(length):
                position = pasts[b] + t
                q = qkv[b, t, :heads].double()
                q = rotate(rms_norm(q, q_norm.double(), eps) if norms else q, position)
                k, v = all_keys[: position + 1, kv_of], all_values[: position + 1, kv_of]
                scores = torch.einsum("hd,khd->hk", q, k) / dim**0.5
                expected[b, t] = torch.einsum("hk,khd->hd", scores.softmax(-1), v)
        worst = max(worst, relative(out, expected))
    return worst


class Form:
    """What families other than LLaMA have of attention, at random: fields of the shape, tables, norms, and float64."""

    def __init__(self, pick, dtype, heads, kv_heads, dim, capacity):
        self.heads, self.kv_heads, self.dim, kinds = heads, kv_heads, dim, abi.cqil_norm
        self.window = (0, pick(1, 40), pick(1, capacity + 9))[pick(0, 2)]
        self.rotary = (0, dim, 2 * pick(1, dim // 2), dim // 4 * 2)[pick(0, 3)]
        self.kind = (kinds.CQIL_NORM_ROUNDED, kinds.CQIL_NORM_WIDE, kinds.CQIL_NORM_OFFSET)[pick(0, 2)]
        self.scale = (0.0, pick(1, 20) / 10 / dim**0.5)[pick(0, 1)]
        self.cap = (0.0, pick(2, 60) / 10)[pick(0, 1)]
        self.fields = {"window": self.window, "rotary": self.rotary, "norm": self.kind}
        self.fields |= {"scale": self.scale, "cap": self.cap}
        half = (self.rotary or dim) // 2
        angles = torch.rand(capacity, half, device="cuda") * 6
        self.tables = (None, None) if pick(0, 4) == 0 else (angles.cos(), angles.sin())
        self.joint, self.norms = pick(0, 3) == 0, (None, None)
        if self.joint or pick(0, 1):
            sizes = (heads * dim, kv_heads * dim) if self.joint else (dim, dim)
            offset = self.kind != kinds.CQIL_NORM_OFFSET
            self.norms = tuple((0.2 * torch.randn(size, device="cuda") + offset).to(dtype) for size in sizes)

    def squares(self, qkv):
        """What cqil_attention takes of qkv [rows, heads, dim]: the means, of which other ranks may have a part."""
        if not self.joint:
            return None
        q, k, _ = qkv.double().split([self.heads, self.kv_heads, self.kv_heads], -2)
        return torch.stack([x.square().mean((-2, -1)) for x in (q, k)], -1).float().contiguous()

    def taken(self, qkv, position):
        """Queries, keys and values of tokens [length, heads, dim] from a position on, float64."""
        parts = list(qkv.double().split([self.heads, self.kv_heads, self.kv_heads], -2))
        for i, norm in enumerate(self.norms):
            x = parts[i]
            if norm is not None:
                mean = self.squares(qkv).double()[:, i, None, None] if self.joint else x.square().mean(-1, keepdim=True)
                weight = norm.double().view(-1, self.dim) + (self.kind == abi.cqil_norm.CQIL_NORM_OFFSET)
                x = x / (mean + 1e-6).sqrt() * weight
            if self.tables[0] is not None:
                c, s = (table[position : position + len(qkv), None].double() for table in self.tables)
                half = c.shape[-1]
                a, b, rest = x.split([half, half, self.dim - 2 * half], -1)
                x = torch.cat((a * c - b * s, b * c + a * s, rest), -1)
            parts[i] = x
        return parts

    def attended(self, q, keys, values, position):
        """The results of queries from a position on, over all keys and values of the sequence (of each query head)."""
        scores = torch.einsum("thd,khd->htk", q, keys) * (self.scale or self.dim**-0.5)
        if self.cap:
            scores = self.cap * torch.tanh(scores / self.cap)
        index = torch.arange(len(keys), device="cuda")
        here = position + torch.arange(len(q), device="cuda")[:, None]
        seen = (index <= here) & (index > here - (self.window or len(keys)))
        return torch.einsum("htk,khd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)


def kept_of(pick, form, positions, longest):
    """How many positions a cache holds: all, or with a window perhaps a circle for steps of up to `longest` tokens."""
    least = form.window + longest - 1
    circle = least + -least % abi.CQIL_CIRCLE_STEP
    return circle if form.window and circle < positions and pick(0, 2) else positions


def check_forms(pick, dtype):
    """Attention of other families, in chunks of prompts, single tokens and drafts, some far round a circle."""
    dim, capacity = (8, 12, 20, 64, 80, 96, 128, 128, 256, 256)[pick(0, 9)], pick(60, 900)
    return form_error(pick, dtype, pick(1, 3), pick(1, 4), dim, capacity, pick(1, 3), pick(16, 100))


def check_many_queries(pick, dtype):
    """The same where chunks and heads are so many that a block of a prompt's attention takes more queries."""
    chunk = pick(1300, 1500)
    dim, lengths = (64, 128)[pick(0, 1)], [pick(1, 250), chunk]
    return form_error(pick, dtype, 8, 5, dim, sum(lengths) + pick(40, 900), 1, chunk, lengths)


def form_error(pick, dtype, kv_heads, group, dim, capacity, slots, chunk, lengths=()):
    """The largest relative error for a random form.

    `chunk`: tokens of one step, at most, where the cache is a circle; `lengths`: of the chunks, by default random.
    """
    heads = kv_heads * group
    form = Form(pick, dtype, heads, kv_heads, dim, capacity)
    kept = kept_of(pick, form, capacity, chunk)
    fields = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "capacity": kept, "max_batch": slots}
    fields |= {"group": group, "first": 0, "dtype": code(dtype), "eps": 1e-6, **form.fields, "positions": capacity}
    size = library.cqil_attention_cache_bytes(abi.cqil_attention_shape(batch=1, length=1, **fields))
    cache = torch.full((size,), 255, dtype=torch.uint8, device="cuda")  # NaN where nothing was written
    cache[2 * slots * kv_heads * kept * dim * dtype.itemsize :] = 0
    if kept < capacity:  # as many chunks as there is room for
        lengths = lengths or [pick(2, chunk) for _ in range((capacity - 40) // chunk)]
    lengths = list(lengths) or [pick(2, capacity - 40)]
    seen = [[torch.empty(0, heads, dim, dtype=torch.double, device="cuda") for _ in range(2)] for _ in range(slots)]
    worst = 0.0
    lengths += [1, pick(2, 16), -pick(2, 9)]
    for length in lengths:
        length, drafts = abs(length), length < 0
        order = torch.randperm(slots)[: pick(1, slots)].tolist()
        pasts, batch = [len(seen[slot][0]) for slot in order], len(order)
        past, rows = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (pasts, order))
        if drafts:
            past = (past[:, None] + torch.arange(length, device="cuda")).int().flatten()
            rows = rows.repeat_interleave(length)
        qkv = torch.randn(batch, length, heads + 2 * kv_heads, dim, device="cuda").to(dtype)
        shape = abi.cqil_attention_shape(batch=batch, length=length, drafts=drafts, **fields)
        scratch = torch.empty(library.cqil_attention_scratch_bytes(shape), dtype=torch.uint8, device="cuda")
        out = torch.full((batch, length, heads, dim), torch.nan, dtype=dtype, device="cuda")
        inputs = past, rows, *form.tables, *form.norms, form.squares(qkv.flatten(0, 1))
        call("attention", shape, qkv, *inputs, cache, out, scratch)
        expected = torch.empty(out.shape, dtype=torch.double, device="cuda")
        for b, slot in enumerate(order):
            q, *new = form.taken(qkv[b], pasts[b])
            new = [x.repeat_interleave(group, 1) for x in new]
            seen[slot] = [torch.cat(pair) for pair in zip(seen[slot], new)]
            expected[b] = form.attended(q, *seen[slot], pasts[b])
        worst = max(worst, relative(out, expected))
    return worst


def check_fp8_circle(pick, dtype):
    """Round a circle in FP8, attention has the bits that it has over a cache of all positions."""
    kv_heads, group, dim, positions = pick(1, 3), pick(1, 4), (8, 20, 64, 80, 128, 256)[pick(0, 5)], pick(300, 900)
    heads, window, chunk = kv_heads * group, pick(1, 80), pick(16, 100)
    circle = window + chunk - 1
    circle += -circle % abi.CQIL_CIRCLE_STEP
    fields = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "max_batch": 1, "group": group, "first": 0}
    fields |= {"dtype": code(dtype), "eps": 1e-6, "window": window, "positions": positions, **fp8_cache(pick)}
    angles = torch.rand(positions, dim // 2, device="cuda") * 6
    tables, past = (angles.cos(), angles.sin()), 0
    caches = {}
    for capacity in (circle, positions):
        size = library.cqil_attention_cache_bytes(abi.cqil_attention_shape(**fields, capacity=capacity))
        caches[capacity] = torch.zeros(size, dtype=torch.uint8, device="cuda")
    while past < positions:
        drafts = pick(0, 2) == 0
        length = min((pick(1, chunk), pick(1, 9))[drafts], positions - past)
        qkv = torch.randn(length, heads + 2 * kv_heads, dim, device="cuda").to(dtype)
        places = torch.arange(past, past + length, dtype=torch.int32, device="cuda")
        found = []
        for capacity, cache in caches.items():
            shape = abi.cqil_attention_shape(batch=1, length=length, drafts=drafts, **fields, capacity=capacity)
            scratch = torch.empty(library.cqil_attention_scratch_bytes(shape), dtype=torch.uint8, device="cuda")
            found.append(torch.full((length, heads, dim), torch.nan, dtype=dtype, device="cuda"))
            inputs = places, torch.zeros_like(places), *tables, None, None, None
            call("attention", shape, qkv, *inputs, cache, found[-1], scratch)
        torch.cuda.synchronize()
        assert torch.equal(*found) and found[0].isfinite().all(), f"tokens from {past} on differ"
        past += length
    return 0.0


def fp8_cache(pick):
    """The fields of a shape whose cache is in FP8. With the first scale many keys are larger than all codes."""
    keys, values = (1 / 256, 0.3, 1.0, 2.5)[pick(0, 3)], (0.07, 1.0, 1.9)[pick(0, 2)]
    return {"cache": int(abi.cqil_cache.CQIL_CACHE_FP8), "key_scale": keys, "value_scale": values}


def fp8_codes(x, scale):
    return (x.float() * (1 / torch.tensor(scale, dtype=torch.float32)).item()).clamp(-448, 448).to(FP8)


def check_fp8_cache(pick, dtype):
    """A cache in FP8 holds the nearest codes, the same ones of a prompt at once, in chunks, token by token and drafted.

    Attention is judged by the codes in the cache.
    """
    kv_heads, group, dim = pick(1, 3), pick(1, 4), (8, 20, 64, 80, 128, 256)[pick(0, 5)]
    heads, capacity, length = kv_heads * group, pick(120, 400), pick(4, 110)
    fields = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "capacity": capacity, "max_batch": 3}
    fields |= {"group": group, "first": 0, "dtype": code(dtype), "eps": 1e-6, **fp8_cache(pick)}
    scales = fields["key_scale"], fields["value_scale"]
    cache = torch.zeros(
        library.cqil_attention_cache_bytes(abi.cqil_attention_shape(**fields)), dtype=torch.uint8, device="cuda"
    )
    qkv = torch.randn(length, heads + 2 * kv_heads, dim, device="cuda").to(dtype)
    qkv[pick(0, length - 1), -kv_heads:] *= 1000
    angles = torch.arange(capacity)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    table = angles.cos().cuda(), angles.sin().cuda()
    norms = [(1 + 0.2 * torch.randn(dim, device="cuda")).to(dtype) for _ in range(2)] if pick(0, 1) else [None, None]
    found = torch.empty(3, length, heads, dim, dtype=dtype, device="cuda")

    def attend(slot, first, last, drafts=False):
        shape = abi.cqil_attention_shape(batch=1, length=last - first, **fields, drafts=drafts)
        past, slots = (torch.full((length,), n, dtype=torch.int32, device="cuda") for n in (first, slot))
        out = torch.empty(last - first, heads, dim, dtype=dtype, device="cuda")
        scratch = torch.empty(library.cqil_attention_scratch_bytes(shape), dtype=torch.uint8, device="cuda")
        call("attention", shape, qkv[first:last].clone(), past, slots, *table, *norms, None, cache, out, scratch)
        torch.cuda.synchronize()
        found[slot, first:last] = out

    attend(2, 0, length)
    border = pick(1, length - 1)
    for first, last in ((0, border), (border, length)):
        attend(0, first, last)
    drafted = max(1, length - 5)
    for token in range(drafted):
        attend(1, token, token + 1)
    attend(1, drafted, length, drafts=True)

    every = cache[: 2 * 3 * kv_heads * capacity * dim].view(2, 3, kv_heads, capacity, dim)[..., :length, :]
    assert all(torch.equal(every[:, 2], every[:, slot]) for slot in (0, 1)), "codes depend on how tokens came"
    codes = every[:, 2].contiguous().view(FP8).transpose(1, 2)  # [2, length, kv_heads, dim]
    q, k, v = qkv.double().split([heads, kv_heads, kv_heads], 1)
    assert torch.equal(codes[1].view(torch.uint8), fp8_codes(v, scales[1]).view(torch.uint8))
    if norms[0] is not None:
        q, k = (rms_norm(x, weight.double(), 1e-6) for x, weight in zip((q, k), norms))
    cos, sin = (part[:length, None].double() for part in table)
    q, k = (rotate_half(x, cos, sin) for x in (q, k))
    wanted = (k / scales[0]).clamp(-448, 448)
    spacing = 2.0 ** (wanted.abs().clamp(min=2.0**-6).log2().floor() - 3)
    slack = 4 * torch.finfo(dtype).eps * (k / scales[0]).abs().amax(-1, keepdim=True)
    assert ((codes[0].double() - wanted).abs() <= spacing / 2 + slack).all(), "a code is not the nearest"

    keys, values = (part.double() * scale for part, scale in zip(codes, scales))
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q, keys) / dim**0.5
    hidden = torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1)
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
    return max(relative(out, expected) for out in found)


def finite(dtype):
    """All finite values of a half type; for float32 those of float16, and more of where silu is steep."""
    if dtype == torch.float32:
        return torch.cat((finite(torch.float16).float(), torch.linspace(-110, 110, 100_001, device="cuda")))
    values = torch.arange(1 << 16, device="cuda").to(torch.int16).view(dtype)
    return values[values.isfinite()].contiguous()


def check_one_gate(pick, dtype):
    """Each gating is one function, whichever kernel computes it, and exact to the type's rounding."""
    gating = pick(1, 2)
    gate = finite(dtype)
    count = len(gate)
    up = (1, -1)[pick(0, 1)] * (torch.rand(count, device="cuda") / 2 + 0.5).to(dtype)
    direct = torch.empty(count, dtype=dtype, device="cuda")
    call("gate", torch.cat((gate, up)), direct, 1, count, gating, code(dtype))
    # A product with a row that is 1 and zeros is the weight's first column.
    weight = torch.zeros(2 * count, 8, dtype=dtype, device="cuda")
    weight[:, 0] = torch.cat((gate, up))
    for rows in (1, 3):
        x = torch.zeros(rows, 8, dtype=dtype, device="cuda")
        x[:, 0] = 1
        shape = abi.cqil_linear_shape(rows=rows, outputs=count, inputs=8, gated=gating, dtype=code(dtype), eps=1e-5)
        scratch = torch.empty(library.cqil_linear_scratch_bytes(shape), dtype=torch.uint8, device="cuda")
        out = torch.empty(rows, count, dtype=dtype, device="cuda")
        call("linear", shape, x, None, weight, None, None, None, out, None, scratch)
        different = int((out != direct).sum())
        assert different == 0, f"{different} of {out.numel()} elements of {rows} rows differ from cqil_gate's"
    wide = gate.double()
    if gating == abi.cqil_gating.CQIL_SWIGLU:
        exact = wide / (1 + (-wide).exp()) * up.double()
    else:
        exact = wide / (1 + (-2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)).exp()) * up.double()
    # Half a unit in the last place of 11 and of 8 significant bits, with room for float32's own rounding. Below the
    # floor float32 flushes to zero.
    bound = {torch.float32: 5e-7, torch.float16: 2.0**-11 * 1.01, torch.bfloat16: 2.0**-8 * 1.01}[dtype]
    if gating == abi.cqil_gating.CQIL_GEGLU:
        # The exponent, up to 88 where a result is not zero, has float32's rounding and that of its polynomial.
        bound += 88 * 2.0**-22
    floor = {torch.float32: 2e-36, torch.float16: 2.0**-25 * 1.01, torch.bfloat16: 2e-36}[dtype]
    wrong = (direct.double() - exact).abs() > bound * exact.abs() + floor
    assert not wrong.any(), f"{int(wrong.sum())} of {count} gates beyond rounding, e.g. {gate[wrong][0].item()}"
    return relative(direct, exact)


def product_of(chosen, shape, x, delta, weight, bias, norm, residual, summed):
    """The product of these rows of x, delta and residual; `shape` without the number of rows.

    `summed`: without the residual, and next to it the sum with it.
    """
    chosen = torch.tensor(chosen, device="cuda")
    wanted = abi.cqil_linear_shape(rows=len(chosen), **shape)
    scratch = torch.empty(library.cqil_linear_scratch_bytes(wanted), dtype=torch.uint8, device="cuda")
    out, total = torch.full((2, len(chosen), wanted.outputs), torch.nan, dtype=x.dtype, device="cuda")
    part, more, old = (None if t is None else t[chosen].contiguous() for t in (x, delta, residual))
    call("linear", wanted, part, more, weight, bias, norm, old, out, total if summed else None, scratch)
    return torch.cat((out, total), 1) if summed else out


def check_rows(pick, dtype):
    """A row's product has the same bits in every batch."""
    quick = library.cqil_linear_rows(code(dtype))
    assert quick == (1 if dtype == torch.float32 else 16), "this GPU has no kernel for few rows"
    if quick == 1:
        return 0.0
    rows = 16
    outputs, inputs = pick(1, 3000), pick(1, 1400) * 8
    gated, (normed, added) = pick(0, 2), (bool(pick(0, 1)) for _ in range(2))
    x = (torch.randn(rows, inputs, device="cuda") * 10 ** (0.3 * torch.randn(rows, 1, device="cuda"))).to(dtype)
    delta = torch.randn(rows, inputs, device="cuda").to(dtype) if normed and pick(0, 2) == 0 else None
    weight = (torch.randn(outputs * (1 + bool(gated)), inputs, device="cuda") / inputs**0.5).to(dtype)
    norm = (1 + 0.2 * torch.randn(inputs, device="cuda")).to(dtype) if normed else None
    residual = torch.randn(rows, outputs, device="cuda").to(dtype) if added and not gated else None
    summed = residual is not None and pick(0, 1) == 1

    shape = {"outputs": outputs, "inputs": inputs, "gated": gated, "dtype": code(dtype), "eps": 1e-5}

    def product(chosen):
        return product_of(chosen, shape, x, delta, weight, None, norm, residual, summed)

    whole = product(range(rows))
    for _ in range(8):
        chosen = torch.randperm(rows)[: pick(1, rows)].tolist()
        different = int((product(chosen) != whole[chosen]).sum())
        assert different == 0, f"{different} elements differ between {len(chosen)} and {rows} rows"
    assert torch.isfinite(whole).all()
    return 0.0


def some_codes(pick, kind, outputs, inputs, size, first, dtype):
    """Codes, scales and zero points as engines store them, and W in float64."""
    small = kind == abi.cqil_weights.CQIL_INT4
    codes = torch.randint(16 if small else 256, (outputs, inputs), dtype=torch.uint8, device="cuda")
    if kind == abi.cqil_weights.CQIL_FP8:
        codes[codes % 128 == 127] = 0  # not a number
        values = codes.view(torch.float8_e4m3fn).double()
    else:
        values = codes.double() if small else codes.view(torch.int8).double()
    groups = (first + inputs - 1) // size + 1 if size else 1
    # Results of about 1.
    size_of_code = {abi.cqil_weights.CQIL_FP8: 100, abi.cqil_weights.CQIL_INT8: 74}.get(kind, 6) * inputs**0.5
    scales = ((0.1 + torch.rand(outputs, groups, device="cuda")) / size_of_code).to(dtype if small else torch.float32)
    zeros = torch.randint(17, scales.shape, dtype=torch.uint8, device="cuda") if small and pick(0, 3) else None
    group = (first + torch.arange(inputs, device="cuda")) // size if size else torch.zeros(inputs, dtype=torch.long)
    exact = values if zeros is None else values - zeros[:, group].double()
    if small:
        padded = torch.nn.functional.pad(codes, (0, inputs % 2))
        codes = padded[:, ::2] | padded[:, 1::2] << 4
    return codes.contiguous(), scales, zeros, exact * scales[:, group].double()


def check_packed(pick, dtype):
    """Packed weights: what is packed comes back, products agree with float64, and a row's bits stay the same."""
    kinds = abi.cqil_weights
    kind = (kinds.CQIL_FP8, kinds.CQIL_INT8, kinds.CQIL_INT4, kinds.CQIL_INT4)[pick(0, 3)]
    small = kind == kinds.CQIL_INT4
    # Of wide inputs neither x nor the norm's weight fits into shared memory. Many outputs take several passes.
    ranges = [((1, 3000), (1, 1400))] * 4 + [((1, 200), (2048, 12000)), ((3000, 20000), (1, 256))]
    of_outputs, of_inputs = ranges[pick(0, 5)]
    outputs, inputs = pick(*of_outputs), pick(*of_inputs) * 8
    gating, (biased, added, normed) = pick(0, 2), (bool(pick(0, 1)) for _ in range(3))
    gated, scale = gating > 0, 0.0 if gating else (0, pick(1, 30) / 10)[pick(0, 1)]
    added = added and not gated
    group = 32 << pick(0, 2) if small else 0
    size = group * pick(1, 3) if small and pick(0, 5) else 0
    first = group * pick(0, size // group - 1) if size else 0
    shape = {"outputs": outputs, "inputs": inputs, "gated": gating, "dtype": code(dtype), "eps": 1e-5}
    shape |= {"weights": kind, "group": group, "scale": scale}
    codes, scales, zeros, weight = some_codes(pick, kind, outputs * (1 + gated), inputs, size, first, dtype)
    stored = codes, scales, zeros, size, first
    dense = torch.full(weight.shape, torch.nan, dtype=dtype, device="cuda")
    call("dequantize", abi.cqil_linear_shape(**shape), *stored, dense)
    assert torch.equal(dense, weight.float().to(dtype))
    if dtype == torch.float32:
        return 0.0
    assert library.cqil_packed_rows() == 32, "this GPU has no kernel for packed weights"
    packed = torch.empty(library.cqil_packed_bytes(abi.cqil_linear_shape(**shape)), dtype=torch.uint8, device="cuda")
    call("pack", abi.cqil_linear_shape(**shape), *stored, packed)
    dense.fill_(torch.nan)
    call("unpack", abi.cqil_linear_shape(**shape), packed, dense)
    assert torch.equal(dense, weight.float().to(dtype))

    rows = (1, pick(2, 8), pick(9, 40))[pick(0, 2)]
    x = (torch.randn(rows, inputs, device="cuda") * 10 ** (0.3 * torch.randn(rows, 1, device="cuda"))).to(dtype)
    delta = torch.randn(rows, inputs, device="cuda").to(dtype) if normed and pick(0, 2) == 0 else None
    norm = (1 + 0.2 * torch.randn(inputs, device="cuda")).to(dtype) if normed else None
    bias = torch.randn(outputs * (1 + gated), device="cuda").to(dtype) if biased else None
    residual = torch.randn(rows, outputs, device="cuda").to(dtype) if added else None
    summed = added and pick(0, 1) == 1

    def product(chosen):
        return product_of(chosen, shape, x, delta, packed, bias, norm, residual, summed)

    whole = product(range(rows))
    for _ in range(3):
        chosen = torch.randperm(rows)[: pick(1, rows)].tolist()
        assert torch.equal(product(chosen), whole[chosen])
    for _ in range(20):  # weights that are copied over those in use are seen only now and then
        assert torch.equal(product(range(rows)), whole)
    wide = x.double() if delta is None else (x.double() + delta.double()).to(dtype).double()
    if normed:
        wide = rms_norm(wide, norm.double(), 1e-5).to(dtype).double()
    expected = wide @ weight.T + (0 if bias is None else bias.double())
    if gated:
        gate, up = expected.chunk(2, -1)
        expected = activation(gating)(gate) * up
    expected = expected * (scale or 1)
    if summed:
        whole, total = whole.chunk(2, 1)
        assert torch.equal(total, (whole.float() + residual.float()).to(dtype))
        added = False
    return relative(whole, expected + residual.double() if added else expected)


def check_sequences(pick, dtype):
    """A sequence's attention has the same bits in every batch, and where its tokens are drafts of one step."""
    heads, group, dim, capacity, batch = pick(1, 8), pick(1, 4), (64, 128, 80, 256)[pick(0, 3)], pick(40, 2000), 20
    fields = {"heads": heads * group, "kv_heads": heads, "head_dim": dim, "capacity": capacity, "max_batch": batch}
    fields |= {"group": group, "first": 0, "dtype": code(dtype), "eps": 1e-6}
    form = Form(pick, dtype, heads * group, heads, dim, capacity) if pick(0, 1) else None
    fields |= form.fields if form else {}
    kept = kept_of(pick, form, capacity, 8) if form else capacity
    fields |= {"capacity": kept, "positions": capacity}
    fields |= fp8_cache(pick) if pick(0, 1) else {}
    stored = FP8 if "cache" in fields else dtype
    past = torch.tensor([pick(0, capacity - 1) for _ in range(batch)], dtype=torch.int32, device="cuda")
    qkv = torch.randn(batch, heads * (group + 2), dim, device="cuda").to(dtype)
    table = torch.ones(capacity, dim // 2, device="cuda"), torch.zeros(capacity, dim // 2, device="cuda")
    norms = [None, None]
    if form:
        table, norms = form.tables, form.norms

    def squares(qkv):
        return form.squares(qkv.reshape(-1, heads * (group + 2), dim)) if form else None

    size = library.cqil_attention_cache_bytes(abi.cqil_attention_shape(batch=1, length=1, **fields))
    elements = 2 * batch * heads * kept * dim
    cache = torch.zeros(size, dtype=torch.uint8, device="cuda")
    cache[: elements * stored.itemsize].view(stored).copy_(torch.randn(elements, device="cuda"))

    def attended(chosen):
        shape = abi.cqil_attention_shape(batch=len(chosen), length=1, **fields)
        slots = torch.tensor(chosen, dtype=torch.int32, device="cuda")
        out = torch.empty(len(chosen), heads * group * dim, dtype=dtype, device="cuda")
        scratch = torch.empty(library.cqil_attention_scratch_bytes(shape), dtype=torch.uint8, device="cuda")
        inputs = qkv[chosen].contiguous(), past[chosen].contiguous(), slots
        call("attention", shape, *inputs, *table, *norms, squares(inputs[0]), cache, out, scratch)
        torch.cuda.synchronize()
        return out

    whole = attended(list(range(batch)))
    for _ in range(6):
        chosen = torch.randperm(batch)[: pick(1, batch)].tolist()
        different = int((attended(chosen) != whole[chosen]).sum())
        assert different == 0, f"{different} elements differ between {len(chosen)} and {batch} sequences"

    # `width` tokens of some sequences one after the other, then together; the last may be beyond the capacity.
    width, chosen = pick(2, 8), torch.randperm(batch)[: pick(1, 4)].tolist()
    count = len(chosen)
    qkv = torch.randn(count, width, heads * (group + 2), dim, device="cuda").to(dtype)
    if not form:
        norms = [(1 + 0.2 * torch.randn(dim, device="cuda")).to(dtype) for _ in range(2)] if pick(0, 1) else norms
        angles = torch.rand(capacity, dim // 2, device="cuda") * 6
        table = angles.cos(), angles.sin()
    slots = torch.tensor(chosen, dtype=torch.int32, device="cuda")
    start = past[chosen].clone()
    start[0] = max(0, capacity - pick(1, 2 * width))
    before, alone = cache.clone(), torch.full((count, width, heads * group * dim), torch.nan, device="cuda").to(dtype)
    for token in range(width):
        fits = [i for i in range(count) if start[i] + token < capacity]
        if not fits:
            break
        shape = abi.cqil_attention_shape(batch=len(fits), length=1, **fields)
        inputs = qkv[fits, token].contiguous(), (start[fits] + token).contiguous(), slots[fits].contiguous()
        out = torch.empty(len(fits), heads * group * dim, dtype=dtype, device="cuda")
        call("attention", shape, *inputs, *table, *norms, squares(inputs[0]), cache, out, None)
        torch.cuda.synchronize()
        alone[fits, token] = out
    after = cache.clone()
    cache.copy_(before)
    shape = abi.cqil_attention_shape(batch=count, length=width, **fields, drafts=True)
    rows = start.repeat_interleave(width), slots.repeat_interleave(width)
    together = torch.full_like(alone, torch.nan)
    call("attention", shape, qkv, *rows, *table, *norms, squares(qkv), cache, together, None)
    torch.cuda.synchronize()
    valid = (start[:, None] + torch.arange(width, device="cuda") < capacity).cpu()
    assert torch.equal(together[valid], alone[valid]), "drafts differ from single tokens"
    assert torch.equal(cache[: elements * stored.itemsize], after[: elements * stored.itemsize])
    return 0.0


def check_accept(pick, dtype):
    """Drafts are accepted up to the first that was not chosen; what follows from it reaches slots, counts and host."""
    sequences, width, vocabulary, last = pick(1, 5), pick(1, 9), 7, pick(5, 40)
    slots, slot_of = some_slots(pick, sequences)
    rows = sequences * width
    slot_tokens = torch.randint(vocabulary, (slots,), dtype=torch.int32, device="cuda")
    slot_past = torch.randint(last + 1, (slots,), dtype=torch.int32, device="cuda")
    drafts = torch.randint(vocabulary, (rows,), dtype=torch.int32, device="cuda")
    drafted = torch.randint(width, (sequences,), dtype=torch.int32, device="cuda")
    row_slots = slot_of.repeat_interleave(width)
    tokens, past = torch.full_like(drafts, -1), torch.full_like(drafts, -1)
    call("arrange", row_slots, slot_tokens, slot_past, drafts, tokens, past, rows, width, last)
    fed = drafts.view(sequences, width).clone()
    fed[:, 0] = slot_tokens[slot_of.long()]
    assert torch.equal(tokens.view(sequences, width), fed)
    positions = slot_past[slot_of.long()][:, None] + torch.arange(width, device="cuda")
    assert torch.equal(past.view(sequences, width), positions.clamp(max=last).int())
    # Mostly what was drafted.
    chosen = torch.randint(vocabulary, (sequences, width), dtype=torch.int32, device="cuda")
    agrees = torch.rand(sequences, width - 1, device="cuda") < 0.8
    chosen[:, :-1] = torch.where(agrees, fed[:, 1:], chosen[:, :-1])
    counts = torch.zeros(slots, vocabulary, dtype=torch.int32, device="cuda")
    expected = slot_tokens.tolist(), slot_past.tolist(), counts.tolist()
    for i, slot in enumerate(slot_of.tolist()):
        for at in range(int(drafted[i]) + 1):
            token = int(chosen[i, at])
            expected[2][slot][token] += 1
            expected[0][slot] = token
            expected[1][slot] = min(int(past[i * width]) + at + 1, last)
            if at + 1 < width and token != int(fed[i, at + 1]):
                break
    before, step = some_step(pick)
    history = torch.zeros(4, rows + 3, dtype=torch.int64).pin_memory()
    state = chosen, tokens, drafted, row_slots, past, slot_tokens, slot_past, counts, vocabulary
    call("accept", *state, rows, width, last, step, history, 4, rows + 3)
    torch.cuda.synchronize()
    assert (slot_tokens.tolist(), slot_past.tolist(), counts.tolist()) == expected
    check_told(before, step, history, chosen.flatten())
    return 0.0


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
    """One layer's attention, one token at a time, and the same in float64. Row b is in slot `slots[b]` of `count`."""

    def __init__(self, dtype, slots, count, heads, kv_heads, dim, capacity, filled, window=0):
        self.window = window or capacity
        self.dtype, self.slots, self.heads, self.kv_heads, self.dim = dtype, slots, heads, kv_heads, dim
        self.batch = len(slots)
        self.shape = abi.cqil_attention_shape(
            batch=self.batch,
            length=1,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=dim,
            capacity=capacity,
            max_batch=count,
            group=heads // kv_heads,
            first=0,
            dtype=code(dtype),
            eps=1e-6,
            window=window,
        )
        size = library.cqil_attention_cache_bytes(self.shape)
        self.memory = torch.zeros(size, dtype=torch.uint8, device="cuda")
        self.cache = self.memory[: 2 * count * kv_heads * capacity * dim * dtype.itemsize].view(dtype)
        self.cache = self.cache.view(2, count, kv_heads, capacity, dim)
        self.cache[..., :filled, :] = torch.randn(2, count, kv_heads, filled, dim, device="cuda").to(dtype)
        self.seen = self.cache.double()
        angles = torch.arange(capacity)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        self.cos, self.sin = angles.cos().cuda(), angles.sin().cuda()

    def __call__(self, qkv, past, out, length=1, scratch=None):
        self.shape.length = length
        inputs = qkv, past, self.slots, self.cos, self.sin, None, None, None
        call("attention", self.shape, *inputs, self.memory, out, scratch)

    def expected(self, qkv, position):
        """Of one more token of every row's sequence at `position`."""
        rows = qkv.double().view(self.batch, self.heads + 2 * self.kv_heads, self.dim)
        q, k, v = rows.split([self.heads, self.kv_heads, self.kv_heads], 1)
        angle = self.cos[position].double(), self.sin[position].double()
        q, k = (rotate_half(x, *angle).to(self.dtype).double() for x in (q, k))
        at = self.slots.long()
        for seen, new in zip(self.seen, (k, v)):
            seen[at, :, position] = new
        seen = slice(max(0, position + 1 - self.window), position + 1)
        keys, values = (x[at, :, seen].repeat_interleave(self.heads // self.kv_heads, 1) for x in self.seen)
        weights = (torch.einsum("bhd,bhkd->bhk", q, keys) / self.dim**0.5).softmax(-1)
        return torch.einsum("bhk,bhkd->bhd", weights, values).reshape(self.batch, self.heads * self.dim)


class Ending:
    """What cqil_arrange and cqil_advance need, and the positions that they write."""

    def __init__(self, batch, slots, position):
        self.batch = batch
        self.slot_tokens = torch.zeros(slots, dtype=torch.int32, device="cuda")
        self.slot_past = torch.full((slots,), position, dtype=torch.int32, device="cuda")
        self.next, self.tokens = (torch.zeros(batch, dtype=torch.int32, device="cuda") for _ in range(2))
        self.past = torch.full((batch,), position, dtype=torch.int32, device="cuda")
        self.step = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.history = torch.zeros(4, batch, dtype=torch.int64).pin_memory()

    def arrange(self, slots):
        state = self.slot_tokens, self.slot_past, None, self.tokens, self.past
        call("arrange", slots, *state, self.batch, 1, 1 << 30)

    def advance(self, slots):
        state = self.tokens, self.past, self.slot_tokens, self.slot_past, None, 0
        call("advance", self.next, slots, *state, self.batch, 1 << 30, self.step, self.history, 4, self.batch)


def check_joins(pick, dtype):
    """The blocks of a head's earlier spans start after that of its last span has come to where it waits for them."""
    batch, kv_heads, group, dim = pick(1, 2), pick(1, 2), pick(1, 3), (64, 80, 128)[pick(0, 2)]
    heads, steps, position = kv_heads * group, 24, pick(200, 900)
    count, slots = some_slots(pick, batch)
    attention = Attention(dtype, slots, count, heads, kv_heads, dim, position + steps, position)
    ending = Ending(batch, count, position)
    qkv = torch.randn(steps, batch, (heads + 2 * kv_heads) * dim, device="cuda").to(dtype)
    out = torch.empty(steps, batch, heads * dim, dtype=dtype, device="cuda")
    for step in range(steps):
        if step % 4 == 0:  # three steps follow without the host
            late = pick(1, 4)  # spans
            delay(0, [pick(100_000, 400_000) if block // heads < late else 0 for block in range(8 * heads)])
        attention(qkv[step], ending.past, out[step])
        ending.advance(slots)
    torch.cuda.synchronize()
    delay(0, [])
    expected = torch.stack([attention.expected(qkv[step], position + step) for step in range(steps)])
    assert torch.equal(attention.cache[1].double(), attention.seen[1])
    return max(relative(out[step], expected[step]) for step in range(steps))


class Decoder:
    """Layers that a token passes through by this library's kernels alone, so that each launch may overlap the last.

    With `post_norms` they have norms by 1 + weight before and after each sub-layer, GELU, and a window of 50 tokens.
    Each step has one row, for one of two sequences: that in slot order[step], which starts at starts[order[step]].
    """

    HIDDEN, INNER, WORDS, HEADS, KV_HEADS, DIM = 256, 688, 512, 4, 2, 64
    FIRST = 7, 9  # tokens

    def __init__(self, dtype, layers, order, starts, post_norms):
        def weight(*shape):
            return (torch.randn(shape, device="cuda") / shape[-1] ** 0.5).to(dtype)

        self.dtype, self.order, self.starts, self.steps = dtype, order, starts, len(order)
        self.post_norms, one = post_norms, not post_norms
        self.slots = [torch.tensor([slot], dtype=torch.int32, device="cuda") for slot in range(2)]
        filled, steps = max(starts), self.steps
        shape = self.HEADS, self.KV_HEADS, self.DIM, filled + steps + 1, filled
        width, rows = (self.HEADS + 2 * self.KV_HEADS) * self.DIM, self.HEADS * self.DIM
        self.table = torch.randn(self.WORDS, self.HIDDEN, device="cuda").to(dtype)
        self.layers = [
            {
                "norm": one + weight(self.HIDDEN),
                "qkv": weight(width, self.HIDDEN),
                "o": weight(self.HIDDEN, rows),
                "mlp_norm": one + weight(self.HIDDEN),
                "post_norm": weight(self.HIDDEN),
                "mlp_post_norm": weight(self.HIDDEN),
                "gate_up": weight(2 * self.INNER, self.HIDDEN),
                "down": weight(self.HIDDEN, self.INNER),
                "attention": Attention(dtype, self.slots[0], 2, *shape, window=50 * post_norms),
            }
            for _ in range(layers)
        ]
        self.caches = [layer["attention"].memory.clone() for layer in self.layers]
        self.x = torch.empty(self.HIDDEN, dtype=dtype, device="cuda")
        self.normed, self.delta = torch.empty_like(self.x), torch.empty_like(self.x)
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
        self.ending = Ending(1, 2, 0)

    def begin(self):
        for layer, cache in zip(self.layers, self.caches):
            layer["attention"].memory.copy_(cache)
        self.ending.slot_tokens.copy_(torch.tensor(self.FIRST))
        self.ending.slot_past.copy_(torch.tensor(self.starts))
        self.ending.tokens.zero_()
        self.ending.past.zero_()
        self.ending.step.zero_()
        self.found.fill_(-1)
        self.tokens.fill_(-1)
        torch.cuda.synchronize()

    def linear(self, x, weight, out, norm=None, residual=None, gated=0):
        shape = abi.cqil_linear_shape(
            rows=1,
            outputs=weight.shape[0] // (2 if gated else 1),
            inputs=weight.shape[1],
            gated=gated,
            dtype=code(self.dtype),
            eps=1e-5,
        )
        assert library.cqil_linear_scratch_bytes(shape) <= self.scratch.numel()
        call("linear", shape, x, None, weight, None, norm, residual, out, None, self.scratch)

    def run(self, after=lambda: None):
        """All steps; `after` is called after each kernel."""
        kind, x = code(self.dtype), self.x
        for step, slot in enumerate(self.order):
            slots = self.slots[slot]
            if step == 0 or slot != self.order[step - 1]:
                self.ending.arrange(slots)
                after()
            call("gather_rows", self.table, self.ending.tokens, x, 1, self.HIDDEN, kind)
            after()
            for number, layer in enumerate(self.layers):
                if self.post_norms:
                    self.sub_layers(number, slots, after)
                    continue
                self.linear(x, layer["qkv"], self.qkv, norm=layer["norm"])
                after()
                layer["attention"].slots = slots
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
            self.ending.advance(slots)
            after()
            call("gather_rows", self.ending.tokens, self.zero_index, self.tokens[step], 1, 1, 0)
            after()

    def sub_layers(self, number, slots, after):
        """A layer with norms before and after its attention and its MLP."""
        layer, kind = self.layers[number], code(self.dtype)
        shape = 1, self.HIDDEN, 1e-5, abi.cqil_norm.CQIL_NORM_OFFSET, kind
        if number == 0:
            call("residual_norm", None, None, self.x, layer["norm"], None, self.normed, *shape)
            after()
        self.linear(self.normed, layer["qkv"], self.qkv)
        after()
        layer["attention"].slots = slots
        layer["attention"](self.qkv, self.ending.past, self.attended)
        after()
        self.linear(self.attended, layer["o"], self.delta)
        after()
        norms = layer["post_norm"], self.x, layer["mlp_norm"]
        call("residual_norm", self.delta, *norms, self.x, self.normed, *shape)
        after()
        self.linear(self.normed, layer["gate_up"], self.inner, gated=2)
        after()
        self.linear(self.inner, layer["down"], self.delta)
        after()
        following = self.layers[number + 1]["norm"] if number + 1 < len(self.layers) else None
        norms = layer["mlp_post_norm"], self.x, following
        call("residual_norm", self.delta, *norms, self.x, None if following is None else self.normed, *shape)
        after()

    def expected(self, tokens):
        """In float64, rounded where a kernel stores its result; `tokens` are those that were chosen."""

        def stored(x):
            return x.to(self.dtype).double()

        found, last, positions = [], list(self.FIRST), list(self.starts)
        for slot, chosen in zip(self.order, tokens):
            token, last[slot] = last[slot], chosen
            x = self.table[token].double()
            for layer in self.layers:
                wide = {name: value.double() for name, value in layer.items() if name != "attention"}

                def normed_by(x, name, wide=wide):
                    if self.post_norms:
                        return stored(rms_norm(x, 1 + wide[name], 1e-5))
                    return stored(stored(rms_norm(x, 1, 1e-5)) * wide[name])

                def added(x, name):
                    return normed_by(stored(x), name) if self.post_norms else x

                normed = normed_by(x, "norm")
                qkv = stored(wide["qkv"] @ normed)
                layer["attention"].slots = self.slots[slot]
                attended = stored(layer["attention"].expected(qkv, positions[slot]))[0]
                x = stored(added(wide["o"] @ attended, "post_norm") + x)
                gate, up = stored(wide["gate_up"] @ normed_by(x, "mlp_norm")).chunk(2)
                x = stored(
                    added(wide["down"] @ stored(activation(1 + self.post_norms)(gate) * up), "mlp_post_norm") + x
                )
            found.append(x)
            positions[slot] += 1
        return torch.stack(found)


def check_overlap(pick, dtype):
    """Steps of back-to-back launches give the bits of launches that wait for each other, and those are right."""
    order = [pick(0, 3) // 3 for _ in range(pick(8, 20))]
    decoder = Decoder(dtype, pick(2, 6), order, (pick(1, 400), pick(1, 400)), bool(pick(0, 1)))
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
    """Calls on one cache without a cqil_advance between them: a prefill, then tokens whose positions lie ready."""
    kv_heads, group, dim, prompt, steps = pick(1, 2), pick(1, 2), 64, pick(2, 9), 12
    heads, width = kv_heads * group, (kv_heads * group + 2 * kv_heads) * dim
    count, slots = some_slots(pick, 1)
    attention = Attention(dtype, slots, count, heads, kv_heads, dim, prompt + steps, 0)
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
    slots = torch.ones(1, dtype=torch.int32, device="cuda")
    attention, ending = Attention(dtype, slots, 2, 2, 1, 64, 600, 500), Ending(1, 2, 500)
    qkv, out = torch.randn(256, device="cuda").to(dtype), torch.empty(128, dtype=dtype, device="cuda")
    assert library.cqil_attention_timeout(-1.0) != 0
    assert library.cqil_attention_timeout(0.5) == 0
    attention(qkv, ending.past, out)
    ending.advance(slots)
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
    assert "attention gave up waiting" in said and "head 1 of row 0" in said
    assert library.cqil_advance(*[None] * 7, 1, 1, 1, None, None, 1, 1, None) != 0
    assert said in library.cqil_last_error().decode(), library.cqil_last_error()
    print("the limit ends the wait and is named")
    sys.stdout.flush()
    os._exit(0)  # the CUDA context is lost, and with it an orderly exit


CHECKS = {
    "kernels": (
        check_norm,
        check_gate,
        check_scale,
        check_gather,
        check_choice,
        check_spread,
        check_adjust,
        check_sample,
        check_logprobs,
        check_linear,
        check_attention,
    ),
    "forms": (check_forms, check_many_queries, check_post_norm, check_head_squares),
    "gates": (check_one_gate,),
    "rows": (check_rows, check_sequences, check_accept),
    "packed": (check_packed,),
    "joins": (check_joins,),
    "overlap": (check_overlap,),
    "repeat": (check_repeat,),
    "cache": (check_fp8_cache, check_fp8_circle),
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
