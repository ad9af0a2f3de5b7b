"""The folders of backends and formats are their registries: nothing else has to list them."""

import re
import signal
import sys

import pytest
from support import ROOT

from cqil_trt import backends, formats
from cqil_trt.config import CqilConfig, EngineLimits
from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.families import read_config
from cqil_trt.shard import plan

EXTRAS = set(re.findall(r"^([\w-]+) = \[$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", backends.names())
def test_a_backend_is_called_after_its_folder_and_its_packages_come_with_an_extra(name):
    backend = backends.load(name)
    assert backend.name == name
    assert set(backend.packages.values()) <= EXTRAS
    assert set(backend.formats) <= set(formats.names())
    assert all("0" in file for file in backend.rank_files(0))


ECHO = """
from cqil_trt.backends import Backend, Description, Option

class Echo(Backend):
    name = "echo"
    options = (Option(name="volume", help="in % of the usual", keywords={"type": int}),)

    def rank_files(self, rank):
        return *super().rank_files(rank), f"rank{rank}.echo"

    def describe(self, limits, options, ranks):
        return Description(version="echo 1", notes=(f"an echo of {len(ranks)}",))

    def compile(self, compilation):
        compilation.file("echo").write_text(str(compilation.options.get("volume")))

    def open_session(self, engine, comm, device, number, slots):
        raise NotImplementedError

BACKEND = Echo()
"""


def test_a_backend_is_added_by_a_folder(tmp_path, monkeypatch, capsys):
    from support.checkpoints import make_model

    from cqil_trt.commands import build

    (tmp_path / "more" / "echo").mkdir(parents=True)
    (tmp_path / "more" / "echo" / "__init__.py").write_text(ECHO)
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path / "more")])
    backends.names.cache_clear()
    handler = signal.getsignal(signal.SIGTERM)  # which commands replace
    try:
        with pytest.raises(SystemExit, match="0"):
            build.main(["--help"])
        assert "echo: in % of the usual" in capsys.readouterr().out
        model = make_model(tmp_path / "model", num_hidden_layers=2)
        arguments = ["--model", model, "--probes", "never", "--output"]
        build.main([*map(str, arguments), str(tmp_path / "e"), "--backend", "echo", "--p", "2", "--volume", "0"])
        assert "note       an echo of 2" in capsys.readouterr().out
        engine = Engine.open(tmp_path / "e")
        assert engine.backend == "echo" and engine.backend_version == "echo 1"
        for rank in range(2):
            assert engine.rank_file(rank, "echo").read_text() == "0"
        with pytest.raises(SystemExit, match="2"):
            build.main([*map(str, arguments), str(tmp_path / "t"), "--volume", "1"])
        assert "--volume: only backend echo takes it, found backend torch" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, handler)
        monkeypatch.undo()
        backends.names.cache_clear()
        sys.modules.pop("cqil_trt.backends.echo", None)


def test_a_format_is_added_by_a_file_and_refused_by_backends_that_do_not_know_it(tmp_path, monkeypatch):
    from support.checkpoints import make_model

    (tmp_path / "wide.py").write_text(
        "from cqil_trt.formats.dense import Dense\n"
        "class Wide(Dense):\n"
        "    def tensors(self, projection, dtype):\n"
        '        return super().tensors(projection, "float32")\n'
        "FORMAT = Wide()\n"
    )
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    formats.names.cache_clear()
    try:
        model = read_config(make_model(tmp_path / "model", num_hidden_layers=2) / "config.json")
        dense, wide = (plan(model, CqilConfig(p=1), "float16", weights)[0] for weights in ("dense", "wide"))
        types = {tensor.name: tensor.dtype for tensor in wide.tensors}
        assert types["layers.0.qkv.weight"] == "float32" and types["layers.0.mlp_norm.weight"] == "float16"
        matrices = sum(t.nbytes for t in dense.tensors if t.name.startswith("layers.") and "norm" not in t.name)
        assert wide.stored_bytes == dense.stored_bytes + matrices
        assert wide.bytes_per_token == dense.bytes_per_token + matrices
        with pytest.raises(UserError, match="--quantize wide: backend onnx does not support it: use dense"):
            backends.load("onnx").check_model(model, EngineLimits(weights="wide", max_seq_len=8))
    finally:
        monkeypatch.undo()
        formats.names.cache_clear()
    with pytest.raises(
        UserError, match="--quantize must be one of dense, fp8, int4, int8, int4g64, int4g32, found narrow"
    ):
        assert plan(model, CqilConfig(p=1), "float16", "narrow")[0].tensors
