"""Preflight check of the data that runs need: shards and embeddings.

Reads manifests, file sizes and headers: no torch, no network, and nothing that grows with the size of the data
but a look at each shard's entry in its folder.
"""

import os
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from configs.schema import RunConfig
from datamodules.config import SHARDS, STREAMS, as_list
from switti.errors import UserError
from switti.files import kind_of, open_regular, read_json_object
from switti.suggestions import shortened
from switti.text.config import TextConfig
from switti.weights.tokenizer_file import read_header

# Of shards and of embeddings.
MANIFEST = "manifest.json"
_NULL = "null.safetensors"
# Shards of a split whose first bytes are read; all of them are counted.
_OPENED = 64
# Shards in one message.
_NAMED = 3
# Bytes of a tar header.
_BLOCK = 512


def problems_of(check: Callable[[], Any]) -> list[str]:
    """The message of the error that a check ends with, if any."""
    try:
        check()
    except UserError as error:
        return [str(error)]
    except OSError as error:
        return [f"{error.filename}: {error.strerror}"]
    return []


def data_problems(config: RunConfig) -> list[str]:
    """Shards of both splits, and embeddings of those that are there. Datasets of the user's own are not opened."""
    if config.data.source != SHARDS:
        return []
    problems: list[str] = []
    shards: list[Path] = []
    for split in ("train", "validation"):
        present, wrong = _shards(
            f"data.{split}", as_list(getattr(config.data, split)), config.data.max_bad_fraction
        )
        shards += present
        problems += wrong
    return problems + (_embeddings(config, shards) if config.task == "generator" else [])


def _shards(setting: str, patterns: list[str], limit: float) -> tuple[list[Path], list[str]]:
    """(shards that are there, what is wrong)."""
    from datamodules.shards.shard_paths import expand

    if any(pattern.startswith(STREAMS) for pattern in patterns):
        # A stream is known only once it is read.
        return [], []
    try:
        paths = expand(setting, patterns, must_exist=False)
    except UserError as error:
        return [], [str(error)]
    manifests = {folder: _manifest_of(folder) for folder in {path.parent for path in paths}}
    losses = {path: _loss(path, manifests[path.parent].get(path.name)) for path in paths}
    readable = [path for path in paths if losses[path] is None]
    losses |= {path: _Loss(reason) for path in _some(readable) if (reason := _tar_problem(path))}
    lost = [loss for loss in losses.values() if loss is not None]
    present = [path for path in paths if (loss := losses[path]) is None or loss.share < 1]
    if present and sum(loss.share for loss in lost) <= limit * len(paths):
        return present, []
    reasons = "; ".join(loss.reason for loss in lost[:_NAMED])
    more = f"; and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
    share = f" ({len(lost)} of {len(paths)} shards, more than data.max_bad_fraction={limit})"
    return present, [f"{setting}: {reasons}{more}{share if present else ''}; make or fetch it again"]


@dataclass(frozen=True)
class _Loss:
    """What is lost of a shard, and why. share: of its samples, about."""

    reason: str
    share: float = 1.0


