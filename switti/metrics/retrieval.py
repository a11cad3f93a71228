"""Caption retrieval: is an image's own caption the best of several, as GenEval asks of a detector, and the right style.

Candidates are captions of one split of the data, the same for every generator; they are set before measuring. All that
crosses processes is counts. A tie counts as a miss.

Shape suffixes: B images, N candidates, S styles, D width of the common space.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from switti.metrics.scores import DualEncoder

# Captions of which the own one must be the best: one in 32 by chance.
WAYS = 32
# Captions that are compared with at most; more of a split are thinned out evenly.
MAX_CANDIDATES = 1024
# The values of the metric, which its name precedes.
VALUES = ("top1", "top1_all", "style_accuracy")
_STYLE = " style"
_CHUNK = 256


def distinct(captions: Iterable[str], most: int = MAX_CANDIDATES) -> list[str]:
    """The different captions that are not empty, sorted; at most `most`, evenly spread."""
    ordered = sorted({caption for caption in captions if caption})
    count = min(len(ordered), most)
    return [ordered[i * len(ordered) // count] for i in range(count)]


def rivals(caption: str, candidates: list[str], count: int = WAYS - 1) -> list[int]:
    """`count` candidates other than the caption (all, if there are fewer), drawn by the caption's digest alone."""
    others = [row for row, other in enumerate(candidates) if other != caption]
    seed = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "big")
    chosen = np.random.default_rng(seed).permutation(len(others))[:count]
    return [others[row] for row in chosen]


def style_of(caption: str) -> tuple[str, str]:
    """("dog face", "noto style") of "dog face, noto style"; style "" where a caption does not end so."""
    words, _, style = caption.rpartition(", ")
    return (words, style) if words and style.endswith(_STYLE) else (caption, "")


def styles_of(captions: Iterable[str]) -> list[str]:
    """The styles that occur, sorted."""
    return sorted({style for caption in captions if (style := style_of(caption)[1])})


def restyled(caption: str, styles: list[str]) -> list[str]:
    """The caption's words with each other style; none where it has no style."""
    words, own = style_of(caption)
    return [f"{words}, {style}" for style in styles if style != own] if own else []


class CaptionRetrieval(Metric):
    """Shares of images whose own caption is the best: of 32, of all candidates, and of its words in all styles.

    Values: <name>_top1, <name>_top1_all and <name>_style_accuracy; nan where nothing could be counted.
    """

    full_state_update = False
    hits_3: Tensor
    counts_3: Tensor

    def __init__(self, encoder: DualEncoder, name: str, ways: int = WAYS, **options: Any) -> None:
        super().__init__(**options)
        self.encoder = encoder
        self.labels = [f"{name}_{value}" for value in VALUES]
        self.ways = ways
        self.candidates: list[str] = []
        self._texts: dict[str, Tensor] = {}
        for name in ("hits_3", "counts_3"):
            self.add_state(name, torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")

    def set_candidates(self, captions: Iterable[str]) -> None:
        """The captions of the split: each of them is a candidate for every image."""
        self.candidates = distinct(captions)
        self._texts = {}

    def score(self, images_B3HW: Tensor, captions: list[str]) -> Tensor:
        """For each image and each of the three values 1 where the own caption is the best, else 0; nan where it
        competes with nothing. [B, 3] float64; nothing is added up."""
        images_BD = F.normalize(self.encoder.encode_images(images_B3HW).float(), dim=-1).cpu()
        styles = styles_of([*self.candidates, *captions])
        # All at once: an encoder is fastest on full batches.
        self._encode(
            [*self.candidates, *captions, *(text for own in captions for text in restyled(own, styles))]
        )
        scores_B3 = torch.full((len(captions), 3), torch.nan, dtype=torch.float64)
        for row, (image_D, caption) in enumerate(zip(images_BD, captions, strict=True)):
            drawn = [self.candidates[n] for n in rivals(caption, self.candidates, self.ways - 1)]
            others = [candidate for candidate in self.candidates if candidate != caption]
            for kind, wrong in enumerate((drawn, others, restyled(caption, styles))):
                if wrong:
                    scores_B3[row, kind] = float(self._is_best(image_D, caption, wrong))
        return scores_B3

    def update(self, images_B3HW: Tensor, captions: list[str]) -> None:
        """Adds images, uint8 [B, 3, H, W], with one caption each; none at all is allowed."""
        if not captions:
            return
        scores_B3 = self.score(images_B3HW, captions)
        self.counts_3 += scores_B3.isfinite().sum(dim=0).to(self.counts_3.device)
        self.hits_3 += scores_B3.nansum(dim=0).long().to(self.hits_3.device)

    def _is_best(self, image_D: Tensor, caption: str, wrong: list[str]) -> bool:
        similarity_N = torch.stack([self._texts[text] for text in (caption, *wrong)]) @ image_D
        return bool((similarity_N[0] > similarity_N[1:]).all())

    def _encode(self, captions: list[str]) -> None:
        """Keeps their directions, [D] of unit length; each caption is encoded once."""
        new = sorted({caption for caption in captions if caption not in self._texts}, key=len)
        for start in range(0, len(new), _CHUNK):
            part = new[start : start + _CHUNK]
            texts = F.normalize(self.encoder.encode_texts(part).float(), dim=-1).cpu()
            self._texts |= dict(zip(part, texts, strict=True))

    def compute(self) -> dict[str, Tensor]:
        """Shares in [0, 1], float64."""
        shares_3 = self.hits_3.double() / self.counts_3
        return dict(zip(self.labels, shares_3, strict=True))
