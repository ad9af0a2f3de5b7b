"""Emits the decoder as an ONNX graph of standard operators (opset 24), one or a few nodes per operation.

The collectives are custom operators with the names, inputs and fields of our TensorRT plugins
(plugins/tensorrt_plugins.cpp). Standard operators are limited to those that TensorRT's parser knows since 10.15.
Weights are external data: they stay in the rank's safetensors file.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from cqil_trt.backends import Compilation
from cqil_trt.config import EngineLimits
from cqil_trt.engine import tensor_spans
from cqil_trt.gpu import abi
from cqil_trt.gpu.workspace import workspace_input
from cqil_trt.network.decoder import decode
from cqil_trt.network.ops import Ops
from cqil_trt.network.rotary import rotary_tables
from cqil_trt.schedule import Peers
from cqil_trt.shard import LayerShard, RankPlan

OPSET = 24
DOMAIN = "cqil_trt"
TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float8_e4m3fn": TensorProto.FLOAT8E4M3FN,  # of the KV cache
}


@dataclass(frozen=True)
class OnnxPositions:
    """Positions of the new tokens, int64 [B, T]; the first of each sequence, int64 [B]; visible keys, [B, 1, T, S].

    `windowed`: those visible in layers with a window.
    """

    index: str
    past: str
    mask: str
    windowed: str


class OnnxOps(Ops[str]):
    """Collects the nodes, initializers, inputs and outputs of a graph; a value is a tensor's name.

    Args:
        weights: the rank's safetensors file, which the initializers point into.
        rotary: as in `Engine`.
    """

    def __init__(self, plan: RankPlan, weights: Path, rotary: Sequence[float], limits: EngineLimits):
        self.plan = plan
        self.nodes: list[Any] = []
        self.initializers: dict[str, TensorProto] = {}
        self.inputs: dict[str, ValueInfoProto] = {}
        self.outputs: dict[str, ValueInfoProto] = {}
        # Outputs of the custom operators, which shape inference does not know.
        self.annotations: list[ValueInfoProto] = []
        # The last value that all ranks hold.
        self.joined: str | None = None
        self._location, self._spans = weights.name, tensor_spans(weights)
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}
        self._limits, self._type = limits, TYPES[limits.dtype]
        self._tables = [rotary_tables(plan.model, rotary, limits.max_seq_len, i) for i in range(len(plan.model.ropes))]

    # Helpers that add nodes

    def _nodes(
        self, operator: str, inputs: Sequence[str], outputs: int | Sequence[str] = 1, **attributes: Any
    ) -> list[str]:
        """Adds a node and returns its outputs. `outputs`: their names, or how many."""
        name = f"{operator}.{len(self.nodes)}"
        if isinstance(outputs, int):
            outputs = [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, outputs, name, **attributes))
        return list(outputs)

    def _node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        return self._nodes(operator, inputs, **attributes)[0]

    def _constant(self, name: str, value: Any, dtype: int = TensorProto.INT64) -> str:
        """A small tensor, stored in the graph once per name."""
        if name not in self.initializers:
            array = np.asarray(value).astype(helper.tensor_dtype_to_np_dtype(dtype))
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        self.inputs[name] = helper.make_tensor_value_info(name, dtype, shape)
        return name

    def output(self, name: str, value: str, dtype: int, shape: Sequence[int | str]) -> None:
        """Makes a value an output of the graph, converted to `dtype`."""
        self._nodes("Cast", [value], [name], to=dtype)
        self.outputs[name] = helper.make_tensor_value_info(name, dtype, shape)

    # Parameters and inputs

    def _weight(self, name: str) -> str:
        if name == "lm_head.weight" and self.plan.shares_embedding:
            return self._lm_head()
        if name not in self.initializers:
            offset, length = self._spans[name]
            stored = self._tensors[name]
            tensor = TensorProto(
                name=name,
                data_type=TYPES[stored.dtype],
                dims=stored.shape,
                data_location=TensorProto.EXTERNAL,
            )
            for key, value in (("location", self._location), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            self.initializers[name] = tensor
        return name

    def _lm_head(self) -> str:
        """The rank's rows of the embedding table."""
        table, (first, last) = self._weight("embedding.weight"), self.plan.vocabulary
        if last - first == self.plan.model.vocab_size:
            return table
        # Not a second initializer over the same bytes: TensorRT refuses two of different size at one address.
        ends = (self._constant("vocabulary.first", [first]), self._constant("vocabulary.last", [last]))
        return self._node("Slice", table, *ends, self._constant("axes.0", [0]))

    def positions(self, tokens: str, past: str) -> OnnxPositions:
        past = self._node("Cast", past, to=TensorProto.INT64)
        length = self._node("Gather", self._node("Shape", tokens), self._constant("one", 1))
        steps = self._node("Range", self._constant("zero", 0), length, self._constant("one", 1))
        index = self._node("Add", self._node("Unsqueeze", past, self._constant("axes.1", [1])), steps)
        keys = self._constant("positions", np.arange(self._limits.max_seq_len))
        # An explicit mask: TensorRT has no nonpad_kv_seqlen, and the meaning of Attention's is_causal with it changed.
        queries = self._node("Unsqueeze", index, self._constant("axes.1.3", [1, 3]))
        mask = self._node("LessOrEqual", keys, queries)
        window = self.plan.model.sliding_window
        if window is None or window >= self._limits.max_seq_len:
            return OnnxPositions(index, past, mask, mask)
        beyond = self._node("Sub", queries, self._constant("window", window))
        return OnnxPositions(index, past, mask, self._node("And", mask, self._node("Greater", keys, beyond)))

    # Arithmetic

    def embedding(self, tokens: str) -> str:
        return self._node("Gather", self._weight("embedding.weight"), tokens, axis=0)

    def project(self, x: str, name: str) -> str:
        out = self._node("MatMul", x, self._node("Transpose", self._weight(f"{name}.weight"), perm=[1, 0]))
        return self.add(out, self._weight(f"{name}.bias")) if f"{name}.bias" in self.plan.shapes else out

    def rms_norm(self, x: str, name: str) -> str:
        weight, model = self._weight(f"{name}.weight"), self.plan.model
        if model.wide_norms:
            x, weight = self._wide(x), self._wide(weight)
        if model.offset_norms:
            weight = self._node("Add", weight, self._number(1.0, TensorProto.FLOAT))
        # stash_type 1: computed in float32, and rounded to x's type before it is scaled.
        normed = self._node("RMSNormalization", x, weight, axis=-1, epsilon=model.rms_norm_eps, stash_type=1)
        return self._node("Cast", normed, to=self._type) if model.wide_norms else normed

    def _wide(self, x: str) -> str:
        return self._node("Cast", x, to=TensorProto.FLOAT)

    def _number(self, value: float, dtype: int | None = None) -> str:
        dtype = self._type if dtype is None else dtype
        return self._constant(f"number.{dtype}.{value!r}", value, dtype)

    def add(self, x: str, y: str) -> str:
        return self._node("Add", x, y)

    def swiglu(self, gate_up: str) -> str:
        gate, up = self._nodes("Split", [gate_up], 2, axis=-1, num_outputs=2)
        # Swish would be one node, but TensorRT's parser supports it only since a later release.
        return self._node("Mul", self._node("Mul", gate, self._node("Sigmoid", gate)), up)

    def geglu(self, gate_up: str) -> str:
        gate, up = self._nodes("Split", [gate_up], 2, axis=-1, num_outputs=2)
        return self._node("Mul", self._node("Gelu", gate, approximate="tanh"), up)

    def scale(self, x: str, factor: float) -> str:
        return self._node("Mul", x, self._number(factor))

    def soft_cap(self, x: str, cap: float) -> str:
        return self._node("Mul", self._node("Tanh", self._node("Div", x, self._number(cap))), self._number(cap))

    def zeros_like(self, x: str) -> str:
        # They depend on x, as the order of collectives must.
        return self._node("Mul", x, self._number(0.0))

    def select(self, x: str, indices: str) -> str:
        wide = self._node("Cast", indices, to=TensorProto.INT64)
        return self._node("GatherND", x, self._node("Unsqueeze", wide, self._constant("axes.2", [2])), batch_dims=1)

    # Attention

    def split_heads(self, qkv: str, shard: LayerShard) -> tuple[str, str, str]:
        shape = self._constant("shape.heads", [0, 0, -1, self.plan.model.head_dim])
        heads = self._node("Transpose", self._node("Reshape", qkv, shape), perm=[0, 2, 1, 3])
        counts = [shard.num_heads, shard.num_kv_heads, shard.num_kv_heads]
        sizes = self._constant("heads." + ".".join(map(str, counts)), counts)
        q, k, v = self._nodes("Split", [heads, sizes], 3, axis=1)
        return q, k, v

    def head_squares(self, q: str | None, k: str | None, like: str, shard: LayerShard) -> str:
        axes = self._constant("axes.1.3", [1, 3])
        if q is None or k is None:
            # Zeros that depend on what came before, as the order of collectives must.
            rows = self._node("Slice", self._wide(like), *self._ends(0, 2), self._constant("axes.2", [2]))
            zeros = self._node("Mul", rows, self._number(0.0, TensorProto.FLOAT))
            return self._node("Unsqueeze", zeros, self._constant("axes.1", [1]))
        # No head at all is a slice of size 0, whose sum is 0.
        owned = self._ends(*shard.owned_kv_heads(self.plan.model.group_size))
        k = self._node("Slice", k, *owned, self._constant("axes.1", [1]))
        sums = [self._node("ReduceSumSquare", self._wide(x), axes) for x in (q, k)]
        return self._node("Concat", *sums, axis=-1)

    def zeros_after(self, x: str, squares: str) -> str:
        sums = self._node("ReduceSum", squares, self._constant("axes.1.3", [1, 3]), keepdims=0)
        zeros = self._node("Mul", sums, self._number(0.0, TensorProto.FLOAT))
        zeros = self._node("Cast", self._node("Unsqueeze", zeros, self._constant("axes.2", [2])), to=self._type)
        return self.add(self.zeros_like(x), zeros)

    def scale_heads(self, x: str, squares: str, which: int, name: str) -> str:
        model, last = self.plan.model, self._constant("axes.3", [3])
        count = (model.num_kv_heads if which else model.num_heads) * model.head_dim
        own = self._node("Slice", squares, *self._ends(which, which + 1), last)
        mean = self._node("Div", own, self._number(count, TensorProto.FLOAT))
        shifted = self._node("Add", mean, self._number(model.rms_norm_eps, TensorProto.FLOAT))
        normed = self._node("Div", self._wide(x), self._node("Sqrt", shifted))
        shape = self._constant("shape.head_weights", [-1, 1, model.head_dim])
        weight = self._node("Reshape", self._wide(self._weight(f"{name}.weight")), shape)
        return self._node("Cast", self._node("Mul", normed, weight), to=self._type)

    def _ends(self, first: int, last: int) -> tuple[str, str]:
        """The first two arguments of Slice along one axis."""
        return self._constant(f"at.{first}", [first]), self._constant(f"at.{last}", [last])

    def rotary(self, x: str, positions: OnnxPositions, which: int) -> str:
        model, tables = self.plan.model, zip(("cos", "sin"), self._tables[which])
        cos, sin = (self._constant(f"{name}{which or ''}", table, self._type) for name, table in tables)
        partial = {} if model.rotary_dim == model.head_dim else {"rotary_embedding_dim": model.rotary_dim}
        return self._node("RotaryEmbedding", x, cos, sin, positions.index, interleaved=0, **partial)

    def cached_attention(self, q: str, k: str, v: str, positions: OnnxPositions, shard: LayerShard) -> str:
        cached, model = [], self.plan.model
        shape = ("batch", shard.num_kv_heads, self._limits.max_seq_len, self.plan.model.head_dim)
        stored, scales = TYPES[self._limits.cache_dtype], self._limits.scales_of(shard.index)
        for part, new, divisor in zip(("key", "value"), (k, v), scales):
            if stored != self._type:
                inverse = self._number(float(np.float32(1) / np.float32(divisor)), TensorProto.FLOAT)
                new = self._node("Cast", self._node("Mul", self._wide(new), inverse), to=stored)  # it saturates
            cache = self.input(f"cache.{shard.index}.{part}", stored, shape)
            # The runtime may bind the output to the input's memory: the cache is then updated in place.
            updated = f"{cache}.updated"
            [found] = self._nodes("TensorScatter", [cache, new, positions.past], [updated], axis=-2, mode="linear")
            cached.append(found if stored == self._type else self._node("Cast", found, to=self._type))
            self.outputs[updated] = helper.make_tensor_value_info(updated, stored, shape)
        if not shard.grouped:
            q = self._heads(q, shard.query_slots)
        # No softmax_precision: TensorRT always uses float32 and refuses the attribute.
        mask = positions.mask if model.window_of(shard.index) is None else positions.windowed
        scale = model.query_scale
        if scales[0] != 1:
            scale = scales[0] * (model.head_dim**-0.5 if scale is None else scale)
        scores = {"scale": scale, "softcap": model.attention_cap}
        given = {name: value for name, value in scores.items() if value is not None}
        out = self._node("Attention", q, *cached, mask, **given)
        if scales[1] != 1:
            out = self._node("Mul", out, self._number(scales[1]))
        if not shard.grouped:
            out = self._heads(out, shard.slot_of)
        return self._node(
            "Reshape", self._node("Transpose", out, perm=[0, 2, 1, 3]), self._constant("shape.flat", [0, 0, -1])
        )

    def _heads(self, x: str, chosen: tuple[int, ...]) -> str:
        name = "heads.at." + ".".join(map(str, chosen))
        return self._node("Gather", x, self._constant(name, chosen), axis=1)

    # Collectives

    def _collective(
        self,
        operator: str,
        *inputs: str,
        outputs: int = 1,
        peers: Peers = Peers.ALL,
        dtype: int | None = None,
        shape: tuple[int | str, ...] = (),
        **attributes: Any,
    ) -> list[str]:
        """`dtype`, `shape`: of the outputs, where they are not of the residual stream's."""
        workspace = self.input(workspace_input(self.plan.schedule, peers), TensorProto.INT32, [1])
        dtype = dtype or self._type
        attributes["dtype"] = abi.dtype_code(next(name for name, code in TYPES.items() if code == dtype))
        attributes = abi.interface().plugin_fields(operator, attributes)
        # TensorRT's parser looks for the plugin in the attribute's namespace, not in the node's domain.
        attributes["plugin_namespace"] = abi.CQIL_PLUGIN_NAMESPACE
        names = self._nodes(operator, [*inputs, workspace], outputs, domain=DOMAIN, **attributes)
        shape = shape or ("batch", "tokens", self.plan.model.hidden_size)
        self.annotations += [helper.make_tensor_value_info(name, dtype, shape) for name in names]
        return names

    def all_reduce(self, x: str, peers: Peers = Peers.ALL) -> str:
        [out] = self._collective("CqilAllReduce", x, peers=peers, mode=0, eps=0.0)
        self.joined = out if peers is Peers.ALL else self.joined
        return out

    def all_reduce_squares(self, x: str, peers: Peers) -> str:
        made: dict[str, Any] = {"dtype": TensorProto.FLOAT, "shape": ("batch", 1, "tokens", 2)}
        return self._collective("CqilAllReduce", x, peers=peers, mode=0, eps=0.0, **made)[0]

    def all_reduce_residual(self, delta: str, residual: str, peers: Peers = Peers.ALL) -> str:
        [out] = self._collective("CqilAllReduce", delta, residual, peers=peers, mode=1, eps=0.0)
        self.joined = out if peers is Peers.ALL else self.joined
        return out

    def all_reduce_residual_norm(
        self, delta: str, residual: str, norm: str, peers: Peers = Peers.ALL
    ) -> tuple[str, str]:
        if self.plan.model.wide_norms:  # not those of the operator
            return super().all_reduce_residual_norm(delta, residual, norm, peers)
        fields: dict[str, Any] = {"mode": 2, "eps": self.plan.model.rms_norm_eps}
        inputs = delta, residual, self._weight(f"{norm}.weight")
        out, normed = self._collective("CqilAllReduce", *inputs, outputs=2, peers=peers, **fields)
        self.joined = out if peers is Peers.ALL else self.joined
        return out, normed

    def broadcast(self, x: str | None, tokens: str) -> str:
        model, rank = self.plan.model, self.plan.rank
        given = tokens if x is None else x
        return self._collective("CqilBroadcast", given, rank=rank, hidden=model.hidden_size)[0]

    def bypass(self, x: str, d: int) -> str:
        # The first layer receives zeros. It must send, and a node with an unused output would be removed.
        return self._collective("CqilBypass", x, peers=Peers.PART, distance=d)[0]


