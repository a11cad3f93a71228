"""A tokenizer's way as a user walks it: pretraining, tuning of its decoder, the table, and what refuses it."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from story_command import command

pytestmark = pytest.mark.slow

SCALES = "tokenizer.scales=[1,4]"  # 32 px, the smallest that LPIPS takes


@pytest.fixture(scope="module")
def story(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """prepare → pretraining → tuning, in one folder."""
    base = tmp_path_factory.mktemp("tuning")
    (base / "pictures").mkdir()
    for i in range(20):
        picture = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(picture).ellipse((i, 2, i + 12, 14 + i // 2), fill=("red", "green", "blue")[i % 3])
        picture.save(base / f"pictures/{i:02d}.png")
        (base / f"pictures/{i:02d}.txt").write_text("circle")
    prepared = (base / "pictures", "--out", base / "data", "--size", 32, "--validation-fraction", 0.3)
    command(root, "experiments.prepare", *prepared)
    command(root, "experiments.train", "tokenizer/tiny", SCALES, *common(base))
    command(root, "experiments.train", *tuning(base))
    return base


def common(base: Path) -> tuple[str, ...]:
    data = f"{base}/data"
    return (
        f"data.train={data}/train-*.tar",
        f"data.validation={data}/validation-*.tar",
        f"runs_dir={base}/runs",
    )


def tuning(base: Path) -> tuple[str, ...]:
    weights = f"tokenizer_weights={base}/runs/single/tiny/tokenizer.safetensors"
    settings = "decoder.lpips_net=alex decoder.discriminator_features=4 decoder.start_step=2 decoder.r1=0.1"
    steps = "trainer.max_steps=6 trainer.accumulate=2 callbacks.checkpoint_every=2 trainer.validate_every=3"
    return (
        "tokenizer/tiny",
        "task=decoder",
        "name=tuned",
        SCALES,
        weights,
        *settings.split(),
        *steps.split(),
        *common(base),
    )


def test_the_run_tells_its_story(story: Path, root: Path) -> None:
    folder = story / "runs/single/tuned"
    record = json.loads((folder / "record.json").read_text())
    assert record["status"] == "finished" and record["step"] == record["max_steps"] == 6
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert {int(row["step"]) for row in rows if row["metric"] == "validation/psnr"} == {3, 6}
    assert {int(row["step"]) for row in rows if row["metric"] == "train/l1"} == {5}  # log_every
    names = sorted(path.name for path in (folder / "checkpoints").glob("step_*.ckpt"))
    assert names == ["step_000004.ckpt", "step_000006.ckpt"]
    assert "nothing to do" in command(root, "experiments.train", *tuning(story))


def test_only_the_decoder_has_changed(story: Path) -> None:
    before, after = (
        load_file(story / f"runs/single/{name}/tokenizer.safetensors") for name in ("tiny", "tuned")
    )
    for key, value in before.items():
        assert torch.equal(after[key], value) != key.startswith(("decoder.", "post_quant_conv.")), key


def test_table_side_by_side(story: Path, root: Path) -> None:
    sources = [f"{story}/runs/single/{name}" for name in ("tiny", "tuned")]
    printed = command(
        root, "experiments.evaluate_tokenizer", *sources, "--data", story / "data", "--out", story / "table"
    )
    assert "32 px" in printed and "rfid_alexnet" in printed
    rows = {(row["metric"], row["scale"]): row for row in csv.DictReader((story / "table/table.csv").open())}
    for scale in ("0", "1"):
        row = rows["latent_error", scale]
        assert row["tiny"] == row["tuned"]  # the tokens are the same
    assert rows["psnr", ""]["tiny"] != rows["psnr", ""]["tuned"]
    assert Image.open(story / "table/worst.png").width > 5 * 128
    pictures = {row["key"] for row in csv.DictReader((story / "table/images.csv").open())}
    assert (story / "table/page.html").read_text().count("<img ") == 5 * len(pictures)


def test_a_generator_of_another_pyramid_refuses_it(story: Path, root: Path) -> None:
    weights = f"tokenizer_weights={story}/runs/single/tuned/tokenizer.safetensors"
    settings = (weights, *common(story), "name=other", "tokenizer.scales=[1,3]", "data.embeddings=null")
    printed = command(root, "experiments.train", "generator/tiny", *settings, code=2)
    assert "tokenizer.scales=[1, 3] (the weights: [1, 4])" in printed
