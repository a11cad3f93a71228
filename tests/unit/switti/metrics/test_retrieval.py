"""Caption retrieval against plain Python on a made-up encoder."""

import math
import random

import pytest
import torch
from torch import Tensor

from switti.metrics.catalogue import IMAGE_METRICS
from switti.metrics.collection import MetricSet
from switti.metrics.retrieval import CaptionRetrieval, distinct, rivals, style_of, styles_of

STYLES = ("noto style", "blob style", "twemoji style")
CAPTIONS = [f"thing {number}, {style}" for number in range(20) for style in STYLES]


class Encoder:
    """A caption is a random direction of its own; the first pixels of an image are its direction, times 100."""

    width = 6

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode_texts(self, captions: list[str]) -> Tensor:
        self.encoded += captions
        rows = [[random.Random(f"{c}/{i}").gauss(0, 1) for i in range(self.width)] for c in captions]
        return torch.tensor(rows)

    def encode_images(self, images_B3HW: Tensor) -> Tensor:
        return images_B3HW[:, 0].flatten(1)[:, : self.width].float() - 100


def images_of(captions: list[str], noise: float) -> Tensor:
    """uint8 images that the encoder maps near the directions of their captions."""
    directions = Encoder().encode_texts(captions)
    random_part = torch.randn(directions.shape, generator=torch.Generator().manual_seed(0))
    images = torch.zeros(len(captions), 3, 4, 4)
    images[:, 0].flatten(1)[:, :6] = 0
    images.flatten(2)[:, 0, :6] = 100 + 20 * (directions + noise * random_part)
    return images.round().clamp(0, 255).to(torch.uint8)


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def reference(images: Tensor, captions: list[str], competitors: list[list[str]]) -> float:
    """Share of images whose own caption is more similar than every competitor, in float64 and plain loops."""
    encoder, hits = Encoder(), 0
    for image, own, others in zip(images, captions, competitors, strict=True):
        vector = [float(x) - 100 for x in image[0].flatten()[:6]]
        texts = encoder.encode_texts([own, *others]).tolist()
        scores = [cosine(vector, text) for text in texts]
        hits += all(scores[0] > score for score in scores[1:])
    return hits / len(captions)


def measured(images: Tensor, captions: list[str], parts: int = 1, **options: int) -> dict[str, float]:
    metric = CaptionRetrieval(Encoder(), "x", **options)
    metric.set_candidates(CAPTIONS)
    for rows in torch.arange(len(captions)).tensor_split(parts):
        metric.update(images[rows], [captions[row] for row in rows])
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0, 2.0])
def test_shares_against_plain_python(noise: float) -> None:
    images = images_of(CAPTIONS, noise)
    values = measured(images, CAPTIONS)
    everything = [[c for c in CAPTIONS if c != own] for own in CAPTIONS]
    styles = [[f"{own.partition(',')[0]}, {s}" for s in STYLES if not own.endswith(s)] for own in CAPTIONS]
    drawn = [[sorted(CAPTIONS)[row] for row in rivals(own, sorted(CAPTIONS))] for own in CAPTIONS]
    assert values == pytest.approx(
        {
            "x_top1": reference(images, CAPTIONS, drawn),
            "x_top1_all": reference(images, CAPTIONS, everything),
            "x_style_accuracy": reference(images, CAPTIONS, styles),
        }
    )
    assert (values["x_top1_all"] == 1.0) == (noise == 0.0)
    assert values["x_top1_all"] <= values["x_top1"] <= values["x_style_accuracy"] or noise == 0.0


def test_random_images_find_their_caption_as_often_as_chance() -> None:
    generator = torch.Generator().manual_seed(1)
    captions = random.Random(0).choices(CAPTIONS, k=3000)
    images = torch.randint(0, 200, (3000, 3, 4, 4), generator=generator, dtype=torch.uint8)
    values = measured(images, captions, ways=4)
    assert values["x_top1"] == pytest.approx(1 / 4, abs=0.04)
    assert values["x_style_accuracy"] == pytest.approx(1 / 3, abs=0.04)
    assert values["x_top1_all"] == pytest.approx(1 / 60, abs=0.015)


def test_neither_batches_nor_order_change_the_result() -> None:
    images = images_of(CAPTIONS, 1.0)
    expected = measured(images, CAPTIONS)
    order = torch.randperm(len(CAPTIONS), generator=torch.Generator().manual_seed(0))
    assert measured(images, CAPTIONS, parts=7) == expected
    assert measured(images[order], [CAPTIONS[row] for row in order], parts=3) == expected


def test_a_tie_is_a_miss() -> None:
    metric = CaptionRetrieval(Encoder(), "x")
    metric.set_candidates(CAPTIONS)
    black = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)  # similarity 0 with everything
    metric.update(black, CAPTIONS[:1])
    assert all(float(value) == 0.0 for value in metric.compute().values())


def test_rivals_are_others_drawn_by_the_caption_alone() -> None:
    candidates = sorted(CAPTIONS)
    first = rivals(CAPTIONS[7], candidates, 31)
    assert first == rivals(CAPTIONS[7], candidates, 31) and len(set(first)) == 31
    assert candidates.index(CAPTIONS[7]) not in first
    assert first != rivals(CAPTIONS[8], candidates, 31)
    assert len(rivals("not among them", candidates, 1000)) == len(candidates)


def test_candidates_are_distinct_and_thinned_evenly() -> None:
    assert distinct(["b", "", "a", "b"]) == ["a", "b"]
    thinned = distinct([f"{i:04d}" for i in range(1000)], most=10)
    assert thinned == [f"{i:04d}" for i in range(0, 1000, 100)]


def test_styles_are_what_captions_end_with() -> None:
    assert style_of("dog face, noto style") == ("dog face", "noto style")
    assert style_of("dog face, pet, noto style") == ("dog face, pet", "noto style")
    assert style_of("a red house") == ("a red house", "") and style_of("noto style") == ("noto style", "")
    assert styles_of(["a, x style", "b", "c, y style", "d, x style"]) == ["x style", "y style"]


def test_each_caption_is_encoded_once_and_candidates_outlast_a_reset() -> None:
    metric = CaptionRetrieval(encoder := Encoder(), "x")
    metric.set_candidates(CAPTIONS)
    images = images_of(CAPTIONS, 0.0)
    for _ in range(2):
        metric.update(images, CAPTIONS)
        assert float(metric.compute()["x_top1"]) == 1.0
        metric.reset()
    assert sorted(encoder.encoded) == sorted(set(CAPTIONS))


def test_values_that_cannot_be_counted_are_skipped() -> None:
    """No style in the captions, or no candidates at all: nothing is reported in their place."""
    plain = [f"thing {number}" for number in range(5)]
    metrics = MetricSet([], {"mini_clip_top1": CaptionRetrieval(Encoder(), "mini_clip")})
    metrics.update(images_of(plain, 0.0), plain)
    assert metrics.compute() == {}
    metrics.reset()
    metrics.set_candidates(plain)
    metrics.update(images_of(plain, 0.0), plain)
    assert metrics.compute() == {"mini_clip_top1": 1.0, "mini_clip_top1_all": 1.0}
    assert {f"mini_clip_{name}" for name in ("top1", "top1_all", "style_accuracy")} <= set(IMAGE_METRICS)
