"""Seeded mutations of bytes, text, JSON, safetensors, zip archives with pickles, and tars."""

import copy
import io
import json
import pickletools
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

Chance = random.Random
INTEGERS = (
    0,
    1,
    -1,
    7,
    127,
    128,
    255,
    256,
    32767,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**63,
    10**30,
)
TEXTS = (
    "", " ", "\x00", "a\x00b", "\ud800", "\ufeff", "../../x", "/dev/zero", "/etc/passwd", "None", "nan", "-1", "1e999",
    "x" * 300, "é" * 200, "${oc.env:HOME}", "{", "\r\n", "=1+1", "<b>", "\x1b[31m", "0x10", "true", "null", "a/b", ".",
    "2026-01-01T00:00:00", "٣", "%s%s%n", "name=value",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, *INTEGERS, 1.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"), *TEXTS,
    [], {}, [[]], [None], {"a": {}}, [1, "a", None], list(range(300)),
)  # fmt: skip


# ---- bytes --------------------------------------------------------------------------------------------------------


def mutate_bytes(chance: Chance, data: bytes, words: Sequence[bytes] = (), most: int = 6) -> bytes:
    """A few changes of any kind: bits, numbers, cuts, repeats, exchanges, words of the format."""
    content = bytearray(data)
    for _ in range(chance.randint(1, most)):
        _change(chance, content, words)
    return bytes(content)


