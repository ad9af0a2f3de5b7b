"""compressed-tensors, as llm-compressor stores it: the formats float-quantized, int-quantized and pack-quantized.

`weight` float8_e4m3fn or int8 [N, K], or `weight_packed` int32 [N, ceil(K * bits / 32)], packed along K, with
`weight_shape` [2]; packed integers are stored + 2^(bits - 1). `weight_scale`: [1] (tensor), [N, 1] (channel),
[N, K / g] (group) or [ceil(N / b), ceil(K / c)] (block). `weight_zero_point` if asymmetric, packed along N where
weights are packed. `weight_g_idx` [K]: the group of each column, where groups were chosen by activation order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch

from cqil_trt.json_fields import Fields
from cqil_trt.weights.quantized.fp8 import scaled_matrices
from cqil_trt.weights.quantized.matrix import QuantizedMatrix, even_groups
from cqil_trt.weights.quantized.packing import unpack
from cqil_trt.weights.quantized.scheme import Module, Scheme
from cqil_trt.weights.reader import WeightReader

_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
_LINEAR = "Linear"  # the class that all modules here have


class CompressedTensors(Scheme):
    def __init__(self, config: Fields):
        super().__init__(config)
        sparsity = config.object("sparsity_config").text("format", "dense")
        if sparsity != "dense":
            raise self.fail(f"sparse weights ({sparsity:.40}) are not supported")
        if config.object("transform_config").get("config_groups"):
            raise self.fail("transform_config (rotated weights) is not supported")
        self._groups = [self._group(name, group) for name, group in config.object("config_groups").values.items()]
        if not self._groups:
            raise self.fail("config_groups names no weights")
        self._targets = [
            [self.pattern(target[3:]) if target.startswith("re:") else target for target in group.get("targets", [])]
            for group in self._groups
        ]
        ignored = []
        if any(group.get("input_activations") or group.get("output_activations") for group in self._groups):
            ignored.append("quantization of activations")
        if config.get("kv_cache_scheme") is not None:
            cached = config.object("kv_cache_scheme")
            kind = cached.text("type", "int"), cached.integer("num_bits", 8), cached.text("strategy", "tensor")
            self.caches_fp8 = kind == ("float", 8, "tensor") and cached.get("symmetric", True) is True
            if not self.caches_fp8:
                ignored.append(f"the KV cache's {kind[0]:.20}{kind[1]} by {kind[2]:.20}")
        self.ignored = tuple(ignored)

    def _group(self, name: str, group: Any) -> Fields:
        source = f"{self.config.source}: config_groups: {name[:40]}"
        if not isinstance(group, dict):
            raise self.fail(f"config_groups: {name[:40]} must be an object")
        fields = Fields(group, source)
        targets = fields.get("targets", [])
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise fields.fail("targets", "a list of strings")
        kind = fields.text("format", self.config.text("format", "float-quantized"))
        if kind not in _FORMATS:
            raise self.fail(f"format {kind!r:.40} is not supported ({', '.join(_FORMATS)} are)")
        weights = fields.object("weights")
        if weights.values:
            bits, numbers = weights.integer("num_bits", 8), weights.text("type", "int")
            if (numbers, bits) not in (("float", 8), ("int", 8), ("int", 4)):
                raise self.fail(f"weights of {bits} bits, type {numbers!r:.40}, are not supported")
        return fields

    def describe(self) -> str:
        kinds = {
            f"{w.text('type', 'int')}{w.integer('num_bits', 8)}" for w in (g.object("weights") for g in self._groups)
        }
        return f"compressed-tensors, {', '.join(sorted(kinds))}"

    def _weights_of(self, module: Module) -> Fields:
        """How a module's weights are quantized. A name goes before a regular expression, that before a class."""
        ways: tuple[Callable[[str | re.Pattern[str]], bool], ...] = (
            lambda target: target == module.name,
            lambda target: isinstance(target, re.Pattern) and target.match(module.name) is not None,
            lambda target: target == _LINEAR,
        )
        for matches in ways:
            for group, targets in zip(self._groups, self._targets):
                if group.object("weights").values and any(map(matches, targets)):
                    return group.object("weights")
        raise module.fail("is quantized, but no group of the configuration names it")

    def shapes(self, reader: WeightReader) -> dict[str, tuple[int, int]]:
        found = scaled_matrices(reader.shapes(), "weight_scale")
        for key in reader.shapes():
            name, _, part = key.rpartition(".")
            if part == "weight_packed":
                height, width = Module(reader, name).integers("weight_shape", 1, 2**31 - 1, (2,)).tolist()
                found[name] = height, width
        return found

    def parts(self) -> Iterable[str]:
        return (
            *("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx"),
            *("input_scale", "input_zero_point", "output_zero_point"),
        )

    def load(self, module: Module, shape: tuple[int, int]) -> QuantizedMatrix:
        height, width = shape
        weights = self._weights_of(module)
        bits = weights.integer("num_bits", 8)
        packed = module.has("weight_packed")
        if packed:
            words = module.words("weight_packed", (height, -(-width * bits // 32)))
            codes = unpack(words, bits, 1)[:, :width]
        elif weights.text("type", "int") == "float":
            codes = module.fp8("weight", shape)
        else:
            codes = module.read("weight", shape)
            if codes.dtype != torch.int8:
                raise module.fail(f"weight has type {codes.dtype}, the configuration says torch.int8")
        rows, columns = self._grid(weights, height, width)
        grid = -(-height // rows), -(-width // columns)
        flat = ((prod(grid),), ()) if grid == (1, 1) else ((prod(grid),),)
        scales = module.scales("weight_scale", grid, *flat).reshape(grid)
        symmetric = weights.boolean("symmetric", True)
        zeros = None if symmetric else _zeros(module, bits, grid, packed).to(codes.dtype)
        if packed and bits == 8:
            codes, zeros = _signed(codes), None if zeros is None else _signed(zeros)
        elif bits == 4:
            # Unsigned, as packed ones are.
            codes = codes if packed else (codes + 8).to(torch.uint8)
            zeros = torch.full(grid, 8) if zeros is None else zeros if packed else zeros + 8
            zeros = zeros.to(torch.uint8)
        group = even_groups(width, columns)
        if module.has("weight_g_idx"):
            group = module.group_index("weight_g_idx", width, grid[1])
        return QuantizedMatrix(codes=codes, bits=bits, scales=scales, zeros=zeros, rows=rows, group=group)

    def _grid(self, weights: Fields, height: int, width: int) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        size = weights.integer("group_size", -1, low=-1)
        default = "group" if size > 0 else "channel" if "group_size" in weights.values else "tensor"
        strategy = weights.text("strategy", default)
        if strategy == "tensor":
            return height, width
        if strategy == "channel":
            return 1, width
        if strategy == "group" and size > 0:
            return 1, size
        block = weights.get("block_structure")
        if isinstance(block, str) and re.fullmatch(r"[0-9]{1,6}x[0-9]{1,6}", block):
            block = [int(part) for part in block.split("x")]
        if strategy == "block" and isinstance(block, list) and len(block) == 2:
            rows, columns = block
            if type(rows) is int and type(columns) is int and min(rows, columns) > 0:
                return rows, columns
        raise self.fail(f"weights with strategy {strategy!r:.40}, group_size {size}, are not supported")


def _zeros(module: Module, bits: int, grid: tuple[int, int], packed: bool) -> torch.Tensor:
    if not packed:
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        return module.integers("weight_zero_point", low, high, grid, (prod(grid),)).reshape(grid)
    words = module.words("weight_zero_point", (-(-grid[0] * bits // 32), grid[1]))
    return unpack(words, bits, 0)[: grid[0]]


def _signed(codes: torch.Tensor) -> torch.Tensor:
    """Unsigned integers of 8 bits less 128, int8."""
    return (codes.short() - 128).to(torch.int8)


SCHEME = CompressedTensors
