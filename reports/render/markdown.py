"""The document as Markdown, for a paper's repository or an issue: tables as text, plots and images as files."""

import re

from reports.render.document import Block, Definitions, Document, Figure, ImageGrid, Table, Text, segments
from reports.render.image_sheet import COLUMNS
from switti.escape import markdown_code, markdown_text, printable

_MARKS = {
    "plain": "",
    "summary": "",
    "verdict": "- ",
    "note": "",
    "warning": "> **Warning:** ",
    "missing": "> **Missing:** ",
}


def render(document: Document) -> str:
    """Markdown text; figures are linked as files beside it, which `plots.save_figure` writes."""
    parts = [f"# {markdown_text(document.title)}"]
    parts += _blocks(document.lead)
    for section in document.sections:
        parts += [f"## {markdown_text(section.title)}", *_blocks(section.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _blocks(blocks: list[Block]) -> list[str]:
    """Neighbouring verdict sentences become one list."""
    parts: list[str] = []
    before = None
    for block in blocks:
        kind = block.kind if isinstance(block, Text) else None
        if kind == before == "verdict":
            parts[-1] += "\n" + _block(block)
        else:
            parts.append(_block(block))
        before = kind
    return parts


def _block(block: Block) -> str:
    if isinstance(block, Text) and block.kind == "command":
        return _command(block.text)
    if isinstance(block, Text):
        mark = _MARKS[block.kind]
        return mark + _inline(block.text, paragraph=True)
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        title = ", ".join(panel.title for panel in block.panels[:4])
        return _image(title, block.name, block.caption)
    if isinstance(block, Definitions):
        return "\n".join(_definition(*item) for item in block.items)
    return _image_grid(block)


def _command(text: str) -> str:
    """A block of code, whatever backticks are in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}\n{printable(text)}\n{fence}"


def _inline(text: str, paragraph: bool = False) -> str:
    return "".join(
        markdown_code(piece) if is_code else markdown_text(piece, paragraph and i == 0)
        for i, (is_code, piece) in enumerate(segments(text))
    )


def _image(title: str, name: str, caption: str) -> str:
    """A file beside the page; a bracket in its title would end the title."""
    title = re.sub(r"(?<!\\)[\[\]]", r"\\\g<0>", markdown_text(title))
    return f"![{title}]({name}.png)" + _caption(caption)


def _caption(text: str) -> str:
    return f"\n\n*{_inline(text).strip()}*" if text else ""


def _definition(term: str, names: tuple[str, ...], text: str) -> str:
    return f"- **{markdown_text(term)}** ({', '.join(map(markdown_code, names))}): {_inline(text)}"


def _table(table: Table) -> str:
    align = ["---" if i in table.words else "---:" for i in range(len(table.header))]
    rows = [[_cell(table, i, cell) for i, cell in enumerate(row)] for row in table.rows]
    lines = [_row([markdown_text(cell) for cell in table.header]), _row(align), *map(_row, rows)]
    return "\n".join(lines) + _caption(table.caption)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(table: Table, column: int, text: str) -> str:
    if column not in table.code:
        return markdown_text(text)
    return markdown_code(text).replace("|", "\\|")  # a bar ends a cell even inside code


def _image_grid(block: ImageGrid) -> str:
    """The sheet that `sheets.save_sheet` writes, and what is on it."""
    captions = "; ".join(f"{prompt} (seed {seed})" for prompt, seed, _ in block.rows[:COLUMNS])
    rest = f" {len(block.rows) - COLUMNS} more are in `index.html`." if len(block.rows) > COLUMNS else ""
    text = f"{block.title}; from top to bottom {', '.join(block.columns)}; from left to right: {captions}."
    return _image(block.title, block.name, text.replace("`", "'") + rest)
