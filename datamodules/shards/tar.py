"""Tar archives header by header, from a file or a stream, in bounded time and memory whatever the bytes are.

Reads what tar programs write: v7, ustar, GNU (long names, sizes in base 256, sparse files) and pax. Formats:
POSIX.1-2001 "pax", GNU tar manual "Basic Tar Format". `add_member` writes.
"""

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

BLOCK = 512
MAX_EXTENSION = 1 << 20  # bytes of long names and pax records before one member
MAX_EXTENSION_HEADERS = 16
MAX_NAME = 4096  # bytes, Linux's PATH_MAX
MAX_SIZE = 1 << 62
_CHUNK = 1 << 16
MAX_PADDING = 64 << 20  # zeros after the end; programs pad up to their record size
_OCTAL = re.compile(rb" *([0-7]*) *")
_PAX_RECORD = re.compile(rb"([1-9][0-9]{0,6}) ([^=]+)=")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
}
_KINDS = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"5": "folder",
    b"6": "FIFO",
    b"S": "sparse file",
}
_WITHOUT_DATA = ("hard link", "symbolic link", "device", "folder", "FIFO")


class CorruptTarError(OSError):
    """The bytes stop being a tar archive, or end before the archive does."""


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of an archive.

    kind: "file", or what else it is ("hard link", "sparse file", …). link: what a link names. offset: of the data, in
    bytes from the start of the archive; size: of the data as stored.
    """

    name: str
    kind: str
    link: str
    offset: int
    size: int


class Source(Protocol):
    """Bytes that are read forward. `read` gives fewer than asked for at the end alone. end: where it is, if known."""

    position: int

    @property
    def end(self) -> int | None: ...

    def read(self, size: int, /) -> bytes: ...

    def skip(self, size: int, /) -> None: ...


class FileSource:
    """A file on disk. Skipping past its end is a CorruptTarError."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.end: int = stream.seek(0, io.SEEK_END)
        self.position = stream.seek(0)

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(size)
        self.position += len(data)
        return data

    def skip(self, size: int, /) -> None:
        if size > self.end - self.position:
            raise CorruptTarError(f"truncated or corrupt at byte {self.position}")
        self.position = self._stream.seek(self.position + size)


class Readable(Protocol):
    """A stream: `read` gives at least one byte, or none at its end."""

    def read(self, size: int, /) -> bytes: ...


class StreamSource:
    """A stream that can only be read forward."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self.position = 0
        self.end: int | None = None

    def read(self, size: int, /) -> bytes:
        parts, missing = [], size
        while missing and (data := self._stream.read(missing)):
            parts.append(data)
            missing -= len(data)
        self.position += size - missing
        return b"".join(parts)

    def skip(self, size: int, /) -> None:
        end = self.position + size
        while self.position < end:
            if not self.read(min(_CHUNK, end - self.position)):
                raise CorruptTarError(f"ends at byte {self.position}, within a member")


def members(source: Source) -> Iterator[Member]:
    """The members in their order. Between two of them the caller may read up to `size` bytes of data from `source`.

    Raises:
        CorruptTarError: the archive is corrupt, truncated or not a tar at all; what lay before has been given.
    """
    while True:
        begin = source.position
        member, stored = _next_member(source)
        if member is None:
            _check_end(source, begin)
            return
        if source.end is not None and member.offset + member.size > source.end:
            raise CorruptTarError(f"truncated or corrupt at byte {begin}")
        yield member
        source.skip(member.offset + stored - source.position)


def _next_member(source: Source) -> tuple[Member | None, int]:
    """(member, bytes of its data with padding); None at the mark of the archive's end."""
    begin = source.position
    name = link = b""
    records: dict[bytes, bytes] = {}
    extension = 0
    for _ in range(MAX_EXTENSION_HEADERS):
        header = source.read(BLOCK)
        if not header.strip(b"\0") and len(header) == BLOCK and source.position == begin + BLOCK:
            return None, 0
        size = _check_header(header, begin)
        kind = header[156:157]
        if kind not in (b"L", b"K", b"x", b"X", b"g"):
            break
        extension += size
        if extension > MAX_EXTENSION:
            raise CorruptTarError(
                f"the name of the member at byte {begin} is longer than {MAX_EXTENSION} bytes"
            )
        data = source.read(size)
        source.skip(_padded(size) - len(data))
        if kind == b"L":
            name = data.rstrip(b"\0")
        elif kind == b"K":
            link = data.rstrip(b"\0")
        elif kind != b"g":
            records |= _pax_records(data, begin)
    else:
        raise CorruptTarError(f"more than {MAX_EXTENSION_HEADERS} headers for the member at byte {begin}")
    if kind == b"S":
        _skip_sparse_map(header, source)
    name = records.get(b"path") or name or _stored_name(header)
    link = records.get(b"linkpath") or link or header[157:257].partition(b"\0")[0]
    if b"size" in records:
        size = _decimal(records[b"size"], begin)
    word = "folder" if kind in (b"0", b"\0") and name.endswith(b"/") else _KINDS.get(kind, "foreign member")
    if any(key.startswith(b"GNU.sparse.") for key in records):
        word, name = "sparse file", records.get(b"GNU.sparse.name", name)
    if word in _WITHOUT_DATA:
        size = 0
    if len(name) > MAX_NAME:
        word = f"{word} with a name of {len(name)} bytes"
        name = name[:60] + b"..." + name[-60:]
    return Member(printable(name), word, printable(link[:MAX_NAME]), source.position, size), _padded(size)


