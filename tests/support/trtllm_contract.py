"""TensorRT-LLM as its signatures: stand-ins that take what tests/support/trtllm_api.json says, and no more."""

import inspect
import json
import sys
import types
from collections import Counter
from pathlib import Path
from unittest.mock import MagicMock

API = json.loads((Path(__file__).parent / "trtllm_api.json").read_text())
# What the documentation of no release shows was collected from single files of which no release is known.
UNPINNED = API.pop("no release named")["symbols"]


class Contract:
    """One version's signatures. `bind` raises TypeError for a call that they do not take; `called`: how often each."""

    def __init__(self, version):
        self.symbols, self.called = UNPINNED | API[version]["symbols"], Counter()

    def bind(self, symbol, *arguments, **keywords):
        entry, kinds = self.symbols[symbol], inspect.Parameter
        parameters = [
            kinds(name, kind, default=kinds.empty if name in entry["required"] else None)
            for kind, names in (
                (kinds.POSITIONAL_OR_KEYWORD, entry["positional"]),
                (kinds.KEYWORD_ONLY, entry["keyword"]),
            )
            for name in names
        ]
        if entry["any_keyword"]:
            parameters.append(kinds("any", kinds.VAR_KEYWORD))
        self.called[symbol] += 1
        try:
            return inspect.Signature(parameters).bind(*arguments, **keywords)
        except TypeError as error:
            raise TypeError(f"{symbol}: {error}") from None

    def layer(self, name, symbol=None):
        """A module whose construction, and call where its forward is known, are bound."""
        contract, symbol = self, symbol or name

        class Stub:
            def __init__(self, *arguments, **keywords):
                bound = contract.bind(f"{symbol}.__init__", *arguments, **keywords).arguments
                self.eps, self.weight = bound.get("eps", 0.0), Value()

            def __call__(self, *arguments, **keywords):
                if f"{symbol}.forward" in contract.symbols:
                    contract.bind(f"{symbol}.forward", *arguments, **keywords)
                return (Value(), Value()) if keywords.get("use_cache") else Value()

        Stub.__name__ = name
        # What attention_arguments looks at.
        if f"{symbol}.__init__" in self.symbols:
            names = [*self.symbols[f"{symbol}.__init__"]["positional"], *self.symbols[f"{symbol}.__init__"]["keyword"]]
            kind = inspect.Parameter.KEYWORD_ONLY
            Stub.__init__.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        return Stub

    def modules(self):
        """sys.modules' entries for `tensorrt` and the parts of tensorrt_llm that the model imports."""
        contract = self

        class Module:
            def __call__(self, *arguments, **keywords):
                return self.forward(*arguments, **keywords)

        class DecoderLayerList:
            def __init__(self, *arguments, **keywords):
                bound = contract.bind("DecoderLayerList.__init__", *arguments, **keywords).arguments
                config = bound["config"]
                self.layers = [bound["cls"](config, index) for index in range(config.num_hidden_layers)]

            def __iter__(self):
                return iter(self.layers)

            def forward(self, *arguments, **keywords):
                contract.bind("DecoderLayerList.forward", *arguments, **keywords)
                states, presents = arguments[0], []
                names = ("use_cache", "attention_mask", "kv_cache_params", "attention_params", "position_ids")
                for layer in self.layers:
                    states, present = layer(states, **{name: keywords[name] for name in names})
                    presents.append(present)
                return states, presents

        class DecoderModelForCausalLM:
            def __init__(self, *arguments, **keywords):
                bound = contract.bind("DecoderModelForCausalLM.__init__", *arguments, **keywords).arguments
                self.config, self.transformer = bound["config"], bound["transformer"]

            def prepare_attention_inputs(self, *arguments, **keywords):
                return contract.bind("GenerationMixin.prepare_attention_inputs", *arguments, **keywords).arguments

        def function(name, result):
            def call(*arguments, **keywords):
                contract.bind(name, *arguments, **keywords)
                return result()

            return call

        layers = {name: self.layer(name) for name in ("Attention", "Embedding", "GatedMLP", "RmsNorm")}
        layers["ColumnLinear"] = self.layer("ColumnLinear", "Linear")
        parts = {
            "_common": {"default_trtnet": function("default_trtnet", _Network)},
            "functional": {
                "AttentionMaskType": MagicMock(),
                "PositionEmbeddingType": MagicMock(),
                "Tensor": Value,
                "_create_tensor": function("_create_tensor", Value),
                "allreduce": function("allreduce", Value),
            },
            "layers": layers,
            "models.modeling_utils": {
                "DecoderLayerList": DecoderLayerList,
                "DecoderModelForCausalLM": DecoderModelForCausalLM,
            },
            "module": {"Module": Module},
        }
        found = {name: types.ModuleType(name) for name in ("tensorrt_llm", "tensorrt_llm.models")}
        for name, values in parts.items():
            found[f"tensorrt_llm.{name}"] = types.ModuleType(name)
            vars(found[f"tensorrt_llm.{name}"]).update(values)
        found["tensorrt"] = MagicMock(get_plugin_registry=lambda: _Registry())
        return found


class Value:
    """A tensor."""

    def __init__(self):
        self.value = self.trt_tensor = MagicMock()

    def __add__(self, other):
        return Value()


class _Registry:
    def get_plugin_creator(self, name, version, namespace):
        return types.SimpleNamespace(create_plugin=lambda label, fields: name)


class _Network:
    def add_plugin_v2(self, inputs, name):
        return MagicMock(num_outputs={"CqilAllReduce": 2, "CqilBypass": 1}[name])


def load_model_file(path, contract, monkeypatch):
    """The model's file as trtllm-build loads it, over the stand-ins."""
    import importlib.util

    for name, module in contract.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("cqil_trt.backends.tensorrt_llm.versions.load_plugins", lambda: None)
    spec = importlib.util.spec_from_file_location("models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
