"""Shard discovery: the readable shards of a split, and reports of missing or corrupt ones."""

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datamodules.shards.bad_samples import BadSample, Kind
from datamodules.shards.index import ShardIndex, absent_shard, load_index, with_rows
from datamodules.shards.shard_paths import expand, unique_names
from switti.errors import UserError

log = logging.getLogger(__name__)

NAMED = 10


@dataclass
class ShardSet:
    """Shards in the order of their numbers, and losses: samples that are in none of them."""

    shards: list[ShardIndex]
    losses: list[BadSample]

    @property
    def listing(self) -> list[list[Any]]:
        """[name, samples] of each shard: what the order of samples depends on."""
        names = unique_names([shard.path for shard in self.shards])
        return [[name, len(shard)] for name, shard in zip(names, self.shards, strict=True)]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that are the same for the same samples in the same order, wherever the files are.

        From the indices alone, so quick for any amount of data: keys, the sizes of all members, the captions. Images
        that were made again differently without changing the size of a single file would be missed.
        """
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update("\0".join(shard.keys).encode())
            for column in (shard.sizes_N3, shard.digests_N32):
                digest.update(column.tobytes())
        return digest.hexdigest()[:16]


def find_shards(setting: str, patterns: list[str], limit: float) -> ShardSet:
    """Index all shards; skip those that cannot be read, and samples without image or caption.

    The number of samples in a shard without an index is unknown: it counts as the average of the others, and a
    truncated shard as what it lacks of that average, at least one.

    Args:
        setting: e.g. "data.train". limit: data.max_bad_fraction, the share of samples that may be lost.

    Raises:
        UserError: more is lost, with a list; or there is no shard at all.
    """
    shards: list[ShardIndex] = []
    losses: list[BadSample] = []
    for path in expand(setting, patterns, must_exist=False):
        found = _index(path)
        if isinstance(found, BadSample):
            losses.append(found)
        else:
            shards.append(found)
            losses += _losses(found)
    average = round(sum(map(len, shards)) / len(shards)) if shards else 1
    known = {shard.path.stem: len(shard) for shard in shards}
    losses = [
        replace(loss, samples=max(1, average - known.get(loss.shard, 0))) if loss.samples == 0 else loss
        for loss in losses
    ]
    lost, total = sum(loss.samples for loss in losses), sum(map(len, shards))
    reasons = "; ".join(loss.reason for loss in losses[:NAMED])
    more = f"; and {len(losses) - NAMED} more" if len(losses) > NAMED else ""
    if lost and (not shards or lost > limit * (lost + total)):
        share = f" (about {lost} of {lost + total} samples, more than data.max_bad_fraction={limit})"
        raise UserError(f"{setting}: {reasons}{more}{share if shards else ''}; make or fetch it again")
    if lost:
        log.warning(
            "%s: going without about %d of %d samples: %s%s", setting, lost, lost + total, reasons, more
        )
    return ShardSet(shards, losses)


def _index(path: Path) -> ShardIndex | BadSample:
    kind: Kind = "unreadable_shard"
    try:
        return load_index(path, salvage=True)
    except FileNotFoundError:
        kind, reason = "missing_shard", f"no shard {path}"
    except OSError as error:
        reason = f"shard {path} cannot be read ({error.strerror or error})"
    except UserError as error:
        reason = str(error)
    return BadSample(path.stem, str(path), reason, kind, samples=0)


def _losses(shard: ShardIndex) -> list[BadSample]:
    cut_off = BadSample(shard.path.stem, str(shard.path), shard.problem, "truncated_shard", 0)
    return [*shard.losses, cut_off] if shard.problem else [*shard.losses]


def as_before(found: ShardSet, listing: list[list[Any]]) -> ShardSet:
    """The shards of a run as they were when it began, with `listing`: the same numbers of samples in the same order.

    Shards that have gone since then stay in the order and fail when read. Shards added since then are skipped.
    """
    names = [name for name, _ in found.listing]
    present = dict(zip(names, found.shards, strict=True))
    folder = found.shards[0].path.parent
    shards = []
    for name, samples in listing:
        if name not in present:
            log.warning(
                "data.train: shard %s has gone since the run began; other samples replace its own", name
            )
            shards.append(absent_shard(folder / f"{name}.tar", samples))
            continue
        shard = present.pop(name)
        if len(shard) != samples:
            log.warning(
                "data.train: shard %s had %d samples when the run began and has %d now; it keeps %d places",
                shard.path, samples, len(shard), samples,
            )  # fmt: skip
            shard = with_rows(shard, samples)
        shards.append(shard)
    if present:
        log.warning(
            "data.train: %d shards (%s, …) were added after the run began and are skipped; a new run uses them",
            len(present), next(iter(present)),
        )  # fmt: skip
    return ShardSet(shards, found.losses)
