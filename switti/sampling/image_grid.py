"""Conversion of tensors to PIL images, and captioned grids."""

import textwrap
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor

CAPTION_LINES = 2
MARGIN = 6


def to_pil(images_B3HW: "Tensor") -> list[Image.Image]:
    """Images in [0, 1] as 8-bit RGB, rounded to the nearest value."""
    pixels = (images_B3HW.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]


def _font_file() -> Path:
    """DejaVu Sans, which matplotlib ships: Pillow's own font has neither × nor – nor accented letters."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_file(), size)


@lru_cache
def _signs() -> frozenset[int]:
    """Code points that the font can draw."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(_font_file())).get_charmap())


def drawable(text: str) -> str:
    """The text with ‹U+732B› and the like for what the font cannot draw, instead of empty boxes; one blank for others.

    Signs without a shape of their own, such as what joins the parts of an emoji, go.
    """
    known = _signs()
    drawn = []
    for sign in text:
        if sign.isspace():
            drawn.append(" ")
        elif ord(sign) in known and sign.isprintable():
            drawn.append(sign)
        elif unicodedata.category(sign) not in ("Cc", "Cf", "Mn", "Me"):
            drawn.append(f"‹U+{ord(sign):04X}›")
    return "".join(drawn)


SMALLEST = 128  # px; narrower images are enlarged in a grid


def _cells(width: int, height: int) -> tuple[int, int, int, int]:
    """(factor of enlargement, line height, cell width, cell height) of images of a size in px."""
    factor = max(1, -(-SMALLEST // width))
    line = max(12, width * factor // 9)
    return factor, line, width * factor + MARGIN, height * factor + CAPTION_LINES * line + MARGIN


def grid_size(count: int, width: int, height: int, columns: int) -> tuple[int, int]:
    """(width, height) in px of a captioned grid of `count` images."""
    _, _, cell_width, cell_height = _cells(width, height)
    columns = min(columns, count)
    return columns * cell_width + MARGIN, -(-count // columns) * cell_height + MARGIN


def captioned_grid(images: Sequence[Image.Image], captions: Sequence[str], columns: int = 8) -> Image.Image:
    """One sheet of all images with their captions below, row by row.

    Images narrower than `SMALLEST` px are enlarged by a whole factor without smoothing.
    """
    factor, line, cell_width, cell_height = _cells(*images[0].size)
    width, height = images[0].width * factor, images[0].height * factor
    letter = font(max(10, width // 12))
    sheet = Image.new("RGB", grid_size(len(images), *images[0].size, columns), "white")
    columns = min(columns, len(images))
    draw = ImageDraw.Draw(sheet)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = MARGIN + index % columns * cell_width
        y = MARGIN + index // columns * cell_height
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        letters = max(8, int(width / (letter.getlength("n") or 1)))
        for number, text in enumerate(textwrap.wrap(drawable(caption), letters)[:CAPTION_LINES]):
            draw.text((x, y + height + 2 + number * line), text, fill="black", font=letter)
    return sheet
