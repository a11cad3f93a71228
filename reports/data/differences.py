"""Final numbers of a run, and their paired differences between variants."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from reports.data.metric_catalogue import Metric, describe, is_detail, is_distance
from reports.data.runs import Run, Series
from reports.data.statistics import Paired, Spread, paired_bootstrap, spread, tail_mean
from reports.data.study import Study, Variant, obstacle
from switti.metrics.config import ENOUGH_IMAGES

_REDUCTIONS: dict[str, Callable[[np.ndarray], float]] = {
    "last": lambda values: float(values[-1]),
    "tail": tail_mean,
    "median": lambda values: float(np.median(values)),
    "max": lambda values: float(values.max()),
}


@dataclass(frozen=True)
class Difference:
    """Variant − reference of one metric. `paired` is None when nothing can be paired; `reason` then says why."""

    metric: Metric
    reference: str
    variant: str
    paired: Paired | None
    reason: str
    step: int | None
    pair_values: tuple[str, ...]
    reference_mean: float | None
    variant_mean: float | None


def single_numbers(run: Run) -> dict[str, float]:
    """Numbers that are no curve: the evaluation's metrics, sampling cost, and the record's time and memory."""
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
    """The number that stands for a metric at the run's end (or at step `until`); None if it was not logged."""
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


def scale_numbers(runs: Sequence[Run], stem: str) -> list[int]:
    """Scales k for which any run logged `<stem>/<k>`."""
    pattern = re.compile(re.escape(stem) + r"/([0-9]{1,4})")
    return sorted(
        {int(match[1]) for run in runs for name in run.series if (match := pattern.fullmatch(name))}
    )


def main_names(runs: tuple[Run, ...]) -> list[str]:
    """Names of the main table: results of training, each once.

    Not among them: details by scale and block, cost, what an evaluation has measured again with more care, and what
    is a property of the data.
    """
    names = metric_names(runs)
    return [
        name
        for name in names
        if not (is_detail(name) or is_cost(name) or is_of_data(runs, name) or is_repeated(name, names))
    ]


def is_repeated(name: str, names: Sequence[str]) -> bool:
    """Whether a metric taken during training was also evaluated, or taken on validation data."""
    for online, better in (("metrics/", "evaluation/"), ("train/codebook_use", "validation/codebook_use")):
        if name.startswith(online):
            return f"{better}{name.removeprefix(online)}" in names
    return False


def is_of_data(runs: Sequence[Run], name: str) -> bool:
    """A generator's tokens come from a frozen tokenizer: how many codes they use says nothing of the generator."""
    return "codebook_use" in name and all(run.record.get("task") == "generator" for run in runs)


def few_images(runs: Sequence[Run], name: str) -> int | None:
    """Over how many images a distance was taken, if they are too few for it in any run; None otherwise."""
    if not is_distance(name):
        return None
    if name.startswith("metrics/"):
        counts = [run.config.get("metrics.prompts") for run in runs if name in run.series]
    else:
        counts = [run.evaluation.pictures for run in runs if run.evaluation]
    known = [count for count in counts if isinstance(count, int) and count > 0]
    return min(known) if known and min(known) < ENOUGH_IMAGES else None


def cost_names(runs: tuple[Run, ...]) -> list[str]:
    return [name for name in metric_names(runs) if is_cost(name)]


def is_cost(name: str) -> bool:
    return name.startswith(("time/", "memory/", "training/", "sampling/"))


def summary(variant: Variant, name: str) -> Spread | None:
    """Mean and deviation over the variant's runs that have a finite value."""
    values = [value for run in variant.runs if (value := final(run, name)) is not None and np.isfinite(value)]
    return spread(values) if values else None


def difference(study: Study, variant: Variant, name: str) -> Difference:
    """Paired differences of one metric. Curves of unequal length are compared at their last common step."""
    metric, reasons, kept, steps = describe(name), set[str](), list[tuple[str, float, float]](), set[int]()
    for value, a, b in study.pairs(variant):
        if reason := obstacle(metric, a, b) or _unequal_evaluation(name, a, b):
            reasons.add(reason)
            continue
        until = _common_step(a, b, name)
        x, y = final(a, name, until), final(b, name, until)
        if x is None or y is None or not np.isfinite([x, y, y - x]).all():
            reasons.add("a value is missing or not finite")
            continue
        kept.append((str(value), x, y))
        steps |= {until} if until is not None else set()
    paired = paired_bootstrap([y - x for _, x, y in kept]) if kept else None
    if not kept and not reasons:
        reasons.add(f"no two runs share a value of {study.pair_by}")
    return Difference(
        metric,
        study.variants[0].label,
        variant.label,
        paired,
        "; ".join(sorted(reasons)),
        min(steps) if steps else None,
        tuple(value for value, _, _ in kept),
        float(np.mean([x for _, x, _ in kept])) if kept else None,
        float(np.mean([y for _, _, y in kept])) if kept else None,
    )


def _common_step(a: Run, b: Run, name: str) -> int | None:
    """Last step at which both runs logged the metric; None for numbers that are no curve."""
    if name not in a.series or name not in b.series:
        return None
    common = np.intersect1d(a.series[name].steps, b.series[name].steps)
    return int(common[-1]) if common.size else -1


def _unequal_evaluation(name: str, a: Run, b: Run) -> str | None:
    """Numbers that are no curve compare only when they were taken under the same circumstances."""
    if name == "training/seconds" and a.record.get("step") != b.record.get("step"):
        return "the runs ended at different steps"
    measured = ("evaluation/", "stopped_early/")
    if not name.startswith((*measured, "sampling/")) or not (a.evaluation and b.evaluation):
        return None
    if name.startswith(measured):
        if a.evaluation.step != b.evaluation.step:
            return "evaluated at different steps"
        same = (a.evaluation.pictures, a.evaluation.captions) == (
            b.evaluation.pictures,
            b.evaluation.captions,
        )
        return None if same else "evaluated on different captions or numbers of pictures"
    batches = [run.evaluation.sampling.batch for run in (a, b) if run.evaluation and run.evaluation.sampling]
    return "sampled with different batch sizes" if len(set(batches)) > 1 else None
