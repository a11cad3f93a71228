"""Sampled images of a run folder: what may be opened, and how it is embedded into a page."""

import base64
import warnings
from io import BytesIO
from pathlib import Path

from PIL import Image

from switti.errors import UserError
from switti.files import read_bytes

_FORMATS = ("PNG", "JPEG", "WEBP")
_MAX_BYTES = 64 << 20
_MAX_PIXELS = 16 << 20
ABSENT = "is not there"
_SIDE = 256  # pixels; larger images are shrunk, or a page of 512 px samples would weigh tens of megabytes


def read_image(path: Path) -> tuple[bytes, Image.Image]:
    """A file's bytes and the image in them, decoded; its mode and format are as stored.

    Raises FileNotFoundError, and UserError unless it is a regular file of moderate size with an intact image.
    """
    try:
        content = read_bytes(path, _MAX_BYTES)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(content), formats=_FORMATS)
        if image.width * image.height > _MAX_PIXELS:
            raise UserError(f"{path} has {image.width} × {image.height} pixels, too many for a sample")
        image.load()
    except UserError:
        raise
    except Exception as error:
        # A decoder may raise anything on corrupt bytes.
        raise UserError(f"{path} is not a readable image: {error}") from None
    return content, image


def open_image(path: Path) -> Image.Image:
    """A file's image in RGB, as `read_image`."""
    return read_image(path)[1].convert("RGB")


def problem_of(path: Path, run: Path) -> str | None:
    """Why an image that an index names cannot be shown, as the end of a sentence about it; None if it can.

    It must lie below the run folder: an index could otherwise put any file of this machine into a report.
    """
    try:
        if not path.resolve().is_relative_to(run.resolve()):
            return "is outside of the run folder"
        read_image(path)
    except FileNotFoundError:
        return ABSENT
    except UserError as error:
        return str(error).removeprefix(f"{path} ")
    except (OSError, ValueError, RuntimeError):
        # A null byte, a circle of links.
        return "is not a file name"
    return None


def data_uri(path: Path) -> str:
    """An image as a PNG data URI, at most 256 px a side; a PNG that is small enough keeps its bytes."""
    content, image = read_image(path)
    if image.format != "PNG" or max(image.size) > _SIDE:
        image = image.convert("RGB")
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        stream = BytesIO()
        image.save(stream, format="PNG", optimize=True)
        content = stream.getvalue()
    return encoded(content, "png")


def encoded(content: bytes, kind: str) -> str:
    """The bytes of an image file as a data URI; kind: "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
