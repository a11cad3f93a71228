"""Shards that can only be read from front to back (`pipe:…`, `http(s)://…`), resampled.

Every worker of every rank draws shards with replacement and shuffles what it reads in a buffer. There are no epochs
and no exact resume: a resumed run continues with other samples. A sample may bring its text embedding as the entry
`<key>.text.safetensors` (`experiments.embed --into`); the captions of others are encoded in the training process.

A stream that fails is opened again after 1, 2, 4, … s (at most a minute), and continues after the last sample that it
gave. When `data.stream_retries` attempts in a row bring nothing new, the shard is abandoned until it is drawn again.
"""

import http.client
import random
import time
from collections.abc import Iterator
from pathlib import PurePosixPath

from braceexpand import braceexpand
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.images import BadImageError
from datamodules.shards.bad_samples import BadSample, Fatal
from datamodules.shards.byte_streams import opened
from datamodules.shards.embedding_file import EncoderIdentity, ForeignEmbeddingError, read_entry
from datamodules.shards.members import CAPTION, EMBEDDING, IMAGE, META, decode_caption
from datamodules.shards.samples import Framing, Sample, make_sample
from datamodules.shards.stream_samples import StoredSample, stored_samples
from datamodules.shards.tar import StreamSource
from datamodules.stable_seeds import sample_seed, stable_hash
from switti.errors import UserError

SHUFFLE_BUFFER = 1000  # samples
SHUFFLE_BYTES = 1 << 30  # of them together
# Unreadable samples in a row after which the stream counts as something other than images with captions.
FOREIGN_LIMIT = 10_000
# Failed shards in a row after which the source itself counts as failed.
MAX_FAILED_SHARDS = 3
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
BROKEN = (OSError, ValueError, EOFError, http.client.HTTPException)


