"""Early stopping by the dynamics of an objective: DVAR and the rules it is compared with (arXiv 2302.04841).

A history is one number per evaluation of the same objective, oldest first, the untrained state's included: the training
loss of one fixed batch, or for CLIP-s an image score. All arithmetic is in float64 and a pure function of the history,
so that every rank and a resumed run decide alike.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

# Weight of the newest value in the moving average of `ema_change`.
EMA_WEIGHT = 0.1
# Standard deviations below this share of the largest value are rounding.
_ROUNDING = 1e-12


# ---- statistics of a history --------------------------------------------------------------------------------------


def variance_ratio(history: Sequence[float], window: int, correction: int = 0) -> float:
    """DVAR's statistic: variance of the last `window` values over the variance of all.

    correction: 0 for the population variance, as in the authors' code; 1 for the divisor count − 1, as in their
    listing.

    Returns:
        1 before the window is full; NaN where there is nothing to decide by: a history that is constant but for
        rounding, or holds a value that is not finite.
    """
    if len(history) < window:
        return 1.0
    values = np.asarray(history, np.float64)
    if len(values) <= correction or not np.isfinite(values).all():
        return math.nan
    total = float(values.var(ddof=correction))
    if total <= (_ROUNDING * float(np.abs(values).max())) ** 2:
        return math.nan
    return float(values[-window:].var(ddof=correction)) / total


def ema_change(history: Sequence[float], window: int) -> float:
    """Relative change of an exponential moving average over the last `window` evaluations; NaN before there are more.

    The average starts at the first value.
    """
    if len(history) <= window:
        return math.nan
    average = before = history[0]
    for number, value in enumerate(history):
        average = (1 - EMA_WEIGHT) * average + EMA_WEIGHT * value if number else value
        if number == len(history) - 1 - window:
            before = average
    return (average - before) / before if before else math.nan


def hall(history: Sequence[float], window: int) -> float:
    """(largest − smallest) / mean of the last `window` values; NaN before the window is full."""
    if len(history) < window:
        return math.nan
    values = np.asarray(history[-window:], np.float64)
    mean = float(values.mean())
    return float(values.max() - values.min()) / mean if mean else math.nan


def trend(history: Sequence[float], window: int) -> float:
    """Slope per evaluation of the least-squares line through the last `window` values; NaN before the window is
    full."""
    if len(history) < max(2, window):
        return math.nan
    values = np.asarray(history[-window:], np.float64)
    centred = np.arange(window, dtype=np.float64) - (window - 1) / 2
    return float(centred @ (values - values.mean()) / (centred @ centred))


def checks_without_gain(scores: Sequence[float], margin: float) -> int:
    """CLIP-s's statistic: how many scores in a row have not exceeded the best one before them by more than `margin`.

    The first score is the best one so far. A gain smaller than the margin leaves the best one as it is, so small gains
    add up.
    """
    if not scores:
        return 0
    best, count = scores[0], 0
    for score in scores[1:]:
        if score > best + margin:
            best, count = score, 0
        else:
            count += 1
    return count


# ---- rules --------------------------------------------------------------------------------------------------------


class StoppingRule(Protocol):
    """A statistic of the history, and whether it says stop. label: of the statistic in logs and records."""

    @property
    def label(self) -> str: ...
    def statistic(self, history: Sequence[float]) -> float: ...
    def stops(self, statistic: float) -> bool: ...
    def reason(self, statistic: float) -> str: ...


WINDOW_STATISTICS: dict[str, Callable[[Sequence[float], int], float]] = {
    "dvar": variance_ratio,
    "ema_change": ema_change,
    "hall": hall,
    "trend": trend,
}


@dataclass(frozen=True)
class WindowRule:
    """Stops when the magnitude of a statistic of the last `window` evaluations is below `threshold`; NaN never is.

    name: a key of WINDOW_STATISTICS.
    """

    name: str
    window: int
    threshold: float

    @property
    def label(self) -> str:
        return "ratio" if self.name == "dvar" else self.name

    def statistic(self, history: Sequence[float]) -> float:
        return WINDOW_STATISTICS[self.name](history, self.window)

    def stops(self, statistic: float) -> bool:
        return abs(statistic) < self.threshold

    def reason(self, statistic: float) -> str:
        return f"{self.name}: {self.label} {statistic:.4g} below {self.threshold:g}"


@dataclass(frozen=True)
class PatienceRule:
    """CLIP-s: stops after more than `patience` scores in a row without a gain of more than `margin`."""

    margin: float
    patience: int

    @property
    def label(self) -> str:
        return "checks_without_gain"

    def statistic(self, history: Sequence[float]) -> float:
        return float(checks_without_gain(history, self.margin))

    def stops(self, statistic: float) -> bool:
        return statistic > self.patience

    def reason(self, statistic: float) -> str:
        return f"clip_s: {statistic:.0f} scores in a row without a gain of more than {self.margin:g}"


def stop_evaluation(rule: StoppingRule, history: Sequence[float]) -> int | None:
    """Number of the first evaluation, counted from 1, after which the rule stops; None: never."""
    for count in range(1, len(history) + 1):
        if rule.stops(rule.statistic(history[:count])):
            return count
    return None
