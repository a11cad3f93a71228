"""Names and types of settings, read from their dataclasses, and how messages describe a type."""

import types
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_SINGULAR = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_LISTS = {
    int: "integers, such as [1, 2]",
    float: "numbers, such as [0.9, 0.95]",
    str: "texts, such as [a, b]",
    list[int]: "lists of integers, such as [[1, 2], [1, 3]]",
}
_UNIONS = (Union, types.UnionType)


@dataclass(frozen=True)
class Setting:
    """One leaf of the configuration tree. `kind` is its type without `| None`."""

    name: str
    kind: Any
    optional: bool

    @property
    def takes_text(self) -> bool:
        """Whether any text is a value."""
        return self.kind is str or (get_origin(self.kind) in _UNIONS and str in get_args(self.kind))

    @property
    def choices(self) -> list[str]:
        """The values of a setting that takes one of a few; [] for any other."""
        return [str(choice) for choice in get_args(self.kind)] if get_origin(self.kind) is Literal else []

    @property
    def words(self) -> str:
        """The type, as the end of a sentence: "an integer"."""
        text = _describe(self.kind)
        return f"{text} (or null)" if self.optional else text


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) is list:
        return f"a list of {_LISTS.get(get_args(kind)[0], 'values')}"
    if get_origin(kind) is dict:
        return "a mapping"
    if get_origin(kind) in _UNIONS:
        return " or ".join(_describe(part) for part in get_args(kind) if part is not type(None))
    return _SINGULAR.get(kind, str(kind))


def _strip_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) not in _UNIONS:
        return hint, False
    others = [part for part in get_args(hint) if part is not type(None)]
    return others[0] if len(others) == 1 else hint, len(others) < len(get_args(hint))


def walk(schema: type, prefix: str = "") -> Iterator[Setting]:
    """All leaves of a dataclass type, depth first, with dotted names."""
    hints = get_type_hints(schema)
    for item in fields(schema):
        kind, optional = _strip_none(hints[item.name])
        name = f"{prefix}{item.name}"
        if isinstance(kind, type) and is_dataclass(kind):
            yield from walk(kind, f"{name}.")
        else:
            yield Setting(name, kind, optional)
