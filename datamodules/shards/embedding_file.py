"""One file of text embeddings: written beside a shard, checked on opening, read row by row.

A safetensors file with tokens [R, C] float16 (real ones only, one caption after another), offsets [N + 1] int64 into
them, pooled [N, P] float32, caption_sha256 [N, 32] uint8, crc32 [N] int64 of each caption's bytes (absent in older
files), and the metadata fingerprint and keys (a JSON list). Reads go by position: a file that shrinks is an error.

Shape suffixes: B captions, N captions of a shard, R real tokens of all of them, t of one, T token positions (padded),
C, P channels.
"""

import hashlib
import json
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.shards.open_files import CutOffError, OpenFiles
from datamodules.shards.tensor_file import Entry, encode, header_size, parse_header, read_tensor
from switti.errors import UserError
from switti.files import atomic_write, open_regular, parse_json

Text = tuple[Tensor, Tensor]  # (tokens [t, C] float16, pooled [P] float32) of one caption
MAX_WIDTH, MAX_TOKENS = 1 << 16, 1 << 16


@dataclass(frozen=True)
class EncoderIdentity:
    """The encoder that embeddings belong to: name, full fingerprint, channels and the longest caption in tokens."""

    name: str
    fingerprint: str
    width: int
    pooled_width: int
    max_length: int

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.fingerprint[:12]}"

    @property
    def problem(self) -> str | None:
        """The problem with values that come from a file, if any."""
        for name, value in (("name", self.name), ("fingerprint", self.fingerprint)):
            if not isinstance(value, str) or not value:
                return f"{name} is not a text"
        limits = {"width": MAX_WIDTH, "pooled_width": MAX_WIDTH, "max_length": MAX_TOKENS}
        for name, limit in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                return f"{name}={value!r} is not between 1 and {limit}"
        return None


@dataclass(frozen=True)
class PackedText:
    """Embeddings of N captions. tokens_RC float16; offsets int64 [N + 1] into R; pooled_NP float32."""

    tokens_RC: Tensor
    offsets: Tensor
    pooled_NP: Tensor

    def __len__(self) -> int:
        return len(self.pooled_NP)

    def __getitem__(self, row: int) -> Text:
        return self.tokens_RC[self.offsets[row] : self.offsets[row + 1]], self.pooled_NP[row]


def pack(tokens_BTC: Tensor, mask_BT: Tensor, pooled_BP: Tensor) -> PackedText:
    """Keep the real tokens of padded embeddings, as float16.

    Raises:
        UserError: a value is not finite in float16.
    """
    tokens_RC = tokens_BTC[mask_BT].to(torch.float16).cpu()
    if not (tokens_RC.isfinite().all() and pooled_BP.isfinite().all()):
        raise UserError("the text encoder gave values that float16 cannot hold; choose another text.encoder")
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask_BT.sum(1).cumsum(0).cpu()])
    return PackedText(tokens_RC, offsets, pooled_BP.float().cpu())


