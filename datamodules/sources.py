"""Sources of pictures with captions: a folder with .txt files, a table (CSV, TSV, JSONL), COCO captions."""

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.pictures import (
    SHARD_SUFFIXES,
    SUFFIXES,
    DamagedPictureError,
    decode,
    encode_jpeg,
    encode_png,
    resize_shorter,
)
from datamodules.preparing import Listing, Skipped
from datamodules.shards import Sample
from switti.errors import UserError

TABLES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class PictureItem:
    """A picture file and its captions, the main one first. `origin`: its name inside the source."""

    path: Path
    origin: str
    captions: tuple[str, ...]

    @property
    def key(self) -> str:
        """A readable part and a digest of file and caption. Dots would end the key in a shard."""
        readable = re.sub(r"[^A-Za-z0-9_-]+", "_", str(Path(self.origin).with_suffix("")))[-60:]
        digest = hashlib.sha256(f"{self.origin}\n{self.captions[0]}".encode()).hexdigest()
        return f"{readable}-{digest[:12]}"

    @property
    def group(self) -> str:
        return self.origin  # a picture that is listed with two captions stays in one split

    @property
    def kind(self) -> str:
        return "pictures"

    def digest_text(self) -> str:
        return f"{self.origin}\t{self.captions}\t{self.path.stat().st_size}"

    def build(self, size: int) -> Sample:
        """Read it; shrink it if its shorter side is longer than `size` px. Otherwise its bytes stay as they are.

        Raises:
            DamagedPictureError: it cannot be read or decoded.
        """
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise DamagedPictureError(f"cannot be read: {error.strerror}") from error
        image = decode(data)
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
        return Sample(self.key, data, suffix, self.captions[0], meta)


def list_source(source: Path, images: Path | None, file_column: str, caption_column: str) -> Listing:
    """List a folder, a table or a COCO captions file.

    Args:
        images: folder that a table's file names start from (default: the table's own).

    Raises:
        UserError: there is no such source, its kind is not known, or it lacks the columns.
    """
    if not source.exists():
        raise UserError(f"no such folder or table: {source}")
    if images is not None and not images.is_dir():
        raise UserError(f"--images {images} is not a folder")
    settings: dict[str, Any] = {"source": str(source.resolve())}
    if source.is_dir():
        if images is not None:
            raise UserError("--images belongs to a table or COCO file; a folder holds its own pictures")
        return _listing(_folder_rows(source), settings)
    root = images or source.parent
    settings["images"] = str(root.resolve())
    if source.suffix.lower() == ".json":
        if images is None:
            raise UserError(
                f"{source} is taken for COCO captions: give the folder of its pictures with --images"
            )
        return _listing(_coco_rows(source, root), settings)
    if source.suffix.lower() not in TABLES:
        raise UserError(f"{source} is neither a folder nor {', '.join(TABLES)} or COCO .json")
    settings |= {"file_column": file_column, "caption_column": caption_column}
    return _listing(_table_rows(source, root, file_column, caption_column), settings)


Row = tuple[Path, str, list[str]]  # path, origin, captions


def _listing(rows: Iterable[Row], settings: dict[str, Any]) -> Listing:
    items: dict[str, PictureItem] = {}
    skipped = []
    for path, origin, captions in rows:
        spoken = tuple(dict.fromkeys(c.strip() for c in captions if c.strip()))
        if not spoken:
            skipped.append(Skipped(origin, "no caption"))
        elif not path.is_file():
            skipped.append(Skipped(origin, "no such file"))
        else:
            item = PictureItem(path, origin, spoken)
            if item.key in items:
                skipped.append(Skipped(origin, "listed twice with one caption"))
            items.setdefault(item.key, item)
    return Listing(list(items.values()), settings, skipped)


def _folder_rows(folder: Path) -> Iterator[Row]:
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        beside = path.with_suffix(".txt")
        captions = [beside.read_text(encoding="utf-8", errors="replace")] if beside.is_file() else []
        yield path, str(path.relative_to(folder)), [" ".join(c.split()) for c in captions]


def _table_rows(table: Path, root: Path, file_column: str, caption_column: str) -> Iterator[Row]:
    rows = _jsonl(table) if table.suffix.lower() == ".jsonl" else _separated(table)
    for row in rows:
        for option, column in (("--file-column", file_column), ("--caption-column", caption_column)):
            if column not in row:
                raise UserError(
                    f"{table} has no column '{column}' ({option}); it has {', '.join(map(str, row))}"
                )
        name = str(row[file_column] or "")
        yield root / name, name or f"(row without a file in {table.name})", [str(row[caption_column] or "")]


def _separated(table: Path) -> Iterator[dict[str, Any]]:
    with table.open(newline="", encoding="utf-8-sig") as lines:
        try:
            yield from csv.DictReader(lines, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{table} cannot be read as a table: {error}") from error


def _jsonl(table: Path) -> Iterator[dict[str, Any]]:
    with table.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{table}, line {number}, is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{table}, line {number}, is not a JSON object")
            yield row


def _coco_rows(source: Path, root: Path) -> Iterator[Row]:
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        captions: dict[Any, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(str(annotation["caption"]))
        names = [(image["file_name"], captions[image["id"]]) for image in content["images"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source} is not a COCO captions file: {type(error).__name__} {error}") from error
    for name, found in names:
        yield root / name, name, found
