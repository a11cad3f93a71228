"""Settings of the data. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from switti.config_values import AT_LEAST_1, FRACTION, MAX_CROP_BASE, NOT_NEGATIVE, POSITIVE, check
from switti.errors import UserError
from switti.import_path import check_choice, is_import_path

STREAMS = ("pipe:", "http:", "https:")
SHARDS = "shards"
MAX_PIXELS = 178_956_970  # Pillow refuses more


@dataclass(frozen=True)
class Limits:
    """Limits on the size in an image's header.

    A WebP may have a third of the pixels, because its decoder holds several copies: decoding an accepted image takes at
    most four times the bytes of the RGB image and 200 MB.
    """

    max_pixels: int = 128_000_000
    """Most pixels, width · height."""
    max_aspect_ratio: float = 32.0
    """Largest ratio of the longer side to the shorter one."""


@dataclass
class DataConfig:
    """Which shards are read, how images become squares, and how batches are made. The order follows the run's seed."""

    train: str | list[str] = "data/emoji64/train-*.tar"
    """WebDataset shards of the training split: paths, globs (`data/train-*.tar`), brace ranges
    (`train-{000000..000009}.tar`) or streams (`pipe:…`, `http(s)://…`), which cannot be resumed exactly."""
    validation: str | list[str] = "data/emoji64/validation-*.tar"
    """WebDataset shards of the validation split, on disk. Those named `validation-<split>-<number>.tar` make several
    splits, whose metrics are logged apart as `validation/<split>/…` beside those of all validation images."""
    source: str = SHARDS
    """shards, or `package.module:Name` of a class or function that is called with the entries of data.train, or of
    data.validation, and returns a map-style dataset of pairs (image, caption) (docs/extending.md)."""
    resolution: int | None = None
    """Side of the square images in px; must be the tokenizer's. Null: the tokenizer's."""
    crop: Literal["center", "random"] = "random"
    """Position of the square crop of training images; validation images are always cropped in the center."""
    crop_base: int = 512
    """Length of an image's shorter side in px in whose units the crop condition is given; the released models have 512.
    model.crop_base follows it, so that sampling and exports use the same."""
    batch_size: int = 64
    """Samples of one optimizer step, over all ranks and accumulated micro-batches: a multiple of trainer.devices ·
    trainer.num_nodes · trainer.accumulate."""
    workers: int = 2
    """Processes per rank that read and decode. 0: the training process does it."""
    embeddings: str | list[str] | None = None
    """Folders of text embeddings made by experiments.embed: one store, or the `embeddings` folder around several, of
    which the run's text encoder selects its own. Null, or a stream that carries none: captions are encoded during
    training."""
    captions: Literal["first", "drawn"] = "first"
    """Caption of a training sample that has several: the first one, or one drawn at random in each epoch. With
    embeddings, drawn needs `experiments.embed --all-captions`. Validation takes the first one."""
    caption_dropout: float = 0.1
    """Probability in [0, 1] of the empty caption in training, which guidance needs; the paper has 0.1."""
    shuffle_window_shards: int = 4
    """Number of shards that are shuffled together. More shuffles better, fewer keep reads local."""
    max_bad_fraction: float = 0.01
    """Largest share of samples in [0, 1] that may be unreadable (corrupt images, missing captions or embeddings,
    truncated or missing shards) and are replaced by others; more stops the run."""
    max_pixels: int = Limits.max_pixels
    """Images with more pixels than this are not decoded and count as unreadable; a WebP may have a third of it."""
    max_aspect_ratio: float = Limits.max_aspect_ratio
    """Images whose longer side is more than this many times the shorter one count as unreadable. At least 1."""
    stream_timeout: float = 60.0
    """Seconds without a byte after which a stream has failed."""
    stream_retries: int = 5
    """Further attempts to open a failed stream, after pauses of 1, 2, 4, … s, before the next shard is taken."""

    @property
    def streamed(self) -> bool:
        """Whether training reads streams, which cannot be resumed exactly."""
        return self.source == SHARDS and any(entry.startswith(STREAMS) for entry in as_list(self.train))

    def validate(self, path: str) -> None:
        check_choice(f"{path}.source", self.source, [SHARDS])
        if is_import_path(self.source) and as_list(self.embeddings):
            raise UserError(
                f"{path}.embeddings belong to shards: with {path}.source={self.source} captions are encoded during "
                f"training; set {path}.embeddings=null"
            )
        for name in ("train", "validation"):
            if not as_list(getattr(self, name)):
                raise UserError(f"{path}.{name} names no shards")
        check(self, path, POSITIVE, "crop_base", "batch_size", "shuffle_window_shards", "stream_timeout")
        check(self, path, (lambda px: px <= MAX_CROP_BASE, f"must be at most {MAX_CROP_BASE}"), "crop_base")
        resolution = (lambda px: px >= 1, "must be positive, or null for the tokenizer's")
        check(self, path, resolution, "resolution")
        check(self, path, NOT_NEGATIVE, "workers", "stream_retries")
        pixels = (lambda value: 1 <= value <= MAX_PIXELS, f"must lie in [1, {MAX_PIXELS}]")
        check(self, path, pixels, "max_pixels")
        check(self, path, AT_LEAST_1, "max_aspect_ratio")
        check(self, path, FRACTION, "caption_dropout", "max_bad_fraction")


def as_list(value: str | list[str] | None) -> list[str]:
    """One entry or several as a list, without empty ones."""
    entries = [value] if isinstance(value, str) else list(value or [])
    return [entry for entry in entries if entry]
