"""Hostile text stays text: on a terminal, in a spreadsheet, in Markdown (read by an independent parser)."""

import csv
import io

import pytest

from switti.escape import markdown_code, markdown_text, printable, spreadsheet_cell

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](https://example.org)",
    "![image](https://example.org/x.png)",
    "[click][1] and [1]: https://example.org",
    "[1]: https://example.org",
    "<https://example.org> and https://example.org and www.example.org",
    "a | b || c",
    "*bold* _italic_ **both** __both__ ~~gone~~",
    "`code` ``more`` ```",
    "line\n\n# heading\r\n- item\n> quotation\n\n    code",
    "# heading",
    "1. first",
    "2) second",
    "- item",
    "+ item",
    "> quotation",
    "=====",
    "---",
    "&lt;b&gt; &amp; &#60;",
    "\\<b> \\\\[x](y)",
    "$x^2$",
    "]( https://example.org) ![",
    "    indented",
    "<!-- comment",
    "</td></tr>",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_text_as_it_is(text: str) -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    wanted = " ".join(printable(text).split())
    for place in (
        markdown_text(text, paragraph=True),
        f"start {markdown_text(text)} end",
        f"| a | b |\n|---|---|\n| {markdown_text(text)} | x |",
    ):
        tokens = [token for block in parser.parse(place) for token in (block, *(block.children or []))]
        kinds = {token.type for token in tokens if token.type not in ("text", "inline", "text_special")}
        assert all(
            kind.startswith(("paragraph_", "table_", "thead_", "tbody_", "tr_", "th_", "td_"))
            for kind in kinds
        ), kinds
        shown = " ".join("".join(t.content for t in tokens if t.type in ("text", "text_special")).split())
        assert wanted in shown
        assert sum(token.type == "td_open" for token in tokens) in (0, 2)


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_code_shows_text_as_it_is(text: str) -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    (inline,) = [token for token in parser.parse(f"x {markdown_code(text)} x") if token.type == "inline"]
    codes = [token.content for token in inline.children if token.type == "code_inline"]
    assert [" ".join(code.split()) for code in codes] == [" ".join(printable(text).split())]


FORMULAS = [
    "=1+1", "=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\x1b[0m=1", "＝1", "-", "+a",
]  # fmt: skip


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_get_an_apostrophe(text: str) -> None:
    stream = io.StringIO()
    csv.writer(stream).writerow([spreadsheet_cell(text)])
    (cell,) = next(csv.reader([stream.getvalue().rstrip("\r\n")]))
    assert cell == "'" + printable(text)


@pytest.mark.parametrize(
    "value", [-1.5, 3, None, True, "-1.5", "+2e-3", "-inf", "a=b", "red apple", "", "1-2", "emoji 👩‍💻 é"]
)
def test_numbers_and_plain_text_stay(value: object) -> None:
    assert spreadsheet_cell(value) == value


def test_printable() -> None:
    assert printable("a\x1b[31mred\x1b[0m\x1b]0;title\x07b\x1b]8;;https://x\x1b\\c") == "aredbc"
    assert printable("one\r\n two\tthree\u2028four") == "one  two three four"
    assert printable("\x00\x07\x9b31m\x7f") == "\ufffd\ufffd\ufffd"
    assert printable(b"caf\xe9".decode("utf-8", "surrogateescape")) == "caf\ufffd"
    assert printable("abc\u202egnp.exe") == "abc\ufffdgnp.exe"
    assert printable("naïve – 漢字 👩‍💻") == "naïve – 漢字 👩‍💻"
