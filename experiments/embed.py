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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from configs.loading import load
from experiments.cli import argument_parser, run
from switti.errors import UserError
from switti.text.config import TextConfig

if TYPE_CHECKING:
    from datamodules.shards.embedding_file import EncoderIdentity
    from datamodules.shards.index import ShardIndex, ShardReader
    from switti.text.base import TextEncoder


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
    from datamodules.shards.index import load_index
    from switti.text.build import build_text_encoder

    encoder = build_text_encoder(config, options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    identity = identity_of(encoder)
    store = (options.out or options.data / "embeddings") / identity.folder
    begun = time.perf_counter()
    indices = [load_index(path) for path in shards]
    written, total = embed(indices, encoder, identity, store, options.batch, options.all_captions)
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


def embed(
    indices: "list[ShardIndex]",
    encoder: "TextEncoder",
    identity: "EncoderIdentity",
    store: Path,
    batch: int,
    all_captions: bool = False,
) -> tuple[int, int]:
    """Write the side files that are missing or corrupt, the null caption and the manifest.

    Returns the numbers of captions that were encoded and that the store contains.
    """
    from datamodules.shards.embedding_file import SideFile
    from datamodules.shards.embeddings import NULL, is_whole, listed, variants_path, write_manifest
    from datamodules.shards.index import ShardReader

    paths = {index.path.stem: store / f"{index.path.stem}.safetensors" for index in indices}
    reader = ShardReader(indices)
    wanted: list[tuple[Path, ShardIndex, Callable[[int], str]]] = [
        (paths[index.path.stem], index, partial(reader.caption, number))
        for number, index in enumerate(indices)
    ]
    samples = {index.path.stem: len(index) for index in indices}
    variants = None
    if all_captions:
        further = {index.path.stem: further_captions(index, reader, n) for n, index in enumerate(indices)}
        variants = {stem: len(captions) for stem, (_, captions) in further.items()}
        wanted += [
            (variants_path(store, stem), index, captions.__getitem__)
            for stem, (index, captions) in further.items()
            if captions
        ]
    elif listed(store).get("samples") == samples:
        variants = kept_variants(store)
    ensure_null(encoder, identity, store)
    todo = [item for item in wanted if not is_whole(item[0], item[1], identity)]
    if todo:
        with tqdm(total=sum(len(index) for _, index, _ in todo), unit="caption", smoothing=0.1) as bar:
            for path, index, captions in todo:
                embed_captions(path, index, captions, encoder, identity, batch, bar)
    reader.close()
    files = [*paths.values(), store / NULL]
    files += [variants_path(store, stem) for stem, count in (variants or {}).items() if count]
    write_manifest(
        store, identity, samples, {path.stem: SideFile(path, identity).head for path in files}, variants
    )
    return sum(len(index) for _, index, _ in todo), sum(len(index) for _, index, _ in wanted)


def ensure_null(encoder: "TextEncoder", identity: "EncoderIdentity", store: Path) -> None:
    """Write the empty caption's embedding if it is missing or corrupt."""
    from datamodules.shards.embedding_file import pack, write_packed
    from datamodules.shards.embeddings import NULL, is_whole

    index = null_index(store / NULL)
    if is_whole(store / NULL, index, identity):
        return
    text = encoder.encode([""])
    packed = pack(text.tokens_BTC, text.mask_BT, text.pooled_BP)
    write_packed(store / NULL, packed, index.keys, index.digests_N32, identity.fingerprint)


def null_index(path: Path) -> "ShardIndex":
    """An index like a shard's, of the empty caption alone."""
    import hashlib

    import numpy as np

    from datamodules.shards.index import ShardIndex

    nothing_13 = np.zeros((1, 3), np.int64)
    digest_N32 = np.frombuffer(hashlib.sha256(b"").digest(), np.uint8).reshape(1, 32)
    return ShardIndex(path, [""], nothing_13, nothing_13, digest_N32, 0)


def kept_variants(store: Path) -> dict[str, int] | None:
    """Counts of further captions that an earlier command embedded, listed as long as their files exist."""
    from datamodules.shards.embeddings import listed, variants_path

    counts = listed(store).get("variants")
    if isinstance(counts, dict) and all(variants_path(store, s).is_file() for s, n in counts.items() if n):
        return counts
    return None


def further_captions(
    index: "ShardIndex", reader: "ShardReader", shard: int
) -> "tuple[ShardIndex, list[str]]":
    """An index like a shard's, of its samples' further captions, and these captions."""
    import hashlib

    import numpy as np

    from datamodules.shards.embeddings import variant_keys
    from datamodules.shards.index import ShardIndex
    from datamodules.shards.samples import captions_in

    keys: list[str] = []
    captions: list[str] = []
    for row, key in enumerate(index.keys):
        further = captions_in(reader.meta(shard, row), reader.caption(shard, row))[1:]
        keys += variant_keys(key, len(further))
        captions += further
    digests = b"".join(hashlib.sha256(caption.encode()).digest() for caption in captions)
    nothing_N3 = np.zeros((len(keys), 3), np.int64)
    digests_N32 = np.frombuffer(digests, np.uint8).reshape(-1, 32)
    return ShardIndex(index.path, keys, nothing_N3, nothing_N3, digests_N32, 0), captions


def embed_captions(
    path: Path,
    index: "ShardIndex",
    captions: Callable[[int], str],
    encoder: "TextEncoder",
    identity: "EncoderIdentity",
    batch: int,
    bar: tqdm,
) -> None:
    """Write one side file with the embeddings of the rows of `index`."""
    from datamodules.shards.embedding_file import concatenate, pack, write_packed

    parts = []
    for rows in batched(len(index), batch):
        text = encoder.encode([captions(row) for row in rows])
        parts.append(pack(text.tokens_BTC, text.mask_BT, text.pooled_BP))
        bar.update(len(rows))
    write_packed(path, concatenate(parts), index.keys, index.digests_N32, identity.fingerprint)


def batched(count: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))


if __name__ == "__main__":
    run(main)
