"""Range checks of settings, and settings objects from untrusted JSON values. Imports no torch."""

import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from switti.errors import UserError
from switti.suggestions import did_you_mean, printable, shortened

MAX_CROP_BASE = 1 << 20  # px; the condition is computed in float32
# Far beyond any model, and small enough for a model of that size to be described at once.
_MOST = {
    "depth": 512, "width": 1 << 16, "heads": 1 << 10, "codebook_size": 1 << 20, "code_width": 1 << 12,
    "text_width": 1 << 16, "pooled_width": 1 << 16, "crop_base": MAX_CROP_BASE,
    "channels": 1 << 13, "residual_blocks": 64, "phi_count": 256,
}  # fmt: skip

# (whether a value is valid, the end of the message about one that is not)
Rule = tuple[Callable[[Any], bool], str]
AT_LEAST_1: Rule = (lambda value: value >= 1, "must be at least 1")
POSITIVE: Rule = (lambda value: value > 0, "must be positive")
NOT_NEGATIVE: Rule = (lambda value: value >= 0, "must not be negative")
OFF_OR_POSITIVE: Rule = (lambda value: value >= 0, "must be 0 (off) or positive")
FRACTION: Rule = (lambda value: 0.0 <= value <= 1.0, "must lie in [0, 1]")


class _Config(Protocol):
    def validate(self, path: str) -> None: ...


Config = TypeVar("Config", bound=_Config)


def from_values(kind: type[Config], values: Mapping[str, Any], path: str) -> Config:
    """A settings object of the dataclass `kind`; settings that `values` lacks keep their defaults.

    path: the group that messages name. A group within it is an object, too. Raises UserError for an unknown name, a
    value of another type or out of range.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path} is a {type(values).__name__}, not an object with settings")
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    hints, values = get_type_hints(kind), dict(values)
    for name, value in values.items():
        if name not in known:
            hint = did_you_mean(printable(name), known) or f"; known are {', '.join(known)}"
            raise UserError(f"unknown setting {path}.{printable(name)}{hint}")
        if is_dataclass(hints[name]):
            values[name] = from_values(hints[name], value, f"{path}.{name}")
        elif not _fits(value, hints[name]):
            raise UserError(f"{path}.{name}={printable(value)} is not {_describe(hints[name])}")
    config = kind(**values)
    config.validate(path)
    return config


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of an annotated type; an integer is a float, a boolean is not a number."""
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint) if isinstance(value, str) else False
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is int:
        return type(value) is int and abs(value) < 2**63
    if hint is float:
        return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
    return value is None if hint is type(None) else type(value) is hint


def _describe(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(parts)}"
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(part) for part in parts)
    if origin is list:
        return f"a list, each {_describe(parts[0])}"
    known = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return known.get(hint, str(hint))


def check(config: object, path: str, rule: Rule, *names: str) -> None:
    """UserError if one of these settings is neither None nor valid: "<path>.<name>=<value> <words of the rule>"."""
    valid, words = rule
    for name in names:
        value = getattr(config, name)
        if value is not None and not valid(value):
            raise UserError(f"{path}.{name}={shortened(value)} {words}")


def check_sizes(config: object, names: Iterable[str], path: str) -> None:
    """UserError if one of these settings is below 1, or larger than any model's."""
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise UserError(f"{path}.{name}={shortened(value)} must be at least 1")
        if value > _MOST[name]:
            raise UserError(f"{path}.{name}={shortened(value)} must be at most {_MOST[name]}")
