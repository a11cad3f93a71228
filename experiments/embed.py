"""python -m experiments.embed DATA [--encoder minilm|clip_pair] [key=value …] [--batch 64] [--into OUT]

Compute text embeddings of all captions in a folder of shards, as side files in
DATA/embeddings/<encoder>-<fingerprint>/.

DATA is a folder made by experiments.prepare, or any folder of .tar shards. Settings are those of `text` in a run's
config, such as max_length=77; a run refuses embeddings made with other settings than its own.
If interrupted, the same command continues with the missing shards; if finished, it does nothing.

--all-captions embeds every caption of samples that have several, for training with data.captions=drawn.
--into OUT also writes copies of the shards that carry their embeddings, for training from streams (`pipe:…`, HTTP).
"""

import argparse
import logging
import time
from pathlib import Path

from configs.loading import load
from experiments.cli import argument_parser, run
from switti.errors import UserError
from switti.text.config import TextConfig


def parser() -> argparse.ArgumentParser:
    form = argument_parser(__doc__)
    form.add_argument("data", type=Path, help="folder of shards")
    form.add_argument("settings", nargs="*", metavar="key=value", help="text settings")
    form.add_argument("--encoder", choices=("minilm", "clip_pair"), default="minilm", help="(%(default)s)")
    form.add_argument("--batch", type=int, default=64, help="captions at a time (%(default)s)")
    form.add_argument("--out", type=Path, help="folder of the stores (DATA/embeddings)")
    form.add_argument(
        "--all-captions",
        action="store_true",
        help="also embed the further captions of samples that have several",
    )
    form.add_argument("--into", type=Path, metavar="OUT", help="folder of shards that carry their embeddings")
    form.add_argument("--device", help="cpu, cuda, … (default: cuda if there is one)")
    return form


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config = text_config(options.encoder, options.settings)
    if options.batch < 1:
        raise UserError(f"--batch {options.batch} must be positive")
    shards = find_shards(options.data)

    # Deferred, so that argument errors appear without waiting for torch.
    import torch

    from datamodules.caption_encoding import identity_of
    from datamodules.embed_shards import embed_shards
    from datamodules.shards.index import load_index
    from switti.text.build import build_text_encoder

    encoder = build_text_encoder(config, options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    identity = identity_of(encoder)
    store = (options.out or options.data / "embeddings") / identity.folder
    begun = time.perf_counter()
    indices = [load_index(path) for path in shards]
    written, total = embed_shards(indices, encoder, identity, store, options.batch, options.all_captions)
    seconds = time.perf_counter() - begun
    cut = f", {encoder.truncated} cut to {encoder.max_length} tokens" if encoder.truncated else ""
    if written:
        print(f"{store}: {written} of {total} captions in {seconds:.1f} s ({written / seconds:.0f}/s){cut}")
    else:
        print(f"{store} already holds all {total} captions; nothing to do")
    if options.into is not None:
        from datamodules.shards.embedded_shards import write_embedded_shards

        made = write_embedded_shards(indices, store, options.into)
        print(f"{options.into}: {made} of {len(indices)} shards written with their embeddings")
    return 0


def text_config(encoder: str, settings: list[str]) -> TextConfig:
    """Text settings of the command line over those of configs/text/<encoder>.yaml."""
    named = [setting if setting.startswith("text.") else f"text.{setting}" for setting in settings]
    return load(f"text/{encoder}", named).text


def find_shards(data: Path) -> list[Path]:
    if not data.is_dir():
        raise UserError(f"{data} is not a folder of shards")
    shards = sorted(data.glob("*.tar"))
    if not shards:
        raise UserError(f"{data} contains no .tar shards; make them with experiments.prepare")
    return shards


if __name__ == "__main__":
    run(main)
