"""Typed reads from untrusted JSON: a wrong type raises UserError, a missing key gives a default."""

import math
from pathlib import Path
from typing import Any

from switti.errors import UserError

# An integer beyond it is not a float.
_LARGEST = 1e300


def mapping(tree: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    """The object under `key`, {} if there is none. Raises UserError for anything else, as do the others."""
    value = tree.get(key)
    if value is not None and not isinstance(value, dict):
        raise _wrong(path, key, "an object", value)
    return value or {}


def items(tree: dict[str, Any], key: str, path: Path, kind: type) -> list[Any]:
    """The list under `key`, [] if there is none, all of whose items are of one type."""
    value = tree.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(_is(kind, item) for item in value):
        raise _wrong(path, key, f"a list of {kind.__name__}", value)
    return value


def number(tree: dict[str, Any], key: str, path: Path) -> float | None:
    """The number under `key`, None if there is none or if it is not finite."""
    value = tree.get(key)
    if value is None:
        return None
    if _is(float, value) and abs(value) < _LARGEST:
        return value
    if isinstance(value, float):
        return None
    raise _wrong(path, key, "a number", value)


def integer(tree: dict[str, Any], key: str, path: Path) -> int | None:
    """The integer under `key`, None if there is none."""
    value = tree.get(key)
    if value is None or (_is(int, value) and abs(value) < _LARGEST):
        return value
    raise _wrong(path, key, "an integer", value)


def seconds(tree: dict[str, Any], key: str, path: Path) -> float | None:
    """A number that something can be divided by: positive and finite."""
    value = number(tree, key, path)
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise _wrong(path, key, "a positive number", value)
    return value


def many_seconds(tree: dict[str, Any], key: str, path: Path) -> tuple[float, ...]:
    """A list of such numbers, () if there is none."""
    values = items(tree, key, path, float)
    if not all(0 < value < _LARGEST for value in values):
        raise _wrong(path, key, "a list of positive numbers", values)
    return tuple(values)


def text(tree: dict[str, Any], key: str, path: Path) -> str | None:
    """The text under `key`, None if there is none."""
    value = tree.get(key)
    if value is not None and not isinstance(value, str):
        raise _wrong(path, key, "text", value)
    return value


def _is(kind: type, value: Any) -> bool:
    """An integer is a number as well, a boolean is not."""
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def _wrong(path: Path, key: str, wanted: str, value: Any) -> UserError:
    return UserError(f"{path}: {key} must be {wanted}, not {_brief(value)!r}")


def _brief(value: Any) -> str:
    """The beginning of a value; of a number of thousands of digits its kind."""
    try:
        return str(value)[:60]
    except ValueError:
        return f"a huge {type(value).__name__}"
