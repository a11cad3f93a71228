"""Items (not yet read images) → shards, manifest, attribution and a list of what was skipped, in one folder."""

import csv
import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from datamodules.images import BadImageError
from datamodules.prepare.processes import ordered_map
from datamodules.prepare.splits import TRAIN, Assigned, Splits
from datamodules.prepare.writer import (
    ATTRIBUTION,
    SKIPPED,
    PreparedSample,
    ShardWriter,
    check_out,
    clear,
    existing_manifest,
    is_prepared,
    publish,
    working_folder,
    write_manifest,
)
from datamodules.stable_seeds import stable_hash
from switti.errors import UserError
from switti.files import writing

log = logging.getLogger(__name__)
# Examples of each reason in the log; SKIPPED lists all.
EXAMPLES = 3
# What spreadsheet programs take for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Item(Assigned, Protocol):
    """One image of a source, cheap to list and to send to a worker.

    key: unique, without dots; group: never divided between training and unseen concepts; concept: what it shows, in
    whatever style; kind: its style, which the manifest counts by; origin: the name a person knows it by; build(size):
    reads or renders it, BadImageError if it cannot.
    """

    @property
    def origin(self) -> str: ...
    def digest_text(self) -> str: ...
    def build(self, size: int) -> PreparedSample: ...


@dataclass(frozen=True)
class Skipped:
    """A skipped image. why: "reason: details", counted by the reason; where: its row in a table, "" without one."""

    what: str
    why: str
    where: str = ""

    @property
    def reason(self) -> str:
        return self.why.partition(": ")[0]

    def __str__(self) -> str:
        return f"{self.what} ({self.where})" if self.where else self.what


@dataclass
class Listing:
    """What a source holds: items, what was skipped while listing, settings that name it, its attribution.

    notes: how often something was changed that a person may want to know. styles: facts about further styles, for the
    manifest. notices: further files of attribution, name → text.
    """

    items: Sequence[Item]
    settings: dict[str, Any]
    skipped: list[Skipped] = field(default_factory=list)
    attribution: str | None = None
    notes: dict[str, int] = field(default_factory=dict)
    styles: dict[str, dict[str, Any]] = field(default_factory=dict)
    notices: dict[str, str] = field(default_factory=dict)


