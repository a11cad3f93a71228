"""Text from files and people, made safe to show: on a terminal, in a spreadsheet, in Markdown."""

import re
import unicodedata
from typing import Any

# ECMA-48 control sequences: CSI …, OSC … (ended by BEL or ST), and the two-character ones.
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?|\x1b[ -~]"
)
_SPACES = re.compile(r"[\t\n\r\v\f\x85\u2028\u2029]+")
_HIDDEN = {"Cc", "Cs"}  # control characters and bytes of a file name that are not text
_DIRECTIONS = set(
    "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)  # they reorder what follows
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")
_PUNCTUATION = re.compile(
    r"[\\`*<>&|~$]"
    r"|\](?=[(\[:])"  # brackets alone are text
    r"|(?<![^\W_])_|_(?![^\W_])"  # so is an underscore within a word
    r"|(?<=[a-z]):(?=//)|(?<=www)\.",  # bare addresses become links on GitHub
    re.IGNORECASE,
)
_LINE_START = re.compile(r"^(?P<number>\d*)(?P<mark>(?<!\d)[-+#=]|(?<=\d)[.)])")


def printable(text: str) -> str:
    """One line without control characters, escape sequences and marks that reorder text; what is not text is U+FFFD."""
    if text.isascii() and text.isprintable():
        return text
    line = _SPACES.sub(" ", _SEQUENCE.sub("", text))
    return "".join("\ufffd" if _is_hidden(character) else character for character in line)


def _is_hidden(character: str) -> bool:
    return character in _DIRECTIONS or unicodedata.category(character) in _HIDDEN


def spreadsheet_cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: text that begins like one gets an apostrophe. Numbers stay."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    if not (value.startswith(_FORMULA) or text.startswith(_FORMULA)) or _is_number(text):
        return text
    return f"'{text}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def markdown_text(text: str, paragraph: bool = False) -> str:
    """Text that Markdown shows as it is: no tags, links, emphasis, code or table cells come of it.

    paragraph: it begins a line, where a number or a mark would make it a heading, a list or a quotation.
    """
    escaped = _PUNCTUATION.sub(r"\\\g<0>", printable(text))
    if not paragraph:
        return escaped
    return _LINE_START.sub(r"\g<number>\\\g<mark>", escaped.lstrip(), count=1)


def markdown_code(text: str) -> str:
    """Text as inline code, whatever backticks it holds."""
    line = printable(text)
    longest = max((len(run) for run in re.findall(r"`+", line)), default=0)
    fence, pad = "`" * (longest + 1), " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}" if line else ""
