"""Word maps, time masks and local blending of prompt-to-prompt control, and checks of images and latents."""

import re

import pytest
import torch

from switti.diffusion.attention_control import AttentionControl, LocalBlend, Refine, Replace, Reweight
from switti.diffusion.latents import FoldedPixels, LatentSpace, check_images
from switti.diffusion.prompt_words import (
    PromptTokens,
    equalizer,
    refinement_map,
    replacement_map,
    time_mask,
)
from switti.errors import UserError


def tokens(prompt: str, context: int = 12) -> PromptTokens:
    """One token for every two letters."""
    return PromptTokens.of(
        prompt,
        lambda word: [3 + sum(map(ord, word[k : k + 2])) for k in range(0, len(word), 2)],
        1,
        2,
        context,
    )


def test_words_know_their_tokens() -> None:
    prompt = tokens("a big heart")
    assert prompt.positions == ((1,), (2, 3), (4, 5, 6))
    assert prompt.tokens_of(["big", "a"]) == [1, 2, 3]
    assert len(prompt.ids) == 8 and (prompt.ids[0], prompt.ids[-1]) == (1, 2)


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    with pytest.raises(UserError, match="has 13 tokens with start and end, the text encoder's context is 12"):
        tokens("ab " * 11)
    assert len(tokens("ab " * 10).ids) == 12


def test_words_that_a_prompt_lacks_are_refused() -> None:
    with pytest.raises(UserError, match=r"'a cat' does not hold the word 'dog'; it has a cat"):
        tokens("a cat").tokens_of(["dog"])


def test_replacing_needs_equally_many_words() -> None:
    with pytest.raises(UserError, match=r"'a cat' \(2 words\) and 'a big cat' \(3\) must have equally many"):
        replacement_map(tokens("a cat"), tokens("a big cat"))


def test_a_longer_word_shares_the_source_words_attention() -> None:
    """ "red" has two tokens, "orange" three; behind it the tail is shifted, or as published it is not."""
    map_ST = replacement_map(tokens("a red b"), tokens("a orange b"))
    assert map_ST[2:4, 2:5].tolist() == [[pytest.approx(1 / 3)] * 3] * 2
    assert map_ST[4, 5] == 1 and map_ST[4, 4] == 0 and map_ST[1, 1] == 1
    published = replacement_map(tokens("a red b"), tokens("a orange b"), compatible=True)
    assert published[5, 5] == 1 and published[4, 5] == 0
    # Every source token before the tail gives away its attention once.
    torch.testing.assert_close(map_ST[:9].sum(1), torch.ones(9))


def test_equal_token_counts_make_both_rules_the_same() -> None:
    source, target = tokens("a red heart"), tokens("a tan heart")
    torch.testing.assert_close(replacement_map(source, target), torch.eye(12))
    torch.testing.assert_close(
        replacement_map(source, target, compatible=True), replacement_map(source, target)
    )


def test_refining_aligns_the_words_that_stay() -> None:
    index, aligned = refinement_map(tokens("a heart"), tokens("a red heart"))
    assert index.tolist()[:8] == [0, 1, -1, -1, 2, 3, 4, 5]
    assert aligned.tolist()[:8] == [1, 1, 0, 0, 1, 1, 1, 1]


def test_reweighting_scales_the_inner_edit() -> None:
    prompts = [tokens("a heart"), tokens("a red heart")]
    refine = Refine.of(prompts)
    reweight = Reweight(refine, equalizer(prompts[1], {"heart": 4.0})[None])
    source, edited = torch.rand(2, 9, 12), torch.rand(1, 2, 9, 12)
    ratio = reweight(source, edited) / refine(source, edited)
    torch.testing.assert_close(ratio[0, 0, 0], torch.tensor([1.0] * 4 + [4.0] * 3 + [1.0] * 5))


