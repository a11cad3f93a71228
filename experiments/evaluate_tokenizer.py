"""python -m experiments.evaluate_tokenizer TOKENIZER … --data SHARDS [--resolution 64] [--pictures 300] [--out DIR]

How well tokenizers reconstruct pictures (Table 1), side by side: PSNR, SSIM, LPIPS, the distance of the two sets on
AlexNet features, the use of the codebook, and how much of the latent is missing after each scale.

TOKENIZER is a run folder (task tokenizer or decoder), a weights file or folder, a hub id, or embedded:demo. It is
convolutional: --scales reads it at a resolution that it was not trained at. Writes table.csv, pictures.csv and
worst.png (the worst pictures with their reconstructions and amplified differences) into DIR.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.command import run
from switti.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from switti.metrics.tokenizer_quality import QualityNetworks, TokenizerReport
    from switti.models.rqvae import RQVAE


def main(argv: list[str]) -> int:
    options = parse(argv)
    names = labels(options.tokenizers)

    import torch

    from experiments.tokenizer_tables import draw_sheet, worst_first, write_tables
    from switti.metrics.clip_iqa import load_clip_iqa
    from switti.metrics.tokenizer_quality import build_quality_networks

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {name: open_tokenizer(source, options.scales).to(device) for name, source in names.items()}
    resolution = options.resolution or next(iter(models.values())).config.resolution
    check_resolution(models, resolution)
    pictures = Pictures(options.data, resolution, options.pictures)
    judge = load_clip_iqa(options.clip_iqa, device) if options.clip_iqa else None
    reports = measure(models, pictures, build_quality_networks(device, judge), options.batch)
    print(f"{len(pictures.keys)} pictures of {' '.join(options.data)}, {resolution} px")
    write_tables(options.out, reports, pictures.keys)
    if judge is None:
        print("CLIP-IQA is left out; --clip-iqa NETWORK measures it with a CLIP in transformers format")
    worst = {number: pictures.read(number) for number in worst_first(reports)[: options.worst]}
    draw_sheet(options.out / "worst.png", models, reports, worst, pictures.keys)
    print(f"{options.out}: table.csv, pictures.csv, worst.png")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    form = argparse.ArgumentParser(
        prog="python -m experiments.evaluate_tokenizer",
        description=__doc__.split("\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = form.add_argument
    add("tokenizers", nargs="+", metavar="TOKENIZER", help="run folder, weights, hub id or embedded:demo")
    add(
        "--data",
        nargs="+",
        required=True,
        help="shards, or a folder of them (its validation split, if it has one)",
    )
    add("--resolution", type=int, help="side of the pictures in px (the first tokenizer's)")
    add("--scales", type=scales, help="sides of the token maps, as in 1,2,3,4,6,8 (each tokenizer's own)")
    add("--pictures", type=int, default=300, help="spread evenly over the shards (%(default)s)")
    add("--batch", type=int, default=16, help="pictures at a time (%(default)s)")
    add("--worst", type=int, default=12, help="pictures to draw (%(default)s)")
    add("--clip-iqa", help="CLIP in transformers format, a hub id or a folder (none)")
    add("--out", type=Path, default=Path("runs/tokenizers"), help="folder of the results (%(default)s)")
    options = form.parse_args(argv)
    for name in ("pictures", "batch", "worst", "resolution"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    return options


def scales(text: str) -> list[int]:
    """ "1,2,3" as a list."""
    return [int(part) for part in text.split(",")]


# ---- tokenizers -------------------------------------------------------------------------------------------------


def labels(sources: list[str]) -> dict[str, str]:
    """Short name → source; the whole source where a short name would be used twice."""
    short = [Path(source).parent.name if Path(source).is_file() else Path(source).name for source in sources]
    names = [name if short.count(name) == 1 else source for name, source in zip(short, sources, strict=True)]
    if len(set(names)) != len(names):
        raise UserError(f"a tokenizer is named twice: {' '.join(sources)}")
    return dict(zip(names, sources, strict=True))


def open_tokenizer(source: str, scales: list[int] | None) -> "RQVAE":
    """Frozen; a run's exported weights, which hold its average."""
    from configs.loading import from_run
    from lightning_modules.tokenizer import WEIGHTS_FILE
    from switti.loading import load_tokenizer

    folder = Path(source)
    if not (folder / "config.yaml").is_file():
        return load_tokenizer(source, scales=scales)
    config = from_run(folder)
    if config.task == "generator":
        raise UserError(f"{folder} is a generator run; its tokenizer is {config.tokenizer_weights}")
    if not (folder / WEIGHTS_FILE).is_file():
        raise UserError(f"{folder} has no {WEIGHTS_FILE} yet: a run writes it when it is finished")
    return load_tokenizer(folder / WEIGHTS_FILE, config=config.tokenizer, scales=scales)


