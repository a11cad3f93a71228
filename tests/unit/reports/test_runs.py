"""Reading run folders: what is in them comes back, what is wrong is refused in one clear line."""

import json
from pathlib import Path

import pytest
import synthetic_runs as maker

from reports.data.metric_catalogue import describe, is_detail, split_of
from reports.data.runs import find_runs, read_run
from reports.tensorboard import chart_name
from switti.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    points = [(10, "train/loss", 2.0), (20, "train/loss", 1.5), (20, "validation/loss", 1.75)]
    folder = tmp_path / "study" / "a"
    return maker.write_run(folder, maker.config("causal", 0, "a"), maker.record("a", 0), points)


def test_a_run_comes_back(folder: Path) -> None:
    maker.write_samples(folder, ["red", "blue"], [5, 6])
    run = read_run(folder)
    assert run.name == "a" and run.finished
    assert run.config["model.visibility"] == "causal" and run.config["model.scales"] == maker.SIDES
    assert run.series["train/loss"].steps.tolist() == [10, 20]
    assert run.series["train/loss"].values.tolist() == [2.0, 1.5]
    assert run.evaluation is None
    assert run.samples.prompts == ("red", "blue") and run.samples.seeds == (5, 6)
    assert all(file.is_file() for file in run.samples.files)


def test_evaluation_names_lose_their_prefix(folder: Path) -> None:
    value = {
        "step": 20,
        "metrics": {"metrics/fid_alexnet": 3, "kid_alexnet": 0.5, "note": "text"},
        "sampling": None,
    }
    (folder / "evaluation.json").write_text(json.dumps(value))
    evaluation = read_run(folder).evaluation
    assert evaluation.metrics == {"fid_alexnet": 3.0, "kid_alexnet": 0.5}
    assert evaluation.sampling is None


def test_later_values_win_and_a_cut_last_line_is_left_out(folder: Path) -> None:
    with (folder / "metrics.csv").open("a") as stream:
        stream.write("10,0,train/loss,1.25,0\n30,0,train/lo")
    series = read_run(folder).series["train/loss"]
    assert dict(zip(series.steps.tolist(), series.values.tolist(), strict=True)) == {10: 1.25, 20: 1.5}


def test_find_runs_by_study_name_folder_and_run(folder: Path) -> None:
    root = folder.parents[1]
    other = maker.write_run(folder.parent / "b", {}, maker.record("b", 1))
    (folder.parent / "report").mkdir()
    assert find_runs(["study"], root) == [folder, other]
    assert find_runs([str(folder.parent)]) == [folder, other]
    assert find_runs(["study/a", str(folder)], root) == [folder]


def test_no_runs(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no runs found in .*empty.*record\.json"):
        find_runs([str(tmp_path / "empty")])
    with pytest.raises(
        UserError, match=r"no study 'nowhere', neither as a path nor below .*; there are: empty"
    ):
        find_runs(["nowhere"], tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("record.json", '{"format": 2}', "has format 2; this version reads format 1 only"),
        ("record.json", "{}", "has format None"),
        ("record.json", "{", "not valid JSON"),
        ("record.json", "[]", "must hold a JSON object, not list"),
        ("config.yaml", "a: [", "not valid YAML"),
        (
            "metrics.csv",
            "step,epoch,metric,value,time\n1,0,x,abc,0\n",
            r"line 2: epoch, value or time is not a number",
        ),
        ("metrics.csv", "step,name\n1,x\n", r"line 1: 2 fields instead of 5"),
        (
            "samples/latest/index.json",
            '{"prompts": ["a"], "seeds": [], "files": []}',
            r"prompts \(1\), seeds \(0\)",
        ),
        ("samples/latest/index.json", '{"prompts": 1}', "prompts must be a list of str, not '1'"),
        ("config.yaml", "- a\n", "must hold settings by name, not list"),
        ("config.yaml", "a: &x [*x]\n", "holds more than 100000 values"),
        ("config.yaml", "a: &x {b: *x}\n", "holds more than 100000 values"),
        ("config.yaml", "a: " + "[" * 5000 + "]" * 5000, "is nested too deeply"),
        ("config.yaml", "a: 2025-99-99\n", "is not valid YAML"),
        ("config.yaml", f"a: {'9' * 5000}\n", "is not valid YAML"),
        ("evaluation.json", '{"metrics": [1]}', "metrics must be an object"),
        (
            "evaluation.json",
            '{"sampling": {"seconds_total": "fast"}}',
            "seconds_total must be a number, not 'fast'",
        ),
        ("evaluation.json", '{"sampling": {"seconds_total": 0}}', "seconds_total must be a positive number"),
        (
            "evaluation.json",
            '{"sampling": {"seconds_by_round": [1, 0]}}',
            "seconds_by_round must be a list of positive",
        ),
        ("evaluation.json", '{"sampling": {"batch": true}}', "batch must be a number, not 'True'"),
        (
            "record.json",
            '{"format": 1, "train_seconds": "long"}',
            "train_seconds must be a number of at least 0, not 'long'",
        ),
        ("record.json", '{"format": 1, "versions": ["a"]}', "versions must be an object"),
        ("record.json", '{"format": 1, "started": 5}', "started must be a time such as .*, not '5'"),
    ],
)
def test_refusals(folder: Path, file: str, text: str, message: str) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=message):
        read_run(folder)


def test_bytes_that_are_no_text_and_a_run_that_has_just_begun(folder: Path) -> None:
    (folder / "metrics.csv").write_text("")
    assert read_run(folder).series == {}
    (folder / "metrics.csv").write_bytes(b"step\xff\n")
    with pytest.raises(UserError, match=r"metrics\.csv is not text in UTF-8"):
        read_run(folder)


def test_missing_config_and_missing_metrics(folder: Path) -> None:
    (folder / "metrics.csv").unlink()
    assert read_run(folder).series == {}
    (folder / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config\.yaml is missing"):
        read_run(folder)


def test_wrong_setting_names_the_nearest(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no setting 'model\.visiblity'; did you mean 'model\.visibility'\?"):
        read_run(folder).setting("model.visiblity")


def test_metrics_of_one_validation_split_are_described_by_its_name():
    loss = describe("validation/pairs/loss")
    assert (loss.title, loss.better, loss.needs) == ("validation loss, pairs", "lower", "tokens")
    assert describe("validation/concepts/psnr").title == "PSNR, concepts"
    assert is_detail("validation/pairs/loss_by_scale/3") and not is_detail("validation/pairs/loss")
    assert describe("validation/loss_by_scale/3").title == "validation loss, scale 3"
    assert [split_of(f"validation/{name}") for name in ("loss", "loss_by_scale/3", "pairs/loss")] == [
        "",
        "",
        "pairs",
    ]
    assert chart_name("validation/pairs/loss") == "1 loss/validation pairs"


def test_a_record_of_an_early_stop_has_a_reason_and_a_step(folder: Path) -> None:
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | {"early_stop": {"reason": "x", "step": 3}}))
    assert read_run(folder).record["early_stop"]["step"] == 3
    for wrong in ({"step": 3}, {"reason": "x", "step": "3"}, "x"):
        (folder / "record.json").write_text(json.dumps(record | {"early_stop": wrong}))
        with pytest.raises(UserError, match="early_stop must be an object with a reason and a step"):
            read_run(folder)
