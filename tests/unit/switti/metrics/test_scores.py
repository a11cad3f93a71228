"""Caption scores with small injected networks, against plain numpy; the two library backbones built at random."""

import gzip
import random
from importlib import resources
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.multiprocessing
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.configuration_clip import CLIPConfig

from switti.errors import UserError
from switti.metrics.clip_score import OpenClipEncoder, clip_score_name, load_open_clip
from switti.metrics.collection import MetricSet, SetDistances, build_metrics, to_bytes
from switti.metrics.config import MetricsConfig
from switti.metrics.fid import FrechetDistance, KernelDistance
from switti.metrics.pick_score import TransformersClipEncoder, load_pick_score
from switti.metrics.scores import (
    MatchedAndShuffledCosine,
    MeanCosine,
    caption_keys,
    cosine,
    pair_auc,
    shuffled_cosine,
)


class Toy:
    """Pictures → their first pixel's colour; captions "r g b" → those numbers."""

    width = 3

    def encode_images(self, images_B3HW: Tensor) -> Tensor:
        return images_B3HW[:, :, 0, 0].float()

    def encode_texts(self, captions: list[str]) -> Tensor:
        return torch.tensor([[float(number) for number in caption.split()] for caption in captions])


def _data(count: int) -> tuple[Tensor, list[str]]:
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(1, 255, (count, 3), generator=generator)
    texts = torch.randint(1, 255, (count, 3), generator=generator)
    images = colours.to(torch.uint8).view(count, 3, 1, 1).expand(-1, -1, 2, 2)
    return images, [" ".join(str(int(number)) for number in row) for row in texts]


def _plain_cosines(images: Tensor, captions: list[str]) -> np.ndarray:
    a = images[:, :, 0, 0].double().numpy()
    b = np.array([[float(n) for n in caption.split()] for caption in captions])
    return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)[None]


def test_mean_cosine_against_numpy_and_over_batches() -> None:
    images, captions = _data(9)
    metric = MeanCosine(Toy())
    metric.update(images[:4], captions[:4])
    metric.update(images[4:], captions[4:])
    metric.update(images[:0], [])
    assert float(metric.compute()) == pytest.approx(
        np.diag(_plain_cosines(images, captions)).mean(), rel=1e-6
    )


def test_shuffled_pairs_are_a_derangement_that_ignores_order() -> None:
    images, captions = _data(10)
    plain = _plain_cosines(images, captions)
    a, b, keys = Toy().encode_images(images), Toy().encode_texts(captions), caption_keys(captions)
    values = shuffled_cosine(a, b, keys)
    # every value belongs to an off-diagonal pair, each picture and each caption is used once
    used = [tuple(np.argwhere(np.isclose(plain, float(value), atol=1e-6))[0]) for value in values]
    assert sorted(row for row, _ in used) == sorted(column for _, column in used) == list(range(10))
    assert all(row != column for row, column in used)
    order = list(range(10))
    random.Random(3).shuffle(order)
    again = shuffled_cosine(a[order], b[order], keys[order])
    torch.testing.assert_close(again.sort().values, values.sort().values)


def test_shuffled_pairs_leave_equal_captions_out() -> None:
    images, captions = _data(3)
    metric = MatchedAndShuffledCosine(Toy())
    metric.update(images, [captions[0]] * 3)
    assert torch.isnan(metric.compute()[1])
    metric.reset()
    metric.update(images[:2], captions[:2])
    plain = _plain_cosines(images[:2], captions[:2])
    own, shuffled = metric.compute()
    assert float(own) == pytest.approx(plain.trace() / 2, rel=1e-6)
    assert float(shuffled) == pytest.approx((plain.sum() - plain.trace()) / 2, rel=1e-6)


def test_auc_by_counting() -> None:
    similarity = (
        torch.round(torch.rand(12, 12, generator=torch.Generator().manual_seed(2)) * 8) / 8
    )  # with ties
    wins, total = 0.0, 0
    for i in range(12):
        for j in range(12):
            for k in range(12):
                if j != k:
                    wins += float(similarity[i, i] > similarity[j, k]) + 0.5 * float(
                        similarity[i, i] == similarity[j, k]
                    )
                    total += 1
    assert pair_auc(similarity) == pytest.approx(wins / total, rel=1e-12)
    assert pair_auc(torch.eye(4)) == 1.0
    same = torch.zeros(2, 2, dtype=torch.bool)
    same[0, 1] = True
    assert pair_auc(torch.tensor([[0.5, 9.0], [0.1, 0.6]]), same) == 1.0


def test_caption_keys_are_fixed_and_positive() -> None:
    assert caption_keys(["dog", "cat", "dog"]).tolist()[0] == caption_keys(["dog"]).tolist()[0]
    # sha256("dog") begins cd6357ef; in 63 bits
    assert caption_keys(["dog"]).item() >> 31 == 0xCD6357EF
    assert len(caption_keys([])) == 0


# --- the interface