def concatenate(parts: list[PackedText]) -> PackedText:
    """The embeddings of several packs, one after another."""
    lengths = torch.cat([part.offsets.diff() for part in parts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return PackedText(
        torch.cat([p.tokens_RC for p in parts]), offsets, torch.cat([p.pooled_NP for p in parts])
    )


def encode_packed(text: PackedText, keys: list[str], digests_N32: np.ndarray, fingerprint: str) -> bytes:
    """The bytes of a side file."""
    checks = [
        _checksum(*(part.contiguous().numpy().tobytes() for part in text[row])) for row in range(len(text))
    ]
    tensors = {
        "tokens": text.tokens_RC.numpy(),
        "offsets": text.offsets.numpy(),
        "pooled": text.pooled_NP.numpy(),
        "caption_sha256": digests_N32,
        "crc32": np.array(checks, np.int64),
    }
    return encode(tensors, {"fingerprint": fingerprint, "keys": json.dumps(keys)})


def write_packed(
    path: Path, text: PackedText, keys: list[str], digests_N32: np.ndarray, fingerprint: str
) -> None:
    """Write one side file, atomically."""
    content = encode_packed(text, keys, digests_N32, fingerprint)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def _checksum(tokens: bytes, pooled: bytes) -> int:
    return zlib.crc32(pooled, zlib.crc32(tokens))


class ForeignEmbeddingError(ValueError):
    """An embedding of another encoder than the run's."""


def encode_entry(text: Text, caption: bytes, fingerprint: str) -> bytes:
    """One caption's embedding as the bytes of a shard's entry. caption: as stored."""
    tensors = {"tokens": text[0].numpy(), "pooled": text[1].numpy()}
    return encode(
        tensors, {"fingerprint": fingerprint, "caption_sha256": hashlib.sha256(caption).hexdigest()}
    )


def read_entry(content: bytes, caption: bytes, identity: EncoderIdentity) -> Text:
    """The opposite.

    Raises:
        ForeignEmbeddingError: it was made by another encoder. ValueError: it is corrupt, or of another caption.
    """
    try:
        entries, metadata = parse_header(content, len(content))
        found, digest = metadata["fingerprint"], metadata["caption_sha256"]
        tokens, pooled = entries["tokens"], entries["pooled"]
        rows, width = _shape(entries, "tokens", "<f2", 2)
        (pooled_width,) = _shape(entries, "pooled", "<f4", 1)
    except KeyError as error:
        raise ValueError(f"the embedding is corrupt (without {error})") from None
    except ValueError as error:
        raise ValueError(f"the embedding is corrupt ({error})") from None
    if found != identity.fingerprint:
        raise ForeignEmbeddingError(
            f"carries an embedding of another text encoder ({found[:12]}) than the run's "
            f"({identity.fingerprint[:12]}): embed the shards again with the run's text settings, or change text.*"
        )
    if digest != hashlib.sha256(caption).hexdigest():
        raise ValueError("the embedding was made from another caption")
    if (width, pooled_width) != (
        identity.width,
        identity.pooled_width,
    ) or not 1 <= rows <= identity.max_length:
        raise ValueError(f"the embedding is corrupt (shape [{rows}, {width}] and [{pooled_width}])")
    text = to_text(
        content[tokens.offset : tokens.offset + tokens.size],
        content[pooled.offset : pooled.offset + pooled.size],
        width,
    )
    if not is_finite(text):
        raise ValueError("the embedding is not finite")
    return text


class SideFile:
    """One side file, all of it but the embeddings themselves read and checked.

    keys, digests_N32: of the captions, in the order of the rows. size: of the file in bytes. head: SHA-256 of all that
    is not embeddings, which the store's manifest lists.

    Raises:
        UserError: it is missing, corrupt, or does not match itself or `identity`.
    """

    def __init__(self, path: Path, identity: EncoderIdentity | None = None) -> None:
        self.path = path
        try:
            with open_regular(path) as stream:
                self.size = os.fstat(stream.fileno()).st_size
                self._read(stream.fileno())
            self._check(identity)
        except (OSError, ValueError, KeyError, TypeError, IndexError, MemoryError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UserError(
                f"{path} is not a complete embedding file ({reason}); run experiments.embed again"
            ) from error

    def _read(self, descriptor: int) -> None:
        start = 8 + header_size(os.pread(descriptor, 8, 0), self.size)
        header = os.pread(descriptor, start, 0)
        entries, metadata = parse_header(header, self.size)
        missing = {"tokens", "offsets", "pooled", "caption_sha256"} - entries.keys()
        if missing or not {"fingerprint", "keys"} <= metadata.keys():
            raise ValueError(f"without {', '.join(sorted(missing)) or 'fingerprint and keys'}")
        self.fingerprint = metadata["fingerprint"]
        self.keys: list[str] = parse_json(metadata["keys"])
        self._tokens, self._pooled = entries["tokens"], entries["pooled"]
        rows = _shape(entries, "pooled", "<f4", 2)[0]
        _shape(entries, "tokens", "<f2", 2)
        expected = {"offsets": ("<i8", (rows + 1,)), "caption_sha256": ("u1", (rows, 32))}
        if "crc32" in entries:
            expected["crc32"] = ("<i8", (rows,))
        for name, (dtype, shape) in expected.items():
            if _shape(entries, name, dtype, len(shape)) != shape:
                raise ValueError(f"{name} has the shape {entries[name].shape}, not {shape}")
        self.offsets = read_tensor(descriptor, entries["offsets"])
        self.digests_N32 = read_tensor(descriptor, entries["caption_sha256"])
        self._checks = read_tensor(descriptor, entries["crc32"]) if "crc32" in entries else None
        digest = hashlib.sha256(header)
        for part in (self.offsets, self.digests_N32, self._checks):
            digest.update(b"" if part is None else part.tobytes())
        self.head = digest.hexdigest()

    def _check(self, identity: EncoderIdentity | None) -> None:
        keys, rows = self.keys, self._pooled.shape[0]
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError("the keys are not a list of texts")
        if len(keys) != rows or not rows:
            raise ValueError(f"{len(keys)} keys for {rows} captions")
        if len(set(keys)) != rows:
            raise ValueError("a key comes twice")
        lengths = np.diff(self.offsets)
        tokens, width = self._tokens.shape
        if not width or not self._pooled.shape[1]:
            raise ValueError("embeddings without channels")
        if self.offsets[0] != 0 or self.offsets[-1] != tokens or lengths.min() < 1 or lengths.max() > tokens:
            raise ValueError(f"the offsets do not divide {tokens} tokens among {rows} captions")
        if identity is None:
            return
        widths, wanted = (width, self._pooled.shape[1]), (identity.width, identity.pooled_width)
        if widths != wanted:
            raise ValueError(f"{widths} channels, but the store's manifest says {wanted}")
        if lengths.max() > identity.max_length:
            raise ValueError(f"a caption of {lengths.max()} tokens, more than {identity.max_length}")

    def forget(self) -> None:
        """Keep only what reading needs: keys and digests of millions of captions have been joined by then."""
        self.keys, self.digests_N32 = [], self.digests_N32[:0]

    def read(self, row: int, files: OpenFiles) -> Text:
        """The embedding of one caption.

        Raises:
            OSError: the file is gone, shorter than it was, or its bytes are corrupt.
        """
        start, stop = int(self.offsets[row]), int(self.offsets[row + 1])
        width = self._tokens.row_bytes
        tokens = files.read(self.path, (stop - start) * width, self._tokens.offset + start * width, self.size)
        place = self._pooled.offset + row * self._pooled.row_bytes
        pooled = files.read(self.path, self._pooled.row_bytes, place, self.size)
        if self._checks is not None and _checksum(tokens, pooled) != self._checks[row]:
            raise CutOffError(
                f"{self.path}: the embedding in row {row} is corrupt; run experiments.embed again"
            )
        text = to_text(tokens, pooled, self._tokens.shape[1])
        if not is_finite(text):
            raise CutOffError(
                f"{self.path}: the embedding in row {row} is not finite; run experiments.embed again"
            )
        return text

    def check_rows(self) -> None:
        """Read all embeddings. OSError at the first corrupt one."""
        files = OpenFiles(1)
        try:
            for row in range(len(self.offsets) - 1):
                self.read(row, files)
        finally:
            files.close()


def _shape(entries: dict[str, Entry], name: str, dtype: str, dimensions: int) -> tuple[int, ...]:
    entry = entries[name]
    if entry.dtype != np.dtype(dtype) or len(entry.shape) != dimensions:
        raise ValueError(
            f"{name} is {entry.dtype} {list(entry.shape)}, not {np.dtype(dtype)} in {dimensions} dimensions"
        )
    return entry.shape


def to_text(tokens: bytes, pooled: bytes, width: int) -> Text:
    """Tensors of the bytes of one caption's embedding."""
    # bytearray: torch wants memory that may be written to.
    tokens_tC = torch.frombuffer(bytearray(tokens), dtype=torch.float16).view(-1, width)
    return tokens_tC, torch.frombuffer(bytearray(pooled), dtype=torch.float32)


def is_finite(text: Text) -> bool:
    """Whether all values are; by their sums, which float32 and float64 hold whatever the float16 and float32 values."""
    tokens, pooled = text
    return math.isfinite(float(tokens.float().sum()) + float(pooled.double().sum()))
