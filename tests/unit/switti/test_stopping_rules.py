"""Early stopping by an objective's dynamics: closed forms, invariances, and histories that decide nothing."""

import math

import numpy as np
import pytest

from switti.objective_dynamics import (
    PatienceRule,
    WindowRule,
    checks_without_gain,
    ema_change,
    hall,
    stop_evaluation,
    trend,
    variance_ratio,
)

DECAY = [0.2 + math.exp(-n / 30) for n in range(300)]


@pytest.mark.parametrize(("window", "threshold"), [(310, 0.15), (180, 0.15), (440, 0.4), (50, 0.15)])
def test_a_straight_line_stops_at_the_closed_form(window: int, threshold: float) -> None:
    """(N² − 1) / (n² − 1) < α, whatever its slope."""
    line = [3.0 - 0.001 * n for n in range(1200)]
    first = math.floor(math.sqrt((window**2 - 1) / threshold + 1)) + 1
    assert variance_ratio(line[:first], window) == pytest.approx((window**2 - 1) / (first**2 - 1), rel=1e-9)
    assert stop_evaluation(WindowRule("dvar", window, threshold), line) == first


def test_the_variance_ratio_is_affine_invariant() -> None:
    moved = [7.0 - 250.0 * value for value in DECAY]
    for count in (20, 21, 50, 300):
        assert variance_ratio(moved[:count], 20) == pytest.approx(variance_ratio(DECAY[:count], 20), rel=1e-9)


def test_the_divisor_of_the_listing_changes_the_ratio_by_a_known_factor() -> None:
    window, count = 20, 90
    factor = window / (window - 1) * (count - 1) / count
    unbiased = variance_ratio(DECAY[:count], window, correction=1)
    assert unbiased == pytest.approx(factor * variance_ratio(DECAY[:count], window), rel=1e-12)


def test_the_earliest_stop_is_one_evaluation_after_the_window_is_full() -> None:
    drop = [100.0, *[1.0 + 0.001 * (n % 2) for n in range(30)]]
    assert variance_ratio(drop[:10], 10) == 1.0
    assert stop_evaluation(WindowRule("dvar", 10, 0.999), drop) == 11


def test_white_noise_around_a_level_never_stops() -> None:
    noise = (1 + 0.1 * np.random.default_rng(0).standard_normal(600)).tolist()
    assert stop_evaluation(WindowRule("dvar", 50, 0.15), noise) is None


@pytest.mark.parametrize("value", [0.0, 0.1, 0.25, 1 / 3, 1e6 + 0.1])
def test_a_constant_never_stops_whatever_its_rounding(value: float) -> None:
    """The variance of 0.1 repeated is 2e-34 in float64, not 0."""
    assert math.isnan(variance_ratio([value] * 60, 10))
    assert stop_evaluation(WindowRule("dvar", 10, 0.999), [value] * 60) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_decides_nothing(value: float) -> None:
    history = [*DECAY[:40], value, *DECAY[40:]]
    assert math.isnan(variance_ratio(history, 20))


def test_the_other_statistics_on_a_line() -> None:
    line = [5.0 - 0.01 * n for n in range(100)]
    assert trend(line, 30) == pytest.approx(-0.01, rel=1e-9)
    assert hall(line, 30) == pytest.approx(0.29 / np.mean(line[-30:]), rel=1e-12)
    # The moving average trails a line by a constant: it falls as fast as the line itself.
    far = [5.0 - 0.01 * n for n in range(400)]
    average = far[-31] + 0.01 * 9
    assert ema_change(far, 30) == pytest.approx(-0.3 / average, rel=1e-9)


@pytest.mark.parametrize("name", ["ema_change", "hall", "trend"])
def test_the_other_rules_stop_once_little_changes_in_either_direction(name: str) -> None:
    rule = WindowRule(name, 10, 1e-3)
    stop = stop_evaluation(rule, DECAY)
    assert stop is not None and 60 < stop < 300
    assert stop_evaluation(rule, [-value for value in DECAY]) == stop
    assert stop_evaluation(rule, DECAY[:9]) is None


def test_small_gains_add_up_and_a_large_one_resets_the_count() -> None:
    assert checks_without_gain([0.5, 0.51, 0.52], 0.05) == 2
    assert checks_without_gain([0.5, 0.51, 0.52, 0.56], 0.05) == 0
    assert checks_without_gain([0.5, 0.6, 0.6, 0.64], 0.05) == 2
    assert checks_without_gain([], 0.05) == 0


def test_patience_counts_checks_beyond_the_first() -> None:
    assert stop_evaluation(PatienceRule(0.02, 6), [0.5] * 20) == 8
    assert stop_evaluation(PatienceRule(0.02, 0), [0.5] * 20) == 2
