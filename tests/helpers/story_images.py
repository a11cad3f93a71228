"""Images that the stories train on."""

from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "orange")


SHAPES = ("circle", "square")


def draw_pictures(folder: Path) -> None:
    folder.mkdir()
    for i in range(24):
        colour, shape = COLOURS[i % 4], SHAPES[i % 2]
        picture = Image.new("RGB", (20, 16), "white")
        draw = ImageDraw.Draw(picture)
        box = (2 + i % 5, 2, 12 + i % 5, 12)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
        picture.save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"{colour} {shape}")