def _change(chance: Chance, content: bytearray, words: Sequence[bytes]) -> None:
    size = len(content)
    place = chance.randrange(size + 1)
    kind = chance.randrange(10)
    if kind == 0 and place < size:
        content[place] ^= 1 << chance.randrange(8)
    elif kind == 1 and place < size:
        content[place] = chance.choice((0, 1, 0x20, 0x2D, 0x7F, 0x80, 0xFE, 0xFF, chance.randrange(256)))
    elif kind == 2:
        width = chance.choice((1, 2, 4, 8))
        number = chance.choice(INTEGERS) % (1 << 8 * width)
        content[place : place + width] = number.to_bytes(width, chance.choice(("little", "big")))
    elif kind == 3:
        del content[place:]
    elif kind == 4:
        del content[place : place + chance.choice((1, 2, 4, 16, 512, size // 3 + 1))]
    elif kind == 5:
        piece = content[place : place + chance.choice((1, 3, 17, 512))]
        content[place:place] = piece * chance.choice((1, 2, 50))
    elif kind == 6:
        content[place:place] = chance.randbytes(chance.choice((1, 2, 8, 100)))
    elif kind == 7:
        other = chance.randrange(size + 1)
        width = chance.choice((1, 4, 16, 512))
        content[place : place + width] = content[other : other + width]
    elif kind == 8 and words:
        word = chance.choice(list(words))
        content[place : place + (len(word) if chance.random() < 0.5 else 0)] = word
    else:
        content.extend(bytes(chance.choice((1, 511, 512, 1024, 10240))))


# ---- text ---------------------------------------------------------------------------------------------------------

_TEXT_WORDS = (
    *(text.encode("utf-8", "surrogatepass") for text in TEXTS), b'"', b"'", b",", b"\t", b"\n", b"\r", b";",
)  # fmt: skip


def mutate_text(chance: Chance, text: str, words: Sequence[bytes] = ()) -> bytes:
    """Bytes of a text file: changed in its letters, its encoding, its marks or its line ends."""
    kind = chance.randrange(8)
    if kind == 0:
        return text.encode(
            chance.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig")), "replace"
        )
    if kind == 1:
        return text.encode("cp1252", "replace")
    if kind == 2:
        return text.replace("\n", chance.choice(("\r", "\r\n", "\n\n", "\x00\n"))).encode()
    lines = text.splitlines(keepends=True)
    if kind == 3 and lines:
        chance.shuffle(lines)
        return "".join(lines[: chance.randrange(len(lines) + 1)]).encode()
    return mutate_bytes(chance, text.encode("utf-8", "surrogatepass"), [*words, *_TEXT_WORDS])


# ---- JSON ---------------------------------------------------------------------------------------------------------


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside nested containers."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def mutate_tree(chance: Chance, value: Any, most: int = 3) -> Any:
    """A copy of a JSON value with entries replaced, removed, repeated or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.randint(1, most)):
        found = places(value)
        if not found or chance.random() < 0.03:
            return copy.deepcopy(chance.choice(ODD))
        parent, key = chance.choice(found)
        kind = chance.randrange(6)
        if kind == 0:
            parent.pop(key) if isinstance(parent, list) else parent.pop(key, None)
        elif kind == 1 and isinstance(parent, dict):
            parent[chance.choice(TEXTS)] = parent[key]
        elif kind == 2 and isinstance(parent, list):
            parent.extend(parent[: chance.choice((1, 2, 500))])
        elif kind == 3:
            other, name = chance.choice(found)
            if _holds(other, name):
                parent[key] = json.loads(json.dumps(other[name]))
        elif kind == 4 and type(parent[key]) in (int, float):
            parent[key] = chance.choice(
                (parent[key] + 1, -parent[key], parent[key] * 10**6, parent[key] / 3, str(parent[key]))
            )
        else:
            parent[key] = copy.deepcopy(chance.choice(ODD))
    return value


def _holds(container: Any, key: Any) -> bool:
    return key in container if isinstance(container, dict) else key < len(container)


def mutate_json(chance: Chance, value: Any) -> bytes:
    """Bytes of a JSON file: mostly JSON with odd content, sometimes no JSON at all."""
    kind = chance.randrange(12)
    if kind == 0:
        return mutate_text(
            chance, json.dumps(value, indent=2), (b"NaN", b"Infinity", b"{", b"}", b"[", b"]", b":")
        )
    if kind == 1:
        return chance.choice(
            (b"", b"[" * 100_000, b'{"a":' * 5_000, b"9" * 10_000, b"\xff\xfe{\x00}\x00", b"nul", b"[1]")
        )
    if kind == 2:
        text = json.dumps(value)
        return (
            f'{{"_deep": {"[" * 70 + "]" * 70}, {text[1:]}'.encode()
            if text.startswith("{")
            else text.encode()
        )
    return json.dumps(mutate_tree(chance, value), ensure_ascii=chance.random() < 0.5).encode(
        "utf-8", "surrogatepass"
    )


# ---- safetensors --------------------------------------------------------------------------------------------------


def mutate_safetensors(chance: Chance, data: bytes) -> bytes:
    """The header's JSON, its length, or any bytes."""
    if chance.random() < 0.4:
        return mutate_bytes(chance, data)
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    for _ in range(chance.randint(1, 3)):
        name = chance.choice(sorted(header))
        entry = header[name]
        kind = chance.randrange(7)
        if kind == 0:
            del header[name]
        elif kind == 1:
            header[chance.choice((*TEXTS, f"{name}x"))] = entry
        elif kind == 2 and isinstance(entry.get("shape"), list):
            entry["shape"] = chance.choice(
                (
                    entry["shape"][::-1],
                    [*entry["shape"], 1],
                    [1, *entry["shape"]],
                    [0],
                    [2**40, 2**40],
                    [-1],
                    [],
                )
            )
        elif kind == 3 and "dtype" in entry:
            entry["dtype"] = chance.choice(
                ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E5M2", "X", 3)
            )
        elif kind == 4 and isinstance(entry.get("data_offsets"), list) and len(entry["data_offsets"]) == 2:
            start, stop = entry["data_offsets"]
            entry["data_offsets"] = chance.choice(
                ([stop, start], [start, stop + 4], [start - 4, stop], [0, 2**60], [-1, 4])
            )
        elif kind == 5 and len(header) > 1:
            other = chance.choice(sorted(header))
            header[name], header[other] = header[other], header[name]
        else:
            header = mutate_tree(chance, header, 1)
        if (
            not isinstance(header, dict)
            or not header
            or not all(isinstance(e, dict) for e in header.values())
        ):
            break
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    length = len(text) if chance.random() < 0.9 else chance.choice(INTEGERS) % 2**64
    return struct.pack("<Q", length) + text + body


# ---- zip archives with pickles: torch.save, numpy.savez -----------------------------------------------------------

Payload = Callable[[str], bytes]


def payloads(marker: str) -> list[bytes]:
    """Pickles that would create the file `marker` when they are run."""
    command = f"touch {marker}"

    def call(module: str, name: str, *arguments: str) -> bytes:
        text = b"".join(b"V" + argument.encode() + b"\n" for argument in arguments)
        return f"c{module}\n{name}\n".encode() + b"(" + text + b"tR."

    return [
        call("os", "system", command),
        call("posix", "system", command),
        call("subprocess", "getoutput", command),
        call("builtins", "eval", f"open({marker!r}, 'w')"),
        call("builtins", "exec", f"open({marker!r}, 'w')"),
        call("torch", "os.system", command),
        call("torch.serialization", "os.system", command),
        call("pathlib", "Path.touch", marker),
        call("io", "open", marker, "w"),
        call("torch.distributed.checkpoint.filesystem", "os.system", command),
        call("shutil", "os.system", command),
    ]


def mutate_pickle(chance: Chance, data: bytes, marker: str) -> bytes:
    """Other opcodes, names and numbers, or one that calls something."""
    kind = chance.randrange(5)
    if kind == 0:
        payload = chance.choice(payloads(marker))
        # What it returns is dropped and the rest goes on; or it is all there is.
        return (
            payload
            if chance.random() < 0.5
            else payload[:-1] + b"0" + data[2:]
            if data[:1] == b"\x80"
            else payload
        )
    if kind == 1:
        return _rename_globals(chance, data)
    return mutate_bytes(
        chance, data, (b".", b"R", b"}", b"]", b"(", b"t", b"cos\nsystem\n", b"cbuiltins\neval\n", b"Q", b"b")
    )


def _rename_globals(chance: Chance, data: bytes) -> bytes:
    try:
        found = [(place, argument) for op, argument, place in pickletools.genops(data) if op.name == "GLOBAL"]
    except Exception:
        return mutate_bytes(chance, data)
    if not found:
        return mutate_bytes(chance, data)
    place, argument = chance.choice(found)
    size = len(argument.encode()) + 2
    other = chance.choice(
        (
            b"cos\nsystem\n",
            b"cbuiltins\neval\n",
            b"ctorch\nload\n",
            b"ctorch\nTensor\n",
            b"ccollections\nOrderedDict\n",
        )
    )
    return data[:place] + other + data[place + size :]


def mutate_zip(chance: Chance, data: bytes, marker: str) -> bytes:
    """The archive's bytes, or one member with the archive's own checksums right again."""
    if chance.random() < 0.3:
        return mutate_bytes(chance, data)
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    names = source.namelist()
    chosen, kind = chance.choice(names), chance.randrange(8)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            content = source.read(name)
            if name.endswith(".pkl") and (chosen == name or kind < 4):
                content = mutate_pickle(chance, content, marker)
            elif name == chosen and kind == 4:
                continue
            elif name == chosen and kind == 5:
                archive.writestr(chance.choice(("../x", "/x", "a" * 300, name + "x")), content)
            elif name == chosen:
                content = mutate_bytes(chance, content)
            archive.writestr(name, content)
    return target.getvalue()


# ---- tar ----------------------------------------------------------------------------------------------------------

_FIELDS = {
    "name": (0, 100), "mode": (100, 8), "size": (124, 12), "mtime": (136, 12), "type": (156, 1), "link": (157, 100),
    "magic": (257, 8), "prefix": (345, 155),
}  # fmt: skip
_TYPES = (b"0", b"5", b"1", b"2", b"x", b"g", b"L", b"K", b"S", b"3", b"\x00", b"7", b"Z")
_SIZES = (
    b"77777777777\x00",
    b"-0000000001\x00",
    b"x" * 12,
    b"\x80" + b"\x7f" * 11,
    b"\xff" * 12,
    b"\x00" * 12,
)
_NAMES = (
    b"a.png", b"a.txt", b"a.b.c.png", b".png", b"\xff\xfe.png", b"/x.png", b"../x.png", b"a" * 100, b"a\x00b.png",
    b"x/",
    b"a.PNG", b"a.json", b"",
)  # fmt: skip


def mutate_tar(chance: Chance, data: bytes) -> bytes:
    """Headers with right checksums, extended headers, members added, or any bytes."""
    kind = chance.randrange(6)
    if kind <= 1:
        return mutate_bytes(chance, data, (b"\x00" * 512, b"ustar\x0000", b"ustar  \x00"))
    content = bytearray(data)
    headers = _headers(data)
    if kind == 2 or not headers:
        return bytes(_with_members(chance, content))
    for _ in range(chance.randint(1, 3)):
        _change_header(chance, content, chance.choice(headers))
    return bytes(content)


def _headers(data: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [member.offset for member in tar]


def _change_header(chance: Chance, content: bytearray, place: int) -> None:
    field = chance.choice(sorted(_FIELDS))
    start, width = _FIELDS[field]
    value = chance.randbytes(width)
    if field == "type":
        value = chance.choice(_TYPES)
    elif field == "size":
        value = chance.choice((*_SIZES, b"%011o\x00" % (chance.choice(INTEGERS) % 8**11)))
    elif field == "name":
        value = chance.choice(_NAMES)
    content[place + start : place + start + width] = value[:width].ljust(width, b"\x00")
    content[place + 148 : place + 156] = b" " * 8
    total = sum(content[place : place + 512])
    content[place + 148 : place + 156] = b"%06o\x00 " % (total % 8**6)


def _with_members(chance: Chance, content: bytearray) -> bytes:
    """The same tar with members before it: long names, links, extended headers of odd content."""
    buffer = io.BytesIO()
    formats = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)
    with tarfile.open(fileobj=buffer, mode="w", format=chance.choice(formats)) as tar:
        for _ in range(chance.randint(1, 3)):
            name = chance.choice(
                (
                    "x.png",
                    "x.txt",
                    "x.json",
                    "é.png",
                    "a" * 90 + ".txt",
                    "x.tar.gz",
                    "x.y.png",
                    ".hidden.png",
                    "d/x.png",
                )
            )
            member = tarfile.TarInfo(name)
            member.type = chance.choice(
                (
                    tarfile.REGTYPE,
                    tarfile.DIRTYPE,
                    tarfile.SYMTYPE,
                    tarfile.LNKTYPE,
                    tarfile.FIFOTYPE,
                    tarfile.CHRTYPE,
                )
            )
            member.linkname = chance.choice(("", "x.png", "/dev/zero", "s0n0.png"))
            if tar.format == tarfile.PAX_FORMAT:
                member.pax_headers = {
                    chance.choice(
                        ("comment", "size", "path", "GNU.sparse.map", "mtime", "hdrcharset")
                    ): chance.choice(("1", "-1", "x", "9" * 4000, "a.png", "0,5,3"))
                }
            payload = chance.randbytes(chance.choice((0, 1, 600))) if member.isreg() else b""
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
        end = tar.offset
    return buffer.getvalue()[:end] + bytes(content)