def test_time_masks_count_one_row_more_than_steps() -> None:
    target = tokens("a red heart")
    mask = time_mask(4, 0.6, [target], {"red": (0.4, 1.0)})
    red = mask[:, 0, 2].tolist()
    assert mask[:, 0, 1].tolist() == [1, 1, 1, 0, 0] and red == [0, 0, 1, 1, 1]
    with pytest.raises(UserError, match="none of the edited prompts holds the word 'blue'"):
        time_mask(4, 0.6, [target], {"blue": 0.5})


def test_control_is_active_in_its_steps_alone() -> None:
    prompts = [tokens("a red heart"), tokens("a tan heart")]
    control = AttentionControl.of(4, Replace.of(prompts), time_mask(4, 0.3, prompts[1:]), 0.6)
    wanted = []
    for step in range(4):
        wanted.append([control.wants(True, "up", 256), control.wants(False, "up", 256)])
        control.after_step(torch.zeros(1), step)
    assert wanted == [[True, True], [False, True], [False, False], [False, False]]
    control.step = 0
    assert not control.wants(False, "up", 4096)


def test_blending_keeps_the_source_outside_the_words_region() -> None:
    prompts = [tokens("a cat"), tokens("a dog")]
    blend = LocalBlend.of(prompts, [["cat"], ["dog"]])
    maps = torch.zeros(2, 1, 256, 12)
    maps.reshape(2, 16, 16, 12)[:, 4:8, 4:8, 2:4] = 1.0
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    out = blend(x, [maps], 0, 4)
    inside = torch.zeros(32, 32, dtype=torch.bool)
    # The 3×3 pooling widens the region by one.
    inside[6:18, 6:18] = True
    torch.testing.assert_close(out[1][:, inside], x[1][:, inside])
    assert torch.equal(out[1][:, ~inside], x[0][:, ~inside])
    assert torch.equal(out[0], x[0])


def test_blending_needs_maps_of_its_size_and_words_for_each_prompt() -> None:
    prompts = [tokens("a cat"), tokens("a dog")]
    with pytest.raises(UserError, match="blend words are given for 1 prompts, there are 2"):
        LocalBlend.of(prompts, [["cat"]])
    blend = LocalBlend.of(prompts, [["cat"], ["dog"]])
    control = AttentionControl.of(4, None, time_mask(4, 0.0, prompts[1:]), 0.0, blend)
    with pytest.raises(UserError, match="needs cross-attention maps of 256 pixels; the network has none"):
        control.after_step(torch.zeros(2, 4, 8, 8), 0)


# ---- images and latents -----------------------------------------------------------------------------------------


def test_folded_pixels_come_back_exactly() -> None:
    codec = FoldedPixels(16, 2, (0.1,) * 12, (0.5,) * 12)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    latents = codec.encode(images)
    assert latents.shape == (2, 12, 8, 8)
    torch.testing.assert_close(codec.decode(latents), images, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 16, 20), "images have shape [1, 3, 16, 20], the model takes [batch, 3, 16, 16]"),
        (torch.zeros(3, 16, 16), "images have shape [3, 16, 16]"),
        (torch.full((1, 3, 16, 16), 255.0), "images must lie in [-1, 1]"),
    ],
)
def test_images_of_another_size_or_range_are_refused(images: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_images(images, 16)


def test_latents_of_another_codec_are_refused() -> None:
    trained = LatentSpace("AutoencoderKL 0123, scaled by 0.18215", 4, 64)
    with pytest.raises(
        UserError, match=r"codec=AutoencoderKL 0123, scaled by 0.13025 \(a.safetensors: AutoencoderKL"
    ):
        LatentSpace("AutoencoderKL 0123, scaled by 0.13025", 4, 64).check_same(trained, "a.safetensors")
    trained.check_same(trained, "a.safetensors")
    with pytest.raises(UserError, match=re.escape("latents have shape [1, 4, 32, 32], those of")):
        trained.check(torch.zeros(1, 4, 32, 32))
