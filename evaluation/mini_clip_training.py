"""Training of the heads behind `mini_clip_score` and `mini_clip_top1`: frozen features, InfoNCE, their own error."""

import json
import platform
import shlex
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from switti.files import atomic_write, write_json
from switti.metrics.catalogue import MINI_CLIP_VERSION
from switti.metrics.mini_clip import (
    CONFIG,
    WEIGHTS,
    ImageDescription,
    MiniClipConfig,
    MiniClipHeads,
    describe,
)
from switti.metrics.retrieval import MAX_CANDIDATES, CaptionRetrieval, style_of
from switti.metrics.scores import pair_auc
from switti.text.minilm import MiniLMEncoder
from switti.weights.save import write_weights

CHUNK = 64
# Of the heads that ship.
SIZES = MiniClipConfig(grids=[1, 1, 1, 2, 3])
# Captions of an image that are trained on; longer ones take minutes to encode and are never the first.
MOST_CAPTIONS = 2
# Images of a split that the error is measured on.
MEASURED = 512


@dataclass(frozen=True)
class Split:
    """Images, uint8, and the captions of each."""

    images_N3HW: Tensor
    captions: list[list[str]]


@dataclass(frozen=True)
class Features:
    """Frozen features: images [N, views, F]; texts [M, P], the rows of caption lists in `rows`."""

    images: Tensor
    texts: Tensor
    rows: list[list[int]]
    captions: list[str]


def read(files: list[str]) -> Split:
    """Images (on white, one size) and captions: the .txt first, then the alternatives in the .json."""
    images, captions = [], []
    for sample in webdataset.WebDataset(files, shardshuffle=False, empty_check=False):
        image = next(sample[kind] for kind in ("png", "jpg", "webp") if kind in sample)
        with Image.open(BytesIO(image)) as image:
            images.append(torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1))
        extra = json.loads(sample["json"]).get("captions", []) if "json" in sample else []
        captions.append(list(dict.fromkeys([sample["txt"].decode(), *extra]))[:MOST_CAPTIONS])
    return Split(torch.stack(images), captions)


