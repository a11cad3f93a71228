"""Tables as text: aligned columns for a terminal of any width, CSV files that no spreadsheet takes for formulas."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from switti.escape import spreadsheet_cell
from switti.files import atomic_write


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A line for each row. left: how many columns are aligned left; the others, numbers, are aligned right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """None becomes an empty cell, floats keep all their digits, text that would be a formula gets an apostrophe."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([spreadsheet_cell(cell) for cell in row] for row in rows)
