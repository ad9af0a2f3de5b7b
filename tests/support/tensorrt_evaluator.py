"""Computes TensorRT network definitions in numpy, layer by layer, where there is no GPU to execute their engines.

A finished network is read back through TensorRT's own interface, so what is computed is what TensorRT was told; what
a layer means is what NVIDIA's documentation says of it. Anything that is not known here raises.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Collective:
    """What a collective layer does: the names of TensorRT's enumerators, and of how many ranks."""

    operation: str
    reduction: str
    root: int
    ranks: int


class Recorder:
    """A network definition that remembers the arguments of its collectives, which TensorRT does not tell again."""

    def __init__(self, network: Any):
        self._network = network
        self.collectives: dict[str, tuple[str, str, int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def add_dist_collective(self, x: Any, operation: Any, reduction: Any, root: int, groups: list[int]) -> Any:
        assert not groups, "collectives among some ranks are not known here"
        layer = self._network.add_dist_collective(x, operation, reduction, root, groups)
        self.collectives[layer.name] = (operation.name, reduction.name, root)
        return layer


@dataclass(frozen=True)
class Declared:
    """What TensorRT says of a tensor, which must be what is computed; a size of -1 is known at run time."""

    name: str
    dtype: Any
    shape: tuple[int, ...]

    @classmethod
    def of(cls, trt: Any, tensor: Any) -> Declared:
        dtype = ml_dtypes.bfloat16 if tensor.dtype == trt.bfloat16 else trt.nptype(tensor.dtype)
        return cls(tensor.name, np.dtype(dtype), tuple(tensor.shape))

    def check(self, array: Array) -> None:
        fits = array.ndim == len(self.shape) and all(a in (-1, b) for a, b in zip(self.shape, array.shape))
        assert fits and array.dtype == self.dtype, (self, array.dtype, array.shape)


class NetworkEvaluator:
    """A network definition to be computed any number of times. `trt`: the package that made it."""

    def __init__(self, trt: Any, network: Recorder):
        self._collectives = network.collectives
        self._inputs = [Declared.of(trt, network.get_input(i)) for i in range(network.num_inputs)]
        self._outputs = [network.get_output(i).name for i in range(network.num_outputs)]
        makers = {}
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            kind = layer.type.name
            if kind not in _KINDS:
                raise NotImplementedError(f"{layer.name}: layers of kind {kind}")
            layer.__class__ = getattr(trt, _KINDS[kind][0])
            assert layer.num_outputs == 1 and layer.get_output(0).name not in makers
            makers[layer.get_output(0).name] = kind, layer

        # In an order in which they can be computed: a shape given as a tensor comes after the layer it is for.
        self._layers: list[tuple[str, Any, list[str | None], Declared]] = []
        depths = {tensor.name: 0 for tensor in self._inputs}

        def visit(name: str) -> int:
            if name not in depths:
                kind, layer = makers[name]
                tensors = [layer.get_input(i) for i in range(layer.num_inputs)]
                names = [None if tensor is None else tensor.name for tensor in tensors]
                before = max((visit(needed) for needed in names if needed is not None), default=0)
                self._layers.append((kind, layer, names, Declared.of(trt, layer.get_output(0))))
                depths[name] = before + (kind == "DIST_COLLECTIVE")
            return depths[name]

        deepest = max(map(visit, makers), default=0)
        # Each must need the one before, or TensorRT could call them in an order that differs between ranks.
        assert deepest == len(network.collectives), "collectives whose order no data decides"

    def run(self, inputs: Mapping[str, Array]) -> Generator[tuple[Collective, Array], Array, dict[str, Array]]:
        """One pass; yields what the rank brings to each collective and is sent what it gets.

        Caches among `inputs` are changed in place.
        """
        assert inputs.keys() == {tensor.name for tensor in self._inputs}
        for tensor in self._inputs:
            tensor.check(inputs[tensor.name])
        values = dict(inputs)
        for kind, layer, names, tensor in self._layers:
            given = [None if name is None else values[name] for name in names]
            if kind == "DIST_COLLECTIVE":
                out = yield Collective(*self._collectives[layer.name], layer.num_ranks), given[0]
            elif kind == "CAST":
                out = given[0].astype(tensor.dtype)
            else:
                out = _KINDS[kind][1](layer, *given)
            tensor.check(out)
            values[tensor.name] = out
        return {name: values[name] for name in self._outputs}


def evaluate(ranks: Sequence[NetworkEvaluator], inputs: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """One pass of all ranks in lock step; the outputs of each."""
    passes = [rank.run(given) for rank, given in zip(ranks, inputs)]
    answers: list[Array | None] = [None] * len(passes)
    outputs: list[dict[str, Array]] = [{} for _ in passes]
    while True:
        brought = []
        for i, running in enumerate(passes):
            try:
                brought.append(running.send(answers[i]))
            except StopIteration as end:
                outputs[i] = end.value
        if not brought:
            return outputs
        kinds = {kind for kind, _ in brought}
        assert len(brought) == len(passes) and len(kinds) == 1, f"ranks disagree: {kinds}"
        answers = _join(kinds.pop(), [array for _, array in brought])


def _join(kind: Collective, arrays: list[Array]) -> list[Array]:
    assert kind.ranks == len(arrays) and len({(array.shape, array.dtype) for array in arrays}) == 1, kind
    if kind.operation == "BROADCAST":
        return [arrays[kind.root]] * len(arrays)
    if kind.operation == "ALL_GATHER":
        return [np.concatenate(arrays)] * len(arrays)
    assert (kind.operation, kind.reduction) == ("ALL_REDUCE", "SUM"), kind
    return [sum(arrays[1:], arrays[0])] * len(arrays)


# Layers, in the order of TensorRT's documentation of operators


def _activation(layer: Any, x: Array) -> Array:
    wide = x.astype(np.float32)
    if layer.type.name == "GELU_TANH":
        out = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    else:
        out = {"SIGMOID": lambda: 1 / (1 + np.exp(-wide)), "TANH": lambda: np.tanh(wide)}[layer.type.name]()
    return out.astype(x.dtype)


def _attention(layer: Any, q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Query head i reads key/value head i // group. TensorRT does not scale the scores."""
    attention = layer.attention
    forms = attention.norm_op.name, attention.causal_kind.name, attention.query_form.name, attention.key_value_form.name
    assert forms == ("SOFTMAX", "NONE", "PADDED_BHND", "PADDED_BHND"), forms
    assert attention.key_value_lengths is None and attention.num_ranks == 1
    assert attention.mask.name == layer.get_input(3).name and mask.dtype == bool and q.shape[1] % k.shape[1] == 0
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1).astype(np.float32) for x in (k, v))
    scores = np.where(mask, q.astype(np.float32) @ k.swapaxes(2, 3), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True) @ v).astype(q.dtype)


def _concatenation(layer: Any, *parts: Array) -> Array:
    return np.concatenate(parts, axis=layer.axis)


def _constant(layer: Any) -> Array:
    return layer.weights.reshape(tuple(layer.shape))


def _elementwise(layer: Any, x: Array, y: Array) -> Array:
    operations = {
        "SUM": np.add,
        "SUB": np.subtract,
        "PROD": np.multiply,
        "DIV": np.divide,
        "GREATER": np.greater,
        "AND": np.logical_and,
    }
    assert x.ndim == y.ndim and x.dtype == y.dtype, (layer.name, x.shape, x.dtype, y.shape, y.dtype)
    return operations[layer.op.name](x, y)


def _gather(layer: Any, x: Array, indices: Array) -> Array:
    assert layer.mode.name == "DEFAULT" and layer.num_elementwise_dims == 0
    assert indices.min() >= 0  # numpy would count from the end
    return np.take(x, indices, axis=layer.axis)


def _identity(layer: Any, x: Array) -> Array:
    return x


def _kv_cache_update(layer: Any, cache: Array, new: Array, write: Array) -> Array:
    """The output is the cache's own memory."""
    assert (layer.cache_mode.name, layer.update_form.name) == ("LINEAR", "PADDED_BHND")
    length = new.shape[2]
    assert cache.shape[2] >= write.max() + length and write.min() >= 0, "a write past the end of the cache"
    for row, update, first in zip(cache, new, write):
        row[:, first : first + length] = update
    return cache


def _matrix_multiply(layer: Any, x: Array, y: Array) -> Array:
    assert x.dtype == y.dtype
    sides = [
        side.astype(np.float32).swapaxes(-1, -2) if op.name == "TRANSPOSE" else side.astype(np.float32)
        for side, op in ((x, layer.op0), (y, layer.op1))
    ]
    return (sides[0] @ sides[1]).astype(x.dtype)


def _reduce(layer: Any, x: Array) -> Array:
    axes = tuple(axis for axis in range(x.ndim) if layer.axes >> axis & 1)
    return {"SUM": np.sum, "AVG": np.mean}[layer.op.name](x, axis=axes, keepdims=layer.keep_dims)


def _rotary_embedding(layer: Any, x: Array, cos: Array, sin: Array, positions: Array) -> Array:
    """Of halves, which are rotated against each other; positions index the tables."""
    assert not layer.interleaved and positions.min() >= 0
    dim = layer.rotary_embedding_dim or x.shape[-1]
    assert cos.shape[-1] == dim // 2
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    first, second, rest = np.split(x, [dim // 2, dim], axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def _shape(layer: Any, x: Array) -> Array:
    return np.array(x.shape, np.int64)


def _shuffle(layer: Any, x: Array, dims: Array | None = None) -> Array:
    """A transpose, a reshape (0 keeps a size, -1 infers one), a transpose. Permutations are padded up to eight axes."""
    x = x.transpose(tuple(layer.first_transpose)[: x.ndim])
    # Asking for numbers that a tensor stands for logs a warning.
    sizes = layer.reshape_dims if dims is None else dims
    if sizes is not None:
        assert layer.zero_is_placeholder
        x = x.reshape([x.shape[i] if size == 0 else int(size) for i, size in enumerate(sizes)])
    return x.transpose(tuple(layer.second_transpose)[: x.ndim])


def _slice(layer: Any, x: Array, start: None = None, sizes: Array | None = None) -> Array:
    assert start is None and layer.axes is None and layer.mode.name == "STRICT_BOUNDS" and layer.num_inputs <= 3
    spans = []
    for first, size, stride, limit in zip(layer.start, layer.shape if sizes is None else sizes, layer.stride, x.shape):
        assert 0 <= first and size > 0 and first + (size - 1) * stride < limit, f"{layer.name}: out of bounds"
        spans.append(slice(first, first + size * stride, stride))
    assert len(spans) == x.ndim
    return x[tuple(spans)]


def _unary(layer: Any, x: Array) -> Array:
    return {"NOT": np.logical_not, "SQRT": np.sqrt}[layer.op.name](x)


# By kind of layer: TensorRT's class for it, which shows its attributes, and what computes it from them and its inputs.
_KINDS: dict[str, tuple[str, Callable[..., Array] | None]] = {
    "ACTIVATION": ("IActivationLayer", _activation),
    "ATTENTION_INPUT": ("IAttentionInputLayer", _attention),
    "ATTENTION_OUTPUT": ("IAttentionOutputLayer", _identity),
    "CAST": ("ICastLayer", None),  # see `NetworkEvaluator.run`
    "CONCATENATION": ("IConcatenationLayer", _concatenation),
    "CONSTANT": ("IConstantLayer", _constant),
    "DIST_COLLECTIVE": ("IDistCollectiveLayer", None),  # see `evaluate`
    "ELEMENTWISE": ("IElementWiseLayer", _elementwise),
    "GATHER": ("IGatherLayer", _gather),
    "IDENTITY": ("IIdentityLayer", _identity),
    "KV_CACHE_UPDATE": ("IKVCacheUpdateLayer", _kv_cache_update),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", _matrix_multiply),
    "REDUCE": ("IReduceLayer", _reduce),
    "ROTARY_EMBEDDING": ("IRotaryEmbeddingLayer", _rotary_embedding),
    "SHAPE": ("IShapeLayer", _shape),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "SLICE": ("ISliceLayer", _slice),
    "UNARY": ("IUnaryLayer", _unary),
}
