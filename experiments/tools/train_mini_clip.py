"""python -m experiments.tools.train_mini_clip --data "data/emoji7/train-*.tar" --out switti/assets/mini_clip

Trains the two heads of the small dual encoder behind `mini_clip_score` and `mini_clip_top1` on a captioned data set
(InfoNCE on frozen MiniLM and AlexNet features, computed once) and writes weights, config and a README with their own
error on real images, for training images and for each validation split.

About ten minutes of CPU time for the emoji in seven styles. Beside other busy processes set OMP_NUM_THREADS=1.
"""

import argparse
import json
import time
from glob import glob
from pathlib import Path

from datamodules.shards.shard_paths import split_of
from experiments.cli import argument_parser, run
from switti.errors import UserError


def parser() -> argparse.ArgumentParser:
    form = argument_parser(__doc__)
    form.add_argument("--data", nargs="+", required=True, help="training shards (names or a quoted pattern)")
    form.add_argument(
        "--validation", nargs="+", help="validation shards (default: validation-*.tar beside --data)"
    )
    form.add_argument("--out", type=Path, required=True, help="folder for weights, config and README")
    form.add_argument("--steps", type=int, default=700, help="optimizer steps (%(default)s)")
    form.add_argument("--batch", type=int, default=512, help="pairs a step (%(default)s)")
    form.add_argument(
        "--views", type=int, default=2, help="versions of each image, the plain one first (%(default)s)"
    )
    form.add_argument("--learning-rate", type=float, default=1e-3, help="peak, AdamW (%(default)s)")
    form.add_argument("--seed", type=int, default=0)
    return form


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    for name in ("steps", "batch", "views"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)} must be at least 1")
    train_files = expand(options.data)
    validation_files = expand(options.validation or [str(Path(train_files[0]).parent / "validation-*.tar")])
    # By split: pairs and concepts where the shards' names say so.
    by_split: dict[str, list[str]] = {}
    for name in validation_files:
        by_split.setdefault(split_of(Path(name)) or "validation", []).append(name)

    # Only now: what the user got wrong has been said at once.
    from evaluation.mini_clip_training import SIZES, Split, extract, fit, measure, read, save

    begun = time.perf_counter()
    train = extract(read(train_files), SIZES, options.views, options.seed)
    measured = {"train": train}
    for split, files in sorted(by_split.items()):
        held_out = read(files)
        # It is measured on plain images and first captions only.
        first = Split(held_out.images_N3HW, [captions[:1] for captions in held_out.captions])
        measured[split] = extract(first, SIZES, 1, options.seed)
    count = sum(len(data.rows) for data in measured.values())
    print(f"features of {count} images: {time.perf_counter() - begun:.0f} s")
    heads = fit(train, SIZES, options.steps, options.batch, options.learning_rate, options.seed)
    seconds = time.perf_counter() - begun
    results = {split: measure(heads, data) for split, data in measured.items()}
    save(options.out, heads, results, argv, seconds, len(train.rows))
    print(json.dumps(results, indent=2))
    return 0


def expand(patterns: list[str]) -> list[str]:
    """Files behind names and patterns, sorted. UserError if a pattern has none."""
    for pattern in patterns:
        if not glob(pattern):
            raise UserError(f"no shards match {pattern!r}; write them with python -m experiments.prepare")
    return sorted({name for pattern in patterns for name in glob(pattern)})


if __name__ == "__main__":
    run(main)
