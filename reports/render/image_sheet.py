"""Sampled images as one PNG for a paper or an issue: a row for each variant, a column for each caption."""

from pathlib import Path

from PIL import Image, ImageDraw

from reports.data.images import open_image
from reports.render.document import ImageGrid
from switti.files import atomic_write
from switti.sampling.image_grid import drawable, font

COLUMNS = 8
# Pixels.
_SIDE, _GAP, _LABEL, _LETTER = 128, 6, 22, 13


def save_sheet(block: ImageGrid, folder: Path) -> None:
    """`<name>.png`: the first captions' images under each other, with the variants' names above their rows."""
    rows = block.rows[:COLUMNS]
    width = len(rows) * (_SIDE + _GAP) + _GAP
    height = len(block.columns) * (_LABEL + _SIDE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, label in enumerate(block.columns):
        top = i * (_LABEL + _SIDE + _GAP)
        place = (_GAP, top + _LABEL / 2 + _GAP / 2)
        draw.text(place, drawable(label), fill="black", font=font(_LETTER), anchor="lm")
        for j, (_, _, images) in enumerate(rows):
            place = (_GAP + j * (_SIDE + _GAP), top + _LABEL)
            if (path := images[i].path) is not None:
                sheet.paste(_square(path), place)
            else:
                draw.rectangle((*place, place[0] + _SIDE, place[1] + _SIDE), outline="#d6dade")
    with atomic_write(folder / f"{block.name}.png") as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def _square(path: Path) -> Image.Image:
    """Fitted into a square: small images by whole pixels, large ones smoothly."""
    image = open_image(path)
    scale = _SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
    square = Image.new("RGB", (_SIDE, _SIDE), "white")
    square.paste(image, ((_SIDE - image.width) // 2, (_SIDE - image.height) // 2))
    return square
