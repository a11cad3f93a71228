"""Items (not yet read pictures) → shards, manifest and attribution in one folder."""

import hashlib
import logging
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from datamodules.hashing import stable_fraction, stable_hash
from datamodules.pictures import DamagedPictureError
from datamodules.shards import (
    MANIFEST,
    Sample,
    ShardWriter,
    clear,
    existing_manifest,
    is_prepared,
    publish,
    working_folder,
    write_manifest,
)
from switti.errors import UserError

log = logging.getLogger(__name__)
NAMED_SKIPS = 20  # so many are named in the log; the manifest names all


class Item(Protocol):
    """One picture of a source, cheap to list and to send to a worker.

    key: unique, without dots; group: never divided between the splits; kind: what the manifest counts by;
    origin: the name a person knows it by; build(size): reads or renders it, DamagedPictureError if it cannot.
    """

    @property
    def key(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def origin(self) -> str: ...
    def digest_text(self) -> str: ...
    def build(self, size: int) -> Sample: ...


@dataclass(frozen=True)
class Skipped:
    """A picture left out, and why."""

    what: str
    why: str


@dataclass
class Listing:
    """What a source holds: items, what was skipped while listing, settings that name it, its attribution."""

    items: Sequence[Item]
    settings: dict[str, Any]
    skipped: list[Skipped] = field(default_factory=list)
    attribution: str | None = None


def prepare(
    listing: Listing, out: Path, size: int, validation_fraction: float, shard_size: int, workers: int
) -> dict[str, Any] | None:
    """Write the shards of a listing into `out`; None if they are already there.

    Args:
        size: side (emoji) or shorter side (pictures) in px; 0 keeps a picture's bytes.
        validation_fraction: expected share of groups in the validation split, in [0, 1).

    Raises:
        UserError: nothing to write, or `out` holds something else. Nothing has been written then.
    """
    if not listing.items:
        raise UserError(
            f"no picture with a caption in {listing.settings['source']}{_first_reason(listing.skipped)}"
        )
    settings = listing.settings | {
        "size": size,
        "validation_fraction": validation_fraction,
        "shard_size": shard_size,
        "source_digest": _digest(listing.items),
    }
    if is_prepared(out, settings):
        return None
    with working_folder(out) as work:
        left_over = existing_manifest(work)
        if left_over is not None and left_over["settings"] == settings:
            log.info("finishing the interrupted publication of %s", out)
            manifest = left_over
        else:
            clear(work)
            manifest = _write_all(listing, settings, work, workers)
            write_manifest(work, manifest)
        publish(out)
    return manifest


def _write_all(listing: Listing, settings: dict[str, Any], work: Path, workers: int) -> dict[str, Any]:
    fraction, shard_size = settings["validation_fraction"], settings["shard_size"]
    writers = {split: ShardWriter(work, split, shard_size) for split in ("train", "validation")}
    skipped = list(listing.skipped)
    # In the order of a hash of the key: neighbours in a shard are then unrelated, and shuffling in windows of a
    # few shards during training is a fair shuffle.
    items = sorted(listing.items, key=lambda item: (stable_hash(item.key), item.key))
    with _mapping(workers) as mapping:
        built = mapping(partial(_build, size=settings["size"]), items)
        for item, result in zip(
            items, tqdm(built, total=len(items), unit="picture", smoothing=0.1), strict=True
        ):
            if isinstance(result, str):
                skipped.append(Skipped(item.origin, result))
                continue
            split = "validation" if stable_fraction(f"split/{item.group}") < fraction else "train"
            writers[split].write(result, item.kind)
    for writer in writers.values():
        writer.close()
    _report(skipped)
    shards = [row for writer in writers.values() for row in writer.shards]
    if not any(row["split"] == "train" for row in shards):
        raise UserError(
            f"no usable picture for the training split{_first_reason(skipped)}; nothing was written"
        )
    if listing.attribution:
        (work / "ATTRIBUTION.md").write_text(listing.attribution, encoding="utf-8")
    return {
        "format": 1,
        "settings": settings,
        "counts": {split: dict(sorted(writer.kinds.items())) for split, writer in writers.items()},
        "samples": {split: sum(writer.kinds.values()) for split, writer in writers.items()},
        "shards": shards,
        "skipped": [{"what": s.what, "why": s.why} for s in sorted(skipped, key=lambda s: (s.what, s.why))],
    }


def _build(item: Item, size: int) -> Sample | str:
    try:
        return item.build(size)
    except DamagedPictureError as error:
        return str(error)


@contextmanager
def _mapping(workers: int) -> Iterator[Callable[..., Iterable[Sample | str]]]:
    """An order-keeping map: in this process, or in so many others."""
    if workers <= 1:
        yield map
        return
    with multiprocessing.Pool(workers, initializer=_leave_interrupts_to_parent) as pool:
        yield partial(pool.imap, chunksize=16)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _digest(items: Sequence[Item]) -> str:
    total = hashlib.sha256()
    for line in sorted(item.digest_text() for item in items):
        total.update(line.encode() + b"\n")
    return total.hexdigest()


def _first_reason(skipped: Sequence[Skipped]) -> str:
    if not skipped:
        return ""
    return f" ({len(skipped)} skipped; the first: {skipped[0].what}: {skipped[0].why})"


def _report(skipped: Sequence[Skipped]) -> None:
    for entry in skipped[:NAMED_SKIPS]:
        log.warning("skipped %s: %s", entry.what, entry.why)
    if len(skipped) > NAMED_SKIPS:
        log.warning("… and %d more, all named in %s", len(skipped) - NAMED_SKIPS, MANIFEST)
