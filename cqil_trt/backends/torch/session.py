"""Executes the decoder on the CPU with PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cqil_trt.backends.torch.ops import TorchOps
from cqil_trt.backends.torch.quantized import take_quantized
from cqil_trt.collectives import Communicator, HostCommunicator, LocalCommunicator, split
from cqil_trt.engine import Engine
from cqil_trt.network.decoder import decode
from cqil_trt.schedule import Peers
from cqil_trt.session import HostSession, available_memory, cache_bytes, fitting_slots


class TorchSession(HostSession):
    """Executes on the CPU, with collectives over MPI."""

    def __init__(self, engine: Engine, comm: Any, slots: int):
        from safetensors.torch import load_file

        rank = 0 if comm is None else comm.Get_rank()
        free = available_memory() // 2 // engine.world_size
        super().__init__(engine, rank, fitting_slots(slots, free, cache_bytes(engine, rank), comm))
        self.communicators: dict[Peers, Communicator] = {Peers.ALL: LocalCommunicator()}
        if comm is not None:
            parts = split(comm, self._plan.peers)
            self.communicators = {kind: HostCommunicator(part) for kind, part in parts.items()}
        weights = load_file(engine.rank_file(rank))
        if self._plan.shares_embedding:
            weights["lm_head.weight"] = weights["embedding.weight"][slice(*self._plan.vocabulary)]
        products = take_quantized(self._plan, weights, getattr(torch, engine.limits.dtype))
        sizes = engine.limits, engine.rotary, self.slots
        self._ops = TorchOps(self._plan, weights, self.communicators, *sizes, products)
        self._last = torch.empty(0)

    @torch.inference_mode()
    def _forward(
        self, tokens: np.ndarray, past: np.ndarray, select: np.ndarray, slots: np.ndarray, length: int | None
    ) -> None:
        self._ops.begin(slots.tolist(), length)
        out = decode(self._ops, *(torch.from_numpy(array) for array in (tokens, past, select)))
        self._last = out.float() if self._plan.schedule.predicts else torch.empty(*select.shape, 0)

    def _last_logits(self) -> np.ndarray:
        return self._last.numpy()

    @torch.inference_mode()
    def _copy(self, source: int, target: int, count: int) -> None:
        self._ops.copy_cache(source, target, count)

    def _greedy(self, count: int) -> np.ndarray:
        last = self._last[:, -count:]
        if last.shape[-1]:
            values = last.amax(dim=-1)
            # max may return any of several equal values; the first is wanted.
            indices = (last == values[..., None]).int().argmax(dim=-1)
        else:
            values = torch.full(last.shape[:2], -torch.inf)
            indices = torch.zeros(last.shape[:2], dtype=torch.long)
        return self.communicators[Peers.ALL].argmax(values, indices + self._offset).numpy()

    def _gather(self, columns: np.ndarray) -> np.ndarray:
        return self.communicators[Peers.ALL].gather_columns(torch.from_numpy(columns), self._widths).numpy()

    def joined(self) -> bytes:
        if self._ops.joined is None:
            return b""
        return self._ops.joined.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
