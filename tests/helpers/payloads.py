"""Pickles that do something when they are read: each leaves a mark that a test can look for."""

import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DCP = "torch.distributed.checkpoint"


@dataclass(frozen=True)
class Payload:
    """A pickle. live: Python's own unpickler carries it out, so that a reader that does the same would be noticed."""

    name: str
    content: bytes
    live: bool


def text(value: str) -> bytes:
    """BINUNICODE."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    """STACK_GLOBAL, which protocol 4 resolves through dots."""
    return text(module) + text(name) + b"\x93"


def called(module: str, name: str, *arguments: bytes) -> bytes:
    """A global that is called with pickled arguments."""
    return named(module, name) + b"(" + b"".join(arguments) + b"tR"


def whole(body: bytes, protocol: int = 4) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


class Reduced:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def payloads(mark: Path, victim: Path) -> Iterator[Payload]:
    """Each makes the folder or file `mark`, or removes the file `victim`, if it is carried out."""
    import os

    place, command = text(str(mark)), text(f"touch '{mark}'")
    code = text(f"__import__('os').mkdir({str(mark)!r})")

    def live(name: str, body: bytes, protocol: int = 4) -> Payload:
        return Payload(name, whole(body, protocol), True)

    def dead(name: str, body: bytes, protocol: int = 4) -> Payload:
        return Payload(name, whole(body, protocol), False)

    # Other modules by their own names, in all protocols.
    for protocol in range(6):
        content = pickle.dumps(Reduced(os.mkdir, str(mark)), protocol)
        yield Payload(f"reduce, protocol {protocol}", content, True)
    path, mkdir = called("pathlib", "PosixPath", place), called("posix", "mkdir", place)
    yield live("os.system", called("os", "system", command))
    yield live("eval", called("builtins", "eval", code))
    yield live("exec", called("builtins", "exec", code))
    yield live("subprocess", called("subprocess", "call", b"](" + text("touch") + place + b"e"))
    yield live("a path's method", called("pathlib", "Path.mkdir", path))
    yield live("a path's alias of os", called("pathlib", "os.mkdir", place))
    yield live("open", called("io", "open", place, text("w")))
    yield live("copy", called("shutil", "copy", text(str(victim)), place))
    yield live("remove", called("os", "remove", text(str(victim))))

    # Harm under names below the package that the list of contents is written with.
    yield live("dotted", called(f"{DCP}.filesystem", "os.mkdir", place))
    yield live("dotted system", called(f"{DCP}.filesystem", "os.system", command))
    yield live("dotted twice", called(f"{DCP}.metadata", "torch.os.mkdir", place))
    yield live("rm_file", called(f"{DCP}.filesystem", "FileSystem.rm_file", b"N", text(str(victim))))
    yield live("mkdir of a file system", called(f"{DCP}.filesystem", "FileSystem.mkdir", b"N", path))
    yield live("a plain name", called(f"{DCP}.format_utils", "torch_save_to_dcp", text(str(victim)), place))
    yield live("a re-export", called(f"{DCP}.filesystem", "Path.mkdir", path))
    yield live("an alias of pickle", called(f"{DCP}.filesystem", "pickle.loads", data(whole(mkdir))))
    yield live("the package", called("torch.distributed", "checkpoint.filesystem.os.mkdir", place))
    yield dead("an import", called(f"{DCP}._extension", "try_import", text("nowhere")))
    yield dead("a writer", called(f"{DCP}.filesystem", "FileSystemWriter", place))

    # Names of torch, and names that look like the types of tensors.
    yield live("torch's alias", called("torch", "os.mkdir", place))
    yield live("an alias beside an allowed name", called("torch.serialization", "os.mkdir", place))
    yield live("torch.save", called("torch", "save", b"}", place))
    yield live(
        "a type, then its neighbour",
        named("torch", "float32") + b"0" + called("torch", "hub.os.mkdir", place),
    )
    function = called("torch.serialization", "_get_layout.__globals__.get", text("os"))
    yield live("an allowed function's globals", function + b"0" + mkdir)
    yield live("an allowed class's class", called("torch", "Size.__class__", path) + b"0" + mkdir)
    yield dead("a type of another module", called("os", "float32", place))
    yield dead("a type without a module", called("", "float32", place))
    yield dead("a type's class", called("torch", "float32.__class__", place))
    yield dead("a type that is called", called("torch", "float32", place))

    # Helpers of the pickle protocol, and instructions other than calls.
    imported = called("builtins", "__import__", text("os"))
    yield live(
        "getattr", named("builtins", "getattr") + b"(" + imported + text("mkdir") + b"tR(" + place + b"tR"
    )
    blank = called(
        "copyreg", "_reconstructor", named("pathlib", "PosixPath"), named("builtins", "object"), b"N"
    )
    yield live("copyreg", blank + b"0" + mkdir)
    yield live(
        "copyreg.__newobj__", called("copyreg", "__newobj__", named("pathlib", "Path"), place) + b"0" + mkdir
    )
    yield live("partial", called("functools", "partial", named("posix", "mkdir"), place) + b")R")
    yield live("methodcaller", called("operator", "methodcaller", text("mkdir")) + b"(" + path + b"tR")
    mapped = called("builtins", "map", named("posix", "mkdir"), b"](" + place + b"e")
    yield live("map", called("builtins", "list", mapped))
    yield live("INST", b"(" + place + b"iposix\nmkdir\n", 2)
    yield live("OBJ", b"(" + named("subprocess", "Popen") + b"](" + text("touch") + place + b"eo")
    yield dead("NEWOBJ", named("subprocess", "Popen") + b"(" + place + b"t\x81")
    yield dead("NEWOBJ_EX", named("subprocess", "Popen") + b")}\x92")
    storage, entry = named(f"{DCP}.metadata", "StorageMeta"), named(f"{DCP}.metadata", "BytesStorageMetadata")
    method = b"}" + text("__setstate__") + named("posix", "mkdir") + b"s"
    yield live("BUILD that gives a method", storage + b")\x81" + method + b"b" + place + b"b")
    yield live("BUILD of a class", entry + b"\x94N}" + text("mark") + mkdir + b"s\x86b")
    yield dead("an extension code", b"\x82\x01(" + place + b"tR")
    yield dead("a large extension code", b"\x84\xff\xff\xff\x7f(" + place + b"tR")
    yield dead("a persistent identifier", named("posix", "mkdir") + b"Q")
    yield live("before a buffer out of band", mkdir + b"0\x97", 5)
    yield live("a value that is dropped", b"N0" + mkdir)
    yield live("a key", b"}(" + mkdir + b"K\x01u")
    yield live("a memo", mkdir + b"\x940h\x00")
    fields = text("state_dict_metadata") + b"}" + text("storage_data") + b"}" + text("planner_data") + mkdir
    yield live("beside real contents", named(f"{DCP}.metadata", "Metadata") + b")\x81}(" + fields + b"ub")


def data(content: bytes) -> bytes:
    """BINBYTES."""
    return b"B" + struct.pack("<I", len(content)) + content
