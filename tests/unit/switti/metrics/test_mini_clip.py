"""The small dual encoder: its loss against a plain formula, its training on a toy, its files, the shipped weights."""

import io
import json
import math
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.prepare.emoji import EmojiItem, emoji_items, render
from datamodules.stable_seeds import stable_fraction
from evaluation import mini_clip_training as training
from experiments.tools.train_mini_clip import expand
from switti.errors import UserError
from switti.metrics.collection import build_metrics
from switti.metrics.config import MetricsConfig
from switti.metrics.mini_clip import ImageDescription, MiniClip, MiniClipConfig, MiniClipHeads, load_heads
from switti.metrics.scores import pair_auc

SMALL = MiniClipConfig(text_width=6, hidden=32, width=8)


def _toy_features(count: int = 64) -> training.Features:
    """Captions are numbered points; the picture of each is a fixed linear image of it."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(count, 6, generator=generator)
    mixing = torch.randn(6, SMALL.image_width, generator=generator)
    pictures = (texts @ mixing).unsqueeze(1).repeat(1, 2, 1)
    captions = [f"thing {index // 2}, {('red', 'blue')[index % 2]} style" for index in range(count)]
    return training.Features(pictures, texts, [[index] for index in range(count)], captions)


def test_contrast_against_plain_python() -> None:
    torch.manual_seed(0)
    heads = MiniClipHeads(SMALL).eval()
    pictures, texts = torch.randn(5, SMALL.image_width), torch.randn(5, 6)
    caption = torch.tensor([0, 1, 2, 1, 4])  # rows 1 and 3 have the same caption
    texts[3] = texts[1]
    with torch.no_grad():
        a, b = heads.image(pictures).double().numpy(), heads.text(texts).double().numpy()
        loss = float(training.contrast(heads, pictures, texts, caption))
    assert np.linalg.norm(a, axis=1) == pytest.approx(np.ones(5), rel=1e-5)
    scores = a @ b.T * math.exp(float(heads.scale.detach()))
    total = 0.0
    for i in range(5):
        allowed = [j for j in range(5) if j == i or caption[j] != caption[i]]
        total -= scores[i, i] - math.log(sum(math.exp(scores[i, j]) for j in allowed))
        total -= scores[i, i] - math.log(sum(math.exp(scores[j, i]) for j in allowed))
    assert loss == pytest.approx(total / 10, rel=1e-5)


def test_training_learns_a_toy() -> None:
    data = _toy_features()
    before = training.measure(MiniClipHeads(SMALL).eval(), data)
    heads = training.fit(data, SMALL, steps=40, batch=32, rate=3e-3, seed=1)
    after = training.measure(heads, data)
    assert after["auc"] > 0.9 > before["auc"]
    assert after["style_accuracy"] > 0.85


def test_batches_are_half_whole_concepts_without_repetition() -> None:
    concepts = training.by_concept(_toy_features(64))
    assert sorted(map(len, concepts)) == [2] * 32
    for seed in range(5):
        batch = training.draw_batch(np.random.default_rng(seed), concepts, 64, 24)
        assert len(set(batch.tolist())) == 24
        whole = sum(set(concept) <= set(batch[:12].tolist()) for concept in concepts)
        assert whole == 6
    assert sorted(training.draw_batch(np.random.default_rng(0), concepts, 64, 64)) == list(range(64))


def test_training_is_repeatable() -> None:
    first, second = (
        training.fit(_toy_features(), SMALL, steps=3, batch=32, rate=3e-3, seed=1) for _ in range(2)
    )
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_variation_is_light_seeded_and_keeps_white_borders_white() -> None:
    pictures = torch.ones(4, 3, 16, 16)
    pictures[:, :, 6:10, 6:10] = 0.2
    first = training.varied(pictures, torch.Generator().manual_seed(0))
    assert torch.equal(first, training.varied(pictures, torch.Generator().manual_seed(0)))
    assert not torch.equal(first[0], first[1])
    assert 0 <= float(first.min()) < 0.5 < float(first[:, :, 0, 0].min())


def test_pooling_grids_are_those_of_the_trunk_maps() -> None:
    """Each number is the mean over one cell of one map, computed by plain slices (sides that the grids divide)."""
    config = MiniClipConfig(picture_side=127, grids=[1, 0, 2, 0, 3])
    description = ImageDescription(config)
    pictures = torch.rand(2, 3, 127, 127, generator=torch.Generator().manual_seed(0))
    maps = description.trunk(pictures)
    found = description(pictures)
    assert found.shape == (2, config.image_width) and config.image_width == 64 + 4 * 384 + 9 * 256
    torch.testing.assert_close(found[:, :64], maps[0].mean(dim=(2, 3)))
    side = maps[4].shape[-1]
    start = [side * i // 3 for i in range(3)]
    stop = [-(-side * (i + 1) // 3) for i in range(3)]
    cell = maps[4][:, :, start[1] : stop[1], start[2] : stop[2]].mean(dim=(2, 3))
    torch.testing.assert_close(found[:, 64 + 4 * 384 :].view(2, 256, 3, 3)[:, :, 1, 2], cell)


@pytest.mark.parametrize("grids", [[1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 9], [-1, 1, 1, 1, 1]])
def test_invalid_grids_are_named(grids: list[int]) -> None:
    with pytest.raises(UserError, match=r"heads\.grids="):
        MiniClipConfig(grids=grids).validate("heads")


def test_heads_without_grids_in_their_file_pool_as_before() -> None:
    assert MiniClipConfig().grids == [1, 1, 1, 1, 2] and MiniClipConfig().image_width == 1920


def test_weights_survive_saving(tmp_path: Path) -> None:
    torch.manual_seed(0)
    heads = MiniClipHeads(SMALL)
    heads.image.standardize_like(torch.randn(20, SMALL.image_width) * 3 + 1)
    results = {"train": {"auc": 0.987, "style_accuracy": 0.5}, "validation": {"auc": 0.876}}
    training.save(tmp_path, heads, results, ["--data", "a b.tar"], 12.3, 99)
    loaded = load_heads(tmp_path)
    for name, value in heads.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, atol=1e-3, rtol=1e-3)
    readme = (tmp_path / "README.md").read_text()
    assert "0.987" in readme and "0.876" in readme and "--data 'a b.tar'" in readme


def test_damaged_or_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing; train it with"):
        load_heads(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"heads": {"text_width": 6}}))
    (tmp_path / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="does not hold mini-CLIP heads"):
        load_heads(tmp_path)


def test_shards_are_read_with_all_captions(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        for index in range(2):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), (index * 255, 0, 0)).save(picture, "png")
            files = {
                "png": picture.getvalue(),
                "txt": b"plain",
                "json": json.dumps({"captions": ["plain", f"long {index}"]}).encode(),
            }
            for kind, content in files.items():
                entry = tarfile.TarInfo(f"{index}.{kind}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    split = training.read(expand([str(tmp_path / "train-*.tar")]))
    assert split.captions == [["plain", "long 0"], ["plain", "long 1"]]
    assert split.images_N3HW[:, 0].float().mean(dim=(1, 2)).tolist() == [0, 255]
    with pytest.raises(UserError, match="no shards match"):
        expand([str(tmp_path / "other-*.tar")])


@pytest.fixture(scope="module")
def held_out() -> list[EmojiItem]:
    """Twenty concepts, both styles, that the shipped heads have not seen."""
    items = [item for item in emoji_items() if stable_fraction(f"split/{item.group}") < 0.05]
    concepts = random.Random(0).sample(sorted({item.points for item in items}), 20)
    return [item for item in items if item.points in concepts]


def test_shipped_heads_tell_held_out_captions_and_styles_apart(held_out: list[EmojiItem]) -> None:
    model = MiniClip(load_heads())
    pictures = torch.stack(
        [torch.from_numpy(np.asarray(render(item.svg, 64).convert("RGB")).copy()) for item in held_out]
    ).permute(0, 3, 1, 2)
    captions = [item.captions[0] for item in held_out]
    similarity = model.encode_images(pictures) @ model.encode_texts(captions).T
    assert pair_auc(similarity) > 0.85
    metrics = build_metrics(MetricsConfig(names=["mini_clip_score", "mini_clip_top1"]))
    metrics.set_candidates(captions)
    metrics.update(pictures, captions)
    values = metrics.compute()
    assert values["mini_clip_style_accuracy"] > 0.9
    assert values["mini_clip_top1"] >= values["mini_clip_top1_all"] > 0.3
    assert values["mini_clip_score"] == pytest.approx(float(similarity.diagonal().mean()), abs=1e-4)
    assert values["mini_clip_score"] > values["mini_clip_score_shuffled"] + 0.1
