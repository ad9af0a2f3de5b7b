#!/usr/bin/env python
"""Collects the signatures of TensorRT-LLM that this project calls, from its sources or a release's documentation.

    python scripts/collect_trtllm_api.py DIRECTORY_WITH_tensorrt_llm
    git clone --depth 1 --branch gh-pages https://github.com/NVIDIA/TensorRT-LLM pages
    python scripts/collect_trtllm_api.py pages/1.2.1                # which shows the release's sources as HTML

Adds them under their version to tests/support/trtllm_api.json: names of parameters, nothing else of the code.
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

TARGET = Path(__file__).resolve().parent.parent / "tests" / "support" / "trtllm_api.json"
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
    root = parser.parse_args().sources
    version, entry = collect(root)
    known = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    known[version] = entry
    TARGET.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(f"{TARGET}: {len(entry['symbols'])} symbols of {version}")


def collect(root: Path) -> tuple[str, dict[str, Any]]:
    """The version of the sources or documentation in `root`, and its entry for trtllm_api.json."""
    package, pages = root / "tensorrt_llm", root / "_modules" / "tensorrt_llm"
    found: dict[str, Any] = {}
    for file, symbols in SYMBOLS.items():
        path = package / file if package.is_dir() else (pages / file).with_suffix(".html")
        if path.suffix == ".html" and not path.exists():
            print(f"{path}: not in the documentation: omits {', '.join(symbols)}")
            continue
        text = path.read_text()
        functions = dict(_functions(ast.parse(text if path.suffix == ".py" else source_of_page(text))))
        found |= {symbol: _signature(functions[symbol], method="." in symbol) for symbol in symbols}
    if package.is_dir():
        found["trtllm-build"] = {"flags": sorted(_flags(package))}
        statements = ast.parse((package / "version.py").read_text()).body
        version = next(ast.literal_eval(node.value) for node in statements if isinstance(node, ast.Assign))
        return version, {"source": "collected from a whole tree", "symbols": found}
    listed = re.findall(r"--[a-z][a-z0-9_]+", _text((root / "commands" / "trtllm-build.html").read_text()))
    found["trtllm-build"] = {"flags": sorted(set(listed))}
    address = f"https://nvidia.github.io/TensorRT-LLM/{root.resolve().name}/"
    return root.resolve().name, {"source": f"the release's documentation, {address}", "symbols": found}


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


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, ast.FunctionDef):
                    yield f"{node.name}.{child.name}", child


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
