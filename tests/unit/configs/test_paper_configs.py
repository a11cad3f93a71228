"""The paper's sizes and stages as configs, and studies of named points such as the ladder."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from configs.loading import CONFIGS, load
from configs.schema import RunConfig, get
from sweeps.study import load_study
from switti.errors import UserError
from switti.models.config import GeneratorConfig
from switti.scales import PYRAMIDS
from switti.weights.fill import build_empty

STAGES = sorted(
    path.stem for path in (CONFIGS / "generator" / "paper").glob("*.yaml") if path.stem != "common"
)
D30, D30_1024, D20 = 2_470_518_256, 2_470_525_936, 772_632_736


def count(config: GeneratorConfig) -> int:
    """Parameters by hand."""
    width, text = config.width, config.text_width
    attention = 4 * width**2 + 4 * width
    cross = 2 * (width**2 + width) + 2 * width * text + 2 * width
    feed = 3 * width * (8 * width // 3) if config.ffn == "swiglu" else 8 * width**2 + 5 * width
    norms = 6 * width + text if config.norms == "sandwich" else 2 * (3 * width + text)
    modulation = 6 * width**2 + 6 * width
    block = attention + cross + feed + norms + modulation + width * config.crop_condition
    crop = (width // 8 + width**2 + width) * config.crop_condition
    outside = (
        config.scales[0] ** 2 * width
        + (config.code_width + 1) * width
        + (config.pooled_width + 1) * width
        + len(config.scales) * width
        + 2 * width**2 + 2 * width
        + (width + 1) * config.codebook_size
    )  # fmt: skip
    return config.depth * block + crop + outside


def stage(name: str) -> RunConfig:
    return load(f"generator/paper/{name}")


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_the_papers_size(name: str) -> None:
    config = stage(name)
    found = sum(parameter.numel() for parameter in build_empty(config.model).parameters())
    assert (
        found == count(config.model) == (D20 if "ablation" in name else D30_1024 if "1024" in name else D30)
    )
    resolution = int(name.removesuffix("_ar").rpartition("_")[2])
    assert config.tokenizer.resolution == resolution and config.model.scales == PYRAMIDS[resolution]
    assert config.model.visibility == ("causal" if name.endswith("_ar") else "non_causal")
    assert config.model.width == 64 * config.model.depth == 64 * config.model.heads


@pytest.mark.parametrize(
    ("name", "steps", "batch", "first", "last"),
    [
        ("pretrain_256", 400_000, 2560, 1e-4, 1e-5),
        ("pretrain_512", 200_000, 768, 1e-5, 5e-7),
        ("sft_512", 40_000, 64, 5e-7, 5e-7),
        ("sft_1024", 40_000, 64, 5e-7, 5e-7),
        ("ablation_256", 150_000, 768, 1e-4, 1e-5),
    ],
)
def test_stages_train_with_the_papers_numbers(
    name: str, steps: int, batch: int, first: float, last: float
) -> None:
    for config in [stage(name)] + ([] if "ablation" in name else [stage(f"{name}_ar")]):
        assert (config.trainer.max_steps, config.data.batch_size) == (steps, batch)
        assert (config.optimizer.learning_rate, config.optimizer.final_learning_rate) == (first, last)
        assert config.optimizer.betas == [0.9, 0.95] and config.trainer.gradient_clip == 1.0
        assert config.loss.latent_noise == 0.01 and config.data.caption_dropout == 0.1


@pytest.mark.parametrize("suffix", ["", "_ar"])
def test_stages_follow_each_other(suffix: str) -> None:
    """Each starts from the folder that the one before writes, of the same variant."""
    chains = [["pretrain_256", "pretrain_512", "sft_512"], ["pretrain_256", "pretrain_512", "sft_1024"]]
    for chain in chains:
        configs = [stage(name + suffix) for name in chain]
        assert configs[0].init_from is None
        for before, after in pairwise(configs):
            assert after.init_from == str(before.run_dir)
            assert after.model.visibility == before.model.visibility


@pytest.mark.parametrize("name", ["ladder_paper", "ladder_demo"])
def test_the_ladder_changes_one_thing_a_rung(name: str) -> None:
    study = load_study(name)
    fields = ("model.head_precision", "model.norms", "model.ffn", "model.visibility")
    changes = [
        [(field, get(b.config, field)) for field in fields if get(a.config, field) != get(b.config, field)]
        for a, b in pairwise(study.runs)
    ]
    assert changes == [
        [("model.head_precision", "float32")], [("model.norms", "sandwich")], [("model.ffn", "swiglu")],
        [("model.visibility", "non_causal")],
    ]  # fmt: skip
    others = [{**vars(run.config), "model": None, "name": None} for run in study.runs]
    assert all(other == others[0] for other in others)
    for run in study.runs:
        model = build_empty(run.config.model)
        assert sum(parameter.numel() for parameter in model.parameters()) == count(run.config.model)


# ---- studies of named points ------------------------------------------------------------------------------------

POINTS = """\
base: generator/tiny
runs:
  - {name: small one, set: {model.depth: 1}}
  - {name: b, set: {model.depth: 2, model.ffn: gelu}}
"""


def study_file(folder: Path, text: str) -> Path:
    (folder / "s.yaml").write_text(text)
    return folder / "s.yaml"


def test_named_points_alone_and_times_a_grid(tmp_path: Path) -> None:
    study = load_study(study_file(tmp_path, POINTS))
    assert [run.name for run in study.runs] == ["small-one", "b"]
    assert [(run.config.model.depth, run.config.model.ffn) for run in study.runs] == [
        (1, "swiglu"),
        (2, "gelu"),
    ]
    assert study.runs[1].varied == {"model.depth": 2, "model.ffn": "gelu"}
    study = load_study(study_file(tmp_path, POINTS + "vary: {seed: [0, 1]}\npair_by: seed\n"))
    assert [run.name for run in study.runs] == [
        "small-one,seed=0",
        "small-one,seed=1",
        "b,seed=0",
        "b,seed=1",
    ]
    assert [(run.config.model.depth, run.config.seed) for run in study.runs] == [
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]
    for run in study.runs:
        assert load(run.arguments[0], run.arguments[1:]) == run.config


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("  - {name: b, set: {model.depth: 3}}", "runs names 'b' twice"),
        ("  - {name: c, set: {model.dpth: 3}}", "did you mean 'model.depth'"),
        ("  - {name: c}", "runs must be a list of"),
        ("  - {name: c, set: {name: x}}", "cannot be varied"),
        ("vary: {model.ffn: [gelu, swiglu]}", "in vary and in runs"),
        ("overrides: {model.depth: 3}", "model.depth is varied by"),
        ("pair_by: seed", "pair_by=seed is not among"),
        ("  - {name: c, set: {model.width: 31}}", "run c: model.width=31 must be"),
    ],
)
def test_bad_points_are_refused(more: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_study(study_file(tmp_path, f"{POINTS}{more}\n"))
    assert words in str(caught.value)


def test_closed_form_equals_the_published_count() -> None:
    settings: dict[str, Any] = {"depth": 20, "width": 1280, "heads": 20, "crop_condition": False}
    assert count(GeneratorConfig(**settings)) == 770_967_296
