"""The tar reader against tarfile; hostile and damaged archives end soon, in one line."""

import gzip
import io
import os
import random
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from data_shards import make_shard

from datamodules.shards.index import build_index
from datamodules.shards.tar import BLOCK, CorruptTarError, FileSource, Member, Source, StreamSource, members
from switti.errors import UserError

FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}
SOURCES: list[Callable[[io.BytesIO], Source]] = [FileSource, StreamSource]
END = bytes(2 * BLOCK)


def read(content: bytes, source: Callable[[io.BytesIO], Source] = FileSource) -> list[Member]:
    return list(members(source(io.BytesIO(content))))


def header(name: str, kind: bytes = b"0", size: int = 0, form: int = tarfile.USTAR_FORMAT) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(form)


def block(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def archive(form: int, seed: int = 0) -> bytes:
    draw, buffer = random.Random(seed), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number in range(60):
            letter = "e" if form == tarfile.USTAR_FORMAT else "é"
            folders = "folder/" * draw.randint(0, 3 if form == tarfile.USTAR_FORMAT else 60)
            member = tarfile.TarInfo(f"{folders}{letter * draw.randint(1, 40)}{number}.jpg")
            data = draw.randbytes(draw.randint(0, 3000))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE):
                other = tarfile.TarInfo(f"other{number}{kind.decode()}")
                other.type, other.linkname = kind, member.name[-90:]
                tar.addfile(other)
    return buffer.getvalue()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("form", FORMATS)
def test_members_are_those_that_tarfile_finds(form: str, source: Callable[[io.BytesIO], Source]) -> None:
    content = archive(FORMATS[form])
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(m.name, m.offset_data, m.size, m.isreg(), m.linkname) for m in tar]
    found = read(content, source)
    assert [(m.name.rstrip("/"), m.offset, m.size, m.kind == "file", m.link) for m in found] == expected
    assert {m.kind for m in found} == {"file", "hard link", "symbolic link", "folder"}


@pytest.mark.parametrize("form", ["gnu", "pax"])  # ustar has none
def test_a_size_beyond_octal_digits_is_read(form: str) -> None:
    member = tarfile.TarInfo("a")
    member.size = 9 << 33
    content = member.tobuf(FORMATS[form])
    with pytest.raises(CorruptTarError, match="truncated or corrupt at byte 0"):
        read(content + END)

    class Endless(io.BytesIO):
        """More than was written."""

        def seek(self, place: int, whence: int = 0) -> int:
            return 1 << 50 if whence == io.SEEK_END else super().seek(place, whence)

    assert next(iter(members(FileSource(Endless(content))))).size == 9 << 33


@pytest.mark.parametrize("source", SOURCES)
def test_mutations_end_in_one_way(source: Callable[[io.BytesIO], Source]) -> None:
    draw, refused = random.Random(1), 0
    whole = archive(tarfile.PAX_FORMAT)[: 200 * BLOCK]
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 20)):
            # Most of an archive is data; what the reader looks at are headers.
            place = draw.randrange(len(content) // BLOCK) * BLOCK + draw.choice(
                (0, 124, 130, 148, 156, 257, 345, 482)
            )
            content[place] = draw.randrange(256)
        try:
            read(bytes(content), source)
        except CorruptTarError:
            refused += 1
    assert refused > 100


