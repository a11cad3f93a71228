"""docs/extending.md: its examples run, its settings exist, and whoever reads a run folder imports nothing from it."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from story_images import draw_pictures
from synthetic_runs import record, write_run

from configs.build import build_profiler
from configs.extensions import check_extensions
from configs.loading import from_run, load, to_yaml
from configs.loggers import build_loggers
from experiments import compare, status, train
from reports.data.metric_catalogue import describe
from reports.data.runs import read_run
from switti.errors import UserError
from switti.weights.torch_files import read_torch

LONGEST = 15  # lines of code in an example
FOREIGN_PATHS = ("trainer.loggers=[poison:X]", "callbacks.extra=[poison:X]", "metrics.extra=[poison:X]",
                 "text.encoder=poison:X", "data.source=poison:X")  # fmt: skip
TINY = (
    "data.source=my_project:CaptionedFolder", "data.train=pictures", "data.validation=pictures", "data.embeddings=null",
    "trainer.accelerator=cpu",
)  # fmt: skip
GENERATOR = (
    *TINY, "tokenizer_weights=runs/single/tiny/tokenizer.safetensors", "text.encoder=my_project:Letters",
    "text.width=128", "text.pooled_width=128", "trainer.max_steps=4", "callbacks.metrics_every=2",
    "metrics.extra=[my_project:Brightness]", "metrics.names=[]", "callbacks.extra=[my_project:Countdown]",
    "trainer.loggers=[my_project:json_lines]", "callbacks.checkpoint_every=2",
)  # fmt: skip


def blocks(root: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (root / "docs/extending.md").read_text(), flags=re.DOTALL)


def run(folder: Path, root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(folder), str(root)])
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def project(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples in one file, images beside it, and a tokenizer trained from a script."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "my_project.py").write_text("\n\n".join(blocks(root)))
    draw_pictures(folder / "pictures")
    settings = ", ".join(map(repr, ("trainer.max_steps=2", *TINY)))
    done = run(folder, root, "-c", f"import my_project; my_project.train('tokenizer/tiny', {settings})")
    assert done.returncode == 0, done.stderr
    return folder


def values(folder: Path, metric: str) -> dict[int, float]:
    with (folder / "metrics.csv").open() as stream:
        return {int(r["step"]): float(r["value"]) for r in csv.DictReader(stream) if r["metric"] == metric}


def test_examples_are_short_and_their_settings_exist(root: Path) -> None:
    assert len(blocks(root)) == 6
    for block in blocks(root):
        assert len([line for line in block.splitlines() if line.strip()]) <= LONGEST, block
    text = (root / "docs/extending.md").read_text().replace("\\\n", "")
    commands = [
        shlex.split(line)
        for line in re.findall(r"^    python -m experiments.train (.*)", text, flags=re.MULTILINE)
    ]
    assert len(commands) == 5
    for config, *settings in commands:
        load(config, settings)


@pytest.mark.slow
def test_a_run_with_everything_of_its_own(project: Path, root: Path) -> None:
    done = run(project, root, "-m", "experiments.train", "generator/tiny", *GENERATOR, "name=own")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = project / "runs/single/own"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("train/loss" in line for line in lines)
    assert list(values(folder, "metrics/brightness")) == [2, 4]
    assert not list(folder.glob("events*"))

    read_run(folder)
    found = describe("evaluation/brightness")
    assert (found.title, found.unit, found.better) == ("brightness", "%", None)
    assert found.description == "mean of all pixels and channels"
    written = json.loads((folder / "record.json").read_text())
    assert written["status"] == "finished" and written["data"]["train"]["samples"] == 24


@pytest.mark.slow
def test_a_script_leaves_the_same_run_folder_as_the_command(project: Path, root: Path) -> None:
    settings = ", ".join(map(repr, (*GENERATOR, "name=script")))
    code = f"import my_project; my_project.train('generator/tiny', {settings})"
    for arguments in (
        ("-c", code),
        ("-m", "experiments.train", "generator/tiny", *GENERATOR, "name=command"),
    ):
        done = run(project, root, *arguments)
        assert done.returncode == 0, done.stderr
    script, command = (project / "runs/single" / name for name in ("script", "command"))
    files = [
        {str(path.relative_to(folder)) for path in folder.rglob("*")} - {".lock"}
        for folder in (script, command)
    ]
    assert files[0] == files[1]
    texts = [(folder / "config.yaml").read_text() for folder in (script, command)]
    assert texts[0].replace("name: script", "name: command") == texts[1]
    assert values(script, "train/loss") == values(command, "train/loss") != {}
    records = [json.loads((folder / "record.json").read_text()) for folder in (script, command)]
    assert records[0].keys() == records[1].keys()


@pytest.mark.slow
def test_resuming_is_exact_with_a_source_of_its_own_and_with_limited_epochs(
    project: Path, root: Path
) -> None:
    train_it = ("-m", "experiments.train", "generator/tiny", *GENERATOR, "optimizer.schedule=constant")
    for name, further in (
        ("plain", ()), ("limited", ("trainer.limit_train_batches=3",)),
        ("halves", ("trainer.max_steps=2", "trainer.limit_train_batches=3")),
        ("halves", ("trainer.limit_train_batches=3",)),
    ):  # fmt: skip
        done = run(project, root, *train_it, f"name={name}", *further)
        assert done.returncode == 0, done.stderr
    whole, limited, halves = (
        read_torch(project / f"runs/single/{name}/checkpoints/step_000004.ckpt")
        for name in ("plain", "limited", "halves")
    )
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, limited["state_dict"][name]) and torch.equal(
            tensor, halves["state_dict"][name]
        )
    assert (whole["epoch"], limited["epoch"], halves["epoch"]) == (0, 1, 1)


@pytest.mark.slow
def test_a_fast_dev_run_leaves_nothing_and_blocks_nothing(project: Path, root: Path) -> None:
    train_it = (
        "-m",
        "experiments.train",
        "generator/tiny",
        *GENERATOR,
        "name=fast",
        "trainer.profiler=simple",
    )
    done = run(project, root, *train_it, "trainer.fast_dev_run=true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        not (project / "runs/single/fast").exists()
        and not (project / "runs/.fast_dev_run/single/fast").exists()
    )
    done = run(project, root, *train_it)
    assert done.returncode == 0 and "starting" in done.stdout, done.stderr
    assert "run_training_batch" in next((project / "runs/single/fast/profile").iterdir()).read_text()
    done = run(project, root, *train_it, "trainer.fast_dev_run=2", "optimizer.learning_rate=1")
    assert done.returncode == 0, done.stderr
    assert json.loads((project / "runs/single/fast/record.json").read_text())["step"] == 4


@pytest.mark.slow
def test_offline_runs_of_weights_and_biases_are_continued(project: Path, root: Path) -> None:
    pytest.importorskip("wandb")
    settings = (*GENERATOR, "name=wandb", "trainer.loggers=[csv,wandb]")
    for steps in (2, 4):
        done = run(
            project, root, "-m", "experiments.train", "generator/tiny", *settings, f"trainer.max_steps={steps}",
            WANDB_MODE="offline", WANDB_SILENT="true",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    folders = list((project / "runs/single/wandb/wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({folder.name.rpartition("-")[2] for folder in folders}) == 1


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            "trainer.loggers=[tensorbord]",
            "trainer.loggers=tensorbord is not one of tensorboard, csv, wandb, mlflow, ",
        ),
        ("trainer.loggers=[csv,csv]", "names one twice"),
        ("callbacks.extra=[Countdown]", "callbacks.extra=Countdown is not package.module:Name"),
        ("metrics.extra=[fid_alexnet]", "built-in metrics go into metrics.names"),
        ("metrics.names=[a.b:C]", "goes into metrics.extra"),
        ("text.encoder=minilmm", "did you mean 'minilm'?"),
        ("data.source=shard", "data.source=shard is not one of shards, package.module:Name"),
        ("trainer.limit_train_batches=0", "must be a positive multiple"),
        ("trainer.limit_train_batches=0.5", "is not an integer"),
        ("trainer.fast_dev_run=-1", "must be true, false or a number of batches"),
        ("trainer.profiler=fast", "is not one of simple, advanced, pytorch"),
    ],
)
def test_wrong_names_are_refused_when_settings_are_read(setting: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load("generator/tiny", [setting])
    assert words in str(caught.value)


def test_embeddings_of_shards_do_not_go_with_another_source() -> None:
    with pytest.raises(UserError, match=r"set data\.embeddings=null"):
        load("generator/tiny", ["data.source=a:B", "data.embeddings=somewhere"])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("trainer.loggers=[nowhere_to_be_found:X]", "there is no module nowhere_to_be_found"),
        ("trainer.loggers=[torch.nn:Linear]", "is not a subclass of lightning's Logger"),
        ("callbacks.extra=[torch.nn:Linear]", "is not a subclass of lightning's Callback"),
        ("callbacks.extra=[lightning.pytorch:Calback]", "has no Calback; did you mean 'Callback'?"),
        ("metrics.extra=[torch.nn:Linear]", "is not a subclass of torchmetrics.Metric"),
        ("text.encoder=torch:no_such_encoder", "torch has no no_such_encoder"),
        ("data.source=torch:no_such_source", "torch has no no_such_source"),
    ],
)
def test_names_are_checked_before_a_run_folder_is_made(tmp_path: Path, setting: str, words: str) -> None:
    config = load("generator/tiny", [setting, f"runs_dir={tmp_path / 'runs'}", "data.embeddings=null"])
    with pytest.raises(UserError) as caught:
        train.train(config)
    assert words in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_named_with_its_remedy(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("configs.loggers.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=rf"trainer.loggers={name} needs a package .* pip install -e '\.\[{name}\]'"
    ):
        check_extensions(load("generator/tiny", [f"trainer.loggers=[{name}]"]))


def test_metrics_csv_is_written_even_if_it_is_not_listed(tmp_path: Path) -> None:
    place = f"runs_dir={tmp_path}"
    default = build_loggers(load("generator/tiny", [place]))
    none = build_loggers(load("generator/tiny", [place, "trainer.loggers=[]"]))
    assert [type(logger).__name__ for logger in default] == ["EventLog", "MetricsCSV"]
    assert [type(logger).__name__ for logger in none] == ["MetricsCSV"]


@pytest.mark.parametrize("name", ["simple", "advanced", "pytorch"])
def test_profilers_write_into_the_run_folder(tmp_path: Path, name: str) -> None:
    profiler = build_profiler(load("generator/tiny", [f"runs_dir={tmp_path}", f"trainer.profiler={name}"]))
    assert profiler is not None and profiler.dirpath == tmp_path / "single/tiny/profile"


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A study of two runs whose configs name a module, importable from here, that must not be imported."""
    (tmp_path / "poison.py").write_text("raise SystemError('was imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for seed in (0, 1):
        settings = [*FOREIGN_PATHS, "data.embeddings=null", f"seed={seed}"]
        saved = yaml.safe_load(to_yaml(load("generator/tiny", settings)))
        name = f"run_{seed}"
        write_run(tmp_path / "runs/study" / name, saved, record(name, seed), [(10, "train/loss", 3.0)])
    yield tmp_path / "runs/study"
    assert "poison" not in sys.modules


def test_reading_run_folders_imports_nothing_that_they_name(
    poisoned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert from_run(poisoned / "run_0").text.encoder == "poison:X"
    assert read_run(poisoned / "run_0").config["text.encoder"] == "poison:X"
    assert status.main([str(poisoned)]) in (0, None)
    assert compare.main([str(poisoned)]) in (0, None)
    assert train.main([str(poisoned / "run_0"), "--show"]) == 0
    assert "poison:X" in capsys.readouterr().out
