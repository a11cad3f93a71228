"""Studies: the grid, the names of its runs, and what is refused before anything starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs.loading import load
from configs.study import load_study
from switti.errors import UserError

BASE = """\
tokenizer: {scales: [1, 2, 4], multipliers: [1, 2], codebook_size: 64, code_width: 8, channels: 32}
model: {depth: 2, width: 64, heads: 4}
"""


@pytest.fixture
def write(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(BASE)

    def write(text: str) -> Path:
        path = tmp_path / "ladder.yaml"
        path.write_text(text.replace("BASE", str(tmp_path / "base.yaml")))
        return path

    return write


def test_the_grid_is_the_product_with_names_from_what_varies(write) -> None:
    study = load_study(
        write("base: BASE\nvary: {model.visibility: [causal, non_causal], seed: [0, 1, 2]}\npair_by: seed\n"),
        ["trainer.max_steps=5"],
    )
    assert [run.name for run in study.runs] == [
        f"visibility={visibility},seed={seed}"
        for visibility in ("causal", "non_causal")
        for seed in (0, 1, 2)
    ]
    last = study.runs[-1]
    assert (last.config.model.visibility, last.config.seed, last.config.trainer.max_steps) == (
        "non_causal",
        2,
        5,
    )
    assert last.varied == {"model.visibility": "non_causal", "seed": 2}
    assert study.folder == Path("runs/ladder")
    assert study.as_dict()["pair_by"] == "seed"
    assert [run["name"] for run in study.as_dict()["runs"]] == [run.name for run in study.runs]


def test_the_arguments_give_the_very_same_config(write) -> None:
    study = load_study(
        write(
            "name: s\nbase: BASE\noverrides: {data.train: [a.tar, b.tar], tokenizer_weights: 'x y'}\n"
            "vary: {optimizer.betas: [[0.9, 0.95], [0.8, 0.9]], sampling.guidance_stop: [null, 2]}\n"
        )
    )
    for run in study.runs:
        assert load(run.arguments[0], run.arguments[1:]) == run.config
    assert study.runs[0].name == "betas=0.9-0.95,guidance_stop=null"
    assert study.runs[1].config.sampling.guidance_stop == 2
    assert study.runs[0].config.data.train == ["a.tar", "b.tar"]
    assert study.runs[0].config.study == "s"


def test_equal_last_names_are_written_in_full(write) -> None:
    study = load_study(write("base: BASE\nvary: {tokenizer.code_width: [8], model.code_width: [8]}\n"))
    assert study.runs[0].name == "tokenizer.code_width=8,model.code_width=8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: BASE\nvary: {model.visiblity: [causal]}", "did you mean 'model.visibility'?"),
        ("base: BASE\nvary: {seed: []}", "vary.seed must be a list of at least one value"),
        ("base: BASE\nvary: {seed: 3}", "vary.seed must be a list of at least one value"),
        ("base: BASE\nvary: {}", "vary must hold at least one"),
        ("base: BASE", "vary must hold at least one"),
        ("base: BASE\nvary: {seed: [0, 0]}", "names a value twice"),
        ("base: BASE\nvary: {tokenizer_weights: [a/b, a-b]}", "two runs would be kept in the folder"),
        ("base: BASE\nvary: {seed: [0, x]}", "run seed=x: seed=x is not an integer"),
        ("base: BASE\nvary: {model.width: [64, 62]}", "run width=62: model.width=62 must be a multiple"),
        ("base: BASE\nvary: {seed: [0]}\npair_by: model.depth", "pair_by=model.depth is not among"),
        ("base: BASE\nvary: {study: [a, b]}", "cannot be varied"),
        ("base: BASE\nvary: {seed: [0]}\nserach: {}", "unknown key 'serach'"),
        ("base: BASE\nvary: {seed: [0]}\noverrides: [seed=1]", "overrides must hold"),
        ("base: BASE\nvary: {seed: [0]}\noverrides: {seed: 1}", "seed is varied by"),
        ("base: BASE\nvary: {seed: [0]}\noverrides: {name: x}", "follow from what is varied"),
        ("base: nowhere\nvary: {seed: [0]}", "no config 'nowhere'"),
        ("vary: {seed: [0]}", "base must name a config"),
    ],
)
def test_what_cannot_be_run_is_refused(write, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_study(write(text + "\n"))
    assert message in str(caught.value)


def test_studies_are_checked_without_torch(write, root: Path) -> None:
    path = write("base: BASE\nvary: {seed: [0]}\n")
    code = f"import sys; from configs.study import load_study; load_study({str(path)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
