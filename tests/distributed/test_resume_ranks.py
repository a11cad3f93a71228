"""Sharded checkpoints: exact at the same number of ranks, readable by any other one and by a single process."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import CASES, finish, run_cases, start
from rank_cases import EPOCH, train

from callbacks.checkpointing import clear_leftovers, corruption, find_resume
from switti.distributed.sharded_checkpoint import is_sharded, read_unsharded

pytestmark = pytest.mark.distributed

FSDP = {"strategy": "fsdp"}
HYBRID = {"strategy": "fsdp", "sharding_size": 2}
Results = dict[str, dict[str, Any]]


def part(name: str, folder: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "folder": folder, "steps": 14, "save": 4, **options}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """14 steps by 2 ranks at once, and in parts: 6 steps by 2 ranks, the rest by 2, by 4 (2 × 2) and by one process."""
    out = tmp_path_factory.mktemp("resume")
    found = run_cases(
        [part("whole", "whole", trainer=FSDP), part("first", "parts", trainer=FSDP, stop_after=6)],
        out,
        ranks=2,
    )
    for name in ("four", "one", "ddp"):
        shutil.copytree(out / "parts", out / name, symlinks=True)
    found |= run_cases(
        [
            part("rest", "parts", trainer=FSDP, resume=True),
            part("rest_ddp", "ddp", trainer={"strategy": "ddp"}, resume=True),
        ],
        out,
        ranks=2,
    )
    found |= run_cases([part("rest_four", "four", trainer=HYBRID, resume=True, stop_after=10)], out, ranks=4)
    found |= run_cases([part("rest_two", "four", trainer=FSDP, resume=True)], out, ranks=2)
    train(part("rest_one", "one", resume=True), out)
    found["rest_one"] = torch.load(out / "rest_one.pt", weights_only=True)
    return out, found


def curve(*results: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([value for result in results for value in result["logged"]["train/loss"]])


def test_same_ranks_same_bits(story: tuple[Path, Results]) -> None:
    _, found = story
    assert torch.equal(curve(found["first"], found["rest"]), curve(found["whole"]))
    for name, weight in found["whole"]["weights"].items():
        assert torch.equal(found["rest"]["weights"][name], weight), name
    for before, after in zip(found["whole"]["random"], found["rest"]["random"], strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(*found["whole"]["random"])


@pytest.mark.parametrize("parts", [("rest_four", "rest_two"), ("rest_one",), ("rest_ddp",)])
def test_other_ranks_same_curve(story: tuple[Path, Results], parts: tuple[str, ...]) -> None:
    _, found = story
    torch.testing.assert_close(
        curve(found["first"], *(found[name] for name in parts)), curve(found["whole"]), rtol=1e-5, atol=0
    )
    for name, weight in found["whole"]["weights"].items():
        torch.testing.assert_close(found[parts[-1]]["weights"][name], weight, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "parts", [("first", "rest"), ("first", "rest_four", "rest_two"), ("first", "rest_one")]
)
def test_every_sample_once_an_epoch(story: tuple[Path, Results], parts: tuple[str, ...]) -> None:
    """14 steps of 8 samples are three epochs of 36 and 4 more."""
    _, found = story
    seen = [int(key) for name in parts for keys in found[name]["keys"] for key in keys]
    assert len(seen) == 14 * 8
    assert sorted(seen) == sorted(i % EPOCH for i in range(14 * 8))


def test_contents(story: tuple[Path, Results]) -> None:
    out, found = story
    path = find_resume(out / "whole")
    assert path is not None and path.name == "step_000014.ckpt" and is_sharded(path)
    content = read_unsharded(path)
    assert len(content["random"]) == 2
    assert {"config", "code", "lr_schedulers", "loops"} <= content.keys()
    assert content["global_step"] == 14
    assert content["code"]["commit"] and content["code"]["versions"]["torch"]
    assert content["datamodule" if "datamodule" in content else "Samples"] == {"consumed": 14 * 8}
    for name, weight in found["whole"]["weights"].items():
        assert torch.equal(content["state_dict"][name], weight)
    assert len(content["optimizer_states"][0]["state"]) == sum(
        len(group["params"]) for group in content["optimizer_states"][0]["param_groups"]
    )


def test_a_whole_file_goes_on_sharded(tmp_path: Path) -> None:
    """The other way round: a run on one device goes on with two ranks."""
    train(part("whole", "whole"), tmp_path)
    train(part("first", "parts", stop_after=6), tmp_path)
    found = run_cases([part("rest", "parts", trainer=FSDP, resume=True)], tmp_path, ranks=2)
    whole, first = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "first"))
    torch.testing.assert_close(curve(first, found["rest"]), curve(whole), rtol=1e-5, atol=0)


@pytest.mark.parametrize("harm", ["cut", "flip", "missing", "manifest"])
def test_a_damaged_one_is_passed_over(story: tuple[Path, Results], tmp_path: Path, harm: str) -> None:
    out, _ = story
    shutil.copytree(out / "whole", tmp_path / "run", symlinks=True)
    newest = tmp_path / "run/checkpoints/step_000014.ckpt"
    victim = newest / ("manifest.json" if harm == "manifest" else "__1_0.distcp")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    assert corruption(newest) is None
    if harm == "missing":
        victim.unlink()
    else:
        victim.write_bytes(content[:-9] if harm in ("cut", "manifest") else content)
    assert corruption(newest) is not None
    assert find_resume(tmp_path / "run") == tmp_path / "run/checkpoints/step_000012.ckpt"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB: room for a few checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_on_all_ranks_and_leaves_the_previous_one(small_disk: Path) -> None:
    cases = [part("full", "full", trainer={**FSDP, "devices": 2}, save=1, keep=100)]
    listing = small_disk / "cases.json"
    listing.write_text(json.dumps(cases))
    ((code, output),) = finish(start([str(CASES), str(listing), str(small_disk)], ranks=2), 300)
    assert code == 1
    assert output.count("UserError: cannot write checkpoint") >= 2, output  # each rank says so
    assert "No space left" in output or "unexpected pos" in output
    left = sorted(path.name for path in (small_disk / "full/checkpoints").iterdir())
    newest = find_resume(small_disk / "full")
    print(f"after: {left}, {shutil.disk_usage(small_disk).free} bytes free")
    assert newest is not None and newest.name == max(name for name in left if name.startswith("step_"))
    assert not [name for name in left if name.startswith(".")]


def test_leftovers_are_cleared(story: tuple[Path, Results], tmp_path: Path) -> None:
    out, _ = story
    folder = tmp_path / "run/checkpoints"
    shutil.copytree(out / "whole/checkpoints", folder, symlinks=True)
    (folder / "step_000014.ckpt").rename(folder / ".step_000014.ckpt.tmp")
    assert find_resume(tmp_path / "run") == folder / "step_000012.ckpt"
    clear_leftovers(folder)
    assert not list(folder.glob(".*"))
