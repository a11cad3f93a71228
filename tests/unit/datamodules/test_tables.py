"""Captions and tables: encodings, values, quotes, numbers of fields; nothing is swallowed, cut or guessed."""

import codecs
import csv
import io
import json

import numpy as np
import pytest

from datamodules.prepare.captions import (
    UnusableTextError,
    captions_of,
    captions_of_cell,
    check_encoding,
    decode_text,
    one_line,
    readable,
)
from datamodules.prepare.tables import Row, TableError, coco_rows, table_rows
from switti.errors import UserError


def rows(text: str | bytes, suffix: str = ".csv", **options) -> list[Row]:
    data = text.encode() if isinstance(text, str) else text
    return list(table_rows(data, suffix, "file", "caption", **options))


def pairs(text: str | bytes, suffix: str = ".csv", **options) -> list[tuple[str, ...]]:
    return [(row.name, *row.captions) for row in rows(text, suffix, **options)]


def error(text: str | bytes, suffix: str = ".csv", **options) -> str:
    with pytest.raises(TableError) as caught:
        rows(text, suffix, **options)
    return str(caught.value)


# ---- encodings ---------------------------------------------------------------------------------------------------

WORDS = "ein „roter“ Kreis – 赤い円 🔴"


@pytest.mark.parametrize("name", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_the_byte_order_mark_decides(name: str) -> None:
    marks = {"utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE,
             "utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE}  # fmt: skip
    data = marks[name] + WORDS.encode(name)
    assert decode_text(data) == decode_text(data, "cp1252") == WORDS


def test_without_a_mark_it_is_utf_8_or_what_is_named() -> None:
    assert decode_text(WORDS.encode()) == WORDS
    smart = "the “smart” quote’s dash —"
    assert decode_text(smart.encode("cp1252"), "cp1252") == smart
    assert decode_text(WORDS.encode("utf-16-le"), "utf-16-le") == WORDS
    assert decode_text(b"") == ""


@pytest.mark.parametrize(
    "data, said",
    [
        ("zwei\nlinks “".encode("cp1252"), r"is not UTF-8: bytes 93 in line 2; .*--encoding"),
        ("red circle".encode("utf-16-le"), "NUL characters.*utf-16-le"),
        (codecs.BOM_UTF16_LE + b"a", "is not UTF-16-LE.*corrupt"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_what_cannot_be_decoded_is_said(data: bytes, said: str) -> None:
    with pytest.raises(UnusableTextError, match=said):
        decode_text(data)


def test_names_of_encodings_are_checked() -> None:
    for name in ("utf-8", "CP1252", "latin-1", "utf-16", "shift_jis", "gb18030"):
        check_encoding(name)
    for name in ("utf-9", "hex", "zlib", "rot13", ""):
        with pytest.raises(UserError, match="--encoding"):
            check_encoding(name)


# ---- captions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, expected",
    [
        ("a", ["a"]),
        (0, ["0"]),
        (1.5, ["1.5"]),
        (None, []),
        (["a", "b", 3], ["a", "b", "3"]),
        ([], []),
        ("", [""]),
    ],
)
def test_what_a_json_value_means(value: object, expected: list[str]) -> None:
    assert captions_of(value) == expected


@pytest.mark.parametrize(
    "value, said",
    [
        (float("nan"), "caption is NaN"), (float("inf"), "caption is inf"), (True, "true or false"),
        ({"a": 1}, "object"),
        (["a", ["b"]], "list within a list"), (["a", None], "null"), (["a", {}], "object"), ([float("nan")], "NaN"),
    ],
)  # fmt: skip
def test_what_is_not_a_caption_is_refused(value: object, said: str) -> None:
    with pytest.raises(UnusableTextError, match=said):
        captions_of(value)


def test_what_a_cell_means() -> None:
    assert captions_of_cell('["first", "second"]') == ["first", "second"]
    for text in ("0", "nan", "[untitled]", "[a] cat [b]", "", "{a}", '"quoted"'):
        assert captions_of_cell(text) == [text]
    for text in ("['first', 'second']", '["first", "second",]', '[{"a": 1}]'):
        with pytest.raises(UnusableTextError):
            captions_of_cell(text)


def test_captions_become_one_line() -> None:
    assert one_line("a  red\u00a0circle ") == ("a red circle", False)
    assert one_line("\na red\r\n circle\n") == ("a red circle", True)
    assert one_line("a\tred\x1b[31m circle\u2028\x85") == ("a red [31m circle", True)
    assert one_line("\ufeffred \ufeffcircle") == ("red circle", True)
    assert one_line("👩‍🚀 e\u0301") == ("👩‍🚀 e\u0301", False)
    for text, said in (("a\0b", "NUL"), ("a\ud83d", "surrogate")):
        with pytest.raises(UnusableTextError, match=said):
            one_line(text)


def test_names_can_be_shown_and_stored() -> None:
    for name, expected in [
        ("plain – ü.jpg", "plain – ü.jpg"), ("caf\udce9.jpg", "caf\\xe9.jpg"), ("a\x1b[2J\n.jpg", "a\\x1b[2J\\n.jpg"),
        ("\ud800.jpg", "\\ud800.jpg"), ("\ud800\udce9.jpg", "\\ud800\\udce9.jpg"),
    ]:  # fmt: skip
        assert readable(name) == expected
        readable(name).encode()


# ---- CSV and TSV ---------------------------------------------------------------------------------------------------


def test_separated_tables() -> None:
    expected = [("a.jpg", 'one, "two"'), ("b.jpg", "drei – ü")]
    text = 'file,caption\na.jpg,"one, ""two"""\nb.jpg,drei – ü\n'
    assert pairs(text) == expected
    assert pairs(text.replace("\n", "\r\n")) == pairs(text.replace("\n", "\r")) == expected
    assert pairs("\n\n" + text + "\n\n") == expected
    assert pairs(codecs.BOM_UTF8 + text.encode()) == expected
    assert pairs(codecs.BOM_UTF16_LE + text.encode("utf-16-le")) == expected
    assert pairs(text.encode("cp1252"), encoding="cp1252") == expected
    assert pairs("id\tcaption\tfile\n1\tone, two\ta.jpg\n", ".tsv") == [("a.jpg", "one, two")]
    assert pairs(' file , caption\na.jpg,["x", "y"]\n'.replace('["x", "y"]', '"[""x"", ""y""]"')) == [
        ("a.jpg", "x", "y")
    ]
    assert [row.where for row in rows('file,caption\na,"x\ny"\n\nb,z\n')] == ["line 2", "line 5"]


def test_another_number_of_fields_is_an_error_with_its_line() -> None:
    said = error("file,caption\na.jpg,a cat\nb.jpg,a cat, sitting, on a mat\n")
    assert said.startswith("line 3: 4 fields, but the header has 2") and "quotes" in said
    assert error("file,caption,id\na.jpg,a cat\n").startswith("line 2: 2 fields")
    assert "tab" in error("file\tcaption\na.jpg\ta\tb\n", ".tsv")


def whole(number: int) -> list[tuple[str, str]]:
    return [(f"a{i:03d}.jpg", f"caption {i}") for i in range(number)]


def table(entries: list[tuple[str, str]], order: tuple[int, int] = (0, 1)) -> str:
    lines = [("file", "caption"), *entries]
    return "".join(f"{line[order[0]]},{line[order[1]]}\n" for line in lines)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("opened", [0, 3, 10])
def test_an_unbalanced_quote_swallows_nothing_in_silence(order: tuple[int, int], opened: int) -> None:
    """One quote that opens, alone, with one that closes on any later row, and with later rows that are quoted."""
    entries = whole(12)
    entries[opened] = (entries[opened][0], f'"{entries[opened][1]}')
    assert f"line {opened + 2}" in error(table(entries, order))
    for closed in range(opened + 1, 12):
        broken = list(entries)
        broken[closed] = (broken[closed][0], f'{broken[closed][1]}"')
        assert f"line {opened + 2}" in error(table(broken, order)), closed
        broken[closed] = (broken[closed][0], f'"{whole(12)[closed][1]}"')
        assert f"line {opened + 2}" in error(table(broken, order)), closed


def test_names_without_an_ending_are_known_by_their_files() -> None:
    text = 'file,caption\n1,"one\n2,two"\n3,three\n'
    assert pairs(text) == [("1", "one\n2,two"), ("3", "three")]
    assert "line 2" in error(text, is_file=lambda name: name in {"1", "2", "3"})
    many = 'file,caption\n1,"one\n2,two\n3,three\n4,four"\n5,five\n'
    assert "line 2" in error(many)


def test_captions_of_several_lines_pass() -> None:
    entries = [
        ("a.jpg", "a cat, sitting\non a mat, purring\nsee b.jpg"),
        ("b.jpg", "1. one\n2. two\n\n3. three\n4.\n5."),
    ]
    stream = io.StringIO()
    csv.writer(stream).writerows([("file", "caption"), *entries])
    assert pairs(stream.getvalue()) == entries


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "empty"), ("\n \n", "no column 'file'"), ("path,text\n", "no column 'file'.*it has path, text"),
        ("file,caption,caption\n", "'caption' 2 times"), ('file,caption\na,"b"c\n', "line 2: .*twice"),
        ("file,caption\na," + "x" * 200_000 + "\n", "line 2: field larger"),
        ("file,caption\na,b\n".encode("utf-16-le"), "NUL"), (b"file,caption\na,\xe9\n", "line 2.*--encoding"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_trusted(text: str | bytes, said: str) -> None:
    data = text.encode() if isinstance(text, str) else text
    with pytest.raises(TableError, match=said):
        rows(data)


# ---- JSONL ----------------------------------------------------------------------------------------------------------


def test_json_lines() -> None:
    lines = [
        {"file": "a", "caption": ["x", "y"]},
        {"file": 7, "caption": 0},
        {"file": "c", "caption": None},
        {"file": "d"},
    ]
    text = "\n".join(map(json.dumps, lines))
    expected = [("a", "x", "y"), ("7", "0"), ("c",), ("d",)]
    assert pairs(text, ".jsonl") == pairs(text.replace("\n", "\r\n\r\n"), ".jsonl") == expected
    assert pairs(codecs.BOM_UTF16_BE + text.encode("utf-16-be"), ".jsonl") == expected


def test_json_rows_that_cannot_be_meant_are_named_by_their_line() -> None:
    text = '{"file": "a", "caption": NaN}\n\n{"file": "b", "caption": {"x": 1}}\n'
    text += '{"file": true, "caption": "c"}\n{"file": "d", "caption": "d"}'
    found = rows(text, ".jsonl")
    assert [(row.where, row.problem) for row in found] == [
        ("line 1", "caption is NaN"), ("line 3", "caption is an object, not text"),
        ("line 4", "file is not a name: true"), ("line 5", ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "empty"), ("[1]", "line 1: not a JSON object"), ("[" * 100_000, "line 1: not JSON"),
        ('{"file": "a", "caption": "b"}\n{"file": ', "line 2: not JSON"),
        ('{"path": "a", "caption": "b"}', "no column 'file'.*it has path, caption"),
        ('{"file": ' + "9" * 5000 + ', "caption": "b"}', "line 1: not JSON"),
    ],
)  # fmt: skip
def test_json_tables_that_cannot_be_trusted(text: str, said: str) -> None:
    with pytest.raises(TableError, match=said):
        rows(text, ".jsonl")


# ---- COCO -----------------------------------------------------------------------------------------------------------

COCO = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": "x", "file_name": "b.jpg"}, {"id": 1, "file_name": "c.jpg"}],
    "annotations": [
        {"image_id": 1, "caption": "one"}, {"image_id": 1, "caption": "uno"}, {"image_id": 9, "caption": "lost"},
        {"image_id": "x", "caption": {"a": 1}}, {"image_id": "x", "caption": 0},
    ],
}  # fmt: skip


def test_coco() -> None:
    text = json.dumps(COCO).encode()
    found = list(coco_rows(text))
    assert found == list(coco_rows(codecs.BOM_UTF8 + text))
    good = [(row.name, *row.captions) for row in found if not row.problem]
    assert good == [("a.jpg", "one", "uno"), ("b.jpg", "0")]
    assert {row.where: row.problem for row in found if row.problem} == {
        "images[2]": "id is used twice: 1", "annotations[2]": "no image of this id: 9",
        "annotations[3]": "caption is an object, not text",
    }  # fmt: skip


@pytest.mark.parametrize(
    "content, said",
    [
        ([], "no list 'images'"), ({"images": []}, "no list 'annotations'"),
        ({"images": [3], "annotations": []}, r"images\[0\] has no 'id'"),
        ({"images": [{"id": []}], "annotations": []}, r"images\[0\] has a list as 'id'"),
        ({"images": [], "annotations": [{"image_id": 1, "bbox": []}]}, ""),
        ({"images": [{"id": 1, "file_name": {}}], "annotations": []}, "dict as 'file_name'"),
    ],
)  # fmt: skip
def test_what_is_not_a_coco_captions_file(content: object, said: str) -> None:
    if said:
        with pytest.raises(TableError, match=said):
            list(coco_rows(json.dumps(content).encode()))
    with pytest.raises(TableError):
        list(coco_rows(b"{"))


# ---- hostile bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
def test_damaged_tables_give_rows_or_an_error_and_nothing_else(suffix: str) -> None:
    random = np.random.default_rng(3)
    texts = {
        ".csv": 'file,caption\na.jpg,"x ""y"", z"\nb.jpg,"[""u"", ""v""]"\n',
        ".tsv": "file\tcaption\na.jpg\tx\n",
        ".jsonl": '{"file": "a", "caption": ["x", 1.5]}\n{"file": "b", "caption": null}\n',
        ".json": json.dumps(COCO),
    }
    pieces = [
        b'"',
        b",",
        b"\n",
        b"\r",
        b"\0",
        b"[",
        b"]",
        b"{",
        b"}",
        b"\xff\xfe",
        b"NaN",
        b"\\ud800",
        b"1e999",
        b"\t",
    ]
    for _ in range(500):
        data = bytearray(texts[suffix].encode())
        for _ in range(random.integers(1, 5)):
            at = random.integers(len(data) + 1)
            data[at : at + random.integers(3)] = pieces[random.integers(len(pieces))]
        try:
            found = list(coco_rows(bytes(data))) if suffix == ".json" else rows(bytes(data), suffix)
        except TableError:
            continue
        for row in found:
            assert isinstance(row.name, str) and all(isinstance(caption, str) for caption in row.captions)
