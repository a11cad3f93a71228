"""Sampling with token pruning, and guidance by scale: what a call means, its settings and their errors."""

from pathlib import Path

import pytest
import torch
from sampler_cases import build, captions
from torch import Tensor

from configs.load_run import sampling_overrides
from configs.loading import load, parse
from switti.config_values import from_values
from switti.errors import UserError
from switti.sampling.config import PruningConfig, SamplingConfig
from switti.sampling.guidance import GuidanceSchedule
from switti.sampling.noise import ImageNoise
from switti.sampling.pipeline_arguments import change_settings
from switti.sampling.sampler import PromptSwitch, sample_latent
from switti.scales import Pyramid

VARIANTS = pytest.mark.parametrize("visibility", ["causal", "non_causal"])
PRUNED = PruningConfig([2, 3], [0.5], from_block=1)


def sample(
    visibility: str, pruning: PruningConfig, rows: slice = slice(None), **settings
) -> tuple[Tensor, list[Tensor]]:
    """(latents, logits of each scale) of three captions, or some of them."""
    model, tokenizer = build(visibility)
    text, logits = captions(3)[list(range(3))[rows]], []
    switch = settings.pop("switch", None)
    config = SamplingConfig(**({"guidance": 3.0, "top_k": 20} | settings), pruning=pruning)
    latent = sample_latent(
        model, tokenizer, text, captions(1, seed=4), config, ImageNoise([5, 6, 7][rows], torch.device("cpu")),
        on_scale_end=lambda trace: logits.append(trace.logits), switch=switch,
    )  # fmt: skip
    return latent, logits


@VARIANTS
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_keeping_all_tokens_changes_no_bit(visibility: str, guidance: float) -> None:
    plain, _ = sample(visibility, PruningConfig(), guidance=guidance)
    kept, _ = sample(visibility, PruningConfig([1, 2, 3], [1.0], 0), guidance=guidance)
    assert torch.equal(plain, kept)


@VARIANTS
@pytest.mark.parametrize("settings", [{"guidance": 0.0}, {"guidance_stop": 3}, {}])
def test_only_pruned_scales_change(visibility: str, settings: dict) -> None:
    plain, expected = sample(visibility, PruningConfig(), **settings)
    pruned, found = sample(visibility, PRUNED, **settings)
    assert [torch.equal(a, b) for a, b in zip(expected, found, strict=True)] == [True, True, False, False]
    assert not torch.equal(plain, pruned) and pruned.isfinite().all()


@VARIANTS
@pytest.mark.parametrize("settings", [{"guidance": 0.0}, {"guidance_stop": 3}, {"gumbel": False}])
def test_a_pruned_image_does_not_depend_on_its_batch(visibility: str, settings: dict) -> None:
    together, _ = sample(visibility, PRUNED, **settings)
    alone, _ = sample(visibility, PRUNED, slice(1, 2), **settings)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-3)


def test_guidance_that_begins_at_a_pruned_scale_computes_it_in_full() -> None:
    """There are no outputs of the unconditional rows to take."""
    last = PruningConfig([3], [0.5], 0)
    _, expected = sample("non_causal", PruningConfig(), guidance_start=3)
    _, found = sample("non_causal", last, guidance_start=3)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)) and len(found[3]) == 6


@VARIANTS
def test_a_scale_with_other_captions_is_computed_in_full(visibility: str) -> None:
    switch = PromptSwitch(captions(3, seed=9), 2)
    _, expected = sample(visibility, PruningConfig(), switch=switch)
    _, found = sample(visibility, PRUNED, switch=switch)
    assert [torch.equal(a, b) for a, b in zip(expected, found, strict=True)] == [True, True, True, False]


# ---- guidance by scale --------------------------------------------------------------------------------------------


def test_guidance_by_scale_by_hand() -> None:
    config = SamplingConfig(guidance=2.0, guidance_by_scale=[0.5, 0.0, 1.0, 3.0, 1.0], guidance_stop=4)
    schedule = GuidanceSchedule.of(config, Pyramid((1, 2, 3, 4, 5)))
    assert schedule.strengths == (1.0, 0.0, 2.0, 6.0, 0.0) and schedule.last_guided == 3
    assert [schedule.needs_unconditional(k, causal=False) for k in range(5)] == [
        True,
        False,
        True,
        True,
        False,
    ]


@VARIANTS
def test_factors_of_the_usual_growth_change_no_bit(visibility: str) -> None:
    plain, _ = sample(visibility, PruningConfig())
    given, _ = sample(visibility, PruningConfig(), guidance_by_scale=[k / 3 for k in range(4)])
    other, _ = sample(visibility, PruningConfig(), guidance_by_scale=[1.0, 1.0, 1.0, 1.0])
    assert torch.equal(plain, given) and not torch.equal(plain, other)


# ---- settings -----------------------------------------------------------------------------------------------------

