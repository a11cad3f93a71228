"""Images: bytes → RGB on white → shorter side resized → square crop. Needs Pillow and numpy only.

What is read, by its content and whatever the file is called: JPEG, PNG, WebP, AVIF, GIF, BMP and TIFF; of an
animation or of several pages the first one. EXIF orientation is applied. How pixels become 8-bit RGB:

palette, 1 bit, YCbCr, CMYK   Pillow's conversion; colour profiles are not applied
transparency                  laid over white
16 bits a channel             0 … 65535 becomes 0 … 255 (TIFF of 12 bits: 0 … 4095). Refused when nothing reaches
                              4096: that is 12-bit data in a 16-bit file, which would come out black
32-bit integers, floats, LAB  refused: the value of white is not known
"""

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from datamodules.config import Limits

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
# Endings of images that are not read.
UNREAD_SUFFIXES = (
    ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".svg", ".eps", ".psd", ".ico", ".tga", ".ppm", ".pgm", ".exr",
    ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
)  # fmt: skip
# What is stored and read as it is, by format; the rest becomes PNG.
SHARD_SUFFIXES = {"JPEG": ("jpg", "jpeg"), "MPO": ("jpg", "jpeg"), "PNG": ("png",), "WEBP": ("webp",)}

_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
# First bytes of formats that are not read, case-insensitively.
_FOREIGN = (
    (b"<svg", "SVG"), (b"<?xml", "XML or SVG"), (b"%!ps", "EPS"), (b"%pdf", "PDF"), (b"8bps", "Photoshop"),
    (b"\0\0\0\x0cjp  ", "JPEG 2000"), (b"\xff\x4f\xff\x51", "JPEG 2000"), (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cjxl ", "JPEG XL"), (b"\0\0\1\0", "ICO"),
)  # fmt: skip
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# libjpeg visits the whole image for every scan, however few bytes the scan has; real files have about ten.
_JPEG_SCANS = 200
# WebP's decoder holds an image several times.
_PIXELS_SHARE = {"WEBP": 3}
_STRIP_ROWS = 256
# The most that DEFLATE makes of a byte, and the fewest bits of a pixel by Pillow's mode (others: 1).
_DEFLATE_RATIO = 1032
_PNG_BITS = {"RGB": 24, "RGBA": 32, "LA": 16, "I;16": 16}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH = 258, 262, 322, 323
_WHITE_IS_ZERO = 0
# An enlargement with more pixels than this is not made: only its crop is.
_MODEST_PIXELS = 2**23


class BadImageError(Exception):
    """The bytes are not a readable image, or exceed the limits; the message is "reason: details"."""


DEFAULT_LIMITS = Limits()


def decode(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """Decode to RGB, upright, transparency over white; `.format` is Pillow's name of the format that the bytes have.

    The limits are checked before a pixel is decoded.

    Raises:
        BadImageError: empty, truncated or foreign bytes, an image beyond the limits or of values that have no
            stated conversion (see the top of this file), or no memory for it.
    """
    try:
        # Pillow's remarks on odd metadata would fill the log of every worker; what matters raises.
        with warnings.catch_warnings(action="ignore"):
            return _decode(data, limits)
    except BadImageError:
        raise
    except UnidentifiedImageError as error:  # its own words hold a memory address
        raise BadImageError(_foreign(data)) from error
    except Image.DecompressionBombError as error:  # beyond the greatest limits.max_pixels
        raise BadImageError(f"too many pixels: {error}") from error
    except MemoryError as error:
        raise BadImageError("not enough memory to decode it") from error
    except Exception as error:  # whatever a decoder raises on bytes that it cannot read
        words = " ".join(str(error).split())[:200]
        raise BadImageError(f"corrupt image: {words or type(error).__name__}") from error


def _decode(data: bytes, limits: Limits) -> Image.Image:
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > _JPEG_SCANS:
        raise BadImageError(f"corrupt image: a JPEG of more than {_JPEG_SCANS} scans")
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _check_size(image, limits)
        if image.format == "PNG":
            _check_filled(image, len(data))
        image.load()
        rgb = to_rgb(_upright(image))
        rgb.format = image.format
        return rgb


def _check_size(image: Image.Image, limits: Limits) -> None:
    width, height = image.size
    tags = getattr(image, "tag_v2", {})
    tile = int(tags.get(_TILE_WIDTH, 0)) * int(tags.get(_TILE_LENGTH, 0))
    if min(width, height) < 1:
        raise BadImageError(f"corrupt image: {width} × {height} px")
    share = _PIXELS_SHARE.get(str(image.format), 1)
    if max(width * height, tile) * share > limits.max_pixels:
        third = " / 3 for WebP" if share == 3 else ""
        raise BadImageError(
            f"too many pixels: {width} × {height}, the limit is max_pixels={limits.max_pixels}{third}"
        )
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise BadImageError(
            f"too elongated: {width} × {height}, the limit is max_aspect_ratio={limits.max_aspect_ratio:g}"
        )


def _check_filled(image: Image.Image, size: int) -> None:
    """Pillow leaves the rest of a PNG black whose data end early: refuse those of which that is certain."""
    width, height = image.size
    if width * height * _PNG_BITS.get(image.mode, 1) > 8 * _DEFLATE_RATIO * size:
        raise BadImageError(f"corrupt image: {size} bytes cannot hold {width} × {height} px")


def _upright(image: Image.Image) -> Image.Image:
    """The image with its EXIF orientation applied, if that can be read."""
    try:
        method = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF beside pixels that are fine
        return image
    return image if method is None else image.transpose(method)


def _foreign(data: bytes) -> str:
    """Description of bytes that no decoder accepts."""
    head = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not data:
        return "empty file"
    name = next((name for magic, name in _FOREIGN if head.startswith(magic.lower())), None)
    if data[4:8] == b"ftyp":
        name = "HEIC" if data[8:12] in _HEIC_BRANDS else None
    if head.startswith(LFS_POINTER):
        return "Git LFS pointer in place of the file: run `git lfs pull`"
    if head.startswith((b"<!doctype html", b"<html")):
        return "HTML in place of the image: download it again"
    if name is not None:
        return f"format not supported: {name}; convert it to JPEG or PNG"
    return "not an image: neither JPEG, PNG, WebP, AVIF, GIF, BMP nor TIFF, or its header is corrupt"


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode, by the rules at the top of this file. Raises BadImageError where there is none."""
    tags = getattr(image, "tag_v2", {})
    bits = max(tags.get(_BITS_PER_SAMPLE, (8,)), default=8)
    if image.mode == "LAB":
        raise BadImageError("values not supported: LAB; convert it to RGB")
    if image.mode in ("I", "F") or bits > 16:
        kind = "floats" if image.mode == "F" else "integers of more than 16 bits, or signed ones"
        raise BadImageError(f"values not supported: {kind}; convert it to 8 bits")
    if image.mode.startswith("I;16"):
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            raise BadImageError("values not supported: 16 bits with white as 0; convert it to 8 bits")
        image = _to_8_bits(image, white=4095 if bits == 12 else 65535)
    elif bits == 16:
        _refuse_black(max(high for _, high in _extrema(image)[:3]), least=16)
    if {"A", "a"} & set(image.getbands()) or "transparency" in image.info:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Row by row of strips, so that no second copy with transparency is held."""
    white = Image.new("RGB", image.size, "white")
    for top in range(0, image.height, _STRIP_ROWS):
        box = (0, top, image.width, min(image.height, top + _STRIP_ROWS))
        rgba = image.crop(box).convert("RGBA")
        white.paste(rgba, box, rgba.getchannel("A"))
    return white


def _extrema(image: Image.Image) -> list[tuple[int, int]]:
    found = image.getextrema()
    return [found] if len(image.getbands()) == 1 else list(found)  # type: ignore[list-item, arg-type]


def _to_8_bits(image: Image.Image, white: int) -> Image.Image:
    """Grey of 16 bits as "L" (Pillow's own conversion would clip it)."""
    grey = np.asarray(image).astype(np.uint32)
    _refuse_black(int(grey.max()), least=(white + 1) // 16)
    grey *= 255
    grey += white // 2
    grey //= white
    return Image.fromarray(grey.astype(np.uint8), "L")


def _refuse_black(brightest: int, least: int) -> None:
    if 0 < brightest < least:
        raise BadImageError(
            "values not supported: 12 or fewer bits in a file of 16; stretch it to 16 bits or convert it to 8"
        )


def scaled_size(width: int, height: int, shorter: int) -> tuple[int, int]:
    """(width, height) after the shorter side has become `shorter`; the longer one is rounded, never below it."""
    ratio = shorter / min(width, height)
    return max(shorter, round(width * ratio)), max(shorter, round(height * ratio))


def resize_shorter(image: Image.Image, shorter: int) -> Image.Image:
    """Antialiased resize (Lanczos when shrinking, bicubic when growing) of the shorter side to `shorter` px."""
    size = scaled_size(image.width, image.height, shorter)
    return image if size == image.size else image.resize(size, _filter(image, size))


def resized_crop(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """The box (left, top, right, bottom) of the image resized to `size` (width, height)."""
    # Resizing the crop alone rounds differently by a few levels here and there, so ordinary images are resized first;
    # a strip whose enlargement is out of all proportion to the crop is not.
    if size[0] * size[1] <= max(_MODEST_PIXELS, image.width * image.height):
        resized = image if size == image.size else image.resize(size, _filter(image, size))
        return resized.crop(box)
    across, down = image.width / size[0], image.height / size[1]
    left, top, right, bottom = box
    source = (left * across, top * down, min(image.width, right * across), min(image.height, bottom * down))
    return image.resize((right - left, bottom - top), _filter(image, size), source)


def _filter(image: Image.Image, size: tuple[int, int]) -> Image.Resampling:
    return Image.Resampling.LANCZOS if size[0] < image.width else Image.Resampling.BICUBIC


def encode_png(image: Image.Image) -> bytes:
    """Lossless bytes; the same image gives the same bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=False)
    return buffer.getvalue()


def encode_jpeg(image: Image.Image, quality: int = 95) -> bytes:
    """JPEG without chroma subsampling, for images that came as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def square_crop(width: int, height: int, side: int, where: tuple[float, float]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the crop of an image whose shorter side is `side`.

    where: (vertical, horizontal) share in [0, 1].
    """
    top, left = round((height - side) * where[0]), round((width - side) * where[1])
    return left, top, left + side, top + side
