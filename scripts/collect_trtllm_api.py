#!/usr/bin/env python
"""Collects the signatures of TensorRT-LLM that this project calls, from its sources or a release's documentation.

    python scripts/collect_trtllm_api.py DIRECTORY_WITH_tensorrt_llm
    git clone --depth 1 --branch gh-pages https://github.com/NVIDIA/TensorRT-LLM pages
    python scripts/collect_trtllm_api.py pages/1.2.1                # which shows the release's sources as HTML

Adds them under their version to tests/support/trtllm_api.json, and those of the PyTorch backend, which the
documentation does not show, to trtllm_pytorch_api.json: names of parameters and of modules, nothing else of the code.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).resolve().parent.parent / "tests" / "support"
ENGINE_FILE, PYTORCH_FILE = SUPPORT / "trtllm_api.json", SUPPORT / "trtllm_pytorch_api.json"
ENGINE = {
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


# What moved between releases has several places, the newest first.
PYTORCH = {
    ("_torch/attention/attention.py", "_torch/modules/attention.py"): [
        "Attention.__init__",
        "Attention.forward",
        "Attention.apply_rope",
        "Attention.split_qkv",
    ],
    ("_torch/attention/backends/interface.py", "_torch/attention_backend/interface.py"): [
        "PositionalEmbeddingParams.__init__",
        "RopeParams.from_config",
    ],
    ("_torch/distributed/ops.py",): ["AllReduce.__init__", "AllReduce.forward", "allgather"],
    ("_torch/models/modeling_utils.py",): [
        "DecoderModel.__init__",
        "DecoderModelForCausalLM.__init__",
        "register_auto_model",
    ],
    ("_torch/modules/embedding.py",): ["Embedding.__init__", "LMHead.load_weights"],
    ("_torch/modules/gated_mlp.py",): ["GatedMLP.__init__", "GatedMLP.forward"],
    ("_torch/modules/linear.py",): ["Linear.load_weights"],
    ("_torch/modules/rms_norm.py",): ["RMSNorm.__init__", "RMSNorm.forward"],
    ("_utils.py",): ["mpi_comm", "mpi_disabled"],
    ("functional.py",): ["AllReduceParams.__init__"],
    ("mapping.py",): ["Mapping.__init__"],
}


def main() -> None:
    root = parser().parse_args().sources
    package = root / "tensorrt_llm"
    if not package.is_dir() or (package / "layers").is_dir():  # until the TensorRT backend was removed
        _add(ENGINE_FILE, *collect(root))
    if (package / "_torch").is_dir():
        _add(PYTORCH_FILE, *collect_pytorch(package))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", type=Path)
    return parser


def _add(target: Path, version: str, entry: dict[str, Any]) -> None:
    known = json.loads(target.read_text()) if target.exists() else {}
    known[version] = entry
    target.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(f"{target}: {len(entry['symbols'])} symbols of {version}")


def collect(root: Path) -> tuple[str, dict[str, Any]]:
    """The version of the sources or documentation in `root`, and its entry for trtllm_api.json."""
    package, pages = root / "tensorrt_llm", root / "_modules" / "tensorrt_llm"
    found: dict[str, Any] = {}
    for file, symbols in ENGINE.items():
        path = package / file if package.is_dir() else (pages / file).with_suffix(".html")
        if path.suffix == ".html" and not path.exists():
            print(f"{path}: not in the documentation: omits {', '.join(symbols)}")
            continue
        text = path.read_text()
        found |= _signatures(text if path.suffix == ".py" else source_of_page(text), symbols)
    if package.is_dir():
        found["trtllm-build"] = {"flags": sorted(_flags(package))}
        return _version(package), {"source": "collected from a whole tree", "symbols": found}
    listed = re.findall(r"--[a-z][a-z0-9_]+", _text((root / "commands" / "trtllm-build.html").read_text()))
    found["trtllm-build"] = {"flags": sorted(set(listed))}
    address = f"https://nvidia.github.io/TensorRT-LLM/{root.resolve().name}/"
    return root.resolve().name, {"source": f"the release's documentation, {address}", "symbols": found}


def collect_pytorch(package: Path) -> tuple[str, dict[str, Any]]:
    """The version of the sources in `package`, and its entry for trtllm_pytorch_api.json."""
    symbols: dict[str, Any] = {}
    modules: dict[str, str] = {}
    for places, names in PYTORCH.items():
        place = next(place for place in places if (package / place).exists())
        symbols |= _signatures((package / place).read_text(), names)
        modules |= {name.partition(".")[0]: f"tensorrt_llm.{place[:-3].replace('/', '.')}" for name in names}
    return _version(package), {"source": "collected from a whole tree", "symbols": symbols, "modules": modules}


def _version(package: Path) -> str:
    statements = ast.parse((package / "version.py").read_text()).body
    return next(ast.literal_eval(node.value) for node in statements if isinstance(node, ast.Assign))


class _Page(HTMLParser):
    """The text of a page, and separately that of its code blocks, without the links that Sphinx puts into them."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.code: list[str] = []
        self._in_code = self._in_link = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._in_code = self._in_code or tag == "pre"
        self._in_link = self._in_link or (tag == "a" and "viewcode-back" in (dict(attributes).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        self._in_code = self._in_code and tag != "pre"
        self._in_link = self._in_link and tag != "a"

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._in_code and not self._in_link:
            self.code.append(data)


def _parse(page: str) -> _Page:
    parser = _Page()
    parser.feed(page)
    parser.close()
    return parser


def source_of_page(page: str) -> str:
    """The Python source in a Sphinx page of highlighted code."""
    return "".join(_parse(page).code)


def _text(page: str) -> str:
    return "".join(_parse(page).text)


def _signatures(source: str, symbols: list[str]) -> dict[str, Any]:
    known = dict(_callables(ast.parse(source)))
    return {symbol: known[symbol] for symbol in symbols}


def _callables(tree: ast.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Functions, methods, and the constructors of dataclasses."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, _signature(node, method=False)
        elif isinstance(node, ast.ClassDef):
            if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
                yield f"{node.name}.__init__", _fields(node)
            for child in node.body:
                if isinstance(child, ast.FunctionDef):
                    static = any(ast.unparse(decorator) == "staticmethod" for decorator in child.decorator_list)
                    yield f"{node.name}.{child.name}", _signature(child, method=not static)


def _fields(node: ast.ClassDef) -> dict[str, Any]:
    fields = [child for child in node.body if isinstance(child, ast.AnnAssign)]
    names = {ast.unparse(child.target): child.value is None for child in fields}
    required = [name for name, missing in names.items() if missing]
    return {"positional": [], "keyword": list(names), "required": required, "any_keyword": False}


def _signature(function: ast.FunctionDef, method: bool) -> dict[str, Any]:
    """Parameter names by kind; `required`: those without a default. `self` and `cls` are left out."""
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
    """The flags of trtllm-build: its own, and one for each field of PluginConfig."""
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
