"""Files that are either whole or not there: atomic writing, JSON, digests."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from switti.errors import UserError

_CHUNK = 1 << 20


def temporary_beside(path: Path) -> Path:
    """The hidden name under which `path` is written before it is renamed; on the same file system by construction."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success fsync it and move it over `path`, on any failure remove it.

    A reader (or a crash, or a full disk) sees the old file or the new one, never a part. Parent folders are made.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk; OSError if they cannot be written."""
    _fsync(path, os.O_RDWR)


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable; some file systems cannot sync one, which is no reason to fail."""
    with suppress(OSError):
        _fsync(path, os.O_RDONLY)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path, default: Any = None) -> Any:
    """The file's content; `default` if there is no such file. Raises UserError when it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}; remove it or restore it") from error


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
