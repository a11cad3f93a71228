"""Runs as folders, and runs that start from the weights of others."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from data_shards import make_set
from PIL import Image
from safetensors.torch import load_file

from configs.build import build_module
from configs.load_run import load_frozen_tokenizer, load_initial_state, load_pipeline, open_pipeline
from configs.loading import load, to_yaml
from configs.schema import RunConfig
from experiments import analyse, evaluate, export, sample
from switti.errors import UserError
from switti.files import read_json
from switti.models.transformer import ScaleTransformer
from switti.sampling.formats import check_image
from switti.sampling.image_grid import captioned_grid, grid_size
from switti.sampling.pipeline import SwittiPipeline
from switti.tokenizer.rqvae import RQVAE
from switti.weights.load import load_generator
from switti.weights.published import generator_to_published
from switti.weights.save import save_tokenizer


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
    save_tokenizer(RQVAE(config.tokenizer), tmp_path / "t.safetensors")
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
    expected, config, _ = load_pipeline(run, [], ema=not raw)
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


def test_one_file_holds_the_generator_with_its_settings(run: Path, tmp_path: Path, capsys: Any) -> None:
    """Loaded by itself, it is the same model; and it starts another run."""
    out = tmp_path / "one.safetensors"
    assert export.main([str(run), "--out", str(out), "--verify"]) == 0
    assert "step 8, float32" in capsys.readouterr().out
    config, model = settings(tmp_path), load_generator(out)
    assert model.config == config.model
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights(config, 2).items())
    initial = settings(tmp_path, f"init_from={out}")
    state = load_initial_state(str(out), initial, load_frozen_tokenizer(initial))
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    torch.manual_seed(6)
    save_tokenizer(RQVAE(config.tokenizer), tmp_path / "t.safetensors")
    with pytest.raises(UserError, match=r"init_from=.*one\.safetensors with tokenizer_weights="):
        load_initial_state(str(out), initial, load_frozen_tokenizer(initial))


def test_an_exported_folder_has_a_model_card(run: Path, tmp_path: Path) -> None:
    (run / "samples").mkdir()
    Image.new("RGB", (8, 4), "blue").save(run / "samples" / "step_000008_guided.png")
    export.main([str(run), "--out", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: switti\n") and "| model.depth | `" in card
    with Image.open(tmp_path / "out" / "samples.png") as image:
        assert image.convert("RGB").getpixel((0, 0)) == (0, 0, 255)
    # Facts that cannot be read leave the weights as they are.
    (run / "record.json").write_text("{")
    assert export.main([str(run), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "README.md").is_file()


def test_export_refuses_what_it_cannot_do(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        export.main([str(run), "--out", str(run)])
    with pytest.raises(UserError, match="neither a checkpoint nor a run folder"):
        export.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nothing")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "dangling", "fifo", "empty/../fifo"):
        with pytest.raises(UserError, match=f"{name} exists already and is not a folder"):
            export.main([str(run), "--out", str(tmp_path / name)])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "dangling").is_symlink()


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


# ---- the sample command -----------------------------------------------------------------------------------------


def no_sampling(*_arguments: Any) -> Any:
    raise AssertionError("nothing may be loaded before this is refused")


@pytest.mark.parametrize(
    ("name", "kind"), [("x.jpg", "JPEG"), ("x.JPEG", "JPEG"), ("x.webp", "WEBP"), ("x.png", "PNG")]
)
def test_the_name_says_the_format_and_the_file_its_settings(
    name: str, kind: str, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / name
    arguments = [
        "guidance=3",
        "--n",
        "2",
        "--seed",
        "010",
        "--out",
        str(out),
        "--",
        "a=b",
        "E = mc²",
        "-1 °C",
    ]
    assert sample.main([str(run), "cat", *arguments]) == 0
    with Image.open(out) as image:
        image.load()
        assert image.format == kind
        text = image.text["switti"] if kind == "PNG" else image.getexif()[270]  # type: ignore[attr-defined]
    details = json.loads(text)
    assert details["prompts"][::2] == ["cat", "a=b", "E = mc²", "-1 °C"]
    assert details["seeds"] == list(range(10, 18)) and details["sampling"]["guidance"] == 3.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a=b"], "unknown setting 'a'.*; a prompt of this form goes after --: -- 'a=b'"),
        (["cat", "guidence=3"], "did you mean 'guidance'"),
        ([], "no prompt given"),
        (["guidance=3"], "no prompt given"),
        (["caf\udce9"], r"prompt=caf\\udce9 is not text in UTF-8"),
        (["--", "\udcff=x"], "prompt=.* is not text in UTF-8"),
        (["cat", "--negative", "\udcff"], "--negative=.* is not text"),
        (
            ["cat", "--seed", str(2**64)],
            r"--seed=18446744073709551616 must be an integer in \[0, 18446744073709551615\]",
        ),
        (["cat", "dog", "--seed", str(2**64 - 1)], r"--seed \+ images − 1=18446744073709551616 must be"),
        (["cat", "--seed", "-1"], "--seed=-1 must be"),
        (["cat", "--seed", "1.5"], "--seed=1.5 must be"),
        (["cat", "--seed", "true"], "--seed=true must be"),
        (["cat", "--seed", "9" * 5000], r"--seed=9+… \(5000 characters\) must be"),
        (["cat", "--n", "0"], "--n=0 must be an integer of at least 1"),
        (["cat", "--batch", "x"], "--batch=x must be"),
        (["cat", "--switch-prompt", "a", "--switch-scale", "1.5"], "--switch-scale=1.5 must be"),
        (["cat", "--out", "x.gif"], "x.gif must end in .png, .jpg, .jpeg, .webp"),
        (["cat", "--out", "x"], "x must end in"),
        (["cat", "--out", "folder.png"], "folder.png is a folder, not a regular file"),
        (["cat", "--out", "fifo.png"], "fifo.png is a FIFO"),
        (["cat", "--out", "link.png"], "link.png is a symbolic link"),
        (["cat", "--out", "dangling.png"], "dangling.png is a symbolic link"),
        (["cat", "--out", "/dev/null"], "must end in"),
        (["cat", "--out", "missing/x.png"], "there is no folder missing"),
        (["cat", "--out", "file/x.png"], "cannot write file/x.png"),
        (["cat", "--out", "/proc/x.png"], "cannot write /proc/x.png"),
        (["cat", "--out", "a" * 300 + ".png"], "cannot write a+… .*File name too long"),
        (["cat", "--separate", "--out", "file"], "file is a file, not a folder"),
        (["cat", "--separate", "--out", "fifo.png"], "fifo.png is a FIFO, not a folder"),
        (["cat", "--separate", "--out", "dangling.png"], "dangling.png is a symbolic link"),
        (["cat", "--separate", "--out", "missing/x"], "there is no folder"),
        (["cat", "--separate", "--out", "full"], "00000.png is a FIFO"),
    ],
)
def test_what_cannot_be_meant_or_written_is_refused_before_anything_is_loaded(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("configs.load_run.open_pipeline", no_sampling)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "full").mkdir()
    for name in ("fifo.png", "full/00000.png"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "file").write_text("")
    (tmp_path / "link.png").symlink_to("file")
    (tmp_path / "dangling.png").symlink_to("nothing")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=words):
        sample.main(["run", *arguments])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_jpeg_that_cannot_hold_the_grid_or_its_settings_is_refused_before_sampling() -> None:
    check_image(Path("x.jpg"), (65_500, 10), {"a": "b"})
    check_image(Path("x.png"), (10**6, 10**6), {"a": "b" * 10**6})
    with pytest.raises(
        UserError, match=r"x\.webp: WEBP holds at most 16383 px a side, not 16384 × 5; give a \.png"
    ):
        check_image(Path("x.webp"), (16_384, 5), {})
    with pytest.raises(UserError, match="too long for JPEG's metadata"):
        check_image(Path("x.jpg"), (5, 5), {"prompts": ["word"] * 10_000})
    images = [Image.new("RGB", (20, 10))] * 5
    for columns in (1, 3, 8):
        assert captioned_grid(images, ["a"] * 5, columns).size == grid_size(5, 20, 10, columns)


def test_sources_that_are_none_are_explained(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is neither a run, a checkpoint, an exported folder nor a hub id"):
        open_pipeline(tmp_path / "nowhere", [])
    export.main([str(run), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"did you mean 'sampling\.guidance'"):
        open_pipeline(tmp_path / "out", ["guidence=2"])
    with pytest.raises(UserError, match=r"only sampling\.\* can be given"):
        open_pipeline(tmp_path / "out", ["model.depth=2"])


# ---- the evaluate and analyse commands ------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    make_set(tmp_path / "shards", [5], "validation")
    return tmp_path / "shards"


def test_an_exported_folder_is_evaluated_without_being_changed(
    run: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    export.main([str(run), "--out", "out"])
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert evaluate.main(["out", "--data", str(shards), "--images", "4", "guidance=2"]) == 0
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before
    result = read_json(Path("evaluation/out.json"))
    assert set(result["metrics"]) == {
        "fid_alexnet",
        "kid_alexnet",
        "mini_clip_score",
        "mini_clip_score_shuffled",
    }
    assert result["pictures"] == 4 and result["settings"]["guidance"] == 2.0 and result["step"] is None
    assert len(result["sampling"]["seconds_per_scale"]) == 2
    assert "evaluation/out.json" in capsys.readouterr().out
    config = load(run / "config.yaml")
    changes = [f"data.train={shards}/*.tar", f"data.validation={shards}/*.tar"]
    (run / "config.yaml").write_text(to_yaml(load(run / "config.yaml", changes)))
    assert evaluate.main([str(run), "--out", "elsewhere", "--images", "4", "guidance=2"]) == 0
    of_run = read_json(Path(f"elsewhere/{run.name}.json"))
    assert of_run["step"] == 8 and not (run / "evaluation.json").exists()
    if config.metrics.names == ["fid_alexnet", "kid_alexnet", "mini_clip_score"]:
        assert of_run["metrics"] == pytest.approx(result["metrics"], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out"], "out is not a run, whose settings name its data: give --data SHARDS"),
        (["out", "--data", "nowhere/*.tar"], "matches no shard"),
        (["out", "other/out", "--data", "shards"], "two results would go to evaluation/out.json"),
        (["RUN", "--data", "shards"], "--data is for exported folders and published weights"),
        (["nowhere", "--data", "shards"], "no study 'nowhere'"),
        (["tokenizer.safetensors.json", "--data", "shards"], "no study"),
        (["shards", "--data", "shards"], "no runs found in 'shards'"),
        (["out", "--data", "shards", "--out", "t.safetensors"], "t.safetensors is a file, not a folder"),
    ],
)
def test_what_evaluate_refuses_it_explains(
    words: list[str], message: str, run: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("out", "other/out"):
        export.main([str(run), "--out", folder])
    with pytest.raises(UserError, match=message):
        evaluate.main([str(run) if word == "RUN" else word for word in words])
    assert not Path("evaluation").exists()


def test_an_exported_folder_is_analysed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export.main([str(run), "--out", "out"])
    assert analyse.main(["guidance-off", "out", "--width", "1", "--", "a=b"]) == 0
    assert Path("analysis/guidance_off.png").is_file()
    os.mkfifo("fifo")
    with pytest.raises(UserError, match="fifo is a FIFO, not a folder"):
        analyse.main(["guidance-off", "out", "a", "--out", "fifo"])


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
    tokenizer = load_frozen_tokenizer(settings(tmp_path))
    source = {"run": run, "checkpoint": run / "checkpoints" / "step_000008.ckpt"}.get(kind, tmp_path / "out")
    if kind == "exported":
        export.main([str(run), "--out", str(source)])
    if kind == "published":
        from safetensors.torch import save_file

        model = load_pipeline(run, [])[0].generator
        save_file(generator_to_published(model), source.with_suffix(".safetensors"))
        with pytest.raises(UserError, match=r"model\.heads=2, but .* was trained with heads=1"):
            load_initial_state(
                str(source.with_suffix(".safetensors")), config, tokenizer
            )  # heads of width 64 are assumed
        return
    state = load_initial_state(str(source), config, tokenizer)
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
