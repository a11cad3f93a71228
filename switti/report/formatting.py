"""Numbers as a reader wants them."""

import math
from datetime import datetime

from switti.report.statistics import Paired, Spread

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


def plus_minus(spread: Spread | None) -> str:
    """Mean ± deviation, or the one value."""
    if spread is None:
        return DASH
    if spread.deviation is None:
        return number(spread.mean)
    if spread.deviation <= 1e-9 * abs(spread.mean):  # equal but for rounding
        return f"{number(spread.mean)} ± 0"
    if not 1e-4 <= abs(spread.mean) < 1e6 or spread.deviation < 1e-6:
        return f"{number(spread.mean)} ± {number(spread.deviation, 2)}"
    decimals = max(0, 1 - math.floor(math.log10(spread.deviation)))  # both to the deviation's second digit
    return f"{spread.mean:.{decimals}f} ± {spread.deviation:.{decimals}f}".replace("-", "−")


def interval(paired: Paired) -> str:
    """The interval, or the plain statement that one pair has none."""
    if paired.low is None or paired.high is None:
        return "one pair, no interval"
    return f"[{signed(paired.low)}, {signed(paired.high)}]"


def duration(seconds: float | None) -> str:
    """Seconds in the two largest units."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 60:
        return f"{number(seconds, 3)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


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
