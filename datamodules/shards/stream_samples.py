"""The samples of a tar that is read forward. Their members follow one another, as WebDataset writes them."""

from collections.abc import Iterator
from dataclasses import dataclass

from datamodules.shards.bad_samples import BadSample
from datamodules.shards.members import (
    CAPTION,
    IMAGE,
    Entries,
    belongs_to_another,
    decode_caption,
    flaw_of,
    sample_part,
)
from datamodules.shards.tar import CorruptTarError, Member, Source, members

_HELD_BACK = 1000  # keys that lack something, of one name before the first dot
_OPEN = 8  # samples at a time of which further members may come


@dataclass(frozen=True)
class StoredSample:
    """contents: bytes by part, IMAGE and CAPTION always among them."""

    shard: str
    key: str
    contents: dict[int, bytes]

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(map(len, self.contents.values()))


def stored_samples(source: Source, shard: str) -> Iterator[StoredSample | BadSample]:
    """Samples, and reports of members that belong to none. CorruptTarError or OSError where the tar breaks off."""
    cluster = _Cluster(shard)
    for member in members(source):
        named = sample_part(member.name)
        if named is None:
            continue
        key, part = named
        if _first_stem(key) != cluster.stem:
            yield from cluster.end()
            cluster = _Cluster(shard, _first_stem(key))
        yield from cluster.make_way(key)
        content, flaw = None, flaw_of(member, part)
        if flaw is None:
            content = _read(source, member)
        if content is not None and part == CAPTION:
            try:
                decode_caption(content)
            except UnicodeDecodeError:
                flaw = ("undecodable_caption", f"{member.name} is not text in UTF-8")
        cluster.open.setdefault(key, Entries()).add(member.name, part, content, flaw)
    yield from cluster.end()


def _read(source: Source, member: Member) -> bytes:
    content = source.read(member.size)
    if len(content) < member.size:
        raise CorruptTarError(f"ends at byte {source.position}, within {member.name}")
    return content


def _first_stem(key: str) -> str:
    """What WebDataset takes for the key: the name up to its first dot."""
    folder, _, base = key.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


class _Cluster:
    """Members whose names are the same up to their first dot: one sample with compound extensions, or several whose
    keys have dots. A key that lacks something is judged at the end, when all samples that it may belong to are known.
    """

    def __init__(self, shard: str, stem: str = "") -> None:
        self.shard, self.stem = shard, stem
        self.open: dict[str, Entries[bytes]] = {}
        self._whole: set[str] = set()
        self._lacking: list[tuple[str, BadSample]] = []

    def make_way(self, key: str) -> Iterator[StoredSample | BadSample]:
        """What is complete before a member of `key`: samples that have no name in common with it."""
        if key in self.open:
            return
        for other in [o for o in self.open if not (o.startswith(f"{key}.") or key.startswith(f"{o}."))]:
            yield from self._close(other)
        if len(self.open) >= _OPEN:
            yield from self._close(next(iter(self.open)))

    def end(self) -> Iterator[StoredSample | BadSample]:
        for key in list(self.open):
            yield from self._close(key)
        yield from self._judge()

    def _close(self, key: str) -> Iterator[StoredSample | BadSample]:
        entries = self.open.pop(key)
        if entries.whole:
            self._whole.add(key)
        if not {IMAGE, CAPTION} & (entries.contents.keys() | entries.flaws.keys()):
            return
        problem = entries.problem(key)
        if problem is None:
            contents = {part: content for part, content in entries.contents.items() if content is not None}
            yield StoredSample(self.shard, key, contents)
            return
        bad = BadSample(self.shard, f"{self.shard}/{key}", problem[1], problem[0])
        if entries.whole:
            yield bad
            return
        self._lacking.append((key, bad))
        if len(self._lacking) >= _HELD_BACK:
            yield from self._judge()

    def _judge(self) -> Iterator[BadSample]:
        lacking, self._lacking = self._lacking, []
        yield from (bad for key, bad in lacking if not belongs_to_another(key, self._whole))
