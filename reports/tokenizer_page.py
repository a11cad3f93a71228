"""Page and sheet of tokenizers side by side: originals, reconstructions and differences, worst first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image
from torch import Tensor

from evaluation.tokenizer_tables import comparison, in_words
from reports.data.images import encoded
from reports.render.template import ENVIRONMENT, style
from switti.files import atomic_write
from switti.metrics.tokenizer_quality import TokenizerReport, reconstruct
from switti.sampling.image_grid import captioned_grid, to_pil
from switti.tokenizer.rqvae import RQVAE

# Factor by which differences are amplified.
AMPLIFIED = 4
# Pixels; larger images go into the page as JPEG, or it would weigh hundreds of megabytes.
LOSSLESS_SIDE = 256


@dataclass(frozen=True)
class Shown:
    """One image. cells: (description, caption, image): the original, then two for each tokenizer."""

    key: str
    cells: list[tuple[str, str, Image.Image]]


def show_images(
    models: Mapping[str, RQVAE],
    reports: Mapping[str, TokenizerReport],
    originals: Mapping[int, Tensor],
    keys: list[str],
) -> list[Shown]:
    """originals: number of the image → [3, H, W] in [-1, 1]. keys: of all images."""
    shown = []
    for number, image_3HW in originals.items():
        target_3HW = (image_3HW + 1) / 2
        short = keys[number].rsplit("/", 1)[-1]
        cells = [("original", short, to_pil(target_3HW[None])[0])]
        for name, model in models.items():
            output_3HW = reconstruct(model, image_3HW[None])[0].cpu()
            difference_3HW = AMPLIFIED * (output_3HW - target_3HW).abs()
            figures = reports[name].images[number]
            cells.append((name, f"{name} {figures['psnr']:.1f} dB", to_pil(output_3HW[None])[0]))
            words = f"{name}, difference ×{AMPLIFIED}"
            cells.append((words, words, to_pil(difference_3HW[None])[0]))
        shown.append(Shown(keys[number], cells))
    return shown


def write_sheet(path: Path, shown: Sequence[Shown]) -> None:
    """All in one PNG, a row an image."""
    cells = [cell for item in shown for cell in item.cells]
    sheet = captioned_grid([c[2] for c in cells], [c[1] for c in cells], columns=len(shown[0].cells))
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG")


def write_page(
    path: Path, reports: Mapping[str, TokenizerReport], shown: Sequence[Shown], notes: Sequence[str]
) -> None:
    """One self-contained HTML file: the table, then the images, worst first."""
    rows = [(metric, scale, values) for metric, scale, *values in map(in_words, comparison(reports))]
    text = ENVIRONMENT.get_template("tokenizers.html.jinja").render(
        title=f"Tokenizers: {', '.join(reports)}",
        contents=[("table", "Table"), ("images", "Images")],
        style=style("page.css", "tokenizers.css"),
        notes=notes,
        names=list(reports),
        rows=rows,
        shown=shown,
        data_uri=_data_uri,
    )
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _data_uri(image: Image.Image) -> str:
    stream = BytesIO()
    kind = "png" if max(image.size) <= LOSSLESS_SIDE else "jpeg"
    # The first is for PNG, the second for JPEG; each format ignores the other's.
    image.save(stream, kind, optimize=kind == "png", quality=95)
    return encoded(stream.getvalue(), kind)
