"""Axes that can be read: every logarithmic range has labelled ticks, and none without a label."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reports.render.plots import log_axis


@pytest.mark.parametrize(
    ("low", "high"), [(0.9, 1.1), (60, 140), (50, 140), (3, 90), (10, 300), (10, 1e4), (1, 1e16)]
)
def test_logarithmic_axes_have_labels(low: float, high: float) -> None:
    figure = Figure()
    FigureCanvasAgg(figure).draw()
    axes = figure.add_subplot()
    axes.plot([0, 1], [low, high])
    log_axis(axes)
    figure.canvas.draw()
    bottom, top = axes.get_ylim()
    ticks = [(t.get_text(), v) for t, v in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)]
    labels = [text for text, value in ticks if bottom <= value <= top]
    assert axes.get_yscale() == "log" and len(set(labels)) == len(labels) >= 3 and all(labels)
    assert not len(axes.yaxis.get_minorticklocs())


def test_nothing_positive_stays_linear() -> None:
    axes = Figure().add_subplot()
    axes.plot([0, 1], [0.0, 0.0])
    log_axis(axes)
    assert axes.get_yscale() == "linear"
