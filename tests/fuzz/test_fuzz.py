"""The fuzz campaign finds planted faults, and finds none in the product in a few hundred mutations."""

import json
import random
from collections import Counter
from pathlib import Path

import fuzz_mutations
import pytest
from fuzz_campaign import describe, make_case, run_campaign
from fuzz_planted import TARGETS as PLANTED
from fuzz_targets import TARGETS

QUICK = tuple(TARGETS)


def test_every_kind_of_planted_fault_is_found_and_its_input_kept(tmp_path: Path) -> None:
    summary = run_campaign(
        list(PLANTED), seed=3, keep=tmp_path, seconds=100, count=200, patience=3.0, module="fuzz_planted"
    )
    kinds = Counter((failure.target, failure.kind) for failure in summary.failures)
    found = {
        ("traceback", "traceback"), ("wordy", "traceback"), ("hang", "hang"), ("crash", "crash"),
        ("execution", "executed code"), ("silent", "silent acceptance"), ("broken", "setup"),
    }  # fmt: skip
    assert set(kinds) == found
    assert summary.cases["sound"] == 25 and 0 < summary.refused["sound"] < 25
    assert kinds["silent", "silent acceptance"] == kinds["execution", "executed code"] == 25
    kept = [failure for failure in summary.failures if failure.kept and failure.target == "hang"]
    value = int((Path(kept[0].kept) / "input" / "input").read_text())
    assert value % 10 == 0 and json.loads((Path(kept[0].kept) / "failure.json").read_text())["seed"] == 3
    assert any("hang in hang" in line for line in describe(summary))


def test_a_case_follows_from_seed_target_and_number(tmp_path: Path) -> None:
    target = PLANTED["sound"]()
    contents = []
    for seed, number in ((1, 5), (1, 5), (2, 5), (1, 6)):
        make_case(target, seed, number, tmp_path / "case")
        contents.append((tmp_path / "case" / "input").read_text())
    assert contents[0] == contents[1] and len(set(contents)) == 3


@pytest.mark.parametrize("seed", range(30))
def test_mutations_give_bytes_whatever_is_mutated(seed: int) -> None:
    chance = random.Random(seed)
    tree = {"a": [1, {"b": None}], "c": "x", "d": 2.5}
    for _ in range(20):
        assert isinstance(fuzz_mutations.mutate_json(chance, tree), bytes)
        assert isinstance(fuzz_mutations.mutate_text(chance, "a,b\nc,d\n"), bytes)
        assert isinstance(fuzz_mutations.mutate_bytes(chance, b"", (b"x",)), bytes)
    assert tree == {"a": [1, {"b": None}], "c": "x", "d": 2.5}


def test_a_few_hundred_mutations_of_everything_that_is_read(tmp_path: Path) -> None:
    summary = run_campaign(QUICK, seed=1, keep=tmp_path, seconds=90, count=16 * len(QUICK), patience=20.0)
    assert summary.total > 0
    assert not summary.failures, "\n".join(describe(summary))
