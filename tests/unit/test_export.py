"""Runs as folders, and runs that start from the weights of others."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from configs.loading import load, to_yaml
from configs.schema import RunConfig
from experiments import export, sample
from experiments.assembly import build_module
from experiments.trained import frozen_tokenizer, initial_state, load_pipeline, open_pipeline
from switti.errors import UserError
from switti.files import read_json
from switti.models.rqvae import RQVAE, save_rqvae
from switti.models.transformer import ScaleTransformer
from switti.published import generator_to_published
from switti.sampling.pipeline import SwittiPipeline


def settings(folder: Path, *more: str) -> RunConfig:
    return load("generator/tiny", [f"runs_dir={folder}", f"tokenizer_weights={folder}/t.safetensors", *more])


def weights(config: RunConfig, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = ScaleTransformer(config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.state_dict()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as training leaves it, with an average that differs from the trained weights."""
    config = settings(tmp_path, "name=one")
    torch.manual_seed(5)
    save_rqvae(RQVAE(config.tokenizer), tmp_path / "t.safetensors")
    state = {f"generator.{k}": v for k, v in weights(config, 1).items()}
    state |= {f"ema_generator.{k}": v for k, v in weights(config, 2).items()}
    (config.run_dir / "checkpoints").mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    torch.save({"state_dict": state, "global_step": 8}, config.run_dir / "checkpoints" / "step_000008.ckpt")
    return config.run_dir


