"""Text embeddings and the protocol of text encoders.

Shape suffixes: B captions, T token positions (padded), C channels of the token states, P of the pooled state.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextEmbedding:
    """Encoded captions.

    tokens_BTC: last hidden states, float32. mask_BT: bool, True at a real token, False at padding.
    pooled_BP: one vector per caption, float32.
    """

    tokens_BTC: Tensor
    mask_BT: Tensor
    pooled_BP: Tensor

    def __len__(self) -> int:
        return self.tokens_BTC.shape[0]

    def __getitem__(self, index: slice | Tensor | list[int]) -> Self:
        """A sub-batch; `index` is a slice, a list, or an integer or boolean tensor over the captions."""
        return self.map(lambda value: value[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same function applied to the three tensors."""
        return type(self)(function(self.tokens_BTC), function(self.mask_BT), function(self.pooled_BP))

    def to(self, device: torch.device | str) -> Self:
        return self.map(lambda value: value.to(device))

    def expand(self, count: int) -> Self:
        """One caption (B = 1) repeated `count` times without a copy, as the null caption beside a batch."""
        return self.map(lambda value: value.expand(count, *value.shape[1:]))

    @classmethod
    def concatenate(cls, parts: list[Self]) -> Self:
        """Joins batches of one encoder; all must have the same T, C and P."""
        return cls(
            torch.cat([part.tokens_BTC for part in parts]),
            torch.cat([part.mask_BT for part in parts]),
            torch.cat([part.pooled_BP for part in parts]),
        )


class TextEncoder(Protocol):
    """A frozen caption encoder.

    fingerprint: hexadecimal digest of everything that determines the values (encoder, weights, settings);
    stores of precomputed embeddings carry it, so that embeddings of another encoder are refused.
    truncated: captions cut so far because they had more than `max_length` tokens.
    """

    name: str
    width: int
    pooled_width: int
    max_length: int
    truncated: int

    @property
    def fingerprint(self) -> str: ...

    def pieces(self, caption: str) -> list[str]:
        """The word pieces behind the real token positions of one caption, for the labels of plots."""
        ...

    def encode(self, captions: list[str]) -> TextEmbedding:
        """Captions ("": the null caption) → embedding on the encoder's device, padded to `max_length`."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move the encoder's network, and with it what `encode` gives, to another device."""
        ...


def fingerprint_of(name: str, weights: list[str], settings: dict[str, object]) -> str:
    """SHA-256 over an encoder's name, the digests of its weights and the settings that change its values."""
    content = json.dumps({"name": name, "weights": weights, "settings": settings}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def word_pieces(tokenizer: Any, caption: str, max_length: int) -> list[str]:
    """The part of the caption behind each token, as written there; start and end tokens by name.

    "##" marks the continuation of a word, "[UNK]" an unknown token. tokenizer: a fast one of transformers.
    """
    encoded = tokenizer(caption, truncation=True, max_length=max_length, return_offsets_mapping=True)
    names = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    pieces, end = [], 0
    for token, name, (start, stop) in zip(
        encoded["input_ids"], names, encoded["offset_mapping"], strict=True
    ):
        if start == stop:
            pieces.append(name)
            continue
        text = caption[start:stop]
        continues = start < end or (start and caption[start - 1].isalnum() and text[0].isalnum())
        pieces.append(("##" if continues else "") + text)
        if token == tokenizer.unk_token_id:
            pieces[-1] += " [UNK]"
        end = stop
    return pieces
