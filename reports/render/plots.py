"""Matplotlib under one style: panels for the page (SVG whose colours follow the page's theme) and files for a paper."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from reports.data.statistics import Band
from reports.render.document import Figure, LegendKey, Panel
from switti.files import atomic_write

# Okabe & Ito's colours, distinguishable by every kind of colour vision; the page has their counterparts for dark mode.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b08900", "#2b9fd6", "#6f6f6f")
INK, GRID, DASHED = "#24292f", "#d6dade", "#57606b"
_THEME = {INK: "currentColor", GRID: "var(--grid)", DASHED: "var(--faint)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(PALETTE)
}
# Inches of a panel, as on the page: on a phone 350 and 170 px wide.
_SIZE, _SMALL = (4.0, 2.6), (2.1, 1.7)
# What is beyond, or not a number, cannot be drawn.
LARGEST = 1e100
# More cannot be distinguished in a panel.
_POINTS = 400
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
}


def colour(number: int) -> str:
    return PALETTE[number % len(PALETTE)]


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(_STYLE):
        yield


def inline_svg(panel: Panel, small: bool = False) -> str:
    """One panel as an SVG element for an HTML page: no fixed size, ids unique to the panel, colours from the theme."""
    text = StringIO()
    with _style(), matplotlib.rc_context({"svg.hashsalt": panel.name}):
        width, height = _SMALL if small else _SIZE
        canvas = Canvas(figsize=(width, panel.height or height), layout="constrained")
        _fill(canvas.add_subplot(), panel, small, titled=False)
        canvas.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(text.getvalue(), panel)


def _for_page(svg: str, panel: Panel) -> str:
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"| (width|height)="[\d.]+pt"', "", svg)
    slug = re.sub(r"\W+", "-", panel.name)
    svg = re.sub(r'\bid="', f'id="{slug}-', svg.replace("xlink:href", "href"))
    svg = svg.replace('href="#', f'href="#{slug}-').replace("url(#", f"url(#{slug}-")
    for fixed, themed in _THEME.items():
        svg = svg.replace(fixed, themed)
    return svg.replace("<svg", '<svg class="plot" aria-hidden="true"', 1).strip()


def save_figure(figure: Figure, folder: Path) -> None:
    """All panels in one file, `<name>.svg` and `<name>.png`, on white, with the legend."""
    width, height = _SMALL if figure.small else _SIZE
    height = max(panel.height or height for panel in figure.panels)
    columns = min(len(figure.panels), 4 if figure.small else 2)
    rows = -(-len(figure.panels) // columns)
    with _style(), matplotlib.rc_context({"svg.hashsalt": figure.name}):
        canvas = Canvas(
            figsize=(columns * width, rows * height + 0.35), layout="constrained", facecolor="white"
        )
        FigureCanvasAgg(canvas)
        grid = canvas.subplots(rows, columns, squeeze=False).ravel()
        for axes, panel in zip(grid, figure.panels, strict=False):
            _fill(axes, panel, figure.small, titled=True)
        for axes in grid[len(figure.panels) :]:
            axes.set_axis_off()
        if figure.legend:
            handles = [_handle(key) for _, key in figure.legend]
            names = [name for name, _ in figure.legend]
            canvas.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)))
        canvas.draw_without_rendering()
        # The layout is computed once, not again for each file.
        canvas.set_layout_engine("none")
        for kind in ("svg", "png"):
            with atomic_write(folder / f"{figure.name}.{kind}") as temporary:
                canvas.savefig(
                    temporary, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None
                )


def _handle(key: LegendKey) -> Line2D:
    if isinstance(key, int):
        return Line2D([], [], color=colour(key))
    if isinstance(key, tuple):
        return Line2D([], [], **mark(*key))
    return Line2D([], [], color=DASHED, linestyle="--", linewidth=1.0)


def _fill(axes: Axes, panel: Panel, small: bool, titled: bool) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(3 if small else 6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4 if small else 6))
    panel.draw(axes)
    if titled:
        axes.set_title(panel.title)


# Matplotlib's marks, and the characters that show them in a page's legend.
MARKS = {"o": "●", "O": "○", "v": "▽", "x": "×", "D": "◇"}


def mark(name: str, number: int, size: float = 5.0) -> dict[str, Any]:
    """Style of a point whose shape and colour show its kind: "o" filled, "O", "v" and "D" hollow, "x"."""
    face = colour(number) if name == "o" else "none"
    return {
        "marker": name.lower() if name == "O" else name,
        "markersize": size,
        "color": colour(number),
        "markerfacecolor": face,
        "linestyle": "none",
    }


def step_axis(axes: Axes) -> None:
    """Steps in thousands where they are many."""
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1000:g}k" if abs(x) >= 1000 else f"{x:g}")
    )
    axes.set_xlabel("step")


def log_axis(axes: Axes, which: Literal["x", "y"] = "y") -> None:
    """A logarithmic axis, with enough ticks labelled over any range; linear if nothing is positive."""
    if (axes.dataLim.minposy if which == "y" else axes.dataLim.minposx) == np.inf:
        return
    (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
    decades = np.log10(high / low)
    if decades < 0.7:
        axis.set_major_locator(MaxNLocator(5))
    elif decades < 2:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    else:
        axis.set_major_locator(LogLocator(numticks=6))
    axis.set_major_formatter(FuncFormatter(_power if decades >= 2 else _plain))
    axis.set_minor_locator(NullLocator())


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def _power(value: float, _: int) -> str:
    return "10" + str(round(np.log10(value))).translate(_SUPERSCRIPT) if value > 0 else ""


def draw_band(axes: Axes, band: Band, number: int) -> None:
    """Mean over seeds as a line, lowest to highest as a band behind it; thinned to what a panel can show."""
    keep = thin(band.steps.size)
    steps = band.steps[keep]
    if (band.high > band.low).any():
        axes.fill_between(
            steps, band.low[keep], band.high[keep], color=colour(number), alpha=0.2, linewidth=0
        )
    marker = "o" if band.steps.size <= 12 else None
    axes.plot(steps, band.mean[keep], color=colour(number), marker=marker, markersize=2.5)


def draw_faint(axes: Axes, steps: np.ndarray, values: np.ndarray, number: int) -> None:
    """A raw curve behind its smoothed one."""
    keep = thin(steps.size)
    axes.plot(steps[keep], values[keep], color=colour(number), linewidth=0.6, alpha=0.3)


def draw_level(axes: Axes, value: float) -> None:
    axes.axhline(value, color=DASHED, linestyle="--", linewidth=1.0)


def thin(count: int) -> np.ndarray:
    """At most _POINTS indices, evenly spread, first and last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, _POINTS)).round().astype(np.int64))
