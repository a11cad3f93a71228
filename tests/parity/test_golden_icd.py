"""Invertible consistency distillation against golden tensors of the released code, and proof that the comparison can
fail."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.parity.common import Golden
from benchmarks.parity.folder import compare
from experiments.parity import main

FOLDER = Path(__file__).parents[1] / "data" / "parity_icd"
META: dict[str, Any] = json.loads((FOLDER / "meta.json").read_text())
UNET = ("unet", "editing")
# Gradients of the UNet that the tests' copy leaves out.
ABSENT = {"unet.losses.safetensors"}


def failures(golden: Golden) -> list[str]:
    return [f"{c.quantity}: {c.deviation:.2e} > {c.tolerance:.0e} {c.reason}" for c in golden.failed]


def parts(*names: str) -> dict[str, Any]:
    """Settings with these of the folder's parts alone."""
    others = {"wt_cases", "loss_cases", "training", "trajectories", "controllers", *UNET} - {*names}
    return {key: value for key, value in META.items() if key not in others}


def test_functions_losses_training_trajectories_and_attention_are_the_released_codes() -> None:
    golden = compare(FOLDER, {key: value for key, value in META.items() if key not in UNET})
    assert failures(golden) == []
    assert (golden.blocked, golden.unknown) == ([], {})
    assert golden.absent == {"meta.json": list(UNET)}
    assert len(golden.checks) > 500


@pytest.mark.slow
def test_a_unet_with_two_adapters_meets_the_released_codes_losses_and_edits() -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    golden = compare(FOLDER, parts(*UNET))
    assert failures(golden) == []
    assert (golden.blocked, golden.unknown) == ([], {})
    assert set(golden.absent) == ABSENT | {"meta.json"}
    names = {check.quantity for check in golden.checks}
    assert {"icd.editing.replace_blend", "icd.unet.reverse/pred", "icd.unet.forward_preserve/loss"} <= names


@pytest.mark.parametrize(
    ("part", "file", "key", "quantity"),
    [
        ("wt_cases", "functions", "origin/f64/out", "icd.functions.origin/f64/out"),
        ("wt_cases", "functions", "wemb/512", "icd.functions.wemb/512"),
        ("solver_configs", "schedule", "r4/ddim_alpha_cumprods", "icd.schedule.r4/ddim_alpha_cumprods"),
        ("loss_cases", "tiny.losses", "embed_r4/reverse/x_next", "icd.tiny.embed_r4/reverse/x_next"),
        ("loss_cases", "tiny.losses", "cfg_r4/reverse/loss", "icd.tiny.cfg_r4/reverse/loss"),
        (
            "loss_cases",
            "tiny.losses",
            "embed_r4f2/reverse_preserve/grad/conv1_weight",
            "icd.tiny.embed_r4f2/reverse_preserve/grad/conv1_weight",
        ),
        ("training", "tiny.training", "after/forward/skip", "icd.training.after/forward/skip"),
        (
            "trajectories",
            "tiny.trajectories",
            "xl4_tau07/xl_source_first",
            "icd.trajectories.xl4_tau07/xl_source_first",
        ),
        ("controllers", "attention", "map/replace3", "icd.attention.map/replace3"),
        ("controllers", "attention", "ctrl/replace3/self_out_0", "icd.attention.ctrl/replace3/self_out_0"),
        ("controllers", "attention", "blend/out_subtract", "icd.attention.blend/out_subtract"),
    ],
)
def test_the_command_names_the_one_tensor_that_is_wrong(
    part: str, file: str, key: str, quantity: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Off by 1 %."""
    for path in FOLDER.glob("*.safetensors"):
        (tmp_path / path.name).symlink_to(path)
    # The kind of a folder follows from its parts, of which the schedule is quick.
    meta = parts(part)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    tensors = load_file(FOLDER / f"{file}.safetensors")
    tensors[key] = tensors[key] * 1.01
    (tmp_path / f"{file}.safetensors").unlink()
    save_file(tensors, tmp_path / f"{file}.safetensors")
    assert main([str(tmp_path)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1
    assert failed[0].startswith(f"failed: {quantity}: ")
