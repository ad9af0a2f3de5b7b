"""The interface of the ways to store quantized matrices, and the reader that hides them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Set

import torch

from cqil_trt.errors import UserError
from cqil_trt.json_fields import Fields
from cqil_trt.weights.kv_scales import SUFFIXES
from cqil_trt.weights.quantized.matrix import QuantizedMatrix, hold
from cqil_trt.weights.reader import Range, WeightReader


class Module:
    """The tensors of one quantized module, checked as they are read."""

    def __init__(self, reader: WeightReader, name: str):
        self._reader, self.name = reader, name

    def fail(self, message: str) -> UserError:
        return UserError(f"{self._reader.source}: {self.name}: {message}")

    def has(self, part: str) -> bool:
        return self.shape(part) is not None

    def shape(self, part: str) -> tuple[int, ...] | None:
        """The shape of a tensor; None if it is not there."""
        return self._reader.shapes().get(f"{self.name}.{part}")

    def read(self, part: str, *shapes: tuple[int, ...]) -> torch.Tensor:
        """A tensor that must be there, in one of these shapes."""
        found = self.shape(part)
        if found is None:
            raise self.fail(f"{part} is missing")
        if found not in shapes:
            wanted = " or ".join(map(str, dict.fromkeys(shapes)))
            raise self.fail(f"{part} has shape {found}, the configuration asks for {wanted}")
        return self._reader.read(f"{self.name}.{part}")

    def scales(self, part: str, *shapes: tuple[int, ...]) -> torch.Tensor:
        """Scales as float32, all of them finite."""
        found = self.read(part, *shapes)
        if not found.is_floating_point():
            raise self.fail(f"{part} has type {found.dtype}, scales are floats")
        found = found.float()
        if not torch.isfinite(found).all():
            raise self.fail(f"{part} holds a value that is not finite")
        return found

    def words(self, part: str, *shapes: tuple[int, ...]) -> torch.Tensor:
        """Packed integers, int32."""
        found = self.read(part, *shapes)
        if found.dtype != torch.int32:
            raise self.fail(f"{part} has type {found.dtype}, packed integers are torch.int32")
        return found

    def fp8(self, part: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Floats of 8 bits, all of them numbers."""
        found = self.read(part, shape)
        if found.dtype != torch.float8_e4m3fn:
            raise self.fail(f"{part} has type {found.dtype}, expected torch.float8_e4m3fn")
        if ((found.view(torch.uint8) & 127) == 127).any():
            raise self.fail(f"{part} holds a value that is not a number")
        return found

    def integers(self, part: str, low: int, high: int, *shapes: tuple[int, ...]) -> torch.Tensor:
        """Integers from `low` to `high`."""
        found = self.read(part, *shapes)
        self._check_integers(part, found)
        if found.numel() and not low <= int(found.min()) <= int(found.max()) <= high:
            raise self.fail(f"{part} holds a value that is not from {low} to {high}")
        return found

    def _check_integers(self, part: str, found: torch.Tensor) -> None:
        if found.is_floating_point():
            raise self.fail(f"{part} has type {found.dtype}, expected integers")

    def group_index(self, part: str, columns: int, groups: int) -> torch.Tensor:
        """The group of each column."""
        found = self.read(part, (columns,))
        self._check_integers(part, found)
        found = found.long()
        if ((found < 0) | (found >= groups)).any():
            raise self.fail(f"{part} holds a group that is not from 0 to {groups - 1}")
        return found


# The longest regular expression of a configuration that is compiled.
_LONGEST_PATTERN = 1000


def matrices(stored: Mapping[str, tuple[int, ...]], part: str) -> dict[str, tuple[int, int]]:
    """The modules that have a matrix called `part`, and its shape."""
    found = {}
    for key, shape in stored.items():
        name, _, kind = key.rpartition(".")
        if kind == part and len(shape) == 2:
            found[name] = (shape[0], shape[1])
    return found


class Scheme(ABC):
    """How a checkpoint stores its quantized modules. Raises UserError for a configuration that is not supported.

    `ignored`: what the configuration says besides, for activations and caches; nobody applies it. `caches_fp8`: whether
    scales of a KV cache are those of an FP8 one.
    """

    ignored: tuple[str, ...] = ()
    caches_fp8 = True

    def __init__(self, config: Fields):
        self.config = config

    def fail(self, message: str) -> UserError:
        return UserError(f"{self.config.source}: {message}")

    def pattern(self, text: str) -> re.Pattern[str]:
        """A regular expression of the configuration."""
        try:
            if len(text) <= _LONGEST_PATTERN:
                return re.compile(text)
            reason = f"longer than {_LONGEST_PATTERN} characters"
        except (re.error, OverflowError, RecursionError) as error:
            reason = str(error)
        raise self.fail(f"{text!r:.60} is not a regular expression ({reason})")

    @abstractmethod
    def describe(self) -> str:
        """The format's name and the bits of its weights."""

    @abstractmethod
    def shapes(self, reader: WeightReader) -> dict[str, tuple[int, int]]:
        """The quantized modules among the stored tensors, and the shapes [N, K] of their matrices."""

    @abstractmethod
    def parts(self) -> Iterable[str]:
        """The tensors of a quantized module, besides its bias."""

    @abstractmethod
    def load(self, module: Module, shape: tuple[int, int]) -> QuantizedMatrix:
        """A module's matrix. Raises UserError where its tensors do not fit the configuration or each other."""


class QuantizedReader(WeightReader):
    """`base` with the matrices of quantized modules as float32. A few of them stay in memory (`HELD`)."""

    def __init__(self, base: WeightReader, scheme: Scheme):
        self.source, self._base, self._scheme = base.source, base, scheme
        stored = base.shapes()
        self._modules = scheme.shapes(base)
        if not self._modules:
            raise scheme.fail("a quantization, but no tensor of a quantized module in the checkpoint")
        consumed = {f"{module}.{part}" for module in self._modules for part in scheme.parts()}
        if not scheme.caches_fp8:
            consumed |= {name for name in stored if name.endswith(SUFFIXES)}
        self._shapes: dict[str, tuple[int, ...]] = {n: shape for n, shape in stored.items() if n not in consumed}
        self._shapes |= {f"{module}.weight": shape for module, shape in self._modules.items()}
        self._held: dict[str, QuantizedMatrix] = {}
        ignored = f"; {' and '.join(scheme.ignored)} ignored" if scheme.ignored else ""
        self.note = f"{len(self._modules)} matrices are quantized ({scheme.describe()}){ignored}"

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self._module(name) else self._base.dtype(name)

    def read(self, name: str, rows: Range = None, columns: Range = None) -> torch.Tensor:
        module = self._module(name)
        if module is None:
            return self._base.read(name, rows, columns)
        return self.matrix(module).dequantize(rows, columns)

    @property
    def quantized_names(self) -> Set[str]:
        return {f"{module}.weight" for module in self._modules}

    def quantized(self, name: str) -> QuantizedMatrix | None:
        module = self._module(name)
        return None if module is None else self.matrix(module).by_row()

    def matrix(self, module: str) -> QuantizedMatrix:
        """The matrix of a quantized module."""
        return hold(self._held, module, lambda: self._scheme.load(Module(self._base, module), self._modules[module]))

    def _module(self, name: str) -> str | None:
        module, _, kind = name.rpartition(".")
        return module if kind == "weight" and module in self._modules else None
