"""Formatting of numbers: significant digits, intervals, times."""

import math
from collections.abc import Sequence
from datetime import datetime

from reports.data.statistics import Paired, Ratio, Spread

DASH = "–"


def number(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits, a true minus, powers of ten only where they help."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("−∞" if value < 0 else "∞")
    if not value:
        return "0"
    size = abs(value)
    if size < 1e-4 or size >= 1e6:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        decimals = max(0, digits - 1 - math.floor(math.log10(size)))
        text = f"{value:.{decimals}f}"
    return text.replace("-", "−")


def signed(value: float, digits: int = 3) -> str:
    return ("+" if value > 0 else "") + number(value, digits)


def plus_minus(spread: Spread | None, error: float | None = None) -> str:
    """Mean ± deviation, or the one value. error: standard error that sets the digits, if not the spread's own."""
    if spread is None:
        return DASH
    if spread.deviation is None:
        return number(spread.mean)
    if _is_nothing(spread.deviation, spread.mean):
        return f"{number(spread.mean)} ± 0"
    decimals = places(spread.mean, spread.error if error is None else error)
    if decimals is None:
        return f"{number(spread.mean)} ± {number(spread.deviation, 2)}"
    deviation = f"{spread.deviation:.{decimals}f}"
    if not float(deviation):
        deviation = number(spread.deviation, 1)
    return f"{spread.mean:.{decimals}f} ± {deviation}".replace("-", "−")


def in_one_row(spreads: Sequence[Spread | None]) -> list[str]:
    """Means ± deviations that stand side by side, to the digits that their pooled standard error bears.

    The deviation of two or three runs says little of its own: a small one by chance would add digits without meaning.
    """
    errors = [s.error for s in spreads if s and s.error is not None and not _is_nothing(s.error, s.mean)]
    pooled = math.sqrt(sum(error**2 for error in errors) / len(errors)) if errors else None
    return [plus_minus(spread, pooled) for spread in spreads]


def places(value: float, error: float | None) -> int | None:
    """Decimals at which a number shows two digits of its standard error, and 2 to 5 digits of its own.

    None where powers of ten serve better, or without an error.
    """
    if error is None or not math.isfinite(error) or not 1e-4 <= abs(value) < 1e6 or _is_nothing(error, value):
        return None
    leading = math.floor(math.log10(abs(value)))
    wanted = 1 - math.floor(math.log10(error))
    return max(0, min(max(wanted, 1 - leading), 4 - leading))


def _is_nothing(error: float, value: float) -> bool:
    """Whether values are equal but for rounding."""
    return error <= 1e-9 * abs(value)


def gap(paired: Paired) -> str:
    """The mean difference, to the digits that its standard error bears."""
    return _differences(paired, paired.mean)[0]


def interval(paired: Paired) -> str:
    """The interval to the same digits, or the plain statement that one pair has none."""
    if paired.low is None or paired.high is None:
        return "one pair, no interval"
    low, high = _differences(paired, paired.low, paired.high)
    return f"[{low}, {high}]"


def _differences(paired: Paired, *values: float) -> list[str]:
    ends = [paired.mean, *(end for end in (paired.low, paired.high) if end is not None)]
    decimals = places(max(ends, key=abs), paired.error)
    if decimals is None:
        return [signed(value) for value in values]
    rounded = [round(value, decimals) for value in values]
    return [
        f"{value:{'+' if value else ''}.{decimals}f}".replace("-", "−")
        for value in (r or 0.0 for r in rounded)
    ]


def ratio_interval(ratio: Ratio) -> str:
    """A ratio of paired values with its interval, or the statement that one pair has none."""
    if ratio.low is None or ratio.high is None:
        return f"{number(ratio.mean, 3)} (one pair, no interval)"
    return f"{number(ratio.mean, 3)} [{number(ratio.low, 3)}, {number(ratio.high, 3)}]"


def moment(text: str | None) -> str:
    """An ISO time to the minute; what is not one is given back as it is."""
    if not text:
        return DASH
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return text


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"
