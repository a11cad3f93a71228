"""The whole way as a user walks it, on a handful of pictures: every step is a command in a process of its own."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from story_command import command
from story_images import draw_pictures


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """prepare → embed → tokenizer → both generators."""
    root = Path(__file__).parents[2]
    base = tmp_path_factory.mktemp("story")
    draw_pictures(base / "pictures")
    data, runs = base / "data", base / "runs"
    command(
        root,
        "experiments.prepare",
        base / "pictures",
        "--out",
        data,
        "--size",
        16,
        "--validation-fraction",
        0.3,
    )
    command(root, "experiments.embed", data)
    shards = [
        f"data.train={data}/train-*.tar",
        f"data.validation={data}/validation-*.tar",
        f"runs_dir={runs}",
    ]
    command(root, "experiments.train", "tokenizer/tiny", *shards)
    study = base / "study.yaml"
    study.write_text(
        "name: story\nbase: generator/tiny\npair_by: seed\n"
        "vary:\n  model.visibility: [causal, non_causal]\n  seed: [0]\n"
    )
    weights = f"tokenizer_weights={runs}/single/tiny/tokenizer.safetensors"
    settings = [*shards, weights, f"data.embeddings={data}/embeddings"]
    printed = command(root, "experiments.sweep", study, *settings)
    again = command(root, "experiments.sweep", study, *settings)
    (base / "sweep.txt").write_text(printed)
    (base / "again.txt").write_text(again)
    return {"root": root, "base": base, "study": runs / "story", "data": data, "runs": runs}


def run_folders(story: dict[str, Path]) -> dict[str, Path]:
    folders = [path.parent for path in story["study"].glob("*/record.json")]
    return {("non_causal" if "non_causal" in folder.name else "causal"): folder for folder in folders}


def read_losses(folder: Path, metric: str) -> list[float]:
    with (folder / "metrics.csv").open() as stream:
        return [float(row["value"]) for row in csv.DictReader(stream) if row["metric"] == metric]


def test_both_variants_finish_and_tell_their_story(story: dict[str, Path]) -> None:
    folders = run_folders(story)
    assert set(folders) == {"causal", "non_causal"}
    for folder in folders.values():
        record = json.loads((folder / "record.json").read_text())
        assert record["status"] == "finished" and record["step"] == record["max_steps"] == 8
        assert record["tokens_per_image"] == 5
        for part in ("config.yaml", "metrics.csv", "checkpoints/last.ckpt", "samples/latest/index.json"):
            assert (folder / part).exists(), part
        assert list(folder.glob("events.out.tfevents*"))
        names = {row["metric"] for row in csv.DictReader((folder / "metrics.csv").open())}
        for name in (
            "train/loss",
            "train/gradient_norm",
            "validation/loss_by_scale/1",
            "norms/last/max",
            "metrics/fid_alexnet",
            "metrics/mini_clip_score",
            "metrics/mini_clip_score_shuffled",
            "time/samples_per_second",
        ):
            assert name in names, name


def test_training_lowers_the_loss(story: dict[str, Path]) -> None:
    for folder in run_folders(story).values():
        losses = read_losses(folder, "validation/loss")
        assert losses[-1] < losses[0]


def test_the_same_sweep_again_does_nothing(story: dict[str, Path]) -> None:
    assert "skip" in (story["base"] / "again.txt").read_text()
    assert "starting" not in (story["base"] / "again.txt").read_text()


def test_sample_evaluate_compare(story: dict[str, Path]) -> None:
    root, folders = story["root"], run_folders(story)
    for name, folder in folders.items():
        picture = story["base"] / f"{name}.png"
        command(
            root,
            "experiments.sample",
            folder,
            "red circle",
            "a blue square",
            "--n",
            2,
            "--out",
            picture,
            "guidance=2",
        )
        with Image.open(picture) as opened:
            assert opened.width > 2 * 128
            assert json.loads(opened.text["switti"])["sampling"]["guidance"] == 2.0
    printed = command(
        root, "experiments.evaluate", *folders.values(), "--images", 4, "--stopped-early", "top_k=8"
    )
    assert printed.count("with guidance stopped early") == 8
    evaluations = {
        name: json.loads((folder / "evaluation.json").read_text()) for name, folder in folders.items()
    }
    for name, evaluation in evaluations.items():
        assert len(evaluation["sampling"]["seconds_per_scale"]) == 2
        assert (evaluation["sampling"]["cache_bytes"] > 0) == (name == "causal")
        assert (evaluation["settings"]["top_k"], evaluation["settings"]["guidance_stop"]) == (8, None)
        assert evaluation["sampling_stopped_early"]["guidance_stop"] == 0  # two scales before the end of two
        assert evaluation["metrics_stopped_early"] != evaluation["metrics"]
    timed = {
        e[part]["timed_together"] for e in evaluations.values() for part in e if part.startswith("sampling")
    }
    assert len(timed) == 1
    report = story["base"] / "report"
    command(root, "experiments.compare", *folders.values(), "--out", report)
    page = (report / "index.html").read_text()
    prompts = json.loads((folders["causal"] / "samples" / "latest" / "index.json").read_text())["prompts"]
    for word in ("causal", "non_causal", "validation", "mini_clip_score", *prompts):
        assert word in page
    assert (report / "rows.csv").is_file() and (report / "paired.csv").is_file()


def test_a_picture_is_the_same_in_another_batch(story: dict[str, Path]) -> None:
    root, folder = story["root"], run_folders(story)["non_causal"]
    for name, batch in (("one", 1), ("four", 4)):
        out = story["base"] / name
        command(
            root,
            "experiments.sample",
            folder,
            "red circle",
            "--n",
            4,
            "--batch",
            batch,
            "--out",
            out,
            "--separate",
        )
    for file in sorted((story["base"] / "one").iterdir()):
        with Image.open(file) as a, Image.open(story["base"] / "four" / file.name) as b:
            difference = np.asarray(a, dtype=np.int16) - np.asarray(b, dtype=np.int16)
            assert np.abs(difference).max() <= 2  # of 255: the order of sums; another token changes far more


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.visiblity=causal"], "did you mean 'model.visibility'"),
        (["model.width=abc"], "model.width"),
        (["data.train=/nowhere/*.tar"], "/nowhere"),
        (["tokenizer_weights=/nowhere.safetensors"], "/nowhere.safetensors"),
        (["data.embeddings=/nowhere"], "/nowhere"),
    ],
)
def test_bad_settings_end_in_one_clear_line(story: dict[str, Path], arguments: list[str], words: str) -> None:
    data, runs = story["data"], story["runs"]
    given = {
        "data.train": f"{data}/train-*.tar",
        "data.validation": f"{data}/validation-*.tar",
        "data.embeddings": f"{data}/embeddings",
        "tokenizer_weights": f"{runs}/single/tiny/tokenizer.safetensors",
        "runs_dir": str(runs),
        "name": "bad",
    }
    given |= dict(argument.split("=", 1) for argument in arguments)
    settings = [f"{key}={value}" for key, value in given.items()]
    printed = command(story["root"], "experiments.train", "generator/tiny", *settings, code=2)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0], printed


def test_checkpoint_of_another_architecture_is_refused(story: dict[str, Path]) -> None:
    folder = run_folders(story)["causal"]
    other = story["runs"] / "single" / "other"
    (other / "checkpoints").mkdir(parents=True)
    text = (folder / "config.yaml").read_text().replace("width: 32", "width: 64")
    assert text != (folder / "config.yaml").read_text()
    (other / "config.yaml").write_text(text)
    (other / "checkpoints" / "step_000008.ckpt").write_bytes(
        (folder / "checkpoints" / "step_000008.ckpt").read_bytes()
    )
    printed = command(story["root"], "experiments.sample", other, "cat", code=2)
    assert "does not fit" in printed and "[32" in printed


def test_a_finished_run_goes_on_when_asked_for_more(story: dict[str, Path]) -> None:
    """Last here: nothing after it may need the tokenizer run as it was."""
    shards = [f"data.train={story['data']}/train-*.tar", f"data.validation={story['data']}/validation-*.tar"]
    train = [story["root"], "experiments.train", "tokenizer/tiny", *shards, f"runs_dir={story['runs']}"]
    assert "is finished at step" in command(*train)
    record = story["runs"] / "single" / "tiny" / "record.json"
    steps = json.loads(record.read_text())["step"]
    command(*train, f"trainer.max_steps={steps + 2}")
    longer = json.loads(record.read_text())
    assert (longer["status"], longer["step"], longer["resumed"]) == ("finished", steps + 2, [steps])
