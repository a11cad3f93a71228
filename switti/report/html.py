"""The document as one self-contained HTML page: plots are inline SVG, pictures are data URIs."""

import base64
import re
from html import escape
from io import BytesIO
from itertools import groupby
from pathlib import Path

from PIL import Image

from switti.errors import UserError
from switti.report import plots
from switti.report.document import Block, Definitions, Document, Figure, Picture, Pictures, Table, Text
from switti.report.template import PAGE, STYLE

_PICTURE_SIDE = (
    256  # pixels; larger pictures are shrunk, or a page of 512 px samples would weigh tens of megabytes
)
_LONG_CELL = 40  # characters from which on a cell of words may wrap


def render(document: Document) -> str:
    """The whole page as text."""
    sections = "\n".join(
        f'<section id="{section.anchor}">\n<h2>{escape(section.title)}</h2>\n{_blocks(section.blocks)}\n</section>'
        for section in document.sections
    )
    contents = " ".join(
        f'<a href="#{section.anchor}">{escape(section.title)}</a>' for section in document.sections
    )
    return PAGE.substitute(
        title=escape(document.title),
        style=STYLE,
        lead=_blocks(document.lead),
        contents=contents,
        sections=sections,
    )


def _blocks(blocks: list[Block]) -> str:
    """Neighbouring verdict sentences become one list."""
    parts = []
    for is_verdict, run in groupby(
        blocks, key=lambda block: isinstance(block, Text) and block.kind == "verdict"
    ):
        if is_verdict:
            items = "".join(f"<li>{_inline(block.text)}</li>" for block in run if isinstance(block, Text))
            parts.append(f'<ul class="verdict">{items}</ul>')
        else:
            parts += [_block(block) for block in run]
    return "\n".join(parts)


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f'<p class="{block.kind}">{_inline(block.text)}</p>'
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Definitions):
        return _definitions(block)
    return _figure(block) if isinstance(block, Figure) else _pictures(block)


def _inline(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _table(table: Table) -> str:
    """A table that scrolls inside its own box, which can take the keyboard's focus; on a phone a card for each row.

    Roles are spelt out because cards are no table to a browser, and cells repeat their column's name for the cards.
    """
    head = "".join(
        f'<th scope="col" role="columnheader"{_class(table, i, "")}>{escape(cell)}</th>'
        for i, cell in enumerate(table.header)
    )
    body = "".join(f'<tr role="row">{_row(table, row)}</tr>' for row in table.rows)
    caption = f"<caption>{_inline(table.caption)}</caption>" if table.caption else ""
    head = f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
    inner = f'<table role="table">{caption}{head}<tbody role="rowgroup">{body}</tbody></table>'
    name = escape(table.caption or f"Table by {table.header[0]}")
    return f'<div class="table" tabindex="0" role="region" aria-label="{name}">{inner}</div>'


def _row(table: Table, row: tuple[str, ...]) -> str:
    name = (
        f' data-label="{escape(table.header[0])}"' if row[0].isdigit() else ""
    )  # a number alone says nothing
    first = f'<th scope="row" role="rowheader"{name}{_class(table, 0, row[0])}>{escape(row[0])}</th>'
    return first + "".join(
        f'<td role="cell" data-label="{escape(table.header[i])}"{_class(table, i, c)}>{_cell(table, i, c)}</td>'
        for i, c in enumerate(row[1:], start=1)
    )


def _cell(table: Table, column: int, text: str) -> str:
    """Cells of code are commands or names that can be broken anywhere."""
    return f"<code>{escape(text)}</code>" if column in table.code else escape(text)


def _definitions(block: Definitions) -> str:
    items = ""
    for term, names, text in block.items:
        codes = " ".join(f"<code>{escape(name)}</code>" for name in names)
        items += f"<div><dt>{escape(term)}</dt><dd>{escape(text)}<br>{codes}</dd></div>"
    return f"<dl>{items}</dl>"


def _class(table: Table, column: int, cell: str) -> str:
    names = (["word"] if column in table.words else []) + (["long"] if len(cell) > _LONG_CELL else [])
    names += ["code"] if column in table.code else []
    return f' class="{" ".join(names)}"' if names else ""


def _figure(figure: Figure) -> str:
    arrangement = {1: "panels single", 2: "panels two", 4: "panels two"}.get(len(figure.panels), "panels")
    kind = "panels small" if figure.small else arrangement
    panels = "".join(
        f'<div class="panel" role="img" aria-label="{escape(panel.alt)}">'
        f'<p class="panel-title">{escape(panel.title)}</p>'
        f"{plots.inline_svg(panel, figure.small)}</div>"
        for panel in figure.panels
    )
    caption = f"<figcaption>{_inline(figure.caption)}</figcaption>" if figure.caption else ""
    return f'<figure id="figure-{figure.name}">{_legend(figure)}<div class="{kind}">{panels}</div>{caption}</figure>'


def _legend(figure: Figure) -> str:
    items = ""
    for label, key in figure.legend:
        mark = (
            f'style="border-color: var(--series-{key % len(plots.PALETTE)})"'
            if isinstance(key, int)
            else 'class="dashed"'
        )
        items += f"<li><i {mark}></i>{escape(label)}</li>"
    return f'<ul class="legend">{items}</ul>' if items else ""


def _pictures(block: Pictures) -> str:
    rows = []
    for prompt, seed, pictures in block.rows:
        cells = "".join(
            f'<div>{_picture(picture)}<div class="column">{escape(column)}</div></div>'
            for column, picture in zip(block.columns, pictures, strict=True)
        )
        caption = (
            f'<figcaption class="caption">{escape(prompt)} <span>· picture seed {seed}</span></figcaption>'
        )
        rows.append(f'<figure class="pair">{caption}<div class="row">{cells}</div></figure>')
    columns = len(block.columns)
    return (
        f"<details{' open' if block.opened else ''}><summary>{escape(block.title)}</summary>"
        f'<div class="pictures" style="--columns: {columns}">{"".join(rows)}</div></details>'
    )


def _picture(picture: Picture) -> str:
    if picture.path is None:
        return '<div class="absent">no file</div>'
    return f'<img src="{data_uri(picture.path)}" alt="{escape(picture.alt)}" loading="lazy">'


def open_picture(path: Path) -> Image.Image:
    """A picture in RGB. Raises UserError if the file is none."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable picture: {error}") from None


def data_uri(path: Path) -> str:
    """A picture as a PNG data URI, at most 256 px a side; a PNG that is small enough keeps its bytes."""
    picture = open_picture(path)
    if path.suffix == ".png" and max(picture.size) <= _PICTURE_SIDE:
        data = path.read_bytes()
    else:
        picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.LANCZOS)
        stream = BytesIO()
        picture.save(stream, format="PNG", optimize=True)
        data = stream.getvalue()
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
