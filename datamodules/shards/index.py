"""Where every sample lies in its shard, so that any of them can be read at once with one `pread` a member.

A shard's index is made once and kept beside it (`train-000000.tar.index.safetensors`) with the shard's size and time of
change; in a folder that cannot be written to it stays in memory. What lies there is checked like any foreign file and
made again if it does not fit. N samples; members in the order image, txt, json.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from datamodules.images import SUFFIXES
from datamodules.shards.bad_samples import BadSample, Kind
from datamodules.shards.members import (
    CAPTION,
    IMAGE,
    LIMITS,
    META,
    Entries,
    Flaw,
    belongs_to_another,
    decode_caption,
    flaw_of,
    sample_part,
)
from datamodules.shards.open_files import OpenFiles
from datamodules.shards.tar import BLOCK, CorruptTarError, FileSource, Member, members
from datamodules.shards.tensor_file import encode, read_header, read_tensor
from switti.errors import UserError
from switti.files import atomic_write, open_regular, parse_json

log = logging.getLogger(__name__)

FORMAT = 3
MAX_KEYS = 1 << 20  # of a shard
_NOWHERE = 1 << 62  # an offset beyond the end of every file
_PARTS = (IMAGE, CAPTION, META)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LOST: dict[Kind, str] = {
    "missing_picture": "without image",
    "missing_caption": "without caption",
    "duplicate_member": "with two members of one kind",
    "undecodable_picture": "with too large an image",
    "undecodable_caption": "with a caption that cannot be read",
}


@dataclass(frozen=True)
class ShardIndex:
    """offsets_N3, sizes_N3: int64 bytes of image, txt, json (size -1: there is none); digests_N32: SHA-256 of
    the captions as stored, uint8. shard_bytes: the shard's size.

    losses: samples that are not among the N, by kind. problem: why the shard was not read to its end, "" if it was.
    absent: number of rows at the end whose samples the file no longer has.
    """

    path: Path
    keys: list[str]
    offsets_N3: np.ndarray
    sizes_N3: np.ndarray
    digests_N32: np.ndarray
    shard_bytes: int
    losses: tuple[BadSample, ...] = ()
    problem: str = ""
    absent: int = 0

    def __len__(self) -> int:
        return len(self.keys)


# ---- making and keeping -----------------------------------------------------------------------------------------


def load_index(path: Path, salvage: bool = False) -> ShardIndex:
    """The index of one shard, from beside it if that is still valid.

    salvage: of a shard that is truncated or corrupt from some byte on, keep the samples before it (see `problem`).

    Raises:
        UserError: no uncompressed tar, a truncated one, or one without images that have captions.
    """
    status = path.stat()
    stamp = np.array([FORMAT, status.st_size, status.st_mtime_ns], np.int64)
    side = path.with_name(path.name + ".index.safetensors")
    cached = _read_side_file(path, side, stamp)
    if cached is not None:
        return cached
    index = build_index(path, salvage)
    if index.problem:
        return index  # it should be repaired, not remembered
    tensors = {
        "stamp": stamp,
        "offsets": index.offsets_N3,
        "sizes": index.sizes_N3,
        "digests": index.digests_N32,
    }
    losses = [[loss.kind, loss.reason, loss.samples] for loss in index.losses]
    texts = {"keys": json.dumps(index.keys), "losses": json.dumps(losses)}
    content = encode(tensors, texts | {"sha256": _digest(tensors, texts)})
    try:
        with atomic_write(side) as temporary:
            temporary.write_bytes(content)
    except (OSError, UserError) as error:
        log.info("the index of %s stays in memory (%s)", path, error)
    return index


def _read_side_file(path: Path, side: Path, stamp: np.ndarray) -> ShardIndex | None:
    """None if it is absent, of an earlier shard, or anything else than an index of this one."""
    try:
        with open_regular(side) as stream:
            entries, metadata = read_header(stream.fileno())
            size, rows = int(stamp[1]), entries["offsets"].shape[0]
            shapes = {"stamp": (3,), "offsets": (rows, 3), "sizes": (rows, 3), "digests": (rows, 32)}
            fits = all(entries[name].shape == shape for name, shape in shapes.items())
            if not fits or rows > size // BLOCK:
                return None
            read = {name: read_tensor(stream.fileno(), entries[name]) for name in shapes}
        if metadata["sha256"] != _digest(read, metadata):
            return None
        keys, losses = parse_json(metadata["keys"]), parse_json(metadata["losses"])
        if not np.array_equal(read["stamp"], stamp) or not _are_keys(keys, rows):
            return None
        if not _lie_within(read["offsets"], read["sizes"], size):
            return None
        lost = tuple(_loss(path, kind, reason, number) for kind, reason, number in losses)
        return ShardIndex(path, keys, read["offsets"], read["sizes"], read["digests"], size, lost)
    except (OSError, UserError, ValueError, KeyError, TypeError, IndexError, MemoryError):
        return None


def _digest(tensors: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> str:
    """SHA-256 of everything in a stored index, by which a corrupt one is detected."""
    digest = hashlib.sha256()
    for name in ("stamp", "offsets", "sizes", "digests"):
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    for name in ("keys", "losses"):
        digest.update(f"\0{texts[name]}".encode())
    return digest.hexdigest()


def _are_keys(keys: object, rows: int) -> bool:
    if not isinstance(keys, list) or len(keys) != rows or not all(isinstance(key, str) for key in keys):
        return False
    joined = "".join(keys)
    joined.encode()  # a ValueError for half characters
    return len(set(keys)) == rows and "" not in keys and not _CONTROL.search(joined)


def _lie_within(offsets_N3: np.ndarray, sizes_N3: np.ndarray, size: int) -> bool:
    """Whether all members lie in the shard, image and caption are there, and none is larger than allowed."""
    if offsets_N3.dtype != np.int64 or sizes_N3.dtype != np.int64:
        return False
    smallest, largest = np.array([0, 0, -1]), np.array(LIMITS[: len(_PARTS)])
    right = (offsets_N3 >= 0) & (offsets_N3 <= size) & (sizes_N3 >= smallest) & (sizes_N3 <= largest)
    return bool((right & (offsets_N3 + np.where(right, sizes_N3, 0) <= size)).all())


def _loss(path: Path, kind: Kind, reason: str, samples: int) -> BadSample:
    """ValueError for anything that is not a report of a lost sample."""
    if kind not in get_args(Kind) or not isinstance(reason, str) or type(samples) is not int or samples < 1:
        raise ValueError(kind)
    return BadSample(path.stem, str(path), reason, kind, samples)


def build_index(path: Path, salvage: bool = False) -> ShardIndex:
    """Read a shard from end to end; see load_index."""
    samples: dict[str, Entries[tuple[int, int, bytes]]] = {}
    problem = ""
    with open_regular(path) as stream:
        source = FileSource(stream)
        try:
            for member in members(source):
                _add(samples, path, member, source)
        except CorruptTarError as error:
            problem = f"shard {path} is not a complete, uncompressed tar ({error})"
            if not salvage:
                raise UserError(f"{problem}; make or fetch it again") from error
    problems = {key: entries.problem(key) for key, entries in samples.items()}
    keys = [key for key, found in problems.items() if found is None]
    losses = _losses(path, samples, problems, cut_off=bool(problem))
    if not keys:
        nothing = f"shard {path} has no image ({', '.join(SUFFIXES)}) with a .txt caption of the same name"
        more = f" ({losses[0].reason.partition(': ')[2]})" if losses else ""
        raise UserError(problem or nothing + more)
    rows = [[samples[key].contents.get(part) or (0, -1, b"") for part in _PARTS] for key in keys]
    table = np.array([[place[:2] for place in row] for row in rows], np.int64)
    digests_N32 = np.frombuffer(b"".join(row[CAPTION][2] for row in rows), np.uint8).reshape(-1, 32)
    return ShardIndex(
        path, keys, table[:, :, 0].copy(), table[:, :, 1].copy(), digests_N32, source.end, losses, problem
    )


def _add(
    samples: dict[str, Entries[tuple[int, int, bytes]]], path: Path, member: Member, source: FileSource
) -> None:
    named = sample_part(member.name)
    if named is None or named[1] not in _PARTS:
        return
    key, part = named
    if key not in samples and len(samples) >= MAX_KEYS:
        raise UserError(f"shard {path} holds more than {MAX_KEYS} samples; split it")
    flaw, digest = flaw_of(member, part), b""
    if part == CAPTION and flaw is None:
        stored = source.read(member.size)
        digest = hashlib.sha256(stored).digest()
        try:
            decode_caption(stored)
        except ValueError:
            flaw = ("undecodable_caption", f"{member.name} is not text in UTF-8")
    place = (member.offset, member.size, digest)
    samples.setdefault(key, Entries()).add(member.name, part, place, flaw)


def _losses(
    path: Path,
    samples: dict[str, Entries[tuple[int, int, bytes]]],
    problems: dict[str, Flaw | None],
    cut_off: bool,
) -> tuple[BadSample, ...]:
    """What is not a sample and belongs to none, by kind, with the first reason."""
    whole = {key for key, entries in samples.items() if entries.whole}
    last = next(reversed(samples), None) if cut_off else None  # it was cut off together with the shard
    numbers: dict[Kind, int] = {}
    reasons: dict[Kind, str] = {}
    for key, problem in problems.items():
        entries = samples[key]
        promised = {IMAGE, CAPTION} & (entries.contents.keys() | entries.flaws.keys())
        if problem is None or key == last or not promised:
            continue
        if key not in whole and belongs_to_another(key, whole):
            continue
        numbers[problem[0]] = numbers.get(problem[0], 0) + 1
        reasons.setdefault(problem[0], problem[1])
    return tuple(
        _loss(path, kind, f"{path}: {number} samples {_LOST[kind]} (first: {reasons[kind]})", number)
        for kind, number in sorted(numbers.items())
    )


def with_rows(index: ShardIndex, rows: int) -> ShardIndex:
    """An index of exactly `samples` rows: further ones are dropped, missing ones are added as unreadable."""
    missing = max(0, rows - len(index))
    kept = len(index) if missing else rows
    return ShardIndex(
        index.path,
        index.keys[:kept] + [f"row {row}" for row in range(kept, rows)],
        np.concatenate([index.offsets_N3[:kept], np.full((missing, 3), _NOWHERE)]),
        np.concatenate([index.sizes_N3[:kept], np.ones((missing, 3), np.int64)]),
        np.concatenate([index.digests_N32[:kept], np.zeros((missing, 32), np.uint8)]),
        index.shard_bytes,
        index.losses,
        index.problem,
        missing,
    )


def absent_shard(path: Path, rows: int) -> ShardIndex:
    """Stands for a shard that was there when the run began."""
    empty = np.zeros((0, 3), np.int64)
    return with_rows(ShardIndex(path, [], empty, empty, np.zeros((0, 32), np.uint8), 0), rows)


# ---- reading ----------------------------------------------------------------------------------------------------


class ShardReader:
    """Reads members of many shards by their index. OSError and ValueError mean that the sample is corrupt."""

    def __init__(self, shards: list[ShardIndex], files: OpenFiles | None = None) -> None:
        self.shards, self.files = shards, files or OpenFiles()

    def image(self, shard: int, row: int) -> bytes:
        return self._read(shard, row, IMAGE)

    def caption(self, shard: int, row: int) -> str:
        """As text, without surrounding blanks."""
        return decode_caption(self.stored_caption(shard, row))

    def stored_caption(self, shard: int, row: int) -> bytes:
        return self._read(shard, row, CAPTION)

    def meta(self, shard: int, row: int) -> bytes | None:
        return None if self.shards[shard].sizes_N3[row, META] < 0 else self._read(shard, row, META)

    def _read(self, shard: int, row: int, part: int) -> bytes:
        """OSError if the shard is gone (FileNotFoundError), ends too early (CutOffError) or fails in another way."""
        index = self.shards[shard]
        size, offset = int(index.sizes_N3[row, part]), int(index.offsets_N3[row, part])
        return self.files.read(index.path, size, offset, index.shard_bytes or None)

    def close(self) -> None:
        self.files.close()
