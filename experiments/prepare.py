"""python -m experiments.prepare emoji|FOLDER|TABLE --out DIR

Pictures with captions → WebDataset shards `train-*.tar` and `validation-*.tar` with a manifest.

emoji    two open emoji styles that ship inside packages (see datamodules/emoji.py): no download
FOLDER   pictures with a .txt beside each
TABLE    .csv, .tsv or .jsonl with a file and a caption column, or COCO captions (.json, with --images DIR)

The shards appear all at once when everything is written; the same command again does nothing.
"""

import argparse
import logging
import os
import time
from pathlib import Path

from datamodules.emoji import ATTRIBUTION, emoji_items
from datamodules.preparing import Listing, prepare
from datamodules.sources import list_source
from experiments.command import run
from switti.errors import UserError

EMOJI_SIZE, PICTURE_SIZE = 64, 512


def parser() -> argparse.ArgumentParser:
    form = argparse.ArgumentParser(
        prog="python -m experiments.prepare",
        description=__doc__.split("\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = form.add_argument
    add("source", help="'emoji', a folder, a table or COCO captions")
    add("--out", type=Path, required=True, help="folder of the shards")
    add("--size", type=int, help=f"side in px (emoji: {EMOJI_SIZE}); pictures with a longer shorter side are shrunk "
        f"to it ({PICTURE_SIZE}); 0 keeps their bytes")  # fmt: skip
    add("--skin-tones", action="store_true", help="emoji: with skin tones (near-duplicates)")
    add("--flags", action="store_true", help="emoji: with the flags of countries and their parts")
    add("--images", type=Path, help="table or COCO: folder that the file names start from")
    add("--file-column", default="file", help="table: column of the file names (%(default)s)")
    add("--caption-column", default="caption", help="table: column of the captions (%(default)s)")
    add(
        "--validation-fraction",
        type=float,
        default=0.1,
        help="expected share of the validation split (%(default)s)",
    )
    add("--shard-size", type=int, default=1000, help="samples a shard (%(default)s)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes (%(default)s)")
    return form


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    check(options)
    begun = time.perf_counter()
    if options.source == "emoji":
        settings = {"source": "emoji", "skin_tones": options.skin_tones, "flags": options.flags}
        listing = Listing(emoji_items(options.skin_tones, options.flags), settings, attribution=ATTRIBUTION)
        size = EMOJI_SIZE if options.size is None else options.size
    else:
        listing = list_source(
            Path(options.source), options.images, options.file_column, options.caption_column
        )
        size = PICTURE_SIZE if options.size is None else options.size
    manifest = prepare(
        listing, options.out, size, options.validation_fraction, options.shard_size, options.workers
    )
    if manifest is None:
        print(f"{options.out} already holds these shards; nothing to do")
        return 0
    seconds = time.perf_counter() - begun
    counts = ", ".join(f"{split} {n}" for split, n in manifest["samples"].items())
    skipped, shards = len(manifest["skipped"]), len(manifest["shards"])
    print(f"{options.out}: {counts} samples in {shards} shards, {skipped} skipped, {seconds:.1f} s")
    return 0


def check(options: argparse.Namespace) -> None:
    """Refuse values and combinations that cannot be meant."""
    emoji = options.source == "emoji"
    if emoji and options.images is not None:
        raise UserError("--images does not go with emoji")
    if not emoji and (options.skin_tones or options.flags):
        raise UserError("--skin-tones and --flags go with emoji only")
    if options.size is not None and options.size < (1 if emoji else 0):
        raise UserError(
            f"--size {options.size} must be {'positive' if emoji else 'positive, or 0 to keep the bytes'}"
        )
    if not 0.0 <= options.validation_fraction < 1.0:
        raise UserError(f"--validation-fraction {options.validation_fraction} must lie in [0, 1)")
    if options.shard_size < 1:
        raise UserError(f"--shard-size {options.shard_size} must be positive")


if __name__ == "__main__":
    run(main)
