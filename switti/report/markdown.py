"""The document as Markdown, for a paper's repository or an issue: tables as text, plots and pictures as files."""

from switti.report.document import Block, Definitions, Document, Figure, Pictures, Table, Text
from switti.report.sheets import COLUMNS

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
    parts = [f"# {document.title}"]
    for block in document.lead:
        parts.append(_block(block))
    for section in document.sections:
        parts += [f"## {section.title}", *map(_block, section.blocks)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    return text.replace("\n\n- ", "\n- ").replace("\n- ", "\n\n- ", 1)


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return _MARKS[block.kind] + block.text
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        title = ", ".join(panel.title for panel in block.panels[:4])
        return f"![{_cell(title)}]({block.name}.png)\n\n*{block.caption}*"
    if isinstance(block, Definitions):
        return "\n".join(
            f"- **{term}** (`{'`, `'.join(names)}`): {text}" for term, names, text in block.items
        )
    return _pictures(block)


def _table(table: Table) -> str:
    align = ["---" if i in table.words else "---:" for i in range(len(table.header))]
    lines = [_row(table.header), _row(align), *(_row(_code(table, row)) for row in table.rows)]
    return "\n".join(lines) + (f"\n\n*{table.caption}*" if table.caption else "")


def _row(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(table: Table, row: tuple[str, ...]) -> list[str]:
    return [f"`{cell}`" if i in table.code and cell else cell for i, cell in enumerate(row)]


def _pictures(block: Pictures) -> str:
    """The sheet that `sheets.save_sheet` writes, and what is on it."""
    captions = "; ".join(f"{prompt} (seed {seed})" for prompt, seed, _ in block.rows[:COLUMNS])
    rest = f" {len(block.rows) - COLUMNS} more are in `index.html`." if len(block.rows) > COLUMNS else ""
    text = (
        f"{block.title}; from top to bottom {', '.join(block.columns)}; from left to right: {captions}.{rest}"
    )
    return f"![{_cell(block.title)}]({block.name}.png)\n\n*{text}*"