def _toy_set() -> MetricSet:
    class Means(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.float().mean(dim=(2, 3))

    distances = SetDistances(Means(), 3, {"fid_toy": FrechetDistance(3), "kid_toy": KernelDistance()})
    return MetricSet([distances], {"toy": MatchedAndShuffledCosine(Toy()), "toy_mean": MeanCosine(Toy())})


def test_metric_set_adds_up_and_leaves_out_what_is_undefined() -> None:
    images, captions = _data(8)
    metrics = _toy_set()
    assert metrics.compute() == {}
    metrics.reset()
    metrics.update(images.float() / 255, captions)
    assert set(metrics.compute()) == {"toy", "toy_shuffled", "toy_mean"}
    metrics.update_real(images.flip(0))
    values = metrics.compute()
    assert set(values) == {"toy", "toy_shuffled", "toy_mean", "fid_toy", "kid_toy"}
    assert values["fid_toy"] == pytest.approx(0, abs=1e-5)
    assert values["toy"] == pytest.approx(values["toy_mean"], rel=1e-6)
    metrics.reset()
    metrics.update(images[:5], captions[:5])
    assert metrics.compute()["fid_toy"] > 1


def _worker(rank: int, world: int, store: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    images, captions = _data(5)
    metrics = _toy_set()
    metrics.update_real(255 - images[rank::world])
    if rank == 0:  # the other process has no generated picture at all
        metrics.update(images, captions)
    torch.save(metrics.compute(), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.slow
def test_processes_agree_with_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (2, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    images, captions = _data(5)
    single = _toy_set()
    single.update_real(255 - images)
    single.update(images, captions)
    expected = single.compute()
    assert len(expected) == 5
    for rank in range(2):
        values = torch.load(tmp_path / f"{rank}.pt")
        assert values == pytest.approx(expected, rel=1e-5)


def test_to_bytes_rounds_and_clamps() -> None:
    assert to_bytes(torch.tensor([-0.1, 0.0, 0.5, 127.4 / 255, 1.0, 1.2])).tolist() == [
        0,
        0,
        128,
        127,
        255,
        255,
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"names": ["fid"]}, "no metric 'fid'; there are fid_alexnet"),
        ({"names": ["fid_alexnet", "fid_alexnet"]}, "twice"),
        ({"names": ["fid_inception"]}, "set metrics.inception"),
        ({"prompts": 1}, "metrics.prompts=1"),
        ({"batch": 0}, "metrics.batch=0"),
        ({"mini_clip": "/no/folder"}, "metrics.mini_clip=/no/folder"),
        (
            {"names": ["clip_score"], "clip_weights": "/no/file.pt"},
            "metrics.clip_weights=/no/file.pt: no such file",
        ),
        (
            {"names": ["pick_score"], "pick_score": "./nothing"},
            "metrics.pick_score=./nothing: no such folder",
        ),
        (
            {"names": ["fid_inception"], "inception": "/no/file.pth"},
            "metrics.inception=/no/file.pth: no such file",
        ),
        (
            {"names": ["clip_score"], "clip_model": "ViT-Z", "clip_weights": __file__},
            "metrics.clip_weights=",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        build_metrics(MetricsConfig(**values))  # type: ignore[arg-type]


def test_build_alexnet_distances() -> None:
    metrics = build_metrics(MetricsConfig(names=["fid_alexnet", "kid_alexnet"]))
    generator = torch.Generator().manual_seed(0)
    real, other = (
        torch.rand(6, 3, 32, 32, generator=generator),
        torch.rand(6, 3, 32, 32, generator=generator) / 4,
    )
    metrics.update_real(real)
    metrics.update(real, [""] * 6)
    same = metrics.compute()
    metrics.reset()
    metrics.update(other, [""] * 6)
    different = metrics.compute()
    assert set(same) == {"fid_alexnet", "kid_alexnet"}
    assert same["fid_alexnet"] == pytest.approx(0, abs=1e-3)
    assert different["fid_alexnet"] > 1
    assert different["kid_alexnet"] > same["kid_alexnet"]


# --- library backbones at random


def test_open_clip_backbone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = open_clip.model.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=16, image_size=32)
    text = open_clip.model.CLIPTextCfg(width=32, heads=2, layers=1)
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text)
    preprocess = open_clip.transform.image_transform(32, is_train=False)
    encoder = OpenClipEncoder(model, preprocess, open_clip.tokenize)
    assert encoder.width == 24
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    captions = ["a dog", "", "word " * 200]
    metric = MeanCosine(encoder)
    metric.update(images, captions)
    mean, deviation = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    pixels = (images.float() / 255 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    with torch.no_grad():
        a, b = model.encode_image(pixels).numpy(), model.encode_text(open_clip.tokenize(captions)).numpy()
    expected = ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean()
    assert float(metric.compute()) == pytest.approx(float(expected), abs=1e-5)


def test_open_clip_loads_a_local_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None)
    del source.visual  # a file without the vision half
    torch.save(source.state_dict(), tmp_path / "half.pt")
    with pytest.raises(UserError, match=r"cannot be loaded"):
        load_open_clip("ViT-B-32-quickgelu", str(tmp_path / "half.pt"))
    assert clip_score_name("ViT-H-14") == "clip_score_vit_h_14"


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A tiny CLIPModel with processor files, as PickScore is published."""
    torch.manual_seed(0)
    lines = gzip.decompress(
        (resources.files("open_clip") / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    ).decode()
    merges = [tuple(line.split()) for line in lines.split("\n")[1:1000]]
    letters = list(open_clip.tokenizer.bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(words), "eos_token_id": len(words) - 1, "bos_token_id": len(words) - 2}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(tmp_path)
    pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pixels, tokenizer).save_pretrained(tmp_path)
    return tmp_path


def test_pick_score_is_the_raw_cosine(clip_folder: Path) -> None:
    encoder = load_pick_score(str(clip_folder))
    assert isinstance(encoder, TransformersClipEncoder)
    images = torch.randint(0, 256, (2, 3, 40, 32), dtype=torch.uint8)
    captions = ["a dog", "word " * 200]
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPProcessor.from_pretrained(clip_folder)
    batch = processor(
        text=captions, images=list(images), padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        outputs = model(**batch)
    # the model's own logits are the cosine times its learned scale
    expected = (outputs.logits_per_image / model.logit_scale.exp()).diagonal()
    ours = cosine(encoder.encode_images(images), encoder.encode_texts(captions))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_pick_score_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics.pick_score=.*cannot be loaded"):
        load_pick_score(str(tmp_path))