BAD = [
    ({"pruning": {"scales": [2], "keep": [0.0]}}, r"sampling.pruning.keep=\[0.0\] must lie in \(0, 1\]"),
    ({"pruning": {"scales": [2], "keep": [1.5]}}, r"sampling.pruning.keep=\[1.5\] must lie in \(0, 1\]"),
    ({"pruning": {"scales": [2], "keep": 0.5}}, "sampling.pruning.keep=0.5 is not a list, each a number"),
    ({"pruning": {"scales": [0, 1]}}, r"sampling.pruning.scales=\[0, 1\]: scale 0 has no scale before it"),
    ({"pruning": {"scales": [2, 1]}}, "must be ascending scale numbers, counted from 0"),
    ({"pruning": {"scales": [-1]}}, "must be ascending scale numbers, counted from 0"),
    ({"pruning": {"scales": [1, 2], "keep": [0.5, 0.5, 0.5]}}, r"has 3 numbers, .*scales=\[1, 2\] has 2; give one"),
    ({"pruning": {"scales": [1], "keep": []}}, r"keep=\[\] has 0 numbers"),
    ({"pruning": {"from_block": -1}}, "sampling.pruning.from_block=-1 must not be negative"),
    ({"pruning": {"kep": [0.5]}}, "unknown setting sampling.pruning.kep; did you mean 'keep'"),
    ({"pruning": [2, 3]}, "sampling.pruning is a list, not an object with settings"),
    ({"guidance_by_scale": [1e6]}, r"guidance_by_scale=\[1000000.0\] times sampling.guidance=4 must lie in"),
    ({"keep_ratio": 0.5}, "unknown argument 'keep_ratio'; did you mean 'pruning.keep'"),
    ({"prune_ratio": 0.5}, "pruning.keep is the fraction of the tokens that is computed"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_wrong_settings_are_named(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        change_settings(SamplingConfig(), changes)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SamplingConfig(pruning=PruningConfig([4])), r"pruning.scales=\[4\]: the model has 4 scales, 0 to 3"),
        (SamplingConfig(pruning=PruningConfig([3])), "pruning.from_block=3: the model has 2 blocks, 0 to 1"),
        (SamplingConfig(guidance_by_scale=[1.0, 2.0]), r"by_scale=\[1.0, 2.0\] has 2 numbers; the model has 4"),
    ],
)  # fmt: skip
def test_settings_that_a_model_does_not_have_are_named(config: SamplingConfig, words: str) -> None:
    config.validate("sampling")
    model, tokenizer = build("causal")
    noise = ImageNoise([1], torch.device("cpu"))
    with pytest.raises(UserError, match=words):
        sample_latent(model, tokenizer, captions(1), captions(1), config, noise)


def test_a_run_checks_them_before_it_starts() -> None:
    pruned = ["sampling.pruning.scales=[1]", "sampling.pruning.from_block=1"]
    assert load("generator/tiny", pruned).sampling.pruning == PruningConfig([1], [0.5], 1)
    with pytest.raises(UserError, match=r"sampling.pruning.scales=\[2\]: the model has 2 scales"):
        load("generator/tiny", ["sampling.pruning.scales=[2]", *pruned[1:]])
    with pytest.raises(UserError, match=r"sampling.guidance_by_scale=\[1.0\] has 1 numbers; the model has 2"):
        load("generator/tiny", ["sampling.guidance_by_scale=[1]"])


def test_values_of_the_command_line_are_checked_without_a_model() -> None:
    named = sampling_overrides(["pruning.scales=[8, 9]", "pruning.keep=[1, 0.5]", "guidance=2"])
    assert parse(named) == {
        "sampling.pruning.scales": [8, 9],
        "sampling.pruning.keep": [1.0, 0.5],
        "sampling.guidance": 2.0,
    }
    with pytest.raises(UserError, match=r"did you mean 'sampling\.pruning\.keep'"):
        parse(sampling_overrides(["pruning.kepp=[0.5]"]))


def test_a_group_is_changed_in_single_settings_replaced_or_switched_off() -> None:
    before = SamplingConfig(pruning=PruningConfig([2, 3], [0.5], 1))
    assert change_settings(before, {"pruning": {"keep": [0.25]}}).pruning == PruningConfig([2, 3], [0.25], 1)
    assert change_settings(before, {"pruning": PruningConfig([2])}).pruning == PruningConfig([2], [0.5], 3)
    assert change_settings(before, {"pruning": None}).pruning == PruningConfig()
    assert change_settings(before, {"top_k": 3}).pruning == before.pruning
    # Written before there was pruning.
    assert from_values(SamplingConfig, {"guidance": 2}, "sampling").pruning == PruningConfig()


def test_an_exported_folder_keeps_its_pruning(tmp_path: Path) -> None:
    from switti.sampling.pipeline_folder import Parts, read_parts, write_parts
    from switti.text.config import TextConfig

    model, tokenizer = build("non_causal")
    sampling = SamplingConfig(pruning=PRUNED, guidance_by_scale=[0.0, 1.0, 1.0, 2.0])
    write_parts(tmp_path / "out", Parts(model, tokenizer, TextConfig(), sampling, False))
    assert read_parts(tmp_path / "out").sampling == sampling
    assert '| sampling.pruning | `{"scales": [2, 3]' in (tmp_path / "out" / "README.md").read_text()


def test_counts_of_computed_tokens_are_rounded_up() -> None:
    config = PruningConfig([1, 2, 3], [0.07, 1.0, 0.001])
    assert config.counts([1, 100, 200, 300]) == {1: 7, 3: 1}
    assert PruningConfig([8, 9], [0.6, 0.5]).counts([1] * 8 + [576, 1024]) == {8: 346, 9: 512}
