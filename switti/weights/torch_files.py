"""Safe reading of torch.save files: the pickle is checked against the file before torch.load sees it.

torch.load(weights_only=True) runs no foreign code, but it follows every instruction: it unpacks compressed records of
any size, makes byte arrays of any length and tensors that repeat one number a trillion times. So the description is
checked first: plain containers, and tensors that lie, once each, in uncompressed records of the file.
"""

import io
import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from switti.errors import UserError, first_line
from switti.files import open_regular
from switti.suggestions import printable
from switti.weights.pickles import Call, Global, Persistent, PickleError, Reference, is_key, parse_pickle

DTYPES: dict[Global, torch.dtype] = {
    ("torch", str(dtype).removeprefix("torch.")): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
        torch.bool, torch.complex64, torch.complex128,
    )
}  # fmt: skip
# Bytes of an element.
_STORAGES: dict[Global, int] = {
    **{("torch", f"{name}Storage"): size for name, size in {
        "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1,
        "Bool": 1, "ComplexFloat": 8, "ComplexDouble": 16,
    }.items()},
    ("torch.storage", "UntypedStorage"): 1,
}  # fmt: skip
_TENSOR, _TENSOR_V3 = ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3")
_PARAMETER, _DICT, _SIZE = (
    ("torch._utils", "_rebuild_parameter"),
    ("collections", "OrderedDict"),
    ("torch", "Size"),
)
_SETS = {("builtins", "set"), ("__builtin__", "set")}
_BYTES, _DEVICE, _LAYOUT = ("_codecs", "encode"), ("torch", "device"), ("torch.serialization", "_get_layout")
_NAMES = frozenset({
    _TENSOR, _TENSOR_V3, _PARAMETER, _DICT, _SIZE, _BYTES, _DEVICE, _LAYOUT, *_SETS, *DTYPES, *_STORAGES,
})  # fmt: skip
_SCALARS = (str, bytes, int, float, bool, type(None))
# In bytes, of which a tensor takes about 200.
MAX_PICKLE = 8 << 20
_MAX_VALUES = 10_000_000
_MAX_DEPTH = 64
# Tensors may share memory, as tied weights do, but each is a copy in the end.
_MAX_SHARING = 4


class TorchFileError(ValueError):
    """An invalid file of torch.save; the message says why."""


