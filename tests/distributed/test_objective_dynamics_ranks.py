"""Early stopping over several ranks: all stop at the step of a single process, also when another number resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_cases
from rank_cases import train

pytestmark = pytest.mark.distributed

# Of 60 steps. The ratio passes the threshold by far more than the ranks' rounding.
DYNAMICS = {"window": 6, "threshold": 0.5}
DECODER: dict[str, Any] = {
    "task": "decoder", "loss": {}, "double": True, "dynamics": {"window": 4, "threshold": 0.15}
}  # fmt: skip


def case(name: str, strategy: str = "auto", **options: Any) -> dict[str, Any]:
    trainer = {"strategy": strategy, **options.pop("trainer", {})}
    return {"name": name, "steps": 60, "validate": 30, "dynamics": DYNAMICS, "trainer": trainer} | options


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[float], dict[str, Any], int]]:
    """History, stop and last step of a run without any distribution."""
    folder = tmp_path_factory.mktemp("single")
    found = {}
    for entry in (case("generator"), case("decoder", **DECODER)):
        train(entry, folder)
        (found[entry["name"]],) = torch.load(folder / f"{entry['name']}.pt", weights_only=True)["dynamics"]
    return found


def compare(found: list[Any], expected: tuple[list[float], dict[str, Any], int], ranks: int) -> None:
    """All ranks have the same history to the last bit, and stop at the step of the single process."""
    assert len(found) == ranks and all(rank == found[0] for rank in found)
    history, stopped, step = found[0]
    assert 6 < step < 60 and step == expected[2] == stopped["step"] == expected[1]["step"]
    assert history == pytest.approx(expected[0], rel=1e-5)
    assert stopped["ratio"] == pytest.approx(expected[1]["ratio"], rel=1e-3)


def test_two_ranks_stop_where_one_process_does(tmp_path: Path, single: dict[str, Any]) -> None:
    cases = [
        case("ddp", "ddp"), case("fsdp", "fsdp"),
        case("decoder_ddp", "ddp", **DECODER), case("decoder_fsdp", "fsdp", **DECODER),
    ]  # fmt: skip
    found = run_cases(cases, tmp_path, ranks=2)
    for name, content in found.items():
        compare(content["dynamics"], single["decoder" if "decoder" in name else "generator"], ranks=2)


def test_another_number_of_ranks_resumes_the_history(tmp_path: Path, single: dict[str, Any]) -> None:
    run_cases([case("first", "fsdp", folder="run", save=4, stop_after=5)], tmp_path, ranks=2)
    train(case("rest", folder="run", save=4, resume=True), tmp_path)
    compare(torch.load(tmp_path / "rest.pt", weights_only=True)["dynamics"], single["generator"], ranks=1)
    (found,) = run_cases(
        [case("again", "fsdp", folder="run", save=4, resume=True)], tmp_path, ranks=2
    ).values()
    compare(found["dynamics"], single["generator"], ranks=2)
