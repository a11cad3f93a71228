"""Pictures: bytes → RGB on white → scaled by the shorter side → cropped. Needs Pillow and numpy only."""

import io
import struct
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SHARD_SUFFIXES = ("jpg", "jpeg", "png", "webp")  # what is stored and read as it is; the rest becomes PNG


class DamagedPictureError(Exception):
    """The bytes are no picture that can be decoded to the end."""


def decode(data: bytes) -> Image.Image:
    """Decode to RGB, upright, transparency over white.

    Raises:
        DamagedPictureError: empty, truncated or foreign bytes, or a picture beyond Pillow's size guard.
    """
    try:
        # Pillow's remarks on odd metadata would fill the log of every worker; what matters raises.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:  # its own words hold a memory address
        raise DamagedPictureError("not a picture of a known format") from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error) as error:
        raise DamagedPictureError(str(error) or type(error).__name__) from error
    except Image.DecompressionBombError as error:
        raise DamagedPictureError(str(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode: alpha is laid over white, 16-bit grey is scaled (Pillow's own conversion would clip it)."""
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image).astype(np.float64) / 257.0
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8), "L")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def scaled_size(width: int, height: int, shorter: int) -> tuple[int, int]:
    """(width, height) after the shorter side has become `shorter`; the longer one is rounded, never below it."""
    ratio = shorter / min(width, height)
    return max(shorter, round(width * ratio)), max(shorter, round(height * ratio))


def resize_shorter(image: Image.Image, shorter: int) -> Image.Image:
    """Antialiased resize (Lanczos when shrinking, bicubic when growing) of the shorter side to `shorter` px."""
    size = scaled_size(image.width, image.height, shorter)
    if size == image.size:
        return image
    method = Image.Resampling.LANCZOS if size[0] < image.width else Image.Resampling.BICUBIC
    return image.resize(size, method)


def encode_png(image: Image.Image) -> bytes:
    """Lossless bytes; the same picture gives the same bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=False)
    return buffer.getvalue()


def encode_jpeg(image: Image.Image, quality: int = 95) -> bytes:
    """JPEG without chroma subsampling, for pictures that came as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def square_crop(width: int, height: int, side: int, where: tuple[float, float]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the crop of an image whose shorter side is `side`.

    where: (vertical, horizontal) share in [0, 1].
    """
    top, left = round((height - side) * where[0]), round((width - side) * where[1])
    return left, top, left + side, top + side
