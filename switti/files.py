"""Atomic writes, regular files only, bounded JSON, digests."""

import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from switti.errors import UserError
from switti.suggestions import shortened

_CHUNK = 1 << 20
MAX_JSON_BYTES = 256 << 20
MAX_JSON_DEPTH = 64
_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
# What an operating system says when a file cannot be written, whoever is to blame.
_WRITE_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EINVAL,
    errno.ENOTEMPTY,
}  # fmt: skip


# ---- writing ----------------------------------------------------------------------------------------------------


def temporary_beside(path: Path) -> Path:
    """The hidden name under which the only writer of `path` works before it renames; on the same file system.

    The same name in every rank, for files that several of them write together. Others use `atomic_write`.
    """
    return path.with_name(f".{path.name}.tmp")


def unique_temporary(path: Path) -> Path:
    """A hidden name beside `path` that no other writer uses; short enough for every file system."""
    return path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex[:12]}.tmp")


def check_target(path: str | Path) -> Path:
    """`path`, if a file may be written there: nothing is there yet, or a regular file.

    Raises UserError for a folder, link, device, FIFO or socket, which a rename would replace.
    """
    try:
        kind = kind_of(path, follow=False)
        if kind is None:
            # What cannot exist cannot be written either.
            with suppress(FileNotFoundError, NotADirectoryError):
                os.lstat(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot write {shortened(path)}: {reason}; choose another name") from error
    if kind not in (None, "file"):
        raise UserError(f"{path} is a {kind}, not a regular file; choose another name for the output")
    return Path(path)


def check_output(path: str | Path) -> Path:
    """`path`, if a file can be written there: tried now, before long work, with an empty one beside it.

    Raises UserError for what `check_target` refuses, a folder that is missing, full or not writable.
    """
    target = check_target(path)
    _try_in(target.parent, target)
    return target


def check_output_folder(path: str | Path) -> Path:
    """The same for a folder of outputs, which may be there already or is made later inside one that is."""
    folder = Path(path)
    with writing(folder):
        kind = kind_of(folder)
    if kind is None:
        check_target(folder)
    elif kind != "folder":
        raise UserError(f"{folder} is a {kind}, not a folder; choose another name for the output")
    _try_in(folder if kind else folder.absolute().parent, folder)
    return folder


def _try_in(folder: Path, target: Path) -> None:
    if kind_of(folder) != "folder":
        raise UserError(f"cannot write {target}: there is no folder {folder}; make it first")
    probe = unique_temporary(folder / target.name)
    with writing(target):
        try:
            probe.touch(exist_ok=False)
        finally:
            probe.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """An OSError within becomes a UserError that names the path, the reason, the free space and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in _WRITE_ERRORS:
            raise
        raise UserError(write_failure(path, error.strerror or str(error), error.errno)) from error


def write_failure(path: str | Path, reason: str, number: int | None = errno.ENOSPC) -> str:
    """The message for a file that could not be written."""
    remedy = (
        "make room" if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) else "check the path"
    )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "check the permissions"
    return f"cannot write {path}: {reason} ({free_space(Path(path).parent)} free); {remedy} and try again"


def free_space(folder: Path) -> str:
    """Free space on the disk of a folder (or of its nearest parent that exists), with its unit."""
    for place in (folder, *folder.absolute().parents):
        with suppress(OSError):
            return f"{shutil.disk_usage(place).free / 2**20:.0f} MiB"
    return "unknown space"


@contextmanager
def atomic_write(path: str | Path, parents: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success fsync it and move it over `path`, on any failure remove it.

    A reader (or a crash, or a full disk) sees the old file or the new one, never a part. parents: make the folders
    above it; otherwise a missing one is an error. Several writers at once do not disturb each other: the last one to
    finish wins. Raises UserError if `path` is anything but a regular file, or if it cannot be written.
    """
    target = check_target(path)
    temporary = unique_temporary(target)
    with writing(target):
        if parents:
            target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync_file(temporary)
            os.replace(temporary, target)
            sync_folder(target.parent)
        except BaseException:
            with suppress(OSError):
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
    """Make renames in a folder durable; some file systems cannot sync one, which is ignored."""
    with suppress(OSError):
        _fsync(path, os.O_RDONLY)


def write_json(path: str | Path, value: Any, parents: bool = True) -> None:
    """Write `value` as indented JSON, atomically. parents: as for `atomic_write`."""
    with atomic_write(path, parents) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- reading ----------------------------------------------------------------------------------------------------


def kind_of(path: str | Path, follow: bool = True) -> str | None:
    """ "file", "folder", "FIFO", "device", … or None if nothing is there. follow: look through symbolic links.

    Nothing is where no file can have the name: too long, or with a NUL.
    """
    try:
        mode = os.stat(path, follow_symlinks=follow).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "symbolic link to itself"
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise
    return "file" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "special file")


def check_regular(path: str | Path) -> Path:
    """`path`, for a library that opens it by name. Raises FileNotFoundError, or UserError for anything but a file."""
    kind = kind_of(path)
    if kind is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if kind != "file":
        raise UserError(f"{path} is a {kind}, not a regular file")
    return Path(path)


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file opened for reading in binary; never waits, as opening a FIFO would.

    Raises OSError as `open` does, UserError for a folder, FIFO, device or socket, links to them included.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise UserError(f"{path} is a {_KINDS.get(stat.S_IFMT(mode), 'special file')}, not a regular file")


def read_bytes(path: str | Path, limit: int) -> bytes:
    """A regular file's bytes. Raises UserError when it is larger than `limit` bytes, else as `open_regular`."""
    with open_regular(path) as stream:
        # Not `read(limit + 1)`, which takes that much memory first, however small the file is.
        content = stream.read(min(limit, os.fstat(stream.fileno()).st_size) + 1)
        while len(content) <= limit and (more := stream.read(_CHUNK)):
            content += more
    if len(content) > limit:
        raise UserError(f"{path} is larger than {limit / 2**20:.0f} MiB and was not read")
    return content


def read_json(path: str | Path, default: Any = None, limit: int = MAX_JSON_BYTES) -> Any:
    """The file's content; `default` if there is no such file.

    Raises UserError when it is not JSON, not a regular file, larger than `limit` bytes or nested too deeply.
    """
    try:
        content = read_bytes(path, limit)
    except FileNotFoundError:
        return default
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return parse_json(content)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}; remove it or restore it") from error


def read_json_object(path: str | Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The same for a file that must hold an object; {} if there is no such file."""
    content = read_json(path, default={}, limit=limit)
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__}, not a JSON object; remove it or restore it"
        )
    return content


def parse_json(content: bytes | str, depth: int = MAX_JSON_DEPTH) -> Any:
    """JSON from anywhere. Raises ValueError for anything that is not JSON in UTF-8 or is nested deeper than `depth`.

    NaN and Infinity pass, as Python writes them: who needs a finite number checks it.
    """
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError(f"nested deeper than {depth} levels") from None
    level: list[Any] = [value]
    for _ in range(depth + 1):
        level = [
            item
            for container in level
            if isinstance(container, dict | list)
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
        if not level:
            return value
    raise ValueError(f"nested deeper than {depth} levels")


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a regular file's bytes."""
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
