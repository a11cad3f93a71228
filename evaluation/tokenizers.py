"""Tokenizers side by side on the same images (Table 1)."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from switti.errors import UserError
from switti.run_folder import CONFIG

if TYPE_CHECKING:
    from torch import Tensor

    from switti.metrics.tokenizer_quality import QualityNetworks, TokenizerReport
    from switti.tokenizer.rqvae import RQVAE


# ---- tokenizers -------------------------------------------------------------------------------------------------


def labels(sources: list[str]) -> dict[str, str]:
    """Short name → source; the full source where a short name would occur twice."""
    short = [Path(source).parent.name if Path(source).is_file() else Path(source).name for source in sources]
    names = [name if short.count(name) == 1 else source for name, source in zip(short, sources, strict=True)]
    if len(set(names)) != len(names):
        raise UserError(f"a tokenizer is named twice: {' '.join(sources)}")
    return dict(zip(names, sources, strict=True))


def open_tokenizer(source: str, scales: list[int] | None) -> "RQVAE":
    """Frozen; a run's exported weights, which hold its average."""
    from configs.loading import from_run
    from lightning_modules.autoencoder_base import WEIGHTS_FILE
    from switti.weights.load import load_tokenizer

    folder = Path(source)
    if not (folder / CONFIG).is_file():
        return load_tokenizer(source, scales=scales)
    config = from_run(folder)
    if config.task == "generator":
        raise UserError(f"{folder} is a generator run; its tokenizer is {config.tokenizer_weights}")
    if not (folder / WEIGHTS_FILE).is_file():
        raise UserError(f"{folder} has no {WEIGHTS_FILE} yet: a run writes it when it is finished")
    return load_tokenizer(folder / WEIGHTS_FILE, config=config.tokenizer, scales=scales)


def check_resolution(models: "dict[str, RQVAE]", resolution: int) -> None:
    """UserError for a tokenizer whose finest scale does not match images of that size."""
    for name, model in models.items():
        config = model.config
        if config.resolution != resolution:
            raise UserError(
                f"{name} with scales {','.join(map(str, config.scales))} reads images of {config.resolution} px, "
                f"not {resolution}; give --scales that end with {resolution / config.downsampling:g}"
            )


# ---- images ---------------------------------------------------------------------------------------------------


class EvaluationImages:
    """`count` images spread evenly over shards, center-cropped; those that cannot be read are skipped.

    An image whose shorter side is below the resolution is enlarged (bicubic) until it fits, as in training.
    keys: of the images read so far, in order; `read` takes their numbers. enlarged, unreadable: their counts.
    """

    def __init__(self, data: list[str], resolution: int, count: int) -> None:
        from datamodules.datasets import ShardSamples
        from datamodules.shards.index import load_index
        from datamodules.shards.samples import Framing
        from datamodules.shards.shard_paths import expand, split_pattern

        shards = [load_index(path) for path in expand("--data", [split_pattern(entry) for entry in data])]
        self.resolution = resolution
        self.samples = ShardSamples(shards, Framing(resolution, resolution, False, 0.0), None, seed=0)
        every = [(shard, row) for shard, index in enumerate(shards) for row in range(len(index))]
        count = min(count, len(every))
        self.wanted = [every[i * len(every) // count] for i in range(count)]
        self.keys: list[str] = []
        self.enlarged = self.unreadable = 0
        self._places: list[tuple[int, int]] = []

    def batches(self, size: int) -> "Iterator[Tensor]":
        """Images in [-1, 1], `size` at a time. UserError if none can be read."""
        from datamodules.batches import collate
        from datamodules.shards.samples import Sample

        for start in range(0, len(self.wanted), size):
            places = self.wanted[start : start + size]
            read = [(place, self.samples.read(*place, epoch=0)) for place in places]
            readable = [(place, sample) for place, sample in read if isinstance(sample, Sample)]
            self.unreadable += len(read) - len(readable)
            if readable:
                self._places += [place for place, _ in readable]
                self.keys += [sample.key for _, sample in readable]
                self.enlarged += sum(sample.enlarged for _, sample in readable)
                yield collate([sample for _, sample in readable])["image"]
        if not self.keys:
            raise UserError(f"--data: none of {len(self.wanted)} images can be read")

    def read(self, number: int) -> "Tensor":
        """One image again, [3, H, W]."""
        from datamodules.batches import collate

        return collate([self.samples.read(*self._places[number], epoch=0)])["image"][0]


def measure(
    models: "dict[str, RQVAE]", images: EvaluationImages, networks: "QualityNetworks", batch: int
) -> "dict[str, TokenizerReport]":
    """Report of each tokenizer on the same images."""
    from tqdm import tqdm

    from switti.metrics.tokenizer_quality import TokenizerQuality

    quality = {name: TokenizerQuality(model, networks) for name, model in models.items()}
    steps = -(-len(images.wanted) // batch)
    for image_B3HW in tqdm(images.batches(batch), total=steps, unit="batch", desc="reconstructing"):
        for tokenizer in quality.values():
            tokenizer.update(image_B3HW)
    return {name: tokenizer.compute() for name, tokenizer in quality.items()}
