"""Decoding of single images: formats, values, limits, memory, and bytes that are not what they seem."""

import io
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from datamodules.config import DataConfig, Limits
from datamodules.images import BadImageError, decode, resized_crop, scaled_size, square_crop
from datamodules.shards.samples import Framing, make_sample
from switti.errors import UserError


def encoded(image: Image.Image, name: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def smooth(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A coloured gradient with some noise, so that every byte of a file matters."""
    random = np.random.default_rng(width * height)
    small = Image.fromarray(random.integers(0, 256, (5, 7, 4), dtype=np.uint8), "RGBA")
    large = np.asarray(small.resize((width, height))).astype(int) + random.integers(-3, 4, (height, width, 1))
    image = Image.fromarray(large.clip(0, 255).astype(np.uint8), "RGBA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


def refused(data: bytes, limits: Limits | None = None) -> str:
    with pytest.raises(BadImageError) as caught:
        decode(data, *([limits] if limits else []))
    return str(caught.value)


# ---- formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "MPO"])
def test_every_format_of_the_list_is_read_by_its_content(name: str) -> None:
    image = smooth(20, 16)
    found = decode(encoded(image, name))
    assert (found.mode, found.size, found.format) == ("RGB", (20, 16), name.replace("MPO", "JPEG"))
    assert np.abs(np.asarray(found).astype(int) - np.asarray(image).astype(int)).mean() < 25


@pytest.mark.parametrize(
    "name, said", [("EPS", "EPS"), ("JPEG2000", "JPEG 2000"), ("ICO", "ICO"), ("PDF", "PDF"), ("PPM", "not an image")]
)  # fmt: skip
def test_formats_outside_the_list_are_not_opened(name: str, said: str) -> None:
    assert said in refused(encoded(smooth(16, 16), name))


def test_ghostscript_is_never_started(monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    refused(encoded(smooth(16, 16), "EPS"))


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "HTML"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
        (b'<?xml version="1.0"?><svg/>', "SVG"),
        (b"no picture", "not an image"),
    ],
)
def test_what_lies_in_place_of_an_image_is_named(data: bytes, said: str) -> None:
    assert said in refused(data)


def test_of_an_animation_and_of_several_pages_the_first_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    for name in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if name == "WEBP" else {}
        data = encoded(frames[0], name, save_all=True, append_images=frames[1:], **options)
        assert decode(data).getpixel((4, 4)) == (255, 0, 0)


# ---- values -----------------------------------------------------------------------------------------------------


def test_16_bit_grey_is_scaled_and_12_bits_in_it_are_refused() -> None:
    values = np.arange(0, 65536, 255, dtype=np.uint16).reshape(1, -1)[:, :240]
    values[0, -1] = 65535
    for name in ("PNG", "TIFF"):
        found = np.asarray(decode(encoded(Image.fromarray(values), name), Limits(10**6, 1000)))[0, :, 0]
        np.testing.assert_array_equal(found, np.rint(values[0] / 257))
    for brightest in (1, 255, 1023, 4095):
        dark = encoded(Image.fromarray(np.full((4, 4), brightest, np.uint16)), "TIFF")
        assert "12 or fewer bits" in refused(dark)
    black = decode(encoded(Image.fromarray(np.zeros((4, 4), np.uint16)), "PNG"))
    assert black.getextrema() == ((0, 0),) * 3


def tiff(
    values: np.ndarray, bits: tuple[int, ...], photometric: int = 1, more: list[tuple] | None = None
) -> bytes:
    """An uncompressed little-endian TIFF of these bytes, written by hand."""
    height, width = values.shape[:2]
    data = values.tobytes()
    extra = struct.pack(f"<{len(bits)}H", *bits) if len(bits) > 2 else b""
    entries = [
        (256, 3, 1, width), (257, 3, 1, height),
        (258, 3, len(bits), 8 if extra else bits[0]), (259, 3, 1, 1), (262, 3, 1, photometric),
        (273, 4, 1, 8 + len(extra)), (277, 3, 1, len(bits)), (278, 3, 1, height), (279, 4, 1, len(data)),
    ]  # fmt: skip
    entries += more or []
    table = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(extra) + len(data)) + extra + data + table + bytes(4)


def test_colour_of_16_bits_keeps_its_high_byte_unless_only_12_are_used() -> None:
    values = np.full((4, 4, 3), (0, 0x8001, 0xFFFF), np.uint16)
    assert decode(tiff(values, (16, 16, 16), 2)).getpixel((0, 0)) == (0, 0x80, 0xFF)
    assert "12 or fewer bits" in refused(tiff(values // 16, (16, 16, 16), 2))


def test_12_bit_tiff_reaches_white() -> None:
    packed = np.frombuffer(bytes([0xFF, 0xF0, 0x00] * 8), np.uint8).reshape(8, 3)  # 4095, 0
    data = tiff(packed, (12,)).replace(struct.pack("<HHII", 256, 3, 1, 3), struct.pack("<HHII", 256, 3, 1, 2))
    found = np.asarray(decode(data))
    assert found.shape == (8, 2, 3) and found[0, :, 0].tolist() == [255, 0]


def test_values_without_a_known_white_are_refused_by_name() -> None:
    for values, said in [
        (np.arange(256, dtype=np.int32).reshape(16, 16), "integers"),
        (np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8), "floats"),
        (np.linspace(0, 255, 64, dtype=np.float32).reshape(8, 8), "floats"),
    ]:
        assert said in refused(encoded(Image.fromarray(values), "TIFF"))
    assert "LAB" in refused(encoded(Image.new("LAB", (8, 8), (50, 10, 20)), "TIFF"))
    grey = Image.fromarray(np.full((4, 4), 40000, np.uint16))
    assert "white as 0" in refused(encoded(grey, "TIFF", tiffinfo={262: 0}))


def test_cmyk_palette_and_bilevel() -> None:
    for name in ("JPEG", "TIFF"):
        found = np.asarray(decode(encoded(Image.new("CMYK", (16, 16), (0, 128, 255, 0)), name)))
        assert np.abs(found.astype(int) - (255, 127, 0)).max() <= 3
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((0, 0), 1)
    found = decode(encoded(palette, "PNG", transparency=1))
    assert found.getpixel((0, 0)) == (255, 255, 255) and found.getpixel((1, 1)) == (255, 0, 0)
    assert decode(encoded(Image.new("1", (4, 4), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_white_in_every_row(mode: str) -> None:
    """More rows than are laid over white at a time, against the formula."""
    image = smooth(9, 700, "RGBA").convert(mode)
    found = np.asarray(decode(encoded(image, "PNG"), Limits(max_aspect_ratio=100))).astype(float)
    rgba = np.asarray(image.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    np.testing.assert_allclose(found, rgba[..., :3] * alpha + 255 * (1 - alpha), atol=1)


def test_damaged_exif_costs_the_orientation_alone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(smooth(16, 8), "JPEG", exif=exif)
    assert decode(data).size == (8, 16)
    start = data.index(b"Exif\0\0") + 6
    assert decode(data[:start] + b"XXXX" + data[start + 4 :]).size == (16, 8)


# ---- limits and memory --------------------------------------------------------------------------------------------


def test_limits_are_checked_before_anything_is_decoded() -> None:
    assert "max_pixels=1000" in refused(png_header(40, 26), Limits(1000, 32.0))
    assert "truncated" in refused(png_header(40, 25), Limits(1000, 32.0))
    assert "max_aspect_ratio=3" in refused(png_header(31, 10), Limits(1000, 3.0))
    assert "truncated" in refused(png_header(30, 10), Limits(1000, 3.0))
    began = time.perf_counter()
    for width, height in [
        (1, 1_000_000),
        (1_000_000, 1),
        (12_000, 12_000),
        (40_000, 40_000),
        (2**31 - 1, 2**31 - 1),
    ]:
        refused(png_header(width, height))
    assert time.perf_counter() - began < 0.5
    assert "/ 3 for WebP" in refused(encoded(smooth(20, 20), "WEBP"), Limits(1000, 3.0))
    tiles = [(322, 3, 1, 16384), (323, 3, 1, 16384)]
    assert "too many pixels" in refused(tiff(np.zeros((4, 4), np.uint8), (8,), more=tiles))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_a_png_whose_data_cannot_fill_it_is_refused_and_the_emptiest_is_read(mode: str) -> None:
    """One color compresses as well as anything can; the same data under a larger header leave the rest black."""
    empty = Image.new(mode, (3000, 2000))
    if mode == "P":
        empty.putpalette([200, 100, 50])
    data = encoded(empty, "PNG", compress_level=9)
    assert decode(data).size == (3000, 2000)
    header = struct.pack(">II", 9000, 9000) + data[24:29]
    larger = data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]
    with pytest.raises(BadImageError, match=r"bytes cannot hold 9000 × 9000 px"):
        decode(larger)


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = encoded(smooth(64, 64), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    decode(data)
    assert "scans" in refused(data[:-2] + data[last:-2] * 300 + data[-2:])


def test_no_memory_is_damage_of_that_image(monkeypatch) -> None:
    def none_left(image):
        raise MemoryError

    monkeypatch.setattr("datamodules.images.to_rgb", none_left)
    assert "memory" in refused(encoded(smooth(8, 8), "PNG"))


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (7, 200), (200, 7), (20, 20), (16, 16), (600, 401)])
def test_ordinary_crops_are_those_of_the_resized_image(size: tuple[int, int]) -> None:
    image = smooth(*size)
    scaled = scaled_size(*size, 16)
    box = square_crop(*scaled, 16, (0.3, 0.8))
    method = Image.Resampling.LANCZOS if scaled[0] < size[0] else Image.Resampling.BICUBIC
    expected = image.resize(scaled, method).crop(box)
    assert resized_crop(image, scaled, box).tobytes() == expected.tobytes()


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000), (3000, 3)])
def test_the_crop_of_a_strip_is_that_of_its_enlargement_up_to_rounding(size: tuple[int, int]) -> None:
    image = smooth(*size)
    scaled = scaled_size(*size, 128)
    assert scaled[0] * scaled[1] > 2**23 or size == (3000, 3)
    for share in (0.0, 0.4, 1.0):
        box = square_crop(*scaled, 128, (share, share))
        expected = np.asarray(image.resize(scaled, Image.Resampling.BICUBIC).crop(box)).astype(int)
        found = np.asarray(resized_crop(image, scaled, box)).astype(int)
        assert np.abs(found - expected).max() <= 2


def test_a_strip_costs_what_it_shows() -> None:
    """A million pixels in one row, enlarged to 64 px: 64 million pixels if the row were enlarged before the crop."""
    data = encoded(Image.new("L", (1_000_000, 1), 128), "PNG")
    framing = Framing(64, 512, True, 0.0, Limits(max_aspect_ratio=1e6))
    make_sample(data, "", None, "k", 1, framing)
    code = (
        "import resource, sys; from PIL import Image; from datamodules.images import *\n"
        "from datamodules.config import Limits; data = sys.stdin.buffer.read()\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "def crop(image, side):\n"
        "    size = scaled_size(*image.size, side)\n"
        "    return resized_crop(image, size, square_crop(*size, side, (0.5, 0.5)))\n"
        "crop(Image.new('RGB', (20, 10)), 8); before = peak()\n"
        "crop(decode(data, Limits(max_aspect_ratio=1e6)), 512); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert float(done.stdout) < 50


@pytest.mark.parametrize(
    "name, mode, options",
    [
        ("JPEG", "RGB", {"progressive": True, "subsampling": 0}), ("JPEG", "CMYK", {"progressive": True}),
        ("PNG", "RGBA", {}), ("PNG", "LA", {}), ("PNG", "I;16", {}), ("PNG", "P", {"transparency": 0}),
        ("WEBP", "RGBA", {"lossless": True, "quality": 0, "method": 0}), ("AVIF", "RGBA", {"speed": 10}),
        ("TIFF", "RGB", {}), ("GIF", "P", {}),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_decoding_takes_at_most_four_times_the_image_and_200_mb(
    tmp_path, name: str, mode: str, options: dict
) -> None:
    width, height = 6400, 6000
    image = smooth(80, 75, "RGBA").resize((width, height))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257)
    elif mode != "RGBA":
        image = image.convert("RGB").convert(mode)
    (tmp_path / "image").write_bytes(encoded(image, name, **options))
    code = (
        "import resource, sys; from datamodules.images import decode; data = open(sys.argv[1], 'rb').read()\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); decode(data); print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "image"], capture_output=True, check=True, text=True
    )
    assert float(done.stdout) < 4 * width * height * 3 + 200e6


def test_limits_are_settings_with_bounds() -> None:
    wrong = [
        ("max_pixels", 0),
        ("max_pixels", 10**9),
        ("max_aspect_ratio", 0.5),
        ("max_aspect_ratio", float("nan")),
    ]
    for setting, value in wrong:
        with pytest.raises(UserError, match=r"data\.max_"):
            DataConfig(**{setting: value}).validate("data")
    data = encoded(smooth(64, 8), "PNG")
    with pytest.raises(BadImageError, match="too elongated"):
        make_sample(data, "", None, "k", 1, Framing(8, 512, True, 0.0, Limits(max_aspect_ratio=4)))


# ---- hostile bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "MPO"])
def test_damaged_bytes_give_an_image_or_damage_and_nothing_else(name: str) -> None:
    """Bytes flipped, cut out, repeated and cut off."""
    random = np.random.default_rng(7)
    options = {"TIFF": {"compression": "tiff_lzw"}}.get(name, {})
    frames = {"save_all": True, "append_images": [smooth(12, 9)]} if name in ("GIF", "MPO") else {}
    data = encoded(smooth(17, 13), name, **options, **frames)
    outcomes, wrong = set(), []
    for _ in range(250):
        broken = bytearray(data)
        for _ in range(random.integers(1, 6)):
            at, length = random.integers(len(broken)), random.integers(1, 9)
            kind = random.integers(4)
            if kind < 2:
                broken[at : at + length] = random.bytes(length)
            elif kind == 2:
                del broken[at : at + length]
            else:
                broken[at:at] = broken[at : at + length] * 3
        if random.random() < 0.2:
            del broken[random.integers(len(broken)) :]
        try:
            outcomes.add(decode(bytes(broken)).mode)
        except BadImageError as error:
            outcomes.add("damaged")
            said = str(error)
            wrong += [said] if not said or "\n" in said or "0x" in said else []
    assert "damaged" in outcomes and outcomes <= {"RGB", "damaged"} and not wrong
