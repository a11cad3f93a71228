"""Precomputed caption embeddings: side files of the shards, joined by key.

A store is the folder `<encoder>-<fingerprint[:12]>/` with one safetensors file a shard, `null.safetensors` for the
empty caption and, written last, `manifest.json`. Tokens are ragged: real ones only, packed one caption after another.

Shape suffixes: N captions of a shard, R real tokens of all of them, T token positions (padded), C, P channels.
"""

import json
import logging
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from datamodules.index import ShardIndex
from switti.errors import UserError
from switti.files import atomic_write, write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
NULL = "null.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class EncoderIdentity:
    """What a store is bound to: name, full fingerprint, channels and the longest caption in tokens."""

    name: str
    fingerprint: str
    width: int
    pooled_width: int
    max_length: int

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.fingerprint[:12]}"


@dataclass(frozen=True)
class PackedText:
    """Embeddings of N captions. tokens_RC float16; offsets int64 [N + 1] into R; pooled_NP float32."""

    tokens_RC: Tensor
    offsets: Tensor
    pooled_NP: Tensor


def pack(tokens_BTC: Tensor, mask_BT: Tensor, pooled_BP: Tensor) -> PackedText:
    """Keep the real tokens of padded embeddings, as float16.

    Raises:
        UserError: a value is not finite in float16.
    """
    tokens_RC = tokens_BTC[mask_BT].to(torch.float16).cpu()
    if not (tokens_RC.isfinite().all() and pooled_BP.isfinite().all()):
        raise UserError(
            "the text encoder gave values that float16 cannot hold; encode at training time instead"
        )
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask_BT.sum(1).cumsum(0).cpu()])
    return PackedText(tokens_RC, offsets, pooled_BP.float().cpu())


