"""Pure statistics of the report: paired bootstrap, mean and deviation, smoothing, bands over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
# Share of a noisy training curve whose mean is its final value.
TAIL = 0.1
# Share of a training curve over which it is smoothed.
WINDOW = 0.05


@dataclass(frozen=True)
class Paired:
    """Mean of paired differences with a percentile interval; `low` and `high` are None for a single pair."""

    differences: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None

    @property
    def count(self) -> int:
        return len(self.differences)

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None for a single pair."""
        return spread(self.differences).error

    @property
    def one_sided(self) -> bool:
        """Every pair differs in the same direction."""
        return all(d > 0 for d in self.differences) or all(d < 0 for d in self.differences)

    @property
    def chance(self) -> float:
        """Probability that fair coins give `count` signs on one side: the two-sided sign test when all agree."""
        return min(1.0, 2.0 * 0.5**self.count)

    @property
    def firm(self) -> bool:
        """The interval excludes 0 and there are enough pairs for that to mean something (sign test below 5 %)."""
        apart = self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)
        return apart and self.chance < 1 - LEVEL


def paired_bootstrap(differences: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Paired:
    """Percentile bootstrap of the mean difference (Efron 1979), resampling pairs with replacement.

    differences: at least one finite number, any order (the result does not depend on it).
    """
    values = np.sort(np.asarray(differences, np.float64))
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError("differences must be finite and at least one")
    if values.size == 1:
        return Paired((float(values[0]),), float(values[0]), None, None)
    picks = np.random.default_rng(seed).integers(0, values.size, (resamples, values.size))
    low, high = np.quantile(values[picks].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Paired(tuple(float(d) for d in differences), float(values.mean()), float(low), float(high))


@dataclass(frozen=True)
class Ratio:
    """Geometric mean of paired ratios with a percentile interval; `low` and `high` are None for a single pair."""

    count: int
    mean: float
    low: float | None
    high: float | None


def paired_ratio(ratios: Sequence[float]) -> Ratio:
    """Bootstrap of the mean logarithm, so that a / b and b / a give reciprocal answers. ratios: positive."""
    paired = paired_bootstrap([math.log(ratio) for ratio in ratios])
    low, high = (None if end is None else math.exp(end) for end in (paired.low, paired.high))
    return Ratio(paired.count, math.exp(paired.mean), low, high)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n − 1) over seeds; the deviation is None for one value."""

    count: int
    mean: float
    deviation: float | None

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None for one value."""
        return None if self.deviation is None else self.deviation / math.sqrt(self.count)


def spread(values: Sequence[float]) -> Spread:
    """Summary of at least one value."""
    array = np.asarray(values, np.float64)
    return Spread(array.size, float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else None)


def tail_mean(values: np.ndarray) -> float:
    """Mean of the last tenth of the logged values (at least one)."""
    return float(values[-max(1, round(TAIL * values.size)) :].mean())


def smooth(values: np.ndarray) -> np.ndarray:
    """Trailing mean over a twentieth of the points; the window grows from one at the start, so no point is invented."""
    width = max(1, round(WINDOW * values.size))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, values.size + 1)
    start = np.maximum(0, stop - width)
    return (sums[stop] - sums[start]) / (stop - start)


@dataclass(frozen=True)
class Band:
    """Mean, lowest and highest value over the runs that have reached a step. All arrays have one length."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def band(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> Band:
    """Join (steps, values) curves on the union of their steps, linear in between, never beyond a curve's ends."""
    grid = np.unique(np.concatenate([steps for steps, _ in curves]))
    table = np.stack([np.interp(grid, steps, values, left=np.nan, right=np.nan) for steps, values in curves])
    reached = np.isfinite(table).any(axis=0)
    grid, table = grid[reached], table[:, reached]
    return Band(grid, np.nanmean(table, axis=0), np.nanmin(table, axis=0), np.nanmax(table, axis=0))
