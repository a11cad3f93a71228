"""Caption encoding in the training process, with the values that `experiments.embed` stores."""

import torch

from datamodules.shards.embedding_file import EncoderIdentity, Text, pack
from switti.text.base import TextEncoder


class CaptionEncoder:
    """Captions → their embeddings, rounded to float16 as stored ones are; each distinct caption is encoded once."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self._null: Text | None = None

    @property
    def identity(self) -> EncoderIdentity:
        return identity_of(self.encoder)

    def to(self, device: torch.device) -> None:
        """Encode on `device` from now on."""
        self.encoder.to(device)

    def __call__(self, captions: list[str]) -> list[Text]:
        distinct = [caption for caption in dict.fromkeys(captions) if caption]
        texts = dict(zip(distinct, self._encode(distinct), strict=True)) if distinct else {}
        if self._null is None:
            self._null = self._encode([""])[0]
        return [texts[caption] if caption else self._null for caption in captions]

    def _encode(self, captions: list[str]) -> list[Text]:
        text = self.encoder.encode(captions)
        packed = pack(text.tokens_BTC, text.mask_BT, text.pooled_BP)
        return [packed[row] for row in range(len(packed))]


def identity_of(encoder: TextEncoder) -> EncoderIdentity:
    """The identity that embeddings of this encoder carry."""
    return EncoderIdentity(
        encoder.name, encoder.fingerprint, encoder.width, encoder.pooled_width, encoder.max_length
    )
