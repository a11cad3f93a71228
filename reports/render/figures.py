"""Which curves are drawn: each function gives a Figure for the page, or None where nothing was logged."""

import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from reports.data.differences import is_cost, is_of_data, metric_names, scale_numbers, summary
from reports.data.metric_catalogue import describe, is_detail
from reports.data.runs import Run
from reports.data.statistics import WINDOW, band, smooth
from reports.data.study import Study, Variant, scale_sides
from reports.render import plots
from reports.render.document import Figure, Legend, Panel
from reports.render.formatting import number, percent, plus_minus

BAND_NOTE = (
    "Lines are means over seeds, bands reach from the lowest to the highest run, of those that got so far."
)
_PANELS = 48  # more in one figure nobody looks at
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


def _alt(variants: Sequence[Variant], name: str) -> str:
    ends = [f"{variant.label} ends at {plus_minus(summary(variant, name))}" for variant in variants]
    return f"{describe(name).title} over steps; " + ", ".join(ends) + "."


def _draw_curves(axes: Axes, study: Study, variants: Sequence[Variant], name: str, log: bool = False) -> None:
    for variant in variants:
        if not (curves := _curves(variant, name)):
            continue
        colour = study.variants.index(variant)
        if name in _SMOOTHED:
            for steps, values in curves:
                plots.draw_faint(axes, steps, values, colour)
            curves = [(steps, smooth(values)) for steps, values in curves]
        plots.draw_band(axes, band(curves), colour)
    plots.step_axis(axes)
    if log:
        plots.log_axis(axes)


def curve_panel(
    study: Study, variants: Sequence[Variant], name: str, log: bool = False, title: str = ""
) -> Panel:
    metric = describe(name)
    draw = partial(_draw_curves, study=study, variants=variants, name=name, log=log)
    heading = f"{metric.title}, of the data" if is_of_data(study.runs, name) else metric.heading
    return Panel(name, title or heading, _alt(variants, name), draw)


def legend(study: Study, variants: Sequence[Variant]) -> Legend:
    return tuple((variant.label, study.variants.index(variant)) for variant in variants)


def curves_figure(
    study: Study,
    variants: Sequence[Variant],
    key: str,
    names: Sequence[str],
    caption: str = "",
    log: bool = False,
) -> Figure | None:
    """One panel for each name that was logged."""
    logged = [name for name in names if _has(variants, name)]
    panels = tuple(curve_panel(study, variants, name, log) for name in logged[:_PANELS])
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
    return Figure(key, f"{caption} {BAND_NOTE}{smoothing}".strip(), panels, legend(study, variants))


def by_scale_figure(study: Study, variants: Sequence[Variant], key: str, kind: str) -> Figure | None:
    """Small multiples over scales of `validation/<kind>_by_scale`; losses with the unigram entropy as a dashed line."""
    part = "validation" if _has(variants, f"validation/{kind}_by_scale/0") else "train"
    sides = scale_sides(variants[0].runs[0])
    panels = []
    for k in scales(variants, f"{part}/{kind}_by_scale")[:_PANELS]:
        name = f"{part}/{kind}_by_scale/{k}"
        level = entropy(variants, k) if kind == "loss" else None
        title = f"scale {k}" + (f", {sides[k]}×{sides[k]}" if k < len(sides) else "")
        alt = _alt(variants, name) + (f" Unigram entropy {number(level)}." if level is not None else "")
        panels.append(
            Panel(
                name, title, alt, partial(_draw_scale, study=study, variants=variants, name=name, level=level)
            )
        )
    if not panels:
        return None
    dashed: Legend = (("unigram entropy of the scale", "dashed"),) if kind == "loss" else ()
    subject = f"{part.capitalize()} {kind.replace('_', ' ')} of each scale over steps"
    caption = f"{subject}; every panel has its own vertical axis. {BAND_NOTE}"
    return Figure(key, caption, tuple(panels), legend(study, variants) + dashed, small=True)


def _draw_scale(
    axes: Axes, study: Study, variants: Sequence[Variant], name: str, level: float | None
) -> None:
    _draw_curves(axes, study, variants, name)
    axes.set_xlabel("")
    if level is not None and abs(level) < plots.LARGEST:
        plots.draw_level(axes, level)


