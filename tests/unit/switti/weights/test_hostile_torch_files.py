"""Files of torch.save made by an enemy: each is refused at once, in one line, and without taking memory."""

import os
import pickle
import resource
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from payloads import payloads, text

from callbacks.checkpointing import corruption
from switti.errors import UserError
from switti.weights.read import read_weights
from switti.weights.torch_files import read_torch

FLOATS = b"ctorch\nFloatStorage\n"


def archive(path: Path, body: bytes, records: dict[str, bytes] | None = None, compression: int = 0) -> Path:
    """A file as torch.save writes it, with this pickle (without its first and last instruction) and these records."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        file.writestr("archive/version", b"3\n")
        for name, content in (records or {}).items():
            file.writestr(f"archive/{name}", content)
    return path


def integer(value: int) -> bytes:
    """LONG1."""
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(
    size: tuple[int, ...], stride: tuple[int, ...], count: int, offset: int = 0, key: str = "0"
) -> bytes:
    """A call of torch's function that puts a tensor together: float32, on the storage `key` of `count` numbers."""
    storage = b"(" + text("storage") + FLOATS + text(key) + text("cpu") + integer(count) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = storage + integer(offset) + numbers(*size) + numbers(*stride) + b"\x89" + hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def entry(value: bytes) -> bytes:
    """A dict that holds it."""
    return b"}" + text("weight") + value + b"s"


RECORD = {"data/0": bytes(4096)}
CASES: dict[str, Callable[[Path], object]] = {
    "raw pickle with a huge text": lambda p: p.write_bytes(b"\x80\x02X\xff\xff\xff\xff" + b"a" * 100),
    "raw pickle with larger text": lambda p: p.write_bytes(b"\x80\x04\x8d" + struct.pack("<Q", 2**60)),
    "raw pickle with huge bytes": lambda p: p.write_bytes(b"\x80\x05\x96" + struct.pack("<Q", 2**40)),
    "raw pickle": lambda p: p.write_bytes(pickle.dumps({"a": 1}, 2)),
    "file of an old torch": lambda p: torch.save(
        {"weight": torch.ones(3)}, p, _use_new_zipfile_serialization=False
    ),
    "text beyond the end": lambda p: archive(p, b"X\xff\xff\xff\xffabc"),
    "bytes beyond the end": lambda p: archive(p, b"\x8e" + struct.pack("<Q", 2**40)),
    "compressed description": lambda p: archive(p, b"N" * 10_000_000, compression=zipfile.ZIP_DEFLATED),
    "compressed record": lambda p: archive(
        p, entry(tensor((2**22,), (1,), 2**22)), {"data/0": bytes(2**24)}, zipfile.ZIP_DEFLATED
    ),
    "long description": lambda p: archive(p, b"N0" * (5 << 20)),
    "storage longer than its record": lambda p: archive(p, entry(tensor((2**40,), (1,), 2**40)), RECORD),
    "storage without a record": lambda p: archive(p, entry(tensor((4,), (1,), 4, key="1")), RECORD),
    "storage of another name": lambda p: archive(p, entry(tensor((4,), (1,), 4, key="../0")), RECORD),
    "one number repeated": lambda p: archive(p, entry(tensor((2**40,), (0,), 1024)), RECORD),
    "rows repeated": lambda p: archive(p, entry(tensor((2**30, 1024), (0, 1), 1024)), RECORD),
    "beyond its storage": lambda p: archive(p, entry(tensor((1024,), (1,), 1024, offset=1)), RECORD),
    "negative size": lambda p: archive(p, entry(tensor((-4,), (1,), 1024)), RECORD),
    "negative stride": lambda p: archive(p, entry(tensor((4,), (-1,), 1024, offset=8)), RECORD),
    "sizes whose product overflows": lambda p: archive(p, entry(tensor((2**33, 2**33), (0, 0), 1024)), RECORD),
    "a storage of a thousand tensors": lambda p: archive(
        p, b"](" + tensor((1024,), (1,), 1024) * 1000 + b"e", RECORD
    ),
    "byte array": lambda p: archive(p, entry(b"cbuiltins\nbytearray\n" + numbers(10**12) + b"R")),
    "empty tensor of any size": lambda p: archive(p, entry(b"ctorch\nTensor\n" + numbers(10**12) + b"\x81")),
    "tensor without numbers": lambda p: archive(
        p, entry(b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n" + numbers(4) * 2 + b"\x89tR")
    ),
    "codec": lambda p: archive(p, entry(b"c_codecs\nencode\n(" + text("a") + text("zip") + b"tR")),
    "deep lists": lambda p: archive(p, b"]" * 200_000 + b"a" * 199_999),
    "deep tuples": lambda p: archive(p, b")" + b"\x85" * 300_000),
    "deep dicts": lambda p: archive(p, (b"}" + text("a")) * 50_000 + b"N" + b"s" * 50_000),
    "marks": lambda p: archive(p, b"(" * 300_000),
    "list of itself": lambda p: archive(p, b"]q\x00h\x00a"),
    "lists doubled": lambda p: archive(p, b"]" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(100))),
    "tuples doubled in a key": lambda p: archive(
        p, b"}" + b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(100)) + b"Ns"
    ),
    "keys whose hashes collide": lambda p: archive(
        p, b"}(" + b"".join(integer(i * (2**61 - 1)) + b"N" for i in range(100_000)) + b"u"
    ),
    "memory of large indices": lambda p: archive(p, b"Nr\xff\xff\xff\xffj\xff\xff\xff\xff"),
    "no value": lambda p: archive(p, b""),
    "two values": lambda p: archive(p, b"NN"),
    "empty stack": lambda p: archive(p, b"0R"),
    "program": lambda p: archive(p, b"}", {"constants.pkl": b"\x80\x02)."}),
    "no description": lambda p: zipfile.ZipFile(p, "w").writestr("archive/version", b"3"),
    "no records": lambda p: zipfile.ZipFile(p, "w").close(),
    "two descriptions": lambda p: archive(p, b"}", {"data.pkl": b"\x80\x02N."}),
    "behind another file": lambda p: p.write_bytes(b"x" * 10 + archive(p, b"}").read_bytes()),
    "program behind a pickle": lambda p: p.write_bytes(pickle.dumps({}, 2) + archive(p, b"}").read_bytes()),
    "FIFO": lambda p: os.mkfifo(p),
    "device": lambda p: p.symlink_to("/dev/zero"),
    "folder": lambda p: p.mkdir(),
    "link to itself": lambda p: p.symlink_to(p.name),
    "nothing": lambda p: None,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", CASES)
