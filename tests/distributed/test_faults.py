"""Faults that one of two ranks meets alone: both answer alike, and nothing waits for ever."""

import json
from pathlib import Path

import pytest
from data_shards import make_set
from launching import finish, start

pytestmark = pytest.mark.distributed
PROGRAM = str(Path(__file__).parent / "fault_cases.py")


def run(out: Path, *cases: str, seconds: float = 300) -> tuple[int, str]:
    """(exit code of torchrun, output of all)."""
    return finish(start([PROGRAM, str(out), *cases], ranks=2), seconds)[0]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faults")
    make_set(out, [4, 3, 5], damaged=("s0n1", "s1n2", "s2n4"))
    make_set(out, [2], "validation")
    return out


@pytest.fixture(scope="module")
def answered(shards: Path) -> Path:
    """Cases after which the ranks go on."""
    code, output = run(shards, "ddp", "fsdp", "damage")
    assert code == 0, output
    return shards


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_loss_that_is_no_number_on_one_rank_is_skipped_by_both(answered: Path, strategy: str) -> None:
    found = json.loads((answered / f"{strategy}.json").read_text())
    assert found["skipped"] == [[False, False, True, False, False]] * 2
    assert (
        found["same"] == [[False, True, False, False]] * 2
    )  # weights, average and moments, against the step before
    assert found["finite"] == [True, True] and found["counted"] == [1.0]


def test_damage_is_summed_over_ranks_and_workers(answered: Path) -> None:
    found = json.loads((answered / "damage.json").read_text())
    assert found["totals"] == [{"undecodable_picture": 6}] * 2  # three of them, two epochs
    assert found["logged"]["data/bad/undecodable_picture"][-1] == 6.0
    assert found["read"] == 24
    keys = [key for part in found["keys"] for key in part]
    assert len(keys) == 24 and len(set(keys)) == 9
    listed = (answered / "damaged.csv").read_text().splitlines()
    assert len(listed) == 4 and all("not an image" in line for line in listed[1:])


def test_too_much_damage_ends_both_with_the_list(shards: Path, answered: Path) -> None:
    code, output = run(shards, "too_much")
    assert code == 1
    assert output.count("UserError: ") >= 2 and "more than data.max_bad_fraction=0.0: train-00000" in output


def test_a_signal_to_one_rank_stops_both_and_the_rest_follows(tmp_path: Path) -> None:
    code, output = run(tmp_path, "signal")
    assert code == 1, output  # torchrun's; its summary holds the workers' own
    assert "exitcode  : 75" in output
    assert json.loads((tmp_path / "signal" / "preempted.json").read_text())["step"] == 4
    code, output = run(tmp_path, "signal")
    assert code == 0, output
    found = json.loads((tmp_path / "signal.json").read_text())
    assert found["from"].endswith("step_000004.ckpt") and len(found["losses"]) == 4
    assert not (tmp_path / "signal" / "preempted.json").exists()


def test_a_rank_that_hangs_is_shown_by_all(tmp_path: Path) -> None:
    code, output = run(tmp_path, "hang", seconds=120)
    assert code == 1 and "exitcode  : 76" in output
    assert "rank 1 (" in output and "step 3, forward for" in output
    assert "fault_cases.py" in output and "in <lambda>" in output  # the sleeper's own stack
    assert "rank 0, Python stacks:" in output and "rank 1, Python stacks:" in output
    assert (tmp_path / "heartbeat" / "hung").exists()
