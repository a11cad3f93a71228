"""A plan for several ranks against ranks that really train."""

import json
from pathlib import Path

import pytest
from launching import finish, start

from benchmarks.cost_model.simulated_step import simulate_step
from configs.loading import load

pytestmark = pytest.mark.distributed
CASE = Path(__file__).parent / "plan_case.py"


@pytest.mark.parametrize(
    "more", [[], ["trainer.checkpointing=true", "trainer.accumulate=2"]], ids=["plain", "both"]
)
def test_memory_of_two_sharding_ranks(tmp_path: Path, more: list[str]) -> None:
    settings = [
        "trainer.strategy=fsdp", "trainer.devices=2", "data.batch_size=32", "model.width=384", "model.heads=6", *more,
    ]  # fmt: skip
    program = [str(CASE), str(tmp_path), "generator/demo", *settings]
    for code, output in finish(start(program, ranks=2), seconds=300):
        assert code == 0, output
    planned = simulate_step(load("generator/demo", settings), bool(more), "auto").peak
    for rank in range(2):
        real = json.loads((tmp_path / f"{rank}.json").read_text())
        assert real == pytest.approx(planned, rel=0.1)
