"""Sources of images with captions: a folder with .txt files, a table (CSV, TSV, JSONL), COCO captions.

File names of a table start from its folder, or from --images. They may be absolute or climb with `..` as long as they
stay below that folder; others are skipped, so that a table from elsewhere cannot choose among all files of a machine.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.images import (
    DEFAULT_LIMITS,
    SHARD_SUFFIXES,
    SUFFIXES,
    UNREAD_SUFFIXES,
    BadImageError,
    Limits,
    decode,
    encode_jpeg,
    encode_png,
    resize_shorter,
)
from datamodules.prepare.captions import UnusableTextError, decode_text, one_line, readable
from datamodules.prepare.prepare import Listing, Skipped
from datamodules.prepare.tables import TABLES, Row, TableError, coco_rows, table_rows
from datamodules.prepare.writer import PreparedSample
from datamodules.shards.members import CAPTION, IMAGE, LIMITS
from switti.errors import UserError
from switti.files import kind_of, read_bytes

MAX_TABLE_BYTES = 4 << 30
# Of a caption file; LIMITS applies to the caption made of it.
MAX_CAPTION_BYTES = 1 << 20
JOINED = "captions with line breaks or control characters, joined to one line"


@dataclass(frozen=True)
class ImageItem:
    """An image file and its captions, the main one first. `origin`: its name inside the source."""

    path: Path
    origin: str
    captions: tuple[str, ...]
    limits: Limits = DEFAULT_LIMITS

    @property
    def key(self) -> str:
        """A readable part and a digest of file and caption. Dots would end the key in a shard."""
        visible = re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(self.origin)[0])[-60:]
        digest = hashlib.sha256(f"{self.origin}\n{self.captions[0]}".encode()).hexdigest()
        return f"{visible}-{digest[:12]}"

    @property
    def group(self) -> str:
        return self.origin  # an image that is listed with two captions stays in one split

    @property
    def concept(self) -> str:
        return self.origin

    @property
    def kind(self) -> str:
        return "pictures"

    def digest_text(self) -> str:
        return f"{self.origin}\t{self.captions}\t{self.path.stat().st_size}"

    def build(self, size: int) -> PreparedSample:
        """Read it; shrink it if its shorter side is longer than `size` px. Otherwise its bytes stay as they are.

        Raises:
            BadImageError: it cannot be read or decoded.
        """
        try:
            # No format that is read takes more than eight bytes a pixel.
            data = read_bytes(self.path, 8 * self.limits.max_pixels)
        except (OSError, UserError) as error:
            raise BadImageError(f"cannot be read: {_reason(error)}") from error
        image = decode(data, self.limits)
        suffix = self.path.suffix.lower().lstrip(".")
        meta = {
            "captions": list(self.captions),
            "height": image.height,
            "source": self.origin,
            "width": image.width,
        }
        kept = SHARD_SUFFIXES.get(str(image.format), ())
        if size and min(image.size) > size:
            image = resize_shorter(image, size)
            data, suffix = (encode_jpeg(image), "jpg") if "jpg" in kept else (encode_png(image), "png")
        elif not kept:
            data, suffix = encode_png(image), "png"
        elif suffix not in kept:
            suffix = kept[0]
        if len(data) > LIMITS[IMAGE]:
            raise BadImageError(f"file too large: {len(data)} bytes, the limit is {LIMITS[IMAGE]}")
        return PreparedSample(self.key, data, suffix, self.captions[0], meta)


def _reason(error: OSError | UserError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def list_source(
    source: Path,
    images: Path | None = None,
    file_column: str = "file",
    caption_column: str = "caption",
    encoding: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Listing:
    """List a folder, a table or a COCO captions file.

    Args:
        images: folder that a table's file names start from (default: the table's own).
        encoding: of captions and tables without a byte order mark (default: UTF-8).

    Raises:
        UserError: there is no such source, its kind is not known, or its contents contradict it.
    """
    try:
        kind = kind_of(source)
    except OSError as error:
        raise UserError(f"cannot read {readable(str(source))}: {error.strerror}") from error
    if kind is None:
        raise UserError(f"no such folder or table: {readable(str(source))}")
    if images is not None and not images.is_dir():
        raise UserError(f"--images {readable(str(images))} is not a folder")
    settings: dict[str, Any] = {"source": readable(str(source.resolve()))}
    settings |= {} if encoding is None else {"encoding": encoding}
    settings |= {
        name: value for name, value in vars(limits).items() if value != getattr(DEFAULT_LIMITS, name)
    }
    if kind == "folder":
        if images is not None:
            raise UserError("--images belongs to a table or COCO file; a folder holds its own images")
        return _listing(_FolderRows(source, encoding), source, settings, limits)
    if kind != "file":
        raise UserError(f"{readable(str(source))} is a {kind}, neither a folder nor a table")
    root = images or source.parent
    settings["images"] = readable(str(root.resolve()))
    suffix = source.suffix.lower()
    if suffix not in (*TABLES, ".json"):
        raise UserError(f"{readable(str(source))} is neither a folder nor {', '.join(TABLES)} or COCO .json")
    if suffix == ".json" and images is None:
        raise UserError(f"{source} is taken for COCO captions: give the folder of its images with --images")
    if suffix != ".json":
        settings |= {"file_column": file_column, "caption_column": caption_column}
    try:
        data = read_bytes(source, MAX_TABLE_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {readable(str(source))}: {error.strerror}") from error
    try:
        if suffix == ".json":
            return _listing(coco_rows(data, encoding), root, settings, limits)
        rows = table_rows(data, suffix, file_column, caption_column, encoding, _Root(root).holds)
        return _listing(rows, root, settings, limits)
    except TableError as error:
        join = ", " if str(error).startswith("line ") else " "
        raise UserError(f"{readable(str(source))}{join}{error}") from error


def _listing(rows: Iterable[Row], folder: Path, settings: dict[str, Any], limits: Limits) -> Listing:
    root = _Root(folder)
    items: dict[str, ImageItem] = {}
    skipped: list[Skipped] = []
    notes: Counter[str] = Counter()
    for row in rows:
        path, origin, problem = root.locate(row.name)
        captions, joined, trouble = _clean(row.captions)
        # What the row says of itself comes first, then whether it has a caption, then its file.
        problem = row.problem or trouble or problem
        if problem:
            skipped.append(Skipped(origin, problem, row.where))
            continue
        item = ImageItem(path, origin, captions, limits)
        if item.key in items:
            skipped.append(Skipped(origin, "listed twice with one caption", row.where))
            continue
        items[item.key] = item
        notes[JOINED] += joined
    return Listing(list(items.values()), settings, skipped, notes=+notes)


def _clean(captions: Iterable[str]) -> tuple[tuple[str, ...], int, str]:
    """(the distinct captions that are not blank, how many were joined to one line, why there are none)."""
    try:
        lines = [one_line(caption) for caption in captions]
    except UnusableTextError as error:
        return (), 0, str(error)
    kept = tuple(dict.fromkeys(line for line, _ in lines if line))
    if sum(len(line.encode()) for line in kept) > LIMITS[CAPTION]:
        return (), 0, f"caption too long: more than {LIMITS[CAPTION]} bytes"
    return kept, sum(joined for _, joined in lines), "" if kept else "no caption"


class _Root:
    """The folder that a source's file names start from."""

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.abspath(folder)
        self.bases = tuple(dict.fromkeys((self.folder, os.path.realpath(folder))))

    def locate(self, name: str) -> tuple[Path, str, str]:
        """(path, name to show, problem) of a file that the source names."""
        if not name:
            return Path(self.folder), "(no file name)", "no file name"
        if name.startswith(("http://", "https://")):
            return Path(name), readable(name), "no such file: addresses are not downloaded"
        path = os.path.normpath(os.path.join(self.folder, name))
        base = next(
            (base for base in self.bases if path == base or path.startswith(os.path.join(base, ""))), None
        )
        if base is None:
            remedy = "give a folder that holds all files with --images"
            return Path(path), readable(name), f"outside of {readable(self.folder)}: {remedy}"
        origin = readable(path[len(base) :].lstrip("/")) or "."
        try:
            kind = kind_of(path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a file name"
            return Path(path), origin, f"cannot be read: {reason}"
        problem = "no such file" if kind is None else f"cannot be read: a {kind}, not a regular file"
        return Path(path), origin, "" if kind == "file" else problem

    def holds(self, name: str) -> bool:
        return not self.locate(name)[2]


class _FolderRows:
    """The images below a folder with the captions beside them, and what lies there in place of one."""

    def __init__(self, folder: Path, encoding: str | None) -> None:
        self.folder, self.encoding = folder, encoding

    def __iter__(self) -> Iterator[Row]:
        unread: list[OSError] = []
        for place, folders, files in os.walk(self.folder, onerror=unread.append):
            folders.sort()
            for name in folders:
                if os.path.islink(os.path.join(place, name)):
                    yield Row("", self._name(place, name), problem="link to a folder: not followed")
            yield from self._folder(place, sorted(files))
        for error in unread:
            yield Row("", self._name(str(error.filename), ""), problem=f"cannot be read: {error.strerror}")

    def _name(self, place: str, name: str) -> str:
        return os.path.relpath(os.path.join(place, name), self.folder)

    def _folder(self, place: str, files: list[str]) -> Iterator[Row]:
        ends = {name: os.path.splitext(name) for name in files}
        captions = {stem: name for name, (stem, end) in ends.items() if end.lower() == ".txt"}
        captions |= {stem: name for name, (stem, end) in ends.items() if end == ".txt"}
        images = {stem for stem, end in ends.values() if end.lower() in SUFFIXES}
        others: set[str] = set()
        for name, (stem, end) in ends.items():
            shown = self._name(place, name)
            if end.lower() in SUFFIXES:
                yield self._image(shown, place, captions.get(stem))
            elif end.lower() in UNREAD_SUFFIXES:
                others.add(stem)
                yield Row(
                    "", shown, problem=f"format not supported: {end.lower()}; convert it to JPEG or PNG"
                )
            elif end.lower() != ".txt" and stem in captions and stem not in images:
                others.add(stem)
                yield Row("", shown, problem=f"unknown ending: {end or 'none'}")
        for stem in sorted(captions.keys() - images - others):
            yield Row("", self._name(place, captions[stem]), problem="caption without an image")

    def _image(self, shown: str, place: str, caption: str | None) -> Row:
        if caption is None:
            return Row("", shown)
        try:
            data = read_bytes(os.path.join(place, caption), MAX_CAPTION_BYTES)
            return Row("", shown, (decode_text(data, self.encoding),))
        except UnusableTextError as error:
            return Row("", shown, problem=f"caption {error}")
        except (OSError, UserError) as error:
            return Row("", shown, problem=f"caption cannot be read: {_reason(error)}")
