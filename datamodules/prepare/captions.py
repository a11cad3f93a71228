"""Text of any source: bytes → text, a value of a table → captions, a caption → one clean line.

Every function is pure. What is wrong with a caption is said as "reason: details"; equal reasons are counted together.
"""

import codecs
import math
import re
from typing import Any

from datamodules.images import LFS_POINTER
from switti.errors import UserError
from switti.files import parse_json

# The longer ones first: a UTF-32 mark begins like a UTF-16 mark.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
# A list as Python prints it, or JSON that is damaged.
_LIST_LIKE = re.compile(r"""\[\s*['"].*['"]\s*,?\s*\]""", re.DOTALL)
# Control characters, line and paragraph separators, byte order marks.
_BREAKS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]")
_HALVES = re.compile("[\ud800-\udfff]")


class UnusableTextError(ValueError):
    """Bytes that are not text ("is not UTF-8: …"), or a value that is not a caption ("caption is NaN")."""


def check_encoding(name: str) -> str:
    """`name`, if Python knows a text encoding of that name; UserError otherwise."""
    try:
        b"a".decode(name)
    except UnicodeError:  # a text encoding of more bytes a character
        return name
    except (LookupError, ValueError) as error:
        raise UserError(
            f"--encoding {name!r} is not a known text encoding; try utf-8, cp1252 or utf-16-le"
        ) from error
    return name


def decode_text(data: bytes, encoding: str | None = None) -> str:
    """The text of a file: by its byte order mark, without one in `encoding` (default: UTF-8).

    Raises:
        UnusableTextError: bytes that this encoding does not have, NUL characters, or a Git LFS pointer.
    """
    if data.startswith(LFS_POINTER):
        raise UnusableTextError("is a Git LFS pointer: run `git lfs pull`")
    mark, name = next(((m, n) for m, n in _MARKS if data.startswith(m)), (b"", encoding or "utf-8"))
    body = data[len(mark) :]
    try:
        text = body.decode(name)
    except UnicodeError as error:
        at = error.start if isinstance(error, UnicodeDecodeError) else 0
        line = body[:at].decode(name, "replace").count("\n") + 1
        remedy = "it is corrupt" if mark else "name its encoding with --encoding, for example cp1252"
        found = f"bytes {body[at : at + 2].hex(' ')} in line {line}"
        raise UnusableTextError(f"is not {name.upper()}: {found}; {remedy}") from error
    if "\0" in text:
        raise UnusableTextError("holds NUL characters: if it is UTF-16, give --encoding utf-16-le")
    return text


def captions_of(value: Any) -> list[str]:
    """The captions that a value of a JSON table means: a text, a number (its text), a list of these, or none (null).

    Raises:
        UnusableTextError: an object, true or false, a number that is not finite, or one of these in a list.
    """
    if value is None:
        return []
    return [_text(item) for item in value] if isinstance(value, list) else [_text(value)]


def captions_of_cell(cell: str) -> list[str]:
    """The captions that a cell of a CSV or TSV table means: its text, or several if it is a JSON list.

    Raises:
        UnusableTextError: a list in another notation, or one with an item that is not text.
    """
    text = cell.strip()
    if text.startswith("[") and text.endswith("]"):
        try:
            value = parse_json(text)
        except ValueError:
            value = None
        if isinstance(value, list):
            return captions_of(value)
        if _LIST_LIKE.fullmatch(text):
            raise UnusableTextError('caption is a list that is not JSON: write ["…", "…"]')
    return [cell]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return str(value)
        raise UnusableTextError(f"caption is {value}".replace("nan", "NaN"))
    kind = {bool: "true or false", dict: "an object", list: "a list within a list"}.get(type(value), "null")
    raise UnusableTextError(f"caption is {kind}, not text")


def one_line(caption: str) -> tuple[str, bool]:
    """(the caption with every run of blanks as one space, whether there were line breaks or control characters in it).

    Raises:
        UnusableTextError: NUL characters, or halves of surrogate pairs, which no encoding has.
    """
    if "\0" in caption:
        raise UnusableTextError("caption holds NUL characters")
    if _HALVES.search(caption):
        raise UnusableTextError("caption holds halves of surrogate pairs")
    marked = _BREAKS.sub("\n", caption).strip()
    return " ".join(marked.split()), "\n" in marked


def readable(name: str) -> str:
    """A file name as it can be shown and stored: bytes that are not UTF-8 and control characters as escapes."""
    if _HALVES.search(name):
        # Python keeps bytes of a name that are not UTF-8 as such halves, U+DC80 to U+DCFF.
        own = all("\udc80" <= half <= "\udcff" for half in _HALVES.findall(name))
        encoded = name.encode("utf-8", "surrogateescape" if own else "backslashreplace")
        name = encoded.decode("utf-8", "backslashreplace")
    return _BREAKS.sub(lambda found: found[0].encode("unicode_escape").decode(), name)
