"""Shards that can only be read from front to back (`pipe:…`, `http(s)://…`): webdataset's pipeline, resampled.

Every worker of every rank draws shards with replacement and shuffles what it reads in a buffer. There are no epochs
and no exact resume: a resumed run goes on with other samples.
"""

import random
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import webdataset as wds
from braceexpand import braceexpand
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.hashing import sample_seed, stable_hash
from datamodules.pictures import SUFFIXES, DamagedPictureError
from datamodules.samples import Damage, Framing, Sample, make_sample
from switti.errors import UserError

SHUFFLE_BUFFER = 1000
FOREIGN_LIMIT = (
    10_000  # so many samples in a row without picture and caption: the stream holds something else
)


class StreamFailed(Damage):
    """A stream that broke off; unlike a damaged picture it ends the run."""


class StreamSet(IterableDataset[Sample | Damage]):
    """Endless samples of resampled streams. `start`: samples consumed so far, so that a resumed run draws anew.

    Raises:
        UserError: a pattern has unbalanced braces.
    """

    def __init__(self, patterns: list[str], framing: Framing, seed: int, start: int, rank: int) -> None:
        try:
            self.urls = [url for pattern in patterns for url in braceexpand(pattern, escape=False)]
        except ValueError as error:
            raise UserError(f"data.train={patterns}: {error}") from error
        self.framing, self.seed, self.start, self.rank = framing, seed, start, rank

    def __iter__(self) -> Iterator[Sample | Damage]:
        names = ", ".join(self.urls)
        foreign = 0
        try:
            for number, content in enumerate(self._pipeline()):
                sample = self._sample(content, self.start + number)
                foreign = foreign + 1 if sample is None else 0
                if foreign >= FOREIGN_LIMIT:
                    raise ValueError("no pictures with a .txt caption")
                if sample is not None:
                    yield sample
        except (OSError, tarfile.TarError, ValueError, EOFError) as error:
            yield StreamFailed(names, names, " ".join(str(error).split()))

    def _pipeline(self) -> Any:
        """Each worker of each rank draws from its own seed, so the streams need not be split among them."""
        worker = get_worker_info()
        own = stable_hash(f"{self.seed}/{self.start}/{self.rank}/{worker.id if worker else 0}")
        return wds.DataPipeline(
            wds.ResampledShards(self.urls, seed=own, worker_seed=int, deterministic=True),
            wds.tarfile_to_samples(),
            wds.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER // 10, rng=random.Random(own)),
        )

    def _sample(self, content: dict[str, Any], number: int) -> Sample | Damage | None:
        suffix = next((s for s in content if f".{s.lower()}" in SUFFIXES), None)
        if suffix is None or "txt" not in content:
            return None
        shard = PurePosixPath(str(content["__url__"]).split()[-1]).stem
        key = f"{shard}/{content['__key__']}"
        caption = content["txt"].decode(errors="replace").strip()
        seed = sample_seed(self.seed, number, key)
        try:
            return make_sample(content[suffix], caption, content.get("json"), key, seed, self.framing)
        except DamagedPictureError as error:
            return Damage(shard, key, str(error))
