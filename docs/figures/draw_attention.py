"""Draw the two-panel figure of causal and non-causal attention over a token pyramid (docs/figures/attention.png).

    python docs/figures/draw_attention.py

Rows are queries, columns keys, both in the order of the sequence: scale by scale, coarse to fine. A filled cell is a
pair of tokens that attention computes.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from switti.scales import Pyramid

PYRAMID = Pyramid((1, 2, 3, 4))
COLOURS = ("#4c78a8", "#72b7b2", "#eeca3b", "#e45756")
EMPTY, GRID, TEXT = "#f2f2f2", "#ffffff", "#222222"


def draw_pyramid(axes: Axes) -> None:
    """The token maps as grids of one size, coarse to fine, with the step that predicts each."""
    gap = 0.35
    for k, side in enumerate(PYRAMID.sides):
        left = k * (1 + gap)
        for row in range(side):
            for column in range(side):
                corner = (left + column / side, 1 - (row + 1) / side)
                axes.add_patch(
                    Rectangle(corner, 1 / side, 1 / side, facecolor=COLOURS[k], edgecolor=GRID, linewidth=1)
                )
        axes.text(left + 0.5, -0.12, f"{side}×{side}", ha="center", va="top", color=TEXT)
        axes.text(left + 0.5, 1.1, f"step {k + 1}", ha="center", va="bottom", color=TEXT)
        if k:
            axes.annotate(
                "",
                (left - 0.04, 0.5),
                (left - gap + 0.04, 0.5),
                arrowprops={"arrowstyle": "->", "color": TEXT},
            )
    width = PYRAMID.count + (PYRAMID.count - 1) * gap
    axes.set(xlim=(-0.05, width + 0.05), ylim=(-0.35, 1.4), aspect="equal")
    axes.set_axis_off()


def draw_attention(axes: Axes, causal: bool) -> None:
    """The pairs of (query, key) that are computed, block by block."""
    length = PYRAMID.length
    axes.add_patch(Rectangle((0, 0), length, length, facecolor=EMPTY, edgecolor="none"))
    for i, (top, bottom) in enumerate(PYRAMID.spans):
        for j, (left, right) in enumerate(PYRAMID.spans):
            if j == i or (causal and j < i):
                block = Rectangle(
                    (left, top), right - left, bottom - top, facecolor=COLOURS[j], edgecolor="none"
                )
                axes.add_patch(block)
    for line in range(length + 1):
        axes.plot((line, line), (0, length), color=GRID, linewidth=0.4)
        axes.plot((0, length), (line, line), color=GRID, linewidth=0.4)
    middles = [(start + stop) / 2 for start, stop in PYRAMID.spans]
    names = [f"{side}×{side}" for side in PYRAMID.sides]
    axes.set_xticks(middles, names, rotation=50, ha="right", rotation_mode="anchor")
    axes.set_yticks(middles, names)
    axes.set(xlim=(0, length), ylim=(length, 0), aspect="equal", xlabel="keys", ylabel="queries")
    axes.tick_params(length=0, colors=TEXT)
    for spine in axes.spines.values():
        spine.set_visible(False)
    title = (
        "causal: a scale sees itself and all coarser ones"
        if causal
        else "non-causal: a scale sees itself only"
    )
    axes.set_title(title, fontsize=11, color=TEXT)


def main(out: Path) -> None:
    """Write the figure."""
    plt.rcParams |= {"font.size": 10}
    figure = plt.figure(figsize=(8.4, 6.6), layout="constrained", facecolor="white")
    layout = figure.add_gridspec(2, 2, height_ratios=(1, 2.4))
    draw_pyramid(figure.add_subplot(layout[0, :]))
    draw_attention(figure.add_subplot(layout[1, 0]), causal=True)
    draw_attention(figure.add_subplot(layout[1, 1]), causal=False)
    figure.savefig(out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main(Path(__file__).parent / "attention.png")
