"""WebDataset shards of generated images: written once, unit by unit, and read back with their digests checked."""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.shards.tar import BLOCK, CorruptTarError, FileSource, add_member, members
from evaluation.prompt_sets import Prompt
from switti.errors import UserError
from switti.files import open_regular, parse_json

# First member of a shard; WebDataset skips names that begin with a dot.
STAMP = ".unit.json"
MAX_IMAGE, MAX_JSON = 256 << 20, 1 << 20


@dataclass(frozen=True)
class EncodedImage:
    """The bytes of an image file, and its name's ending ("png")."""

    content: bytes
    suffix: str


@dataclass(frozen=True)
class StoredImage:
    """An image of a shard as it was written. meta: prompt, index, ordinal, seed, settings, …"""

    key: str
    content: bytes
    suffix: str
    meta: dict[str, Any]


def write_unit(
    path: Path,
    digest: str,
    unit: int,
    images: Iterable[tuple[Prompt, EncodedImage]],
    settings: dict[str, Any],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """One shard. Equal images give equal bytes."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        add_member(tar, STAMP, _json({"digest": digest, "unit": unit}))
        for prompt, image in images:
            meta = {
                "prompt": prompt.text,
                "index": prompt.index,
                "ordinal": prompt.ordinal,
                "seed": prompt.seed,
                "settings": settings,
                "sha256": hashlib.sha256(image.content).hexdigest(),
            }
            add_member(tar, f"{prompt.key}.{image.suffix}", image.content)
            add_member(tar, f"{prompt.key}.txt", prompt.text.encode())
            add_member(tar, f"{prompt.key}.json", _json(meta))
            advance(1)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()


def stamp_of(path: Path) -> str | None:
    """The digest of the work that a shard belongs to; None if it is not a complete shard.

    Looks at its two ends alone; `read_unit` checks what lies between.
    """
    try:
        with open_regular(path) as stream:
            size = stream.seek(0, os.SEEK_END)
            if size < 4 * BLOCK or size % BLOCK:
                return None
            stream.seek(-2 * BLOCK, os.SEEK_END)
            if stream.read(2 * BLOCK).strip(b"\0"):
                return None
            source = FileSource(stream)
            first = next(members(source), None)
            if first is None or first.name != STAMP or first.size > MAX_JSON:
                return None
            content = parse_json(source.read(first.size))
    except (OSError, ValueError):
        return None
    digest = content.get("digest") if isinstance(content, dict) else None
    return digest if isinstance(digest, str) else None


def read_unit(path: Path) -> Iterator[StoredImage]:
    """The images of a shard in their order.

    Raises:
        UserError: the shard is corrupt, or an image is not the one that was written.
    """
    try:
        with open_regular(path) as stream:
            source = FileSource(stream)
            pending: tuple[str, str, bytes] | None = None
            for member in members(source):
                stem, _, suffix = member.name.rpartition(".")
                if member.name == STAMP or suffix == "txt":
                    continue
                if suffix != "json":
                    if member.size > MAX_IMAGE:
                        raise ValueError(f"{member.name} has {member.size} bytes")
                    pending = stem, suffix, source.read(member.size)
                    continue
                if pending is None or pending[0] != stem or member.size > MAX_JSON:
                    raise ValueError(f"{member.name} belongs to no image")
                yield _checked(stem, pending[1], pending[2], parse_json(source.read(member.size)))
                pending = None
    except (CorruptTarError, ValueError) as error:
        raise UserError(f"{path} is corrupt: {error}") from error


def _checked(key: str, suffix: str, content: bytes, meta: Any) -> StoredImage:
    names = {"prompt": str, "index": int, "ordinal": int, "seed": int, "sha256": str}
    if not isinstance(meta, dict) or any(type(meta.get(name)) is not kind for name, kind in names.items()):
        raise ValueError(f"{key}.json does not describe an image")
    if hashlib.sha256(content).hexdigest() != meta["sha256"]:
        raise ValueError(f"{key}.{suffix} is not the image that was written")
    return StoredImage(key, content, suffix, meta)
