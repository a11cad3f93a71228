"""Comparison table of tokenizers, on the screen and as CSV."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from switti.metrics.tokenizer_quality import TokenizerReport
from switti.tables import aligned, write_csv


def write_tables(folder: Path, reports: Mapping[str, TokenizerReport], keys: list[str]) -> None:
    """Print the table; write it as table.csv, and the metrics of every image as images.csv."""
    rows: list[list[object]] = [["metric", "scale", *reports], *comparison(reports)]
    print("\n".join(aligned([in_words(row) for row in rows])))
    write_csv(folder / "table.csv", rows)
    write_csv(folder / "images.csv", image_rows(reports, keys))


def comparison(reports: Mapping[str, TokenizerReport]) -> list[list[object]]:
    """[metric, scale or "", value of each tokenizer or ""]: metrics of the final images, then those by scale."""
    first, every = next(iter(reports.values())), list(reports.values())
    rows: list[list[object]] = [[name, "", *(r.values[name] for r in every)] for name in first.values]
    for name in first.by_scale:
        for scale in range(max(len(report.by_scale[name]) for report in every)):
            values = [r.by_scale[name][scale] if scale < len(r.by_scale[name]) else "" for r in every]
            rows.append([name, scale, *values])
    return rows


def in_words(row: list[object]) -> list[str]:
    """Cells as text, numbers to four digits."""
    return [f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row]


def image_rows(reports: Mapping[str, TokenizerReport], keys: list[str]) -> Iterable[list[object]]:
    names = list(next(iter(reports.values())).images[0])
    yield ["key", "tokenizer", *names]
    for number, key in enumerate(keys):
        for tokenizer, report in reports.items():
            yield [key, tokenizer, *(report.images[number][name] for name in names)]


def worst_first(reports: Mapping[str, TokenizerReport]) -> list[int]:
    """Numbers of the images, the lowest PSNR (mean over the tokenizers) first."""
    psnrs = [[row["psnr"] for row in report.images] for report in reports.values()]
    return sorted(range(len(psnrs[0])), key=lambda number: sum(values[number] for values in psnrs))
