"""FSDP2 on one and on several devices: gloo on a CPU, NCCL on as many GPUs as there are.

The reference is one process without distribution on the same kind of device.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_cases

pytest.importorskip("lightning", reason="training needs the package lightning")

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.distributed),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
SHORT = {"steps": 6, "validate": 3}


def case(name: str, visibility: str, **trainer: Any) -> dict[str, Any]:
    return {"name": f"{name}_{visibility}", "visibility": visibility, "trainer": trainer, **SHORT}


def enough(device: str, ranks: int) -> None:
    if device == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, there is {torch.cuda.device_count()}")


def close(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert actual["logged"].keys() == expected["logged"].keys()
    for name in ("train/loss", "train/gradient_norm", "validation/loss"):
        torch.testing.assert_close(
            torch.tensor(actual["logged"][name]),
            torch.tensor(expected["logged"][name]),
            rtol=tolerance,
            atol=0,
        )
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(
            actual["weights"][name], weight, rtol=0, atol=0.01 * weight.abs().amax().item() + 1e-6
        )


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("device", DEVICES)
def test_sharded_training_is_that_of_one_process(device: str, ranks: int, tmp_path: Path) -> None:
    """In float32, with and without accumulation; sharded over all ranks and, of four, over two."""
    if device == "cpu" and ranks == 4:
        pytest.skip("test_equality.py runs four ranks on the CPU")
    enough(device, ranks)
    sizes = {ranks, max(1, ranks // 2)}
    sharded = [
        case(f"fsdp{size}x{accumulate}", visibility, strategy="fsdp", sharding_size=size, accumulate=accumulate)
        for size in sizes
        for accumulate, visibility in ((1, "causal"), (2, "non_causal"))
    ]  # fmt: skip
    single = [case("single", visibility) for visibility in ("causal", "non_causal")]
    expected = run_cases(single, tmp_path / "single", ranks=1, device=device)
    actual = run_cases(sharded, tmp_path / "sharded", ranks=ranks, device=device)
    for name, run in actual.items():
        close(run, expected[f"single_{name.split('_', 1)[1]}"], 1e-4 if device == "cpu" else 2e-3)
        assert len(run["local_parameters"]) == ranks
        size = int(name.split("fsdp")[1].split("x")[0])
        assert max(run["local_parameters"]) <= 1.2 * run["parameters"] / size


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("device", DEVICES)
def test_a_sharded_run_resumes(device: str, ranks: int, tmp_path: Path) -> None:
    """From a sharded checkpoint, in bfloat16; to the last bit on a CPU, where sums have one order."""
    enough(device, ranks)
    options = {"strategy": "fsdp", "precision": "bf16-mixed"}
    full = {**case("full", "causal", **options), "save": 3}
    parts = {"folder": "parts", "save": 3}
    first = {**case("first", "causal", **options), **parts, "stop_after": 3}
    second = {**case("second", "causal", **options), **parts, "resume": True}
    runs = run_cases([full, first, second], tmp_path, ranks=ranks, device=device)
    for name, weight in runs["full_causal"]["weights"].items():
        resumed = runs["second_causal"]["weights"][name]
        if device == "cpu":
            assert torch.equal(resumed, weight), name
        else:
            torch.testing.assert_close(resumed, weight, rtol=0, atol=0.02 * weight.abs().amax().item() + 1e-6)
