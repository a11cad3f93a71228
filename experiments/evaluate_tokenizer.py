"""python -m experiments.evaluate_tokenizer TOKENIZER … [--data SHARDS] [--images 300] [--scales …] [--out DIR]

Table 1 for any tokenizers side by side, each a run folder (task tokenizer or decoder), a weights file or folder, a hub
id, or embedded:demo: PSNR, SSIM, LPIPS, CLIP-IQA, the distance of the two sets of images, use of the codebook,
perplexity and the share of the latent missing after each scale. A tokenizer is convolutional: --scales reads it at a
resolution that it was not trained at. Writes table.csv, images.csv, and the worst images with reconstructions and
differences as page.html and worst.png.

    python -m experiments.evaluate_tokenizer embedded:demo runs/single/demo --data data/emoji64
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.config import DataConfig
from experiments.cli import argument_parser, run
from switti.errors import UserError
from switti.files import check_output_folder, kind_of

if TYPE_CHECKING:
    import torch

    from evaluation.tokenizers import EvaluationImages
    from switti.metrics.tokenizer_quality import QualityNetworks


def main(argv: list[str]) -> int:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("tokenizers", nargs="+", metavar="TOKENIZER", help="run folder, weights, hub id, or embedded:demo")
    add("--data", nargs="+", help="shards, or a folder of them: its validation split, if any (data/emoji64)")
    add("--images", type=int, default=300, help="images to measure, spread evenly (%(default)s)")
    add("--resolution", type=int, help="side of the images in px (the first tokenizer's)")
    add("--scales", type=_scales, help="scales, such as 1,2,3,4,6,8: another resolution")
    add("--batch", type=int, default=16, help="images at a time (%(default)s)")
    add("--worst", type=int, default=24, help="images to show (%(default)s)")
    add("--clip-iqa", help="CLIP in transformers format, a hub id or a folder (none: skipped)")
    add("--inception", type=Path, help="weights of FID's Inception (none: AlexNet's features, rfid_alexnet)")
    add("--out", type=Path, default=Path("runs/tokenizers"), help="folder of the results (%(default)s)")
    options = parser.parse_args(argv)
    for name in ("images", "batch", "worst", "resolution"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    if kind_of(options.out, follow=False):
        check_output_folder(options.out)
    evaluate(options)
    return 0


def evaluate(options: argparse.Namespace) -> None:
    """Prints the table; writes table.csv, images.csv, page.html and worst.png into options.out."""
    from evaluation.tokenizers import labels

    out, names = options.out, labels(options.tokenizers)

    import torch

    from evaluation.tokenizer_tables import worst_first, write_tables
    from evaluation.tokenizers import EvaluationImages, check_resolution, measure, open_tokenizer
    from reports.tokenizer_page import show_images, write_page, write_sheet

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {name: open_tokenizer(source, options.scales).to(device) for name, source in names.items()}
    resolution = options.resolution or next(iter(models.values())).config.resolution
    check_resolution(models, resolution)
    data = options.data or [str(DataConfig().validation)]
    images = EvaluationImages(data, resolution, options.images)
    networks = build_networks(options, device)
    reports = measure(models, images, networks, options.batch)
    notes = remarks(images, data, networks)
    write_tables(out, reports, images.keys)
    print("\n".join(notes))
    worst = {number: images.read(number) for number in worst_first(reports)[: options.worst]}
    shown = show_images(models, reports, worst, images.keys)
    write_page(out / "page.html", reports, shown, notes)
    write_sheet(out / "worst.png", shown[:12])
    print(f"{out}: table.csv, images.csv, page.html, worst.png")


def build_networks(options: argparse.Namespace, device: "torch.device") -> "QualityNetworks":
    """The networks of the metrics; CLIP-IQA and Inception only where they are given."""
    from switti.metrics.clip_iqa import load_clip_iqa
    from switti.metrics.tokenizer_quality import build_quality_networks

    clip_iqa = load_clip_iqa(options.clip_iqa, device) if options.clip_iqa else None
    return build_quality_networks(device, clip_iqa, options.inception)


def remarks(images: "EvaluationImages", data: list[str], networks: "QualityNetworks") -> list[str]:
    """Notes on what was measured and what was skipped."""
    from switti.metrics.config import ENOUGH_IMAGES
    from switti.metrics.tokenizer_quality import psnr_by_scale_name

    lines = [f"{len(images.keys)} images of {' '.join(data)}, {images.resolution} px"]
    if images.enlarged:
        lines.append(
            f"{images.enlarged} of them have a side below {images.resolution} px and were enlarged (bicubic)"
        )
    if images.unreadable:
        lines.append(f"{images.unreadable} images cannot be read and were skipped")
    lines.append(
        f"{psnr_by_scale_name(len(images.keys))}: error after each scale, the PSNR of the first images decoded "
        "from scales 0 to k alone"
    )
    if networks.clip_iqa is None:
        lines.append("CLIP-IQA is skipped; --clip-iqa NETWORK measures it with a CLIP in transformers format")
    if networks.features_name != "inception":
        lines.append(
            f"rfid_{networks.features_name} is on another network's features than the published FID; --inception FILE "
            "takes those of Inception"
        )
    if len(images.keys) < ENOUGH_IMAGES:
        lines.append(
            f"rfid_{networks.features_name} over {len(images.keys)} images is higher than over more images: it ranks "
            f"tokenizers on the same images only (--images {ENOUGH_IMAGES} or more)"
        )
    return lines


def _scales(text: str) -> list[int]:
    """ "1,2,3" as a list."""
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    run(main)
