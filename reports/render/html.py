"""The document as one self-contained HTML page: plots are inline SVG, images are data URIs."""

from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from reports.data.images import data_uri
from reports.render import plots
from reports.render.document import Block, Document, Figure, Panel, Table, Text, segments
from reports.render.template import ENVIRONMENT, style

# Columns beyond which a table is set smaller on paper, and words are broken anywhere.
_BROAD, _BROADEST = 8, 12
# Characters beyond which a cell of words may wrap.
_LONG_CELL = 40


@dataclass(frozen=True)
class Verdicts:
    """Neighbouring verdict sentences, which become one list."""

    texts: tuple[Text, ...]


def render(document: Document) -> str:
    """The page as text."""
    return ENVIRONMENT.get_template("report.html.jinja").render(
        title=document.title,
        lead=document.lead,
        sections=document.sections,
        contents=[(section.anchor, section.title) for section in document.sections],
        style=style("page.css"),
    )


def _joined(blocks: list[Block]) -> list[Block | Verdicts]:
    joined: list[Block | Verdicts] = []
    for is_verdict, run in groupby(blocks, key=lambda b: isinstance(b, Text) and b.kind == "verdict"):
        members = list(run)
        texts = tuple(block for block in members if isinstance(block, Text))
        joined += [Verdicts(texts)] if is_verdict else members
    return joined


def _arrangement(figure: Figure) -> str:
    """Classes of the box that holds a figure's panels."""
    if figure.small:
        return "panels small"
    return {1: "panels single", 2: "panels two", 4: "panels two"}.get(len(figure.panels), "panels")


def _breadth(table: Table) -> str:
    """The end of its box's classes."""
    columns = len(table.header)
    return " broadest" if columns > _BROADEST else " broad" if columns > _BROAD else ""


def _plot(panel: Panel, small: bool) -> Markup:
    return Markup(plots.inline_svg(panel, small))


ENVIRONMENT.filters |= {
    "joined": _joined,
    "kind": lambda block: type(block).__name__,
    "segments": segments,
    "arrangement": _arrangement,
    "breadth": _breadth,
    "plot": _plot,
    "data_uri": data_uri,
}
ENVIRONMENT.globals |= {"LONG_CELL": _LONG_CELL, "COLOURS": len(plots.PALETTE), "MARKS": plots.MARKS}
