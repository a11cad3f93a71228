"""safetensors files read by position, without a map of the file. The header is held against the file before anything
is allocated. Format: 8 bytes of length, a JSON header, the tensors' bytes one after another."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from switti.files import parse_json

MAX_HEADER = 100 << 20  # bytes, the limit of the safetensors library
_DTYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
}


@dataclass(frozen=True)
class Entry:
    """One tensor. offset: bytes from the start of the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (of a scalar: all)."""
        size = self.dtype.itemsize
        for side in self.shape[1:]:
            size *= side
        return size

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return self.row_bytes * (self.shape[0] if self.shape else 1)


def encode(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A file's bytes; the same contents give the same bytes, which the safetensors library does not promise."""
    arrays = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    # Large numbers first, so that each tensor begins at a multiple of its numbers' size.
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, array in arrays.items():
        dtype = next(key for key, known in _DTYPES.items() if known == array.dtype)
        header[name] = {
            "dtype": dtype,
            "shape": array.shape,
            "data_offsets": [end, end := end + array.nbytes],
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *(array.tobytes() for array in arrays.values())])


def parse_header(content: bytes, file_size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """(tensors by name, metadata) of a file's first bytes: all of the header at least.

    Raises:
        ValueError: with the reason, if the header is corrupt or does not fit the file's size.
    """
    start = 8 + header_size(content[:8], file_size)
    if len(content) < start:
        raise ValueError("the header is cut off")
    header = parse_json(content[8:start])
    if not isinstance(header, dict):
        raise ValueError("the header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("the metadata are not texts")
    entries = {name: _entry(name, fields, start) for name, fields in header.items()}
    end = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.size)):
        if entry.offset != end:
            raise ValueError("the tensors do not follow one another")
        end += entry.size
    if end != file_size:
        raise ValueError(f"the file has {file_size} bytes, not {end}")
    return entries, metadata


def header_size(first: bytes, file_size: int) -> int:
    """Bytes of the JSON header, from the file's first eight."""
    size = int.from_bytes(first, "little") if len(first) == 8 else 0
    if not 2 <= size <= min(MAX_HEADER, file_size - 8):
        raise ValueError("not a safetensors file")
    return size


def _entry(name: str, fields: Any, start: int) -> Entry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"the entry of {name!r} is corrupt") from None
    numbers = [begin, end, *(shape if isinstance(shape, list) else [None])]
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise ValueError(f"the entry of {name!r} is corrupt")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name!r} has the type {dtype!r}, none of {', '.join(_DTYPES)}")
    entry = Entry(_DTYPES[dtype], tuple(shape), start + begin)
    if entry.size != end - begin:
        raise ValueError(f"{name!r} has {end - begin} bytes, not the {entry.size} of its shape")
    return entry


def read_header(descriptor: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """The same for an open file."""
    size = os.fstat(descriptor).st_size
    return parse_header(os.pread(descriptor, 8 + header_size(os.pread(descriptor, 8, 0), size), 0), size)


def read_tensor(descriptor: int, entry: Entry) -> np.ndarray:
    """All of a tensor. ValueError if the file has become shorter."""
    parts, at = [], 0
    while at < entry.size and (data := os.pread(descriptor, entry.size - at, entry.offset + at)):
        parts.append(data)
        at += len(data)
    return to_array(b"".join(parts), entry, entry.shape)


def to_array(data: bytes, entry: Entry, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes as an array of the entry's type."""
    array: np.ndarray = np.frombuffer(data, entry.dtype).reshape(shape)
    return array
