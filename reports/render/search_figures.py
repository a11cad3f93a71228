"""Plots of a search: its history, the objective against each parameter, importance, and the trials' curves."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from reports.data.importance import LEAST_TRIALS, Importance
from reports.data.search import Parameter, Search, State, Trial
from reports.data.study import show
from reports.render import plots
from reports.render.document import Figure, Legend, Panel
from reports.render.formatting import number, percent

# Mark and colour of a trial by how it ended.
_LOOK: dict[State, tuple[str, int]] = {
    "finished": ("o", 0),
    "pruned": ("v", 6),
    "failed": ("x", 1),
    "interrupted": ("D", 4),
    "running": ("D", 4),
}
_WORDS: dict[State, str] = {"interrupted": "not finished", "running": "not finished"}
# Colour of the best trial.
_BEST = 2
# Multiple of the distance between the best and the median beyond which a value is drawn at the border.
_FAR = 5.0
_PANELS = 24
# Characters of a choice below an axis.
_LABEL = 14


def legend(search: Search, line: str | None = None) -> Legend:
    """The states that occur. line: what the best trial's line is, where there is one."""
    seen = {(_WORDS.get(trial.state, trial.state), _LOOK[trial.state]) for trial in search.trials}
    marks: Legend = tuple((word, look) for word, look in _entries() if (word, look) in seen)
    return (*marks, (line, _BEST)) if line and search.best else marks


def _entries() -> list[tuple[str, tuple[str, int]]]:
    """Every word of a legend once, in the order of the states."""
    return list(dict.fromkeys((_WORDS.get(state, state), look) for state, look in _LOOK.items()))


def history_figure(search: Search) -> Figure:
    """The objective of each trial in the order of their numbers, and the best so far."""
    best = search.best
    alt = f"{search.metric.title} of {len(search.trials)} trials by number"
    alt += f"; the best is {number(best.value)} at trial {best.number}." if best else "; none has finished."
    caption = "Each trial's objective"
    caption += "; of a pruned one the last value that it reached." if search.of("pruned") else "."
    if any(trial.value is None for trial in search.trials):
        caption += " At the lower border: trials without a value."
    panel = Panel("search/history", search.metric.heading, alt, partial(_draw_history, search=search))
    return Figure("history", caption + _beyond(search), (panel,), legend(search, "best so far"))


def _draw_history(axes: Axes, search: Search) -> None:
    _draw_trials(axes, search, {trial.number: float(trial.number) for trial in search.trials})
    steps, bests, best = list[int](), list[float](), None
    for trial in search.trials:
        if trial.state == "finished" and (best is None or search.badness(trial) < search.badness(best)):
            best = trial
        if best is not None and best.value is not None:
            steps.append(trial.number)
            bests.append(best.value)
    if steps:
        axes.step(steps, bests, where="post", color=plots.colour(_BEST), linewidth=1.2)
    axes.set_xlabel("trial")


def parameters_figure(search: Search) -> Figure | None:
    """A panel for each parameter that varies."""
    panels = []
    for parameter in search.parameters:
        values = {
            show(trial.parameters[parameter.name]) for trial in search.trials if trial.value is not None
        }
        if len(values) > 1:
            alt = f"{search.metric.title} against {parameter.name}, a mark for each trial."
            draw = partial(_draw_parameter, search=search, parameter=parameter)
            panels.append(Panel(f"search/{parameter.name}", parameter.label, alt, draw))
    if not panels:
        return None
    caption = f"{search.metric.heading} against each parameter; the ring is the best trial."
    if len(panels) > _PANELS:
        caption += f" The first {_PANELS} of {len(panels)} parameters."
    return Figure(
        "parameters",
        caption + _beyond(search),
        tuple(panels[:_PANELS]),
        legend(search),
    )


def _draw_parameter(axes: Axes, search: Search, parameter: Parameter) -> None:
    shown = [trial for trial in search.trials if trial.value is not None]
    if _is_numeric(parameter, shown):
        places = {trial.number: float(trial.parameters[parameter.name]) for trial in shown}
        _draw_trials(axes, search, places)
        if parameter.log and min(places.values()) > 0:
            plots.log_axis(axes, "x")
    else:
        values = sorted({show(trial.parameters[parameter.name]) for trial in shown})
        if parameter.choices is not None:
            order = [show(choice) for choice in parameter.choices]
            values.sort(key=lambda value: (order.index(value) if value in order else len(order), value))
        spread = 0.5 / max(1, len(shown))
        places = {
            trial.number: values.index(show(trial.parameters[parameter.name])) + (i - len(shown) / 2) * spread
            for i, trial in enumerate(shown)
        }
        _draw_trials(axes, search, places)
        labels = [value if len(value) <= _LABEL else value[: _LABEL - 1] + "…" for value in values]
        axes.set_xticks(range(len(values)), labels, rotation=20 if len(values) > 3 else 0)
        axes.set_xlim(-0.6, len(values) - 0.4)
        axes.grid(axis="x", visible=False)
    axes.set_ylabel(search.metric.title)


