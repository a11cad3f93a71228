"""Scores and features of generated images, unit by unit: one file of columns a metric, or of features a network.

A score file holds one row an image (Parquet: key, index, ordinal, and a column for each value of the metric), a
feature file one row an image (safetensors: features [N, F]). Both carry the digest of the images and of the metric that
they belong to.

Shape suffixes: B images of one batch, N of a unit, F features, K values of a metric.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.images import BadImageError, decode
from evaluation.generation import PROMPTS, read_manifest, work_of
from evaluation.image_shards import StoredImage, read_unit
from evaluation.numbered_work import Make, Work
from switti.errors import UserError
from switti.files import kind_of, read_json, sha256_file
from switti.metrics.catalogue import IMAGE_METRICS
from switti.metrics.config import MetricsConfig

if TYPE_CHECKING:
    from torch import Tensor

SCORES, FEATURES = "scores", "features"
# Settings of `metrics` that a metric's values depend on, by its network; other metrics have none.
_SETTINGS = {
    "open_clip": ("clip_model", "clip_weights"),
    "pick_score": ("pick_score",),
    "image_reward": ("image_reward", "image_reward_tokenizer"),
    "hps_v2_0": ("hps_v2_0", "hps_model"),
    "hps_v2_1": ("hps_v2_1", "hps_model"),
    "aesthetic": ("aesthetic", "aesthetic_model", "aesthetic_clip"),
    "mini_clip": ("mini_clip",),
}


@dataclass(frozen=True)
class ImageSet:
    """A folder of generated images that is complete."""

    folder: Path
    manifest: dict[str, Any]
    work: Work

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    def prompts(self) -> list[str]:
        """The texts that the images were made from."""
        rows = read_json(self.folder / PROMPTS, default=[])
        found = [row.get("prompt") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        texts = [text for text in found if isinstance(text, str)]
        if len(texts) != self.manifest["prompts"]["count"]:
            raise UserError(
                f"{self.folder / PROMPTS} does not hold the prompts of the images; generate them again"
            )
        return texts

    @property
    def prompts_digest(self) -> str:
        return str(self.manifest["prompts"]["digest"])


def is_image_set(folder: Path) -> bool:
    """Whether `experiments.generate` has written there."""
    return kind_of(folder) == "folder" and any(folder.glob("images-*.tar"))


def open_image_set(folder: Path) -> ImageSet:
    """Raises UserError if images are missing: an incomplete set is not scored."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} holds no images of experiments.generate")
    work = work_of(folder, manifest)
    missing = work.missing()
    if missing:
        left, total = sum(work.sizes[unit] for unit in missing), sum(work.sizes)
        raise UserError(
            f"{folder} has {total - left} of {total} images of {manifest['name']}; run its experiments.generate "
            "command again, which makes the others"
        )
    return ImageSet(folder, manifest, work)


def metric_digest(config: MetricsConfig, name: str) -> str:
    """Digest of what determines a metric's values: its name, its network's settings, and the files they name."""
    info = IMAGE_METRICS[name]
    convention = info.network if info.network.startswith("inception") else ""
    settings = ("inception",) if convention else _SETTINGS.get(info.network, ())
    content: dict[str, Any] = {"network": info.network}
    for setting in settings:
        value = getattr(config, setting)
        content[setting] = sha256_file(value) if value and kind_of(value) == "file" else value
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def score_work(images: ImageSet, label: str, metric: str) -> Work:
    """The score files of one metric. metric: its digest."""
    return Work(
        images.folder / SCORES, label, ".parquet", images.work.sizes, _joined(images, metric), parquet_stamp
    )


def feature_work(images: ImageSet, network: str, metric: str) -> Work:
    """The feature files of one network."""
    return Work(
        images.folder / FEATURES,
        network,
        ".safetensors",
        images.work.sizes,
        _joined(images, metric),
        tensor_stamp,
    )


def _joined(images: ImageSet, metric: str) -> str:
    return hashlib.sha256(f"{images.work.digest} {metric}".encode()).hexdigest()


# (images uint8 [B, 3, H, W], captions) → [B] or [B, K]
Score = Callable[["Tensor", list[str]], "Tensor"]


def score_maker(
    images: ImageSet, score: Score, labels: list[str], work: Work, batch: int, device: Any
) -> Make:
    """The unit function of a metric whose values have these labels."""

    def make(unit: int, path: Path, advance: Callable[[int], None]) -> None:
        stored: list[StoredImage] = []
        values: list[np.ndarray] = []
        for part, tensor in _batches(images, unit, batch, device):
            values.append(score(tensor, [image.meta["prompt"] for image in part]).double().cpu().numpy())
            # The bytes are not needed any more.
            stored += [replace(image, content=b"") for image in part]
            advance(len(part))
        table = dict(zip(labels, np.concatenate(values).reshape(len(stored), -1).T, strict=True))
        write_scores(path, stored, table, work.digest)

    return make


