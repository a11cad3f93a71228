"""Grouping of tar members into samples: the image, the .txt caption and the .json of one key.

A sample's key is the member's name up to its *last* dot, so that `IMG.2023.05.jpg` and `IMG.2023.05.txt` are a sample.
WebDataset's compound extensions still hold: what has no image and caption of its own (`000.mask.png`, `000.en.txt`)
belongs to the sample `000` if that has both, and is not read. As in WebDataset, names that begin with a dot are none.
"""

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from datamodules.images import SUFFIXES, UNREAD_SUFFIXES
from datamodules.shards.bad_samples import Kind
from datamodules.shards.tar import Member

IMAGE, CAPTION, META, EMBEDDING = range(4)
# Bytes of a member. A larger image or caption makes a bad sample; a larger json is ignored.
LIMITS = (256 << 20, 64 << 10, 1 << 20, 16 << 20)
EMBEDDING_SUFFIX = ".text.safetensors"
_COMPOUND = 4  # dots within a compound extension, at most
_PARTS = {".txt": CAPTION, ".json": META}
_WORDS = ("image", "caption", "json", "embedding")

Content = TypeVar("Content")
Flaw = tuple[Kind, str]


def sample_part(name: str) -> tuple[str, int] | None:
    """(key, part) of a member's name; None if it cannot belong to a sample."""
    folder, _, base = name.rpartition("/")
    if base.startswith("."):
        return None
    if base.endswith(EMBEDDING_SUFFIX):
        stem, part = base.removesuffix(EMBEDDING_SUFFIX), EMBEDDING
    else:
        stem, dot, suffix = base.rpartition(".")
        ending = f".{suffix.lower()}"
        known = IMAGE if ending in SUFFIXES or ending in UNREAD_SUFFIXES else _PARTS.get(ending)
        if known is None or not dot:
            return None
        part = known
    return (f"{folder}/{stem}" if folder else stem), part


def flaw_of(member: Member, part: int) -> Flaw | None:
    """Why a member cannot be read, by its kind, name and size alone."""
    missing: Kind = "missing_caption" if part == CAPTION else "missing_picture"
    if member.kind != "file":
        target = f" to {member.link}" if member.link else ""
        return missing, f"{member.name} is a {member.kind}{target}, not a file"
    if part == IMAGE and (ending := _ending(member.name)) not in SUFFIXES:
        return missing, f"{member.name} is an image, but {ending} is not read"
    if member.size > LIMITS[part]:
        damaged: Kind = "undecodable_caption" if part == CAPTION else "undecodable_picture"
        return damaged, f"{member.name} has {member.size} bytes, more than {LIMITS[part]}"
    return None


def decode_caption(stored: bytes) -> str:
    """A caption's text without surrounding blanks. UnicodeDecodeError if it is not UTF-8, or holds NUL characters."""
    if (place := stored.find(0)) >= 0:
        raise UnicodeDecodeError("utf-8", stored, place, place + 1, "a NUL character")
    return stored.decode("utf-8-sig").strip()


def _ending(name: str) -> str:
    return f".{name.rpartition('.')[2].lower()}"


@dataclass
class Entries(Generic[Content]):
    """What a tar holds under one key. contents: by part, None where it is there and cannot be read. flaws: by part."""

    contents: dict[int, Content | None] = field(default_factory=dict)
    flaws: dict[int, Flaw] = field(default_factory=dict)

    def add(self, name: str, part: int, content: Content | None, flaw: Flaw | None = None) -> None:
        """A member's content, or why there is none."""
        if flaw is not None and flaw[0] in ("missing_picture", "missing_caption"):
            self.flaws.setdefault(part, flaw)  # a link or a foreign image: a real one may stand beside it
            return
        if part in self.contents:
            flaw = (
                "duplicate_member",
                f"its {_WORDS[part]} is there twice, again as {name}; keys must be unique in a shard",
            )
        self.contents[part] = None if flaw else content
        if flaw is not None:
            self.flaws[part] = flaw

    @property
    def whole(self) -> bool:
        """Whether image and caption are there, readable or not."""
        return IMAGE in self.contents and CAPTION in self.contents

    def problem(self, key: str) -> Flaw | None:
        """Why this is not a sample; None if it is one. A foreign json is ignored, whatever is wrong with it."""
        lacking = [part for part in (IMAGE, CAPTION) if self.contents.get(part) is None]
        if not lacking:
            return None
        # An unreadable part says more than a missing one.
        part = min(lacking, key=lambda part: (part not in self.contents, part not in self.flaws, part))
        if part in self.flaws:
            return self.flaws[part][0], f"{key}: {self.flaws[part][1]}"
        if part == IMAGE:
            return "missing_picture", f"{key} has no image"
        return "missing_caption", f"{key} has no .txt caption"


def belongs_to_another(key: str, whole: Container[str]) -> bool:
    """Whether a key without image or caption names further entries of a complete sample, as `000.mask` of `000`."""
    folder, _, base = key.rpartition("/")
    parts = base.rsplit(".", _COMPOUND)
    prefixes = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    return any((f"{folder}/{prefix}" if folder else prefix) in whole for prefix in prefixes)
