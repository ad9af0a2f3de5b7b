"""The C interface of the kernels, read from plugins/cqil_trt.h. Python does not declare it a second time.

Structures, enumerations and constants of the header are attributes of this module under their names there:
`abi.cqil_linear_shape(rows=1, ...)` is a ctypes.Structure, `abi.cqil_dtype.CQIL_FLOAT16` a member of an IntEnum,
`abi.CQIL_HANDLE_BYTES` an integer. `Interface.declare` gives the functions of a loaded library their types. A pointer
takes an address in device memory, None (NULL), or something on the host: a structure of its type, byref(...), a buffer.
"""

from __future__ import annotations

import ast
import ctypes
import re
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any

from cqil_trt.gpu.sources import source_directory

_SCALARS = {
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "size_t": ctypes.c_size_t,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
}
# The names that <stddef.h> and <stdint.h> define; a parser only needs to know that they are types.
_TYPEDEFS = f"typedef int {', '.join(name for name in _SCALARS if name.endswith('_t'))};"
# All that the header may ask of a preprocessor. Declarations for tests count as declared.
_DIRECTIVES = (
    r"#(pragma once|include <std(def|int)\.h>|ifdef CQIL_TEST_DELAYS|endif|define CQIL_PLUGINS\(.*|"
    r'define \w+ +(\d+|"[^"]*"))\s*$'
)
# Kinds of fields in CQIL_PLUGINS.
_FIELD_TYPES = {"INT": int, "OPTIONAL_INT": int, "FLOAT": float, "OPTIONAL_FLOAT": float}


@dataclass(frozen=True)
class Field:
    """A field of a TensorRT plugin: int (int32) or float (float32); an optional one is 0 where it is not given."""

    type: type
    optional: bool


@dataclass(frozen=True)
class Function:
    """ctypes types of a function's result and arguments; a result of None is void."""

    result: Any
    arguments: list[Any]


class Interface:
    """What a header declares.

    Args:
        header: its text. Raises ValueError for a declaration that Python has no type for.

    Attributes:
        names: structures, enumerations and constants by name.
        functions: by name.
        plugins: the fields of each TensorRT plugin, in order.
    """

    def __init__(self, header: str):
        from pycparser import CParser, c_ast

        text = re.sub(r"//[^\n]*", "", header).replace("\\\n", " ")
        text = re.sub(r"#ifdef __cplusplus.*?#endif", "", text, flags=re.DOTALL)
        for line in re.findall(r"^#.*$", text, re.MULTILINE):
            if not re.match(_DIRECTIVES, line):
                raise ValueError(f"cqil_trt.h: Python does not read {line}")
        self.names: dict[str, Any] = {}
        self.functions: dict[str, Function] = {}
        for name, value in re.findall(r'^#define (\w+) +(\d+|"[^"]*")$', text, re.MULTILINE):
            self.names[name] = ast.literal_eval(value)
        self.plugins = _plugins(text)

        self._nodes = c_ast
        declarations = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
        for node in CParser().parse(_TYPEDEFS + declarations).ext:
            kind = node.type.type if isinstance(node.type, c_ast.TypeDecl) else None
            if isinstance(node.type, c_ast.FuncDecl):
                self.functions[node.name] = self._function(node.type)
            elif isinstance(kind, c_ast.Struct) and kind.decls:
                self.names[node.name] = self._structure(node.name, kind)
            elif isinstance(kind, c_ast.Enum):
                self.names[node.name] = _enumeration(node.name, kind)

    def _function(self, node: Any) -> Function:
        given = node.args.params if node.args else []
        arguments = [self._type(argument.type) for argument in given]
        return Function(self._type(node.type), [] if arguments == [None] else arguments)

    def _structure(self, name: str, node: Any) -> type[ctypes.Structure]:
        for member in node.decls:
            if member.bitsize is not None:
                raise ValueError(f"cqil_trt.h: Python does not read bit-fields ({member.coord})")
        fields = [(member.name, self._type(member.type)) for member in node.decls]
        # Without slots, an unknown keyword would be accepted silently.
        return type(name, (ctypes.Structure,), {"_fields_": fields, "__slots__": ()})

    def _type(self, node: Any) -> Any:
        c_ast = self._nodes
        if isinstance(node, c_ast.PtrDecl):
            return self._pointer(node.type)
        if isinstance(node, c_ast.ArrayDecl):
            return self._type(node.type) * int(node.dim.value)
        name = " ".join(node.type.names)
        if name == "void":
            return None
        found = self.names.get(name, _SCALARS.get(name))
        if found is None:
            raise ValueError(f"cqil_trt.h: Python has no type for {name} ({node.coord})")
        return ctypes.c_int if issubclass(found, IntEnum) else found

    def _pointer(self, target: Any) -> Any:
        names = getattr(target.type, "names", [])  # a pointer to a pointer has none
        if names == ["char"]:
            return ctypes.c_char_p
        found = self.names.get(" ".join(names), int)
        return _structure_pointer(found) if issubclass(found, ctypes.Structure) else ctypes.c_void_p

    def declare(self, library: ctypes.CDLL) -> None:
        """Gives the functions that a library exports their types."""
        for name, function in self.functions.items():
            if hasattr(library, name):
                exported = getattr(library, name)
                exported.argtypes, exported.restype = function.arguments, function.result

    def plugin_fields(self, plugin: str, given: dict[str, int | float]) -> dict[str, int | float]:
        """`given`, when it is what a plugin takes. Raises TypeError that names the field which is not."""
        if plugin not in self.plugins:
            raise TypeError(f"{plugin}: cqil_trt.h has no such plugin")
        fields = self.plugins[plugin]
        for name in given.keys() - fields.keys():
            raise TypeError(f"{plugin} has no field {name} (it has {', '.join(fields)})")
        for name, field in fields.items():
            if name not in given:
                if not field.optional:
                    raise TypeError(f"{plugin}: its field {name} is not given")
            elif type(given[name]) is not field.type:
                raise TypeError(f"{plugin}: its field {name} is of type {field.type.__name__}, found {given[name]!r}")
        return given


