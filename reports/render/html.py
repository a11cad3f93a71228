"""The document as one self-contained HTML page: plots are inline SVG, images are data URIs."""

from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from reports.data.images import data_uri
from reports.render import plots
from reports.render.document import Block, Document, Figure, Panel, Table, Text, segments
from reports.render.template import ENVIRONMENT, page

_BROAD, _BROADEST = (
    8,
    12,
)  # columns beyond which a table is set smaller on paper, and words are broken anywhere
_LONG_CELL = 40  # characters from which on a cell of words may wrap


@dataclass(frozen=True)
class Verdicts:
    """Neighbouring verdict sentences, which become one list."""

    texts: tuple[Text, ...]


def render(document: Document) -> str:
    """The whole page as text."""
    sections = Markup("\n").join(
        Markup('<section id="{}">\n<h2>{}</h2>\n{}\n</section>').format(
            section.anchor, section.title, _blocks(section.blocks)
        )
        for section in document.sections
    )
    contents = [(section.anchor, section.title) for section in document.sections]
    return page(document.title, _blocks(document.lead), contents, sections)


def _blocks(blocks: list[Block]) -> Markup:
    macros = ENVIRONMENT.get_template("blocks.html.jinja").make_module()
    return Markup("\n").join(macros.show(block) for block in _joined(blocks))  # type: ignore[attr-defined]


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
    "kind": lambda block: type(block).__name__,
    "segments": segments,
    "arrangement": _arrangement,
    "breadth": _breadth,
    "plot": _plot,
    "data_uri": data_uri,
}
ENVIRONMENT.globals |= {"LONG_CELL": _LONG_CELL, "COLOURS": len(plots.PALETTE), "MARKS": plots.MARKS}
