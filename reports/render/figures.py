"""Which curves are drawn: each function gives a Figure for the page, or None where nothing was logged."""

import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from reports.data.comparability import scale_sides
from reports.data.comparison import Comparison
from reports.data.final_values import metric_names, scale_numbers
from reports.data.metric_catalogue import describe, is_cost, is_detail, split_of
from reports.data.runs import Run
from reports.data.statistics import WINDOW, band, smooth
from reports.data.study import Study, Variant
from reports.render import plots
from reports.render.document import Figure, Legend, Panel
from reports.render.formatting import number, percent, plus_minus

BAND_NOTE = "Lines are means over seeds, bands the lowest and highest run, of the runs that reached a step."
# More in one figure nobody looks at.
_PANELS = 48
_SMOOTHED = {"train/loss", "train/gradient_norm"}
_BLOCK = re.compile(r"norms/block_(\d+)/(mean|max)")


def _curves(variant: Variant, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    curves = []
    for run in variant.runs:
        if name in run.series:
            series = run.series[name]
            finite = np.abs(series.values) < plots.LARGEST
            if finite.any():
                curves.append((series.steps[finite], series.values[finite]))
    return curves


def _has(variants: Sequence[Variant], name: str) -> bool:
    return any(_curves(variant, name) for variant in variants)


def _alt(comparison: Comparison, variants: Sequence[Variant], name: str) -> str:
    ends = [f"{variant.label} ends at {plus_minus(comparison.spread(variant, name))}" for variant in variants]
    return f"{describe(name).title} over steps; " + ", ".join(ends) + "."


def _draw_curves(axes: Axes, variants: Sequence[Variant], name: str, log: bool = False) -> None:
    for variant in variants:
        if not (curves := _curves(variant, name)):
            continue
        if name in _SMOOTHED:
            for steps, values in curves:
                plots.draw_faint(axes, steps, values, variant.number)
            curves = [(steps, smooth(values)) for steps, values in curves]
        plots.draw_band(axes, band(curves), variant.number)
    plots.step_axis(axes)
    if log:
        plots.log_axis(axes)


def curve_panel(comparison: Comparison, variants: Sequence[Variant], name: str, log: bool = False) -> Panel:
    row = comparison.rows[name]
    draw = partial(_draw_curves, variants=variants, name=name, log=log)
    title = f"{row.metric.title}, of the data" if row.of_data else row.metric.heading
    return Panel(name, title, _alt(comparison, variants, name), draw)


def legend(variants: Sequence[Variant]) -> Legend:
    return tuple((variant.label, variant.number) for variant in variants)


def curves_figure(
    comparison: Comparison,
    variants: Sequence[Variant],
    key: str,
    names: Sequence[str],
    caption: str = "",
) -> Figure | None:
    """One panel for each name that was logged."""
    logged = [name for name in names if _has(variants, name)]
    panels = tuple(curve_panel(comparison, variants, name) for name in logged[:_PANELS])
    if not panels:
        return None
    if len(logged) > _PANELS:
        caption = (
            f"{caption} The first {_PANELS} of {len(logged)}; rows.csv has the final values of all.".strip()
        )
    smoothed = [name for name in names if name in _SMOOTHED and _has(variants, name)]
    smoothing = (
        f" Smoothed by a trailing mean over {percent(WINDOW)} of the points, raw values faint."
        if smoothed
        else ""
    )
    return Figure(key, f"{caption} {BAND_NOTE}{smoothing}".strip(), panels, legend(variants))


def by_scale_figure(
    comparison: Comparison, variants: Sequence[Variant], key: str, kind: str
) -> Figure | None:
    """Small multiples over scales of `validation/<kind>_by_scale`; losses with the unigram entropy as a dashed line."""
    part = "validation" if _has(variants, f"validation/{kind}_by_scale/0") else "train"
    sides = scale_sides(variants[0].runs[0])
    panels = []
    for k in scale_numbers(variants, f"{part}/{kind}_by_scale")[:_PANELS]:
        name = f"{part}/{kind}_by_scale/{k}"
        level = comparison.unigram_entropy(variants, k) if kind == "loss" else None
        title = f"scale {k}" + (f", {sides[k]}×{sides[k]}" if k < len(sides) else "")
        alt = _alt(comparison, variants, name) + (
            f" Unigram entropy {number(level)}." if level is not None else ""
        )
        panels.append(
            Panel(name, title, alt, partial(_draw_scale, variants=variants, name=name, level=level))
        )
    if not panels:
        return None
    dashed: Legend = (("unigram entropy of the scale", "dashed"),) if kind == "loss" else ()
    subject = f"{part.capitalize()} {kind.replace('_', ' ')} of each scale over steps"
    caption = f"{subject}; every panel has its own vertical axis. {BAND_NOTE}"
    return Figure(key, caption, tuple(panels), legend(variants) + dashed, small=True)


def _draw_scale(axes: Axes, variants: Sequence[Variant], name: str, level: float | None) -> None:
    _draw_curves(axes, variants, name)
    axes.set_xlabel("")
    if level is not None and abs(level) < plots.LARGEST:
        plots.draw_level(axes, level)


def scale_kinds(variants: Sequence[Variant]) -> list[str]:
    """What was logged by scale, losses first; the unigram entropy only where no loss takes it as its level."""
    runs = tuple(run for variant in variants for run in variant.runs)
    names = [name for name in metric_names(runs) if not split_of(name)]
    kinds = {name.partition("/")[2].partition("_by_scale/")[0] for name in names if "_by_scale/" in name}
    if "loss" in kinds:
        kinds.discard("unigram_entropy")
    return sorted(kinds, key=lambda kind: (kind not in ("loss", "accuracy"), kind != "loss", kind))


def norms_figure(comparison: Comparison) -> Figure | None:
    """Figure 3 of the paper: the last block's activation norms over steps, and every block's at the end."""
    variants = comparison.study.variants
    panels = [
        curve_panel(comparison, variants, name, log=True)
        for name in ("norms/last/mean", "norms/last/max")
        if _has(variants, name)
    ]
    for kind in ("mean", "max"):
        if any(_profile(variant, kind) for variant in variants):
            alt = f"{kind} activation norm of each block at the end of training, one line a variant."
            draw = partial(_draw_profile, variants=variants, kind=kind)
            panels.append(Panel(f"norms/profile/{kind}", f"{kind} norm of each block, at the end", alt, draw))
    if not panels:
        return None
    caption = f"Activation norms, logarithmic (Figure 3 of the paper). {BAND_NOTE}"
    return Figure("norms", caption, tuple(panels), legend(variants))


def _profile(variant: Variant, kind: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(block numbers, final norms) of each run."""
    profiles = []
    for run in variant.runs:
        points = {
            int(match[1]): name
            for name in run.series
            if (match := _BLOCK.fullmatch(name)) and match[2] == kind
        }
        values = np.array([run.series[points[block]].values[-1] for block in sorted(points)])
        blocks = np.array(sorted(points))
        if (finite := np.abs(values) < plots.LARGEST).any():
            profiles.append((blocks[finite], values[finite]))
    return profiles


def _draw_profile(axes: Axes, variants: Sequence[Variant], kind: str) -> None:
    for variant in variants:
        if profiles := _profile(variant, kind):
            plots.draw_band(axes, band(profiles), variant.number)
    axes.set_xlabel("block")
    plots.log_axis(axes)


def sampling_figure(study: Study) -> Figure | None:
    """Seconds of sampling at each scale, as bars, one group a scale."""
    measured = [
        (variant, times) for variant in study.variants if (times := _scale_seconds(variant.runs)) is not None
    ]
    if not measured:
        return None
    total = ", ".join(f"{variant.label} {number(times.sum(), 3)} s in all" for variant, times in measured)
    sides = scale_sides(study.runs[0])
    draw: Callable[[Axes], None] = partial(_draw_bars, measured=measured, sides=sides)
    panel = Panel(
        "sampling/by_scale", "seconds of sampling at each scale", f"Bars of sampling time: {total}.", draw
    )
    caption = "Sampling time at each scale for one batch, mean over seeds."
    return Figure("sampling_time", caption, (panel,), legend(study.variants))


def _scale_seconds(runs: tuple[Run, ...]) -> np.ndarray | None:
    """Mean seconds of each scale over the runs that have been evaluated with as many scales as the first."""
    times = [
        run.evaluation.sampling.seconds_per_scale
        for run in runs
        if run.evaluation and run.evaluation.sampling
    ]
    times = [row for row in times if row and len(row) == len(times[0])]
    return np.mean(times, axis=0) if times else None


def _draw_bars(axes: Axes, measured: Sequence[tuple[Variant, np.ndarray]], sides: list[int]) -> None:
    width = 0.8 / len(measured)
    count = max(len(times) for _, times in measured)
    for i, (variant, times) in enumerate(measured):
        places = np.arange(len(times)) + (i - (len(measured) - 1) / 2) * width
        axes.bar(places, times, width, color=plots.colour(variant.number))
    axes.set_xticks(range(count), [f"{sides[k]}²" if k < len(sides) else str(k) for k in range(count)])
    axes.set_xlabel("scale, tokens")
    axes.set_ylabel("seconds")
    axes.grid(axis="x", visible=False)


def other_names(comparison: Comparison, drawn: set[str]) -> list[str]:
    """Logged curves that no figure has drawn yet, so that nothing in a run folder is hidden."""
    runs = comparison.study.runs
    return [
        name
        for name in comparison.names
        if name not in drawn
        and not is_detail(name)
        and not is_cost(name)
        and any(name in run.series and run.series[name].steps.size > 1 for run in runs)
    ]
