"""What the board writes for TensorBoard, read back with TensorBoard's own readers and over HTTP."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import pytest
from PIL import Image
from stand_in import BASE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata as hparams_metadata

from configs.loading import load, to_yaml
from experiments import board
from reports.board_mirror import Board, thinned
from reports.tensorboard import chart_name
from switti.errors import UserError
from switti.run_folder import Row

METRICS = {"train/loss": 5.0, "validation/loss": 5.5, "metrics/fid_alexnet": 40.0, "norms/block_0/max": 3.0}


def write_run(study: Path, name: str, status: str = "finished", step: int = 10, **settings: object) -> None:
    folder = study / name
    folder.mkdir(parents=True, exist_ok=True)
    base = study.parent / "base.yaml"
    base.write_text(BASE)
    given = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    (folder / "config.yaml").write_text(to_yaml(load(base, [*given, f"name={name}", "study=s"])))
    record = {"format": 1, "status": status, "step": step, "max_steps": 10, "train_seconds": 4.0}
    record |= {"host": "elsewhere", "updated": datetime.now(UTC).isoformat()}
    (folder / "record.json").write_text(json.dumps(record))
    rows = [f"{step},0,{metric},{value + step},0\n" for metric, value in METRICS.items()]
    (folder / "metrics.csv").write_text("step,epoch,metric,value,time\n" + "".join(rows))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "s"
    for seed in (0, 1):
        write_run(folder, f"seed={seed}", seed=seed, model__norms="pre")
    vary = {"seed": [0, 1], "model.norms": ["pre"]}
    (folder / "study.json").write_text(json.dumps({"vary": vary, "runs": []}))
    return folder


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    return tmp_path / "mirror"


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def layout_of(run: Path) -> dict[str, dict[str, list[str]]]:
    """Category → chart → tags."""
    tensor = events(run).Tensors("custom_scalars__config__")[-1].tensor_proto
    layout = Layout.FromString(tensor.string_val[0])
    return {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in layout.category}


def steps(run: Path, tag: str) -> list[int]:
    return [point.step for point in events(run).Scalars(tag)]


def add_rows(run: Path, *rows: tuple[int, str, float]) -> None:
    with (run / "metrics.csv").open("a") as stream:
        stream.writelines(f"{step},0,{metric},{value},17.5\n" for step, metric, value in rows)
    later = time.time_ns() + 10**9 * len((run / "metrics.csv").read_text())
    os.utime(run / "metrics.csv", ns=(later, later))  # another time, however coarse the file system's clock


def test_each_run_is_shown_once_with_the_steps_of_its_table(study: Path, mirror: Path) -> None:
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    Board(study, mirror).renew()
    shown = {path.parent.relative_to(mirror).as_posix() for path in mirror.rglob("*tfevents*")}
    assert shown == {"seed=0", "seed=1"}
    assert steps(mirror / "seed=0", "1 loss/train") == [10]
    (point,) = events(mirror / "seed=1").Scalars("2 metrics/fid_alexnet")
    assert (point.step, point.value) == (10, 50.0)
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before


def test_losses_come_first_and_no_chart_is_of_one_kind_of_run_alone(study: Path, mirror: Path) -> None:
    Board(study, mirror).renew()
    tags = sorted(events(mirror / "seed=0").Tags()["scalars"])
    assert tags == ["1 loss/train", "1 loss/validation", "2 metrics/fid_alexnet", "5 norms/block_0/max"]
    names = [
        "data/bad",
        "train/loss",
        "metrics/x",
        "validation/loss",
        "train/lr",
        "norms/y",
        "own/z",
        "alone",
    ]
    assert sorted(map(chart_name, names)) == [
        "1 loss/train", "1 loss/validation", "2 metrics/x", "4 train/lr", "5 norms/y", "8 data/bad", "9 alone",
        "9 own/z",
    ]  # fmt: skip


def test_a_run_in_progress_is_followed_and_one_that_was_resumed_starts_over(
    study: Path, mirror: Path
) -> None:
    board, run = Board(study, mirror), study / "seed=0"
    board.renew()
    add_rows(run, (12, "train/loss", 4.0), (14, "train/loss", 3.0))
    board.renew()
    assert steps(mirror / "seed=0", "1 loss/train") == [10, 12, 14]
    kept = [line for line in (run / "metrics.csv").read_text().splitlines() if not line.startswith("14,")]
    (run / "metrics.csv").write_text("\n".join(kept) + "\n")
    add_rows(run, (13, "train/loss", 2.5))
    board.renew()
    board.renew()
    assert steps(mirror / "seed=0", "1 loss/train") == [10, 12, 13]
    assert steps(mirror / "seed=0", "1 loss/validation") == [10]


def test_long_curves_are_thinned_evenly_to_the_last_point() -> None:
    rows = [Row(step, 0, "a", 0.0, 0.0) for step in range(1, 2502)] + [Row(7, 0, "b", 0.0, 0.0)]
    kept = thinned(rows)
    assert [row.step for row in kept if row.metric == "a"] == list(range(1, 2502))[::-3][::-1]
    assert kept[-1].metric == "b"
    assert thinned(rows[:900]) == rows[:900]


def test_charts_that_belong_together_find_the_names_that_are_shown(study: Path, mirror: Path) -> None:
    Board(study, mirror).renew()
    charts = layout_of(mirror / "seed=0")
    assert list(charts["Loss by scale"]) == ["all scales", "scale 0, 1×1", "scale 1, 2×2", "scale 2, 4×4"]
    (tag,) = charts["Loss"]["training"]
    assert re.match(tag, chart_name("train/loss"))
    (tag,) = charts["Loss by scale"]["scale 1, 2×2"]
    assert re.match(tag, chart_name("validation/loss_by_scale/1"))
    assert not re.match(tag, chart_name("validation/loss_by_scale/10"))
    (tag,) = charts["Norms by block"]["largest, all blocks"]
    assert all(re.match(tag, chart_name(f"norms/{name}/max")) for name in ("block_0", "block_12", "last"))
    assert not re.match(tag, chart_name("norms/last/mean"))
    assert [name for name in charts["Norms by block"] if name.startswith("block")] == ["block 0", "block 1"]
    (tag,) = charts["Metrics"]["fid_alexnet"]
    assert re.match(tag, chart_name("metrics/fid_alexnet"))


def test_the_table_sets_what_was_varied_against_what_came_out(study: Path, mirror: Path) -> None:
    write_run(study, "seed=1", status="running", step=4, seed=1, model__norms="pre")
    board = Board(study, mirror)
    board.renew()
    for seed, ends in [(0, True), (1, False)]:
        run = events(mirror / f"seed={seed}")
        content = run.summary_metadata[hparams_metadata.SESSION_START_INFO_TAG].plugin_data.content
        start = hparams_metadata.parse_session_start_info_plugin_data(content)
        values = {name: value.number_value or value.string_value for name, value in start.hparams.items()}
        assert values == {"seed": seed or "", "model.norms": "pre"}
        assert start.group_name == f"seed={seed}"
        assert ends == (hparams_metadata.SESSION_END_INFO_TAG in run.summary_metadata)
    content = events(mirror / "seed=0").summary_metadata[hparams_metadata.EXPERIMENT_TAG].plugin_data.content
    table = hparams_metadata.parse_experiment_plugin_data(content)
    assert {info.name for info in table.hparam_infos} == {"seed", "model.norms"}
    assert [info.display_name for info in table.metric_infos] == [
        "validation/loss", "train/loss", "metrics/fid_alexnet"
    ]  # fmt: skip
    assert table.metric_infos[0].name.tag == "1 loss/validation"


def test_sample_grids_are_shown_as_they_are(study: Path, mirror: Path) -> None:
    (study / "seed=0" / "samples").mkdir()
    for step in (5, 10):
        Image.new("RGB", (6, 4), (step, 0, 0)).save(study / f"seed=0/samples/step_{step:06d}_guided.png")
    (study / "seed=0/samples/step_000015_guided.png").write_bytes(b"cut off")
    board = Board(study, mirror)
    board.renew()
    board.renew()
    found = events(mirror / "seed=0").Images("samples/guided")
    assert [(image.step, image.width, image.height) for image in found] == [(5, 6, 4), (10, 6, 4)]
    assert found[0].encoded_image_string == (study / "seed=0/samples/step_000005_guided.png").read_bytes()


def test_a_damaged_run_does_not_hide_the_others(
    study: Path, mirror: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (study / "seed=0" / "metrics.csv").write_text("step,epoch,metric,value,time\nx,0,a,1,0\n")
    board = Board(study, mirror)
    board.renew()
    board.renew()
    assert {path.name for path in mirror.iterdir()} == {"seed=1"}
    told = capsys.readouterr().err
    assert told.count("skipped: ") == 1 and str(study / "seed=0" / "metrics.csv") in told
    (study / "seed=1" / "record.json").write_text("[]")
    with pytest.raises(UserError, match=r"metrics\.csv, line 2"):
        board.renew()


def test_nothing_to_show_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match="no run in runs/empty has started"):
        board.main(["empty"])
    with pytest.raises(
        UserError, match="no study 'nix', neither as a path nor below runs/; there are: empty"
    ):
        board.main(["nix"])


@pytest.mark.slow
def test_tensorboard_serves_layout_and_table(study: Path, root: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "experiments.board", str(study), "--port", str(port)]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 90
        while True:
            assert time.monotonic() < deadline and process.poll() is None
            try:
                if ask(port, "runs") == ["seed=0", "seed=1"]:
                    break
            except OSError:
                pass
            time.sleep(0.5)
        titles = [category["title"] for category in ask(port, "plugin/custom_scalars/layout")["category"]]
        assert titles[:2] == ["Loss", "Loss by scale"]
        table = ask(port, "plugin/hparams/experiment", {"experimentName": ""})
        assert {info["name"] for info in table["hparamInfos"]} >= {"seed"}
        assert [info["displayName"] for info in table["metricInfos"]] == [
            "validation/loss", "train/loss", "metrics/fid_alexnet"
        ]  # fmt: skip
        other = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=90, check=False)
        assert other.returncode == 2 and f"localhost:{port}" in other.stderr  # the port is taken
    finally:
        process.terminate()
        process.wait()
    with pytest.raises(OSError):
        ask(port, "runs")


def ask(port: int, path: str, body: dict | None = None):
    request = urllib.request.Request(
        f"http://localhost:{port}/data/{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.loads(answer.read())
