"""Paired differences of one metric between a variant and the reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reports.data.comparability import obstacle
from reports.data.final_values import final
from reports.data.metric_catalogue import Metric
from reports.data.runs import Run
from reports.data.statistics import Paired, paired_bootstrap
from reports.data.study import Study, Variant


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


def paired_difference(
    metric: Metric, study: Study, variant: Variant, pairs: Sequence[tuple[Any, Run, Run]]
) -> Difference:
    """Difference over `pairs` as `study.pairs(variant)` gives them; curves at their last common step."""
    name, reasons, kept, steps = metric.name, set[str](), list[tuple[str, float, float]](), set[int]()
    for value, a, b in pairs:
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
    """Last step at which both runs logged the metric; None for numbers that are not curves."""
    if name not in a.series or name not in b.series:
        return None
    common = np.intersect1d(a.series[name].steps, b.series[name].steps)
    return int(common[-1]) if common.size else -1


def _unequal_evaluation(name: str, a: Run, b: Run) -> str | None:
    """Numbers that are not curves compare only when they were taken under the same circumstances."""
    if name == "training/seconds" and a.record.get("step") != b.record.get("step"):
        return "the runs ended at different steps"
    measured = ("evaluation/", "stopped_early/")
    if not name.startswith((*measured, "sampling/")) or not (a.evaluation and b.evaluation):
        return None
    if name.startswith(measured):
        if a.evaluation.step != b.evaluation.step:
            return "evaluated at different steps"
        same = (a.evaluation.images, a.evaluation.captions) == (
            b.evaluation.images,
            b.evaluation.captions,
        )
        return None if same else "evaluated on different captions or numbers of images"
    batches = [run.evaluation.sampling.batch for run in (a, b) if run.evaluation and run.evaluation.sampling]
    return "sampled with different batch sizes" if len(set(batches)) > 1 else None
