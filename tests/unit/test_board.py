"""What the board writes for TensorBoard, read back with TensorBoard's own readers and over HTTP."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import pytest
from stand_in import BASE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata as hparams_metadata

from configs.loading import load, to_yaml
from experiments import board
from experiments.board_layout import Board
from switti.errors import UserError

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


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def layout_of(study: Path) -> dict[str, dict[str, list[str]]]:
    """Category → chart → tags."""
    tensor = events(study / "board").Tensors("custom_scalars__config__")[-1].tensor_proto
    layout = Layout.FromString(tensor.string_val[0])
    return {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in layout.category}


def test_charts_that_belong_together_find_the_names_that_runs_log(study: Path) -> None:
    Board(study).renew()
    charts = layout_of(study)
    assert list(charts["Loss by scale"]) == ["all scales", "scale 0, 1×1", "scale 1, 2×2", "scale 2, 4×4"]
    (tag,) = charts["Loss by scale"]["scale 1, 2×2"]
    assert re.match(tag, "validation/loss_by_scale/1") and not re.match(tag, "validation/loss_by_scale/10")
    (tag,) = charts["Norms by block"]["largest, all blocks"]
    assert all(re.match(tag, f"norms/{name}/max") for name in ("block_0", "block_12", "last"))
    assert not re.match(tag, "norms/last/mean")
    assert [name for name in charts["Norms by block"] if name.startswith("block")] == ["block 0", "block 1"]
    assert list(charts["Metrics"]) == ["fid_alexnet"]


def test_the_table_sets_what_was_varied_against_what_came_out(study: Path) -> None:
    write_run(study, "seed=1", status="running", step=4, seed=1, model__norms="pre")
    shown = Board(study)
    shown.renew()
    for seed, step, tags in [(0, 10, {"start", "end"}), (1, 4, {"start"})]:
        run = events(study / "board" / f"seed={seed}")
        content = run.summary_metadata[hparams_metadata.SESSION_START_INFO_TAG].plugin_data.content
        start = hparams_metadata.parse_session_start_info_plugin_data(content)
        values = {name: value.number_value or value.string_value for name, value in start.hparams.items()}
        assert values == {"seed": seed or "", "model.norms": "pre"}
        assert start.group_name == f"seed={seed}"
        found = run.Scalars("final/metrics/fid_alexnet")[-1]
        assert (found.step, found.value) == (step, 40 + step)
        assert run.Scalars("final/time/steps_per_second")[-1].value == step / 4
        assert {tag.split("_")[-2] for tag in run.summary_metadata if tag.startswith("_hparams_")} == tags
    write_run(study, "seed=1", seed=1, model__norms="pre")
    shown.renew()
    assert events(study / "board" / "seed=1").Scalars("final/metrics/fid_alexnet")[-1].value == 50
    shown.close()


def test_an_older_board_is_replaced_and_runs_stay_untouched(study: Path) -> None:
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    for _ in range(2):
        Board(study).renew()
    assert len(list((study / "board").glob("events*"))) == 1
    assert {path: path.read_bytes() for path in before} == before


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
                if "board/seed=1" in ask(port, "runs"):
                    break
            except OSError:
                pass
            time.sleep(0.5)
        titles = [category["title"] for category in ask(port, "plugin/custom_scalars/layout")["category"]]
        assert titles[:2] == ["Loss", "Loss by scale"]
        table = ask(port, "plugin/hparams/experiment", {"experimentName": ""})
        assert {info["name"] for info in table["hparamInfos"]} >= {"seed"}
        assert {info["name"]["tag"] for info in table["metricInfos"]} >= {
            "final/metrics/fid_alexnet",
            "final/validation/loss",
        }
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