def check_resolution(models: "dict[str, RQVAE]", resolution: int) -> None:
    """UserError for a tokenizer whose finest token map does not stand for pictures of that size."""
    for name, model in models.items():
        config = model.config
        if config.resolution != resolution:
            raise UserError(
                f"{name} with scales {','.join(map(str, config.scales))} reads pictures of {config.resolution} px, "
                f"not {resolution}; give --scales that end with {resolution / config.downsampling:g}"
            )


# ---- pictures ---------------------------------------------------------------------------------------------------


class Pictures:
    """`count` pictures spread evenly over shards, cropped in the centre; damaged ones are left out.

    keys: of those that have been read whole, in order; `read` takes their numbers.
    """

    def __init__(self, data: list[str], resolution: int, count: int) -> None:
        from datamodules.datasets import ShardSamples
        from datamodules.index import expand, load_index
        from datamodules.samples import Framing

        shards = [load_index(path) for path in expand("--data", [pattern(entry) for entry in data])]
        self.samples = ShardSamples(shards, Framing(resolution, resolution, False, 0.0), None, seed=0)
        every = [(shard, row) for shard, index in enumerate(shards) for row in range(len(index))]
        count = min(count, len(every))
        self.wanted = [every[i * len(every) // count] for i in range(count)]
        self.keys: list[str] = []
        self._places: list[tuple[int, int]] = []

    def batches(self, size: int) -> "Iterator[Tensor]":
        """Pictures in [-1, 1], so many at a time. UserError if none can be read."""
        from datamodules.samples import Sample, collate

        for start in range(0, len(self.wanted), size):
            places = self.wanted[start : start + size]
            read = [(place, self.samples.read(*place, epoch=0)) for place in places]
            whole = [(place, sample) for place, sample in read if isinstance(sample, Sample)]
            if whole:
                self._places += [place for place, _ in whole]
                self.keys += [sample.key for _, sample in whole]
                yield collate([sample for _, sample in whole], None)["image"]
        if not self.keys:
            raise UserError(f"--data: none of {len(self.wanted)} pictures can be read")

    def read(self, number: int) -> "Tensor":
        """One picture again, [3, H, W]."""
        from datamodules.samples import collate

        return collate([self.samples.read(*self._places[number], epoch=0)], None)["image"][0]


def pattern(entry: str) -> str:
    """A folder's validation split if it has one, else all its shards; anything else as it is."""
    if not Path(entry).is_dir():
        return entry
    split = "validation-" if any(Path(entry).glob("validation-*.tar")) else ""
    return f"{entry}/{split}*.tar"


def measure(
    models: "dict[str, RQVAE]", pictures: Pictures, networks: "QualityNetworks", batch: int
) -> "dict[str, TokenizerReport]":
    """Report of each tokenizer on the same pictures."""
    from tqdm import tqdm

    from switti.metrics.tokenizer_quality import TokenizerQuality

    quality = {name: TokenizerQuality(model, networks) for name, model in models.items()}
    steps = -(-len(pictures.wanted) // batch)
    for image_B3HW in tqdm(pictures.batches(batch), total=steps, unit="batch", desc="reconstructing"):
        for tokenizer in quality.values():
            tokenizer.update(image_B3HW)
    return {name: tokenizer.compute() for name, tokenizer in quality.items()}


if __name__ == "__main__":
    run(main)
