"""The sweep driver with a stand-in for the train command: what is started, skipped, resumed, and how it ends."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from stand_in import driver, prepare
from stand_in import starts as starts_of

from configs.loading import CONFIGS
from experiments import sweep
from experiments.cli import run
from sweeps.launchers import local as launch_local
from sweeps.launchers.base import tail_of
from sweeps.launchers.jobs import job_of
from sweeps.run_lock import claim, is_claimed
from sweeps.run_state import state_of
from sweeps.study import load_study
from switti.errors import UserError


@pytest.fixture
def study(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of three seeds in an empty working folder, whose runs are done by the stand-in."""
    prepare(tmp_path)
    path = tmp_path / "seeds.yaml"
    path.write_text(f"base: {tmp_path / 'base.yaml'}\nvary: {{seed: [0, 1, 2]}}\npair_by: seed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch_local, "TRAIN", ["stand_in.py"])
    before = signal.getsignal(signal.SIGTERM)
    yield path
    signal.signal(signal.SIGTERM, before)


def starts(seed: int) -> int:
    return starts_of(f"seeds/seed={seed}")


def test_a_failing_run_stops_no_other_and_is_retried_alone(study: Path, capfdbinary) -> None:
    Path("fail").touch()
    assert sweep.main([str(study)]) == 1
    text = capfdbinary.readouterr().out.decode()
    assert [starts(seed) for seed in range(3)] == [1, 1, 1]
    assert "seed=1 failed: ValueError: loss is not finite" in text
    assert "    Traceback\n    ValueError: loss is not finite" in text
    assert "study seeds: 2 finished, 1 failed; the same command again retries what failed" in text

    Path("fail").unlink()
    assert sweep.main([str(study)]) == 0
    text = capfdbinary.readouterr().out.decode()
    assert [starts(seed) for seed in range(3)] == [1, 2, 1]
    assert "study seeds: 3 finished (2 before)\n" in text

    assert sweep.main([str(study)]) == 0
    assert [starts(seed) for seed in range(3)] == [1, 2, 1]


def test_each_run_is_counted_when_it_starts_and_when_it_ends(study: Path, capfdbinary) -> None:
    sweep.main([str(study)])
    lines = [line for line in capfdbinary.readouterr().out.decode().splitlines() if line.startswith("run ")]
    assert [line.partition(":")[0] for line in lines] == [f"run {n} of 3" for n in (1, 1, 2, 2, 3, 3)]
    assert [lines[0], lines[2]] == ["run 1 of 3: seed=0 starts", "run 2 of 3: seed=1 starts"]
    assert re.fullmatch(r"run 1 of 3: seed=0 finished: 5 steps, \d+ s, validation loss [\d.]+", lines[1])
    (Path("runs/seeds/seed=1") / "record.json").unlink()
    (Path("runs/seeds/seed=1") / "output.log").unlink()
    sweep.main([str(study)])  # only the one in the middle is left
    assert "run 2 of 3: seed=1 starts" in capfdbinary.readouterr().out.decode()


def test_a_terminal_that_is_closed_leaves_no_run_without_its_driver(study: Path, root: Path) -> None:
    Path("slow").write_text("0.5")
    master, slave = pty.openpty()
    command = [sys.executable, "-c", driver([str(study), "vary.seed=[0]"])]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    drained = threading.Thread(target=drain, args=(master,), daemon=True)
    drained.start()
    wait_for(lambda: Path("runs/seeds/seed=0/metrics.csv").is_file())
    process.send_signal(signal.SIGHUP)
    os.close(master)
    process.wait(timeout=60)
    assert state_of("runs/seeds/seed=0") == "interrupted"


def drain(descriptor: int) -> None:
    with suppress(OSError):
        while os.read(descriptor, 1 << 16):
            pass


def test_the_help_names_studies_that_exist(capsys) -> None:
    with pytest.raises(SystemExit):
        sweep.main(["--help"])
    text = capsys.readouterr().out
    named = re.findall(r"^ +python -m experiments\.sweep (\S+)", text, flags=re.MULTILINE)
    assert named
    for name in named:
        assert "=" in name or load_study(name)
    listed = text.replace("\n", " ").partition("configs/studies/ holds ")[2].partition(".")[0]
    assert (
        sorted(path.stem for path in (CONFIGS / "studies").glob("*.yaml")) == listed.replace(",", "").split()
    )


def test_study_json_says_how_runs_pair(study: Path) -> None:
    sweep.main([str(study)])
    saved = json.loads(Path("runs/seeds/study.json").read_text())
    assert (saved["name"], saved["pair_by"], saved["vary"]) == ("seeds", "seed", {"seed": [0, 1, 2]})
    assert [run["varied"] for run in saved["runs"]] == [{"seed": seed} for seed in range(3)]


def test_runs_at_a_time_share_the_cores_and_prefix_their_lines(study: Path, capfdbinary) -> None:
    assert sweep.main([str(study), "--jobs", "2"]) == 0
    lines = capfdbinary.readouterr().out.decode().splitlines()
    mine = len(os.sched_getaffinity(0))
    threads = max(1, mine // 2)
    cores = mine // 2 or mine
    for seed in range(3):
        assert f"[seed={seed}] training seed={seed} threads {threads} cores {cores}" in lines


def test_a_dry_run_checks_everything_and_starts_nothing(study: Path, capsys) -> None:
    assert sweep.main([str(study), "--dry-run", "trainer.max_steps=3"]) == 0
    assert capsys.readouterr().out.count("start") == 3
    assert not Path("runs").exists()
    with pytest.raises(UserError, match=r"run seed=0: model\.width=62"):
        sweep.main([str(study), "--dry-run", "model.width=62"])


def test_settings_for_all_runs_may_rename_the_study(study: Path) -> None:
    assert sweep.main([str(study), "study=other", "trainer.max_steps=3"]) == 0
    assert "max_steps: 3" in Path("runs/other/seed=2/config.yaml").read_text()


def test_a_folder_with_other_settings_is_not_taken_for_the_run(study: Path) -> None:
    sweep.main([str(study)])
    with pytest.raises(UserError, match=r"optimizer\.learning_rate"):
        sweep.main([str(study), "optimizer.learning_rate=1"])
    with pytest.raises(UserError, match=r"is finished with trainer\.max_steps=1000, not 7"):
        sweep.main([str(study), "trainer.max_steps=7"])
    assert sweep.main([str(study), "trainer.log_every=7"]) == 0  # computes nothing else
    assert [starts(seed) for seed in range(3)] == [1, 1, 1]


def test_states_decide_what_happens(study: Path, capsys) -> None:
    folder = load_study(study).folder
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = os.uname().nodename
    for seed, record in enumerate(
        [
            {"format": 1, "status": "running", "pid": os.getpid(), "host": host},
            {"format": 1, "status": "running", "pid": gone.pid, "host": host},
            {"format": 1, "status": "interrupted"},
        ]
    ):
        path = folder / f"seed={seed}" / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record))
    assert [state_of(folder / f"seed={seed}") for seed in range(3)] == ["running", "killed", "interrupted"]
    assert state_of(folder / "seed=9") == "new"
    sweep.main([str(study), "--dry-run"])
    actions = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert actions == ["skip", "resume", "resume"]


