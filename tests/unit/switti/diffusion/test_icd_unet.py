"""One UNet with two adapters: equal to its teacher at first, its files, and attention control inside it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from unet_cases import rows, tiny_unet

from switti.diffusion.adapter_file import (
    SETTINGS_KEY,
    adapter_shapes,
    fill_released,
    load_adapters,
    save_adapters,
    weights_digest,
)
from switti.diffusion.attention_control import AttentionControl, Replace
from switti.diffusion.boundaries import Boundaries
from switti.diffusion.guidance_embedding import guidance_embedding
from switti.diffusion.latents import LatentSpace
from switti.diffusion.objective import Batch, Draws, Objective
from switti.diffusion.prompt_words import PromptTokens, time_mask
from switti.diffusion.schedule import NoiseSchedule
from switti.diffusion.unet import InvertibleUNet
from switti.diffusion.updates import Student, iterate
from switti.errors import UserError

pytest.importorskip("diffusers")
pytest.importorskip("peft")

BOUNDARIES = Boundaries.automatic(4)
SPACE = LatentSpace("AutoencoderKL 0123, scaled by 0.18215", 4, 16)


def network(seed: int = 0, moved: bool = False) -> InvertibleUNet:
    made = InvertibleUNet(tiny_unet(seed), rank=2, alpha=4)
    if moved:
        generator = torch.Generator().manual_seed(9)
        for role in ("encode", "decode"):
            state = {
                key: 0.2 * torch.randn(value.shape, generator=generator)
                for key, value in made.parameters(role).items()
            }
            made.fill(role, state)
    return made


def test_new_adapters_are_the_teacher_to_the_bit() -> None:
    plain, made = tiny_unet(), network()
    x, time, text, guidance = rows(2)
    with torch.no_grad():
        teacher = made.predictor("teacher")(x, time, text, guidance)
        for role in ("encode", "decode"):
            assert torch.equal(made.predictor(role)(x, time, text, guidance), teacher)
        embedding = guidance_embedding(guidance, 32)
        assert torch.equal(plain(x, time, text.text_BLD, timestep_cond=embedding).sample, teacher)


def test_the_teacher_stays_what_it_was_when_adapters_move() -> None:
    x, time, text, guidance = rows(2)
    still, moved = network(), network(moved=True)
    with torch.no_grad():
        teacher = still.predictor("teacher")(x, time, text, guidance)
        outputs = [moved.predictor(role)(x, time, text, guidance) for role in ("encode", "decode", "teacher")]
    assert torch.equal(outputs[2], teacher)
    assert not torch.allclose(outputs[0], teacher) and not torch.allclose(outputs[0], outputs[1])


def test_training_moves_both_adapters_and_nothing_else() -> None:
    made = network()
    before = {key: value.detach().clone() for key, value in made.unet.state_dict().items()}
    students = {}
    for direction, role in (("reverse", "decode"), ("forward", "encode")):
        parameters = list(made.parameters(role).values())
        students[direction] = Student(
            made.predictor(role), parameters, torch.optim.AdamW(parameters, lr=1e-3)
        )
    x, _, text, guidance = rows(3)
    batch = Batch(x, torch.randn(x.shape, generator=torch.Generator().manual_seed(3)), text, guidance)
    draws = Draws.random(BOUNDARIES, 3, torch.Generator().manual_seed(4))
    objective = Objective(NoiseSchedule.scaled_linear(), BOUNDARIES)
    for _ in range(2):
        done = iterate(objective, students, made.predictor("teacher"), batch, draws)
    assert all(torch.isfinite(loss) for loss in done.losses.values())
    after = made.unet.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed and all(".lora_" in key for key in changed)
    for role in ("encode", "decode"):
        # A moves only once B is not 0 any more: in the second step.
        assert any(f"lora_A.{role}." in key for key in changed)
        assert any(f"lora_B.{role}." in key for key in changed)


def test_expected_shapes_are_those_that_peft_makes() -> None:
    shapes = {key: value.shape for key, value in adapter_shapes(tiny_unet(), 2).items()}
    assert shapes == {key: value.shape for key, value in network().parameters("encode").items()}


def test_files_give_the_same_network_back(tmp_path: Path) -> None:
    made = network(moved=True)
    save_adapters(made, tmp_path / "adapters.safetensors", BOUNDARIES, SPACE)
    again, settings = load_adapters(tiny_unet(), tmp_path / "adapters.safetensors")
    assert (settings.boundaries, settings.latents, settings.rank, settings.alpha) == (
        BOUNDARIES,
        SPACE,
        2,
        4.0,
    )
    x, time, text, guidance = rows(2)
    with torch.no_grad():
        for role in ("encode", "decode", "teacher"):
            expected = made.predictor(role)(x, time, text, guidance)
            assert torch.equal(again.predictor(role)(x, time, text, guidance), expected)


def test_digests_tell_bases_apart_but_not_precisions() -> None:
    assert weights_digest(network(moved=True).unet) == weights_digest(tiny_unet())
    assert weights_digest(tiny_unet().bfloat16()) == weights_digest(tiny_unet())
    assert weights_digest(tiny_unet(1)) != weights_digest(tiny_unet())


Content = tuple[dict[str, Tensor], dict[str, Any]]


def _missing(state: dict[str, Tensor], settings: dict[str, Any]) -> str:
    del state["encode.mid_block.resnets.0.conv1.lora_A.weight"]
    return "encode.mid_block.resnets.0.conv1.lora_A.weight is missing"


def _foreign(state: dict[str, Tensor], settings: dict[str, Any]) -> str:
    state["decode.conv_in.lora_A.weight"] = torch.zeros(2, 4, 3, 3)
    return "decode.conv_in.lora_A.weight is unexpected"


def _misshapen(state: dict[str, Tensor], settings: dict[str, Any]) -> str:
    state["decode.mid_block.resnets.0.conv1.lora_B.weight"] = torch.zeros(16, 3, 1, 1)
    return "conv1.lora_B.weight is [16, 3, 1, 1], the settings need [16, 2, 1, 1]"


def _integers(state: dict[str, Tensor], settings: dict[str, Any]) -> str:
    key = "decode.mid_block.resnets.0.conv1.lora_B.weight"
    state[key] = state[key].to(torch.int32)
    return f"{key} is int32, not floating-point numbers"


def _other_base(state: dict[str, Tensor], settings: dict[str, Any]) -> str:
    settings["base"] = "0" * 64
    return "belongs to the base with digest 000000000000, this UNet's is"


def _other_rank(state: dict[str, Tensor], settings: dict[str, Any]) -> str:
    settings["rank"] = 3
    return "the settings need [3, "


def _huge_rank(state: dict[str, Tensor], settings: dict[str, Any]) -> str:
    settings["rank"] = 10**9
    return "rank=1000000000 must be an integer in [1, 1024]"


def _pattern(state: dict[str, Tensor], settings: dict[str, Any]) -> str:
    settings["targets"] = ["(a+)+$"]
    return "must be a list of module names"


def _no_number(state: dict[str, Tensor], settings: dict[str, Any]) -> str:
    settings["alpha"] = "8"
    return "alpha=8 must be a positive number"


def _off_grid(state: dict[str, Tensor], settings: dict[str, Any]) -> str:
    settings["boundaries"] = {"points": 50, "reverse": [0, 249], "forward": [249, 999]}
    return "[249] lie off the grid of 50 points"


def _no_boundaries(state: dict[str, Tensor], settings: dict[str, Any]) -> str:
    del settings["boundaries"]
    return "boundaries must be points, reverse and forward"


def _no_settings(state: dict[str, Tensor], settings: dict[str, Any]) -> str:
    settings.clear()
    return "holds no settings of two adapters"


def _no_space(state: dict[str, Tensor], settings: dict[str, Any]) -> str:
    settings["latents"] = {"codec": "vae", "channels": "4", "side": 16}
    return "its latents are not described by codec, channels and side"


@pytest.mark.parametrize(
    "change",
    [
        _missing, _foreign, _misshapen, _integers, _other_base, _other_rank, _huge_rank, _pattern, _no_number,
        _off_grid, _no_boundaries, _no_settings, _no_space,
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused_in_one_line(
    change: Callable[[dict[str, Tensor], dict[str, Any]], str], tmp_path: Path
) -> None:
    path = tmp_path / "adapters.safetensors"
    save_adapters(network(moved=True), path, BOUNDARIES, SPACE)
    state = load_file(path)
    settings = {
        "base": weights_digest(tiny_unet()),
        "rank": 2,
        "alpha": 4,
        "targets": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1",
                    "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"],
        "boundaries": {"points": 50, "reverse": [0, 519], "forward": [519, 999]},
        "latents": None,
    }  # fmt: skip
    expected = change(state, settings)
    save_file(state, path, metadata={SETTINGS_KEY: json.dumps(settings)})
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        load_adapters(tiny_unet(), path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_released_files_hold_one_student_under_pefts_keys(tmp_path: Path) -> None:
    made, other = network(moved=True), network()
    state = {f"unet.base_model.model.{key}": value for key, value in made.parameters("encode").items()}
    save_file(
        {key: value.detach().contiguous() for key, value in state.items()}, tmp_path / "forward.safetensors"
    )
    fill_released(other, "encode", tmp_path / "forward.safetensors")
    for key, value in made.parameters("encode").items():
        assert torch.equal(other.parameters("encode")[key], value)
    state.popitem()
    save_file(
        {key: value.detach().contiguous() for key, value in state.items()}, tmp_path / "cut.safetensors"
    )
    with pytest.raises(UserError, match="is missing"):
        fill_released(other, "encode", tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3, 16, 16)}, "latents have shape [2, 3, 16, 16], the UNet takes [rows, 4,"),
        ({"text": torch.zeros(2, 77, 5)}, "text embeddings are 5 wide, the UNet takes 6"),
    ],
)
def test_inputs_of_another_model_are_refused(changes: dict[str, Tensor], message: str) -> None:
    x, time, text, guidance = rows(2)
    condition = type(text)(changes.get("text", text.text_BLD))
    with pytest.raises(UserError, match=re.escape(message)):
        network().predictor("decode")(changes.get("x", x), time, condition, guidance)


def test_guidance_without_an_embedding_is_refused() -> None:
    made = InvertibleUNet(tiny_unet(time_cond_proj_dim=None), rank=2)
    x, time, text, guidance = rows(2)
    with pytest.raises(UserError, match="no guidance embedding"):
        made.predictor("decode")(x, time, text, guidance)
    with torch.no_grad():
        assert made.predictor("decode")(x, time, text, None).shape == x.shape


def test_a_unet_with_adapters_is_refused() -> None:
    unet = network().unet
    with pytest.raises(UserError, match="has adapters encode, decode already"):
        InvertibleUNet(unet)


# ---- attention control ------------------------------------------------------------------------------------------


def prompts(*texts: str) -> list[PromptTokens]:
    return [PromptTokens.of(text, lambda word: [len(word) + 2], 1, 2) for text in texts]


def control(cross: float, own: float, store: int = 0) -> AttentionControl:
    words = prompts("a red heart", "a blue heart")
    return AttentionControl.of(4, Replace.of(words), time_mask(4, cross, words[1:]), own, store_pixels=store)


def test_control_leaves_the_source_row_alone_and_changes_the_edited_one() -> None:
    made, (x, time, text, guidance) = network(moved=True), rows(2)
    x, time = x[:1].expand(2, -1, -1, -1), time[:1].expand(2)
    with torch.no_grad():
        plain = made.predictor("decode")(x, time, text, guidance)
        for cross, own in ((0.5, 0.0), (0.0, 0.5)):
            edited = made.predictor("decode", control(cross, own))(x, time, text, guidance)
            torch.testing.assert_close(edited[0], plain[0], rtol=0, atol=1e-5)
            assert (edited[1] - plain[1]).abs().max() > 1e-4


def test_control_that_edits_nothing_is_the_plain_network() -> None:
    made, (x, time, text, guidance) = network(moved=True), rows(2)
    with torch.no_grad():
        plain = made.predictor("decode")(x, time, text, guidance)
        assert torch.equal(made.predictor("decode", control(0.0, 0.0))(x, time, text, guidance), plain)
        # Explicit attention, for the maps to be stored, differs from the fused one by rounding alone.
        stored = control(0.0, 0.0, store=256)
        again = made.predictor("decode", stored)(x, time, text, guidance)
        torch.testing.assert_close(again, plain, rtol=0, atol=1e-5)
    assert {(place, maps.shape) for (place, _), maps in stored.stored.items()} == {
        ("down", (2, 2, 256, 77)),
        ("up", (2, 2, 256, 77)),
    }
    for maps in stored.stored.values():
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 256))


def test_identical_prompts_are_not_changed_by_replacing() -> None:
    made, (x, time, text, _) = network(moved=True), rows(2)
    x, time = x[:1].expand(2, -1, -1, -1), time[:1].expand(2)
    same = type(text)(text.text_BLD[:1].expand(2, -1, -1))
    words = prompts("a red heart", "a red heart")
    full = AttentionControl.of(4, Replace.of(words), time_mask(4, 1.0, words[1:]), 1.0)
    with torch.no_grad():
        edited = made.predictor("decode", full)(x, time, same, torch.zeros(2))
        plain = made.predictor("decode")(x, time, same, torch.zeros(2))
    torch.testing.assert_close(edited, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(edited[0], edited[1], rtol=0, atol=1e-5)
