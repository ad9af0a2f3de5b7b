"""Emits a rank's network with TensorRT-LLM's own Python code, from a directory with its sources.

usage: tensorrt_llm_emission.py SOURCES CHECKPOINT RANK

`tensorrt` is TensorRT-RTX (no GPU needed). Stood in for are compiled parts alone: TensorRT-LLM's C++ bindings, and its
and our plugins, which are recorded and replaced by layers that give outputs of the same shape. Prints what was recorded
as JSON, and how large the engine is that TensorRT-RTX builds of it.
"""

import enum
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import safetensors.torch  # noqa: F401
import tensorrt_rtx
import torch

SOURCES, CHECKPOINT, RANK = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
recorded = []


class StandIn(types.ModuleType):
    """A compiled module, or a third-party one that emission only imports."""

    __path__: list[str] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if any(Path(folder, f"{name}.py").exists() or Path(folder, name).exists() for folder in self.__path__):
            return importlib.import_module(f"{self.__name__}.{name}")
        value = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class Bindings(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the C++ bindings' modules."""

    def find_spec(self, name, path, target=None):
        if name.startswith("tensorrt_llm.bindings"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


class Creator:
    def __init__(self, name):
        self.name = name

    def create_plugin(self, label, fields):
        found = {field.name: np.asarray(field.data).reshape(-1).tolist() for field in fields}
        return types.SimpleNamespace(name=self.name, fields=found)


class Registry:
    def get_plugin_creator(self, name, version, namespace):
        return Creator(name)


class Network:
    """TensorRT-RTX's network, with plugins."""

    def __init__(self, real):
        self.__dict__["real"] = real

    def __getattr__(self, name):
        return getattr(self.real, name)

    def __setattr__(self, name, value):
        setattr(self.real, name, value)

    def add_plugin_v2(self, inputs, plugin):
        recorded.append(
            {"plugin": plugin.name, "fields": plugin.fields, "inputs": [[t.name, list(t.shape)] for t in inputs]}
        )
        outputs = getattr(self, f"_{plugin.name.lower()}", self._first)(inputs, plugin.fields)
        return Layer(outputs)

    def _first(self, inputs, fields):
        return [self.real.add_identity(inputs[0])]

    def _cqilallreduce(self, inputs, fields):
        delta, residual, weight = inputs
        sum_op, product = tensorrt_rtx.ElementWiseOperation.SUM, tensorrt_rtx.ElementWiseOperation.PROD
        total = self.real.add_elementwise(delta, residual, sum_op)
        shape = self.real.add_shuffle(weight)
        shape.reshape_dims = (1,) * (len(delta.shape) - 1) + (weight.shape[0],)
        return [total, self.real.add_elementwise(total.get_output(0), shape.get_output(0), product)]

    def _gptattention(self, inputs, fields):
        """Its first columns are the queries: as many as the output has."""
        qkv = inputs[0]
        heads, kv_heads = fields["num_heads"][0], fields["num_kv_heads"][0]
        width = heads * fields["head_size"][0]
        assert qkv.shape[-1] == width + 2 * kv_heads * fields["head_size"][0], (qkv.shape, fields)
        index = self.real.add_constant((width,), np.arange(width, dtype=np.int32))
        return [self.real.add_gather(qkv, index.get_output(0), len(qkv.shape) - 1)]


class Layer:
    """What add_plugin_v2 returns, as far as TensorRT-LLM uses it."""

    def __init__(self, layers):
        self.__dict__["layers"] = layers

    @property
    def num_outputs(self):
        return len(self.layers)

    def get_output(self, index):
        return self.layers[index].get_output(0)

    def __getattr__(self, name):
        return getattr(self.layers[0], name)

    def __setattr__(self, name, value):
        setattr(self.layers[0], name, value)


def stand_in():
    """Makes tensorrt_llm importable module by module: its package imports would run everything there is."""
    trt = types.ModuleType("tensorrt")
    trt.__dict__.update({k: v for k, v in vars(tensorrt_rtx).items() if not k.startswith("__")})
    trt.__version__, trt.get_plugin_registry = "10.14.0", Registry
    sys.modules["tensorrt"] = trt
    sys.meta_path.insert(0, Bindings())
    for name in ("onnx_graphsurgeon", "nvtx", "pynvml", "polygraphy", "h5py", "datasets"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = StandIn(name)
    sys.modules.setdefault("strenum", enum)  # Python has StrEnum now
    try:
        from cuda import cudart  # noqa: F401
    except ImportError:
        sys.modules["cuda"] = sys.modules["cuda.cudart"] = StandIn("cuda")
    for name in ("tensorrt_llm", "tensorrt_llm.models", "tensorrt_llm.quantization"):
        package = StandIn(name)
        package.__path__ = [str(SOURCES.joinpath(*name.split(".")))]
        sys.modules[name] = package
    torch.classes.load_library = lambda path: None


def main():
    stand_in()
    sys.modules["tensorrt_llm.quantization"].QuantMode = importlib.import_module(
        "tensorrt_llm.quantization.mode"
    ).QuantMode
    common = importlib.import_module("tensorrt_llm._common")
    sys.modules["tensorrt_llm"].default_net = common.default_net
    network_module = importlib.import_module("tensorrt_llm.network")
    # TensorRT-RTX has no tensors in host memory; the plugins that would read them are stood in for.
    functional = importlib.import_module("tensorrt_llm.functional")
    functional.Tensor.location = property(lambda tensor: None, lambda tensor, value: None)
    # Our plugin library is a compiled part, too.
    versions = importlib.import_module("cqil_trt.backends.tensorrt_llm.versions")
    versions.load_plugins = lambda: None
    model_module = importlib.import_module("cqil_trt.backends.tensorrt_llm.model")

    llama = importlib.import_module("tensorrt_llm.models.llama.config")
    values = json.loads((CHECKPOINT / "config.json").read_text())
    config = llama.LLaMAConfig(**values)
    config.set_rank(RANK)
    model = model_module.CqilForCausalLM.from_checkpoint(str(CHECKPOINT), config=config)

    builder = tensorrt_rtx.Builder(tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR))
    flags = 1 << int(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = network_module.Network()
    network._init(Network(builder.create_network(flags)))
    plugin = network.plugin_config
    for name, value in {
        "gpt_attention_plugin": config.dtype,
        "gemm_plugin": None,
        "nccl_plugin": config.dtype if config.mapping.world_size > 1 else None,
        "remove_input_padding": True,
        "paged_kv_cache": True,
    }.items():
        setattr(plugin, name, value)
    with network_module.net_guard(network):
        network.set_named_parameters(model.named_parameters())
        inputs = model.prepare_inputs(
            max_batch_size=2, max_input_len=16, max_seq_len=32, max_num_tokens=32, use_cache=True
        )
        model(**inputs)
    names = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    real = network.trt_network.real
    outputs = [real.get_output(i) for i in range(real.num_outputs)]
    settings = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for name, tensor in network._inputs.items():
        if tensor.profiles:
            profile.set_shape(name, *(list(getattr(tensor.profiles[0], end)) for end in ("min", "opt", "max")))
    settings.add_optimization_profile(profile)
    settings.num_compute_capabilities = 1
    settings.set_compute_capability(tensorrt_rtx.ComputeCapability.SM89, 0)
    network._fill_weights()
    built = builder.build_serialized_network(real, settings)
    print(
        json.dumps(
            {
                "plugins": recorded,
                "parameters": names,
                "inputs": [real.get_input(i).name for i in range(real.num_inputs)],
                "outputs": {t.name: list(t.shape) for t in outputs},
                "layers": real.num_layers,
                "built_bytes": 0 if built is None else built.nbytes,
            }
        )
    )


main()
