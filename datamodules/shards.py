"""Writing WebDataset shards: deterministic tars, made aside and published together, the manifest last."""

import fcntl
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from switti.errors import UserError
from switti.files import sha256_file, write_json

MANIFEST = "manifest.json"
WORKING = ".preparing"


@dataclass(frozen=True)
class Sample:
    """One picture with its caption: `<key>.<suffix>`, `<key>.txt` and `<key>.json` of a shard."""

    key: str
    picture: bytes
    suffix: str
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)


class ShardWriter:
    """Writes `<split>-000000.tar`, `<split>-000001.tar`, … of `shard_size` samples into a folder.

    Equal samples in equal order give equal bytes: times, owners and modes in the tar are fixed.
    """

    def __init__(self, folder: Path, split: str, shard_size: int) -> None:
        self.folder, self.split, self.shard_size = folder, split, shard_size
        self.shards: list[dict[str, Any]] = []
        self.kinds: Counter[str] = Counter()
        self._tar: tarfile.TarFile | None = None
        self._samples = 0

    def write(self, sample: Sample, kind: str) -> None:
        if self._tar is None:
            path = self.folder / f"{self.split}-{len(self.shards):06d}.tar"
            self._tar = tarfile.open(path, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115 (closed in close())
        self._add(f"{sample.key}.{sample.suffix}", sample.picture)
        self._add(f"{sample.key}.txt", sample.caption.encode())
        meta = json.dumps(sample.meta, ensure_ascii=False, sort_keys=True)
        self._add(f"{sample.key}.json", meta.encode())
        self.kinds[kind] += 1
        self._samples += 1
        if self._samples == self.shard_size:
            self.close()

    def _add(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        member.mode = 0o644
        assert self._tar is not None  # write() has opened it
        self._tar.addfile(member, io.BytesIO(data))

    def close(self) -> None:
        """Finish the open shard and note its size and digest."""
        if self._tar is None:
            return
        self._tar.close()
        path = Path(str(self._tar.name))
        row = {"name": path.name, "split": self.split, "samples": self._samples}
        self.shards.append(row | {"bytes": path.stat().st_size, "sha256": sha256_file(path)})
        self._tar, self._samples = None, 0


def existing_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of a prepared folder; None if nothing has been prepared there.

    Raises:
        UserError: the manifest cannot be read.
    """
    path = out / MANIFEST
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no readable manifest; give another --out") from error


def is_prepared(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` already holds the shards of exactly these settings.

    Raises:
        UserError: it holds shards of other settings, some shard of the manifest is gone or has another size, or
            shards lie there that no manifest speaks of.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    manifest = existing_manifest(out)
    if manifest is None:
        if not (out / WORKING / MANIFEST).exists() and any(out.glob("*.tar")):
            raise UserError(f"{out} holds .tar files without a {MANIFEST}; give another --out")
        return False
    old = manifest.get("settings", {})
    changed = sorted(k for k in old.keys() | settings.keys() if old.get(k) != settings.get(k))
    if changed == ["source_digest"]:
        raise UserError(f"{settings['source']} has changed since {out} was prepared; give another --out")
    changed = [
        k for k in changed if k != "source_digest"
    ]  # it follows from the others, and says nothing to a reader
    if changed:
        what = ", ".join(f"{k} was {old.get(k)!r}, now {settings.get(k)!r}" for k in changed)
        raise UserError(f"{out} was prepared with other settings ({what}); give another --out")
    for row in manifest["shards"]:
        path = out / row["name"]
        if not path.exists() or path.stat().st_size != row["bytes"]:
            raise UserError(
                f"{path} is missing or damaged; remove {out} and prepare again, or give another --out"
            )
    return True


@contextmanager
def working_folder(out: Path) -> Iterator[Path]:
    """A folder inside `out` (so that publishing is a rename) held by this process alone; removed on failure.

    Raises:
        UserError: another process is preparing the same folder.
    """
    work = out / WORKING
    new = not out.exists()
    work.mkdir(parents=True, exist_ok=True)
    handle = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise UserError(f"{out} is being prepared by another process") from error
    try:
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        if new and not any(out.iterdir()):
            out.rmdir()
        raise
    finally:
        os.close(handle)


def clear(work: Path) -> None:
    """Remove what an interrupted preparation left in its working folder."""
    for path in work.iterdir():
        path.unlink()


def write_manifest(work: Path, manifest: dict[str, Any]) -> None:
    """Mark the working folder as complete: from here on, an interrupted publication can be finished."""
    write_json(work / MANIFEST, manifest)


def publish(out: Path) -> None:
    """Rename everything from the working folder into `out`, the manifest last: who sees it sees whole shards."""
    work = out / WORKING
    names = sorted(path.name for path in work.iterdir() if path.name != MANIFEST)
    for name in [*names, MANIFEST]:
        os.replace(work / name, out / name)
    work.rmdir()
