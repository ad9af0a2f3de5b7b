#!/usr/bin/env python
"""Collects the signatures of TensorRT-LLM that this project calls, from a directory with its sources.

    python scripts/collect_trtllm_api.py DIRECTORY_WITH_tensorrt_llm

Adds them under the sources' own version to tests/trtllm_api.json: names of parameters, nothing else of the code.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / "tests" / "trtllm_api.json"
SYMBOLS = {
    "_common.py": ["default_trtnet"],
    "functional.py": ["allreduce", "_create_tensor"],
    "layers/attention.py": ["Attention.__init__", "Attention.forward"],
    "layers/embedding.py": ["Embedding.__init__"],
    "layers/linear.py": ["Linear.__init__"],
    "layers/mlp.py": ["GatedMLP.__init__", "GatedMLP.forward"],
    "layers/normalization.py": ["RmsNorm.__init__"],
    "models/generation_mixin.py": ["GenerationMixin.prepare_attention_inputs"],
    "models/llama/config.py": ["LLaMAConfig.__init__"],
    "models/modeling_utils.py": [
        "DecoderLayerList.__init__",
        "DecoderLayerList.forward",
        "DecoderModelForCausalLM.__init__",
        "PretrainedConfig.__init__",
    ],
    "runtime/model_runner_cpp.py": ["ModelRunnerCpp.from_dir", "ModelRunnerCpp.generate"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", type=Path)
    package = parser.parse_args().sources / "tensorrt_llm"
    version = next(
        ast.literal_eval(node.value)
        for node in ast.parse((package / "version.py").read_text()).body
        if isinstance(node, ast.Assign)
    )
    found = {}
    for file, symbols in SYMBOLS.items():
        tree = ast.parse((package / file).read_text())
        functions = dict(_functions(tree))
        found |= {symbol: _signature(functions[symbol], method="." in symbol) for symbol in symbols}
    found["trtllm-build"] = {"flags": sorted(_flags(package))}
    known = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    known[version] = {"source": "collected from a whole tree", "symbols": found}
    TARGET.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(f"{TARGET}: {len(found)} symbols of {version}")


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, ast.FunctionDef):
                    yield f"{node.name}.{child.name}", child


def _signature(function: ast.FunctionDef, method: bool) -> dict[str, Any]:
    """Names by kind; `required`: those without a default. What a method is bound to is left out."""
    a = function.args
    positional = [argument.arg for argument in (*a.posonlyargs, *a.args)]
    required = positional[: len(positional) - len(a.defaults)]
    required += [argument.arg for argument, default in zip(a.kwonlyargs, a.kw_defaults) if default is None]
    return {
        "positional": positional[method:],
        "keyword": [argument.arg for argument in a.kwonlyargs],
        "required": [name for name in required if not method or name != positional[0]],
        "any_keyword": a.kwarg is not None,
    }


def _flags(package: Path) -> Iterator[str]:
    """Of trtllm-build: its own, and a field of PluginConfig each."""
    for node in ast.walk(ast.parse((package / "commands" / "build.py").read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            for value in node.args:
                if isinstance(value, ast.Constant) and str(value.value).startswith("--"):
                    yield value.value
    for node in ast.parse((package / "plugin" / "plugin.py").read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "PluginConfig":
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    yield "--" + field.target.id.removeprefix("_")


if __name__ == "__main__":
    main()