def define_network(plan: RankPlan, weights: Path, rotary: Sequence[float], limits: EngineLimits) -> ModelProto:
    """A rank's whole network; arguments as for `OnnxOps`. The file belongs next to `weights`.

    Inputs: tokens int32 [B, T]; past int32 [B]; select int32 [B, K] on a rank that predicts; cache.N.key and
    cache.N.value [B, key/value heads, max_seq_len, head_dim] for each layer whose heads the rank has; workspace
    int32 [1], for the collectives, and workspace.layer and workspace.part for those of fewer ranks.
    Outputs: logits float32 [B, K, V], or hidden, the residual stream, on a rank that predicts nothing; joined
    [B, T, H], the residual stream after the last all-reduce; every cache, updated, as cache.N.key.updated.
    """
    ops = OnnxOps(plan, weights, rotary, limits)
    tokens = ops.input("tokens", TensorProto.INT32, ("batch", "tokens"))
    past = ops.input("past", TensorProto.INT32, ("batch",))
    predicts, dtype, stream = plan.schedule.predicts, TYPES[limits.dtype], ("batch", "tokens", plan.model.hidden_size)
    select = ops.input("select", TensorProto.INT32, ("batch", "selected")) if predicts else ""
    out = decode(ops, tokens, past, select)
    if predicts:
        first, last = plan.vocabulary
        ops.output("logits", out, TensorProto.FLOAT, ("batch", "selected", last - first))
    elif out == tokens:  # a rank with nothing to do
        ops.output("hidden", out, TensorProto.INT32, ("batch", "tokens"))
    else:
        ops.output("hidden", out, dtype, stream)
    if ops.joined is not None:
        ops.output("joined", ops.joined, dtype, stream)
    graph = helper.make_graph(
        ops.nodes,
        f"rank {plan.rank} of {plan.world_size}",
        list(ops.inputs.values()),
        list(ops.outputs.values()),
        list(ops.initializers.values()),
        value_info=ops.annotations,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    version = helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    return helper.make_model(graph, opset_imports=opsets, ir_version=version, producer_name="cqil-trt")


def write_network(compilation: Compilation) -> None:
    """Writes the rank's ONNX file next to its weights, and has onnx check it."""
    weights, path = compilation.file("safetensors"), compilation.file("onnx")
    _make_sole(weights)
    network = define_network(compilation.plan, weights, compilation.rotary, compilation.limits)
    path.write_bytes(network.SerializeToString())
    onnx.checker.check_model(path, full_check=True)


def _make_sole(path: Path) -> None:
    """Replaces a file with several names (hard links) by a copy: ONNX does not open one as external data."""
    if path.stat().st_nlink > 1:
        copy = path.with_suffix(".copy")
        shutil.copyfile(path, copy)
        copy.replace(path)
