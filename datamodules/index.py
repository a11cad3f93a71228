"""Where every sample lies in its shard, so that any of them can be read at once with one `pread` a member.

A shard's index is made once and kept beside it (`train-000000.tar.index.npz`) with the shard's size and time of
change; in a folder that cannot be written to it stays in memory. N samples; members in the order picture, txt, json.
"""

import hashlib
import logging
import os
import tarfile
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from datamodules.pictures import SUFFIXES
from switti.errors import UserError
from switti.files import atomic_write

log = logging.getLogger(__name__)

FORMAT = 2
_BLOCK, _CHUNK = 512, 1 << 16
_PICTURE, _CAPTION, _META = range(3)
_NOWHERE = 1 << 62  # an offset beyond the end of every file


@dataclass(frozen=True)
class ShardIndex:
    """offsets_N3, sizes_N3: int64 bytes of picture, txt, json (size -1: there is none); digests_N32: SHA-256 of
    the captions as stored, uint8.

    lacking: numbers of samples without (picture, caption), which are not among the N. problem: why the shard was not
    read to its end, "" if it was. absent: so many rows at the end stand for samples that the file no longer has.
    """

    path: Path
    keys: list[str]
    offsets_N3: np.ndarray
    sizes_N3: np.ndarray
    digests_N32: np.ndarray
    lacking: tuple[int, int] = (0, 0)
    problem: str = ""
    absent: int = 0

    def __len__(self) -> int:
        return len(self.keys)


class CutOffError(OSError):
    """A file ends before what its index says."""


def expand(setting: str, patterns: list[str], must_exist: bool = True) -> list[Path]:
    """Paths, globs and brace ranges → shards, sorted, each once.

    Raises:
        UserError: nothing matches, or, with must_exist, a named shard does not. `setting` is named: 'data.train'.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        try:
            names = sorted(braceexpand(os.path.expanduser(pattern), escape=False))
        except ValueError as error:
            raise UserError(f"{setting}={pattern!r} is no valid brace range: {error}") from error
        for name in names:
            paths = sorted(glob(name, recursive=True)) if has_magic(name) else [name]
            if not paths:
                raise UserError(
                    f"{setting}={name!r} matches no shard; see `python -m experiments.prepare --help`"
                )
            found |= dict.fromkeys(Path(p) for p in paths)
    for path in found:
        if path.is_dir():
            raise UserError(f"{setting}={str(path)!r} is a folder; name its shards, e.g. {path}/train-*.tar")
        if must_exist and not path.is_file():
            raise UserError(f"{setting}: no shard {path}")
    return list(found)


def load_index(path: Path, salvage: bool = False) -> ShardIndex:
    """The index of one shard, from beside it if that is still valid.

    salvage: of a shard that is truncated or damaged from some byte on, take what lies before (see `problem`).

    Raises:
        UserError: no uncompressed tar, a truncated one, or one without pictures that have captions.
    """
    status = path.stat()
    stamp = np.array([FORMAT, status.st_size, status.st_mtime_ns], np.int64)
    side = path.with_name(path.name + ".index.npz")
    cached = _read_side_file(path, side, stamp)
    if cached is not None:
        return cached
    index = build_index(path, salvage)
    if index.problem:
        return index  # it should be repaired, not remembered
    keys = np.array([key.encode() for key in index.keys])
    try:
        with atomic_write(side) as temporary, temporary.open("wb") as stream:
            np.savez(
                stream, stamp=stamp, keys=keys, offsets=index.offsets_N3, sizes=index.sizes_N3,
                digests=index.digests_N32, lacking=np.array(index.lacking),
            )  # fmt: skip
    except OSError as error:  # not writable, or another rank has just put the same index there
        log.info("the index of %s stays in memory (%s)", path, error.strerror)
    return index


def _read_side_file(path: Path, side: Path, stamp: np.ndarray) -> ShardIndex | None:
    try:
        with np.load(side, allow_pickle=False) as content:
            if not np.array_equal(content["stamp"], stamp):
                return None
            keys = [key.decode() for key in content["keys"].tolist()]
            pictures, captions = content["lacking"].tolist()
            columns = (content["offsets"], content["sizes"], content["digests"])
            return ShardIndex(path, keys, *columns, lacking=(pictures, captions))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent or damaged: it is made again


def build_index(path: Path, salvage: bool = False) -> ShardIndex:
    """Read a shard from end to end; see load_index."""
    samples: dict[str, dict[int, tuple[int, int]]] = {}
    problem = ""
    with path.open("rb") as stream:
        try:
            _list_members(path, stream.fileno(), samples)
        except (tarfile.TarError, CutOffError) as error:
            problem = f"shard {path} is no complete, uncompressed tar ({error})"
            if not salvage:
                raise UserError(f"{problem}; make or fetch it again") from error
        complete = {k: m for k, m in samples.items() if _PICTURE in m and _CAPTION in m}
        digests = [
            hashlib.sha256(os.pread(stream.fileno(), *reversed(m[_CAPTION]))).digest()
            for m in complete.values()
        ]
    if not complete:
        nothing = f"shard {path} has no picture ({', '.join(SUFFIXES)}) with a .txt caption of the same name"
        raise UserError(problem or nothing)
    lacking = [sum(part not in m for m in samples.values()) for part in (_PICTURE, _CAPTION)]
    if problem:  # the last sample was cut off together with the shard
        lacking = [0, 0]
    table = np.array(
        [[m.get(part, (0, -1)) for part in (_PICTURE, _CAPTION, _META)] for m in complete.values()], np.int64
    )
    digests_N32 = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    return ShardIndex(
        path, list(complete), table[:, :, 0], table[:, :, 1], digests_N32, (lacking[0], lacking[1]), problem
    )


def _list_members(path: Path, descriptor: int, samples: dict[str, dict[int, tuple[int, int]]]) -> None:
    """Fill `samples` member by member. Raises TarError or CutOffError where the shard stops making sense."""
    size = os.fstat(descriptor).st_size
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.offset_data + member.size > size:
                raise CutOffError(f"truncated or damaged at byte {member.offset}")
            if member.isreg():
                _add(samples, path, member)
        # tarfile takes a torn header for the end of the archive: only zeros up to the end of the file are one.
        rest = tar.offset
        while data := os.pread(descriptor, _CHUNK, rest):
            if any(data):
                raise CutOffError(f"truncated or damaged at byte {tar.offset}")
            rest += len(data)
        if rest - tar.offset < _BLOCK:
            raise CutOffError(f"truncated or damaged at byte {tar.offset}")


def with_rows(index: ShardIndex, rows: int) -> ShardIndex:
    """An index of exactly so many rows: further ones are forgotten, missing ones are there but cannot be read."""
    missing = max(0, rows - len(index))
    kept = len(index) if missing else rows
    return ShardIndex(
        index.path,
        index.keys[:kept] + [f"row {row}" for row in range(kept, rows)],
        np.concatenate([index.offsets_N3[:kept], np.full((missing, 3), _NOWHERE)]),
        np.concatenate([index.sizes_N3[:kept], np.ones((missing, 3), np.int64)]),
        np.concatenate([index.digests_N32[:kept], np.zeros((missing, 32), np.uint8)]),
        index.lacking,
        index.problem,
        missing,
    )


def absent_shard(path: Path, rows: int) -> ShardIndex:
    """Stands for a shard that was there when the run began."""
    empty = np.zeros((0, 3), np.int64)
    return with_rows(ShardIndex(path, [], empty, empty, np.zeros((0, 32), np.uint8)), rows)


def _add(samples: dict[str, dict[int, tuple[int, int]]], path: Path, member: tarfile.TarInfo) -> None:
    folder, _, base = member.name.rpartition("/")
    stem, _, suffix = base.partition(".")
    ending = f".{suffix.lower()}"
    part = _PICTURE if ending in SUFFIXES else {".txt": _CAPTION, ".json": _META}.get(ending)
    if part is None or not stem:
        return
    key = f"{folder}/{stem}" if folder else stem
    members = samples.setdefault(key, {})
    if part in members:
        raise UserError(f"shard {path} holds {member.name} twice; keys must be unique in a shard")
    members[part] = (member.offset_data, member.size)


def unique_names(paths: list[Path]) -> list[str]:
    """The shards' stems; if two are equal, with as many folders before them as tell all apart."""
    absolute = [path.absolute().with_suffix("") for path in paths]
    for depth in range(1, max(len(p.parts) for p in absolute) + 1):
        names = ["/".join(p.parts[-depth:]) for p in absolute]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"shards differ in their endings only: {', '.join(map(str, paths))}")


