"""rows.csv and paired.csv: the report's numbers for a machine, unrounded."""

from typing import Any

from reports.data.comparison import Comparison
from reports.data.study import RECORD_COLUMNS, differing, show

PAIRED_COLUMNS = (
    "metric",
    "better",
    "reference",
    "variant",
    "pairs",
    "reference_mean",
    "variant_mean",
    "mean_difference",
    "low",
    "high",
    "step",
    "differences",
    "not_compared",
)


def rows(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    """Header and one row a run: place, variant, pairing value, record, settings that differ, final metrics."""
    study, names = comparison.study, comparison.names
    settings = [key for key in differing(study.runs) if key != study.pair_by]
    header = ["run", "variant", study.pair_by, *RECORD_COLUMNS, *settings, *names]
    table = []
    for run in study.runs:
        row: list[Any] = [run.path.as_posix(), study.variant_of(run).label, run.setting(study.pair_by)]
        row += [run.record.get(key) for key in RECORD_COLUMNS]
        row += [show(run.config[key]) if key in run.config else None for key in settings]
        table.append([*row, *(comparison.final(run, name) for name in names)])
    return header, table


def paired_rows(comparison: Comparison) -> list[list[Any]]:
    """One row for each metric and each variant against the reference; `low` and `high` are empty for one pair."""
    table: list[list[Any]] = []
    for variant in comparison.study.variants[1:]:
        for name in comparison.names:
            d = comparison.difference(variant, name)
            paired = d.paired
            each = zip(d.pair_values, paired.differences if paired else (), strict=True)
            numbers = [paired.mean, paired.low, paired.high] if paired else [None, None, None]
            means = [d.reference_mean, d.variant_mean]
            text = "; ".join(f"{value}: {gap!r}" for value, gap in each)
            count = paired.count if paired else 0
            row = [
                name,
                d.metric.better,
                d.reference,
                d.variant,
                count,
                *means,
                *numbers,
                d.step,
                text,
                d.reason,
            ]
            table.append(row)
    return table
