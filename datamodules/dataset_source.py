"""Map-style datasets of the user's own as the source of samples (`data.source`)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from datamodules.images import BadImageError, decode, to_rgb
from datamodules.shards.bad_samples import BadSample
from datamodules.shards.open_files import is_machine_fault
from datamodules.shards.samples import MAX_CAPTIONS, Framing, Sample, frame
from datamodules.stable_seeds import sample_seed
from switti.errors import UserError
from switti.import_path import load_object


def open_dataset(source: str, setting: str, entries: list[str]) -> Any:
    """What `data.source` makes of a split's entries. UserError unless it has a length and items.

    Args:
        setting: that holds the entries, such as "data.train".
    """
    named = load_object("data.source", source)
    if not callable(named):
        raise UserError(f"data.source={source} is {type(named).__name__}, not a class or a function")
    dataset = named(entries)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(f"data.source={source} is not a map-style dataset: it needs __len__ and __getitem__")
    if not len(dataset):
        raise UserError(f"{setting}={entries}: data.source={source} has no sample")
    return dataset


@dataclass(frozen=True)
class DatasetSamples:
    """The items of one dataset as samples of one shard: (image, caption) each.

    An item's image is a PIL image, or the bytes of an image file; its caption is a text, or a list of texts of which
    the first is the main one. Item i must always be the same: the order of training is resumed by numbers alone.
    """

    dataset: Any
    name: str
    split: str
    framing: Framing
    seed: int

    @property
    def store(self) -> None:
        """There are no stored embeddings."""
        return None

    @property
    def counts(self) -> list[int]:
        """Samples of each shard, of which there is one."""
        return [len(self.dataset)]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of `digest`, if the dataset has it, and of the number of samples."""
        content = f"{self.name}\0{len(self.dataset)}\0{getattr(self.dataset, 'digest', '')}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def read(self, shard: int, row: int, epoch: int) -> Sample | BadSample:
        """The sample, or a report of why it cannot be read. Other exceptions of the dataset propagate."""
        key = f"{self.split}/{row:08d}"
        try:
            image, captions = _checked(self.name, self.dataset[row])
            if isinstance(image, bytes):
                image = decode(image, self.framing.limits)
            rgb = to_rgb(image)
            size = (rgb.height, rgb.width)
            return frame(rgb, size, captions, key, sample_seed(self.seed, epoch, key), self.framing)
        except BadImageError as error:
            return BadSample(self.name, key, str(error), "undecodable_picture")
        except OSError as error:
            if is_machine_fault(error):
                raise
            return BadSample(self.name, key, str(error), "unreadable_shard")


def _checked(name: str, item: Any) -> tuple[Image.Image | bytes, list[str]]:
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise UserError(f"data.source={name}: an item is {type(item).__name__}, not a pair (image, caption)")
    image, caption = item
    captions = [caption] if isinstance(caption, str) else caption
    if not isinstance(image, Image.Image | bytes):
        raise UserError(f"data.source={name}: an image is {type(image).__name__}, not a PIL image or bytes")
    if not isinstance(captions, Sequence) or not captions or not all(isinstance(c, str) for c in captions):
        raise UserError(
            f"data.source={name}: a caption is {type(caption).__name__}, not a text or a list of texts"
        )
    return image, list(captions)[:MAX_CAPTIONS]
