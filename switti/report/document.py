"""The report as data: sections of blocks, written once and rendered as HTML and as Markdown.

Text may mark code with `backticks`; it is otherwise plain and is escaped by whoever renders it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes


@dataclass(frozen=True)
class Text:
    """A paragraph. `note` explains, `warning` must not be overlooked, `missing` tells how to get what is not there."""

    text: str
    kind: Literal["plain", "summary", "verdict", "note", "warning", "missing"] = "plain"


@dataclass(frozen=True)
class Table:
    """Cells are text. The first column names the row and is aligned left, so are `words`; the others are numbers.

    code: columns of commands and the like.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    words: frozenset[int] = frozenset({0})
    code: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Panel:
    """One plot. `draw` fills the axes; `alt` says in words what they show."""

    name: str
    title: str
    alt: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Figure:
    """Panels that belong together, saved as `<name>.svg` and `.png`. `legend`: (label, colour number or 'dashed')."""

    name: str
    caption: str
    panels: tuple[Panel, ...]
    legend: tuple[tuple[str, int | Literal["dashed"]], ...] = ()
    small: bool = False


@dataclass(frozen=True)
class Picture:
    """A sampled picture, or None where a variant has none for the row."""

    path: Path | None
    alt: str


@dataclass(frozen=True)
class Pictures:
    """Rows: (caption, picture seed, one picture a column). Saved as a sheet, `<name>.png`."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, int, tuple[Picture, ...]], ...]
    opened: bool = True


@dataclass(frozen=True)
class Definitions:
    """Terms with what they mean: (term, names in code, text)."""

    items: tuple[tuple[str, tuple[str, ...], str], ...]


Block = Text | Table | Figure | Pictures | Definitions


@dataclass
class Section:
    """A heading with an anchor for the page's contents."""

    anchor: str
    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Document:
    """The whole report; `lead` stands under the title, before the contents."""

    title: str
    lead: list[Block]
    sections: list[Section]