def prepare(
    listing: Listing,
    out: Path,
    size: int,
    validation_fraction: float,
    shard_size: int,
    workers: int,
    pair_fraction: float = 0.0,
) -> dict[str, Any] | None:
    """Write the shards of a listing into `out`; its manifest, or None if they are already there.

    Args:
        size: side (emoji) or shorter side (images) in px; 0 keeps an image's bytes.
        validation_fraction: expected share of groups in the validation split, in [0, 1).
        pair_fraction: expected share of the other (concept, style) pairs that are held out, in [0, 1). With it there
            are two validation splits, `validation-concepts-*.tar` and `validation-pairs-*.tar`.

    Raises:
        UserError: nothing to write, `out` holds something else or cannot be written, or a worker process died. Nothing
            has been written then.
    """
    check_out(out)
    if not listing.items:
        raise UserError(f"no image with a caption in {listing.settings['source']}{_reasons(listing.skipped)}")
    settings = (
        listing.settings
        | {
            "size": size,
            "validation_fraction": validation_fraction,
            "shard_size": shard_size,
            "source_digest": _digest(listing.items),
        }
        | ({"pair_fraction": pair_fraction} if pair_fraction else {})
    )
    if is_prepared(out, settings):
        return None
    with working_folder(out) as work:
        if is_prepared(out, settings):  # by another process, a moment ago
            work.rmdir()
            return None
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
    splits = Splits(settings["validation_fraction"], settings.get("pair_fraction", 0.0))
    writers = {split: ShardWriter(work, split, settings["shard_size"]) for split in splits.names}
    skipped = list(listing.skipped)
    # In the order of a hash of the key: neighbours in a shard are then unrelated, and shuffling in windows of a
    # few shards during training is a fair shuffle. Held-out pairs come last, when it is known what training has.
    items = sorted(
        listing.items, key=lambda item: (splits.may_hold_out(item), stable_hash(item.key), item.key)
    )
    built = ordered_map(partial(_build, size=settings["size"]), items, workers)
    for item, result in zip(items, tqdm(built, total=len(items), unit="image", smoothing=0.1), strict=True):
        if isinstance(result, str):
            skipped.append(Skipped(item.origin, result))
        else:
            writers[splits.assign(item)].write(result, item.kind)
    for writer in writers.values():
        writer.close()
    skipped.sort(key=lambda entry: (entry.what, entry.why, entry.where))
    notes = listing.notes | splits.notes
    _report(skipped, notes)
    shards = [row for writer in writers.values() for row in writer.shards]
    present = {row["split"] for row in shards}
    if TRAIN not in present:
        raise UserError(f"no usable image for the training split{_reasons(skipped)}; nothing was written")
    for split, option in splits.options.items():
        if split not in present:
            log.warning("no image fell to the %s split: give a larger %s", split, option)
    notices = listing.notices | ({ATTRIBUTION: listing.attribution} if listing.attribution else {})
    for name, text in notices.items():
        with writing(work / name):
            (work / name).write_text(text, encoding="utf-8")
    if skipped:
        _write_skipped(work / SKIPPED, skipped)
    manifest = {
        "format": 1,
        "settings": settings,
        "counts": {split: dict(sorted(writer.kinds.items())) for split, writer in writers.items()},
        "samples": {split: sum(writer.kinds.values()) for split, writer in writers.items()},
        "shards": shards,
        "skipped": dict(Counter(entry.reason for entry in skipped).most_common()),
        "notes": notes,
    }
    return manifest | ({"styles": listing.styles} if listing.styles else {})


def _write_skipped(path: Path, skipped: Sequence[Skipped]) -> None:
    with writing(path), path.open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["file", "row", "reason", "details"])
        for entry in skipped:
            name = f"'{entry.what}" if entry.what.startswith(_FORMULA) else entry.what
            table.writerow([name, entry.where, *entry.why.partition(": ")[::2]])


def _build(item: Item, size: int) -> PreparedSample | str:
    try:
        return item.build(size)
    except BadImageError as error:
        return str(error)
    except MemoryError:
        return "not enough memory for it"


def _digest(items: Sequence[Item]) -> str:
    total = hashlib.sha256()
    for line in sorted(item.digest_text() for item in items):
        total.update(line.encode() + b"\n")
    return total.hexdigest()


def _by_reason(skipped: Iterable[Skipped]) -> list[tuple[str, list[Skipped]]]:
    """(reason, its entries), the most frequent reason first."""
    found: dict[str, list[Skipped]] = {}
    for entry in skipped:
        found.setdefault(entry.reason, []).append(entry)
    return sorted(found.items(), key=lambda pair: (-len(pair[1]), pair[0]))


def _reasons(skipped: Sequence[Skipped]) -> str:
    """For an error: how many were skipped for what, and the details of one."""
    if not skipped:
        return ""
    counts = ", ".join(f"{len(entries)} × {reason}" for reason, entries in _by_reason(skipped))
    first = _by_reason(skipped)[0][1][0]
    return f" ({counts}; the first: {_short(str(first))}: {first.why})"


def _short(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:40]}…{name[-39:]}"


def _report(skipped: Sequence[Skipped], notes: dict[str, int]) -> None:
    for what, count in notes.items():
        log.warning("%s: %d", what, count)
    for reason, entries in _by_reason(skipped):
        details = entries[0].why.partition(": ")[2]
        names = ", ".join(map(_short, map(str, entries[:EXAMPLES])))
        log.warning(
            "skipped %d × %s%s: %s%s",
            len(entries), reason, f" ({details})" if details else "", names, ", …" if len(entries) > EXAMPLES else "",
        )  # fmt: skip
