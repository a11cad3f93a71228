"""Activation norms as in Figure 3: curves and profile on logarithmic axes, and their ratios to the reference."""

import math

import numpy as np

from reports.data.comparison import Comparison
from reports.data.runs import Run
from reports.data.statistics import paired_ratio
from reports.data.study import Study, Variant
from reports.render.document import Section, Table, Text
from reports.render.figures import norms_figure
from reports.render.formatting import DASH, number, ratio_interval

_LAST = "norms/last/"


def norms_section(comparison: Comparison) -> Section:
    """Figure and table of the last block's norms; says how to get them where none were logged."""
    study, section = comparison.study, Section("norms", "Activation norms")
    figure = norms_figure(comparison)
    if figure is None:
        text = "No activation norms: `callbacks.activation_norms_every` above 0 logs them."
        section.blocks.append(Text(text, "missing"))
        return section
    section.blocks.append(figure)
    rows = [
        (
            variant.label,
            *_means(variant),
            _ratio_cell(study, variant, "mean"),
            _ratio_cell(study, variant, "max"),
        )
        for variant in study.variants
    ]
    reference = study.variants[0].label
    header = (
        "variant",
        "mean, end",
        "max, end",
        "max, entire run",
        f"mean / {reference}",
        f"max / {reference}",
    )
    caption = (
        "Euclidean norm of a token behind the last block, geometric means over runs. Ratios at the end of training: "
        "geometric means over pairs with 95 % intervals."
    )
    section.blocks.append(Table(header, tuple(rows), caption, frozenset({0, 4, 5})))
    return section


def _means(variant: Variant) -> list[str]:
    """Mean norm at the end, largest at the end, largest ever: geometric means, for norms span magnitudes."""
    ends = [[_end(run, kind) for run in variant.runs] for kind in ("mean", "max")]
    return [_geometric(values) for values in (*ends, [_largest(run) for run in variant.runs])]


def _geometric(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return number(math.exp(float(np.mean(np.log(known)))), 3) if known else DASH


def _end(run: Run, kind: str) -> float | None:
    """The last norm that was logged, None if there is none that a ratio can be taken of."""
    series = run.series.get(_LAST + kind)
    return _usable(float(series.values[-1])) if series is not None and series.values.size else None


def _largest(run: Run) -> float | None:
    series = run.series.get(_LAST + "max")
    return _usable(float(series.values.max())) if series is not None and series.values.size else None


def _usable(value: float) -> float | None:
    return value if value > 0 and math.isfinite(value) else None


def _ratio_cell(study: Study, variant: Variant, kind: str) -> str:
    if variant.number == 0:
        return "1"
    ends = [(_end(a, kind), _end(b, kind)) for _, a, b in study.pairs(variant) if _comparable(a, b)]
    ratios = [b / a for a, b in ends if a is not None and b is not None]
    if not ratios:
        return "not compared"
    return ratio_interval(paired_ratio(ratios))


def _comparable(a: Run, b: Run) -> bool:
    """Norms are over the width, and taken at one step."""
    steps = [run.series[_LAST + "max"].steps for run in (a, b) if _LAST + "max" in run.series]
    same_end = len(steps) == 2 and steps[0].size > 0 and steps[1].size > 0 and steps[0][-1] == steps[1][-1]
    return bool(same_end) and a.config.get("model.width") == b.config.get("model.width")
