"""What experiments.evaluate_tokenizer prints, writes and draws. Not a command itself."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from switti.files import atomic_write
from switti.metrics.tokenizer_quality import TokenizerReport, reconstruct
from switti.models.rqvae import RQVAE
from switti.sampling.pictures import captioned_grid, to_pil

AMPLIFIED = 4  # differences are drawn so many times as strong


def write_tables(folder: Path, reports: Mapping[str, TokenizerReport], keys: list[str]) -> None:
    """Prints the table side by side; writes it as table.csv and every picture's figures as pictures.csv."""
    rows = [["metric", "scale", *reports], *comparison(reports)]
    show(rows)
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


def show(rows: list[list[object]]) -> None:
    """On the screen, in columns."""
    texts = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in texts) for column in range(len(texts[0]))]
    for row in texts:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def picture_rows(reports: Mapping[str, TokenizerReport], keys: list[str]) -> Iterable[list[object]]:
    names = list(next(iter(reports.values())).pictures[0])
    yield ["key", "tokenizer", *names]
    for number, key in enumerate(keys):
        for tokenizer, report in reports.items():
            yield [key, tokenizer, *(report.pictures[number][name] for name in names)]


def write_csv(path: Path, rows: Iterable[list[object]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(rows)


def worst_first(reports: Mapping[str, TokenizerReport]) -> list[int]:
    """Numbers of the pictures, the lowest PSNR (mean over the tokenizers) first."""
    psnrs = [[row["psnr"] for row in report.pictures] for report in reports.values()]
    return sorted(range(len(psnrs[0])), key=lambda number: sum(values[number] for values in psnrs))


def draw_sheet(
    path: Path,
    models: Mapping[str, RQVAE],
    reports: Mapping[str, TokenizerReport],
    originals: Mapping[int, Tensor],
    keys: list[str],
) -> None:
    """A row a picture: the original, then each tokenizer's reconstruction and its amplified difference.

    originals: number of the picture → [3, H, W] in [-1, 1]. keys: of all pictures.
    """
    pictures, captions = [], []
    for number, image_3HW in originals.items():
        target_3HW = (image_3HW + 1) / 2
        shown = [target_3HW]
        captions.append(keys[number].rsplit("/", 1)[-1])
        for name, model in models.items():
            found_3HW = reconstruct(model, image_3HW[None])[0].cpu()
            shown += [found_3HW, AMPLIFIED * (found_3HW - target_3HW).abs()]
            captions += [
                f"{name} {reports[name].pictures[number]['psnr']:.1f} dB",
                f"difference, {AMPLIFIED}-fold",
            ]
        pictures += to_pil(torch.stack(shown))
    sheet = captioned_grid(pictures, captions, columns=1 + 2 * len(models))
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG")