def read_torch(path: Path, mmap: bool = False) -> dict[str, Any]:
    """A file written by torch.save, without running any code that it may carry.

    mmap: tensors stay on disk until they are read. Raises UserError if the file is missing, cut off, not a regular
    file, or holds anything but plain data and tensors.
    """
    try:
        with open_regular(path) as stream:
            check_torch(stream)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint {path}") from error
    except TorchFileError as error:
        raise UserError(f"{path} is not a readable checkpoint: {error}") from error
    # Of a file that passed the checks: torch raises a dozen kinds.
    except Exception as error:
        raise UserError(f"{path} is not a readable checkpoint: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    return content


def check_torch_file(path: Path) -> None:
    """UserError unless another library may load the file at `path`, which torch.save wrote."""
    try:
        with open_regular(path) as stream:
            check_torch(stream)
    except TorchFileError as error:
        raise UserError(f"{path} is not a readable file of weights: {error}") from error


def load_tensor(content: bytes) -> Tensor:
    """The tensor that a file of torch.save with this content holds. Raises TorchFileError."""
    check_torch(io.BytesIO(content))
    try:
        value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise TorchFileError(_reason(error)) from error
    if type(value) is not Tensor:
        raise TorchFileError(f"it holds a {type(value).__name__}, not a tensor")
    return value


def _reason(error: Exception) -> str:
    """One line. torch answers what it refuses with a page of advice to allow it."""
    if "Weights only load failed" in str(error):
        return "it is corrupt or was not written by torch.save"
    return first_line(error)


def check_torch(stream: BinaryIO) -> None:
    """Raises TorchFileError unless `stream` holds what torch.save writes of plain data and tensors.

    Reads the list of records and the pickle, not the tensors; takes time and memory in proportion to these.
    """
    start = stream.read(4)
    length = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if start != b"PK\x03\x04":
        raise TorchFileError("it does not begin as files of torch.save do (since torch 1.6)")
    records, content = _open(stream, length)
    try:
        value, _ = parse_pickle(content, _NAMES)
    except PickleError as error:
        raise TorchFileError(str(error)) from error
    _Contents({name.removeprefix("data/"): info.file_size for name, info in records.items()}).check(value)


def _open(stream: BinaryIO, length: int) -> tuple[dict[str, zipfile.ZipInfo], bytes]:
    """(records, the pickle)."""
    try:
        with zipfile.ZipFile(stream) as archive:
            records = _records(archive.infolist(), length)
            if "data.pkl" not in records:
                raise TorchFileError("it was not written by torch.save")
            if records["data.pkl"].file_size > MAX_PICKLE:
                raise TorchFileError(f"its description takes more than {MAX_PICKLE >> 20} MiB")
            return records, archive.read(records["data.pkl"])
    except TorchFileError:
        raise
    # zipfile raises half a dozen kinds.
    except Exception as error:
        raise TorchFileError("it is cut off; copy or download it again") from error


def _records(entries: list[zipfile.ZipInfo], length: int) -> dict[str, zipfile.ZipInfo]:
    """By their names within the archive: uncompressed, each there once, together no longer than the file."""
    folder = f"{entries[0].filename.split('/')[0]}/" if entries else ""
    records = {entry.filename.removeprefix(folder): entry for entry in entries}
    if len(records) != len(entries):
        raise TorchFileError("it holds two records of one name")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise TorchFileError("its records are compressed, which torch.save never does")
    if sum(max(entry.file_size, entry.compress_size) for entry in entries) > length:
        raise TorchFileError("its records are longer than the file")
    if "constants.pkl" in records:
        raise TorchFileError("it is a TorchScript program; ask for plain tensors")
    return records


class _Contents:
    """Walks through the described value. bytes_of: the size of each record, by the key of its tensor."""

    def __init__(self, bytes_of: dict[str, int]) -> None:
        self.bytes_of = bytes_of
        self.tensor_bytes = 0
        # Number of values of each container, None while it is being walked.
        self.sizes: dict[int, int | None] = {}

    def check(self, value: Any) -> None:
        if self.visit(value, 0) > _MAX_VALUES:
            raise TorchFileError("it holds too many values")
        if self.tensor_bytes > _MAX_SHARING * sum(self.bytes_of.values()):
            raise TorchFileError("its tensors overlap")

    def visit(self, value: Any, depth: int) -> int:
        """How many values there are in `value`; what occurs several times counts several times."""
        if type(value) in _SCALARS:
            return 1
        if id(value) in self.sizes:
            known = self.sizes[id(value)]
            if known is None:
                raise TorchFileError("it contains itself")
            return known
        if depth > _MAX_DEPTH:
            raise TorchFileError(f"it is nested deeper than {_MAX_DEPTH} levels")
        self.sizes[id(value)] = None
        count = 1 + sum(self.visit(child, depth + 1) for child in self.children(value))
        self.sizes[id(value)] = count
        return count

    def children(self, value: Any) -> Iterable[Any]:
        if type(value) in (list, tuple):
            return value
        if type(value) is dict:
            if any(type(key) is Call for key in value):
                raise TorchFileError("it has a key that is not plain data")
            return value.values()
        if type(value) is Reference and value.name in DTYPES:
            return ()
        if type(value) is Call:
            return self.arguments(value)
        raise TorchFileError("it is more than plain data and tensors")

    def arguments(self, call: Call) -> Iterable[Any]:
        """What a call contains; only calls that make tensors and plain data are known."""
        name, arguments = call.name, call.arguments
        if name == _DICT and not arguments:
            return [call.items or {}, call.state or {}]
        if call.state is not None or call.items is not None:
            raise TorchFileError(f"it changes a {printable(name[1])}")
        if name in (_TENSOR, _TENSOR_V3) and len(arguments) >= 6:
            self.tensor(name, arguments)
            return arguments[5:6]
        if name == _PARAMETER and len(arguments) == 3 and type(arguments[1]) is bool:
            return arguments[::2]
        if name == _SIZE and len(arguments) == 1 and _are_counts(arguments[0]):
            return ()
        if name == _BYTES and len(arguments) == 2 and type(arguments[0]) is str and arguments[1] == "latin1":
            return ()
        if name in (_DEVICE, _LAYOUT) and all(type(argument) in (str, int) for argument in arguments):
            return ()
        if (
            name in _SETS
            and len(arguments) == 1
            and type(arguments[0]) is list
            and all(map(is_key, arguments[0]))
        ):
            return arguments
        raise TorchFileError(f"it calls {printable('.'.join(name))} in a way that torch.save does not")

    def tensor(self, name: Global, arguments: tuple[Any, ...]) -> None:
        """Its elements lie in its storage, none of them twice, and the storage in the file."""
        storage, offset, size, stride = arguments[:4]
        available, width = self.storage(storage)
        if name == _TENSOR_V3:
            dtype = arguments[6] if len(arguments) > 6 else None
            if type(dtype) is not Reference or dtype.name not in DTYPES:
                raise TorchFileError("it has a tensor of an unknown type")
            width = DTYPES[dtype.name].itemsize
        if not (
            _are_counts(size) and _are_counts(stride) and len(size) == len(stride) and _are_counts((offset,))
        ):
            raise TorchFileError("it has a tensor of an impossible shape")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else -1
        if max(last + 1, count) * width > available:
            raise TorchFileError(f"it has a tensor {list(size)} that is larger than what is stored of it")
        self.tensor_bytes += count * width

    def storage(self, value: Any) -> tuple[int, int]:
        """(bytes, bytes of an element) of a storage."""
        identifier = value.identifier if type(value) is Persistent else None
        if type(identifier) is not tuple or len(identifier) != 5 or identifier[0] != "storage":
            raise TorchFileError("it has a tensor without a storage")
        _, kind, key, location, count = identifier
        width = _STORAGES.get(kind.name) if type(kind) is Reference else None
        if width is None or type(key) is not str or type(location) is not str or not _are_counts((count,)):
            raise TorchFileError("it has a storage of an unknown kind")
        if count * width > self.bytes_of.get(key, 0):
            raise TorchFileError(f"its record {printable(key)} is shorter than the tensors in it")
        return count * width, width


def _are_counts(values: Any) -> bool:
    """A short tuple of numbers that sizes, strides and offsets can be, or a `torch.Size` of them."""
    if type(values) is Call and values.name == _SIZE and len(values.arguments) == 1:
        values = values.arguments[0]
    return (
        type(values) is tuple and len(values) <= 64 and all(type(n) is int and 0 <= n < 2**62 for n in values)
    )
