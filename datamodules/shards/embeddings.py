"""Precomputed caption embeddings: side files of the shards, joined by key.

A store is the folder `<encoder>-<fingerprint[:12]>/` with one side file a shard, `null.safetensors` for the empty
caption and, written last, `manifest.json`: {"format": 2, "name", "fingerprint", "width", "pooled_width", "max_length",
"samples": {stem: captions}, "heads": {stem: SHA-256 of a side file without its embeddings}}. Format 1 has no heads.

A store of all captions has also `<shard>.variants.safetensors`, with keys `<key>\\n<number of the caption>`, for shards
whose samples have several, and "variants": {stem: captions in that file} in the manifest.

Shape suffixes: N captions of a shard, t real tokens of one, T token positions (padded), C, P channels.
"""

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.shards.embedding_file import EncoderIdentity, SideFile, Text
from datamodules.shards.index import ShardIndex
from datamodules.shards.open_files import OpenFiles, is_machine_fault
from switti.errors import UserError
from switti.files import read_json_object, write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
NULL = "null.safetensors"
VARIANTS = ".variants"
FORMAT = 2
AGAIN = "run experiments.embed again"


def write_manifest(
    store: Path,
    identity: EncoderIdentity,
    samples: dict[str, int],
    heads: dict[str, str],
    variants: dict[str, int] | None = None,
) -> None:
    """Mark a store as complete, unless it is marked so already.

    By the shards' stems, `samples` counts captions, `variants` further ones (None: not embedded), and `heads` are of
    the side files.
    """
    content: dict[str, Any] = {"format": FORMAT, **vars(identity), "samples": samples, "heads": heads}
    if variants is not None:
        content["variants"] = variants
    if listed(store) != content:
        write_json(store / MANIFEST, content)


def listed(store: Path) -> dict[str, Any]:
    """What the manifest says; {} where there is none that can be read."""
    try:
        return read_json_object(store / MANIFEST)
    except (OSError, UserError):
        return {}


def variant_keys(key: str, count: int) -> list[str]:
    """Keys of a sample's further captions in a side file."""
    return [f"{key}\n{number}" for number in range(1, count + 1)]


def variants_path(store: Path, stem: str) -> Path:
    """The side file of a shard's further captions."""
    return store / f"{stem}{VARIANTS}.safetensors"


def is_whole(path: Path, index: ShardIndex, identity: EncoderIdentity) -> bool:
    """Whether a shard's side file is there, made from these captions by this encoder, and intact."""
    try:
        side = SideFile(path, identity)
        same = side.fingerprint == identity.fingerprint and side.keys == index.keys
        if not same or not np.array_equal(side.digests_N32, index.digests_N32):
            return False
        side.check_rows()
    except (OSError, UserError):
        return False
    return True


class MissingEmbeddingError(Exception):
    """A sample has no embedding, or its embedding cannot be read."""


class EmbeddingStore:
    """The embeddings of a set of shards: checked at once, read lazily (one map a shard and process).

    Args:
        folders: stores, or folders that hold stores (of which the fingerprint decides).
        expected_fingerprint: of the run's text encoder; None accepts any encoder if there is only one store.
        allowed_missing: share of the samples that may have none; reading those is a MissingEmbeddingError.
        variants: further captions of the samples are read, too.

    Raises:
        UserError: no store, one of another encoder, of other captions, or without some shard.
    """

    def __init__(
        self,
        folders: list[str],
        shards: list[ShardIndex],
        expected_fingerprint: str | None,
        allowed_missing: float = 0.0,
        variants: bool = False,
    ) -> None:
        stores = [_choose(Path(folder), expected_fingerprint) for folder in folders]
        self.identity = _identity(stores)
        self.files = OpenFiles()
        heads = {store: _heads(store) for store in stores}
        # A shard of which nothing is left is never asked for an embedding.
        paths = [_side_path(s.path, stores) if len(s) > s.absent else None for s in shards]
        self.sides: list[SideFile | None] = []
        self.rows: list[np.ndarray] = []
        for path, shard in zip(paths, shards, strict=True):
            side = None if path is None else _open(path, self.identity, heads)
            self.rows.append(_matching_rows(side, shard))
            self.sides.append(side)
            if side is not None:
                side.forget()
        _check_missing(paths, shards, self.rows, allowed_missing)
        self.variants: list[Variants | None] = [None] * len(shards)
        if variants:
            self.variants = [
                None if path is None else _open_variants(path, shard, self.identity, heads)
                for path, shard in zip(paths, shards, strict=True)
            ]
        null = _open(stores[0] / NULL, self.identity, heads)
        if null.keys != [""] or null.digests_N32.tobytes() != hashlib.sha256(b"").digest():
            raise UserError(f"{null.path} is not the embedding of the empty caption; {AGAIN}")
        try:
            self.null = null.read(0, self.files)
        except OSError as error:
            raise UserError(str(error)) from error

    def read(self, shard: int, row: int, variant: int = 0, caption: str = "") -> Text:
        """(tokens [t, C] float16, pooled [P] float32) of the sample in a row of a shard.

        variant: of its further captions the one with this number, which must be `caption` ("": it is not compared).

        Raises:
            MissingEmbeddingError: there is none, or it cannot be read.
        """
        place, side = int(self.rows[shard][row]), self.sides[shard]
        if variant and place >= 0:
            place, side = -1, None
            if (further := self.variants[shard]) is not None:
                place, side = further.place(row, variant, caption), further.side
        if place < 0 or side is None:
            raise MissingEmbeddingError(f"{side.path if side else 'the store'} has none of this sample")
        try:
            return side.read(place, self.files)
        except (OSError, UserError) as error:
            if is_machine_fault(error):
                raise
            again = "" if AGAIN in str(error) else f"; {AGAIN}"
            raise MissingEmbeddingError(f"{error}{again}") from error


