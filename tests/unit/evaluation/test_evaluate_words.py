"""What `experiments.evaluate` takes for a run and what for a setting."""

from pathlib import Path

import pytest

from experiments.evaluate import main, split_words
from switti.errors import UserError


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for name in ("visibility=causal,seed=0", "visibility=non_causal,seed=0"):
        folder = tmp_path / "study" / name
        folder.mkdir(parents=True)
        (folder / "record.json").write_text("{}")
        (folder / "config.yaml").write_text("{}")
    return tmp_path / "study"


def test_names_with_an_equals_sign_are_runs_if_they_are_there(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = sorted(study.iterdir())
    assert split_words([str(study), "guidance=2"]) == (runs, ["guidance=2"])
    assert split_words([str(runs[0]), str(study)]) == (runs, [])
    monkeypatch.chdir(study)
    assert split_words(["visibility=causal,seed=0", "sampling.top_k=3"]) == (
        [Path("visibility=causal,seed=0")],
        ["sampling.top_k=3"],
    )


def test_checkpoints_stay_files(study: Path) -> None:
    file = study / "last.ckpt"
    file.touch()
    assert split_words([str(file)])[0] == [file]


def test_no_run_and_no_such_run(study: Path) -> None:
    with pytest.raises(UserError, match=r"no run is given besides the settings guidance=2"):
        split_words(["guidance=2"])
    with pytest.raises(UserError, match=r"no study '.*, neither as a path nor below runs/"):
        split_words([str(study / "seed=9")])
    with pytest.raises(UserError, match="--images 1 must be at least 2"):
        main([str(study), "--images", "1"])
