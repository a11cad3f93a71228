"""Tokenizers on patches with linear shortcuts: the cosine transform, exact reconstruction, stored settings."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from switti.errors import UserError
from switti.tokenizer.autoencoder import cosine_patches
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE
from switti.weights.load import load_tokenizer
from switti.weights.save import save_tokenizer

PATCHES = RQVAEConfig(
    scales=[1, 2, 4],
    codebook_size=32,
    code_width=48,
    channels=32,
    multipliers=[1, 1],
    patch_size=2,
    linear_shortcut=True,
    residual_blocks=1,
)


@pytest.fixture
def image() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1


def test_cosine_patches_are_orthonormal_and_begin_with_the_mean() -> None:
    rows = cosine_patches(4, 48).flatten(1).double()
    torch.testing.assert_close(rows @ rows.T, torch.eye(48, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows[0], torch.full((48,), 48**-0.5, dtype=torch.float64), atol=1e-6, rtol=0)
    assert cosine_patches(2, 20)[12:].abs().max() == 0


def test_patch_size_multiplies_the_downsampling(image: Tensor) -> None:
    config = replace(PATCHES, linear_shortcut=False)
    model = RQVAE(config).double()
    assert (config.downsampling, config.resolution) == (4, 16)
    assert model.encode(image).shape == (2, 48, 4, 4)
    assert model.decode(model.encode(image)).shape == image.shape


def test_an_untrained_latent_of_full_width_keeps_the_image(image: Tensor) -> None:
    """As many channels as a patch has values: the cosine transform and its inverse are the identity."""
    model = RQVAE(PATCHES).double()
    torch.testing.assert_close(model.decode(model.encode(image)), image, atol=1e-6, rtol=0)


def test_untrained_codes_add_up_to_the_latent(image: Tensor) -> None:
    """φ begins as the identity: with the residuals themselves as the codes, nothing of the latent is missing."""
    config = replace(PATCHES, scales=[1, 4], codebook_size=17)
    model = RQVAE(config).double()
    f = model.encode(image[:1]).detach()
    mean = f.mean(dim=(2, 3))
    with torch.no_grad():
        model.quantize.embedding.weight[0] = mean
        model.quantize.embedding.weight[1:] = (f - mean[..., None, None]).flatten(2)[0].T
    torch.testing.assert_close(model.tokens_to_latent(model.tokenize(image[:1])), f, atol=1e-6, rtol=0)


def test_networks_and_shortcuts_are_trained(image: Tensor) -> None:
    model = RQVAE(PATCHES).double()
    output = model(image)
    ((output.image - image).square().mean() + output.vq_loss).backward()
    for name in ("encoder.shortcut", "encoder.conv_out", "decoder.shortcut", "decoder.conv_out"):
        assert model.get_parameter(f"{name}.weight").grad.abs().max() > 0, name


@pytest.mark.parametrize("changes", [{}, {"linear_shortcut": False}, {"patch_size": 1}])
def test_saved_weights_show_patches_and_shortcut(
    tmp_path: Path, image: Tensor, changes: dict[str, int]
) -> None:
    model = RQVAE(replace(PATCHES, **changes)).double()
    save_tokenizer(model, tmp_path / "model.safetensors", torch.float64)
    found = load_tokenizer(tmp_path / "model.safetensors")
    assert found.config == model.config
    side = model.config.resolution
    image = image[..., :side, :side]
    assert torch.equal(found.double().encode(image), model.encode(image))


def test_patches_of_other_weights_are_refused(tmp_path: Path) -> None:
    save_tokenizer(RQVAE(PATCHES), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"tokenizer\.patch_size=1 \(the weights: 2\)"):
        load_tokenizer(tmp_path / "model.safetensors", config=replace(PATCHES, patch_size=1))


@pytest.mark.parametrize("size", [0, 33])
def test_patch_sizes_out_of_range_are_refused(size: int) -> None:
    with pytest.raises(UserError, match=f"tokenizer.patch_size={size} must lie in"):
        replace(PATCHES, patch_size=size).validate("tokenizer")