class Variants:
    """The further captions of one shard's samples.

    Raises:
        UserError: the keys are not those of the shard, one number after another.
    """

    def __init__(self, side: SideFile, shard: ShardIndex) -> None:
        self.side, self.digests_N32 = side, side.digests_N32
        row_of = {key: row for row, key in enumerate(shard.keys)}
        self._first, self._count = np.full(len(shard), -1), np.zeros(len(shard), np.int64)
        for place, name in enumerate(side.keys):
            key, _, number = name.rpartition("\n")
            row = row_of.get(key, -1)
            if row < 0 or number != str(self._count[row] + 1):
                raise UserError(f"{side.path} is not of the samples of {shard.path}; {AGAIN} --all-captions")
            if self._count[row] == 0:
                self._first[row] = place
            elif self._first[row] + self._count[row] != place:
                raise UserError(f"{side.path} is not in the order of the samples; {AGAIN} --all-captions")
            self._count[row] += 1
        side.forget()

    def place(self, row: int, variant: int, caption: str) -> int:
        """Row in the side file; -1 if there is none, or one of another caption."""
        if not 1 <= variant <= self._count[row]:
            return -1
        place = int(self._first[row]) + variant - 1
        digest = hashlib.sha256(caption.encode()).digest()
        return place if not caption or self.digests_N32[place].tobytes() == digest else -1


def _open_variants(
    path: Path, shard: ShardIndex, identity: EncoderIdentity, heads: dict[Path, dict[str, str] | None]
) -> Variants | None:
    """None where no sample of the shard has several captions."""
    counts = _read_manifest(path.parent).get("variants")
    if not isinstance(counts, dict) or shard.path.stem not in counts:
        raise UserError(
            f"data.captions=drawn: {path.parent} holds the first caption of each sample alone; "
            f"{AGAIN} --all-captions, or set data.captions=first"
        )
    if not counts[shard.path.stem]:
        return None
    return Variants(_open(variants_path(path.parent, shard.path.stem), identity, heads), shard)


def pad(texts: list[Text], max_length: int) -> dict[str, Tensor]:
    """text [B, T, C] float32, text_mask [B, T] bool (True: real), pooled [B, P]; T is the encoder's max_length, so that
    shapes never change."""
    shape = (len(texts), max_length, texts[0][0].shape[1])
    tokens_BTC, mask_BT = torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.bool)
    for b, (tokens, _) in enumerate(texts):
        tokens_BTC[b, : len(tokens)] = tokens
        mask_BT[b, : len(tokens)] = True
    return {"text": tokens_BTC, "text_mask": mask_BT, "pooled": torch.stack([p for _, p in texts])}


def _choose(folder: Path, expected: str | None) -> Path:
    """The store in `folder` (or `folder` itself) that was made by the expected encoder."""
    stores = (
        [folder] if (folder / MANIFEST).exists() else sorted(p.parent for p in folder.glob(f"*/{MANIFEST}"))
    )
    if not stores:
        raise UserError(
            f"data.embeddings={folder} holds no finished embeddings; make them with experiments.embed"
        )
    found = {store: str(_read_manifest(store)["fingerprint"]) for store in stores}
    matching = [store for store, fingerprint in found.items() if expected in (None, fingerprint)]
    if not matching:
        names = ", ".join(store.name for store in stores)
        raise UserError(
            f"data.embeddings={folder} was made by another text encoder ({names}) than the run's "
            f"({str(expected)[:12]}): run experiments.embed with the run's text settings, or change text.*"
        )
    if len(matching) > 1:
        names = ", ".join(store.name for store in matching)
        raise UserError(f"data.embeddings={folder} holds several stores ({names}); name one of them")
    return matching[0]


