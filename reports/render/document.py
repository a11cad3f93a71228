"""The report as data: sections of blocks, written once and rendered as HTML and as Markdown.

Text may mark code with `backticks`; it is otherwise plain and is escaped by whoever renders it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes

from switti.escape import printable

_CODE = re.compile(r"`([^`]*)`")


@dataclass(frozen=True)
class Text:
    """A paragraph. `note` explains, `warning` must not be overlooked, `missing` says how to get what is missing.

    `command` is for a terminal: its text is shown verbatim, backticks and all.
    """

    text: str
    kind: Literal["plain", "summary", "verdict", "note", "warning", "missing", "command"] = "plain"


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
    """One plot. `draw` fills the axes; `alt` describes it in words; height in inches, None for the default."""

    name: str
    title: str
    alt: str
    draw: Callable[[Axes], None]
    height: float | None = None


# How a legend shows an entry: a line in a colour, a dashed line, or a mark (Matplotlib's) in a colour.
LegendKey = int | Literal["dashed"] | tuple[str, int]
Legend = tuple[tuple[str, LegendKey], ...]


@dataclass(frozen=True)
class Figure:
    """Panels that belong together, saved as `<name>.svg` and `.png`. `legend`: (label, key)."""

    name: str
    caption: str
    panels: tuple[Panel, ...]
    legend: Legend = ()
    small: bool = False


@dataclass(frozen=True)
class GridImage:
    """A sampled image, or None where a variant has none for the row."""

    path: Path | None
    alt: str


@dataclass(frozen=True)
class ImageGrid:
    """Rows: (caption, image seed, one image a column). Saved as a sheet, `<name>.png`."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, int, tuple[GridImage, ...]], ...]
    opened: bool = True


@dataclass(frozen=True)
class Definitions:
    """Terms with what they mean: (term, names in code, text)."""

    items: tuple[tuple[str, tuple[str, ...], str], ...]


Block = Text | Table | Figure | ImageGrid | Definitions


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


def code(value: Any) -> str:
    """A name from elsewhere, marked as code in a text: its own backticks become apostrophes."""
    return f"`{str(value).replace('`', chr(39))}`"


def segments(text: str) -> list[tuple[bool, str]]:
    """The text in pieces, (is it code, piece), without the backticks and without empty pieces."""
    return [(i % 2 == 1, piece) for i, piece in enumerate(_CODE.split(text)) if piece]


def cleaned(value: Any) -> Any:
    """A document, or any part of one, in which every text is one printable line."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list | tuple):
        return type(value)(map(cleaned, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: cleaned(getattr(value, item.name)) for item in fields(value)})
    return value
