"""The report's statistics against closed forms and SciPy."""

import numpy as np
import pytest
from scipy import stats

from reports.data.statistics import band, paired_bootstrap, smooth, spread, tail_mean


def test_two_pairs_span_the_two_differences() -> None:
    # Resampled means are a, (a + b) / 2, b with probabilities ¼, ½, ¼: the 2.5 % quantiles are a and b themselves.
    paired = paired_bootstrap([0.5, -0.25])
    assert (paired.low, paired.mean, paired.high) == (-0.25, 0.125, 0.5)
    assert paired.differences == (0.5, -0.25)
    assert not paired.one_sided and not paired.firm


def test_one_pair_has_no_interval() -> None:
    paired = paired_bootstrap([0.3])
    assert (paired.count, paired.mean, paired.low, paired.high) == (1, 0.3, None, None)
    assert paired.one_sided and not paired.firm


@pytest.mark.parametrize("bad", [[], [0.1, np.nan], [np.inf]])
def test_unusable_differences(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        paired_bootstrap(bad)


def test_agrees_with_scipy_percentile_bootstrap() -> None:
    values = np.random.default_rng(3).normal(0.4, 1.0, 25)
    ours = paired_bootstrap(values)
    other = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(8)
    )
    interval = other.confidence_interval
    # Two independent draws of 10 000: the quantiles' Monte Carlo error is about 1 % of the standard error's scale.
    tolerance = 0.08 * values.std(ddof=1) / 5
    assert ours.low == pytest.approx(interval.low, abs=tolerance)
    assert ours.high == pytest.approx(interval.high, abs=tolerance)


def test_interval_covers_the_known_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        paired = paired_bootstrap(rng.normal(0.7, 1.0, 30), resamples=1000)
        covered += paired.low <= 0.7 <= paired.high
    assert (
        180 <= covered <= 199
    )  # 95 % nominal, about 93 % for a percentile interval of 30; ± 3 standard errors


def test_order_does_not_matter_and_shift_and_scale_go_through() -> None:
    values = [0.1, 0.4, 0.2, 0.9, 0.35, 0.3]
    a, b = paired_bootstrap(values), paired_bootstrap(values[::-1])
    assert (a.low, a.high) == (b.low, b.high)
    moved = paired_bootstrap([2 * v + 1 for v in values])
    assert (moved.low, moved.high) == pytest.approx((2 * a.low + 1, 2 * a.high + 1))


def test_firm_needs_six_agreeing_pairs() -> None:
    # Two-sided sign test: 2 · 0.5⁵ = 6.25 %, 2 · 0.5⁶ = 3.1 %.
    assert not paired_bootstrap([1.0, 1.1, 0.9, 1.2, 1.0]).firm
    assert paired_bootstrap([1.0, 1.1, 0.9, 1.2, 1.0, 1.05]).firm
    assert paired_bootstrap([1.0] * 6).chance == 2 * 0.5**6
    assert not paired_bootstrap([1.0, -1.1, 0.9, -1.2, 1.0, -1.05]).firm


def test_spread_is_the_sample_deviation() -> None:
    assert spread([1.0, 3.0]).deviation == pytest.approx(np.sqrt(2))
    assert spread([4.0]).deviation is None


def test_tail_mean_takes_the_last_tenth_and_at_least_one() -> None:
    assert tail_mean(np.arange(40.0)) == np.mean([36, 37, 38, 39])
    assert tail_mean(np.array([5.0, 7.0])) == 7.0


def test_smooth_is_a_trailing_mean() -> None:
    values = np.random.default_rng(1).normal(size=60)  # window: 3
    expected = [values[max(0, i - 2) : i + 1].mean() for i in range(60)]
    np.testing.assert_allclose(smooth(values), expected, atol=1e-12)


def test_band_interpolates_and_never_goes_beyond_a_curve() -> None:
    a = (np.array([0, 10, 20]), np.array([0.0, 10.0, 20.0]))
    b = (np.array([0, 5, 10]), np.array([2.0, 7.0, 12.0]))
    joined = band([a, b])
    assert joined.steps.tolist() == [0, 5, 10, 20]
    assert joined.mean.tolist() == [1.0, 6.0, 11.0, 20.0]  # at 20 only a is left
    assert joined.low.tolist() == [0.0, 5.0, 10.0, 20.0]
    assert joined.high.tolist() == [2.0, 7.0, 12.0, 20.0]