def _read_manifest(store: Path) -> dict[str, Any]:
    path = store / MANIFEST
    try:
        content = read_json_object(path)
        identity = EncoderIdentity(**{name: content[name] for name in EncoderIdentity.__dataclass_fields__})
        problem = identity.problem
    except KeyError as error:
        problem = f"without {error}"
    except (OSError, UserError) as error:
        raise UserError(f"{path} is not a readable manifest ({error}); {AGAIN}") from error
    if problem:
        raise UserError(f"{path} is not a readable manifest ({problem}); {AGAIN}")
    return content


def _heads(store: Path) -> dict[str, str] | None:
    """Digests by stem; None in a store of format 1."""
    content = _read_manifest(store)
    heads = content.get("heads")
    if content.get("format") == 1 and heads is None:
        return None
    if not isinstance(heads, dict):
        raise UserError(f"{store / MANIFEST} is not a readable manifest (heads); {AGAIN}")
    return heads


def _open(path: Path, identity: EncoderIdentity, heads: dict[Path, dict[str, str] | None]) -> SideFile:
    """The side file, if it is the one that its store lists."""
    side = SideFile(path, identity)
    if side.fingerprint != identity.fingerprint:
        raise UserError(
            f"{path} was made by another text encoder ({side.fingerprint[:12]}) than its store "
            f"({identity.fingerprint[:12]}); {AGAIN}"
        )
    listed = heads[path.parent]
    if listed is not None and listed.get(path.stem) != side.head:
        raise UserError(f"{path} is not the file that {path.parent / MANIFEST} lists; {AGAIN}")
    return side


def _identity(stores: list[Path]) -> EncoderIdentity:
    names = EncoderIdentity.__dataclass_fields__
    manifests = [_read_manifest(store) for store in stores]
    identities = {EncoderIdentity(**{name: content[name] for name in names}) for content in manifests}
    if len(identities) != 1:
        raise UserError(
            f"data.embeddings names stores of different encoders: {', '.join(s.name for s in stores)}"
        )
    return identities.pop()


def _side_path(shard: Path, stores: list[Path]) -> Path:
    """The shard's side file; with several stores the one beside the shard wins (stems may be equal)."""
    ordered = sorted(stores, key=lambda store: shard.absolute().parent not in store.absolute().parents)
    for store in ordered:
        path = store / f"{shard.stem}.safetensors"
        if path.exists():
            return path
    raise UserError(f"no embeddings of shard {shard} in {ordered[0]}; {AGAIN}")


def _matching_rows(side: SideFile | None, shard: ShardIndex) -> np.ndarray:
    """For each sample of the shard, its row in the side file; -1 for none."""
    if side is None:
        return np.full(len(shard), -1)
    row_of = {key: row for row, key in enumerate(side.keys)}
    rows = np.array([row_of.get(key, -1) for key in shard.keys], np.int64)
    rows[len(shard) - shard.absent :] = -1
    different = np.flatnonzero((rows >= 0) & (side.digests_N32[rows] != shard.digests_N32).any(axis=1))
    if len(different):
        first = shard.keys[int(different[0])]
        raise UserError(
            f"{side.path} was made from other captions than those of {shard.path} ({len(different)} differ, "
            f"first: {first}); {AGAIN}"
        )
    return rows


def _check_missing(
    paths: list[Path | None], shards: list[ShardIndex], rows: list[np.ndarray], allowed: float
) -> None:
    counts = [
        int((found[: len(shard) - shard.absent] < 0).sum()) for found, shard in zip(rows, shards, strict=True)
    ]
    total = sum(len(shard) - shard.absent for shard in shards)
    if not any(counts):
        return
    number = int(np.argmax(counts))
    first = shards[number].keys[int(np.argmax(rows[number] < 0))]
    message = f"{paths[number]} lacks {counts[number]} samples of {shards[number].path} (first: {first})"
    if sum(counts) > allowed * total:
        raise UserError(f"{message}; {AGAIN}")
    log.warning("%s; they and those of other shards, %d in all, are skipped", message, sum(counts))
