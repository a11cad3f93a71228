"""Prompt sets: the captions that systems are compared on, numbered, with seeds that follow from the numbers alone."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.prepare.captions import decode_text
from switti.errors import UserError
from switti.files import kind_of, parse_json, read_bytes
from switti.suggestions import did_you_mean, shortened

# Where the sets that are known by name are looked for.
FOLDER = Path("data/prompts")
LIMIT = 1 << 30
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".txt")
# Columns that hold the prompt, in the order in which they are looked for.
COLUMNS = ("prompt", "caption", "captions", "prompts", "text")


@dataclass(frozen=True)
class KnownSet:
    """A published prompt set: how many prompts it has, images a prompt, and where to get it."""

    count: int
    images: int
    source: str
    # Entries of each prompt's details whose counts are checked.
    tags: dict[str, int] = field(default_factory=dict)


KNOWN = {
    "coco": KnownSet(30_000, 1, "eval_prompts/coco.csv of github.com/yandex-research/switti"),
    "mjhq": KnownSet(30_000, 1, "meta_data.json of huggingface.co/datasets/playgroundai/MJHQ-30K"),
    "parti": KnownSet(1_632, 1, "PartiPrompts.tsv of github.com/google-research/parti"),
    "geneval": KnownSet(
        553,
        4,
        "prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval",
        {
            "single_object": 80,
            "two_object": 99,
            "counting": 80,
            "colors": 94,
            "position": 100,
            "color_attr": 100,
        },
    ),
}


@dataclass(frozen=True)
class Prompt:
    """One image to be made: prompt `index`, and which of its images this is (`ordinal`)."""

    index: int
    ordinal: int
    text: str
    seed: int

    @property
    def key(self) -> str:
        """The image's name in a shard; sorts as the images are numbered."""
        return f"{self.index:06d}-{self.ordinal:02d}"


@dataclass(frozen=True)
class PromptSet:
    """Texts, how many images of each, and what else their file says about each (`details`)."""

    name: str
    texts: tuple[str, ...]
    images: int = 1
    details: tuple[dict[str, Any], ...] = ()

    def __len__(self) -> int:
        """Images, not texts."""
        return len(self.texts) * self.images

    def __getitem__(self, number: int) -> Prompt:
        if not 0 <= number < len(self):
            raise IndexError(number)
        index, ordinal = divmod(number, self.images)
        return Prompt(index, ordinal, self.texts[index], seed_of(self.name, index, ordinal))

    @property
    def digest(self) -> str:
        content = json.dumps([self.name, self.images, self.texts], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()


def seed_of(name: str, index: int, ordinal: int) -> int:
    """Seed of an image, in [0, 2⁶³): the same for every system, worker and order.

    The first 63 bits of SHA-256 over "name/index/ordinal".
    """
    digest = hashlib.sha256(f"{name}/{index}/{ordinal}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def load_prompt_set(
    source: str, images: int | None = None, limit: int | None = None, column: str | None = None
) -> PromptSet:
    """The prompts of a file, of a folder of shards (captions of its validation split), or of a set known by name.

    A file that is called like a known set must be that set: its counts are checked. .csv and .tsv have a header,
    .jsonl one object or text a line, .json a list, or an object of objects, .txt one prompt a line.

    Args:
        images: of each prompt (None: 4 for geneval, else 1).
        limit: keep the first so many prompts.
        column: that holds the prompt (None: the first of COLUMNS that there is).

    Raises:
        UserError: it cannot be read, has no such column or no prompts, or is not complete.
    """
    path = _locate(source)
    if kind_of(path) == "folder":
        name, rows = path.resolve().name, _captions_of_shards(path)
    else:
        name, rows = path.stem.lower(), _read(path, column)
    texts = tuple(text for text, _ in rows)
    if not texts:
        raise UserError(f"--prompts {source}: {path} holds no prompt")
    details = tuple(more for _, more in rows)
    known = KNOWN.get("geneval" if name == "evaluation_metadata" else name)
    if known is not None:
        name = "geneval" if name == "evaluation_metadata" else name
        _check_known(name, known, path, details)
    count = images or (known.images if known else 1)
    if limit is not None:
        texts, details = texts[:limit], details[:limit]
    return PromptSet(name, texts, count, details)


def _locate(source: str) -> Path:
    path = Path(source).expanduser()
    if source == "emoji":
        path = Path("data/emoji64")
        if kind_of(path) != "folder":
            raise UserError(
                f"--prompts emoji: there is no {path}; make it with `python -m experiments.prepare emoji --out {path}`"
            )
    if kind_of(path) in ("file", "folder"):
        return path
    if source in KNOWN:
        for suffix in SUFFIXES:
            if kind_of(found := FOLDER / f"{source}{suffix}") == "file":
                return found
        raise UserError(
            f"--prompts {source}: there is no {FOLDER}/{source}.csv (or {', '.join(SUFFIXES[1:])}); put "
            f"{KNOWN[source].source} there, or give its path"
        )
    hint = did_you_mean(source, [*KNOWN, "emoji"])
    raise UserError(
        f"--prompts {shortened(source)} is neither a file, a folder of shards nor one of "
        f"{', '.join(KNOWN)}, emoji{hint}"
    )


def _check_known(name: str, known: KnownSet, path: Path, details: tuple[dict[str, Any], ...]) -> None:
    if len(details) != known.count:
        raise UserError(
            f"{path} has {len(details)} prompts, but {name} has {known.count}; get {known.source}, or rename the file "
            "if it is another set"
        )
    found = Counter(str(row.get("tag")) for row in details) if known.tags else Counter()
    if known.tags and dict(found) != known.tags:
        raise UserError(f"{path} has tags {dict(found)}, but {name} has {known.tags}; get {known.source}")


Rows = list[tuple[str, dict[str, Any]]]


def _read(path: Path, column: str | None) -> Rows:
    suffix = path.suffix.lower()
    reader = _READERS.get(suffix)
    if reader is None:
        raise UserError(f"--prompts {path} must end in {', '.join(SUFFIXES)}, which says the format")
    try:
        text = decode_text(read_bytes(path, LIMIT))
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}") from error
    return reader(path, text, column)


