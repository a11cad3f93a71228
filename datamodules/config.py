"""Settings of the data. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from switti.config_values import MAX_CROP_BASE
from switti.errors import UserError

STREAMS = ("pipe:", "http:", "https:")
MAX_PIXELS = 178_956_970  # Pillow refuses more


@dataclass(frozen=True)
class Limits:
    """What an image's header may announce: width · height, and the longer side over the shorter one.

    A WebP may have a third of the pixels, for its decoder holds it several times: decoding what is accepted takes at
    most four times the bytes of the RGB image and 200 MB.
    """

    max_pixels: int = 128_000_000
    max_aspect_ratio: float = 32.0


@dataclass
class DataConfig:
    """Which shards, how pictures become squares, how batches are made. The order's seed is the run's.

    train, validation: shards of WebDataset, each a path, a glob (`data/train-*.tar`), a brace range
      (`train-{000000..000009}.tar`) or a stream (`pipe:…`, `http(s)://…`: resampled, not exactly resumable).
    resolution: side of the square pictures in px (None: the tokenizer's).
    crop: of the training pictures; validation pictures are always cropped in the centre.
    crop_base: the crop condition counts in pixels of an image whose shorter side has this length; model.crop_base
      follows it, so that sampling and exports know it.
    batch_size: samples of one optimizer step, over all ranks and accumulated batches. A rank reads
      batch_size / (world size · trainer.accumulate) at a time.
    workers: reading processes a rank; 0 reads in the training process.
    embeddings: folder(s) made by `experiments.embed`: one store, or the `embeddings` folder that holds several, of
      which the run's text encoder picks its own. Null, or a stream without embeddings of its own: captions are encoded
      while training.
    captions: which caption of a sample that has several (`captions` in its json) is trained on: first, or one drawn
      anew in each epoch. With embeddings, drawn needs `experiments.embed --all-captions`. Validation takes the first.
    caption_dropout: probability of the empty caption in training, which guidance needs.
    shuffle_window_shards: so many shards are shuffled together; more is a better shuffle, fewer keep reads local.
    max_bad_fraction: a larger share of samples that cannot be read (damaged pictures, missing captions or embeddings,
      truncated or missing shards) stops the run; up to it, others stand in for them.
    max_pixels, max_aspect_ratio: images of more pixels (WebP: a third), or with a longer side of more than so many
      times the shorter one, are not decoded; they count as samples that cannot be read.
    stream_timeout: seconds without a byte after which a stream has failed. stream_retries: further attempts to open it,
      after pauses of 1, 2, 4, … s, before another shard is taken.
    """

    train: str | list[str] = "data/emoji64/train-*.tar"
    validation: str | list[str] = "data/emoji64/validation-*.tar"
    resolution: int | None = None
    crop: Literal["center", "random"] = "random"
    crop_base: int = 512
    batch_size: int = 64
    workers: int = 2
    embeddings: str | list[str] | None = None
    captions: Literal["first", "drawn"] = "first"
    caption_dropout: float = 0.1
    shuffle_window_shards: int = 4
    max_bad_fraction: float = 0.01
    max_pixels: int = Limits.max_pixels
    max_aspect_ratio: float = Limits.max_aspect_ratio
    stream_timeout: float = 60.0
    stream_retries: int = 5

    @property
    def streamed(self) -> bool:
        """Whether training reads streams, which cannot be resumed exactly."""
        return any(entry.startswith(STREAMS) for entry in as_list(self.train))

    def validate(self, path: str) -> None:
        for name in ("train", "validation"):
            if not as_list(getattr(self, name)):
                raise UserError(f"{path}.{name} names no shards")
        for name in ("crop_base", "batch_size", "shuffle_window_shards"):
            if getattr(self, name) < 1:
                raise UserError(f"{path}.{name}={getattr(self, name)} must be positive")
        if self.crop_base > MAX_CROP_BASE:
            raise UserError(f"{path}.crop_base={self.crop_base} must be at most {MAX_CROP_BASE}")
        if self.resolution is not None and self.resolution < 1:
            raise UserError(
                f"{path}.resolution={self.resolution} must be positive, or null for the tokenizer's"
            )
        if self.workers < 0:
            raise UserError(f"{path}.workers={self.workers} must not be negative")
        if not 1 <= self.max_pixels <= MAX_PIXELS:
            raise UserError(f"{path}.max_pixels={self.max_pixels} must lie in [1, {MAX_PIXELS}]")
        if not self.max_aspect_ratio >= 1.0:
            raise UserError(f"{path}.max_aspect_ratio={self.max_aspect_ratio} must be at least 1")
        if self.stream_timeout <= 0:
            raise UserError(f"{path}.stream_timeout={self.stream_timeout} must be positive")
        if self.stream_retries < 0:
            raise UserError(f"{path}.stream_retries={self.stream_retries} must not be negative")
        for name in ("caption_dropout", "max_bad_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"{path}.{name}={getattr(self, name)} must lie in [0, 1]")


def as_list(value: str | list[str] | None) -> list[str]:
    """One or several, as a list without empty entries."""
    entries = [value] if isinstance(value, str) else list(value or [])
    return [entry for entry in entries if entry]