HOSTILE = {
    "a pax header of digits": header("p", b"x", 200_000) + block(b"9" * 200_000),
    "a pax size of digits": header("p", b"x", 90_009) + block(b"90009 size=" + b"9" * 89_997 + b"\n"),
    "a pax record that ends elsewhere": header("p", b"x", 12) + block(b"99 path=ab\n\n"),
    "a pax size that is negative": header("p", b"x", 11) + block(b"11 size=-1\n"),
    "long names without end": (header("L", b"L", BLOCK) + b"a" * BLOCK) * 20_000,
    "a long name of 1 GB": header("L", b"L", 1 << 30) + b"a" * 4096,
    "a long name at the end": header("L", b"L", 5) + block(b"a.txt") + END,
    "a size below zero": header("a")[:124] + b"\xff" * 12 + header("a")[136:],
    "a size of 2^80": header("a")[:124] + b"\x80" + b"\xff" * 11 + header("a")[136:],
    "a checksum of letters": header("a")[:148] + b"nonsense" + header("a")[156:],
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_soon(name: str, source: Callable[[io.BytesIO], Source]) -> None:
    began = time.process_time()
    with pytest.raises(CorruptTarError) as caught:
        read(HOSTILE[name] + END, source)
    assert time.process_time() - began < 2 and len(str(caught.value)) < 200 and "\n" not in str(caught.value)


@pytest.mark.parametrize("source", SOURCES)
def test_two_hundred_thousand_members_take_seconds(source: Callable[[io.BytesIO], Source]) -> None:
    content = b"".join(header(f"empty{number}.dat") for number in range(200)) * 1000 + END
    began = time.process_time()
    assert sum(1 for _ in members(source(io.BytesIO(content)))) == 200_000
    assert time.process_time() - began < 20


def test_sparse_files_are_named_and_what_follows_is_found() -> None:
    sparse = bytearray(header("hole", b"S", BLOCK))
    sparse[482] = 1  # an extension block follows
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    content = (
        bytes(sparse) + bytes(BLOCK) + bytes([1] * BLOCK) + header("after.txt", size=1) + block(b"x") + END
    )
    records = b"22 GNU.sparse.major=1\n"
    content = (
        header("p", b"x", len(records)) + block(records) + header("pax", size=3) + block(b"abc") + content
    )
    assert [(m.name, m.kind) for m in read(content)] == [
        ("pax", "sparse file"), ("hole", "sparse file"), ("after.txt", "file")
    ]  # fmt: skip


def test_names_become_text_without_control_characters() -> None:
    content = b""
    for name in (b"caf\xe9.jpg", b"a\x1b[2J\n.jpg", "é😀.jpg".encode()):
        record = b"path=" + name + b"\n"
        record = b"%d %s" % (len(record) + 3, record)
        content += header("p", b"x", len(record)) + block(record) + header("a")
    assert [m.name for m in read(content + END)] == ["caf\\xe9.jpg", "a\\x1b[2J\\x0a.jpg", "é😀.jpg"]
    long = b"d/" * 5000 + b"a.jpg"
    content = header("L", b"L", len(long)) + block(long) + header("a") + END
    assert [m.kind for m in read(content)] == ["file with a name of 10005 bytes"]


def test_what_is_compressed_or_no_tar_is_told_so(tmp_path: Path) -> None:
    path = make_shard(tmp_path / "a.tar", ["x"])
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match=r"a\.tar is not a complete, uncompressed tar \(compressed with gzip"):
        build_index(path)
    path.write_bytes(b"<html>" * 1000)
    with pytest.raises(UserError, match="not a tar archive"):
        build_index(path)


def zeros_for_ever() -> Iterator[bytes]:
    yield header("a.txt") + END
    while True:
        yield bytes(1 << 16)


def test_zeros_without_end_are_no_archive() -> None:
    class Stream:
        def __init__(self) -> None:
            self.parts, self.rest = zeros_for_ever(), b""

        def read(self, size: int, /) -> bytes:
            self.rest = self.rest or next(self.parts)
            data, self.rest = self.rest[:size], self.rest[size:]
            return data

    with pytest.raises(CorruptTarError, match="something follows"):
        list(members(StreamSource(Stream())))


def test_a_second_archive_behind_the_first_is_not_passed_over() -> None:
    one = header("a.txt") + END
    with pytest.raises(CorruptTarError, match="something follows the mark of the tar's end"):
        read(one + one)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_only_regular_files_are_shards(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tar"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="not a regular file"):
        build_index(path)