def _lines(path: Path, text: str, column: str | None) -> Rows:
    if column is not None:
        raise UserError(f"--prompt-column {column}: {path} has one prompt a line and no columns")
    return [(line.strip(), {}) for line in text.splitlines() if line.strip()]


def _separated(separator: str) -> Callable[[Path, str, str | None], Rows]:
    def read(path: Path, text: str, column: str | None) -> Rows:
        import csv
        import io

        csv.field_size_limit(1 << 20)
        try:
            rows = list(csv.DictReader(io.StringIO(text), delimiter=separator, strict=True))
        except csv.Error as error:
            raise UserError(f"--prompts {path} is not a table: {error}") from error
        if not rows:
            return []
        place = _column(path, column, [name for name in rows[0] if name])
        return _from_objects(path, ((f"row {n}", row) for n, row in enumerate(rows, 2)), place)

    return read


def _json_lines(path: Path, text: str, column: str | None) -> Rows:
    values = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                values.append((f"line {number}", parse_json(line)))
            except ValueError as error:
                raise UserError(f"--prompts {path}, line {number} is not JSON: {error}") from error
    return _from_values(path, values, column)


def _json(path: Path, text: str, column: str | None) -> Rows:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise UserError(f"--prompts {path} is not JSON: {error}") from error
    if isinstance(content, dict):
        values = [
            (f"entry {key}", {"id": key, **value} if isinstance(value, dict) else value)
            for key, value in content.items()
        ]
    elif isinstance(content, list):
        values = [(f"entry {number}", value) for number, value in enumerate(content)]
    else:
        raise UserError(f"--prompts {path} holds a {type(content).__name__}, not a list or an object")
    return _from_values(path, values, column)


_READERS: dict[str, Callable[[Path, str, str | None], Rows]] = {
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".jsonl": _json_lines,
    ".json": _json,
    ".txt": _lines,
}


def _from_values(path: Path, values: list[tuple[str, Any]], column: str | None) -> Rows:
    if all(isinstance(value, str) for _, value in values):
        return [(_prompt(path, place, value), {}) for place, value in values]
    for place, value in values:
        if not isinstance(value, dict):
            raise UserError(f"--prompts {path}, {place} is a {type(value).__name__}, not an object")
    return _from_objects(path, values, _column(path, column, list(values[0][1])))


def _from_objects(path: Path, rows: Iterable[tuple[str, dict[str, Any]]], column: str) -> Rows:
    return [
        (
            _prompt(path, place, row.get(column)),
            {name: value for name, value in row.items() if name and name != column},
        )
        for place, row in rows
    ]


def _column(path: Path, wanted: str | None, there: list[str]) -> str:
    folded = {name.lower(): name for name in there}
    if wanted is not None:
        if wanted in there:
            return wanted
        raise UserError(
            f"--prompt-column {wanted}: {path} has {', '.join(map(shortened, there))}{did_you_mean(wanted, there)}"
        )
    for name in COLUMNS:
        if name in folded:
            return folded[name]
    raise UserError(
        f"--prompts {path}: none of its columns ({', '.join(map(shortened, there))}) is called {', '.join(COLUMNS)}; "
        "name it by --prompt-column"
    )


def _prompt(path: Path, place: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"--prompts {path}, {place} has no prompt")
    return value.strip()


def _captions_of_shards(folder: Path) -> Rows:
    from datamodules.shards.index import ShardReader, load_index

    paths = sorted(folder.glob("validation-*.tar")) or sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"--prompts {folder} is a folder without shards (*.tar)")
    rows: Rows = []
    for path in paths:
        index = load_index(path)
        reader = ShardReader([index])
        try:
            rows += [
                (_prompt(path, key, reader.caption(0, row)), {"key": key})
                for row, key in enumerate(index.keys)
            ]
        finally:
            reader.close()
    return rows
