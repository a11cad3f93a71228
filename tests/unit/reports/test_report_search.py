"""The report of a search: the best trial first, with the command that repeats it; no verdicts between trials."""

import csv
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import synthetic_runs as maker
from matplotlib.figure import Figure as Canvas
from stand_in import prepare

from configs.loading import SETTINGS, load, to_yaml
from configs.schema import get
from experiments import compare, sweep
from reports.data.importance import importance
from reports.data.runs import find_runs, read_run
from reports.data.search import Search, read_search
from reports.render.document import Document, Figure, Table, Text
from reports.render.search_figures import history_figure, parameters_figure, values_figure
from reports.sections.search import compare_trials, repeat_command, search_document
from sweeps.launchers import local as launch_local
from switti.errors import UserError

RATE, DEPTH = "optimizer.learning_rate", "model.depth"
CENTRE = {RATE: 1e-3, DEPTH: 4, "model.norms": "pre", "data.caption_dropout": 0.1}


def searched(folder: Path) -> Search:
    return read_search(folder, [read_run(path) for path in find_runs([str(folder)])])


def document_of(search: Search) -> Document:
    return search_document(search, compare_trials(search))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = maker.write_search(tmp_path_factory.mktemp("runs"))
    (folder / "report").mkdir()
    (folder / "report" / "paired.csv").write_text("of a comparison that was made before\n")
    compare.main([str(folder)])
    return folder


def losses(folder: Path) -> dict[int, float]:
    """Final loss of the trials that finished, by number, straight from the files."""
    found = {}
    for record in folder.glob("trial_*/record.json"):
        if json.loads(record.read_text())["status"] == "finished":
            rows = list(csv.DictReader((record.parent / "metrics.csv").open()))
            found[int(record.parent.name[6:10])] = float(rows[-1]["value"])
    return found


def test_the_best_trial_stands_first_with_its_command(folder: Path) -> None:
    values = losses(folder)
    best = min(values, key=values.get)
    first, _, command, *_ = document_of(searched(folder)).lead
    assert first.kind == "summary"
    assert first.text.startswith(f"Best of {len(values)} finished trials: trial {best} with validation loss")
    words = shlex.split(command.text)
    assert words[:3] == ["python", "-m", "experiments.train"]
    assert (
        Path(words[3]).parent.name.startswith(f"trial_{best:04d},") and Path(words[3]).name == "config.yaml"
    )
    page = (folder / "report" / "index.html").read_text()
    assert (
        command.text in page and f"```\n{command.text}\n```" in (folder / "report" / "report.md").read_text()
    )


def test_no_trial_is_compared_in_pairs(folder: Path) -> None:
    text = re.sub(
        r"<(style|svg)\b.*?</\1>", "", (folder / "report" / "index.html").read_text(), flags=re.DOTALL
    )
    for word in (
        "against trial",
        "paired",
        "2 pairs",
        "Preliminary",
        "difference",
        "interval",
        "better in",
        "worse",
    ):
        assert word not in text, word
    assert sorted(path.name for path in (folder / "report").glob("*.csv")) == ["rows.csv"]


def test_ranking_has_the_finished_in_order_then_the_others(folder: Path) -> None:
    page = document_of(searched(folder))
    (table,) = [b for s in page.sections if s.anchor == "ranking" for b in s.blocks if isinstance(b, Table)]
    values = losses(folder)
    order = sorted(values, key=values.get)
    assert [int(row[0]) for row in table.rows[: len(order)]] == order
    assert [row[1] for row in table.rows[: len(order)]] == [str(rank) for rank in range(1, len(order) + 1)]
    rest = [(row[1], row[-2]) for row in table.rows[len(order) :]]
    assert rest == [("–", "pruned")] * 4 + [("–", "failed")] * 2
    rows = list(csv.DictReader((folder / "report" / "rows.csv").open()))
    assert [int(row["trial"]) for row in rows] == list(range(24))
    assert {
        int(row["trial"]): float(row["validation/loss"]) for row in rows if row["state"] == "finished"
    } == values
    for row in rows:
        config = read_run(row["run"]).config
        assert float(row[RATE]) == config[RATE] and row["model.norms"] == config["model.norms"]


