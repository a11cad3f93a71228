"""Files of sampled images: format by the name's suffix, settings in the metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switti.errors import UserError
from switti.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
KEY = "switti"  # of the text entry in a PNG
_DESCRIPTION = 0x010E  # EXIF: ImageDescription
_LARGEST_SIDE = {"JPEG": 65_500, "WEBP": 16_383}  # px
_LARGEST_TEXT = {"JPEG": 65_000, "WEBP": 65_000}  # bytes of EXIF


def format_of(path: Path) -> str:
    """PNG, JPEG or WEBP by the name's ending. Raises UserError for any other."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise UserError(f"{path} must end in {', '.join(FORMATS)}, which says the format") from None


def check_image(path: Path, size: tuple[int, int], details: Mapping[str, Any]) -> None:
    """UserError if the file's format cannot hold an image of (width, height) px with `details`."""
    kind = format_of(path)
    if max(size) > _LARGEST_SIDE.get(kind, max(size)):
        raise UserError(
            f"{path}: {kind} holds at most {_LARGEST_SIDE[kind]} px a side, not {size[0]} × {size[1]}; give a .png"
        )
    if len(json.dumps(details)) > _LARGEST_TEXT.get(kind, len(json.dumps(details))):
        raise UserError(f"{path}: the prompts and settings are too long for {kind}'s metadata; give a .png")


def save_image(image: "Image.Image", path: Path, details: Mapping[str, Any]) -> None:
    """Write an image with `details` as JSON in its metadata, atomically.

    PNG: text entry "switti". JPEG (without chroma subsampling) and WebP, both of quality 95: EXIF's ImageDescription.
    """
    from PIL.Image import Exif
    from PIL.PngImagePlugin import PngInfo

    kind, text = format_of(path), json.dumps(details)
    options: dict[str, Any]
    if kind == "PNG":
        info = PngInfo()
        info.add_text(KEY, text)
        options = {"pnginfo": info}
    else:
        exif = Exif()
        exif[_DESCRIPTION] = text
        options = {"quality": 95, "exif": exif} | ({"subsampling": 0} if kind == "JPEG" else {})
    with atomic_write(path) as temporary:
        image.save(temporary, format=kind, **options)
