"""Tokenizers and decoders trained by several ranks: FSDP2 computes what DDP does, and both what one process does.

With accumulation, discriminator and average throughout. Single processes are compared in float64: a code that is as
near as another one, and Adam on gradients that are zero but for rounding, would blow up the rounding of sums.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_cases
from rank_cases import LARGER, train
from torch import Tensor

from callbacks.checkpointing import find_resume
from switti.distributed.sharded_checkpoint import is_sharded, read_unsharded
from switti.weights.load import load_tokenizer

pytestmark = pytest.mark.distributed

EVERY_CODE = {"restart_dead_every": 2, "restart_until": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "decoder": {"task": "decoder", "loss": {"r1": 0.1}},
    "gradient": {"task": "tokenizer", "loss": EVERY_CODE},
    "ema": {
        "task": "tokenizer",
        "loss": {**EVERY_CODE, "codebook_update": "ema", "init_codebook": "kmeans", "pyramids": [[1]]},
    },
}
# Each rank judges the adaptive weight by its own pictures, so that a single process would find another one.
ADAPTIVE = {
    name: {"task": name, "loss": {"adaptive": True, "gan": "hinge"}} for name in ("decoder", "tokenizer")
}
OF_ONE_RANK = ("train/codebook_use",)  # as each rank sees it


def case(name: str, settings: dict[str, Any], strategy: str = "auto", **options: Any) -> dict[str, Any]:
    trainer = {"strategy": strategy, "accumulate": 2, **options.pop("trainer", {})}
    return {"name": name, "steps": 4, "validate": 3, **settings, "trainer": trainer, **options}


def compare(found: dict[str, Any], expected: dict[str, Any], logged: float, weights: float) -> None:
    """Everything that was logged at every step, and the final weights with averages, codes and counts."""
    assert found["logged"].keys() == expected["logged"].keys()
    assert {"train/discriminator_loss", "train/gradient_norm", "validation/psnr"} <= expected["logged"].keys()
    for name, values in expected["logged"].items():
        if name not in OF_ONE_RANK:
            assert found["logged"][name] == pytest.approx(values, rel=logged), name
    compare_weights(found["weights"], expected["weights"], weights)


def compare_weights(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(
            found[name], weight, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_fsdp_is_ddp_is_one_process(tmp_path: Path) -> None:
    precise = {"double": True}
    one = run_cases([case(name, s, **precise) for name, s in SETTINGS.items()], tmp_path / "one", ranks=1)
    both = [
        case(f"{strategy}_{name}", s, strategy, **precise)
        for name, s in SETTINGS.items()
        for strategy in ("ddp", "fsdp")
    ]
    two = run_cases(both, tmp_path / "two", ranks=2)
    for name in SETTINGS:
        # figures are written, and rows that have chosen a code are summed, in float32
        loose = name == "ema"
        compare(
            two[f"ddp_{name}"], one[name], logged=1e-5 if loose else 1e-6, weights=1e-6 if loose else 1e-12
        )
        compare(two[f"fsdp_{name}"], two[f"ddp_{name}"], logged=1e-6, weights=1e-12)
        assert all(
            local < 0.55 * two[f"fsdp_{name}"]["parameters"]
            for local in two[f"fsdp_{name}"]["local_parameters"]
        )
        check_export(tmp_path / f"two/fsdp_{name}", two[f"fsdp_{name}"]["weights"])
    assert one["gradient"]["logged"]["train/restarted_codes"][0] > 0


def check_export(folder: Path, weights: dict[str, Tensor]) -> None:
    """The file for generators holds the whole average."""
    state = load_tokenizer(folder / "tokenizer.safetensors", config=LARGER).state_dict()
    whole = {
        key.removeprefix("ema_rqvae."): value
        for key, value in weights.items()
        if key.startswith("ema_rqvae.")
    }
    decoder = {
        key.removeprefix("ema_trained."): v for key, v in weights.items() if key.startswith("ema_trained.")
    }
    averages = {key: value for key, value in (whole | decoder).items() if "vocab_hit" not in key}
    assert "decoder.conv_out.weight" in averages
    assert all(torch.equal(state[key], value.float()) for key, value in averages.items())


@pytest.mark.parametrize(
    ("precision", "tolerances"), [("32-true", (1e-5, 1e-6)), ("bf16-mixed", (3e-3, 1e-4))]
)
def test_fsdp_is_ddp_in_the_precisions_of_training(
    tmp_path: Path, precision: str, tolerances: tuple[float, float]
) -> None:
    """The adaptive weight differentiates with respect to one layer, which FSDP must have whole."""
    settings = {"trainer": {"precision": precision}}
    both = [
        case(f"{strategy}_{name}", s, strategy, **settings)
        for name, s in ADAPTIVE.items()
        for strategy in ("ddp", "fsdp")
    ]
    found = run_cases(both, tmp_path, ranks=2)
    for name in ADAPTIVE:
        compare(found[f"fsdp_{name}"], found[f"ddp_{name}"], *tolerances)
        assert min(found[f"ddp_{name}"]["logged"]["train/adaptive_weight"]) > 0


def test_float32_follows_one_process(tmp_path: Path) -> None:
    """The decoder's losses; no code is chosen anew, so that rounding stays small. The third step is left out by all."""
    cases = (case(n, SETTINGS["decoder"], s, poison=2) for n, s in (("one", "auto"), ("two", "fsdp")))
    one = run_cases([next(cases)], tmp_path / "one", ranks=1)["one"]["logged"]
    two = run_cases([next(cases)], tmp_path / "two", ranks=2)["two"]["logged"]
    assert len(one["train/loss"]) == 3
    for name in ("loss", "l1", "mse", "adversarial", "discriminator_loss"):
        assert two[f"train/{name}"] == pytest.approx(one[f"train/{name}"], rel=1e-5), name