def drawn(figure: Figure, panel: int = 0) -> list[tuple[str, float, float]]:
    """(mark, x, y) of every point in a panel."""
    axes = Canvas().add_subplot()
    figure.panels[panel].draw(axes)
    return [
        (line.get_marker(), float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in axes.lines
        if line.get_marker() not in ("None", None, "")
    ]


def test_history_marks_how_each_trial_ended(folder: Path) -> None:
    figure = history_figure(searched(folder))
    points = drawn(figure)
    assert sorted(x for mark, x, _ in points if mark == "v") == [4, 9, 14, 19]
    assert sorted(x for mark, x, _ in points if mark == "x") == [10, 21]
    values = losses(folder)
    best = min(values, key=values.get)
    circles = [(x, y) for mark, x, y in points if mark == "o"]
    assert dict(circles) == values and circles.count((best, values[best])) == 2  # ringed
    assert [label for label, _ in figure.legend] == ["finished", "pruned", "failed", "best so far"]


def test_the_objective_is_drawn_against_each_parameter(folder: Path) -> None:
    search = searched(folder)
    figure = parameters_figure(search)
    assert [panel.title for panel in figure.panels] == ["learning_rate", "depth", "norms", "caption_dropout"]
    with_value = [trial for trial in search.trials if trial.value is not None]
    assert {(x, y) for _, x, y in drawn(figure, 0)} == {(t.parameters[RATE], t.value) for t in with_value}
    axes = Canvas().add_subplot()
    figure.panels[0].draw(axes)
    assert axes.get_xscale() == "log"
    axes = Canvas().add_subplot()
    figure.panels[2].draw(axes)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["sandwich", "pre"]
    assert values_figure(search) is not None


def test_importance_finds_what_decides(folder: Path) -> None:
    pytest.importorskip("optuna")
    found = importance(searched(folder))
    assert next(iter(found.shares)) == RATE and sum(found.shares.values()) == pytest.approx(1)
    assert found.evaluator.startswith("PED-ANOVA, Optuna ") and found.trials == 18
    text = (folder / "report" / "report.md").read_text()
    assert "(importance.png)" in text and "PED-ANOVA, Optuna" in text and "over 18 finished trials" in text


def test_importance_says_why_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = searched(maker.write_search(tmp_path, trials=8))
    assert importance(few) == "it needs at least 10 finished trials, there are 7"
    enough = searched(maker.write_search(tmp_path, name="more"))
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert importance(enough).startswith("Optuna is not installed")
    texts = [b.text for s in document_of(enough).sections for b in s.blocks if isinstance(b, Text)]
    assert any(text.startswith("No importance of the parameters: Optuna is not installed") for text in texts)


def test_a_maximum_is_the_best_where_that_is_wanted(tmp_path: Path) -> None:
    folder = maker.write_search(tmp_path, direction="maximize")
    search, values = searched(folder), losses(folder)
    assert search.best.number == max(values, key=values.get)
    assert [t.value for t in search.ranked] == sorted(values.values(), reverse=True)


def test_runs_named_one_by_one_are_compared_as_ever(folder: Path, tmp_path: Path, capsys: Any) -> None:
    runs = sorted(map(str, folder.glob("trial_*")))[:2]
    compare.main([*runs, "--vary", DEPTH, "--vary", RATE, "--out", str(tmp_path / "out")])
    assert "2 runs, 2 variants" in capsys.readouterr().out
    assert (tmp_path / "out" / "paired.csv").is_file()


def one(folder: Path, *states: str) -> Path:
    maker.write_search(folder, trials=0)
    for number, state in enumerate(states):
        maker.write_trial(folder / "rates", number, CENTRE | {RATE: 10.0 ** -(number + 2)}, state)
    return folder / "rates"


def test_what_has_not_finished_is_said(tmp_path: Path) -> None:
    folder = one(tmp_path, "finished", "running")
    maker.write_run(folder / "by_hand", maker.config("causal", 0, "by_hand"), maker.record("by_hand", 0))
    maker.write_trial(folder, 7, CENTRE, "finished", format=9)
    compare.main([str(folder)])
    text = (folder / "report" / "report.md").read_text()
    assert "1 trial not finished yet: the best may change." in text
    assert "Not trials of the search, hence not in this report: `by_hand`." in text
    assert "1 run folder could not be read" in text and "trial_0007,learning_rate=0.001" in text
    assert "1 trial" in text


def test_without_a_finished_trial_there_is_no_best(tmp_path: Path) -> None:
    folder = one(tmp_path, "failed", "pruned")
    compare.main([str(folder)])
    text = (folder / "report" / "report.md").read_text()
    assert "None of 2 trials has finished with a value of validation loss." in text
    assert "experiments.train" not in text.partition("## Trials")[0]


def test_a_finished_trial_without_a_finite_value_counts_as_failed(tmp_path: Path) -> None:
    folder = one(tmp_path, "finished", "finished")
    with next(folder.glob("trial_0000*")).joinpath("metrics.csv").open("a") as stream:
        stream.write("300,0,validation/loss,nan,0\n")
    search = searched(folder)
    assert [trial.state for trial in search.trials] == ["failed", "finished"] and search.best.number == 1


def test_a_few_diverged_trials_do_not_stretch_the_axis(tmp_path: Path) -> None:
    folder = one(tmp_path, *["finished"] * 5)
    with next(folder.glob("trial_0004*")).joinpath("metrics.csv").open("a") as stream:
        stream.write("300,0,validation/loss,1e9,0\n")
    figure = history_figure(searched(folder))
    assert "1 far beyond the others are drawn at the border." in figure.caption
    assert max(y for *_, y in drawn(figure)) < 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": None}, "needs a metric"),
        ({"direction": "sideways"}, "a direction that is minimize or maximize"),
        ({"space": {}}, r"search\.space must name at least one setting"),
        ({"space": [1]}, "space must be an object"),
        ({"space": {"a": {"low": 1}}}, r"search\.space\.a needs choices, or low and high"),
        ({"space": {"a": {"low": "x", "high": 2}}}, "low must be a number"),
        ({"pruner": 3}, "pruner must be text"),
    ],
)
def test_a_damaged_description_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    maker.write_search(tmp_path, trials=2, **change)
    with pytest.raises(UserError, match=message):
        compare.main([str(tmp_path / "rates")])
    assert not (tmp_path / "rates" / "report").exists()


