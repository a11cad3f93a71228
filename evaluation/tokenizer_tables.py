"""The tokenizers' table on the screen and as CSV. Not a command itself."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from switti.metrics.tokenizer_quality import TokenizerReport
from switti.tables import aligned, write_csv


def write_tables(folder: Path, reports: Mapping[str, TokenizerReport], keys: list[str]) -> None:
    """Prints the table side by side; writes it as table.csv and every picture's figures as pictures.csv."""
    rows: list[list[object]] = [["metric", "scale", *reports], *comparison(reports)]
    print("\n".join(aligned([in_words(row) for row in rows])))
    write_csv(folder / "table.csv", rows)
    write_csv(folder / "pictures.csv", picture_rows(reports, keys))


def comparison(reports: Mapping[str, TokenizerReport]) -> list[list[object]]:
    """[metric, scale or "", value of each tokenizer or ""]: figures of whole pictures, then those by scale."""
    first, found = next(iter(reports.values())), list(reports.values())
    rows: list[list[object]] = [[name, "", *(r.values[name] for r in found)] for name in first.values]
    for name in first.by_scale:
        for scale in range(max(len(report.by_scale[name]) for report in found)):
            values = [r.by_scale[name][scale] if scale < len(r.by_scale[name]) else "" for r in found]
            rows.append([name, scale, *values])
    return rows


def in_words(row: list[object]) -> list[str]:
    """Cells as text, numbers to four digits."""
    return [f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row]


def picture_rows(reports: Mapping[str, TokenizerReport], keys: list[str]) -> Iterable[list[object]]:
    names = list(next(iter(reports.values())).pictures[0])
    yield ["key", "tokenizer", *names]
    for number, key in enumerate(keys):
        for tokenizer, report in reports.items():
            yield [key, tokenizer, *(report.pictures[number][name] for name in names)]


def worst_first(reports: Mapping[str, TokenizerReport]) -> list[int]:
    """Numbers of the pictures, the lowest PSNR (mean over the tokenizers) first."""
    psnrs = [[row["psnr"] for row in report.pictures] for report in reports.values()]
    return sorted(range(len(psnrs[0])), key=lambda number: sum(values[number] for values in psnrs))
