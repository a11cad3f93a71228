"""The cache of latents: same tokens, losses and weights, fewer encodings."""

import copy
from pathlib import Path

import pytest
import torch
from generator_cases import Images, fit, module
from torch import Tensor

from configs.loading import load
from lightning_modules.latent_cache import LatentCache
from switti.errors import UserError


def test_an_image_is_encoded_once_whatever_its_batch() -> None:
    encoded: list[int] = []

    def encode(images: Tensor) -> Tensor:
        encoded.append(len(images))
        return images.flatten(1).cumsum(1)

    cache, images = LatentCache(encode), torch.randn(5, 3, 4, 4)
    for rows in ([0, 1], [2, 3], [3, 0], [1, 2], [3, 4], [4, 4]):
        assert torch.equal(cache(images[rows]), images[rows].flatten(1).cumsum(1))
    assert encoded == [2, 2, 2]
    # The images are known by all their values.
    images[0, 2, 3, 3] += 1e-6
    assert torch.equal(cache(images[:2]), images[:2].flatten(1).cumsum(1)) and len(encoded) == 4


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_with_the_cache_gives_the_same_bits(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve images again and again, in batches of other composition."""
    sample = Images.sample
    monkeypatch.setattr(Images, "sample", lambda self, i: sample(self, (5 * i + i // 12) % 12) | {"seed": i})
    runs = {cached: module(steps=5, precision=precision, cache_latents=cached) for cached in (False, True)}
    encoded = dict.fromkeys(runs, 0)
    losses = {}
    for cached, built in runs.items():
        encoder = built.tokenizer.encoder.forward

        def count(images: Tensor, cached: bool = cached, encoder=encoder) -> Tensor:
            encoded[cached] += 1
            return encoder(images)

        built.tokenizer.encoder.forward = count
        losses[cached] = fit(built, tmp_path / str(cached)).losses
    assert losses[True] == losses[False]
    expected, actual = (copy.copy(runs[cached].generator.state_dict()) for cached in (False, True))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    # Three batches have all images, those of the validation among them.
    assert encoded[True] == 3 < encoded[False]


def test_random_crops_are_not_cached() -> None:
    with pytest.raises(UserError, match=r"trainer\.cache_latents needs data\.crop=center"):
        load("generator/demo", ["data.crop=random"])
    assert load("generator/demo").trainer.cache_latents