def test_a_run_on_another_host_counts_as_killed_when_it_falls_silent(tmp_path: Path) -> None:
    record = {"format": 1, "status": "running", "pid": 1, "host": "elsewhere"}
    for updated, state in [("2020-01-01T00:00:00+00:00", "killed"), ("2999-01-01T00:00:00+00:00", "running")]:
        (tmp_path / "record.json").write_text(json.dumps({**record, "updated": updated}))
        assert state_of(tmp_path) == state


def test_a_dead_process_and_another_with_its_number_are_not_the_run(tmp_path: Path) -> None:
    def state(pid: int, age: float) -> str:
        updated = (datetime.now(UTC) - timedelta(seconds=age)).isoformat()
        record = {
            "format": 1,
            "status": "running",
            "pid": pid,
            "host": os.uname().nodename,
            "updated": updated,
        }
        (tmp_path / "record.json").write_text(json.dumps(record))
        return state_of(tmp_path)

    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert state(process.pid, 0) == "running"
    assert (
        state(process.pid, 60) == "killed"
    )  # it was not there a minute ago: the number is somebody else's now
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked how it ended
    assert state(process.pid, 0) == "killed"
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_leaves_every_run_resumable(study: Path, root: Path, number: int) -> None:
    Path("slow").touch()
    command = [sys.executable, "-c", driver([str(study), "--jobs", "2"])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 30
    while not all(Path(f"runs/seeds/seed={seed}/record.json").is_file() for seed in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 130, text
    assert "error: interrupted" in text
    assert [state_of(f"runs/seeds/seed={seed}") for seed in (0, 1, 2)] == [
        "interrupted",
        "interrupted",
        "new",
    ]
    assert "run 1 of 3: seed=0 was interrupted at step" in text
    assert (
        "study seeds: 2 interrupted, 1 not started; "
        "the same command again resumes what was interrupted and starts what was not" in text
    )


def test_progress_bars_do_not_fill_the_tail() -> None:
    content = b"".join(b"\rstep %d" % i for i in range(500)) + b"\n\nlast"
    assert tail_of(content) == ["step 499", "last"]


def test_what_torchrun_says_of_the_end_does_not_hide_the_error() -> None:
    noise = b"E1122 14:03:32.891000 4495 .venv/lib/torch/distributed/elastic/multiprocessing/api.py:1002] failed\n"
    assert tail_of(b"start\nValueError: x\n" + noise + b"Traceback\n" * 20) == ["start", "ValueError: x"]
    assert tail_of(noise)[0].startswith("E1122")


@pytest.mark.parametrize("jobs", ["0", "-1", "two"])
def test_jobs_must_be_positive(study: Path, jobs: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        sweep.main([str(study), "--jobs", jobs])
    assert caught.value.code == 2
    assert "--jobs" in capsys.readouterr().err


def test_a_study_may_be_said_on_the_command_line(study: Path, capsys) -> None:
    base = f"base={Path('base.yaml').resolve()}"
    grid = ["vary.seed=[0,1]", "vary.model.visibility=[causal,non_causal]"]
    assert sweep.main([base, *grid, "study=mine", "--dry-run"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names == [f"seed={s},visibility={v}" for s in (0, 1) for v in ("causal", "non_causal")]
    assert sweep.main([base, "vary.seed=[0,1]", "study=mine"]) == 0
    saved = json.loads(Path("runs/mine/study.json").read_text())
    assert (saved["vary"], saved["pair_by"], saved["base"]) == (
        {"seed": [0, 1]},
        "seed",
        base.partition("=")[2],
    )
    sweep.main([base, "vary.seed=[0,1,2]", "study=mine"])  # more of the same
    saved = json.loads(Path("runs/mine/study.json").read_text())
    assert saved["vary"] == {"seed": [0, 1, 2]} and len(saved["runs"]) == 3
    assert [starts_of(f"mine/seed={seed}") for seed in range(3)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vary.seed=[0]", "study=x"], "base must name a config"),
        (["base=BASE", "study=x"], "vary must hold at least one"),
        (["base=BASE", "vary.seed=[]", "study=x"], "vary.seed=[] must be a list of at least one value"),
        (["base=BASE", "vary.seed=[0]"], "study=… is missing"),
        (["base=BASE", "vary.sede=[0]", "study=x"], "did you mean 'seed'?"),
        (["base=BASE", "vary=[0]", "study=x"], "say which, vary.<setting>=…"),
        (
            ["base=BASE", "vary.tokenizer_weights=[a/b,a-b]", "study=x"],
            "two runs would be kept in the folder",
        ),
        (["a", "b"], "one study at a time"),
    ],
)
def test_what_the_command_line_cannot_mean_is_refused(study: Path, words: list[str], message: str) -> None:
    base = str(Path("base.yaml").resolve())
    with pytest.raises(UserError) as caught:
        sweep.main([word.replace("BASE", base) for word in words])
    assert message in str(caught.value)
    assert not Path("runs").exists()


ENDLESS = "9" * 5000


@pytest.mark.parametrize(
    "words",
    [
        ["vary.seed=[0]", "trainer.max_steps=VALUE"],
        ["vary.seed=[VALUE]"],
        ["vary.seed=[0]", "pair_by=VALUE"],
        ["vary.VALUE=[0]"],
        ["vary.seed=[0]", "VALUE=1"],
        ["vary.seed=[0]", "study=VALUE"],
        ["vary.seed=[0]", "base=VALUE"],
        ["vary.seed=[0]", "data.train=VALUE"],
        ["vary.seed=[0]", "data.embeddings=VALUE"],
        ["vary.seed=[0]", "tokenizer_weights=VALUE"],
        ["vary.seed=[0]", "init_from=VALUE"],
        ["VALUE"],
        *(
            ["search.space={seed: [0, 1]}", f"search.{key}=VALUE"]
            for key in ("trials", "seed", "sampler", "storage", "metric")
        ),
        ["search.space={seed: [0, 1]}", "search.VALUE=1"],
        ["search.space={seed: {low: 0, high: 100000000000}}", "search.sampler=grid"],
        ["search.space={optimizer.eps: {low: 0.0, high: 1.0, step: 1.0e-300}}", "search.sampler=grid"],
        ["search.space={optimizer.eps: {low: 0.1, high: .inf}}"],
        [f"vary.seed={list(range(2000))}", "vary.model.depth=[1, 2, 3, 4, 5, 6]"],
    ],
)
def test_what_has_no_end_is_refused_at_once(
    study: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    base = [f"base={Path('base.yaml').resolve()}", "study=mine"]
    words = [word.replace("VALUE", ENDLESS) for word in words]
    monkeypatch.setattr(sys, "argv", ["sweep", *base, *words, "--dry-run"])
    begun = time.process_time()
    with pytest.raises(SystemExit) as leaving:
        run(sweep.main)
    assert leaving.value.code == 2 and time.process_time() - begun < 5
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ") and all(len(line) < 1500 for line in lines)


def test_a_folder_of_another_study_or_version_is_left_alone(study: Path) -> None:
    base = f"base={Path('base.yaml').resolve()}"
    mine = [str(study), "vary.seed=[1]"]
    assert sweep.main(mine) == 0
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    Path("other.yaml").write_text(Path("base.yaml").read_text())
    for words, message in [
        (["base=other.yaml", "vary.seed=[0]", "study=seeds"], "its base is"),
        (
            [base, "vary.seed=[0]", "vary.model.depth=[2]", "study=seeds"],
            "its vary is 'seed', not 'seed, model.depth'",
        ),
        ([base, "search.space={model.depth: [2, 3]}", "study=seeds"], "its search.space is None"),
    ]:
        with pytest.raises(UserError, match="holds another study") as caught:
            sweep.main(words)
        assert message in str(caught.value)
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before

    folder = Path("runs/seeds/seed=1")
    record, config = (folder / "record.json").read_text(), (folder / "config.yaml").read_text()
    (folder / "record.json").write_text(record.replace('"format": 1', '"format": 99'))
    with pytest.raises(
        UserError, match=r"seed=1/record\.json has format 99; this version reads format 1 only"
    ):
        sweep.main(mine)
    (folder / "record.json").write_text(record)
    (folder / "config.yaml").write_text(config + "warp: 9\n")
    with pytest.raises(UserError, match=r"seed=1 was made by another version \(.*unknown setting 'warp'"):
        sweep.main(mine)


def test_a_run_in_progress_is_not_started_again_even_without_its_driver(study: Path) -> None:
    Path("slow").write_text("1")
    process = subprocess.Popen(
        [sys.executable, "-c", driver([str(study), "vary.seed=[0]"])], stdout=subprocess.DEVNULL
    )
    wait_for(lambda: is_claimed("runs/seeds/seed=0"))
    assert sweep.main([str(study), "vary.seed=[0]"]) == 0
    wait_for(lambda: Path("runs/seeds/seed=0/metrics.csv").is_file())
    process.kill()
    process.wait()
    assert state_of("runs/seeds/seed=0") == "running"
    assert sweep.main([str(study), "vary.seed=[0]"]) == 0
    wait_for(lambda: state_of("runs/seeds/seed=0") == "finished")
    assert starts(0) == 1


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_drivers_start_each_run_once(study: Path) -> None:
    code = driver([str(study), "vary.seed=[0,1,2,3]"])
    drivers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    texts = [process.communicate(timeout=60)[0].decode() for process in drivers]
    assert [process.returncode for process in drivers] == [0, 0], texts
    assert [starts(seed) for seed in range(4)] == [1] * 4


def test_a_lock_is_held_by_whoever_has_a_copy_of_it(tmp_path: Path) -> None:
    lock = claim(tmp_path / "run")
    assert lock is not None and claim(tmp_path / "run") is None and is_claimed(tmp_path / "run")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    os.close(lock)
    assert is_claimed(tmp_path / "run")
    child.communicate(b"\n")
    assert not is_claimed(tmp_path / "run") and claim(tmp_path / "run") is not None


def test_a_run_that_was_preempted_resumes_while_it_gets_further(study: Path, capfdbinary) -> None:
    Path("preempt").touch()
    assert sweep.main([str(study), "vary.seed=[0]"]) == 0
    assert starts(0) == 3  # 2, 4, 5 steps
    assert capfdbinary.readouterr().out.count(b"preempted; resuming") == 2


@pytest.mark.distributed
def test_several_ranks_are_started_by_torchrun(study: Path) -> None:
    settings = ["trainer.devices=2", "trainer.accelerator=cpu", "data.batch_size=8", "vary.seed=[0]"]
    assert sweep.main([str(study), *settings]) == 0
    assert {path.name for path in Path("runs/seeds/seed=0").glob("rank_*")} == {"rank_0_of_2", "rank_1_of_2"}


def test_gpus_are_given_to_one_run_each(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    launcher = launch_local.LocalLauncher(3)
    planned = load_study(study, ["trainer.devices=2", "data.batch_size=8"]).runs
    jobs = [job_of(run, -1) for run in planned]
    assert launcher.gpus == ["4", "6", "7"]
    assert launcher.fits(jobs[:1]) and not launcher.fits(jobs[:2])
    assert launcher._environment(jobs[0], ["4", "6"])["CUDA_VISIBLE_DEVICES"] == "4,6"
    launcher.check(planned[0])
    with pytest.raises(UserError, match=r"more GPUs than there are \(3\)"):
        launcher.check(load_study(study, ["trainer.devices=4", "data.batch_size=8"]).runs[0])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match=r"more GPUs than there are \(0\)"):
        launch_local.LocalLauncher(1).check(load_study(study, ["trainer.accelerator=gpu"]).runs[0])


def test_a_run_that_failed_before_its_record_is_no_new_one(tmp_path: Path) -> None:
    for words, state in [
        ("--- today python -m …\nerror: no data\n", "failed"),
        ("starting\nerror: interrupted\n", "interrupted"),
    ]:
        (tmp_path / "output.log").write_text(words)
        assert state_of(tmp_path) == state
    (tmp_path / "output.log").unlink()
    assert state_of(tmp_path) == "new"
