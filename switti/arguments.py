"""Checks of arguments from callers and command lines: integers, seeds and texts, with one wording."""

from typing import Any

from switti.errors import UserError
from switti.suggestions import shortened

LARGEST_SEED = 2**64 - 1


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high]: an integer of any library, or decimal digits. Raises UserError naming it."""
    number: int | None = None
    if isinstance(value, str):
        digits = value.strip().removeprefix("+").removeprefix("-")
        # Python refuses to convert more digits than these.
        if digits.isascii() and digits.isdigit() and len(digits) <= 4000:
            number = int(value)
    elif not isinstance(value, bool) and hasattr(value, "__index__"):
        try:
            number = value.__index__()
        except (TypeError, ValueError):
            number = None
    within = f"of at least {low}" if high is None else f"in [{low}, {high}]"
    if number is None or number < low or (high is not None and number > high):
        raise UserError(f"{name}={_show(value)} must be an integer {within}")
    return number


def seed(name: str, value: Any) -> int:
    """A seed of 64 bits. Raises UserError."""
    return integer(name, value, 0, LARGEST_SEED)


def text(name: str, value: Any) -> str:
    """`value`, if it is text that can be encoded. Raises UserError naming it."""
    if not isinstance(value, str):
        raise UserError(f"{name}={_show(value)} must be text, not {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{name}={_show(value)} is not text in UTF-8") from None
    return value


def _show(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    return shortened(ascii(value)[1:-1] if isinstance(value, str) else " ".join(repr(value).split()))