def _plugins(text: str) -> dict[str, dict[str, Field]]:
    """Those of CQIL_PLUGINS, whose body is PLUGIN(name, KIND(field) KIND(field) ...) for each of them."""
    plugins = {}
    for body in re.findall(r"^#define CQIL_PLUGINS\([^)]*\)(.*)$", text, re.MULTILINE):
        for name, fields in re.findall(r"PLUGIN\((\w+),((?:\s*\w+\(\s*\w+\))+)\s*\)", body):
            kinds = re.findall(r"(\w+)\(\s*(\w+)\)", fields)
            plugins[name] = {field: Field(_FIELD_TYPES[kind], kind.startswith("OPTIONAL")) for kind, field in kinds}
    return plugins


def _enumeration(name: str, node: Any) -> Any:
    """An IntEnum. Raises ValueError unless each enumerator has a value, so that it does not depend on their order."""
    values = {}
    for enumerator in node.values.enumerators:
        if enumerator.value is None:
            raise ValueError(f"cqil_trt.h: {enumerator.name} has no value ({enumerator.coord})")
        values[enumerator.name] = int(enumerator.value.value, 0)
    return IntEnum(name, values)


def _structure_pointer(structure: type[ctypes.Structure]) -> type[ctypes.c_void_p]:
    """The type of an argument that is a structure on the host, or the address of one."""

    class Pointer(ctypes.c_void_p):
        @classmethod
        def from_param(cls, value: Any) -> Any:
            if isinstance(value, structure):
                return ctypes.byref(value)
            return ctypes.c_void_p.from_param(value)

    return Pointer


@lru_cache
def interface() -> Interface:
    """Of the header that belongs to the sources here."""
    return Interface((source_directory() / "cqil_trt.h").read_text())


def dtype_code(name: str) -> int:
    """The cqil_dtype of "float32", "float16" or "bfloat16"."""
    return int(interface().names["cqil_dtype"][f"CQIL_{name.upper()}"])


def __getattr__(name: str) -> Any:
    # Python looks up names of its own first.
    if not name.lower().startswith("cqil_") or name not in interface().names:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, interface().names[name])
