"""Reads JSON configuration files; every error is one line that names the file and the field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cqil_trt.errors import UserError

# A configuration file is a few kilobytes; a larger one is not a configuration.
MAX_JSON_BYTES = 16 << 20


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError when it is missing, too large or not an object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: {path.stat().st_size} bytes is too large for a configuration file")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class Fields:
    """Typed access to a JSON object; every error names the source and the field."""

    def __init__(self, values: Mapping[str, Any], source: str):
        self.values = values
        self.source = source

    def fail(self, name: str, expected: str) -> UserError:
        found = repr(self.values.get(name))
        return UserError(f"{self.source}: {name} must be {expected}, found {found[:60]}")

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def with_defaults(self, **values: Any) -> Fields:
        """The same object with `values` for missing fields; a null field is not missing."""
        return Fields({**values, **self.values}, self.source)

    def integer(self, name: str, default: int | None = None, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(name, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = None, low: float = 0.0) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(name, "a number")
        try:
            value = float(value)
        except OverflowError:
            raise self.fail(name, "a number") from None
        if not (math.isfinite(value) and value > low):
            raise self.fail(name, f"a finite number above {low:g}")
        return value

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers above 0."""
        value = self.get(name)
        if not isinstance(value, list) or len(value) != count:
            raise self.fail(name, f"a list of {count} numbers")
        return tuple(Fields({name: each}, self.source).number(name) for each in value)

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.fail(name, "a string")
        return value

    def object(self, name: str) -> Fields:
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.fail(name, "an object")
        return Fields(value, f"{self.source}: {name}")

    def integers(self, name: str, what: str = "a token id or a list of them") -> tuple[int, ...]:
        """A number from 0 or a list of them, as Hugging Face writes eos_token_id. `what`: the error calls them that."""
        value = self.get(name, [])
        value = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in value):
            raise self.fail(name, what)
        return tuple(value)