def test_hybrid_sharding(tmp_path: Path) -> None:
    """Two replicas of two shards each: as four ranks with a replica each."""
    whole: dict[str, Any] = {"accumulate": 1}  # a norm wants more than one picture of a single row
    hybrid = whole | {"sharding_size": 2}
    cases = [
        case("ddp", SETTINGS["ema"], "ddp", trainer=whole),
        case("fsdp", SETTINGS["ema"], "fsdp", trainer=hybrid),
    ]
    found = run_cases(cases, tmp_path, ranks=4)
    compare(found["fsdp"], found["ddp"], logged=1e-5, weights=1e-6)


@pytest.mark.parametrize("name", ["decoder", "ema"])
def test_resume(tmp_path: Path, name: str) -> None:
    """6 steps at once, or 3 and, from their sharded checkpoint, 3 more by two ranks, by DDP and by one process.

    The discriminator begins at the fifth step: its optimiser has no state when the first part is saved, nor must
    saving give it one. So do the last codes from the first pictures, which all ranks must get back.
    """
    loss = {**SETTINGS[name]["loss"], "start_step": 4} | ({"init_batches": 4} if name == "ema" else {})
    settings = {**SETTINGS[name], "loss": loss}
    options: dict[str, Any] = {"steps": 6, "save": 2, "double": True}

    def part(title: str, folder: str, strategy: str = "fsdp", **more: Any) -> dict[str, Any]:
        return case(title, settings, strategy, **options, folder=folder, **more)

    unsaved = case("unsaved", settings, "ddp", steps=6, double=True)
    begun = [part("whole", "whole"), part("first", "parts", stop_after=3), unsaved]
    found = run_cases(begun, tmp_path, ranks=2)
    checkpoint = find_resume(tmp_path / "parts")
    assert checkpoint is not None and is_sharded(checkpoint)
    model, discriminator = read_unsharded(checkpoint)["optimizer_states"]
    assert model["state"] and not discriminator["state"]
    for folder in ("ddp", "one"):
        shutil.copytree(tmp_path / "parts", tmp_path / folder, symlinks=True)
    found |= run_cases(
        [part("rest", "parts", resume=True), part("rest_ddp", "ddp", "ddp", resume=True)], tmp_path, ranks=2
    )
    train(part("rest_one", "one", "auto", resume=True), tmp_path)
    found["rest_one"] = torch.load(tmp_path / "rest_one.pt", weights_only=True)
    for title, tolerance in (("rest", 0.0), ("rest_ddp", 1e-12), ("unsaved", 1e-12), ("rest_one", 1e-6)):
        compare_weights(found[title]["weights"], found["whole"]["weights"], tolerance)
    whole = found["whole"]["logged"]["train/loss"]
    assert found["first"]["logged"]["train/loss"] + found["rest"]["logged"]["train/loss"] == whole


def test_a_whole_file_goes_on_sharded(tmp_path: Path) -> None:
    """The other way round, before the discriminator has begun and after it."""
    for name, start in (("early", 4), ("late", 1)):
        settings = {"task": "decoder", "loss": {"start_step": start}}
        options: dict[str, Any] = {"steps": 6, "save": 2, "double": True}
        train(case("whole", settings, **options), tmp_path / name)
        train(case("first", settings, **options, folder="parts", stop_after=3), tmp_path / name)
        rest = case("rest", settings, "fsdp", **options, folder="parts", resume=True)
        found = run_cases([rest], tmp_path / name, ranks=2)["rest"]
        whole = torch.load(tmp_path / name / "whole.pt", weights_only=True)
        compare_weights(found["weights"], whole["weights"], tolerance=1e-12)
