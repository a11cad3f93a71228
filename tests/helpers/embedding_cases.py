"""A text encoder that hashes, and stores of its embeddings."""

import hashlib

import torch

from datamodules.config import DataConfig
from datamodules.datamodule import ShardDataModule
from datamodules.embed_shards import embed_shards
from datamodules.shards.embedding_file import EncoderIdentity
from datamodules.shards.index import load_index
from switti.text.base import TextEmbedding

WIDTH, POOLED, LENGTH = 6, 3, 9


class HashEncoder:
    """Embeddings that are drawn from the caption's hash: each caption has its own, of 2 to LENGTH tokens."""

    name, width, pooled_width, max_length, truncated = "hash", WIDTH, POOLED, LENGTH, 0

    def __init__(self, fingerprint: str = "f" * 64) -> None:
        self.fingerprint = fingerprint
        self.seen: list[str] = []

    def encode(self, captions: list[str]) -> TextEmbedding:
        self.seen += captions
        one = [self.one(caption) for caption in captions]
        tokens, mask = torch.zeros(len(one), LENGTH, WIDTH), torch.zeros(len(one), LENGTH, dtype=torch.bool)
        for i, (states, _) in enumerate(one):
            tokens[i, : len(states)], mask[i, : len(states)] = states, True
        return TextEmbedding(tokens, mask, torch.stack([pooled for _, pooled in one]))

    @staticmethod
    def one(caption: str) -> tuple[torch.Tensor, torch.Tensor]:
        digest = hashlib.sha256(caption.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        states = torch.randn(2 + digest[0] % (LENGTH - 1), WIDTH, generator=generator)
        return states.half().float(), torch.randn(POOLED, generator=generator)

    @property
    def identity(self) -> EncoderIdentity:
        return EncoderIdentity(self.name, self.fingerprint, WIDTH, POOLED, LENGTH)


def make_store(folder, encoder=None, batch=2, out=None):
    encoder = encoder or HashEncoder()
    indices = [load_index(path) for path in sorted(folder.glob("*.tar"))]
    store = (out or folder / "embeddings") / encoder.identity.folder
    return store, embed_shards(indices, encoder, encoder.identity, store, batch)[0]


def data_of(folder, fingerprint=None, **settings):
    paths = {"train": f"{folder}/train-*.tar", "validation": f"{folder}/validation-*.tar"}
    defaults = {"batch_size": 4, "workers": 0, "embeddings": f"{folder}/embeddings", "caption_dropout": 0.4}
    config = DataConfig(**(paths | defaults | settings))
    return ShardDataModule(config, seed=1, resolution=8, expected_fingerprint=fingerprint)
