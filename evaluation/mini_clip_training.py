"""Training of the heads behind `mini_clip_score`: frozen features, InfoNCE, and the numbers measured."""

import json
import platform
import shlex
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from switti.files import atomic_write, write_json
from switti.metrics.mini_clip import (
    CONFIG,
    WEIGHTS,
    ImageDescription,
    MiniClipConfig,
    MiniClipHeads,
    describe,
)
from switti.metrics.scores import pair_auc
from switti.text.minilm import MiniLMEncoder
from switti.weights.save import write_weights

CHUNK = 64


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
        captions.append(list(dict.fromkeys([sample["txt"].decode(), *extra])))
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
    network, generator = ImageDescription(config.picture_side), torch.Generator().manual_seed(seed)
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
    """Symmetric InfoNCE with a learned temperature; a batch row's own caption drawn at random in each step."""
    torch.manual_seed(seed)
    heads = MiniClipHeads(config, dropout=0.3)
    heads.image.standardize_like(data.images.flatten(0, 1))
    heads.text.standardize_like(data.texts)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    draw = np.random.default_rng(seed)
    batch = min(batch, len(data.rows))
    for step in range(steps):
        chosen = draw.choice(len(data.rows), batch, replace=False)
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


def contrast(heads: MiniClipHeads, images_BF: Tensor, texts_BP: Tensor, caption_B: Tensor) -> Tensor:
    """Symmetric InfoNCE. Rows with the same caption are not negatives and are excluded from the denominator."""
    logits = heads.image(images_BF) @ heads.text(texts_BP).T * heads.scale.clamp(max=4.0).exp()
    diagonal = torch.eye(len(caption_B), dtype=torch.bool)
    logits = logits.masked_fill((caption_B[:, None] == caption_B) & ~diagonal, float("-inf"))
    target = torch.arange(len(caption_B))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def measure(heads: MiniClipHeads, data: Features) -> dict[str, float]:
    """On plain images and first captions: AUC of own against others' captions, and of the own against the same
    caption with the other style's words (only where both exist), top-1 retrieval of the caption, mean cosines."""
    first = [rows[0] for rows in data.rows]
    images, texts = heads.image(data.images[:, 0]), heads.text(data.texts[first])
    similarity = images @ texts.T
    keys = torch.tensor(first)
    same = (keys[:, None] == keys) & ~torch.eye(len(keys), dtype=torch.bool)
    values = {
        "auc": pair_auc(similarity, same),
        "retrieval_at_1": float((similarity.argmax(1) == torch.arange(len(keys))).float().mean()),
        "cosine_own": float(similarity.diagonal().mean()),
        "cosine_others": float(
            (similarity.sum() - similarity.diagonal().sum()) / (similarity.numel() - len(keys))
        ),
    }
    return values | style_accuracy(similarity, [data.captions[row] for row in first])


def style_accuracy(similarity_NN: Tensor, captions: list[str]) -> dict[str, float]:
    """Share of images closer to their caption than to the same words with another style ("…, NAME style")."""
    place = {caption: index for index, caption in enumerate(captions)}
    styles = sorted({caption.rsplit(", ", 1)[-1] for caption in captions if caption.endswith(" style")})
    wins = []
    for index, caption in enumerate(captions):
        name, _, own = caption.rpartition(", ")
        for style in styles:
            rival = place.get(f"{name}, {style}")
            if own in styles and style != own and rival is not None:
                wins.append(float(similarity_NN[index, index] > similarity_NN[index, rival]))
    return {"style_accuracy": sum(wins) / len(wins)} if wins else {}


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
    write_json(out / CONFIG, {"format": 1, "heads": describe(heads.config), "results": results})
    rows = [
        f"| {split} | "
        + " | ".join(f"{values[name]:.3f}" if name in values else "–" for name in COLUMNS)
        + " |"
        for split, values in results.items()
    ]
    text = README.format(
        parameters=parameters,
        pairs=pairs,
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


COLUMNS = ("auc", "style_accuracy", "retrieval_at_1", "cosine_own", "cosine_others")
README = """# Mini-CLIP heads

Two heads ({parameters:,} parameters, float16) on frozen MiniLM-L6 and frozen AlexNet features, trained with InfoNCE on
{pairs:,} captioned images. They give `mini_clip_score`: whether small emoji-like images follow their captions.
This is not CLIP; values are comparable only under these very weights.

| split | {header} |
|---|{rule}
{rows}

auc: an image's own caption against the captions of all others. style_accuracy: own caption against the same words
with the other style. Validation concepts never occur in training.

    {command}

{date}, {machine}, Python {python}: {seconds} s.
"""