def concatenate(parts: list[PackedText]) -> PackedText:
    """The embeddings of several packs, one after another."""
    lengths = torch.cat([part.offsets.diff() for part in parts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return PackedText(
        torch.cat([p.tokens_RC for p in parts]), offsets, torch.cat([p.pooled_NP for p in parts])
    )


def write_packed(
    path: Path, text: PackedText, keys: list[str], digests_N32: np.ndarray, fingerprint: str
) -> None:
    """Write one side file, atomically."""
    tensors = {
        "tokens": text.tokens_RC.contiguous(),
        "offsets": text.offsets,
        "pooled": text.pooled_NP.contiguous(),
        "caption_sha256": torch.from_numpy(digests_N32.copy()),
    }
    content = save(tensors, {"fingerprint": fingerprint, "keys": json.dumps(keys)})
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)  # not save_file: that makes files which only their owner may read


def write_manifest(store: Path, identity: EncoderIdentity, samples: dict[str, int]) -> None:
    """Mark a store as complete; `samples` counts the captions of each shard's file."""
    write_json(
        store / MANIFEST, {"format": FORMAT, **vars(identity), "samples": dict(sorted(samples.items()))}
    )


class SideFile:
    """One side file, read lazily through a memory map.

    Raises:
        UserError: it is no whole side file.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, "pt")
            self.fingerprint = self._file.metadata()["fingerprint"]
            self.keys: list[str] = json.loads(self._file.metadata()["keys"])
            self.offsets = self._file.get_tensor("offsets").tolist()
            self.digests_N32 = self._file.get_tensor("caption_sha256").numpy()
            self._tokens, self._pooled = self._file.get_slice("tokens"), self._file.get_slice("pooled")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is missing or no whole embedding file; run experiments.embed again"
            ) from error

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """(tokens [t, C] float32, pooled [P] float32) of one caption with t real tokens."""
        tokens = self._tokens[self.offsets[row] : self.offsets[row + 1]]
        return tokens.float(), self._pooled[row : row + 1][0].float()


def is_whole(path: Path, index: ShardIndex, fingerprint: str) -> bool:
    """Whether a shard's side file is there and made from these captions by this encoder."""
    if not path.exists():
        return False
    try:
        side = SideFile(path)
    except UserError:
        return False
    same = side.fingerprint == fingerprint and side.keys == index.keys
    return same and np.array_equal(side.digests_N32, index.digests_N32)


class MissingEmbeddingError(Exception):
    """There is no embedding of a sample, or it can no longer be read."""


class EmbeddingStore:
    """The embeddings of a set of shards: checked at once, read lazily (one map a shard and process).

    Args:
        folders: stores, or folders that hold stores (of which the fingerprint decides).
        expected_fingerprint: of the run's text encoder; None accepts any encoder if there is only one store.
        allowed_missing: share of the samples that may have none; reading those is a MissingEmbeddingError.

    Raises:
        UserError: no store, one of another encoder, of other captions, or without some shard.
    """

    def __init__(
        self,
        folders: list[str],
        shards: list[ShardIndex],
        expected_fingerprint: str | None,
        open_files: int = 64,
        allowed_missing: float = 0.0,
    ) -> None:
        stores = [_choose(Path(folder), expected_fingerprint) for folder in folders]
        self.identity = _identity(stores)
        self.open_files = open_files
        self._open: OrderedDict[int, SideFile] = OrderedDict()
        # A shard of which nothing is left is never asked for an embedding.
        self.paths = [_side_path(s.path, stores) if len(s) > s.absent else None for s in shards]
        self.rows = [_matching_rows(p, s, self.identity) for p, s in zip(self.paths, shards, strict=True)]
        _check_missing(self.paths, shards, self.rows, allowed_missing)
        null = SideFile(stores[0] / NULL)
        _check_fingerprint(stores[0] / NULL, null.fingerprint, self.identity.fingerprint)
        self.null = null.read(0)

    def read(self, shard: int, row: int) -> tuple[Tensor, Tensor]:
        """(tokens [t, C], pooled [P]), float32, of the sample in a row of a shard. MissingEmbeddingError if none."""
        place, path = int(self.rows[shard][row]), self.paths[shard]
        if place < 0 or path is None:
            raise MissingEmbeddingError(f"{path} has none of this sample")
        try:
            return self._side(shard, path).read(place)
        except (UserError, SafetensorError, OSError) as error:
            self._open.pop(shard, None)
            raise MissingEmbeddingError(str(error)) from error

    def _side(self, shard: int, path: Path) -> SideFile:
        side = self._open.get(shard)
        if side is None:
            if len(self._open) >= self.open_files:
                self._open.popitem(last=False)
            side = self._open[shard] = SideFile(path)
        self._open.move_to_end(shard)
        return side

    def pad(self, texts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """text [B, T, C] float32, text_mask [B, T] bool (True: real), pooled [B, P]; T is the encoder's max_length,
        so that shapes never change."""
        shape = (len(texts), self.identity.max_length, self.identity.width)
        tokens_BTC, mask_BT = torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.bool)
        for b, (tokens, _) in enumerate(texts):
            tokens_BTC[b, : len(tokens)] = tokens
            mask_BT[b, : len(tokens)] = True
        return {"text": tokens_BTC, "text_mask": mask_BT, "pooled": torch.stack([p for _, p in texts])}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # maps are opened anew in each process


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
    try:
        content = dict(json.loads((store / MANIFEST).read_text()))
        return {name: content[name] for name in EncoderIdentity.__dataclass_fields__}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{store / MANIFEST} is no readable manifest; run experiments.embed again") from error


def _identity(stores: list[Path]) -> EncoderIdentity:
    identities = {EncoderIdentity(**_read_manifest(store)) for store in stores}
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
    raise UserError(f"no embeddings of shard {shard} in {ordered[0]}; run experiments.embed again")


def _matching_rows(path: Path | None, shard: ShardIndex, identity: EncoderIdentity) -> np.ndarray:
    """For each sample of the shard, its row in the side file; -1 for none."""
    if path is None:
        return np.full(len(shard), -1)
    side = SideFile(path)
    _check_fingerprint(path, side.fingerprint, identity.fingerprint)
    row_of = {key: row for row, key in enumerate(side.keys)}
    rows = np.array([row_of.get(key, -1) for key in shard.keys], np.int64)
    rows[len(shard) - shard.absent :] = -1
    different = np.flatnonzero((rows >= 0) & (side.digests_N32[rows] != shard.digests_N32).any(axis=1))
    if len(different):
        first = shard.keys[int(different[0])]
        raise UserError(
            f"{path} was made from other captions than those of {shard.path} ({len(different)} differ, "
            f"first: {first}); run experiments.embed again"
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
        raise UserError(f"{message}; embed it again")
    log.warning("%s; they and those of other shards, %d in all, are left out", message, sum(counts))


def _check_fingerprint(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(
            f"{path} was made by another text encoder ({found[:12]}) than its store ({expected[:12]})"
        )
