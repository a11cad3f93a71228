"""Recorded attention against attention computed over all scales at once."""

import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sampler_cases import build, captions

from benchmarks.reference_model import dense_mask
from experiments.analyse import heat_map, image_rows
from switti.models.attention import Rotation
from switti.sampling.attention_analysis import CaptionAttention, ScaleAttention, recording
from switti.sampling.config import SamplingConfig
from switti.sampling.guidance import GuidanceSchedule
from switti.sampling.image_grid import drawable, font
from switti.sampling.noise import ImageNoise
from switti.sampling.sampler import sample_latent
from switti.text.minilm import MiniLMEncoder


def sampled(visibility: str, recorder: CaptionAttention | ScaleAttention) -> None:
    model, tokenizer = build(visibility)
    noise = ImageNoise([1, 2], torch.device("cpu"))
    config = SamplingConfig(guidance=2.0, guidance_stop=3, top_k=8)
    with recording(model, recorder):
        sample_latent(model, tokenizer, captions(2), captions(1, seed=4), config, noise)
    assert not any(
        block.attn._forward_pre_hooks or block.cross_attn._forward_pre_hooks for block in model.blocks
    )


def test_shares_sum_to_one_and_follow_the_variant() -> None:
    pyramid = build("causal")[0].pyramid
    for visibility in ("causal", "non_causal"):
        recorder = ScaleAttention(pyramid, 2)
        sampled(visibility, recorder)
        shares = recorder.result()
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        seen = shares > 0
        expected = torch.ones(4, 4).tril() > 0 if visibility == "causal" else torch.eye(4) > 0
        assert torch.equal(seen, expected)


def test_scale_shares_equal_the_dense_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called scale by scale, in pieces of three queries, as the sampler would, against one dense softmax."""
    monkeypatch.setattr("switti.sampling.attention_analysis.QUERIES_AT_A_TIME", 3)
    model = build("causal")[0]
    layer, pyramid = model.typed_blocks[0].attn, model.pyramid
    x = torch.randn(2, pyramid.length, 32, generator=torch.Generator().manual_seed(0))
    rotation = Rotation(model.cosine_LK, model.sine_LK)
    recorder = ScaleAttention(pyramid, 2)
    with torch.no_grad():
        for start, stop in pyramid.spans:
            recorder.note(layer, (x[:, start:stop], rotation.rows(start, stop)))
        q, k, _ = layer.project(x, rotation)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~dense_mask(pyramid, "causal"), -torch.inf).softmax(-1).mean((0, 1))
    level = F.one_hot(pyramid.levels()).float()
    expected = (level.T @ weights @ level) / level.sum(0)[:, None]
    torch.testing.assert_close(recorder.result(), expected, rtol=0, atol=1e-6)


def test_caption_shares_leave_padding_out() -> None:
    model, tokenizer = build("non_causal")
    text = captions(2)
    text.mask_BT[0, 3:] = False
    recorder = CaptionAttention(2)
    noise = ImageNoise([1, 2], torch.device("cpu"))
    with recording(model, recorder):
        sample_latent(model, tokenizer, text, captions(1, seed=4), SamplingConfig(top_k=8), noise)
    shares = recorder.result()
    assert shares.shape == (4, 2, 5)
    torch.testing.assert_close(shares.sum(-1), torch.ones(4, 2))
    assert (shares[:, 0, 3:] == 0).all() and (shares[:, 1] > 0).all()


def test_a_plan_replaces_the_schedule() -> None:
    """Guidance off everywhere by schedule is guidance 0 by setting."""
    model, tokenizer = build("non_causal")
    text, null, config = captions(2), captions(1, seed=4), SamplingConfig(guidance=3.0, top_k=8, gumbel=False)
    schedule = GuidanceSchedule((0.0,) * 4, 0, 4, None)
    found, expected = (
        sample_latent(
            model, tokenizer, text, null, settings, ImageNoise([1, 2], torch.device("cpu")), schedule=given
        )
        for settings, given in (
            (config, schedule),
            (SamplingConfig(guidance=0.0, top_k=8, gumbel=False), None),
        )
    )
    assert torch.equal(found, expected)


def test_plots_name_word_pieces_and_scales(tmp_path: Path) -> None:
    """Labels are words and sides, in the plot's table as in the plot; a dollar sign is not mathematics."""
    names, words = ["1×1", "2×2"], ["[CLS]", "$", "cat", "=", "[SEP]"]
    rows = [[0.2] * 5, [0.1, 0.3, 0.2, 0.2, 0.2]]
    plot, table = heat_map(tmp_path / "a", rows, names, words, "caption", "$ cat = $")
    with table.open(encoding="utf-8", newline="") as stream:
        head, *body = csv.reader(stream)
    assert [cell.lstrip("'") for cell in head] == ["scale", *words]
    assert [row[0] for row in body] == names
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_minilm_gives_a_piece_for_each_real_token() -> None:
    encoder = MiniLMEncoder(max_length=8)
    for caption in ("", "cat face", "antidisestablishmentarianism of unbelievable otters"):
        pieces = encoder.pieces(caption)
        assert len(pieces) == int(encoder.encode([caption]).mask_BT.sum())
    assert encoder.pieces("cat face") == ["[CLS]", "cat", "face", "[SEP]"]
    assert encoder.pieces("Très tabby, 猫") == ["[CLS]", "Très", "tab", "##by", ",", "猫 [UNK]", "[SEP]"]


def test_captions_of_grids_have_a_glyph_for_every_sign_in_use() -> None:
    letters = font(20)
    missing = bytes(letters.getmask("\uffff"))
    assert [sign for sign in "×–²…éü’—ß‹›" if bytes(letters.getmask(sign)) == missing] == []


def test_what_the_font_cannot_draw_is_written_by_its_number() -> None:
    assert drawable("naïve 4×4 😀") == "naïve 4×4 😀"
    assert drawable("猫\tface\u200d") == "‹U+732B› face"  # a joiner has no shape of its own
    letters = font(20)
    missing = bytes(letters.getmask("\uffff"))
    assert bytes(letters.getmask("猫")) == missing  # or the first line shows nothing
    assert all(bytes(letters.getmask(sign)) != missing for sign in set(drawable("猫犬 🫠")) - {" "})


@pytest.mark.filterwarnings("error")  # matplotlib warns of a missing glyph
def test_plots_fit_a_phone_however_long_the_caption(tmp_path: Path) -> None:
    """Letters of 10 pt are at least 9 px high when the picture is 390 px wide."""
    for count in (3, 77):
        words = ["$猫$"] * count
        plot, _ = heat_map(
            tmp_path / "a", [[1 / count] * count] * 14, ["64×64"] * 14, words, "caption", "猫 " * 77
        )
        with Image.open(plot) as image:
            width, height = image.size
        assert 10 / 72 * 150 * 390 / width > 9
        assert count == 3 or height / 150 * 72 / count > 10  # points for each word


def test_each_prompt_begins_a_row_of_the_sheet(tmp_path: Path) -> None:
    images = [torch.full((2, 3, 128, 128), shade) for shade in (0.1, 0.2, 0.3, 0.4)]
    captions = ["a", "b", "c", "d"] * 2
    with Image.open(image_rows(tmp_path / "row.png", images, captions, 2)) as sheet:
        cell, height = 134, sheet.height // 4
        shades = [
            [sheet.getpixel((20 + column * cell, 20 + row * height))[0] for column in range(3)]
            for row in range(4)
        ]
    first, second, third, fourth = (round(shade * 255) for shade in (0.1, 0.2, 0.3, 0.4))
    assert shades == [[first, second, third], [fourth, 255, 255]] * 2
