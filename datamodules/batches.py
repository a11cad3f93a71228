"""Samples to batches: packed by a data worker, unpacked in the training process.

What workers send are NumPy arrays, images as bytes and captions' tokens without padding: they go through the workers'
pipe as they are. Tensors would need shared memory and a file descriptor each, and torch waits for ever where the
machine has too little of either.

Shape suffixes: B samples, R real tokens of all of them, t of one, H, W pixels, C, P channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.shards.bad_samples import BadSample
from datamodules.shards.embedding_file import Text
from datamodules.shards.embeddings import EmbeddingStore, pad
from datamodules.shards.samples import Sample

Batch = dict[str, Any]
Encode = Callable[[list[str]], list[Text]]


@dataclass
class PackedBatch:
    """The readable ones of `read` samples, and reports of the others. images_B3HW is None if none was readable.

    texts: per sample (tokens, pooled), or None where the caption is still to be encoded. max_length: tokens after
    padding; 0 if there are no embeddings.
    """

    read: int
    bad: list[BadSample]
    images_B3HW: np.ndarray | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    texts: list[tuple[np.ndarray, np.ndarray] | None] = field(default_factory=list)
    max_length: int = 0
    _tensors: Batch | None = None

    def pin_memory(self) -> "PackedBatch":
        """Called by torch's thread that copies batches to where a GPU can fetch them: the work is done there."""
        self._tensors = {name: _pinned(value) for name, value in self._unpack().items()}
        self.images_B3HW = None
        return self

    def unpack(self, encode: Encode | None = None, max_length: int = 0) -> Batch:
        """The batch as ShardDataModule describes it; {} if no sample was good.

        encode: for captions without an embedding, to `max_length` tokens.
        """
        batch = self._unpack() if self._tensors is None else self._tensors
        if not batch or "text" in batch or encode is None:
            return batch
        missing = [row for row, text in enumerate(self.texts) if text is None]
        texts: list[Any] = [
            text and (torch.from_numpy(text[0]), torch.from_numpy(text[1])) for text in self.texts
        ]
        for row, text in zip(missing, encode([self.columns["caption"][row] for row in missing]), strict=True):
            texts[row] = text
        return batch | pad(texts, max_length)

    def _unpack(self) -> Batch:
        if self.images_B3HW is None:
            return {}
        images = torch.from_numpy(self.images_B3HW)
        batch = {"image": images.float().div_(127.5).sub_(1.0)}
        batch |= {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in self.columns.items()}
        if self.max_length and all(text is not None for text in self.texts):
            texts = [(torch.from_numpy(text[0]), torch.from_numpy(text[1])) for text in self.texts if text]
            batch |= pad(texts, self.max_length)
        return batch


def _pinned(value: Any) -> Any:
    return value.pin_memory() if isinstance(value, Tensor) else value


def pack_batch(
    samples: list[Sample | BadSample], null: Text | None = None, max_length: int = 0
) -> PackedBatch:
    """null: the empty caption's embedding, used for dropped captions; None: it is encoded like the others."""
    good = [s for s in samples if isinstance(s, Sample)]
    bad = [s for s in samples if isinstance(s, BadSample)] + [b for s in good for b in s.replaced]
    if not good:
        return PackedBatch(len(samples), bad)
    height, width, _ = good[0].image.shape
    images_B3HW = np.empty((len(good), 3, height, width), np.uint8)
    for image_3HW, sample in zip(images_B3HW, good, strict=True):
        image_3HW[:] = sample.image.transpose(2, 0, 1)
    columns: dict[str, Any] = {
        "caption": [s.caption for s in good],
        "key": [s.key for s in good],
        "size": np.array([s.size for s in good], np.int64),
        "crop": np.array([s.crop for s in good], np.int64),
        "seed": np.array([s.seed for s in good], np.int64),
        "dropped": np.array([s.dropped for s in good]),
        "enlarged": np.array([s.enlarged for s in good]),
    }
    texts = [_arrays(null if s.dropped else s.text) for s in good]
    return PackedBatch(len(samples), bad, images_B3HW, columns, texts, max_length)


def _arrays(text: Text | None) -> tuple[np.ndarray, np.ndarray] | None:
    return None if text is None else (text[0].numpy(), text[1].numpy())


def collate(samples: list[Sample | BadSample], store: EmbeddingStore | None = None) -> Batch:
    """Samples → a batch, in one process; {} if none is good."""
    if store is None:
        return pack_batch(samples).unpack()
    return pack_batch(samples, store.null, store.identity.max_length).unpack()
