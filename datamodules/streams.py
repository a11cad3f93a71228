"""Shards that can only be read from front to back (`pipe:…`, `http(s)://…`), resampled.

Every worker of every rank draws shards with replacement and shuffles what it reads in a buffer. There are no epochs
and no exact resume: a resumed run goes on with other samples.

A stream that fails is opened again after 1, 2, 4, … s (at most a minute), and goes on after the last sample that it
gave. When `data.stream_retries` attempts in a row bring nothing new, the shard is given up until it is drawn again.
"""

import random
import tarfile
import time
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import webdataset as wds
from braceexpand import braceexpand
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.hashing import sample_seed, stable_hash
from datamodules.pictures import SUFFIXES, DamagedPictureError
from datamodules.remote import Readable, opened
from datamodules.samples import Damage, Framing, Sample, make_sample
from switti.errors import UserError

SHUFFLE_BUFFER = 1000
# So many samples in a row without a picture and a caption that can be read: the stream holds something else.
FOREIGN_LIMIT = 10_000
GIVEN_UP_LIMIT = 3  # so many shards in a row: it is the source that has failed
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
BROKEN = (OSError, tarfile.TarError, ValueError, EOFError)


class StreamFailed(Damage):
    """A source that failed for good; unlike a damaged picture it ends the run."""


class StreamSet(IterableDataset[Sample | Damage]):
    """Endless samples of resampled streams. `start`: samples consumed so far, so that a resumed run draws anew.

    Raises:
        UserError: a pattern has unbalanced braces.
    """

    def __init__(
        self,
        patterns: list[str],
        framing: Framing,
        seed: int,
        start: int,
        rank: int,
        *,
        timeout: float = 60.0,
        retries: int = 5,
    ) -> None:
        try:
            self.urls = [url for pattern in patterns for url in braceexpand(pattern, escape=False)]
        except ValueError as error:
            raise UserError(f"data.train={patterns}: {error}") from error
        self.framing, self.seed, self.start, self.rank = framing, seed, start, rank
        self.timeout, self.retries = timeout, retries

    def __iter__(self) -> Iterator[Sample | Damage]:
        """What could not be read goes along with the next whole sample, so that batches keep their size."""
        worker = get_worker_info()
        # Each worker of each rank draws from its own seed, so the streams need not be split among them.
        own = stable_hash(f"{self.seed}/{self.start}/{self.rank}/{worker.id if worker else 0}")
        damages: list[Damage] = []
        shuffled = wds.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER // 10, rng=random.Random(own))
        useless = 0
        try:
            for number, content in enumerate(shuffled(self._contents(random.Random(own + 1), damages))):
                sample = self._sample(content, self.start + number)
                if isinstance(sample, Sample):
                    sample.damages, damages[:] = list(damages), []
                    useless = 0
                    yield sample
                    continue
                damages.append(sample)
                useless += 1
                if useless >= FOREIGN_LIMIT:
                    raise ValueError(f"no pictures with a .txt caption: {sample.key}: {sample.reason}")
        except BROKEN as error:
            names = ", ".join(self.urls)
            yield StreamFailed(names, names, " ".join(str(error).split()), "failed_stream")

    def _contents(self, draw: random.Random, damages: list[Damage]) -> Iterator[dict[str, Any]]:
        """Raw samples of one drawn shard after another. Raises the last reason when one after another fails."""
        given_up = 0
        while True:
            url = draw.choice(self.urls)
            try:
                for content in self._shard(url, damages):
                    given_up = 0
                    yield content
            except BROKEN as error:
                given_up += 1
                if given_up >= min(GIVEN_UP_LIMIT, len(self.urls)):
                    raise
                damages.append(Damage(_name(url), url, str(error), "failed_stream"))

    def _shard(self, url: str, damages: list[Damage]) -> Iterator[dict[str, Any]]:
        """Samples of one shard, each once, with as many attempts as it takes; the last error if that does not help."""
        done = failed = 0
        while True:
            try:
                with opened(url, self.timeout) as stream:
                    for number, content in enumerate(read_tar(stream, url)):
                        if number >= done:
                            done, failed = done + 1, 0
                            yield content
                return
            except BROKEN as error:
                failed += 1
                if failed > self.retries:
                    raise
                damages.append(Damage(_name(url), url, str(error), "stream_retry", samples=0))
                time.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (failed - 1)))

    def _sample(self, content: dict[str, Any], number: int) -> Sample | Damage:
        shard = _name(content["__url__"])
        key = f"{shard}/{content['__key__']}"
        suffix = next((s for s in content if f".{s.lower()}" in SUFFIXES), None)
        if suffix is None:
            return Damage(shard, key, "no picture", "missing_picture")
        if "txt" not in content:
            return Damage(shard, key, "no .txt caption", "missing_caption")
        caption = content["txt"].decode(errors="replace").strip()
        seed = sample_seed(self.seed, number, key)
        try:
            return make_sample(content[suffix], caption, content.get("json"), key, seed, self.framing)
        except DamagedPictureError as error:
            return Damage(shard, key, str(error))


def read_tar(stream: Readable, url: str) -> Iterator[dict[str, Any]]:
    """Samples of a tar: {"__key__", "__url__", suffix: bytes, …}. Raises TarError or OSError where it breaks off."""
    watched = _Tail(stream)
    with tarfile.open(fileobj=watched, mode="r|") as tar:  # type: ignore[call-overload]
        sample: dict[str, Any] = {}
        for member in tar:
            if not member.isreg():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if sample and sample["__key__"] != key:
                yield sample
                sample = {}
            content = tar.extractfile(member)
            assert content is not None  # it is a regular file
            sample |= {"__key__": key, "__url__": url, suffix.lower(): content.read()}
        if any(watched.last):  # tarfile takes an end between two members for the end of the archive
            raise OSError("ends without the mark of a tar's end")
        if sample:
            yield sample


class _Tail:
    """Remembers the last block that was read."""

    def __init__(self, stream: Readable) -> None:
        self.stream, self.last = stream, b"\1"

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        if data:
            self.last = (self.last + data)[-512:]
        return data


def _name(url: str) -> str:
    return PurePosixPath(str(url).split()[-1]).stem