def test_refused_at_once(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    CASES[name](path)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for read in (read_torch, read_weights):
        with pytest.raises(UserError) as caught:
            read(path)
        message = str(caught.value)
        assert str(path) in message and message.isprintable() and len(message) < 400
    if path.exists() and not path.is_dir():
        assert corruption(path)
    assert time.process_time() - start < 10
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 400 << 10


@pytest.mark.parametrize("name", [payload.name for payload in payloads(Path("mark"), Path("victim"))])
def test_nothing_in_the_description_is_carried_out(name: str, tmp_path: Path) -> None:
    mark, victim = tmp_path / "mark", tmp_path / "victim"
    victim.touch()
    (payload,) = [item for item in payloads(mark, victim) if item.name == name]
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", payload.content)
    raw = tmp_path / "raw.pth"
    raw.write_bytes(payload.content)
    for source in (path, raw):
        with pytest.raises(UserError):
            read_torch(source)
        assert not mark.exists() and victim.exists()


def test_what_torch_writes_of_plain_data_and_tensors_is_read(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    content = {
        "state": OrderedDict(a=base, b=base[1:, ::2], tied=base),
        "scalar": torch.tensor(1.5), "empty": torch.empty(0, 7),
        "types": [torch.ones(2, dtype=dtype) for dtype in (torch.bool, torch.int64, torch.bfloat16, torch.uint16)],
        "eight": torch.ones(3).to(torch.float8_e4m3fn), "complex": torch.ones(2, dtype=torch.complex64),
        "parameter": torch.nn.Parameter(torch.ones(2)), "size": torch.Size([1, 2]), "dtype": torch.float16,
        "plain": [None, True, -3, 2**40, 1.5, "é\n", b"\x00\xff", (), ("a", 1), {"b": {3: []}}, {"x", "y"}],
        "device": torch.device("cpu"), "module": torch.nn.Linear(2, 2).state_dict(), "again": base.T,
    }  # fmt: skip
    torch.save(content, tmp_path / "a.ckpt")
    found = read_torch(tmp_path / "a.ckpt")
    expected = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert found.keys() == expected.keys()
    for a, b in zip(
        torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True
    ):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_cut_anywhere_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.ones(1000)}, path)
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="is not a readable checkpoint"):
            read_torch(path)
