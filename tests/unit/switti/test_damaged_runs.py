"""Run folders that are damaged or were written by others: each command says which file, what is wrong, what to do."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from callbacks.bad_samples import BadSamples
from callbacks.checkpointing import read_best
from callbacks.csv_logger import MetricsCSV
from callbacks.run_record import RunRecord
from configs.loading import load, to_yaml
from experiments import compare, sweep, train
from reports.board_mirror import Board
from sweeps.progress import read_progress
from sweeps.run_lock import claim, is_claimed, training_lock
from sweeps.run_state import heartbeat_age, is_queued, read_study, state_of
from sweeps.status_table import listed_runs
from switti.errors import UserError
from switti.run_folder import (
    COLUMNS,
    MAX_METRICS,
    Row,
    append_metrics,
    check_present,
    clear_leftovers,
    read_metrics,
    read_record,
    rewind_metrics,
    write_record,
)

HEAD = ",".join(COLUMNS) + "\n"
ROWS = HEAD + "".join(
    f"{step},0,{name},{1 / step},17.5\n" for step in (1, 2, 3) for name in ("train/loss", "a,b")
)
ROWS = ROWS.replace("a,b", '"a,b"')
BASE = """\
tokenizer: {scales: [1, 2, 4], multipliers: [1, 2], codebook_size: 64, code_width: 8, channels: 32}
model: {depth: 2, width: 64, heads: 4}
"""
RECORD = {
    "format": 1, "name": "seed=0", "study": "s", "task": "generator", "seed": 0, "tokens_per_image": 21,
    "status": "running", "error": None, "started": "2025-03-01T10:00:00+00:00", "ended": None, "command": "python",
    "pid": 2**22 + 1, "commit": None, "dirty": None, "versions": {"torch": "2.9"}, "device": "cpu", "host": "h",
    "world_size": 1, "max_steps": 9, "parameters": {"trained": 3, "frozen": 1}, "resumed": [2], "step": 3,
    "updated": "2025-03-01T12:00:00+00:00", "train_seconds": 7.5, "peak_memory_bytes": 99,
    "data": {"train": {"samples": 2, "digest": "x"}},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/s/seed=0 of a study s."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    Path("s.yaml").write_text("name: s\nbase: base.yaml\nvary: {seed: [0, 1]}\n")
    folder = Path("runs/s/seed=0")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(load("base.yaml", ["study=s", "name=seed=0", "seed=0"])))
    (folder / "record.json").write_text(json.dumps(RECORD))
    (folder / "metrics.csv").write_text(ROWS)
    return folder


def one_line(action: Callable[[], object], wanted: str) -> str:
    """The message of the UserError, which names the file and is one printable line of reasonable length."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert wanted in message and message.isprintable() and len(message) < 600, message
    return message


def changed(**changes: object) -> str:
    return json.dumps(RECORD | changes)


