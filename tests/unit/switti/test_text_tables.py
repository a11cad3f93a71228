"""Aligned columns, CSV files and the first line of an error."""

import csv
from pathlib import Path

from switti.errors import first_line
from switti.tables import aligned, write_csv


def test_words_are_aligned_left_and_numbers_right() -> None:
    rows = [["metric", "a", "value b"], ["psnr", "21.5", "3"]]
    assert aligned(rows) == ["metric     a  value b", "psnr    21.5        3"]
    assert aligned([["a", "x"], ["bcd", "y"]], left=2) == ["a    x", "bcd  y"]


def test_csv_files_keep_digits_and_neutralize_formulas(tmp_path: Path) -> None:
    write_csv(tmp_path / "table.csv", [["name", "value"], ["=1+1", 0.1], [None, 1e-17]])
    with (tmp_path / "table.csv").open(newline="") as stream:
        assert list(csv.reader(stream)) == [["name", "value"], ["'=1+1", "0.1"], ["", "1e-17"]]


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("\n broken \n and a page of advice")) == "broken "
    assert first_line(KeyError()) == "KeyError"
