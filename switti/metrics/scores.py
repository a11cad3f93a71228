"""Similarity of images with their captions: pure functions, and the accumulators that CLIPScore, PickScore and
the small embedded dual encoder share.

Shape suffixes: B images of one update, N all images, D width of the common space.
"""

import hashlib
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class DualEncoder(Protocol):
    """Images and captions into one space. Images are uint8 [B, 3, H, W]; rows need no unit length."""

    width: int

    def encode_images(self, images_B3HW: Tensor) -> Tensor: ...

    def encode_texts(self, captions: list[str]) -> Tensor: ...


def cosine(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """Raw cosine of each row pair, [B] in [-1, 1]."""
    return (F.normalize(a_BD.float(), dim=-1) * F.normalize(b_BD.float(), dim=-1)).sum(-1)


def shuffled_cosine(images_ND: Tensor, texts_ND: Tensor, keys_N: Tensor) -> Tensor:
    """Cosine of each image with the caption of another one, one value per image that has such a partner.

    Partners: images in the order of their captions' keys, shifted by half. The result depends neither on the order
    of the rows nor on how they were spread over processes. Pairs with the same caption are skipped.
    """
    order = torch.argsort(keys_N, stable=True)
    partner = order.roll(len(order) // 2)
    other = keys_N[order] != keys_N[partner]
    return cosine(images_ND[order][other], texts_ND[partner][other])


def pair_auc(similarity_NN: Tensor, same_NN: Tensor | None = None) -> float:
    """Probability that a matching pair (diagonal) is more similar than a mismatching one; ties count half.

    same_NN: True where an off-diagonal pair matches as well (equal captions) and must be skipped.
    """
    match = torch.eye(len(similarity_NN), dtype=torch.bool, device=similarity_NN.device)
    mismatch = ~match if same_NN is None else ~(match | same_NN)
    positive, negative = similarity_NN[match].double(), similarity_NN[mismatch].double().sort().values
    below = torch.searchsorted(negative, positive, right=False)
    not_above = torch.searchsorted(negative, positive, right=True)
    return float((below + not_above).double().mean() / (2 * len(negative)))


def caption_keys(captions: list[str]) -> Tensor:
    """63-bit digests, int64 [B]: the same in every process, unlike hash()."""
    digests = [hashlib.sha256(caption.encode()).digest()[:8] for caption in captions]
    return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests], dtype=torch.int64)


class ImageScore(Protocol):
    """A number for each image, which may depend on its caption. Images are uint8 [B, 3, H, W]; returns [B]."""

    def score(self, images_B3HW: Tensor, captions: list[str]) -> Tensor: ...


class MeanScore(Metric):
    """Mean of an injected score over images. Two numbers cross processes."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, scorer: ImageScore, **options: Any) -> None:
        super().__init__(**options)
        self.scorer = scorer
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def score(self, images_B3HW: Tensor, captions: list[str]) -> Tensor:
        """Values of single images, [B]; nothing is added up."""
        return self.scorer.score(images_B3HW, captions)

    def update(self, images_B3HW: Tensor, captions: list[str]) -> None:
        """Adds images, uint8 [B, 3, H, W], with one caption each."""
        if not captions:
            return
        self.total += self.score(images_B3HW, captions).double().sum().to(self.total.device)
        self.count += len(captions)

    def compute(self) -> Tensor:
        """Scalar float64; nan without images."""
        return self.total / self.count


class Cosine:
    """Raw cosine of images with their captions under an injected encoder (`ImageScore`)."""

    def __init__(self, encoder: DualEncoder) -> None:
        self.encoder = encoder

    def score(self, images_B3HW: Tensor, captions: list[str]) -> Tensor:
        return cosine(self.encoder.encode_images(images_B3HW), self.encoder.encode_texts(captions))


class MeanCosine(MeanScore):
    """Mean cosine of images with their own captions, under an injected encoder."""

    def __init__(self, encoder: DualEncoder, **options: Any) -> None:
        super().__init__(Cosine(encoder), **options)


class MatchedAndShuffledCosine(Metric):
    """Mean cosine of images with their own and with others' captions: the gap says whether captions matter.

    Embeddings are kept (D numbers an image, twice), images are not.
    """

    full_state_update = False
    images: list[Tensor]
    texts: list[Tensor]
    keys: list[Tensor]

    def __init__(self, encoder: DualEncoder, **options: Any) -> None:
        super().__init__(**options)
        self.encoder = encoder
        for name in ("images", "texts", "keys"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def score(self, images_B3HW: Tensor, captions: list[str]) -> Tensor:
        """Cosine of each image with its own caption, [B]; nothing is kept."""
        return cosine(self.encoder.encode_images(images_B3HW), self.encoder.encode_texts(captions))

    def update(self, images_B3HW: Tensor, captions: list[str]) -> None:
        """Adds images, uint8 [B, 3, H, W], with one caption each; none at all is allowed."""
        device = images_B3HW.device
        if captions:
            images, texts = self.encoder.encode_images(images_B3HW), self.encoder.encode_texts(captions)
        else:  # a process without a share still takes part in the exchange, with states of the right shape
            images = texts = torch.zeros(0, self.encoder.width, device=device)
        self.images.append(images.float())
        self.texts.append(texts.float())
        self.keys.append(caption_keys(captions).to(device))

    def compute(self) -> tuple[Tensor, Tensor]:
        """(own, shuffled) mean cosines; shuffled is nan if no image has a partner with another caption."""
        images, texts, keys = dim_zero_cat(self.images), dim_zero_cat(self.texts), dim_zero_cat(self.keys)
        return cosine(images, texts).double().mean(), shuffled_cosine(images, texts, keys).double().mean()
