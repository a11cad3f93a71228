"""Durations and speeds as people read them."""

import math

UNKNOWN = "–"


def duration(seconds: float | None) -> str:
    """ "1 h 02 min", "3 min 04 s" or "5 s"."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def short_duration(seconds: float | None) -> str:
    """The same in five places at most: "2d03h", "1h02m", "3m04s" or "5s"."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def short_rate(rate: float | None) -> str:
    """Steps a second in three digits; fewer than one a second as seconds a step: "12.3/s", "4.5s/it"."""
    if not rate:
        return UNKNOWN
    return f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g}s/it"