def _check_header(header: bytes, begin: int) -> int:
    """The size in a header block."""
    size = _number(header[124:136]) if len(header) == BLOCK and _checksum_fits(header) else None
    if size is not None and size <= MAX_SIZE:
        return size
    packed = next((name for magic, name in _COMPRESSED.items() if header.startswith(magic)), None)
    if begin == 0 and packed:
        raise CorruptTarError(f"compressed with {packed}; decompress it")
    if begin and not header:
        raise CorruptTarError(f"truncated or corrupt at byte {begin}: ends without the mark of a tar's end")
    raise CorruptTarError(f"truncated or corrupt at byte {begin}" if begin else "not a tar archive")


def _checksum_fits(header: bytes) -> bool:
    blank = header[:148] + b" " * 8 + header[156:]
    stated, unsigned = _number(header[148:156]), sum(blank)
    # A few old programs summed signed bytes.
    return stated == unsigned or stated == unsigned - 256 * sum(byte > 127 for byte in blank)


def _number(field: bytes) -> int | None:
    """Octal digits, or a positive number in base 256 after the byte 0x80; None for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    found = _OCTAL.fullmatch(field.partition(b"\0")[0])
    return int(found[1] or b"0", 8) if found else None


def _decimal(value: bytes, begin: int) -> int:
    if len(value) > 19 or not value.isdigit() or int(value) > MAX_SIZE:
        raise CorruptTarError(f"the pax header at byte {begin} is corrupt")
    return int(value)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _stored_name(header: bytes) -> bytes:
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _pax_records(data: bytes, begin: int) -> dict[bytes, bytes]:
    """Records "<length> <key>=<value>\\n"; the length counts the record from its first digit to the line's end."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data) and data[at]:
        found = _PAX_RECORD.match(data, at)
        end = at + int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise CorruptTarError(f"the pax header at byte {begin} is corrupt")
        records[found[2]] = data[found.end() : end - 1]
        at = end
    return records


def _skip_sparse_map(header: bytes, source: Source) -> None:
    more = header[482]
    while more:
        block = source.read(BLOCK)
        if len(block) < BLOCK:
            raise CorruptTarError(f"ends at byte {source.position}, within a member")
        more = block[504]


def _check_end(source: Source, begin: int) -> None:
    """After the first block of zeros only zeros may follow: a hole in the archive is not its end."""
    while source.position - begin < MAX_PADDING:
        data = source.read(_CHUNK)
        if data.strip(b"\0"):
            break
        if len(data) < _CHUNK:
            return
    raise CorruptTarError(
        f"truncated or corrupt at byte {begin}: something follows the mark of the tar's end"
    )


def printable(name: bytes) -> str:
    """A member's name as text: bytes that are not UTF-8 and control characters become escapes such as \\xe9."""
    text = name.decode(errors="backslashreplace")
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Write a file into an archive; time, owner and mode are fixed, so that equal contents give equal bytes."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))
