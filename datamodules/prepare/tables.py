"""Tables of images and captions: the bytes of a CSV, TSV, JSONL or COCO file → rows. Nothing else is opened.

A row that cannot be meant is yielded with its problem; a table that cannot be trusted (a row with another number of
fields, a quote that swallows rows, a line that is not JSON) raises.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from datamodules.images import SUFFIXES
from datamodules.prepare.captions import UnusableTextError, captions_of, captions_of_cell, decode_text
from switti.escape import printable
from switti.files import parse_json

SEPARATORS = {".csv": ",", ".tsv": "\t"}
TABLES = (*SEPARATORS, ".jsonl")
# So many lines of one cell that each look like a row of the table are rows, not a caption.
_SWALLOWED_LINES = 3


class TableError(ValueError):
    """Why a table was not read: "line 5: what; what to do"."""


@dataclass(frozen=True)
class Row:
    """An image as its source names it. where: "line 5"; problem: why it cannot be used, "" if it can."""

    where: str
    name: str
    captions: tuple[str, ...] = ()
    problem: str = ""


def table_rows(
    data: bytes,
    suffix: str,
    file_column: str,
    caption_column: str,
    encoding: str | None = None,
    is_file: Callable[[str], bool] | None = None,
) -> Iterator[Row]:
    """Rows of a table in `suffix` format (.csv, .tsv, .jsonl).

    Args:
        is_file: whether a name is that of an image, to tell rows in a cell from a caption of several lines; those with
            the ending of an image are taken for one without asking.

    Raises:
        TableError: see above.
    """
    text = _decoded(data, encoding)
    columns = (file_column, caption_column)
    if suffix == ".jsonl":
        yield from _jsonl(text, *columns)
    else:
        yield from _separated(text, SEPARATORS[suffix], *columns, is_file or (lambda name: False))


def _decoded(data: bytes, encoding: str | None) -> str:
    try:
        return decode_text(data, encoding)
    except UnusableTextError as error:
        raise TableError(str(error)) from error


def _no_column(option: str, name: str, found: list[str]) -> TableError:
    return TableError(f"has no column '{name}' ({option}); it has {printable(', '.join(found)[:200])}")


# ---- CSV and TSV ------------------------------------------------------------------------------------------------


def _separated(
    text: str, separator: str, file_column: str, caption_column: str, is_file: Callable[[str], bool]
) -> Iterator[Row]:
    lines = _cells(text, separator)
    _, header = next(lines, (0, []))
    header = [name.strip() for name in header]
    if not header:
        raise TableError("is empty")
    for option, column in (("--file-column", file_column), ("--caption-column", caption_column)):
        if column not in header:
            raise _no_column(option, column, header)
        if header.count(column) > 1:
            raise TableError(f"has the column '{column}' {header.count(column)} times")
    file, caption = header.index(file_column), header.index(caption_column)
    for line, cells in lines:
        if len(cells) != len(header):
            raise TableError(
                f"line {line}: {len(cells)} fields, but the header has {len(header)}; put cells that hold a "
                f'{"comma" if separator == "," else "tab"} in quotes ("…"), or use .jsonl'
            )
        swallowed = _swallowed(cells, separator, len(header), file, is_file)
        if swallowed:
            raise TableError(
                f"line {line}: a quote opens that swallows the row {swallowed[:80]!r}; close it, and write quotes "
                'inside a quoted cell twice ("")'
            )
        name, where = cells[file].strip(), f"line {line}"
        try:
            yield Row(where, name, tuple(captions_of_cell(cells[caption])))
        except UnusableTextError as error:
            yield Row(where, name, problem=str(error))


def _cells(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, cells) of every row that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise TableError(
            f'line {line}: {error}; close every quote, and write quotes inside a quoted cell twice ("")'
        ) from error


def _swallowed(
    cells: list[str], separator: str, columns: int, file: int, is_file: Callable[[str], bool]
) -> str:
    """The line inside a cell that is a row of its own, "" if there is none."""
    for number, cell in enumerate(cells):
        lines = re.split(r"\r\n|\r|\n", cell)
        rows = [next(csv.reader([line], delimiter=separator), []) for line in lines] if len(lines) > 1 else []
        for index, (line, row) in enumerate(zip(lines, rows, strict=False)):
            # The first line continues the row in this column, the others begin one.
            place = file if index else file - number
            if (
                (index or place > 0)
                and 0 <= place < len(row)
                and len(row) > 1
                and _is_name(row[place], is_file)
            ):
                return line
        if len(rows) > _SWALLOWED_LINES and all(len(row) == columns for row in rows[1:]):
            return lines[1]
    return ""


def _is_name(cell: str, is_file: Callable[[str], bool]) -> bool:
    name = cell.strip()
    return bool(name) and (PurePath(name).suffix.lower() in SUFFIXES or is_file(name))


# ---- JSONL --------------------------------------------------------------------------------------------------------


def _jsonl(text: str, file_column: str, caption_column: str) -> Iterator[Row]:
    missing = {"--file-column": file_column, "--caption-column": caption_column}
    first: list[str] | None = None
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            raise TableError(f"line {number}: not JSON ({error.msg}, character {error.pos + 1})") from error
        except ValueError as error:
            raise TableError(f"line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise TableError(f'line {number}: not a JSON object, such as {{"{file_column}": …, …}}')
        first = list(row) if first is None else first
        missing = {option: column for option, column in missing.items() if column not in row}
        yield _json_row(f"line {number}", row.get(file_column), row.get(caption_column))
    if first is None:
        raise TableError("is empty")
    for option, column in missing.items():
        raise _no_column(option, column, first)


def _json_row(where: str, name: Any, caption: Any) -> Row:
    if isinstance(name, bool | dict | list | float):
        return Row(where, "", problem=f"file is not a name: {json.dumps(name)[:60]}")
    name = "" if name is None else str(name)
    try:
        return Row(where, name, tuple(captions_of(caption)))
    except UnusableTextError as error:
        return Row(where, name, problem=str(error))


# ---- COCO ---------------------------------------------------------------------------------------------------------


def coco_rows(data: bytes, encoding: str | None = None) -> Iterator[Row]:
    """Rows of a COCO captions file, in the order of its images.

    Raises:
        TableError: it is not such a file.
    """
    text = _decoded(data, encoding)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise TableError(f"is not JSON: {error}") from error
    images, captions = _entries(content, "images"), _entries(content, "annotations")
    captions_by_image: dict[Any, list[str]] = {}
    names: list[tuple[str, Any, Row]] = []
    for number, entry in enumerate(images):
        where = f"images[{number}]"
        key, name = _member(entry, "id", where), _member(entry, "file_name", where)
        if key in captions_by_image:
            yield Row(where, str(name), problem=f"id is used twice: {key}")
            continue
        captions_by_image[key] = []
        names.append((where, key, _json_row(where, name, None)))
    for number, entry in enumerate(captions):
        where = f"annotations[{number}]"
        key = _member(entry, "image_id", where)
        if key not in captions_by_image:
            yield Row(where, "", problem=f"no image of this id: {key}")
            continue
        try:
            captions_by_image[key] += captions_of(_member(entry, "caption", where))
        except UnusableTextError as error:
            yield Row(where, "", problem=str(error))
    for where, key, row in names:
        yield Row(where, row.name, tuple(captions_by_image[key]), row.problem)


def _entries(content: Any, name: str) -> list[Any]:
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise TableError(f"is not a COCO captions file: it has no list '{name}'")
    return found


def _member(entry: Any, name: str, where: str) -> Any:
    if not isinstance(entry, dict) or name not in entry:
        raise TableError(f"is not a COCO captions file: {where} has no '{name}'")
    value = entry[name]
    if name != "caption" and isinstance(value, dict | list):
        raise TableError(f"is not a COCO captions file: {where} has a {type(value).__name__} as '{name}'")
    return value