def _is_numeric(parameter: Parameter, trials: Sequence[Trial]) -> bool:
    values = [trial.parameters[parameter.name] for trial in trials]
    return parameter.choices is None and all(
        isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
        for value in values
    )


def _draw_trials(axes: Axes, search: Search, places: dict[int, float]) -> None:
    """A mark for each trial at its place; what lies far beyond at the border, what has no value at the other."""
    limits = _limits(search)
    for trial in search.trials:
        if trial.number not in places:
            continue
        x, look = places[trial.number], plots.mark(*_LOOK[trial.state])
        if trial.value is None:
            axes.plot([x], [0.02], transform=axes.get_xaxis_transform(), clip_on=False, **look)
        else:
            y = trial.value if limits is None else float(np.clip(trial.value, *limits))
            axes.plot([x], [y], clip_on=False, **look)
    if (best := search.best) and best.number in places and best.value is not None:
        axes.plot([places[best.number]], [best.value], **plots.mark("O", _BEST, 10.0))
    if limits is not None:
        axes.set_ylim(*limits)


def _limits(search: Search) -> tuple[float, float] | None:
    """A range that a few diverged trials do not stretch; None if there are none."""
    values = np.array([trial.value for trial in search.trials if trial.value is not None])
    finished = np.array([trial.value for trial in search.of("finished")])
    if finished.size < 3:
        return None
    best = finished.min() if search.minimize else finished.max()
    reach = _FAR * max(abs(float(np.median(finished)) - best), 1e-12)
    low, high = (values.min(), best + reach) if search.minimize else (best - reach, values.max())
    if values.min() >= low and values.max() <= high:
        return None
    margin = 0.05 * (high - low)
    return float(low - margin), float(high + margin)


def _beyond(search: Search) -> str:
    if (limits := _limits(search)) is None:
        return ""
    count = sum(t.value is not None and not limits[0] <= t.value <= limits[1] for t in search.trials)
    return f" {count} far beyond the others are drawn at the border." if count else ""


def importance_figure(importance: Importance, search: Search) -> Figure:
    """Bars, the most important parameter on top."""
    labels = {parameter.name: parameter.label for parameter in search.parameters}
    shares = [(labels[name], share) for name, share in importance.shares.items()][:_PANELS]
    alt = "Importance: " + ", ".join(f"{label} {percent(share)}" for label, share in shares) + "."
    height = 0.6 + 0.28 * len(shares)
    panel = Panel("search/importance", "importance", alt, partial(_draw_importance, shares=shares), height)
    caption = (
        f"{importance.evaluator}, over {importance.trials} finished trials: how much each parameter decides "
    )
    caption += f"whether a trial is among the best {percent(importance.top)}; the shares sum to 1."
    caption += " From so few trials it is a hint only." if importance.trials < 2 * LEAST_TRIALS else ""
    return Figure("importance", caption, (panel,))


def _draw_importance(axes: Axes, shares: Sequence[tuple[str, float]]) -> None:
    places = range(len(shares))
    axes.barh(places, [share for _, share in shares], 0.6, color=plots.colour(0))
    names = [
        f"{label if len(label) <= 24 else label[:23] + '…'}, {percent(share)}" for label, share in shares
    ]
    axes.set_yticks(places, names)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(len(shares) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def values_figure(search: Search) -> Figure | None:
    """The objective of every trial over the steps of its training."""
    if not any(search.metric.name in trial.run.series for trial in search.trials):
        return None
    alt = f"{search.metric.title} over steps, a line for each trial; pruned ones end early."
    panel = Panel(
        "search/values", f"{search.metric.heading} in training", alt, partial(_draw_values, search=search)
    )
    caption = "Every trial's objective over its training. A mark at the end: pruned, failed or not finished."
    return Figure("values", caption, (panel,), legend(search, "best trial"))


def _draw_values(axes: Axes, search: Search) -> None:
    limits = _limits(search)
    for trial in (*search.trials, *([search.best] if search.best else [])):
        series = trial.run.series.get(search.metric.name)
        if series is None or not (finite := np.abs(series.values) < plots.LARGEST).any():
            continue
        steps, values = series.steps[finite], series.values[finite]
        keep, best = plots.thin(steps.size), trial is search.best
        paint = plots.colour(_BEST if best else _LOOK[trial.state][1])
        axes.plot(
            steps[keep], values[keep], color=paint, linewidth=1.8 if best else 0.7, alpha=1 if best else 0.55
        )
        if trial.state != "finished":
            y = values[-1] if limits is None else np.clip(values[-1], *limits)
            axes.plot(steps[-1:], [y], **plots.mark(*_LOOK[trial.state], size=4.0))
    if limits is not None:
        axes.set_ylim(*limits)
    plots.step_axis(axes)
