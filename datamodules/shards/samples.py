"""Samples: stored bytes → a square image with its crop condition, caption and seed."""

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from datamodules.config import Limits
from datamodules.images import DEFAULT_LIMITS, decode, resized_crop, scaled_size, square_crop
from datamodules.shards.bad_samples import BadSample
from datamodules.shards.embedding_file import Text
from datamodules.shards.members import CAPTION, LIMITS
from datamodules.stable_seeds import stable_fraction
from switti.files import parse_json
from switti.models.crop_embedding import crop_condition

MAX_CAPTIONS = 64
MAX_SIDE = 1 << 24  # px; float32 counts no further


@dataclass(frozen=True)
class Framing:
    """Crop and size of the square images, limits of what is decoded, choice and dropout of captions."""

    side: int
    crop_base: int
    random_crop: bool
    caption_dropout: float
    limits: Limits = DEFAULT_LIMITS
    draw_captions: bool = False


@dataclass
class Sample:
    """One element of a batch. image: uint8 [side, side, 3]. replaced: bad samples in whose place it is.

    variant: number of the caption among all of the sample's (see `captions_in`), 0 for the stored one.
    enlarged: the stored image's shorter side was below the square's; it was enlarged (bicubic) until it fitted.
    """

    image: np.ndarray
    caption: str
    key: str
    size: tuple[int, int]
    crop: tuple[int, int, int, int]
    seed: int
    dropped: bool
    enlarged: bool = False
    variant: int = 0
    text: Text | None = None
    replaced: list[BadSample] = field(default_factory=list)


def make_sample(
    image: bytes, caption: str, meta: bytes | None, key: str, seed: int, framing: Framing
) -> Sample:
    """Decode a stored sample and `frame` it.

    Raises:
        BadImageError: the image cannot be decoded, or is beyond the limits.
    """
    decoded = decode(image, framing.limits)
    size = original_size(meta, (decoded.height, decoded.width))
    captions = captions_in(meta, caption) if framing.draw_captions else [caption]
    return frame(decoded, size, captions, key, seed, framing)


def frame(
    decoded: Image.Image, size: tuple[int, int], captions: list[str], key: str, seed: int, framing: Framing
) -> Sample:
    """An RGB image as a square sample with one of its captions. All that is random is drawn from the seed.

    Args:
        size: (height, width) of the original image. captions: the one at 0, or with framing.draw_captions any of them.
    """
    resized = scaled_size(*decoded.size, framing.side)
    where = (0.5, 0.5)
    if framing.random_crop:
        where = stable_fraction(f"{seed}/crop/top"), stable_fraction(f"{seed}/crop/left")
    box = square_crop(*resized, framing.side, where)
    dropped = stable_fraction(f"{seed}/drop") < framing.caption_dropout
    variant = int(stable_fraction(f"{seed}/caption") * len(captions))
    return Sample(
        image=np.asarray(resized_crop(decoded, resized, box)),
        caption="" if dropped else captions[variant],
        key=key,
        size=size,
        crop=condition_of(size, where, framing.crop_base),
        seed=seed,
        dropped=dropped,
        enlarged=min(decoded.size) < framing.side,
        variant=variant,
    )


def captions_in(meta: bytes | None, caption: str) -> list[str]:
    """The stored caption, then the further ones of `captions` in the sample's json, each once, at most MAX_CAPTIONS.

    The json may come from another program: items that are not captions are ignored.
    """
    try:
        listed = parse_json(meta or b"")["captions"]
    except (ValueError, KeyError, TypeError):
        return [caption]
    further = [text for text in listed if _is_caption(text)] if isinstance(listed, list) else []
    return list(dict.fromkeys([caption, *further]))[:MAX_CAPTIONS]


def _is_caption(text: object) -> bool:
    if not isinstance(text, str) or not text.strip() or "\0" in text or len(text) > LIMITS[CAPTION]:
        return False
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def condition_of(size: tuple[int, int], where: tuple[float, float], base: int) -> tuple[int, int, int, int]:
    """Crop condition (height, width, top, left) of one original image, see `crop_condition`."""
    height_1, width_1 = torch.tensor([size[0]]), torch.tensor([size[1]])
    height, width, top, left = crop_condition(height_1, width_1, torch.tensor([where]), base)[0].tolist()
    return height, width, top, left


def original_size(meta: bytes | None, stored: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the image before preparation shrank it, if the sample's json says so; else as stored.

    The json may come from another program: sizes that the stored image cannot be a smaller copy of are ignored.
    """
    try:
        content = parse_json(meta or b"")
        height, width = content["height"], content["width"]
    except (ValueError, KeyError, TypeError):
        return stored
    if (
        type(height) is not int
        or type(width) is not int
        or min(height, width) < 1
        or max(height, width) > MAX_SIDE
    ):
        return stored
    # Of the stored sides each may be off by one pixel through rounding.
    low, high = stored[0] - 1, stored[0] + 1
    same_shape = (stored[1] - 1) * height <= width * high and width * low <= (stored[1] + 1) * height
    return (height, width) if same_shape else stored
