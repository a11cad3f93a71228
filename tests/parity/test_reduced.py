"""Folders of golden tensors that leave things out, or hold something else: what is there is checked."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.parity.common import Golden
from benchmarks.parity.folder import SCALE_WISE, compare
from experiments.parity import main

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "data" / "parity"
META: dict[str, Any] = json.loads((FOLDER / "meta.json").read_text())
# Which part compares the tensors of a file. Two sampling cases a variant keep the sampler's part quick.
FILES = {
    "vae.io.safetensors": "vae",
    "switti_swiglu_ar.io.safetensors": "switti",
    "switti_swiglu_nonar.io.safetensors": "switti",
    "functions.safetensors": "functions",
    "trajectory.safetensors": "trajectory",
    "sampling_swiglu_ar.safetensors": "sampling",
    "sampling_swiglu_nonar.safetensors": "sampling",
}
CASES = ("swiglu_ar/smooth1_off_temp", "swiglu_nonar/stoch")
# What is computed from these cannot be compared without them.
INPUTS = ("in.", "image", "crop.hw", "filter.logits", "rope.in", "rope.freqs", "rmsnorm.in", "rmsnorm.weight")
# Stored for some scales or cases only, so that nobody misses a single one.
CHOSEN = ("idx_to_img.", "/image01", "fhat.3")


def seeds(quick: int, slow: int) -> list[Any]:
    """Seeds of a random test: a few always, more in the slow suite."""
    return [*range(quick), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(quick, slow))]


Tensors = dict[str, torch.Tensor]
Change = Callable[[random.Random, str, Tensors], Tensors]


def meta_of(*parts: str) -> dict[str, Any]:
    """meta.json with few sampling cases and these parts (the transformers' settings are needed by several)."""
    meta = json.loads(json.dumps(META))
    meta["sampling"]["cases"] = {name: meta["sampling"]["cases"][name] for name in CASES}
    return {
        key: value for key, value in meta.items() if key not in SCALE_WISE or key in (*parts, "switti", "vae")
    }


def build(folder: Path, change: Change, seed: int, meta: dict[str, Any] | None = None) -> Path:
    """A copy of the golden folder with every tensor file but the weights changed."""
    for path in FOLDER.glob("*.safetensors"):
        if path.name in FILES:
            content = load_file(path)
            if path.name.startswith("sampling_"):
                cases = [name.split("/")[1] for name in CASES if name.split("/")[0] in path.name]
                content = {k: v for k, v in content.items() if k.split("/")[0] in cases}
            content = change(random.Random(f"{seed}/{path.name}"), path.name, content)
            save_file({k: v.contiguous() for k, v in content.items()}, folder / path.name)
        else:
            (folder / path.name).symlink_to(path)
    (folder / "meta.json").write_text(json.dumps(meta or meta_of(*SCALE_WISE)))
    return folder


def same(_chance: random.Random, _file: str, content: Tensors) -> Tensors:
    return content


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    golden = compare(build(tmp_path_factory.mktemp("full"), same, 0))
    assert golden.failed == [] and golden.absent == {} and golden.unknown == {} and golden.blocked == []
    return golden


def name_of(file: str, key: str) -> str:
    """The quantity that a key of a file is compared as."""
    part = FILES[file]
    if part == "switti":
        return f"{file.removesuffix('.io.safetensors')}.{key}"
    return f"sampling.{file[9:-12]}/{key}" if part == "sampling" else f"{part}.{key}"


@pytest.mark.parametrize("seed", seeds(2, 12))
def test_outputs_left_out_are_named_and_all_others_are_checked(
    seed: int, full: Golden, tmp_path: Path
) -> None:
    dropped: dict[str, list[str]] = {}

    def drop(chance: random.Random, file: str, content: Tensors) -> Tensors:
        share = chance.choice([0.02, 0.3, 0.9])
        gone = [k for k in sorted(content) if not k.startswith(INPUTS) and chance.random() < share]
        dropped[file] = gone
        return {k: v for k, v in content.items() if k not in gone}

    golden = compare(build(tmp_path, drop, seed))
    assert golden.failed == [] and golden.blocked == [] and golden.unknown == {}
    before = {check.quantity for check in full.checks}
    lost = {name_of(file, key) for file, keys in dropped.items() for key in keys}
    assert {check.quantity for check in golden.checks} == before - lost
    for file, keys in dropped.items():
        expected = [k for k in keys if not any(word in k for word in CHOSEN)]
        assert set(expected) <= set(golden.absent.get(file, [])) <= set(keys)


@pytest.mark.parametrize("seed", seeds(1, 8))
def test_expectations_left_out_of_the_settings_are_named(seed: int, full: Golden, tmp_path: Path) -> None:
    chance, meta, gone = random.Random(seed), meta_of(*SCALE_WISE), []

    def drop(settings: dict[str, Any], path: str, keys: list[str]) -> None:
        for key in keys:
            if chance.random() < 0.4:
                del settings[key]
                gone.append(f"{path}.{key}")

    drop(meta["vae"], "vae", ["n_params", "phi_index", "train_usages"])
    drop(meta["vae"]["train_grad_l2"], "vae.train_grad_l2", list(meta["vae"]["train_grad_l2"]))
    for variant, settings in meta["switti"].items():
        drop(settings["grad_l2"], f"switti.{variant}.grad_l2", list(settings["grad_l2"]))
        drop(settings, f"switti.{variant}", ["n_params", "label_smooth"])
    drop(
        meta["trajectory"]["final_param_l2"],
        "trajectory.final_param_l2",
        list(meta["trajectory"]["final_param_l2"]),
    )
    golden = compare(build(tmp_path, same, seed, meta))
    assert golden.failed == [] and golden.blocked == []
    assert sorted(golden.absent["meta.json"]) == sorted(gone)
    assert len(golden.checks) < len(full.checks)


@pytest.mark.parametrize("seed", seeds(2, 30))
def test_anything_may_be_missing(
    seed: int, full: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inputs, whole files, settings that a computation needs: no traceback, no deviation that is not there."""
    chance = random.Random(seed)

    def drop(chance: random.Random, _file: str, content: Tensors) -> Tensors:
        return {k: v for k, v in content.items() if chance.random() > 0.15}

    meta = meta_of(*SCALE_WISE)
    for _ in range(chance.randrange(4)):
        parent, key = chance.choice([(p, k) for p, k in places(meta) if isinstance(p, dict)])
        parent.pop(key, None)
    build(tmp_path, drop, seed, meta)
    for _ in range(chance.randrange(3)):
        chance.choice(sorted(tmp_path.glob("*.safetensors"))).unlink()
    code = main([str(tmp_path)])
    captured = capsys.readouterr()
    assert code == 0, captured.out
    passed = int(captured.out.split(" passed, ")[0].split()[-1])
    assert 0 < passed < len(full.checks)
    assert captured.out.rstrip().endswith("absent")


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside nested containers."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@pytest.mark.parametrize("seed", seeds(2, 20))
def test_a_deviation_in_what_is_left_is_found(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed: list[str] = []

    def drop_and_alter(chance: random.Random, file: str, content: Tensors) -> Tensors:
        left = {k: v for k, v in content.items() if k.startswith(INPUTS) or chance.random() > 0.5}
        outputs = [k for k in sorted(left) if not k.startswith(INPUTS) and "exp_noise" not in k]
        key = chance.choice([k for k in outputs if ".noise." not in k])
        left[key] = left[key] + 1
        changed.append(name_of(file, key))
        return left

    golden_folder = build(tmp_path, drop_and_alter, seed)
    assert main([str(golden_folder)]) == 1
    printed = capsys.readouterr().out
    assert [name for name in changed if f"failed: {name}:" not in printed] == []


@pytest.mark.parametrize("seed", seeds(2, 30))
def test_other_shapes_and_types_are_deviations(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tensors cut, stretched, emptied or of another type: a failed check each, whatever is computed from them."""

    def deform(chance: random.Random, _file: str, content: Tensors) -> Tensors:
        for key in chance.sample(sorted(content), 2):
            value = content[key]
            content[key] = chance.choice(
                [
                    lambda v: v[:-1],
                    lambda v: v.unsqueeze(0),
                    lambda v: v.flatten(),
                    lambda v: torch.cat([v, v]),
                    lambda v: torch.zeros(0),
                    lambda v: torch.tensor(3),
                ]
            )(value)
        return content

    assert main([str(build(tmp_path, deform, seed))]) == 1
    captured = capsys.readouterr()
    assert "failed: " in captured.out and "Traceback" not in captured.out + captured.err


@pytest.mark.parametrize("seed", seeds(12, 150))
def test_odd_settings_are_explained(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(seed)
    meta = meta_of("functions", "trajectory")
    for path in FOLDER.glob("*.safetensors"):
        (tmp_path / path.name).symlink_to(path)
    for _ in range(3):
        parent, key = chance.choice(places(meta))
        parent[key] = chance.choice(
            [None, -1, 0, 10**9, 10**30, 1e300, float("nan"), "x", "", [], {}, True, [1], {"a": 1}]
        )
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert main([str(tmp_path)]) in (0, 1)


def test_nothing_to_check_is_not_a_success(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import subprocess
    import sys

    def code() -> int:
        command = [sys.executable, "-m", "experiments.parity", str(tmp_path)]
        return subprocess.run(command, cwd=ROOT, check=False).returncode

    (tmp_path / "meta.json").write_text(
        json.dumps({k: v for k, v in meta_of("trajectory").items() if k != "functions"})
    )
    (tmp_path / "other.safetensors").write_bytes(b"no tensors")
    assert code() == 2
    captured = capfd.readouterr()
    assert "nothing could be checked" in captured.err and "absent: vae.weights.safetensors" in captured.out
    assert "not read: other.safetensors" in captured.out
    (tmp_path / "meta.json").write_text("[1]")
    assert code() == 2
    assert "not a JSON object" in capfd.readouterr().err


def test_a_damaged_file_fails_its_part_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path, same, 0, meta_of("functions"))
    (tmp_path / "functions.safetensors").write_bytes(b"\x08" * 40)
    (tmp_path / "unknown.safetensors").write_bytes(b"")
    assert main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "failed: functions:" in printed and "not a readable safetensors file" in printed
    assert "switti_swiglu_ar.out.logits " in printed and "not read: " in printed


def test_the_folders_own_inventory_names_what_was_there(tmp_path: Path) -> None:
    build(tmp_path, same, 0, meta_of("vae"))
    io = load_file(FOLDER / "vae.io.safetensors")
    inventory = {"vae.io.safetensors": {key: ["F32", list(value.shape)] for key, value in io.items()}}
    (tmp_path / "inventory.json").write_text(json.dumps(inventory))
    save_file({k: v for k, v in io.items() if k != "idx_to_img.2"}, tmp_path / "vae.io.safetensors")
    assert compare(tmp_path).absent["vae.io.safetensors"] == ["idx_to_img.2"]
