"""Shards that carry their text embeddings: copies with an entry `<key>.text.safetensors` for every sample.

Streams are read forward, so that what belongs to a sample must lie beside it.
"""

import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.shards.embedding_file import SideFile, encode_entry
from datamodules.shards.index import ShardIndex, ShardReader
from datamodules.shards.members import CAPTION, EMBEDDING_SUFFIX, IMAGE, META, sample_part
from datamodules.shards.open_files import OpenFiles
from datamodules.shards.tar import FileSource, add_member, members
from switti.errors import UserError
from switti.files import atomic_write, open_regular, read_json_object, write_json

MANIFEST = "embedded.json"  # shard → what it was made from


def write_embedded_shards(indices: list[ShardIndex], store: Path, out: Path) -> int:
    """Write into `out` a copy of every shard with its embeddings of `store`; the number of those that were not there.

    Equal inputs give equal bytes. Raises UserError if `out` is where the shards lie, or an embedding is corrupt.
    """
    for index in indices:
        if (out / index.path.name).exists() and (out / index.path.name).samefile(index.path):
            raise UserError(f"--into {out} holds the shards themselves; name another folder")
    made: dict[str, Any] = read_json_object(out / MANIFEST)
    written = 0
    for index in indices:
        side = SideFile(store / f"{index.path.stem}.safetensors")
        origin = {"bytes": index.shard_bytes, "embeddings": side.head}
        target = out / index.path.name
        done = made.get(target.name)
        if target.is_file() and done == origin | {"embedded_bytes": target.stat().st_size}:
            continue
        with atomic_write(target) as temporary:
            _write_shard(index, side, temporary)
        made[target.name] = origin | {"embedded_bytes": target.stat().st_size}
        write_json(out / MANIFEST, made)
        written += 1
    return written


def _write_shard(index: ShardIndex, side: SideFile, path: Path) -> None:
    names, reader, files = _member_names(index), ShardReader([index]), OpenFiles(1)
    rows = {key: row for row, key in enumerate(side.keys)}
    try:
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for row, key in enumerate(index.keys):
                caption = reader.stored_caption(0, row)
                add_member(tar, names[key][IMAGE], reader.image(0, row))
                add_member(tar, names[key][CAPTION], caption)
                if (meta := reader.meta(0, row)) is not None:
                    add_member(tar, names[key][META], meta)
                entry = encode_entry(side.read(rows[key], files), caption, side.fingerprint)
                add_member(tar, f"{key}{EMBEDDING_SUFFIX}", entry)
    finally:
        reader.close()
        files.close()


def _member_names(index: ShardIndex) -> Mapping[str, dict[int, str]]:
    """Key → part → name of the member that the index has taken for it."""
    places = {
        int(offset): key for key, row in zip(index.keys, index.offsets_N3, strict=True) for offset in row
    }
    names: dict[str, dict[int, str]] = {key: {} for key in index.keys}
    with open_regular(index.path) as stream:
        for member in members(FileSource(stream)):
            named = sample_part(member.name)
            if named is not None and places.get(member.offset) == named[0]:
                names[named[0]][named[1]] = member.name
    return names
