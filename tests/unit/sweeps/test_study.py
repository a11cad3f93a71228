"""Studies: the grid, the names of its runs, and what is refused before anything starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs.loading import load
from sweeps.study import load_study
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


def test_names_keep_what_tells_values_apart(write) -> None:
    values = "[-1, 1, -2.5, 1.0e-9, 0.0]"
    study = load_study(write(f"base: BASE\nvary: {{sampling.guidance: {values}}}\n"))
    assert [run.name for run in study.runs] == [
        "guidance=-1", "guidance=1", "guidance=-2.5", "guidance=1e-09", "guidance=0.0",
    ]  # fmt: skip
    assert [run.config.sampling.guidance for run in study.runs] == [-1, 1, -2.5, 1e-9, 0]
    study = load_study(
        write("base: BASE\nvary: {optimizer.betas: [[0.9, 0.95]], callbacks.ema_decay: [null, 0.5]}\n")
    )
    assert [run.name for run in study.runs] == [
        "betas=0.9-0.95,ema_decay=null",
        "betas=0.9-0.95,ema_decay=0.5",
    ]
    study = load_study(write("base: BASE\nvary: {trainer.compile: [true, false]}\n"))
    assert [run.name for run in study.runs] == ["compile=true", "compile=false"]


@pytest.mark.parametrize("letter", ["a", "ä", "字"])
def test_names_fit_a_file_system_whatever_the_values(write, letter: str) -> None:
    long = [letter * 300, letter * 300 + "b", f"/data/{letter * 90}/x.tar"]
    values = "[" + ", ".join(long) + "]"
    study = load_study(
        write(f"base: BASE\nvary: {{data.train: {values}, data.validation: {values}, seed: [0, 1]}}\n")
    )
    names = [run.name for run in study.runs]
    assert len(set(names)) == 18
    assert all(len(name.encode()) <= 200 and name.isprintable() for name in names)
    alone = load_study(
        write(f"base: BASE\nvary: {{data.train: ['{long[1]}'], data.validation: ['{long[2]}'], seed: [1]}}\n")
    )
    assert alone.runs[0].name in names  # a run keeps its folder when the study grows


@pytest.mark.parametrize("study", ["", "null", "~"])
def test_a_study_needs_a_name(write, study: str) -> None:
    with pytest.raises(UserError, match="study= is empty"):
        load_study(write("base: BASE\nvary: {seed: [0]}\n"), [f"study={study}"])


def test_equal_last_names_are_written_in_full(write) -> None:
    study = load_study(write("base: BASE\nvary: {tokenizer.code_width: [8], model.code_width: [8]}\n"))
    assert study.runs[0].name == "tokenizer.code_width=8,model.code_width=8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: BASE\nvary: {model.visiblity: [causal]}", "did you mean 'model.visibility'?"),
        ("base: BASE\nvary: {seed: []}", "vary.seed=[] must be a list of at least one value"),
        ("base: BASE\nvary: {seed: 3}", "vary.seed=3 must be a list of at least one value"),
        ("base: BASE\nvary: {sampling.guidance: [1, 1.0]}", "names a value twice: 1 and 1.0 are the same"),
        ("base: BASE\nvary: {seed: [0x" + "f" * 5000 + "]}", "holds an integer of more than 64 bits"),
        ("base: BASE\nvary: {seed: [" + "9" * 5000 + "]}", "is not valid YAML"),
        ("base: BASE\ngrid: {seed: [0]}", "unknown key 'grid'; did you mean 'vary'?"),
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
    code = f"import sys; from sweeps.study import load_study; load_study({str(path)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