BAD_RECORDS = {
    "list": "[]",
    "null": "null",
    "text": '"running"',
    "number": "5",
    "empty": "",
    "cut": '{"format": 1, "sta',
    "no_format": '{"status": "finished"}',
    "no_status": '{"format": 1, "step": 3}',
    "format_text": changed(format="1"),
    "format_true": changed(format=True),
    "format_9": changed(format=9),
    "format_long": changed(format="9" * 5000),
    "status_unknown": changed(status="sleeping"),
    "status_list": changed(status=["running"]),
    "status_object": changed(status={"a": 1}),
    "pid_text": changed(pid="12"),
    "pid_zero": changed(pid=0),
    "pid_negative": changed(pid=-1),
    "pid_true": changed(pid=True),
    "pid_huge": changed(pid=2**70),
    "pid_null": changed(pid=None),
    "time_word": changed(updated="yesterday"),
    "time_empty": changed(updated=""),
    "time_number": changed(updated=5),
    "time_list": changed(updated=[1]),
    "time_impossible": changed(started="2025-13-45T99:99:99"),
    "ended": changed(ended="soon"),
    "step_text": changed(step="3"),
    "step_negative": changed(step=-3),
    "step_float": changed(step=3.5),
    "step_huge": changed(step=2**63),
    "steps_null": changed(max_steps=None),
    "seconds_text": changed(train_seconds="long"),
    "seconds_infinite": changed(train_seconds=float("inf")),
    "seconds_nan": changed(train_seconds=float("nan")),
    "resumed": changed(resumed="yes"),
    "resumed_items": changed(resumed=[1, "2"]),
    "data": changed(data=["a"]),
    "data_split": changed(data={"train": 5}),
    "data_digest": changed(data={"train": {"digest": 5}}),
    "versions": changed(versions=["torch"]),
    "parameters": changed(parameters={"trained": "many"}),
    "host": changed(host=5),
    "error": changed(error=["x"]),
    "deep": '{"format": 1, "status": "finished", "x": ' + "[" * 5000 + "]" * 5000 + "}",
    "deeper": "[" * 200_000,
    "digits": changed(step=1).replace('"step": 1', '"step": ' + "1" * 5000),
    "binary": b"\x00\xff\xfe\x01" * 50,
    "latin1": '{"format": 1, "status": "finished", "name": "gr\xfcn"}'.encode("latin-1"),
    "large": changed(command="x" * (5 << 20)),
}
BAD_METRICS = {
    "latin1": ROWS.encode() + "4,0,gr\xfcn,1,1\n".encode("latin-1"),
    "binary": bytes(range(256)) * 20 + b"\n",
    "nul": ROWS.encode() + b"\0" * 300 + b"\n",
    "nul_in_name": ROWS + "4,0,a\0b,1,1\n",
    "few_fields": ROWS + "4,0,train/loss\n",
    "many_fields": ROWS + "4,0,train/loss,1,1,1\n",
    "million_columns": ROWS + "," * 10**6 + "\n",
    "blank_line": ROWS + "\n4,0,a,1,1\n",
    "quote": ROWS + '4,0,"a,1,1\n5,0,a,1,1\n',
    "step_word": ROWS + "four,0,a,1,1\n",
    "step_negative": ROWS + "-4,0,a,1,1\n",
    "step_empty": ROWS + ",0,a,1,1\n",
    "step_float": ROWS + "4.0,0,a,1,1\n",
    "step_huge": ROWS + f"{2**63},0,a,1,1\n",
    "step_digits": ROWS + "1" * 5000 + ",0,a,1,1\n",
    "step_other_digits": ROWS + "４,0,a,1,1\n",
    "epoch": ROWS + "4,x,a,1,1\n",
    "value": ROWS + "4,0,a,one,1\n",
    "value_long": ROWS + "4,0,a," + "1" * 10**5 + "e,1\n",
    "time": ROWS + "4,0,a,1,noon\n",
    "no_name": ROWS + "4,0,,1,1\n",
    "long_name": ROWS + "4,0," + "x" * 10**5 + ",1,1\n",
    "escape": ROWS + "4,0,a\x1b[31m,1,1\n",
    "control": ROWS + "4,0,a\u2028b,1,1\n",
    "another_table": "name,score\nx,1\n",
    "json": '{"step": 1}\n',
    "names": HEAD + "".join(f"1,0,metric_{i},1,1\n" for i in range(3000)),
}


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `experiments.train` reads before it imports torch, and what its callbacks read afterwards."""

    def reads(config: object) -> None:
        run_dir = config.run_dir  # type: ignore[attr-defined]
        RunRecord(run_dir, name="n", study=None, task="generator", seed=0, tokens_per_image=1)
        MetricsCSV(run_dir).rewind(2)

    monkeypatch.setattr(train, "fit", reads)


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_a_line_everywhere(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_training(monkeypatch)
    write(folder / "record.json", BAD_RECORDS[name])
    path = str(folder / "record.json")
    one_line(lambda: read_record(folder), path)
    one_line(lambda: state_of(folder), path)
    one_line(lambda: heartbeat_age(folder), path)
    one_line(lambda: train.main([str(folder)]), path)
    one_line(lambda: sweep.main(["s.yaml", "--dry-run"]), path)
    one_line(lambda: Board(folder.parent, folder.parent / "board").renew(), path)
    one_line(lambda: compare.main([str(folder)]), "record.json")
    assert path in read_progress(folder).error


@pytest.mark.parametrize("name", BAD_METRICS)
def test_bad_metrics_are_a_line_everywhere(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    no_training(monkeypatch)
    path = folder / "metrics.csv"
    write(path, BAD_METRICS[name])
    before = path.read_bytes()
    one_line(lambda: read_metrics(folder), str(path))
    if before.count(b"\n") > 1:
        one_line(lambda: read_metrics(folder, last_bytes=len(before) - 1), str(path))
    one_line(lambda: rewind_metrics(folder, 2), str(path))
    one_line(lambda: train.main([str(folder)]), str(path))
    one_line(lambda: Board(folder.parent, folder.parent / "board").renew(), str(path))
    one_line(lambda: compare.main([str(folder)]), "metrics.csv")
    assert str(path) in read_progress(folder).error
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["record.json", "metrics.csv", "config.yaml"])
@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
def test_nothing_is_waited_for(folder: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    no_training(monkeypatch)
    path = folder / name
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError):
        compare.main([str(folder)])
    if name != "config.yaml":
        one_line(lambda: train.main([str(folder)]), f"{path} is a {kind}, not a regular file")
    else:
        with pytest.raises(UserError):
            train.main([str(folder)])


@pytest.mark.parametrize(
    "content", ["[]", "5", "null", '{"runs": 5}', '{"runs": [5]}', '{"vary": [1]}', "{", b"\xff"]
)
def test_a_bad_study_file_is_a_line(folder: Path, content: str | bytes) -> None:
    write(folder.parent / "study.json", content)
    path = str(folder.parent / "study.json")
    for action in (
        lambda: read_study(folder.parent),
        lambda: listed_runs(folder.parent),
        lambda: sweep.main(["s.yaml", "--dry-run"]),
        lambda: Board(folder.parent, folder.parent / "board").renew(),
    ):
        one_line(action, path)


@pytest.mark.parametrize(
    "content", ["[]", "5", "null", "{", b"\xff", '{"time": "x"}', '{"time": [1]}', '{"time": 1e400}']
)
def test_a_bad_heartbeat_says_nothing(folder: Path, content: str | bytes) -> None:
    write(folder / "heartbeat" / "rank_0.json", content)
    progress = read_progress(folder)
    assert progress.state == "killed" and not progress.error


@pytest.mark.parametrize("content", ["[]", "5", "{", b"\xff", '{"step": "x"}', '{"step": 3, "value": []}'])
def test_a_bad_note_of_the_best_checkpoint_says_nothing(folder: Path, content: str | bytes) -> None:
    write(folder / "checkpoints" / "best.json", content)
    assert read_best(folder / "checkpoints") == {}


@pytest.mark.parametrize("content", ["[]", "5", "{", b"\xff"])
def test_a_bad_note_of_the_queue_is_a_line(folder: Path, content: str | bytes) -> None:
    write(folder / "queued.json", content)
    one_line(lambda: is_queued(folder), str(folder / "queued.json"))


@pytest.mark.parametrize("content", [b"\xff\x00\n", "a,b\n1\n", '"' * 10**6, "," * 10**6, "step,kind\n9,x\n"])
def test_a_bad_list_of_damaged_samples_is_no_traceback(folder: Path, content: str | bytes) -> None:
    write(folder / "damaged.csv", content)
    with suppress(UserError):
        assert BadSamples(folder)._listed_until(3) == {}


def test_what_is_unusual_and_right_is_read(folder: Path) -> None:
    path = folder / "metrics.csv"
    assert [row.metric for row in read_metrics(folder)] == ["train/loss", "a,b"] * 3
    path.write_text(ROWS.replace("\n", "\r\n"), newline="")  # a spreadsheet has saved it
    assert read_metrics(folder)[-1] == Row(3, 0, "a,b", 1 / 3, 17.5)
    rewind_metrics(folder, 1)
    assert path.read_bytes() == "".join(ROWS.splitlines(keepends=True)[:3]).replace("\n", "\r\n").encode()
    path.write_text(ROWS + "4,0,train/lo")  # being written
    assert read_metrics(folder)[-1].step == 3
    path.write_bytes(ROWS.encode() + b"\0" * 99)  # after a power failure
    rewind_metrics(folder, 3)
    assert path.read_text() == ROWS
    path.write_text(f"{HEAD}{2**63 - 1},0,größe,nan,0\n0,0,b,-inf,0\n")
    assert [row.step for row in read_metrics(folder)] == [2**63 - 1, 0]
    tail = read_metrics(folder, last_bytes=20)
    assert [row.metric for row in tail] == ["b"]
    for time in ("2025-03-01T10:00:00", "2025-03-01T10:00:00+05:30", "2025-03-01T10:00:00.123456Z"):
        (folder / "record.json").write_text(changed(updated=time, error=None, ended=None))
        assert state_of(folder) == "killed"


def test_what_a_run_logs_can_be_read(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path)
    for name in ("", "x" * 201, "a\nb", "a\x1bb"):
        with pytest.raises(UserError, match="not a metric's name"):
            log.log_metrics({name: 1.0}, 1)
    log.log_metrics({f"metric_{i}": 1.0 for i in range(MAX_METRICS)}, 1)
    with pytest.raises(UserError, match=f"more than {MAX_METRICS} different metrics"):
        log.log_metrics({"another": 1.0}, 2)
    log.log_metrics({"metric_7": float("nan")}, 2)
    assert len(read_metrics(tmp_path)) == MAX_METRICS + 1


def test_a_folder_that_is_gone_is_not_brought_back(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    for action in (
        lambda: check_present(gone),
        lambda: write_record(gone, RECORD),
        lambda: append_metrics(gone, [Row(1, 0, "a", 1.0, 0.0)]),
    ):
        one_line(action, "gone has been removed or renamed")
    assert not gone.exists()


@pytest.mark.parametrize("kind", ["FIFO", "device", "link"])
def test_nothing_but_a_file_is_written_to(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "metrics.csv"
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null" if kind == "device" else tmp_path / "other")
    with pytest.raises(UserError, match="not a regular file"):
        append_metrics(tmp_path, [Row(1, 0, "a", 1.0, 0.0)])


def test_what_a_killed_training_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    ours = [".record.json.0123456789ab.tmp", ".metrics.csv.0123456789ab.tmp", "heartbeat/.rank_3.json.tmp",
            "samples/.step_000004_guided.png.0123456789ab.tmp", "samples/latest/.00.png.0123456789ab.tmp",
            ".tokenizer.safetensors.0123456789ab.tmp", ".config.yaml.0123456789ab.tmp"]  # fmt: skip
    others = [".evaluation.json.0123456789ab.tmp", ".notes.tmp", "x.tmp", "record.json", "samples/a.png",
              ".prune.json.0123456789ab.tmp"]  # fmt: skip
    for name in [*ours, *others]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    clear_leftovers(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(others)


HOLDER = """
import os, sys, time
from sweeps.run_lock import training_lock
with training_lock(sys.argv[1]):
    if os.fork() == 0:  # as a data-loading process
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_training_keeps_others_out_and_its_children_do_not(tmp_path: Path, root: Path) -> None:
    run_dir = tmp_path / "s" / "a"
    run_dir.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir)], cwd=root, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert is_claimed(run_dir) and claim(run_dir) is None and state_of(run_dir) == "running"
        with pytest.raises(UserError, match="a is being trained by another"), training_lock(run_dir):
            pass
        holder.kill()
        holder.wait()
        with (  # although the child lives on
            training_lock(run_dir),
            pytest.raises(UserError, match="another process"),
            training_lock(run_dir),
        ):
            pass
        assert not is_claimed(run_dir)
        lock = claim(run_dir)
        assert lock is not None and is_claimed(run_dir)
        with training_lock(run_dir):  # what a driver has claimed its child trains
            pass
        os.close(lock)
    finally:
        os.killpg(holder.pid, 9)


@pytest.mark.parametrize("moment", ["NaN", "Infinity", "-1", "1e300", '"x"', "null", "[]", "9" * 400])
def test_a_sign_of_life_at_an_impossible_time_says_nothing(moment: str, tmp_path: Path) -> None:
    (tmp_path / "heartbeat").mkdir()
    (tmp_path / "heartbeat" / "rank_0.json").write_text(f'{{"time": {moment}}}')
    assert heartbeat_age(tmp_path) is None