def scale_kinds(variants: Sequence[Variant]) -> list[str]:
    """What was logged by scale, losses first; the unigram entropy only where no loss takes it as its level."""
    names = metric_names(tuple(run for variant in variants for run in variant.runs))
    kinds = {name.partition("/")[2].partition("_by_scale/")[0] for name in names if "_by_scale/" in name}
    if "loss" in kinds:
        kinds.discard("unigram_entropy")
    return sorted(kinds, key=lambda kind: (kind not in ("loss", "accuracy"), kind != "loss", kind))


def scales(variants: Sequence[Variant], stem: str) -> list[int]:
    """Scale numbers k for which any run logged `<stem>/<k>`."""
    return scale_numbers([run for variant in variants for run in variant.runs], stem)


def entropy(variants: Sequence[Variant], scale: int) -> float | None:
    """Unigram entropy of a scale's validation tokens, nats: of the data, hence the mean over all runs."""
    means = [
        s.mean
        for variant in variants
        if (s := summary(variant, f"validation/unigram_entropy_by_scale/{scale}"))
    ]
    return float(np.mean(means)) if means else None


def norms_figure(study: Study) -> Figure | None:
    """Figure 3 of the paper: the last block's activation norms over steps, and every block's at the end."""
    panels = [
        curve_panel(study, study.variants, name, log=True)
        for name in ("norms/last/mean", "norms/last/max")
        if _has(study.variants, name)
    ]
    for kind in ("mean", "max"):
        if any(_profile(variant, kind) for variant in study.variants):
            alt = f"{kind} activation norm of each block at the end of training, one line a variant."
            draw = partial(_draw_profile, study=study, kind=kind)
            panels.append(Panel(f"norms/profile/{kind}", f"{kind} norm of each block, at the end", alt, draw))
    if not panels:
        return None
    caption = f"Activation norms, logarithmic (Figure 3 of the paper). {BAND_NOTE}"
    return Figure("norms", caption, tuple(panels), legend(study, study.variants))


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


def _draw_profile(axes: Axes, study: Study, kind: str) -> None:
    for i, variant in enumerate(study.variants):
        if profiles := _profile(variant, kind):
            plots.draw_band(axes, band(profiles), i)
    axes.set_xlabel("block")
    plots.log_axis(axes)


def sampling_figure(study: Study) -> Figure | None:
    """Seconds of sampling at each scale, as bars, one group a scale."""
    measured = {
        variant.label: times
        for variant in study.variants
        if (times := _scale_seconds(variant.runs)) is not None
    }
    if not measured:
        return None
    total = ", ".join(f"{label} {number(times.sum(), 3)} s in all" for label, times in measured.items())
    sides = scale_sides(study.runs[0])
    draw: Callable[[Axes], None] = partial(_draw_bars, study=study, measured=measured, sides=sides)
    panel = Panel(
        "sampling/by_scale", "seconds of sampling at each scale", f"Bars of sampling time: {total}.", draw
    )
    caption = "Sampling time at each scale for one batch, mean over seeds."
    return Figure("sampling_time", caption, (panel,), legend(study, study.variants))


def _scale_seconds(runs: tuple[Run, ...]) -> np.ndarray | None:
    """Mean seconds of each scale over the runs that have been evaluated with as many scales as the first."""
    times = [
        run.evaluation.sampling.seconds_per_scale
        for run in runs
        if run.evaluation and run.evaluation.sampling
    ]
    times = [row for row in times if row and len(row) == len(times[0])]
    return np.mean(times, axis=0) if times else None


def _draw_bars(axes: Axes, study: Study, measured: dict[str, np.ndarray], sides: list[int]) -> None:
    width = 0.8 / len(measured)
    count = max(len(times) for times in measured.values())
    for i, (label, times) in enumerate(measured.items()):
        number_of = [variant.label for variant in study.variants].index(label)
        places = np.arange(len(times)) + (i - (len(measured) - 1) / 2) * width
        axes.bar(places, times, width, color=plots.colour(number_of))
    axes.set_xticks(range(count), [f"{sides[k]}²" if k < len(sides) else str(k) for k in range(count)])
    axes.set_xlabel("scale, tokens")
    axes.set_ylabel("seconds")
    axes.grid(axis="x", visible=False)


def other_names(study: Study, drawn: set[str]) -> list[str]:
    """Logged curves that no figure has drawn yet, so that nothing in a run folder stays unseen."""
    known = metric_names(study.runs)
    return [
        name
        for name in known
        if name not in drawn
        and not is_detail(name)
        and not is_cost(name)
        and any(name in run.series and run.series[name].steps.size > 1 for run in study.runs)
    ]