# ---- export -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [False, True])
def test_an_exported_run_samples_the_same_bits(run: Path, raw: bool, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert export.main([str(run), "--out", str(out), *(["--raw"] if raw else [])]) == 0
    assert "step 8, float32" in capsys.readouterr().out
    expected, config, _ = load_pipeline(run, [], averaged=not raw)
    found = SwittiPipeline.from_pretrained(out)
    assert torch.equal(found(["cat", "dog"], output_type="pt"), expected(["cat", "dog"], output_type="pt"))
    stored = load_file(out / "generator" / "model.safetensors")
    assert all(torch.equal(stored[k], v) for k, v in weights(config, 1 if raw else 2).items())
    assert read_json(out / "model_index.json")["details"] == {"run": "one", "step": 8, "averaged": not raw}


def test_half_precision_halves_the_weights_but_not_the_crop_frequencies(run: Path, tmp_path: Path) -> None:
    export.main(
        [str(run / "checkpoints" / "step_000008.ckpt"), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"]
    )
    stored = load_file(tmp_path / "out" / "generator" / "model.safetensors")
    assert {k for k, v in stored.items() if v.dtype != torch.bfloat16} == {"crop_embed.weight"}
    exact = weights(settings(tmp_path), 2)
    assert torch.equal(stored["crop_embed.weight"], exact["crop_embed.weight"])
    assert torch.equal(stored["head.weight"], exact["head.weight"].bfloat16())


def test_export_refuses_what_it_cannot_do(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        export.main([str(run), "--out", str(run)])
    with pytest.raises(UserError, match="neither a checkpoint nor a run folder"):
        export.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])


def drawn(source: Path | str, out: Path, *more: str) -> tuple[bytes, dict[str, Any]]:
    assert sample.main([str(source), "red circle", "--out", str(out), "guidance=2", *more]) == 0
    with Image.open(out) as picture:
        return picture.tobytes(), json.loads(picture.text["switti"])


def test_sampling_from_an_exported_folder(run: Path, tmp_path: Path) -> None:
    export.main([str(run), "--out", str(tmp_path / "out")])
    plain, details = drawn(run, tmp_path / "a.png")
    again, exported = drawn(tmp_path / "out", tmp_path / "b.png")
    assert plain == again
    assert details["sampling"] == exported["sampling"] and exported["sampling"]["guidance"] == 2.0
    assert details["step"] == 8 and exported["run"] == str(tmp_path / "out")
    switch = ("--switch-prompt", "blue square", "--switch-scale", "1")
    _, noted = drawn(tmp_path / "out", tmp_path / "c.png", *switch)
    assert (noted["switch_prompt"], noted["switch_scale"]) == ("blue square", 1)
    with pytest.raises(UserError, match="belong together"):
        drawn(run, tmp_path / "d.png", *switch[:2])


def test_sources_that_are_none_are_explained(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is neither a run, a checkpoint, an exported folder nor a hub id"):
        open_pipeline(tmp_path / "nowhere", [])
    export.main([str(run), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"did you mean 'sampling\.guidance'"):
        open_pipeline(tmp_path / "out", ["guidence=2"])
    with pytest.raises(UserError, match=r"only sampling\.\* can be given"):
        open_pipeline(tmp_path / "out", ["model.depth=2"])


# ---- init_from --------------------------------------------------------------------------------------------------


def test_a_run_starts_from_another_and_its_average_too(run: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, "name=two", f"init_from={run}")
    module = build_module(config)
    module.configure_model()
    expected = weights(config, 2)
    for model in (module.generator, module.ema_generator):
        assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for k, p in module.generator.named_parameters() if k != "crop_embed.weight")


def test_a_resumed_run_does_not_ask_for_what_it_started_from(run: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, "name=two", "init_from=/gone")
    build_module(config, fresh=False).configure_model()
    with pytest.raises(UserError, match="no such file or folder: /gone"):
        build_module(config)


@pytest.mark.parametrize("kind", ["run", "checkpoint", "exported", "published"])
def test_progressive_resolution(kind: str, run: Path, tmp_path: Path) -> None:
    """Every kind of source; the level embedding by nearest progress, everything else as it was."""
    config = settings(tmp_path, "name=finer")
    config = copy.deepcopy(config)
    config.model.scales = [1, 2, 4]
    expected = weights(settings(tmp_path), 2)
    tokenizer = frozen_tokenizer(settings(tmp_path))
    source = {"run": run, "checkpoint": run / "checkpoints" / "step_000008.ckpt"}.get(kind, tmp_path / "out")
    if kind == "exported":
        export.main([str(run), "--out", str(source)])
    if kind == "published":
        from safetensors.torch import save_file

        model = load_pipeline(run, [])[0].generator
        save_file(generator_to_published(model), source.with_suffix(".safetensors"))
        with pytest.raises(UserError, match=r"model\.heads=2, but .* was trained with heads=1"):
            initial_state(
                str(source.with_suffix(".safetensors")), config, tokenizer
            )  # heads of width 64 are assumed
        return
    state = initial_state(str(source), config, tokenizer)
    # r = 0, ½, 1 from r' = 0, 1: the tie goes to the coarser.
    assert torch.equal(state["lvl_embed.weight"], expected["lvl_embed.weight"][[0, 0, 1]])
    assert all(torch.equal(state[k], expected[k]) for k in expected if k != "lvl_embed.weight")
    ScaleTransformer(config.model).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "model.visibility=causal",
            "model.visibility=causal, but init_from=.* was trained with visibility=non_causal",
        ),
        ("model.heads=4", "model.heads=4, but init_from=.* was trained with heads=2"),
        ("model.query_key_norm=rms", "was trained with query_key_norm=layer"),
    ],
)
def test_the_variant_stays_what_it_was(change: str, words: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        build_module(settings(tmp_path, "name=two", f"init_from={run}", change))


def test_another_width_is_named_key_by_key(run: Path, tmp_path: Path) -> None:
    module = build_module(settings(tmp_path, "name=two", f"init_from={run}", "model.width=64"))
    with pytest.raises(
        UserError, match=r"init_from does not fit these settings \(\d+ keys\): pos_start is \[1, 1, 32\]"
    ):
        module.configure_model()


def test_init_from_is_for_generators(run: Path, tmp_path: Path) -> None:
    config = load("tokenizer/tiny", [f"runs_dir={tmp_path}", f"init_from={run}"])
    with pytest.raises(UserError, match="is for generators"):
        build_module(config)
