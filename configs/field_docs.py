"""Docstrings under the fields of dataclasses, read from their source. Imports no torch."""

import ast
import inspect
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import get_type_hints


def field_docs(kind: type) -> dict[str, str]:
    """Field → the string literal below it, of a dataclass and its bases; "" where there is none.

    A field that only changes a base's default keeps the base's docstring.
    """
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if is_dataclass(base):
            docs |= _own_docs(base)
    return {item.name: docs.get(item.name, "") for item in fields(kind)}


def setting_docs(schema: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of all settings and groups of settings, each group before its settings."""
    hints = get_type_hints(schema)
    for name, text in field_docs(schema).items():
        yield f"{prefix}{name}", text
        if is_dataclass(hints[name]):
            yield from setting_docs(hints[name], f"{prefix}{name}.")


@cache
def _own_docs(kind: type) -> dict[str, str]:
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in pairwise(_bodies(kind.__module__)[kind.__name__])
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(below.value.value, str)
    }


@cache
def _bodies(module: str) -> dict[str, list[ast.stmt]]:
    """Class → its statements."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
