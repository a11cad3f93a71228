"""Golden stops and statistics of early stopping: DVAR, CLIP-s and the other rules on stored histories."""

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.parity.common import Check, Golden, Settings
from switti.objective_dynamics import (
    WINDOW_STATISTICS,
    PatienceRule,
    StoppingRule,
    WindowRule,
    stop_evaluation,
    variance_ratio,
)

# Relative; the slope of an almost level line is a difference of larger numbers.
RATIO_TOLERANCE = 1e-12
OTHER_TOLERANCE = 1e-9


class _Unbiased(WindowRule):
    """DVAR as the paper lists it: divisor count − 1, and no decision before the window is full."""

    def statistic(self, history: Sequence[float]) -> float:
        return variance_ratio(history, self.window, correction=1)


def check_cases(golden: Golden) -> None:
    """Stops, variance ratios and margins of DVAR."""
    histories = {name: _history(values) for name, values in golden.meta["histories"].items()}
    for case in golden.meta["cases"]:
        name, window, threshold = case["history"], case["window"], case["threshold"]
        history = histories[name]
        label = f"{name}.{window}.{threshold}"
        rule = WindowRule("dvar", window, threshold)
        stop = stop_evaluation(rule, history)
        _stop(golden, case, "stop_evaluation", label, stop)
        unbiased = _Unbiased("dvar", window, threshold)
        _stop(golden, case, "stop_evaluation_unbiased", label, stop_evaluation(unbiased, history))
        for every, updates in (golden.wanted(case, "updates_done") or {}).items():
            # The authors evaluate between the backward pass and the update, which is still done.
            done = None if stop is None else (stop - 1) * int(every) + 1
            golden.add(_equal(f"updates_done.{label}.{every}", done, updates))
        for evaluation, ratio in (golden.wanted(case, "ratio_at") or {}).items():
            actual = rule.statistic(history[: int(evaluation)])
            golden.add(_close(f"ratio.{label}.{evaluation}", actual, ratio, RATIO_TOLERANCE))
        if "margin" in case:
            margin = _margin(rule, history, stop)
            golden.add(_close(f"margin.{label}", margin, case["margin"], OTHER_TOLERANCE))


def check_clip(golden: Golden) -> None:
    """Stops of CLIP-s."""
    for case in golden.meta["clip"]:
        label = f"{case['name']}.{case['eps']}.{case['patience']}"
        rule = PatienceRule(case["eps"], case["patience"])
        _stop(
            golden, case, "stop_evaluation", f"clip.{label}", stop_evaluation(rule, _history(case["scores"]))
        )


def check_other_criteria(golden: Golden) -> None:
    """EMA change, Hall and Trend on one history."""
    settings = golden.meta["other_criteria"]
    history, window = _history(golden.meta["histories"][settings["history"]]), settings["n"]
    for evaluation, statistics in settings["at"].items():
        for name, expected in statistics.items():
            actual = WINDOW_STATISTICS[name](history[: int(evaluation)], window)
            golden.add(_close(f"{name}.{evaluation}", actual, expected, OTHER_TOLERANCE))


def _history(values: list[Any]) -> list[float]:
    """null is NaN; infinities are texts."""
    return [math.nan if value is None else float(value) for value in values]


def _margin(rule: StoppingRule, history: Sequence[float], stop: int | None) -> float:
    """Smallest distance of a ratio from the threshold, from the first full window to the stop."""
    assert isinstance(rule, WindowRule)
    last = len(history) if stop is None else stop
    ratios = [rule.statistic(history[:count]) for count in range(rule.window, last + 1)]
    return min((abs(ratio - rule.threshold) for ratio in ratios if not math.isnan(ratio)), default=math.nan)


def _stop(golden: Golden, case: Settings, key: str, label: str, actual: int | None) -> None:
    if key not in case:
        golden.leave_out(golden.meta.file, case.name(key))
    else:
        golden.add(_equal(f"{key}.{label}", actual, case[key]))


def _equal(quantity: str, actual: int | None, expected: int | None) -> Check:
    """Of numbers of evaluations or updates; None: never."""
    if actual == expected:
        return Check(quantity, 0.0, 0.0, exact=True)
    return Check(quantity, math.inf, 0.0, exact=True, reason=f"is {expected} in the folder, {actual} here")


def _close(quantity: str, actual: float, expected: float | None, tolerance: float) -> Check:
    """Relative deviation; where either is NaN, which is null in the folder, both must be."""
    if expected is None or math.isnan(actual):
        both = expected is None and math.isnan(actual)
        reason = f"is {expected} in the folder, {actual} here"
        return Check(quantity, 0.0 if both else math.inf, tolerance, reason=reason)
    return Check(quantity, abs(actual - expected) / (abs(expected) or 1.0), tolerance)
