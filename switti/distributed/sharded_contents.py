"""Metadata of sharded checkpoints (PyTorch's `.metadata`) without unpickling: read as data, checked, then rebuilt.

It lists the tensors, their chunks, and the place of each chunk: a file, an offset, a length. Nothing in it is trusted:
`switti.weights.pickles` interprets the pickle without calling anything, and before memory is taken for a tensor its
chunks are known to fill it without overlap, inside files of the folder that are long enough.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from switti.errors import UserError
from switti.files import check_regular, read_bytes
from switti.suggestions import printable
from switti.weights.pickles import Call, Global, PickleError, Reference, parse_pickle
from switti.weights.torch_files import DTYPES

CONTENTS = ".metadata"
_DATA_FILE = re.compile(r"__\d{1,9}_\d{1,9}\.distcp")
_METADATA = "torch.distributed.checkpoint.metadata"
_INDEX, _INFO = (_METADATA, "MetadataIndex"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_NAMES: frozenset[Global] = frozenset({
    *((_METADATA, name) for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    _INFO,
    ("torch", "Size"), ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"), ("pathlib._local", "WindowsPath"),
    *DTYPES,
})  # fmt: skip
# Bytes allowed beyond a quarter of the data (a chunk takes some 140 bytes here and more than 1,000 in its file), and at
# most.
_ALLOWANCE, _MOST = 1 << 20, 64 << 20
_LARGEST = 2**62


class _ContentsError(ValueError):
    """Invalid contents; the message says why."""


def read_contents(folder: Path) -> Metadata:
    """PyTorch's description of a sharded checkpoint, as far as it concerns tensors.

    Raises UserError when it is missing, corrupt, carries code, or describes tensors that the files cannot hold.
    """
    path = folder / CONTENTS
    try:
        sizes = {
            entry.name: entry.stat().st_size for entry in folder.iterdir() if _DATA_FILE.fullmatch(entry.name)
        }
        content = read_bytes(path, min(_MOST, _ALLOWANCE + sum(sizes.values()) // 4))
        root, _ = parse_pickle(content, _NAMES)
        return _metadata(root, folder, sizes)
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    except (PickleError, _ContentsError) as error:
        raise UserError(f"{path} cannot be used: {error}") from error


def _metadata(root: Any, folder: Path, sizes: dict[str, int]) -> Metadata:
    fields = _fields(root, (_METADATA, "Metadata"))
    tensors: dict[str, TensorStorageMetadata] = {}
    for name, entry in _dict(fields.get("state_dict_metadata")).items():
        if type(name) is not str:
            raise _ContentsError("a tensor's name is not text")
        if type(entry) is Call and entry.name == (_METADATA, "BytesStorageMetadata"):
            continue
        tensors[name] = _tensor(name, _fields(entry, (_METADATA, "TensorStorageMetadata")))
    listed = _dict(fields.get("storage_data"))
    places = {_index(key): _place(value) for key, value in listed.items()}
    used: dict[MetadataIndex, _StorageInfo] = {}
    for name, tensor in tensors.items():
        width = tensor.properties.dtype.itemsize
        for chunk in tensor.chunks:
            index = MetadataIndex(name, chunk.offsets)
            if index not in places:
                raise _ContentsError(f"it does not say where {printable(name)} is stored")
            used[index] = places[index]
            if math.prod(chunk.sizes) * width > used[index].length:
                raise _ContentsError(
                    f"{printable(name)} is larger than the part of the file that should hold it"
                )
    _check_places(used.values(), folder, sizes)
    return Metadata(dict(tensors), storage_data=used, storage_meta=StorageMeta())


def _check_places(places: Iterable[_StorageInfo], folder: Path, sizes: dict[str, int]) -> None:
    """All parts are inside regular files of the folder and do not overlap."""
    parts: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for place in places:
        parts[place.relative_path].append((place.offset, place.offset + place.length))
    for name, spans in parts.items():
        if name not in sizes:
            raise _ContentsError(
                f"it names the file {printable(name)}, which is not one of the folder's data files"
            )
        check_regular(folder / name)
        spans.sort()
        if any(end > start for (_, end), (start, _) in pairwise(spans)):
            raise _ContentsError(f"two tensors share bytes of {name}")
        if spans[-1][1] > sizes[name]:
            raise _ContentsError(f"{name} is shorter than its tensors: it is cut off; copy it again")


# ---- one object each --------------------------------------------------------------------------------------------


def _fields(value: Any, name: Global) -> dict[str, Any]:
    """The fields of a data class."""
    if type(value) is not Call or value.name != name or value.arguments or type(value.state) is not dict:
        raise _ContentsError(f"a {name[1]} is not what PyTorch writes")
    return value.state


def _dict(value: Any) -> dict[Any, Any]:
    if type(value) is not dict:
        raise _ContentsError("it is not what PyTorch writes")
    return value


def _tensor(name: str, fields: dict[str, Any]) -> TensorStorageMetadata:
    properties = fields.get("properties")
    state = properties.state if type(properties) is Call else None
    first = state[0] if type(state) is tuple and state else None
    dtype = DTYPES.get(first.name) if type(first) is Reference else None
    if dtype is None:
        raise _ContentsError(f"{printable(name)} has an unknown type")
    size, listed = _size(fields.get("size")), fields.get("chunks")
    if type(listed) is not list or math.prod(size) * dtype.itemsize > _LARGEST:
        raise _ContentsError(f"{printable(name)} has an impossible size")
    chunks = [_chunk(chunk) for chunk in listed]
    if not _fill(size, chunks):
        raise _ContentsError(f"the chunks of {printable(name)} do not fill it")
    return TensorStorageMetadata(TensorProperties(dtype), size, chunks)


def _chunk(value: Any) -> ChunkStorageMetadata:
    fields = _fields(value, (_METADATA, "ChunkStorageMetadata"))
    return ChunkStorageMetadata(_size(fields.get("offsets")), _size(fields.get("sizes")))


def _size(value: Any) -> torch.Size:
    if type(value) is not Call or value.name != ("torch", "Size") or len(value.arguments) != 1:
        raise _ContentsError("a size is not what PyTorch writes")
    numbers = value.arguments[0]
    if type(numbers) is not tuple or len(numbers) > 16:
        raise _ContentsError("a size is not a short tuple")
    return torch.Size([_count(number) for number in numbers])


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise _ContentsError("a size or place is not a possible number")
    return value


def _index(value: Any) -> MetadataIndex:
    fields = _fields(value, _INDEX)
    if type(fields.get("fqn")) is not str:
        raise _ContentsError("a place has no name")
    offset = fields.get("offset")
    return MetadataIndex(fields["fqn"], None if offset is None else _size(offset))


def _place(value: Any) -> _StorageInfo:
    fields = _fields(value, _INFO)
    if type(fields.get("relative_path")) is not str:
        raise _ContentsError("a place has no file")
    if fields.get("transform_descriptors"):
        raise _ContentsError("it asks for tensors to be transformed, which this project never does")
    return _StorageInfo(fields["relative_path"], _count(fields.get("offset")), _count(fields.get("length")))


def _fill(size: Sequence[int], chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Whether chunks, cut along one dimension at most, make up a tensor without gaps and overlaps."""
    if any(len(chunk.offsets) != len(size) or len(chunk.sizes) != len(size) for chunk in chunks):
        return False
    cut = [d for d in range(len(size)) if any(chunk.sizes[d] != size[d] for chunk in chunks)]
    if len(cut) > 1 or any(chunk.offsets[d] for chunk in chunks for d in range(len(size)) if d not in cut):
        return False
    if not cut:
        return len(chunks) == 1
    end = 0
    for start, length in sorted((chunk.offsets[cut[0]], chunk.sizes[cut[0]]) for chunk in chunks):
        if start != end:
            return False
        end = start + length
    return end == size[cut[0]]
