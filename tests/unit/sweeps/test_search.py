"""Searches with a stand-in for the train command: what is proposed, reported, pruned, resumed and shared by drivers."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_in import driver, prepare, starts

from experiments import sweep
from sweeps.launchers import local as launch_local
from sweeps.launchers.jobs import Outcome
from sweeps.run_lock import claim
from sweeps.run_state import state_of
from sweeps.search import SearchSource
from sweeps.search_objects import distribution, pruner, sampler
from sweeps.search_space import Axis, without_password
from sweeps.study import load_study
from switti.errors import UserError

optuna = pytest.importorskip("optuna")
from optuna.exceptions import StorageInternalError  # noqa: E402
from sqlalchemy.exc import OperationalError  # noqa: E402

LEARNING_RATE = "optimizer.learning_rate"
STUDY = """\
base: BASE
search:
  space: {optimizer.learning_rate: {low: 1.0e-4, high: 1.0e-1, log: true}}
  metric: validation/loss
  trials: 3
  sampler: random
"""


@pytest.fixture
def study(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    prepare(tmp_path)
    path = tmp_path / "rates.yaml"
    path.write_text(STUDY.replace("BASE", str(tmp_path / "base.yaml")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setattr(launch_local, "TRAIN", ["stand_in.py"])
    return path


def trials(storage: str | None = None) -> list:
    if storage is None:
        backend = optuna.storages.journal.JournalFileBackend("runs/rates/search.journal")
        storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name="rates", storage=storage).get_trials()


def states(storage: str | None = None) -> list[str]:
    return [trial.state.name for trial in trials(storage)]


def runs() -> list[str]:
    return sorted(path.name for path in Path("runs/rates").glob("trial_*"))


def test_each_trial_is_a_run_and_its_last_value_is_reported(study: Path, capfdbinary) -> None:
    assert sweep.main([str(study)]) == 0
    for trial in trials():
        expected = abs(math.log10(trial.params[LEARNING_RATE]) + 3) + 1 / 5
        assert trial.value == pytest.approx(expected, rel=1e-12)
        assert 1e-4 <= trial.params[LEARNING_RATE] <= 1e-1
    assert len(set(runs())) == len({trial.params[LEARNING_RATE] for trial in trials()}) == 3
    text = capfdbinary.readouterr().out.decode()
    best = min(trials(), key=lambda trial: trial.value)
    assert f"best: validation/loss {best.value:.5g} by {runs()[best.number]}" in text

    assert sweep.main([str(study)]) == 0  # nothing left to do
    assert len(trials()) == 3
    assert sweep.main([str(study), "search.trials=4"]) == 0
    assert len(trials()) == 4 and [starts(f"rates/{name}") for name in runs()] == [1] * 4


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_proposals_follow_from_the_seed_and_the_trials_so_far(study: Path, kind: str) -> None:
    def proposed(seed: int) -> list[float]:
        search = load_study(
            study, [f"search.sampler={kind}", f"search.seed={seed}", "search.startup_trials=2"]
        ).search
        memory, values = optuna.create_study(), []
        for number in range(5):  # each by a driver of its own
            memory.sampler = sampler(search, number)
            trial = memory.ask({LEARNING_RATE: distribution(search.space[LEARNING_RATE])})
            values.append(trial.params[LEARNING_RATE])
            memory.tell(trial, abs(math.log10(values[-1]) + 3))
        return values

    assert proposed(0) == proposed(0) != proposed(1)
    assert len(set(proposed(0))) == 5


def test_a_grid_search_takes_every_point_once(study: Path) -> None:
    space = "search.space={optimizer.learning_rate: [0.01, 0.001], model.norms: [sandwich, pre]}"
    assert sweep.main([str(study), "search.sampler=grid", "search.trials=10", space, "--jobs", "2"]) == 0
    points = {(trial.params[LEARNING_RATE], trial.params["model.norms"]) for trial in trials()}
    assert points == {(rate, norms) for rate in (0.01, 0.001) for norms in ("sandwich", "pre")}
    assert len(trials()) == 4
    assert runs()[0] == "trial_0000,learning_rate=0.01,norms=sandwich"


def test_a_failed_trial_is_tried_again_in_its_folder_and_counts_once(study: Path) -> None:
    Path("fail").touch()
    assert sweep.main([str(study), "seed=1", "search.trials=2"]) == 1
    assert states() == ["FAIL", "FAIL"]
    Path("fail").unlink()
    assert sweep.main([str(study), "seed=1", "search.trials=2"]) == 0
    assert states() == ["FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert [starts(f"rates/{name}") for name in runs()] == [2, 2]
    assert [trial.params for trial in trials()[:2]] == [trial.params for trial in trials()[2:]]
    assert sweep.main([str(study), "seed=1", "search.trials=2"]) == 0
    assert len(trials()) == 4


def test_a_killed_run_waits_for_the_next_command(study: Path, capfdbinary) -> None:
    Path("die").touch()
    assert sweep.main([str(study), "search.trials=1"]) == 1
    text = capfdbinary.readouterr().out.decode()
    assert "failed: killed by SIGKILL; memory may have run out" in text
    assert "study rates: 1 failed; the same command again resumes" in text
    assert states() == ["RUNNING"] and starts(f"rates/{runs()[0]}") == 1
    Path("die").unlink()
    assert sweep.main([str(study), "search.trials=1"]) == 0
    assert states() == ["COMPLETE"] and starts(f"rates/{runs()[0]}") == 2


def test_what_is_not_worth_it_is_given_up(study: Path, capfdbinary) -> None:
    Path("slow").write_text("0.4")
    space = "search.space={optimizer.learning_rate: [0.001, 0.1]}"  # the second is worse by 2 at every step
    arguments = ["search.sampler=grid", "search.pruner=median", "search.startup_trials=1", space]
    assert sweep.main([str(study), *arguments]) == 0
    assert states() == ["COMPLETE", "PRUNED"]
    assert "study rates: 1 finished, 1 pruned" in capfdbinary.readouterr().out.decode()
    assert state_of(Path("runs/rates") / runs()[1]) == "pruned"
    reported = trials()[1].intermediate_values
    assert reported[1] == pytest.approx(2 + 1) and max(reported) < 5
    assert sweep.main([str(study), *arguments]) == 0
    assert [starts(f"rates/{name}") for name in runs()] == [1, 1]


def test_a_trial_whose_driver_was_killed_is_resumed(study: Path) -> None:
    Path("slow").write_text("5")
    process = subprocess.Popen(
        [sys.executable, "-c", driver([str(study), "search.trials=1"])], stdout=subprocess.DEVNULL
    )
    wait_for(lambda: runs() and (Path("runs/rates") / runs()[0] / "record.json").is_file())
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert states() == ["RUNNING"] and state_of(Path("runs/rates") / runs()[0]) == "interrupted"
    Path("slow").unlink()
    assert sweep.main([str(study), "search.trials=1"]) == 0
    assert states() == ["COMPLETE"] and starts(f"rates/{runs()[0]}") == 2


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_drivers_share_one_database(study: Path) -> None:
    storage = "sqlite:///runs/rates/search.db"
    arguments = [str(study), f"search.storage={storage}", "search.trials=4"]
    drivers = [
        subprocess.Popen(
            [sys.executable, "-c", driver(arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for _ in range(2)
    ]
    texts = [process.communicate(timeout=100)[0].decode() for process in drivers]
    assert [process.returncode for process in drivers] == [0, 0], texts
    assert states(storage) == ["COMPLETE"] * 4
    assert [starts(f"rates/{name}") for name in runs()] == [1] * 4
    assert len({trial.params[LEARNING_RATE] for trial in trials(storage)}) == 4


@pytest.mark.parametrize(("status", "reported"), [("finished", "COMPLETE"), ("failed", "FAIL")])
def test_a_trial_that_another_driver_has_just_reported_is_left_alone(
    study: Path, status: str, reported: str
) -> None:
    plan = load_study(study)
    mine, other = SearchSource(plan), SearchSource(plan)
    job = mine.next()
    job.folder.mkdir()
    (job.folder / "record.json").write_text(json.dumps({"format": 1, "status": status}))
    (job.folder / "metrics.csv").write_text("5,0,validation/loss,1.5,0\n")
    (running,) = other.optuna.get_trials(states=[optuna.trial.TrialState.RUNNING])
    mine.ended(Outcome(job, int(status == "failed"), []))
    job.release()  # between the other's look at the trials and its claim of the run
    assert other._resume(running) is None
    assert states() == [reported]
    assert claim(job.folder) is not None


def test_a_dry_run_touches_nothing_and_tells_what_is_left(study: Path, capsys) -> None:
    assert sweep.main([str(study), "--dry-run"]) == 0
    assert "3 of 3 trials are still to be proposed" in capsys.readouterr().out
    assert not Path("runs").exists()
    sweep.main([str(study), "search.trials=1"])
    sweep.main([str(study), "--dry-run"])
    assert "2 of 3 trials are still to be proposed" in capsys.readouterr().out


def test_settings_that_do_not_go_together_are_left_out(study: Path, capfdbinary) -> None:
    # every end is valid, 3 heads for a width of 64 are not
    assert (
        sweep.main([str(study), "search.sampler=grid", "search.space={model.heads: {low: 2, high: 4}}"]) == 0
    )
    assert states() == ["COMPLETE", "FAIL", "COMPLETE"]
    assert (
        "trial 1 is skipped: run trial_0001,heads=3: model.width=64" in capfdbinary.readouterr().out.decode()
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search.space={}"], "at least one"),
        (["search.space={model.dept: [1]}"], "did you mean 'model.depth'?"),
        (["search.space={model.depth: []}"], "search.space.model.depth is empty"),
        (["search.space={model.depth: [2, 2]}"], "names a value twice"),
        (["search.space={model.depth: {low: 4, high: 2}}"], "low=4 must be less than high=2"),
        (["search.space={model.depth: {low: 2.5, high: 4}}"], "is an integer"),
        (["search.space={model.norms: {low: 1, high: 4}}"], "list its values"),
        (["search.space={optimizer.learning_rate: {low: 0.0, high: 1.0, log: true}}"], "log needs a positive low"),
        (["search.space={optimizer.learning_rate: {low: 0.1, high: 1.0, max: 3}}"], "must be a list of values, or"),
        (["search.space={optimizer.learning_rate: {low: '1e-3', high: 1.0}}"], "must be numbers"),
        (["search.space={model.width: [64, 62]}"], "model.width=62 must be a multiple"),
        (["search.space={study: [a, b]}"], "cannot be varied"),
        (["search.sampler=grid"], "needs a list or a step"),
        (["search.sampler=tpee"], "search.sampler=tpee is not one of tpe, random, grid"),
        (["search.trials=0"], "search.trials=0 must be an integer of at least 1"),
        (["search.trails=3"], "did you mean 'trials'?"),
        (["search.metric=loss"], "search.metric=loss must be a name of metrics.csv"),
        (["search.metric=metrics/fid_alexnet", "callbacks.metrics_every=0"], "needs callbacks.metrics_every"),
        (["search.storage=somewhere"], "search.storage=somewhere must be null"),
        (["search.storage=postgres://me:pw@h/d"], "search.storage=postgres://me:…@h/d must be null"),
        (["search.storage=postgresql://me:p@w@h/d"], "search.storage=postgresql://me:…@h/d has two @"),
        (["vary.seed=[0]"], "either search, or vary and runs"),
        (["optimizer.learning_rate=1"], "is varied by"),
        (["search=3"], "say which, search.<key>=…"),
    ],
)  # fmt: skip
def test_a_search_that_cannot_be_run_is_refused(study: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_study(study, overrides)
    assert message in str(caught.value)


def test_a_storage_that_cannot_be_opened_is_named_without_its_password(study: Path) -> None:
    url = "postgresql+nodriver://me:secret@nowhere/database"
    with pytest.raises(UserError, match="cannot be opened") as caught:
        sweep.main([str(study), f"search.storage={url}"])
    assert "secret" not in str(caught.value)
    assert not Path("runs/rates/study.json").exists()  # the next command may name another storage
    assert all("secret" not in path.read_text() for path in Path("runs").rglob("*.json"))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (None, None),
        ("sqlite:///runs/search.db", "sqlite:///runs/search.db"),
        ("postgresql://me@host:5432/studies", "postgresql://me@host:5432/studies"),
        ("postgresql+psycopg://me:s3cret@host/studies", "postgresql+psycopg://me:…@host/studies"),
        ("postgresql://me:s3/c@ret@host/studies", "postgresql://me:…@host/studies"),
        ("postgresql://:s3cret@host/studies", "postgresql://:…@host/studies"),
        ("postgresql://h/d?user=me&password=s3cret&x=1", "postgresql://h/d?user=me&password=…&x=1"),
    ],
)
def test_passwords_are_not_shown(url: str | None, shown: str | None) -> None:
    assert without_password(url) == shown


def test_a_driver_that_is_missing_is_named(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("psycopg", "psycopg2"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails as if it were not installed
    for scheme, package in [
        ("postgresql+psycopg", "psycopg is missing: pip install 'psycopg[binary]'"),
        ("postgresql+psycopg2", "psycopg2 is missing: pip install 'psycopg2-binary'"),
    ]:
        with pytest.raises(UserError) as caught:
            sweep.main([str(study), f"search.storage={scheme}://me:s3cret@127.0.0.1/studies"])
        assert str(caught.value) == (
            f"search.storage={scheme}://me:…@127.0.0.1/studies cannot be opened: {package}"
        )


def test_a_storage_that_goes_away_is_reported_in_a_line(
    study: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary
) -> None:
    """What a server's end looks like to Optuna; the run goes to its end, and the next command learns of it."""
    Path("slow").write_text("0.3")
    arguments = [str(study), "search.storage=sqlite:///runs/search.db", "search.trials=1"]
    arguments += ["search.pruner=median"]

    def gone(*_: object, **__: object) -> None:
        cause = OperationalError("select", {}, Exception("server closed the connection\nunexpectedly"))
        raise StorageInternalError("An exception is raised during the commit.") from cause

    monkeypatch.setattr(SearchSource, "_report_values", gone)
    with monkeypatch.context() as patch:
        patch.setattr(SearchSource, "_report_end", gone)
        with pytest.raises(UserError) as caught:
            sweep.main(arguments)
    assert str(caught.value).startswith(
        "search.storage=sqlite:///runs/search.db fails: (builtins.Exception) server closed the connection; runs"
    )
    assert (
        states("sqlite:///runs/search.db") == ["RUNNING"]
        and state_of(Path("runs/rates") / runs()[0]) == "finished"
    )
    assert sweep.main(arguments) == 0
    assert states("sqlite:///runs/search.db") == ["COMPLETE"] and starts(f"rates/{runs()[0]}") == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("none", "NopPruner"),
        ("median", "MedianPruner"),
        ("successive_halving", "SuccessiveHalvingPruner"),
        ("hyperband", "HyperbandPruner"),
    ],
)
def test_pruners_are_those_of_their_names(study: Path, name: str, kind: str) -> None:
    search = load_study(study, [f"search.pruner={name}"]).search
    assert search is not None and type(pruner(search)).__name__ == kind


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        (Axis(choices=["a", None]), ["a", None]),
        (Axis(low=2, high=6, step=2), [2, 4, 6]),
        (Axis(low=2, high=5, step=2), [2, 4]),
        (Axis(low=2, high=4), [2, 3, 4]),
        (Axis(low=0.0, high=0.3, step=0.1), [0.0, 0.1, 0.2, 0.3]),
        (Axis(low=0.0, high=1.0), None),
    ],
)
def test_the_values_of_an_axis(axis: Axis, values: list | None) -> None:
    assert axis.grid() == (
        values if values is None else pytest.approx(values) if axis.choices is None else values
    )


def test_every_shipped_search_is_without_surprises() -> None:
    study = load_study("search_smoke")
    assert study.search is not None and study.search.pruner == "median"
