"""GPTQ, as AutoGPTQ and GPTQModel store it.

`qweight` int32 [K * bits / 32, N], packed along K; `scales` [G, N]; `qzeros` int32 [G, N * bits / 32], packed along N;
`g_idx` int32 [K], the group of each column. W = (q - z) * s. `checkpoint_format` gptq stores z - 1, gptq_v2 stores z.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cqil_trt.json_fields import Fields
from cqil_trt.weights.quantized.matrix import QuantizedMatrix, even_groups
from cqil_trt.weights.quantized.packing import unpack
from cqil_trt.weights.quantized.scheme import Module, Scheme, matrices
from cqil_trt.weights.reader import WeightReader


class Gptq(Scheme):
    def __init__(self, config: Fields):
        super().__init__(config)
        self._format = config.text("checkpoint_format", "gptq").lower()
        if self._format not in ("gptq", "gptq_v2"):
            raise self.fail(f"checkpoint_format {self._format!r:.40} is not supported (gptq and gptq_v2 are)")
        rules = config.get("dynamic", {})
        if not isinstance(rules, dict) or not all(isinstance(rule, dict) for rule in rules.values()):
            raise config.fail("dynamic", "an object of objects")
        # What is not quantized ("-:") is seen from the tensors.
        kept = {pattern: rule for pattern, rule in rules.items() if not pattern.startswith("-:")}
        self._rules = [(self.pattern(pattern.removeprefix("+:")), rule) for pattern, rule in kept.items()]
        self._bits(config)

    def _bits(self, config: Fields) -> int:
        bits = config.integer("bits", high=32)
        if bits not in (4, 8):
            raise self.fail(f"bits {bits} is not supported (4 and 8 are)")
        return bits

    def describe(self) -> str:
        return f"{self._format}, {self._bits(self.config)} bits"

    def _of(self, name: str) -> Fields:
        """The configuration of a module: the first rule of `dynamic` that matches its name overrides."""
        for pattern, rule in self._rules:
            if pattern.match(name):
                return Fields({**self.config.values, **rule}, self.config.source)
        return self.config

    def shapes(self, reader: WeightReader) -> dict[str, tuple[int, int]]:
        found = matrices(reader.shapes(), "qweight")
        return {name: (columns, rows * 32 // self._bits(self._of(name))) for name, (rows, columns) in found.items()}

    def parts(self) -> Iterable[str]:
        return "qweight", "qzeros", "scales", "g_idx"

    def load(self, module: Module, shape: tuple[int, int]) -> QuantizedMatrix:
        height, width = shape
        config = self._of(module.name)
        bits = self._bits(config)
        # -1: one group.
        size = config.integer("group_size", 128, low=-1)
        size = width if size < 1 else size
        groups = -(-width // size)
        codes = unpack(module.words("qweight", (width * bits // 32, height)), bits, 0).T
        scales = module.scales("scales", (groups, height)).T
        words = module.words("qzeros", (groups, -(-height * bits // 32)))
        if self._format == "gptq":
            # Its owner adds 1 to every zero of a word at once, carries included.
            ones = sum(1 << shift for shift in range(0, 32, bits))
            words = (words.long() + ones).to(torch.int32)
        zeros = unpack(words, bits, 1)[:, :height].T
        group = even_groups(width, size)
        if module.has("g_idx"):
            group = module.group_index("g_idx", width, groups)
        return QuantizedMatrix(codes=codes, bits=bits, scales=scales, zeros=zeros, rows=1, group=group)


SCHEME = Gptq
