"""Means over prompts with bootstrap intervals, paired differences, and distances of feature statistics.

Shape suffixes: P prompts, R resamples, N and M images, F features.
"""

from dataclasses import dataclass

import numpy as np

from switti.errors import UserError

RESAMPLES, LEVEL, SEED = 2000, 0.95, 0
# Indices that are drawn at a time.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its interval; low and high are None with fewer than two prompts."""

    value: float
    low: float | None
    high: float | None
    count: int


def mean_over_prompts(values_P: np.ndarray) -> Estimate:
    """Mean with the 95 % percentile interval of a bootstrap over prompts, by a fixed seed."""
    count = len(values_P)
    if count == 0 or not np.isfinite(values_P).all():
        raise UserError("a score is not finite; nothing can be averaged")
    mean = float(values_P.mean())
    if count < 2:
        return Estimate(mean, None, None, count)
    means_R = _resampled_means(values_P)
    low, high = np.quantile(means_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high), count)


def _resampled_means(values_P: np.ndarray) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(SEED))
    rows = max(1, _CHUNK // len(values_P))
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, rows):
        stop = min(start + rows, RESAMPLES)
        drawn = generator.integers(0, len(values_P), (stop - start, len(values_P)), dtype=np.int32)
        means[start:stop] = values_P[drawn].mean(axis=1)
    return means


def paired_difference(first_P: np.ndarray, second_P: np.ndarray) -> Estimate:
    """second − first on the same prompts, with the interval of the difference."""
    return mean_over_prompts(second_P - first_P)


# ---- distances --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean [F] and covariance [F, F] (divisor count − 1) in float64, and the number of images behind them."""

    mean_F: np.ndarray
    covariance_FF: np.ndarray
    count: int | None


def statistics_of(features_NF: np.ndarray) -> FeatureStatistics:
    """Raises UserError for fewer than two images."""
    if len(features_NF) < 2:
        raise UserError(f"a covariance needs two images, not {len(features_NF)}")
    mean = features_NF.mean(axis=0, dtype=np.float64)
    total = np.zeros((features_NF.shape[1],) * 2)
    for start in range(0, len(features_NF), 4096):
        centred = features_NF[start : start + 4096].astype(np.float64) - mean
        total += centred.T @ centred
    return FeatureStatistics(mean, total / (len(features_NF) - 1), len(features_NF))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½), in float64.

    The trace of the root is the sum of the roots of the eigenvalues of Σa^½ Σb Σa^½, a symmetric matrix, which is also
    defined where the product has no real root.
    """
    values, vectors = np.linalg.eigh(a.covariance_FF)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    crossed = np.linalg.eigvalsh(root @ b.covariance_FF @ root)
    distance = float(((a.mean_F - b.mean_F) ** 2).sum())
    traces = float(np.trace(a.covariance_FF) + np.trace(b.covariance_FF))
    return distance + traces - 2 * float(np.sqrt(crossed.clip(min=0)).sum())