class StreamSet(IterableDataset[Sample | BadSample]):
    """Endless samples of resampled streams.

    start: samples consumed so far, so that a resumed run draws other samples. identity: of the run's text encoder,
    which embeddings in the shards must carry; None: they are not read.

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
        identity: EncoderIdentity | None = None,
    ) -> None:
        try:
            self.urls = [url for pattern in patterns for url in braceexpand(pattern, escape=False)]
        except ValueError as error:
            raise UserError(f"data.train={patterns}: {error}") from error
        self.framing, self.seed, self.start, self.rank = framing, seed, start, rank
        self.timeout, self.retries, self.identity = timeout, retries, identity

    def __iter__(self) -> Iterator[Sample | BadSample]:
        """What could not be read goes along with the next good sample, so that batches keep their size."""
        worker = get_worker_info()
        # Each worker of each rank draws from its own seed, so the streams need not be split among them.
        own = stable_hash(f"{self.seed}/{self.start}/{self.rank}/{worker.id if worker else 0}")
        bad: list[BadSample] = []
        stored = self._stored(random.Random(own + 1), bad)
        useless = 0
        try:
            for number, content in enumerate(shuffled(stored, random.Random(own))):
                sample = self._sample(content, self.start + number)
                if isinstance(sample, Sample):
                    sample.replaced, bad[:] = list(bad), []
                    useless = 0
                    yield sample
                    continue
                bad.append(sample)
                useless += 1
                if useless >= FOREIGN_LIMIT:
                    raise ValueError(f"no images with a .txt caption: {sample.key}: {sample.reason}")
        except ForeignEmbeddingError as error:
            yield Fatal("data.train", "data.train", f"data.train: {error}", "missing_embedding")
        except BROKEN as error:
            names = ", ".join(self.urls)
            reason = f"stream failed: {names}: {' '.join(str(error).split())}"
            yield Fatal(names, names, reason, "failed_stream")

    def first(self, count: int) -> list[Sample]:
        """The first `count` good samples of the shards in order. Raises UserError if a stream fails before."""
        good: list[Sample] = []
        try:
            for url in self.urls:
                for found in self._shard(url, []):
                    sample = self._sample(found, 0) if isinstance(found, StoredSample) else found
                    good += [sample] if isinstance(sample, Sample) else []
                    if len(good) == count:
                        return good
        except BROKEN as error:
            raise UserError(f"data.train: stream failed: {' '.join(str(error).split())}") from error
        return good

    def _stored(self, draw: random.Random, bad: list[BadSample]) -> Iterator[StoredSample]:
        """Samples of one drawn shard after another. Raises the last reason when one after another fails."""
        given_up = useless = 0
        while True:
            url = draw.choice(self.urls)
            try:
                for found in self._shard(url, bad):
                    given_up = 0
                    if isinstance(found, StoredSample):
                        useless = 0
                        yield found
                        continue
                    bad.append(found)
                    useless += 1
                    if useless >= FOREIGN_LIMIT:
                        break
            except BROKEN as error:
                given_up += 1
                if given_up >= min(MAX_FAILED_SHARDS, len(self.urls)):
                    raise
                bad.append(BadSample(name_of(url), url, str(error), "failed_stream"))
            if useless >= FOREIGN_LIMIT:
                raise ValueError(f"no images with a .txt caption: {bad[-1].key}: {bad[-1].reason}")

    def _shard(self, url: str, bad: list[BadSample]) -> Iterator[StoredSample | BadSample]:
        """What one shard holds, each once, with as many attempts as it takes; the last error if that does not help."""
        done = failed = 0
        while True:
            try:
                with opened(url, self.timeout) as stream:
                    for number, found in enumerate(stored_samples(StreamSource(stream), name_of(url))):
                        if number >= done:
                            done, failed = done + 1, 0
                            yield found
                return
            except BROKEN as error:
                failed += 1
                if failed > self.retries:
                    raise
                bad.append(BadSample(name_of(url), url, str(error), "stream_retry", samples=0))
                time.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (failed - 1)))

    def _sample(self, stored: StoredSample, number: int) -> Sample | BadSample:
        """Raises ForeignEmbeddingError for an embedding of another encoder."""
        contents, key = stored.contents, f"{stored.shard}/{stored.key}"
        seed = sample_seed(self.seed, number, key)
        caption, meta = contents[CAPTION], contents.get(META)
        try:
            sample = make_sample(contents[IMAGE], decode_caption(caption), meta, key, seed, self.framing)
        except BadImageError as error:
            return BadSample(stored.shard, key, str(error))
        entry = contents.get(EMBEDDING)
        if self.identity is None or entry is None or sample.variant:
            # The entry is of the stored caption; another one is encoded in the training process.
            return sample
        try:
            sample.text = read_entry(entry, caption, self.identity)
        except ForeignEmbeddingError as error:
            raise ForeignEmbeddingError(f"{key} {error}") from None
        except ValueError as error:
            return BadSample(stored.shard, key, str(error), "missing_embedding")
        return sample


def shuffled(samples: Iterator[StoredSample], draw: random.Random) -> Iterator[StoredSample]:
    """Samples in the order in which they are drawn from a buffer that grows while it yields.

    It begins to yield at a tenth of its length, and holds SHUFFLE_BYTES at the most (but at least one sample).
    """
    buffer: list[StoredSample] = []
    held = 0
    for sample in samples:
        buffer.append(sample)
        held += sample.size
        if len(buffer) < SHUFFLE_BUFFER and held < SHUFFLE_BYTES and (further := next(samples, None)):
            buffer.append(further)
            held += further.size
        while buffer and (len(buffer) >= SHUFFLE_BUFFER // 10 or held >= SHUFFLE_BYTES):
            held -= (drawn := _take(buffer, draw)).size
            yield drawn
            if held < SHUFFLE_BYTES:
                break
    while buffer:
        yield _take(buffer, draw)


def _take(buffer: list[StoredSample], draw: random.Random) -> StoredSample:
    place = draw.randrange(len(buffer))
    buffer[place], buffer[-1] = buffer[-1], buffer[place]
    return buffer.pop()


def name_of(url: str) -> str:
    """A stream's name in keys: the stem of its last word."""
    return PurePosixPath(url.split()[-1]).stem
