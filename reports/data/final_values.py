"""Final value of each metric of a run: the end of a curve, or a number that was measured once."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from reports.data.metric_catalogue import describe, split_of
from reports.data.runs import Run, Series
from reports.data.statistics import tail_mean
from reports.data.study import Variant

_REDUCTIONS: dict[str, Callable[[np.ndarray], float]] = {
    "last": lambda values: float(values[-1]),
    "tail": tail_mean,
    "median": lambda values: float(np.median(values)),
    "max": lambda values: float(values.max()),
}


def single_numbers(run: Run) -> dict[str, float]:
    """Numbers that are not curves: the evaluation's metrics, sampling cost, and the record's time and memory."""
    numbers: dict[str, float | None] = {
        "training/seconds": run.record.get("train_seconds"),
        "training/peak_gib": _scaled(run.record.get("peak_memory_bytes"), 2**30),
    }
    if run.evaluation:
        numbers |= {f"evaluation/{name}": value for name, value in run.evaluation.metrics.items()}
        if sampling := run.evaluation.sampling:
            total = sampling.seconds_total
            numbers["sampling/seconds_total"] = total
            numbers["sampling/seconds_per_picture"] = _scaled(total, sampling.batch)
            numbers["sampling/cache_mib"] = _scaled(sampling.cache_bytes, 2**20)
        numbers |= {f"stopped_early/{n}": v for n, v in run.evaluation.metrics_stopped_early.items()}
        if early := run.evaluation.stopped_early:
            numbers["sampling/seconds_total_stopped_early"] = early.seconds_total
    return {name: float(value) for name, value in numbers.items() if value is not None}


def _scaled(value: float | None, unit: float | None) -> float | None:
    return None if value is None or not unit else value / unit


def final(run: Run, name: str, until: int | None = None) -> float | None:
    """Value of a metric at the run's end (or at step `until`); None if it was not logged."""
    if name not in run.series:
        return single_numbers(run).get(name) if until is None else None
    series = _until(run.series[name], until)
    return _REDUCTIONS[describe(name).reduction](series.values) if series.values.size else None


def _until(series: Series, until: int | None) -> Series:
    if until is None:
        return series
    keep = series.steps <= until
    return Series(series.steps[keep], series.values[keep])


def metric_names(runs: tuple[Run, ...]) -> list[str]:
    """All names that any run has, in the order of the page: losses, evaluated and online metrics, the rest."""
    names = {name for run in runs for name in (*run.series, *single_numbers(run))}
    first = (
        "validation/loss",
        *sorted(name for name in names if split_of(name) and name.endswith("/loss")),
        "train/loss",
        "evaluation/",
        "stopped_early/",
        "metrics/",
        "validation/",
        "train/",
        "norms/",
    )
    return sorted(
        names, key=lambda name: (next((i for i, p in enumerate(first) if name.startswith(p)), 99), name)
    )


def scale_numbers(variants: Sequence[Variant], stem: str) -> list[int]:
    """Scales k for which any run logged `<stem>/<k>`."""
    pattern = re.compile(re.escape(stem) + r"/([0-9]{1,4})")
    return sorted(
        {
            int(match[1])
            for variant in variants
            for run in variant.runs
            for name in run.series
            if (match := pattern.fullmatch(name))
        }
    )
