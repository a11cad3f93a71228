"""The tokenizer that ships with the package."""

import io
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from configs.loading import load
from switti.errors import UserError
from switti.metrics.image_quality import psnr
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE
from switti.weights.load import load_tokenizer
from switti.weights.tokenizer_file import weights_path


@pytest.fixture(scope="module")
def config() -> RQVAEConfig:
    return load("tokenizer/emoji64").tokenizer


@pytest.fixture(scope="module")
def demo(config: RQVAEConfig) -> RQVAE:
    return load_tokenizer("embedded:demo", config=config)


def test_settings_and_size(config: RQVAEConfig, demo: RQVAE) -> None:
    folder = weights_path("embedded:demo").parent
    # Settings that came later have their defaults.
    assert asdict(RQVAEConfig(**json.loads((folder / "config.json").read_text()))) == asdict(config)
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000
    assert demo.pyramid.length <= 160
    assert all(torch.isfinite(value).all() for value in demo.state_dict().values())
    assert load("tokenizer/emoji64").tokenizer_weights == "embedded:demo"


def test_an_unknown_name(config: RQVAEConfig) -> None:
    with pytest.raises(UserError, match="embedded:nothing"):
        load_tokenizer("embedded:nothing", config=config)


def test_held_out_emoji(demo: RQVAE) -> None:
    """A pudding in two styles, from concepts that training never saw, comes back close to itself."""
    pytest.importorskip("resvg_py")
    from datamodules.prepare.emoji import emoji_items

    try:
        items = [item for item in emoji_items() if item.points == "1f36e"]
    except UserError as error:
        pytest.skip(str(error))
    assert len(items) == 2
    arrays = [np.array(Image.open(io.BytesIO(item.build(64).image))) for item in items]
    image = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        found = demo.decode(demo.tokens_to_latent(demo.tokenize(image))).clamp(-1, 1)
    found, image = (found + 1) / 2, (image + 1) / 2
    assert psnr(found, image).min() > 15
    # The order matters: one style's tokens do not give the other style's image.
    assert psnr(found.flip(0), image).max() < psnr(found, image).min()
