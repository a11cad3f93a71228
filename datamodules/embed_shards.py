"""Text embeddings of the captions in shards, written as side files of a store; existing intact files are kept.

Shape suffixes: N captions, B batch, T tokens, C channels, P pooled channels.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datamodules.shards.embedding_file import EncoderIdentity, SideFile, concatenate, pack, write_packed
from datamodules.shards.embeddings import NULL, is_whole, listed, variant_keys, variants_path, write_manifest
from datamodules.shards.index import ShardIndex, ShardReader
from datamodules.shards.samples import captions_in
from switti.text.base import TextEncoder


def embed_shards(
    indices: list[ShardIndex],
    encoder: TextEncoder,
    identity: EncoderIdentity,
    store: Path,
    batch: int,
    all_captions: bool = False,
) -> tuple[int, int]:
    """Write the side files that are missing or corrupt, the null caption and the manifest.

    Returns the numbers of captions that were encoded and that the store contains.
    """
    paths = {index.path.stem: store / f"{index.path.stem}.safetensors" for index in indices}
    reader = ShardReader(indices)
    wanted: list[tuple[Path, ShardIndex, Callable[[int], str]]] = [
        (paths[index.path.stem], index, partial(reader.caption, number))
        for number, index in enumerate(indices)
    ]
    samples = {index.path.stem: len(index) for index in indices}
    variants = None
    if all_captions:
        further = {index.path.stem: _further_captions(index, reader, n) for n, index in enumerate(indices)}
        variants = {stem: len(captions) for stem, (_, captions) in further.items()}
        wanted += [
            (variants_path(store, stem), index, captions.__getitem__)
            for stem, (index, captions) in further.items()
            if captions
        ]
    elif listed(store).get("samples") == samples:
        variants = _kept_variants(store)
    _ensure_null(encoder, identity, store)
    todo = [item for item in wanted if not is_whole(item[0], item[1], identity)]
    if todo:
        with tqdm(total=sum(len(index) for _, index, _ in todo), unit="caption", smoothing=0.1) as bar:
            for path, index, captions in todo:
                _embed_captions(path, index, captions, encoder, identity, batch, bar)
    reader.close()
    files = [*paths.values(), store / NULL]
    files += [variants_path(store, stem) for stem, count in (variants or {}).items() if count]
    write_manifest(
        store, identity, samples, {path.stem: SideFile(path, identity).head for path in files}, variants
    )
    return sum(len(index) for _, index, _ in todo), sum(len(index) for _, index, _ in wanted)


def _ensure_null(encoder: TextEncoder, identity: EncoderIdentity, store: Path) -> None:
    """Write the empty caption's embedding if it is missing or corrupt."""
    index = _null_index(store / NULL)
    if is_whole(store / NULL, index, identity):
        return
    text = encoder.encode([""])
    packed = pack(text.tokens_BTC, text.mask_BT, text.pooled_BP)
    write_packed(store / NULL, packed, index.keys, index.digests_N32, identity.fingerprint)


def _null_index(path: Path) -> ShardIndex:
    """An index like a shard's, of the empty caption alone."""
    nothing_13 = np.zeros((1, 3), np.int64)
    digest_N32 = np.frombuffer(hashlib.sha256(b"").digest(), np.uint8).reshape(1, 32)
    return ShardIndex(path, [""], nothing_13, nothing_13, digest_N32, 0)


def _kept_variants(store: Path) -> dict[str, int] | None:
    """Counts of further captions that an earlier command embedded, listed as long as their files exist."""
    counts = listed(store).get("variants")
    if isinstance(counts, dict) and all(variants_path(store, s).is_file() for s, n in counts.items() if n):
        return counts
    return None


def _further_captions(index: ShardIndex, reader: ShardReader, shard: int) -> tuple[ShardIndex, list[str]]:
    """An index like a shard's, of its samples' further captions, and these captions."""
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


def _embed_captions(
    path: Path,
    index: ShardIndex,
    captions: Callable[[int], str],
    encoder: TextEncoder,
    identity: EncoderIdentity,
    batch: int,
    bar: tqdm,
) -> None:
    """Write one side file with the embeddings of the rows of `index`."""
    parts = []
    for rows in _batched(len(index), batch):
        text = encoder.encode([captions(row) for row in rows])
        parts.append(pack(text.tokens_BTC, text.mask_BT, text.pooled_BP))
        bar.update(len(rows))
    write_packed(path, concatenate(parts), index.keys, index.digests_N32, identity.fingerprint)


def _batched(count: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))