class ShardReader:
    """Reads members of many shards through a few open files. One a process: it opens lazily and is not sent open."""

    def __init__(self, shards: list[ShardIndex], open_files: int = 64) -> None:
        self.shards, self.open_files = shards, open_files
        self._handles: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()

    def picture(self, shard: int, row: int) -> bytes:
        return self._read(shard, row, _PICTURE)

    def caption(self, shard: int, row: int) -> str:
        """As stored, without surrounding blanks."""
        return self._read(shard, row, _CAPTION).decode(errors="replace").strip()

    def meta(self, shard: int, row: int) -> bytes | None:
        return None if self.shards[shard].sizes_N3[row, _META] < 0 else self._read(shard, row, _META)

    def _read(self, shard: int, row: int, part: int) -> bytes:
        """OSError if the shard is gone (FileNotFoundError), ends too early (CutOffError) or fails in another way."""
        index = self.shards[shard]
        size, offset = int(index.sizes_N3[row, part]), int(index.offsets_N3[row, part])
        try:
            data = os.pread(self._handle(shard), size, offset)
        except OSError:  # a network drive that was away for a moment wants its files to be opened again
            self._forget(shard)
            data = os.pread(self._handle(shard), size, offset)
        if len(data) < size:
            self._forget(shard)
            raise CutOffError(f"{index.path} is shorter than it was")
        return data

    def _forget(self, shard: int) -> None:
        handle = self._handles.pop(shard, None)
        if handle is not None:
            os.close(handle)

    def _handle(self, shard: int) -> int:
        if self._process != os.getpid():  # a forked worker: its parent's descriptors are not its own to close
            self._handles, self._process = OrderedDict(), os.getpid()
        if shard in self._handles:
            self._handles.move_to_end(shard)
            return self._handles[shard]
        if len(self._handles) >= self.open_files:
            os.close(self._handles.popitem(last=False)[1])
        self._handles[shard] = os.open(self.shards[shard].path, os.O_RDONLY)
        return self._handles[shard]

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __getstate__(self) -> dict[str, object]:
        return {"shards": self.shards, "open_files": self.open_files}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]