def varied(images_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    """Light variation of float images in [0, 1]: zoom 0.8-1.1, shift, brightness and contrast; white outside."""
    count = len(images_B3HW)
    draw = torch.rand(count, 5, generator=generator)
    zoom = 1 / (0.8 + 0.3 * draw[:, 0])
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = (draw[:, 1:3] - 0.5) * 0.3
    grid = F.affine_grid(theta, list(images_B3HW.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - images_B3HW, grid, align_corners=False)
    contrast, brightness = 0.8 + 0.4 * draw[:, 3], (draw[:, 4] - 0.5) * 0.2
    return ((moved - 0.5) * contrast.view(-1, 1, 1, 1) + 0.5 + brightness.view(-1, 1, 1, 1)).clamp(0, 1)


def extract(split: Split, config: MiniClipConfig, views: int, seed: int) -> Features:
    """Features of the plain images (view 0), of varied ones, and of every distinct caption."""
    network, generator = ImageDescription(config), torch.Generator().manual_seed(seed)
    images = []
    for view in range(views):
        chunks = [chunk.float() / 255 for chunk in split.images_N3HW.split(CHUNK)]
        images.append(torch.cat([network(varied(chunk, generator) if view else chunk) for chunk in chunks]))
    distinct = sorted({caption for captions in split.captions for caption in captions}, key=len)
    place = {caption: row for row, caption in enumerate(distinct)}
    texts = MiniLMEncoder(config.max_length).encode(distinct).pooled_BP
    rows = [[place[caption] for caption in captions] for captions in split.captions]
    return Features(torch.stack(images, 1), texts, rows, distinct)


def fit(
    data: Features, config: MiniClipConfig, steps: int, batch: int, rate: float, seed: int
) -> MiniClipHeads:
    """Symmetric InfoNCE with a learned temperature; a row's caption and view are drawn in each step.

    Half of a batch are whole concepts, in all their styles: the negatives that differ in the style alone.
    """
    torch.manual_seed(seed)
    heads = MiniClipHeads(config, dropout=0.3)
    heads.image.standardize_like(data.images.flatten(0, 1))
    heads.text.standardize_like(data.texts)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    draw = np.random.default_rng(seed)
    batch = min(batch, len(data.rows))
    concepts = by_concept(data)
    for step in range(steps):
        chosen = draw_batch(draw, concepts, len(data.rows), batch)
        texts = torch.tensor([draw.choice(data.rows[row]) for row in chosen])
        views = draw.integers(data.images.shape[1], size=batch)
        loss = contrast(heads, data.images[chosen, views], data.texts[texts], texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return heads.eval()


def by_concept(data: Features) -> list[list[int]]:
    """Rows whose first captions differ in their style at most."""
    groups: dict[str, list[int]] = {}
    for row, captions in enumerate(data.rows):
        groups.setdefault(style_of(data.captions[captions[0]])[0], []).append(row)
    return list(groups.values())


def draw_batch(draw: np.random.Generator, concepts: list[list[int]], rows: int, batch: int) -> np.ndarray:
    """`batch` different rows: half of them by whole concepts, the others one by one."""
    together = [row for number in draw.permutation(len(concepts)) for row in concepts[number]][: batch // 2]
    others = np.setdiff1d(draw.permutation(rows), together, assume_unique=True)
    return np.concatenate([np.array(together, np.int64), draw.permutation(others)[: batch - len(together)]])


def contrast(heads: MiniClipHeads, images_BF: Tensor, texts_BP: Tensor, caption_B: Tensor) -> Tensor:
    """Symmetric InfoNCE. Rows with the same caption are not negatives and are excluded from the denominator."""
    logits = heads.image(images_BF) @ heads.text(texts_BP).T * heads.scale.clamp(max=4.0).exp()
    diagonal = torch.eye(len(caption_B), dtype=torch.bool)
    logits = logits.masked_fill((caption_B[:, None] == caption_B) & ~diagonal, float("-inf"))
    target = torch.arange(len(caption_B))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class FeatureEncoder:
    """The heads as a dual encoder (`switti.metrics.scores.DualEncoder`) whose images are the trunk's numbers [B, F]."""

    def __init__(self, heads: MiniClipHeads, data: Features) -> None:
        self.heads, self.data, self.width = heads, data, heads.config.width
        self._rows = {caption: row for row, caption in enumerate(data.captions)}

    @cached_property
    def _encoder(self) -> MiniLMEncoder:
        return MiniLMEncoder(self.heads.config.max_length)

    def encode_images(self, images_BF: Tensor) -> Tensor:
        return self.heads.image(images_BF)

    def encode_texts(self, captions: list[str]) -> Tensor:
        """Captions in a style that the data lack are encoded now."""
        missing = [caption for caption in captions if caption not in self._rows]
        texts = {
            caption: self.data.texts[self._rows[caption]] for caption in captions if caption in self._rows
        }
        if missing:
            texts |= dict(zip(missing, self._encoder.encode(missing).pooled_BP, strict=True))
        return self.heads.text(torch.stack([texts[caption] for caption in captions]))


@torch.no_grad()
def measure(heads: MiniClipHeads, data: Features, most: int = MEASURED) -> dict[str, float]:
    """On plain images and first captions: the values of `mini_clip_top1`, AUC of own against others' captions, and mean
    cosines; of `most` images at most, evenly spread, among the captions of all."""
    count = min(most, len(data.rows))
    chosen = [i * len(data.rows) // count for i in range(count)]
    first = [rows[0] for rows in data.rows]
    own = [data.captions[first[row]] for row in chosen]
    encoder = FeatureEncoder(heads, data)
    retrieval = CaptionRetrieval(encoder, "x")
    retrieval.set_candidates(data.captions[row] for row in first)
    retrieval.update(data.images[chosen, 0], own)
    values = {name.removeprefix("x_"): float(value) for name, value in retrieval.compute().items()}
    similarity = heads.image(data.images[chosen, 0]) @ encoder.encode_texts(own).T
    keys = torch.tensor([first[row] for row in chosen])
    same = (keys[:, None] == keys) & ~torch.eye(count, dtype=torch.bool)
    return {name: value for name, value in values.items() if np.isfinite(value)} | {
        "auc": pair_auc(similarity, same),
        "cosine_own": float(similarity.diagonal().mean()),
        "cosine_others": float(
            (similarity.sum() - similarity.diagonal().sum()) / (similarity.numel() - count)
        ),
    }


def save(
    out: Path,
    heads: MiniClipHeads,
    results: dict[str, dict[str, float]],
    argv: list[str],
    seconds: float,
    pairs: int,
) -> None:
    """Float16 weights, sizes with results, and a README for the reader."""
    parameters = sum(parameter.numel() for parameter in heads.parameters())
    write_weights(out / WEIGHTS, {name: value.half() for name, value in heads.state_dict().items()})
    write_json(
        out / CONFIG,
        {"format": 1, "version": MINI_CLIP_VERSION, "heads": describe(heads.config), "results": results},
    )
    rows = [
        f"| {split} | "
        + " | ".join(f"{values[name]:.3f}" if name in values else "–" for name in COLUMNS)
        + " |"
        for split, values in results.items()
    ]
    text = README.format(
        parameters=parameters,
        pairs=pairs,
        version=MINI_CLIP_VERSION,
        measured=MEASURED,
        candidates=MAX_CANDIDATES,
        header=" | ".join(COLUMNS),
        rule="---|" * len(COLUMNS),
        rows="\n".join(rows),
        command=f"python -m experiments.tools.train_mini_clip {shlex.join(argv)}",
        date=datetime.now(UTC).date().isoformat(),
        machine=f"{platform.machine()}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}",
        seconds=round(seconds),
        python=sys.version.split()[0],
    )
    with atomic_write(out / "README.md") as path:
        path.write_text(text, encoding="utf-8")


COLUMNS = ("top1", "top1_all", "style_accuracy", "auc", "cosine_own", "cosine_others")
README = """# Mini-CLIP heads, version {version}

Two heads ({parameters:,} parameters, float16) on frozen MiniLM-L6 and frozen AlexNet features, trained with InfoNCE on
{pairs:,} captioned images. They give `mini_clip_score` and `mini_clip_top1`: whether small emoji-like images follow
their captions. This is not CLIP; values are comparable only under these very weights.

Their own error, on real images (up to {measured} of a split, plain, with their first captions):

| split | {header} |
|---|{rule}
{rows}

- top1: the own caption is the best of 32 captions of the split (chance 0.031); top1_all: of all (up to {candidates}).
- style_accuracy: the own caption is better than the same words with each other style.
- auc: the own caption against those of all others.

Of the validation splits, `pairs` are combinations of concept and style that training lacked, though it had both;
`concepts` (or `validation`) never occur in training. A generator's shares are read against these.

    {command}

{date}, {machine}, Python {python}: {seconds} s.
"""
