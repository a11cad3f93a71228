"""Folders of golden numbers: early stopping as published, and proof that the command sees one wrong number."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.parity.folder import compare
from experiments.parity import main

FOLDER = Path(__file__).parents[1] / "data" / "parity_dvar"
Content = dict[str, Any]


def test_stops_and_ratios_are_those_of_the_published_code() -> None:
    golden = compare(FOLDER)
    assert [f"{check.quantity}: {check.deviation}" for check in golden.failed] == []
    assert (golden.absent, golden.blocked) == ({}, [])
    assert len(golden.checks) > 1000


def _later_stop(content: Content) -> str:
    case = content["cases"][0]
    case["stop_evaluation"] += 1
    return f"stop_evaluation.{case['history']}.{case['window']}.{case['threshold']}: is {case['stop_evaluation']} in"


def _other_ratio(content: Content) -> str:
    case = content["cases"][0]
    number = next(number for number, ratio in case["ratio_at"].items() if 0 < ratio < 1)
    case["ratio_at"][number] *= 1 + 1e-11
    return f"ratio.{case['history']}.{case['window']}.{case['threshold']}.{number}: 1.000e-11 > 1.0e-12"


def _number_for_nan(content: Content) -> str:
    case = next(case for case in content["cases"] if case["history"] == "nan_inside")
    number = next(number for number, ratio in case["ratio_at"].items() if ratio is None)
    case["ratio_at"][number] = 0.5
    return f"ratio.nan_inside.{case['window']}.{case['threshold']}.{number}: is 0.5 in the folder, nan here"


def _never(content: Content) -> str:
    case = next(case for case in content["clip"] if case["stop_evaluation"] is not None)
    case["stop_evaluation"] = None
    return f"stop_evaluation.clip.{case['name']}.{case['eps']}.{case['patience']}: is None in the folder"


def _other_slope(content: Content) -> str:
    content["other_criteria"]["at"]["51"]["trend"] *= 1 + 1e-6
    return "trend.51: "


@pytest.mark.parametrize("change", [_later_stop, _other_ratio, _number_for_nan, _never, _other_slope])
def test_the_command_names_the_one_number_that_is_wrong(
    change: Callable[[Content], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((FOLDER / "golden.json").read_text())
    expected = change(content)
    (tmp_path / "golden.json").write_text(json.dumps(content))
    assert main([str(tmp_path)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1 and failed[0].startswith(f"failed: {expected}")


def test_absent_numbers_are_named_and_the_others_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((FOLDER / "golden.json").read_text())
    del content["other_criteria"], content["cases"][3]["stop_evaluation"]
    (tmp_path / "golden.json").write_text(json.dumps(content))
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "absent from golden.json: 2: cases.3.stop_evaluation, other_criteria" in printed