def test_a_search_without_trials_is_refused(tmp_path: Path) -> None:
    folder = one(tmp_path)
    maker.write_run(folder / "other", maker.config("causal", 0, "other"), maker.record("other", 0))
    with pytest.raises(UserError, match="no trial of the search"):
        compare.main([str(folder)])


def test_the_command_gives_the_same_settings(tmp_path: Path) -> None:
    """All but the names and what watches the run; through the reader that the train command uses."""
    folder = one(tmp_path, "finished")
    (run,) = folder.glob("trial_*")
    shared = ["study=rates", f"name={run.name}", "callbacks.prunable=true", f"runs_dir={tmp_path}"]
    config = load("generator/demo", [*shared, f"{RATE}=0.0012345678901234567", "model.norms=pre", "seed=7"])
    (run / "config.yaml").write_text(to_yaml(config))
    search = searched(folder)
    _, _, _, path, *settings = shlex.split(repeat_command(search, search.best))
    again = load(path, settings)
    unlike = {name for name in SETTINGS if get(again, name) != get(config, name)}
    assert unlike == {"name", "study", "callbacks.prunable"}
    assert again.run_dir == tmp_path / "rates_repeated" / "trial_0000"

    (run / "config.yaml").write_text(
        to_yaml(load("generator/demo", [*shared, "trainer.devices=4", "trainer.num_nodes=2"]))
    )
    search = searched(folder)
    assert repeat_command(search, search.best).startswith(
        "torchrun --nnodes=2 --nproc-per-node=4 -m experiments.train "
    )


@pytest.mark.slow
def test_of_a_real_search_the_report_names_the_best_that_optuna_names(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optuna = pytest.importorskip("optuna")
    prepare(tmp_path)
    (tmp_path / "rates.yaml").write_text(
        f"base: {tmp_path / 'base.yaml'}\n"
        "search:\n"
        "  space: {optimizer.learning_rate: {low: 1.0e-4, high: 1.0e-1, log: true}, model.norms: [sandwich, pre]}\n"
        "  trials: 4\n"
        "  sampler: random\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setattr(launch_local, "TRAIN", ["stand_in.py"])
    assert sweep.main(["rates.yaml"]) == 0
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend("runs/rates/search.journal")
    )
    best = optuna.load_study(study_name="rates", storage=storage).best_trial
    compare.main(["rates"])
    found = searched(Path("runs/rates")).best
    assert (found.number, found.value) == (best.number, best.value)
    assert found.parameters == best.params
    assert f"trial {best.number} with validation loss" in Path("runs/rates/report/index.html").read_text()