def _manifest_of(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Name → row of each shard of a prepared folder; {} of any other."""
    try:
        rows = read_json_object(folder / MANIFEST).get("shards", [])
    except (UserError, OSError):
        # Somebody else's file of that name.
        return {}
    return {row["name"]: row for row in rows if isinstance(row, dict) and isinstance(row.get("name"), str)}


def _loss(path: Path, row: Mapping[str, Any] | None) -> _Loss | None:
    """By its entry in the folder; None if the shard looks complete. row: of the folder's manifest."""
    kind = kind_of(path)
    if kind != "file":
        return _Loss(f"no shard {path}" if kind is None else f"{path} is a {kind}, not a shard")
    if not os.access(path, os.R_OK):
        return _Loss(f"{path} may not be read (its permissions)")
    size, wanted = os.path.getsize(path), (row or {}).get("bytes")
    if size < _BLOCK:
        return _Loss(f"{path} is empty")
    if _is_count(wanted) and size < wanted:
        return _Loss(f"{path} is cut off: {size} of {wanted} bytes", 1 - size / wanted)
    return None


def _tar_problem(path: Path) -> str:
    try:
        with open_regular(path) as stream:
            tarfile.TarInfo.frombuf(stream.read(_BLOCK), "utf-8", "surrogateescape")
    except (tarfile.TarError, OSError, UserError) as error:
        return f"{path} is not an uncompressed tar ({error})"
    return ""


def _some(paths: list[Path]) -> list[Path]:
    """A few, evenly spread."""
    step = max(1, -(-len(paths) // _OPENED))
    return paths[::step]


# ---- embeddings ---------------------------------------------------------------------------------------------------

# Of a store's manifest → of the text settings.
_IDENTITY = {"name": "encoder", "width": "width", "pooled_width": "pooled_width", "max_length": "max_length"}


def _embeddings(config: RunConfig, shards: list[Path]) -> list[str]:
    """Stores of the run's encoder, with a file for each shard."""
    folders = [Path(folder) for folder in as_list(config.data.embeddings)]
    stores: list[Path] = []
    problems: list[str] = []
    for folder in folders:
        try:
            stores.append(_store(folder, config.text))
        except UserError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"data.embeddings={shortened(folder)}: {error.strerror}")
    if problems or not folders:
        return problems
    lacking = [store / _NULL for store in stores[:1] if not (store / _NULL).is_file()]
    sides = {shard: side for shard in shards if (side := _side_file(shard, stores)) is not None}
    if lacking or len(sides) < len(shards):
        lacking += [shard for shard in shards if shard not in sides]
        return [
            f"data.embeddings: {len(lacking)} files are missing in {stores[0]} (first: that of {lacking[0].stem}); run "
            "experiments.embed again"
        ]
    if config.data.captions == "drawn":
        # Only the training split draws; its stores must list further captions.
        for store in sorted({side.parent for side in sides.values()}):
            if not isinstance(read_json_object(store / MANIFEST).get("variants"), dict):
                return [
                    f"data.captions=drawn: {store} holds the first caption of each sample alone; run experiments.embed "
                    "again --all-captions, or set data.captions=first"
                ]
    damaged = [
        problem for shard in _some(shards) for problem in problems_of(partial(read_header, sides[shard]))
    ]
    return [f"{problem}; run experiments.embed again" for problem in damaged[:_NAMED]] or _other_counts(
        config, sides
    )


def _store(folder: Path, text: TextConfig) -> Path:
    """The finished store of the run's encoder that `folder` is, or holds. UserError if there is none."""
    stores = (
        [folder]
        if os.path.exists(folder / MANIFEST)
        else sorted(p.parent for p in folder.glob(f"*/{MANIFEST}"))
    )
    if not stores:
        raise UserError(
            f"data.embeddings={folder} holds no finished embeddings; make them with experiments.embed"
        )
    differences = []
    for store in stores:
        manifest = read_json_object(store / MANIFEST)
        different = [name for name, mine in _IDENTITY.items() if manifest.get(name) != getattr(text, mine)]
        if not different:
            return store
        differences += [
            f"{store.name} has {_IDENTITY[name]}={manifest.get(name)}, the run text.{_IDENTITY[name]}="
            f"{getattr(text, _IDENTITY[name])}"
            for name in different
        ]
    raise UserError(
        f"data.embeddings={folder} was made by another text encoder ({'; '.join(differences)}): run experiments.embed "
        "with the run's text settings, or change text.*"
    )


def _side_file(shard: Path, stores: Iterable[Path]) -> Path | None:
    """The shard's embeddings; with several stores the one beside the shard wins."""
    ordered = sorted(stores, key=lambda store: shard.absolute().parent not in store.absolute().parents)
    return next((path for store in ordered if (path := store / f"{shard.stem}.safetensors").is_file()), None)


def _other_counts(config: RunConfig, sides: Mapping[Path, Path]) -> list[str]:
    """Shards of which the manifests count more samples than embeddings, beyond what may be missing."""
    prepared = {folder: _manifest_of(folder) for folder in {shard.parent for shard in sides}}
    embedded = {store: _counts_of(store) for store in {side.parent for side in sides.values()}}
    pairs = [
        (
            shard,
            prepared[shard.parent].get(shard.name, {}).get("samples"),
            embedded[side.parent].get(shard.stem),
        )
        for shard, side in sides.items()
    ]
    known = [
        (shard, samples, texts) for shard, samples, texts in pairs if _is_count(samples) and _is_count(texts)
    ]
    fewer = [(shard, samples, texts) for shard, samples, texts in known if texts < samples]
    lost = sum(samples - texts for _, samples, texts in fewer)
    if lost <= config.data.max_bad_fraction * sum(samples for _, samples, _ in known):
        return []
    shard, samples, texts = fewer[0]
    return [
        f"{shard} has {samples} samples, its embeddings were made from {texts}; run experiments.embed again"
    ]


def _counts_of(store: Path) -> Mapping[str, Any]:
    counts = read_json_object(store / MANIFEST).get("samples")
    return counts if isinstance(counts, dict) else {}


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
