"""Measures tokenizers side by side (Table 1) for `experiments.evaluate tokenizer=…`. Not a command itself."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.config import DataConfig
from switti.errors import UserError
from switti.files import check_output_folder, kind_of
from switti.run_folder import CONFIG

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from switti.metrics.tokenizer_quality import QualityNetworks, TokenizerReport
    from switti.models.rqvae import RQVAE

WORD = "tokenizer="
PICTURES = 300


def add_options(parser: argparse.ArgumentParser) -> list[str]:
    """The options that belong to tokenizers alone, all None unless given; their names."""
    group = parser.add_argument_group(
        "of tokenizers (tokenizer=…); --data and --out of exported folders, too"
    )
    add = group.add_argument
    names = [
        add(
            "--data",
            nargs="+",
            help="shards, or a folder of them (its validation split, if it has one; tokenizers: data/emoji64)",
        ),
        add("--resolution", type=int, help="side of the pictures in px (the first tokenizer's)"),
        add(
            "--scales",
            type=_scales,
            help="sides of the token maps, as in 1,2,3,4,6,8 (each tokenizer's own): another resolution",
        ),
        add("--batch", type=int, help="pictures at a time (16)"),
        add("--worst", type=int, help="pictures to show (24)"),
        add("--clip-iqa", help="CLIP in transformers format, a hub id or a folder (none: left out)"),
        add(
            "--inception",
            type=Path,
            help="weights of FID's Inception (none: AlexNet's features, rfid_alexnet)",
        ),
        add(
            "--out",
            type=Path,
            help="folder of the results (tokenizers: runs/tokenizers; exported folders: evaluation)",
        ),
    ]
    return [action.dest for action in names]


def _scales(text: str) -> list[int]:
    """ "1,2,3" as a list."""
    return [int(part) for part in text.split(",")]


def sources_in(words: list[str]) -> list[str]:
    """Tokenizers of words such as tokenizer=A,B: what exists is one, even with commas in its name."""
    values = [word.removeprefix(WORD) for word in words if word.startswith(WORD)]
    return [
        source
        for value in values
        for source in ([value] if Path(value).exists() else value.split(","))
        if source
    ]


def evaluate(sources: list[str], options: argparse.Namespace) -> int:
    """Prints the table; writes table.csv, pictures.csv, page.html and worst.png into options.out."""
    if not sources:
        raise UserError(f"{WORD} names no tokenizer; give run folders, weights, hub ids or embedded:demo")
    for name in ("pictures", "batch", "worst", "resolution"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    names = labels(sources)
    out = options.out or Path("runs/tokenizers")
    if kind_of(out, follow=False):
        check_output_folder(out)

    import torch

    from experiments.tokenizer_page import show_pictures, write_page, write_sheet
    from experiments.tokenizer_tables import worst_first, write_tables

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {name: open_tokenizer(source, options.scales).to(device) for name, source in names.items()}
    resolution = options.resolution or next(iter(models.values())).config.resolution
    check_resolution(models, resolution)
    data = options.data or [str(DataConfig().validation)]
    pictures = Pictures(data, resolution, options.pictures or PICTURES)
    networks = judges(options, device)
    reports = measure(models, pictures, networks, options.batch or 16)
    notes = remarks(pictures, data, networks)
    write_tables(out, reports, pictures.keys)
    print("\n".join(notes))
    worst = {number: pictures.read(number) for number in worst_first(reports)[: options.worst or 24]}
    shown = show_pictures(models, reports, worst, pictures.keys)
    write_page(out / "page.html", reports, shown, notes)
    write_sheet(out / "worst.png", shown[:12])
    print(f"{out}: table.csv, pictures.csv, page.html, worst.png")
    return 0


def judges(options: argparse.Namespace, device: "torch.device") -> "QualityNetworks":
    """The networks of the metrics; those that must be given are left out without."""
    from switti.metrics.clip_iqa import load_clip_iqa
    from switti.metrics.tokenizer_quality import build_quality_networks

    judge = load_clip_iqa(options.clip_iqa, device) if options.clip_iqa else None
    return build_quality_networks(device, judge, options.inception)


def remarks(pictures: "Pictures", data: list[str], networks: "QualityNetworks") -> list[str]:
    """What was measured, and what was not."""
    from switti.metrics.tokenizer_quality import psnr_by_scale_name
    from switti.report.metric_names import ENOUGH_IMAGES

    lines = [f"{len(pictures.keys)} pictures of {' '.join(data)}, {pictures.resolution} px"]
    if pictures.enlarged:
        lines.append(
            f"{pictures.enlarged} of them have a side below {pictures.resolution} px and were enlarged (bicubic)"
        )
    if pictures.damaged:
        lines.append(f"{pictures.damaged} pictures cannot be read and were left out")
    lines.append(
        f"{psnr_by_scale_name(len(pictures.keys))}: error after each scale, the PSNR of the first pictures decoded "
        "from scales 0 to k alone"
    )
    if networks.clip_iqa is None:
        lines.append(
            "CLIP-IQA is left out; --clip-iqa NETWORK measures it with a CLIP in transformers format"
        )
    if networks.features_name != "inception":
        lines.append(
            f"rfid_{networks.features_name} is on another network's features than the published FID; --inception FILE "
            "takes those of Inception"
        )
    if len(pictures.keys) < ENOUGH_IMAGES:
        lines.append(
            f"rfid_{networks.features_name} over {len(pictures.keys)} images lies above what more would give: it ranks "
            f"tokenizers on the same images only (--pictures {ENOUGH_IMAGES} or more)"
        )
    return lines


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
    from lightning_modules.reconstruction import WEIGHTS_FILE
    from switti.loading import load_tokenizer

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

    A picture whose shorter side is below the resolution is enlarged (bicubic) until it fits, as in training.
    keys: of those that have been read whole, in order; `read` takes their numbers. enlarged, damaged: how many.
    """

    def __init__(self, data: list[str], resolution: int, count: int) -> None:
        from datamodules.datasets import ShardSamples
        from datamodules.index import load_index
        from datamodules.samples import Framing
        from datamodules.shard_paths import expand

        shards = [load_index(path) for path in expand("--data", [pattern(entry) for entry in data])]
        self.resolution = resolution
        self.samples = ShardSamples(shards, Framing(resolution, resolution, False, 0.0), None, seed=0)
        every = [(shard, row) for shard, index in enumerate(shards) for row in range(len(index))]
        count = min(count, len(every))
        self.wanted = [every[i * len(every) // count] for i in range(count)]
        self.keys: list[str] = []
        self.enlarged = self.damaged = 0
        self._places: list[tuple[int, int]] = []

    def batches(self, size: int) -> "Iterator[Tensor]":
        """Pictures in [-1, 1], so many at a time. UserError if none can be read."""
        from datamodules.batches import collate
        from datamodules.samples import Sample

        for start in range(0, len(self.wanted), size):
            places = self.wanted[start : start + size]
            read = [(place, self.samples.read(*place, epoch=0)) for place in places]
            whole = [(place, sample) for place, sample in read if isinstance(sample, Sample)]
            self.damaged += len(read) - len(whole)
            if whole:
                self._places += [place for place, _ in whole]
                self.keys += [sample.key for _, sample in whole]
                self.enlarged += sum(sample.enlarged for _, sample in whole)
                yield collate([sample for _, sample in whole])["image"]
        if not self.keys:
            raise UserError(f"--data: none of {len(self.wanted)} pictures can be read")

    def read(self, number: int) -> "Tensor":
        """One picture again, [3, H, W]."""
        from datamodules.batches import collate

        return collate([self.samples.read(*self._places[number], epoch=0)])["image"][0]


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
