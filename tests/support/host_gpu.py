"""Host memory in place of a GPU's, for sessions: `gpu.cuda`, and the kernels that choose tokens, by cqil_trt.h."""

import ctypes
import time
from types import SimpleNamespace

import numpy as np
import torch

from cqil_trt.gpu import cuda
from support.fake_ops import HostKernels, at

INT = torch.int32


class _Arena(cuda.Arena):
    """Full of NaN, and of positions and slots that are none."""

    def __init__(self, size, what):
        self.size, self._used = max(size, cuda.ALIGNMENT), 0
        self._memory = np.full(self.size + cuda.ALIGNMENT, 0xFF, np.uint8)
        self.address = cuda.aligned(self._memory.ctypes.data)

    def free(self):
        pass


class _Graph:
    """Records nothing, and executes again instead."""

    def __init__(self, stream, record):
        self._record = record

    def launch(self, stream):
        self._record()

    def upload(self, stream):
        pass

    def destroy(self):
        pass


def _call(name, *arguments):
    if name == "MemsetAsync":
        ctypes.memset(*arguments[:3])
    if name == "EventCreate":
        return SimpleNamespace(seconds=0.0)
    if name == "EventRecord":
        arguments[0].seconds = time.perf_counter()
    if name == "EventElapsedTime":
        return (arguments[1].seconds - arguments[0].seconds) * 1e3
    return {"MemGetInfo": 1 << 40}.get(name, 1)


def _upload(address, array, stream):
    array = np.ascontiguousarray(array)
    ctypes.memmove(address, array.ctypes.data, array.nbytes)


def _copy_rows(target, source, pitch, width, rows, stream):
    for row in range(rows):
        ctypes.memmove(target + row * pitch, source + row * pitch, width)


def use_host(monkeypatch):
    """What is enqueued is executed at once."""
    functions = {
        "Arena": _Arena,
        "Graph": _Graph,
        "call": _call,
        "upload": _upload,
        "download": lambda array, address, stream: ctypes.memmove(array.ctypes.data, address, array.nbytes),
        "copy": lambda target, source, size, stream: ctypes.memmove(target, source, size),
        "copy_rows": _copy_rows,
        "pinned": np.empty,
        "free_pinned": lambda array: None,
        "use_device": lambda number: None,
        "new_stream": lambda: 1,
        "is_done": lambda stream: True,
    }
    for name, function in functions.items():
        monkeypatch.setattr(cuda, name, function)


class SessionKernels(HostKernels):
    """Those that a session calls besides, as far as sequences are greedy."""

    def cqil_attention_failure(self):
        return None

    def cqil_attention_cache_bytes(self, s):
        return 4 * 2 * s.max_batch * s.kv_heads * s.capacity * s.head_dim

    def cqil_attention(self, s, qkv, past, slots, cos, sin, q_norm, k_norm, squares, cache, *rest):
        if cache not in self.caches:  # in the session's memory, which it copies
            whole = at(cache, 2, s.max_batch, s.kv_heads, s.capacity, s.head_dim)
            self.caches[cache] = whole.transpose(2, 3)
        return super().cqil_attention(s, qkv, past, slots, cos, sin, q_norm, k_norm, squares, cache, *rest)

    def cqil_row_argmax(self, logits, rows, width, offset, dtype, value, index, stream):
        x = at(logits, rows, width)
        most = x.amax(-1, keepdim=True)
        at(value, rows)[:] = most[:, 0]
        at(index, rows, dtype=INT)[:] = (x == most).int().argmax(-1) + offset
        return 0

    def cqil_arrange(self, slots, slot_tokens, slot_past, drafts, tokens, past, rows, width, last, stream):
        slot_of, after = at(slots, rows, dtype=INT).long(), torch.arange(rows) % width
        next_tokens, positions = (of_slots(address, slot_of)[slot_of] for address in (slot_tokens, slot_past))
        if width > 1:
            next_tokens = torch.where(after == 0, next_tokens, at(drafts, rows, dtype=INT))
        at(tokens, rows, dtype=INT)[:] = next_tokens
        at(past, rows, dtype=INT)[:] = (positions + after).clamp(max=last)
        return 0

    def cqil_advance(
        self, chosen, slots, tokens, past, slot_tokens, slot_past, counts, vocabulary, rows, last, *told_and_stream
    ):
        slot_of, position = at(slots, rows, dtype=INT).long(), (at(past, rows, dtype=INT) + 1).clamp(max=last)
        for row, slotted, values in (
            (tokens, slot_tokens, at(chosen, rows, dtype=INT)),
            (past, slot_past, position),
        ):
            at(row, rows, dtype=INT)[:] = values
            of_slots(slotted, slot_of)[slot_of] = values
        return self._tell(chosen, rows, *told_and_stream)

    def cqil_accept(
        self,
        chosen,
        tokens,
        drafted,
        slots,
        past,
        slot_tokens,
        slot_past,
        counts,
        vocabulary,
        rows,
        width,
        last,
        *told_and_stream,
    ):
        found, fed, slot_of, before = (
            at(address, rows, dtype=INT).view(-1, width) for address in (chosen, tokens, slots, past)
        )
        for i, count in enumerate(at(drafted, rows // width, dtype=INT).tolist()):
            accepted = 0
            while accepted < count and found[i, accepted] == fed[i, accepted + 1]:
                accepted += 1
            of_slots(slot_tokens, slot_of)[slot_of[i, 0]] = found[i, accepted]
            of_slots(slot_past, slot_of)[slot_of[i, 0]] = min(int(before[i, 0]) + accepted + 1, last)
        return self._tell(chosen, rows, *told_and_stream)

    def _tell(self, chosen, rows, step, history, places, stride, stream):
        now = int(at(step, 1, dtype=INT))
        words = at(history + now % places * stride * 8, rows, dtype=torch.int64)
        words[:] = (now + 1 << 32) + at(chosen, rows, dtype=INT).long()
        at(step, 1, dtype=INT)[:] = now + 1
        return 0


def of_slots(address, slots):
    """What there is for each slot up to the last of these."""
    return at(address, int(slots.max()) + 1, dtype=INT)
