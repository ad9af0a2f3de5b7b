"""Quantized weights on a GPU: packed for our kernels where those take them, else dense.

What `plugins/packed_linear.cu` takes: half types, columns in multiples of 8, and groups whose borders on the rank are
multiples of 32. Other matrices are dequantized when the engine is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cqil_trt.config import DTYPE_BYTES
from cqil_trt.formats.quantized import MatrixPart
from cqil_trt.gpu import abi
from cqil_trt.shard import RankPlan

_COLUMNS = 8
_GROUPS = (128, 64, 32)


@dataclass(frozen=True, kw_only=True)
class DeviceMatrix:
    """A rank's part of a quantized projection in device memory, W [rows, inputs] = (codes - zeros) * scales.

    Attributes:
        parts: the names of its codes, its scales and, where it has them, its zero points.
        gated: whether the rows are those of gate and then those of up.
        kind: a cqil_weights, how the engine stores it.
        size, first: columns of a group (0: all), and the place of the first one within its group.
        group: columns of a group when it is packed, as in cqil_linear_shape; 0 for codes of 8 bits.
        packed: whether it is packed; else it is dequantized.
        dtype: of the engine.
    """

    parts: tuple[str, ...]
    rows: int
    inputs: int
    gated: bool
    kind: int
    size: int
    first: int
    group: int
    packed: bool
    dtype: str

    def shape(self, rows: int = 0, eps: float = 0.0, **fields: float) -> Any:
        """The cqil_linear_shape of its product with `rows` rows. `fields`: others of it, in place of its own."""
        own = {
            "rows": rows,
            "outputs": self.rows // (1 + self.gated),
            "inputs": self.inputs,
            "gated": self.gated,
            "dtype": abi.dtype_code(self.dtype),
            "eps": eps,
            "weights": self.kind,
            "group": self.group,
        }
        return abi.cqil_linear_shape(**{**own, **fields})

    @property
    def dense_bytes(self) -> int:
        """Bytes of the matrix in the engine's type."""
        return self.rows * self.inputs * DTYPE_BYTES[self.dtype]

    def nbytes(self, library: Any) -> int:
        """Bytes of the matrix as it stays in device memory."""
        return int(library.cqil_packed_bytes(self.shape())) if self.packed else self.dense_bytes

    def load(self, library: Any, parts: Mapping[str, int], address: int, stream: int) -> None:
        """Enqueues the packing (or dequantizing) of the matrix into `address`; `parts`: device addresses by name."""
        given: list[int | None] = [parts[name] for name in self.parts]
        codes, scales, zeros = given if len(given) == 3 else [*given, None]
        make = library.cqil_pack if self.packed else library.cqil_dequantize
        groups = self.size, self.first
        if make(self.shape(), codes, scales, zeros, *groups, address, stream):
            raise RuntimeError(f"{self.parts[0]}: {library.cqil_last_error().decode()}")


def quantized_matrices(plan: RankPlan, library: Any) -> dict[str, DeviceMatrix]:
    """The rank's quantized projections, by name.

    `library`: that of the kernels, for the current GPU; None if nothing is to be packed.
    """
    parts: dict[str, list[MatrixPart]] = {}
    for tensor in plan.tensors:
        if isinstance(tensor, MatrixPart):
            parts.setdefault(tensor.name.rpartition(".")[0], []).append(tensor)
    if not parts:
        return {}
    possible = library is not None and plan.dtype != "float32" and _packed_rows(library) > 0
    found = {}
    for name, tensors in parts.items():
        codes = tensors[0]
        # Only codes of 4 bits have groups; 8 bits fit any.
        group = _packed_group(codes.group, codes.first) if codes.packed else 0
        found[name] = DeviceMatrix(
            parts=tuple(tensor.name for tensor in tensors),
            rows=codes.shape[0],
            inputs=codes.inputs,
            gated=name.endswith(".gate_up"),
            kind=int(_kind(codes)),
            size=codes.group,
            first=codes.first,
            group=group or 0,
            packed=possible and codes.inputs % _COLUMNS == 0 and group is not None,
            dtype=plan.dtype,
        )
    return found


def _kind(codes: MatrixPart) -> Any:
    """The cqil_weights of codes as an engine stores them."""
    kinds = abi.cqil_weights
    if codes.packed:
        return kinds.CQIL_INT4
    known = {"float8_e4m3fn": kinds.CQIL_FP8, "int8": kinds.CQIL_INT8}
    if codes.dtype not in known:
        raise RuntimeError(f"{codes.name}: no kernel takes codes of type {codes.dtype}")
    return known[codes.dtype]


def _packed_rows(library: Any) -> int:
    rows = int(library.cqil_packed_rows())
    if rows < 0:
        raise RuntimeError(f"packed_rows: {library.cqil_last_error().decode()}")
    return rows


def _packed_group(size: int, first: int) -> int | None:
    """The largest groups in which groups of `size` columns can be packed."""
    return next((group for group in _GROUPS if size % group == 0 and first % group == 0), None)
