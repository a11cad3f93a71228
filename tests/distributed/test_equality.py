"""One global batch, one loss curve: DDP and FSDP2 over 1, 2 and 4 ranks against a single process, in float32.

The reference is a run without any distribution. What is compared is everything that is logged, at every step, and
the final weights with their average.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_cases
from rank_cases import train

VARIANTS = ("causal", "non_causal")
TOLERANCE = 1e-5


def case(name: str, variant: str, **trainer: Any) -> dict[str, Any]:
    return {"name": f"{name}_{variant}", "visibility": variant, "trainer": trainer}


def matrix(**fixed: Any) -> list[dict[str, Any]]:
    """With and without accumulation and checkpointing, in both variants."""
    options: list[dict[str, Any]] = [
        {}, {"accumulate": 2}, {"checkpointing": True}, {"accumulate": 2, "checkpointing": True},
    ]  # fmt: skip
    return [
        case("_".join([str(value) for value in fixed.values()] + sorted(chosen)), variant, **fixed, **chosen)
        for chosen in options
        for variant in VARIANTS
    ]


EVERYTHING: dict[str, Any] = {"strategy": "fsdp", "accumulate": 2, "checkpointing": True, "compile": True}
LAUNCHES = {
    "1 process": (1, 1, matrix(strategy="fsdp")),
    "2 ranks": (2, 1, [*matrix(strategy="ddp"), *matrix(strategy="fsdp")]),
    "2 ranks, compiled": (
        2, 1, [case("ddp", "causal", strategy="ddp", compile=True), *(case("all", v, **EVERYTHING) for v in VARIANTS)]
    ),
    "4 ranks": (4, 1, [*matrix(strategy="fsdp", sharding_size=2), *matrix(strategy="fsdp"), *matrix(strategy="ddp")]),
    "4 ranks, compiled": (4, 1, [case("all", v, **EVERYTHING, sharding_size=2) for v in VARIANTS]),
    "2 nodes of 1": (1, 2, [*matrix(strategy="fsdp"), *(case("ddp", v, strategy="ddp") for v in VARIANTS)]),
    "2 nodes of 2": (2, 2, matrix(strategy="fsdp", sharding_size=2)),
}  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """20 steps of each variant in a single process."""
    found = run_cases([case("single", v) for v in VARIANTS], tmp_path_factory.mktemp("single"), ranks=1)
    assert (
        found["single_causal"]["logged"]["train/loss"] != found["single_non_causal"]["logged"]["train/loss"]
    )
    return {variant: found[f"single_{variant}"] for variant in VARIANTS}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["logged"].keys() == expected["logged"].keys()
    for name, values in expected["logged"].items():
        torch.testing.assert_close(
            torch.tensor(found["logged"][name]), torch.tensor(values), rtol=TOLERANCE, atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=TOLERANCE, atol=2e-6)


def check_shares(found: dict[str, Any], ranks: int, sharding: int) -> None:
    """Each rank holds its share of what is trained, rounded up a little, and the whole frozen tokenizer."""
    for local in found["local_parameters"]:
        assert found["parameters"] / sharding <= local * 1.1 <= 1.2 * found["parameters"] / sharding
    assert len(found["local_parameters"]) == ranks
    assert found["tokenizer_parameters"] == 236475


@pytest.mark.distributed
@pytest.mark.parametrize("launch", LAUNCHES)
def test_same_curve_and_weights_as_one_process(
    launch: str, reference: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    ranks, nodes, cases = LAUNCHES[launch]
    for name, found in run_cases(cases, tmp_path, ranks, nodes, seconds=1800).items():
        trainer = next(c for c in cases if c["name"] == name)["trainer"]
        compare(found, reference["non_causal" if "non_causal" in name else "causal"])
        if trainer["strategy"] == "fsdp":
            check_shares(found, ranks * nodes, trainer.get("sharding_size") or ranks * nodes)


@pytest.mark.distributed
def test_bfloat16_stays_close_to_one_process(tmp_path: Path) -> None:
    """Weights are gathered in bfloat16, gradients reduced in float32: the curve differs by roundings only."""
    single = [{**case("single", v, precision="bf16-mixed")} for v in VARIANTS]
    sharded = [case("fsdp", v, strategy="fsdp", precision="bf16-mixed") for v in VARIANTS]
    expected = run_cases(single, tmp_path / "single", ranks=1)
    found = run_cases(sharded, tmp_path / "fsdp", ranks=2)
    for variant in VARIANTS:
        a, b = (
            torch.tensor(runs[f"{name}_{variant}"]["logged"]["train/loss"])
            for name, runs in (("single", expected), ("fsdp", found))
        )
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=3e-3, atol=0)


def test_two_ranks_in_short(tmp_path: Path) -> None:
    """Sharded, with micro-batches and recomputed activations, and metrics measured on pictures of both ranks."""
    short = {"steps": 4, "metrics": 4}
    train({**case("single", "causal"), **short}, tmp_path)
    single = torch.load(tmp_path / "single_causal.pt", weights_only=True)
    options = {"strategy": "fsdp", "accumulate": 2, "checkpointing": True}
    found = run_cases([{**case("fsdp", "causal", **options), **short}], tmp_path, ranks=2)
    compare(found["fsdp_causal"], single)
    check_shares(found["fsdp_causal"], ranks=2, sharding=2)
    assert {"metrics/fid_alexnet", "metrics/kid_alexnet"} <= found["fsdp_causal"]["logged"].keys()
    assert found["fsdp_causal"]["keys"][0] != found["fsdp_causal"]["keys"][1]
