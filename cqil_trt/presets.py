"""The configurations the authors of CQIL published, by name."""

from __future__ import annotations

from dataclasses import dataclass

from cqil_trt.config import CqilConfig
from cqil_trt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published configuration. `layers`: of the model it was published for."""

    layers: int
    cqil: CqilConfig


# Adapters with d > 0 were trained by the authors' released code, whose bypass is also part of the residual stream.
PRESETS = {
    "llama-7b-p2-d0": Preset(layers=32, cqil=CqilConfig(p=2, d=0, start=12, end=30)),
    "llama-7b-p2-d1": Preset(layers=32, cqil=CqilConfig(p=2, d=1, start=12, end=30, bypass="residual")),
    "llama-7b-p4-d0": Preset(layers=32, cqil=CqilConfig(p=4, d=0, start=14, end=30)),
    "llama-7b-p4-d1": Preset(layers=32, cqil=CqilConfig(p=4, d=1, start=14, end=30, bypass="residual")),
    "qwen1.5-14b-p2-d0": Preset(layers=40, cqil=CqilConfig(p=2, d=0, start=17, end=37)),
}


def preset(name: str) -> Preset:
    """The published configuration `name`; raises UserError for an unknown one."""
    try:
        return PRESETS[name]
    except KeyError:
        raise UserError(f"--preset {name}: unknown (known: {', '.join(PRESETS)})") from None