def feature_maker(
    images: ImageSet, network: Callable[["Tensor"], "Tensor"], work: Work, batch: int, device: Any
) -> Make:
    """The unit function of a feature network."""

    def make(unit: int, path: Path, advance: Callable[[int], None]) -> None:
        from safetensors.numpy import save_file

        rows: list[np.ndarray] = []
        for part, tensor in _batches(images, unit, batch, device):
            rows.append(network(tensor).float().cpu().numpy())
            advance(len(part))
        save_file({"features": np.concatenate(rows)}, path, {"digest": work.digest})

    return make


def _batches(
    images: ImageSet, unit: int, batch: int, device: Any
) -> Iterator[tuple[list[StoredImage], "Tensor"]]:
    """Batches of decoded images of one size. A corrupt shard is set aside, so that it is made again."""
    path = images.work.path(unit)
    part: list[StoredImage] = []
    pixels: list[np.ndarray] = []
    try:
        for image in read_unit(path):
            array = np.asarray(decode(image.content))
            if part and (len(part) == batch or array.shape != pixels[0].shape):
                yield part, _stack(pixels, device)
                part, pixels = [], []
            part.append(image)
            pixels.append(array)
    except (UserError, BadImageError) as error:
        aside = path.with_name(f"{path.name}.corrupt")
        path.replace(aside)
        raise UserError(
            f"{error}; it was moved to {aside.name}: run the experiments.generate command of {images.folder} "
            "again, and then this one"
        ) from error
    if part:
        yield part, _stack(pixels, device)


def _stack(pixels: list[np.ndarray], device: Any) -> "Tensor":
    import torch

    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous().to(device)


# ---- files ------------------------------------------------------------------------------------------------------


def write_scores(
    path: Path, images: list[StoredImage], values: Mapping[str, np.ndarray], digest: str
) -> None:
    """One score file; equal values give equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "key": [image.key for image in images],
            "index": pa.array([image.meta["index"] for image in images], pa.int32()),
            "ordinal": pa.array([image.meta["ordinal"] for image in images], pa.int32()),
            **{label: pa.array(column, pa.float64()) for label, column in values.items()},
        }
    )
    pq.write_table(table.replace_schema_metadata({"digest": digest}), path, compression="zstd")


def parquet_stamp(path: Path) -> str | None:
    """The digest that a score file carries; None if it is not a complete file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):
        return None
    digest = metadata.get(b"digest")
    return None if digest is None else digest.decode(errors="replace")


def tensor_stamp(path: Path) -> str | None:
    """The same for a feature file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("digest")
    except (OSError, SafetensorError, ValueError):
        return None


@dataclass(frozen=True)
class PromptMeans:
    """A value's mean over the images of each prompt. index_P: ascending; prompts where it is undefined are left out."""

    index_P: np.ndarray
    mean_P: np.ndarray


def read_scores(work: Work, label: str) -> PromptMeans:
    """One value of a metric. Raises UserError if a file is missing or has other rows than its unit has images."""
    import pyarrow.parquet as pq

    indices, values = [], []
    for unit, size in enumerate(work.sizes):
        if not work.is_done(unit):
            raise UserError(f"{work.path(unit)} is missing or corrupt; run the same command again")
        table = pq.read_table(work.path(unit), columns=["index", label])
        if len(table) != size:
            raise UserError(f"{work.path(unit)} has {len(table)} rows for {size} images; remove it")
        indices.append(table["index"].to_numpy())
        values.append(table[label].to_numpy())
    index_N, value_N = np.concatenate(indices), np.concatenate(values)
    defined = ~np.isnan(value_N)
    index_P, place, count = np.unique(index_N[defined], return_inverse=True, return_counts=True)
    total = np.bincount(place, weights=value_N[defined], minlength=len(index_P))
    return PromptMeans(index_P, total / count)


def read_features(work: Work) -> "Tensor":
    """Features [N, F] of all units, float32."""
    import torch
    from safetensors.torch import load_file

    parts = []
    for unit, size in enumerate(work.sizes):
        if not work.is_done(unit):
            raise UserError(f"{work.path(unit)} is missing or corrupt; run the same command again")
        part = load_file(work.path(unit))["features"]
        if len(part) != size:
            raise UserError(f"{work.path(unit)} has {len(part)} rows for {size} images; remove it")
        parts.append(part)
    return torch.cat(parts)
