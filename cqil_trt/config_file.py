"""A configuration in a file: what `similarity.py --search --write` found, for `--config` of the other commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cqil_trt import formats
from cqil_trt.config import AUTO, DTYPES, KV_DTYPES, CqilConfig
from cqil_trt.errors import UserError
from cqil_trt.files import write_json
from cqil_trt.json_fields import Fields, read_json


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """A configuration, what it was found for, and how.

    Attributes:
        layers: of the model.
        cqil: which layers run concurrently.
        weights, dtype, head, kv_dtype: as in `EngineLimits`.
        model: the model's name, for readers.
        found: how it was found, for readers.
    """

    layers: int
    cqil: CqilConfig
    weights: str
    dtype: str
    head: str = formats.DENSE
    kv_dtype: str = AUTO
    model: str = ""
    found: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stored(self) -> dict[str, Any]:
        """The fields of `EngineLimits` that say how weights and KV caches are stored, but for `dtype`."""
        return {"weights": self.weights, "head": self.head, "kv_dtype": self.kv_dtype}

    def write(self, path: Path) -> None:
        values = {"model": self.model, "layers": self.layers, "cqil": self.cqil.to_dict()}
        values |= {"dtype": self.dtype, **self.stored, "found": dict(self.found)}
        write_json(path, values)

    @classmethod
    def read(cls, path: Path, num_layers: int) -> ConfigFile:
        """The file at `path`, for a model of `num_layers` layers.

        Raises UserError, naming the field, for one that is malformed or does not fit.
        """
        values = Fields(read_json(path), str(path))
        _only(values, ("model", "layers", "cqil", "weights", "head", "dtype", "kv_dtype", "found"))
        layers = values.integer("layers")
        if layers != num_layers:
            raise UserError(f"{path}: layers is {layers}, and the model has {num_layers}: it is for another model")
        known = formats.DENSE, *formats.choices()
        stored = {name: values.text(name, formats.DENSE) for name in ("weights", "head")}
        for name, found in stored.items():
            if found not in known:
                raise values.fail(name, f"one of {', '.join(known)}")
        dtype = values.text("dtype")
        if dtype not in DTYPES:
            raise values.fail("dtype", f"one of {', '.join(DTYPES)}")
        kv_dtype = values.text("kv_dtype", AUTO)
        if kv_dtype not in KV_DTYPES:
            raise values.fail("kv_dtype", f"one of {', '.join(KV_DTYPES)}")
        inner = values.object("cqil")
        _only(inner, tuple(f.name for f in fields(CqilConfig)))
        cqil = CqilConfig.of_fields(inner)
        try:
            cqil.check_depth(layers)
        except UserError as error:
            raise UserError(f"{inner.source}: {error}") from None
        name = values.text("model", "")
        return cls(
            layers=layers,
            cqil=cqil,
            weights=stored["weights"],
            head=stored["head"],
            dtype=dtype,
            kv_dtype=kv_dtype,
            model=name,
        )


def _only(values: Fields, known: tuple[str, ...]) -> None:
    """Raises UserError for a field with another name: a misspelled one would silently have its default."""
    if unknown := [name for name in values.values if name not in known]:
        raise UserError(f"{values.source}: unknown field {unknown[0]:.60} (known: {', '.join(known)})")
