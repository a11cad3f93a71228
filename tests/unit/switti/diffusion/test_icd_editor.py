"""The editor: images to noise and back, edits with and without control, and inputs that it refuses."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from unet_cases import tiny_unet

from switti.diffusion.adapter_file import save_adapters, weights_digest
from switti.diffusion.boundaries import Boundaries
from switti.diffusion.editor import ControlSettings, Editor
from switti.diffusion.latents import FoldedPixels, VAELatents
from switti.diffusion.objective import Condition
from switti.diffusion.prompt_words import PromptTokens
from switti.diffusion.unet import InvertibleUNet
from switti.errors import UserError

pytest.importorskip("diffusers")
pytest.importorskip("peft")

PROMPTS = ["a red heart", "a blue heart"]
CODEC = FoldedPixels(32)


def embed(prompts: Sequence[str]) -> Condition:
    """The same numbers for the same prompt."""
    seeds = [sum(map(ord, prompt)) for prompt in prompts]
    return Condition(
        torch.stack([torch.randn(77, 6, generator=torch.Generator().manual_seed(s)) for s in seeds])
    )


def tokenize(prompt: str) -> PromptTokens:
    return PromptTokens.of(prompt, lambda word: [sum(map(ord, word))], 1, 2)


def editor_of(**changes: Any) -> Editor:
    unet = tiny_unet(in_channels=12, out_channels=12, **changes)
    return Editor(InvertibleUNet(unet, rank=2), Boundaries.automatic(4), CODEC, embed, tokenize)


@pytest.fixture(scope="module")
def editor() -> Editor:
    return editor_of()


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_source_row_of_an_edit_is_the_reconstruction(editor: Editor, image: Tensor) -> None:
    noise = editor.encode(image, PROMPTS[:1])
    reconstruction = editor.decode(noise, PROMPTS[:1])
    assert reconstruction.shape == image.shape
    for control in (
        None,
        ControlSettings(),
        ControlSettings(blend=[["red"], ["blue"]], amplify={"blue": 4.0}),
    ):
        edited = editor.edit(noise, PROMPTS, control=control)
        torch.testing.assert_close(edited[:1], reconstruction, rtol=0, atol=1e-4)
        assert (edited[1] - edited[0]).abs().max() > 1e-3


def test_an_edit_to_the_same_prompt_without_guidance_is_the_reconstruction(
    editor: Editor, image: Tensor
) -> None:
    noise = editor.encode(image, PROMPTS[:1])
    edited = editor.edit(noise, [PROMPTS[0]] * 2, strength=0.0, control=ControlSettings())
    torch.testing.assert_close(edited[1], edited[0], rtol=0, atol=1e-4)


def test_encoding_depends_on_its_seed_alone(editor: Editor, image: Tensor) -> None:
    first, again = editor.encode(image, PROMPTS[:1]), editor.encode(image, PROMPTS[:1])
    assert torch.equal(first, again)
    assert not torch.equal(first, editor.encode(image, PROMPTS[:1], seed=31))
    assert not torch.equal(first, editor.encode(image, PROMPTS[:1], seed=None))


def test_adapters_of_another_latent_space_are_refused(tmp_path: Path, editor: Editor) -> None:
    path = tmp_path / "adapters.safetensors"
    save_adapters(editor.network, path, editor.boundaries, CODEC.space)
    base = tiny_unet(in_channels=12, out_channels=12)
    assert Editor.load(base, path, CODEC, embed, tokenize).boundaries == editor.boundaries
    with pytest.raises(UserError, match="latents differ from those the adapters were trained on: side=8"):
        Editor.load(tiny_unet(in_channels=12, out_channels=12), path, FoldedPixels(16), embed, tokenize)


@pytest.mark.parametrize(
    ("prompts", "control", "message"),
    [
        (PROMPTS[:1], None, "at least 2 prompts, the source's first; it got 1 and 1"),
        (["a heart", "a red heart"], ControlSettings("replace"), "must have equally many words for control"),
        (["a heart " * 40, "a heart"], ControlSettings(), "the text encoder's context is 77"),
        (PROMPTS, ControlSettings(amplify={"green": 2.0}), "does not hold the word 'green'"),
    ],
)
def test_prompts_that_do_not_suit_are_refused(
    editor: Editor, prompts: list[str], control: ControlSettings | None, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        editor.edit(torch.zeros(1, 12, 16, 16), prompts, control=control)


def test_images_and_captions_that_do_not_fit_are_refused(editor: Editor, image: Tensor) -> None:
    with pytest.raises(UserError, match=re.escape("the model takes [batch, 3, 32, 32]")):
        editor.encode(image[:, :, :16], PROMPTS[:1])
    with pytest.raises(UserError, match="1 images need a list of 1 captions, not 'a red heart'"):
        editor.encode(image, "a red heart")


def test_without_guidance_embedding_images_are_decoded_unguided(image: Tensor) -> None:
    plain = editor_of(time_cond_proj_dim=None)
    noise = plain.encode(image, PROMPTS[:1])
    assert plain.decode(noise, PROMPTS[:1]).shape == image.shape
    with pytest.raises(UserError, match="strength=7 needs a UNet with guidance embedding"):
        plain.decode(noise, PROMPTS[:1], 7.0)
    with pytest.raises(UserError, match="editing needs it"):
        plain.edit(noise, PROMPTS)


def test_a_vaes_latents_are_its_means_scaled(image: Tensor) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    settings = {
        "block_out_channels": (4, 8),
        "latent_channels": 4,
        "norm_num_groups": 2,
        "scaling_factor": 0.5,
    }
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    vae = AutoencoderKL(**settings, **blocks).eval()
    codec = VAELatents(vae, 32, weights_digest(vae))
    assert (codec.space.channels, codec.space.side) == (4, 16)
    assert codec.space.codec.endswith("scaled by 0.5")
    with torch.no_grad():
        latents = codec.encode(image)
        torch.testing.assert_close(latents, 0.5 * vae.encode(image).latent_dist.mean)
        assert torch.equal(codec.decode(latents), vae.decode(latents / 0.5).sample)
    with pytest.raises(UserError, match=r"latents have shape \[1, 4, 8, 8\]"):
        codec.decode(latents[:, :, :8, :8])
