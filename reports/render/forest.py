"""Forest plot: the paired differences of all headline metrics in one panel, in percent of the reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from reports.data.comparison import Comparison, Row
from reports.data.differences import Difference
from reports.data.metric_catalogue import EARLY, is_cost
from reports.data.study import Study
from reports.render import plots
from reports.render.document import Figure, Panel
from reports.render.figures import legend
from reports.render.formatting import number

# Inches: on a phone the first images follow on the same two screens.
_TALLEST = 4.6
# Characters of a line beside the axis.
_LABEL = 21
# Percent.
_LARGEST = 1e6
# Multiple of the typical difference from which the axis is compressed.
_WIDE = 8.0
# Inches: of the axis, and of a row for one variant.
_HEIGHT, _ROW = 0.75, 0.30


@dataclass(frozen=True)
class Dot:
    """One difference in percent of the reference's mean, turned so that more is better. Ends: None for one pair."""

    variant: int
    mean: float
    low: float | None
    high: float | None
    firm: bool

    @property
    def ends(self) -> list[float]:
        return [end for end in (self.low, self.mean, self.high) if end is not None]


@dataclass(frozen=True)
class Line:
    """A metric with a dot for each variant that was compared."""

    label: str
    dots: tuple[Dot, ...]


def forest_figure(comparison: Comparison) -> Figure | None:
    """One dot and interval a metric and variant; None where nothing can be drawn."""
    study, rows, undrawn = comparison.study, list[Line](), list[str]()
    for name in _names(comparison) if len(study.variants) > 1 else ():
        row = comparison.rows[name]
        compared = [(i, d) for i, d in enumerate(row.differences, 1) if d.paired]
        dots = tuple(dot for i, d in compared if (dot := _dot(i, d)))
        if dots:
            rows.append(Line(_label(row), dots))
        elif compared:
            undrawn.append(row.metric.title)
    if not rows:
        return None
    compressed = _is_wide(rows)
    reference, variants = study.variants[0].label, study.variants[1:]
    caption = f"Paired differences from {reference} in percent of its mean, turned so that better is right"
    if any(dot.low is not None for row in rows for dot in row.dots):
        caption += ", with 95 % intervals. Filled: the interval excludes 0 and at least six pairs agree; "
        caption += "hollow: anything less."
    else:
        caption += "; of one pair, hence without intervals."
    caption += " The axis is compressed away from 0." if compressed else ""
    caption += (
        f" Not drawn, for {reference} has no positive mean to compare with: {', '.join(undrawn)}."
        if undrawn
        else ""
    )
    height = _HEIGHT + len(rows) * _row_height(study)
    draw = partial(_draw, rows=rows, compressed=compressed, count=len(variants))
    panel = Panel(
        "forest", f"difference from {reference}, %: worse ← 0 → better", _alt(rows, study), draw, height
    )
    return Figure("forest", caption, (panel,), legend(variants) if len(variants) > 1 else ())


def _names(comparison: Comparison) -> list[str]:
    """Headline metrics and what else was evaluated, cost last; only what has a better and a worse side."""
    headlines = comparison.headline_names
    names = [
        *headlines,
        *(n for n in comparison.main_names if n.startswith("evaluation/") and n not in headlines),
    ]
    judged = [n for n in names if comparison.rows[n].metric.better and EARLY not in n]
    return sorted(judged[: max(2, int((_TALLEST - _HEIGHT) / _row_height(comparison.study)))], key=is_cost)


def _row_height(study: Study) -> float:
    """Inches; two lines of a label fit in."""
    return max(0.36, _ROW * (0.6 + 0.4 * (len(study.variants) - 1)))


def _dot(number_of: int, d: Difference) -> Dot | None:
    """None where a share of the reference means nothing."""
    assert d.paired is not None
    if not d.reference_mean or d.reference_mean <= 0:
        return None
    scale = (100 if d.metric.better == "higher" else -100) / d.reference_mean
    mean = scale * d.paired.mean
    if not abs(mean) < _LARGEST:
        return None
    if d.paired.low is None or d.paired.high is None:
        return Dot(number_of, mean, None, None, False)
    low, high = sorted((scale * d.paired.low, scale * d.paired.high))
    return Dot(number_of, mean, low, high, d.paired.firm)


def _label(row: Row) -> str:
    few = f", {row.few_images} images" if row.few_images else ""
    return fill(row.metric.title + few, _LABEL)


def _is_wide(rows: Sequence[Line]) -> bool:
    """Whether on a linear axis most differences would lie on top of 0."""
    sizes = [max(map(abs, dot.ends)) for row in rows for dot in row.dots]
    typical = float(np.median([size for size in sizes if size] or [0.0]))
    return max(sizes) > _WIDE * typical


def _alt(rows: Sequence[Line], study: Study) -> str:
    parts = []
    for row in rows:
        for dot in row.dots:
            who = f" of {study.variants[dot.variant].label}" if len(study.variants) > 2 else ""
            ends = "" if dot.low is None else f" ({number(dot.low, 2)} to {number(dot.high, 2)})"
            size = (
                f"{number(abs(dot.mean), 2)} % {'better' if dot.mean > 0 else 'worse'}"
                if dot.mean
                else "equal"
            )
            parts.append(f"{' '.join(row.label.split())}{who} {size}{ends}")
    return f"Differences in percent, better is right: {'; '.join(parts)}."


def _draw(axes: Axes, rows: Sequence[Line], compressed: bool, count: int) -> None:
    for place, row in enumerate(rows):
        for dot in row.dots:
            y = place + (dot.variant - (count + 1) / 2) * 0.6 / max(count, 1)
            paint = plots.colour(dot.variant)
            if dot.low is not None and dot.high is not None:
                axes.plot([dot.low, dot.high], [y, y], color=paint, linewidth=1.5, solid_capstyle="butt")
            face = paint if dot.firm else "none"
            axes.plot([dot.mean], [y], "o", color=paint, markerfacecolor=face, markersize=5.0)
    axes.axvline(0, color=plots.INK, linewidth=0.8)
    most = max(1.15 * max(abs(end) for row in rows for dot in row.dots for end in dot.ends), 1e-6)
    if compressed:
        axes.set_xscale("asinh", linear_width=1.0)
        decades = [10.0**k for k in range(0, 7, 1 if most < 2e3 else 2) if 10.0**k <= most]
        axes.xaxis.set_major_locator(FixedLocator([-d for d in reversed(decades)] + [0.0] + decades))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+g}".replace("-", "−") if x else "0"))
    axes.set_xlim(-most, most)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
