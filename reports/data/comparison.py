"""All numbers that a report gives of a study, computed once: final values, means over seeds, paired differences."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from reports.data.comparability import loss_groups
from reports.data.differences import Difference, paired_difference
from reports.data.final_values import final, metric_names
from reports.data.metric_catalogue import Metric, describe, is_cost, is_detail, is_distance, is_repeated
from reports.data.runs import Run
from reports.data.statistics import Spread, spread
from reports.data.study import Study, Variant
from switti.metrics.config import ENOUGH_IMAGES

# What a reader asks first: quality of the model, its stability, quality of the images, their fit to the text, cost.
_HEADLINES = (
    ("validation/loss",),
    ("validation/psnr",),
    ("validation/lpips",),
    ("norms/last/mean",),
    ("evaluation/fid", "evaluation/fid_inception", "evaluation/fid_alexnet", "metrics/fid_alexnet"),
    (
        "evaluation/pick_score_v1",
        "evaluation/mini_clip_score",
        "metrics/pick_score_v1",
        "metrics/mini_clip_score",
    ),
    ("evaluation/mini_clip_top1", "metrics/mini_clip_top1"),
    ("time/step_seconds", "time/samples_per_second"),
    ("sampling/seconds_per_picture",),
    ("training/peak_gib", "memory/peak_gib"),
)


@dataclass(frozen=True)
class Row:
    """One metric of a study.

    Attributes:
        spreads: mean and deviation over the runs of each variant that have a finite value; None where none has.
        differences: of each variant after the reference; they say why where nothing could be paired.
        of_data: whether it is a property of the data and the frozen tokenizer, not a result of these runs.
        few_images: over how many images a distance was taken, if they are too few for it in any run.
    """

    metric: Metric
    spreads: tuple[Spread | None, ...]
    differences: tuple[Difference, ...]
    of_data: bool
    few_images: int | None


@dataclass(frozen=True)
class Comparison:
    """What sections, tables, figures and the summary show.

    Attributes:
        rows: metric's name → its row, in the order of the page.
        finals: run folder → metric's name → final value.
        loss_groups: variants whose losses have one scale.
    """

    study: Study
    rows: dict[str, Row]
    finals: dict[Path, dict[str, float]]
    loss_groups: tuple[tuple[Variant, ...], ...]

    def spread(self, variant: Variant, name: str) -> Spread | None:
        """Mean and deviation of a metric over a variant's runs; None if none of them has a finite value."""
        return self.rows[name].spreads[variant.number] if name in self.rows else None

    def spreads(self, variants: Iterable[Variant], name: str) -> list[Spread | None]:
        return [self.spread(variant, name) for variant in variants]

    def difference(self, variant: Variant, name: str) -> Difference:
        """A metric's paired difference of a variant that is not the reference."""
        return self.rows[name].differences[variant.number - 1]

    def final(self, run: Run, name: str) -> float | None:
        return self.finals[run.path].get(name)

    @property
    def names(self) -> list[str]:
        return list(self.rows)

    @cached_property
    def main_names(self) -> list[str]:
        """Names of the main table: results of training, each once.

        Not among them: details by scale and block, cost, what an evaluation has measured again with more care, and what
        is a property of the data.
        """
        return [
            name
            for name, row in self.rows.items()
            if not (is_detail(name) or is_cost(name) or row.of_data or is_repeated(name, self.rows))
        ]

    @property
    def cost_names(self) -> list[str]:
        return [name for name in self.rows if is_cost(name)]

    @property
    def headline_names(self) -> list[str]:
        """Of each headline the first of its metrics that any run has."""
        return [
            name for choices in _HEADLINES if (name := next((c for c in choices if c in self.rows), None))
        ]

    def unigram_entropy(self, variants: Sequence[Variant], scale: int) -> float | None:
        """Unigram entropy of a scale's validation tokens, nats: of the data, hence the mean over all runs."""
        name = f"validation/unigram_entropy_by_scale/{scale}"
        means = [found.mean for found in self.spreads(variants, name) if found]
        return float(np.mean(means)) if means else None


def compare_variants(study: Study) -> Comparison:
    """Compute everything that the report of a study says in numbers."""
    names = metric_names(study.runs)
    finals = {
        run.path: {name: value for name in names if (value := final(run, name)) is not None}
        for run in study.runs
    }
    pairs = [study.pairs(variant) for variant in study.variants[1:]]
    rows = {}
    for name in names:
        metric = describe(name)
        spreads = tuple(_spread([finals[run.path].get(name) for run in v.runs]) for v in study.variants)
        differences = tuple(
            paired_difference(metric, study, variant, own)
            for variant, own in zip(study.variants[1:], pairs, strict=True)
        )
        rows[name] = Row(
            metric, spreads, differences, _is_of_data(study.runs, name), _few_images(study.runs, name)
        )
    return Comparison(study, rows, finals, tuple(loss_groups(study)))


def _spread(values: Iterable[float | None]) -> Spread | None:
    finite = [value for value in values if value is not None and np.isfinite(value)]
    return spread(finite) if finite else None


def _is_of_data(runs: Sequence[Run], name: str) -> bool:
    """A generator's tokens come from a frozen tokenizer: how many codes they use says nothing of the generator."""
    return "codebook_use" in name and all(run.record.get("task") == "generator" for run in runs)


def _few_images(runs: Sequence[Run], name: str) -> int | None:
    if not is_distance(name):
        return None
    if name.startswith("metrics/"):
        counts = [run.config.get("metrics.prompts") for run in runs if name in run.series]
    else:
        counts = [run.evaluation.images for run in runs if run.evaluation]
    known = [count for count in counts if isinstance(count, int) and count > 0]
    return min(known) if known and min(known) < ENOUGH_IMAGES else None
