"""Writing WebDataset shards: deterministic tars, made aside and published together, the manifest last."""

import fcntl
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.shards.tar import add_member
from switti.errors import UserError
from switti.files import (
    kind_of,
    read_json_object,
    sha256_file,
    sync_file,
    sync_folder,
    write_json,
    writing,
)

MANIFEST = "manifest.json"
ATTRIBUTION = "ATTRIBUTION.md"
SKIPPED = "skipped.csv"
WORKING = ".preparing"


@dataclass(frozen=True)
class PreparedSample:
    """One image with its caption: `<key>.<suffix>`, `<key>.txt` and `<key>.json` of a shard."""

    key: str
    image: bytes
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

    def write(self, sample: PreparedSample, kind: str) -> None:
        with writing(self._path):
            if self._tar is None:
                self._tar = tarfile.open(self._path, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115 (see close)
            self._add(f"{sample.key}.{sample.suffix}", sample.image)
            self._add(f"{sample.key}.txt", sample.caption.encode())
            meta = json.dumps(sample.meta, ensure_ascii=False, sort_keys=True)
            self._add(f"{sample.key}.json", meta.encode())
        self.kinds[kind] += 1
        self._samples += 1
        if self._samples == self.shard_size:
            self.close()

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.split}-{len(self.shards):06d}.tar"

    def _add(self, name: str, data: bytes) -> None:
        assert self._tar is not None  # write() has opened it
        add_member(self._tar, name, data)

    def close(self) -> None:
        """Finish the open shard and note its size and digest."""
        if self._tar is None:
            return
        path = self._path
        with writing(path):
            self._tar.close()
            sync_file(path)
        row = {"name": path.name, "split": self.split, "samples": self._samples}
        self.shards.append(row | {"bytes": path.stat().st_size, "sha256": sha256_file(path)})
        self._tar, self._samples = None, 0


def check_out(out: Path) -> None:
    """UserError unless `out` is a folder, a link to one, or not there."""
    try:
        kind = kind_of(out) or kind_of(out, follow=False)
        if kind is None:
            # What cannot exist, such as a name that is too long, cannot be made either.
            with suppress(FileNotFoundError, NotADirectoryError):
                os.lstat(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be used: {error.strerror}; give another folder") from error
    if kind == "symbolic link":
        raise UserError(f"--out {out} is a symbolic link to nothing; give a folder")
    if kind not in (None, "folder"):
        raise UserError(f"--out {out} is a {kind}; give a folder")


def existing_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of a prepared folder; None if nothing has been prepared there.

    Raises:
        UserError: the manifest cannot be read.
    """
    path = out / MANIFEST
    with writing(path):
        if not os.path.lexists(path):
            return None
        manifest = read_json_object(path)
    shards = manifest.get("shards")
    if not isinstance(manifest.get("settings"), dict) or not isinstance(shards, list):
        raise UserError(f"{path} is not a manifest of this command; give another --out")
    if not all(isinstance(row, dict) and {"name", "bytes"} <= row.keys() for row in shards):
        raise UserError(f"{path} does not say which shards there are; give another --out")
    return manifest


def is_prepared(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` already holds the shards of exactly these settings.

    Raises:
        UserError: it holds shards of other settings, some shard of the manifest is gone or has another size, or
            files of such names lie there that no manifest speaks of.
    """
    manifest = existing_manifest(out)
    if manifest is None:
        _check_clear(out, settings)
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
        path = out / str(row["name"])
        if not path.exists() or path.stat().st_size != row["bytes"]:
            raise UserError(
                f"{path} is missing or corrupt; remove {out} and prepare again, or give another --out"
            )
    return True


def _check_clear(out: Path, settings: dict[str, Any]) -> None:
    """UserError if publishing would overwrite files of another origin."""
    begun = existing_manifest(out / WORKING)
    if begun is not None and begun["settings"] == settings:
        return  # what lies there was published by the same command, which is now finished
    names = [name for name in (ATTRIBUTION, SKIPPED) if os.path.lexists(out / name)]
    names += sorted(path.name for path in out.glob("*.tar"))[:1]
    if names and begun is None:
        raise UserError(f"{out} holds {names[-1]} without a {MANIFEST}; give another --out")
    if names:
        raise UserError(
            f"{out} holds a part of shards of other settings, whose preparation was interrupted; remove it, or give "
            "another --out"
        )


@contextmanager
def working_folder(out: Path) -> Iterator[Path]:
    """A folder inside `out` (so that publishing is a rename) held by this process alone; removed on failure.

    Raises:
        UserError: another process is preparing the same folder, or it cannot be made.
    """
    work = out / WORKING
    with writing(out):
        made = [folder for folder in (out, *out.absolute().parents) if not folder.exists()]
    try:
        with writing(out):
            work.mkdir(parents=True, exist_ok=True)
        handle = _hold(work)
        try:
            yield work
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        finally:
            os.close(handle)
    except BaseException:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def _hold(work: Path) -> int:
    """A descriptor that holds the lock of the working folder."""
    busy = UserError(
        f"{work.parent} is being prepared by another process; wait for it, or give another --out"
    )
    handle = -1
    try:
        handle = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino == os.stat(work).st_ino:
            return handle
        error: OSError | None = None  # the other one has just removed the folder that was opened
    except (BlockingIOError, FileNotFoundError) as caught:
        error = caught
    except OSError as caught:
        if handle >= 0:
            os.close(handle)
        raise UserError(
            f"{work} cannot be locked: {caught.strerror}; remove it, or give another --out"
        ) from caught
    if handle >= 0:
        os.close(handle)
    raise busy from error


def clear(work: Path) -> None:
    """Remove what an interrupted preparation left in its working folder."""
    with writing(work):
        for path in work.iterdir():
            path.unlink()


def write_manifest(work: Path, manifest: dict[str, Any]) -> None:
    """Mark the working folder as complete: from here on, an interrupted publication can be finished."""
    write_json(work / MANIFEST, manifest)


def publish(out: Path) -> None:
    """Rename everything from the working folder into `out`, the manifest last: its readers see complete shards."""
    work = out / WORKING
    with writing(out):
        names = sorted(path.name for path in work.iterdir() if path.name != MANIFEST)
        for name in [*names, MANIFEST]:
            os.replace(work / name, out / name)
        sync_folder(out)
        work.rmdir()
