"""A tuned tokenizer takes the place of the one before under a trained generator; another codebook is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.build import build_module
from configs.load_run import load_pipeline
from configs.loading import load, to_yaml
from configs.schema import RunConfig
from experiments.export import main
from switti.errors import UserError
from switti.files import read_json, write_json
from switti.models.transformer import ScaleTransformer
from switti.sampling.pipeline import SwittiPipeline
from switti.sampling.pipeline_folder import read_parts
from switti.tokenizer.rqvae import CODES, RQVAE
from switti.weights.load import load_tokenizer
from switti.weights.save import save_tokenizer


def save(config: RunConfig, path: Path, change: str | None = None) -> Path:
    """The same tokenizer at random, with other weights in the parts whose names begin with `change`."""
    torch.manual_seed(5)
    model = RQVAE(config.tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if change is not None and name.startswith(change):
                parameter.mul_(1.5).add_(0.01)
    save_tokenizer(model, path)
    return path


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    weights = f"tokenizer_weights={tmp_path}/before.safetensors"
    found = load("generator/tiny", [f"runs_dir={tmp_path}", "name=one", weights])
    save(found, tmp_path / "before.safetensors")
    return found


@pytest.fixture
def run(config: RunConfig) -> Path:
    """A run folder with a checkpoint as the module saves it."""
    module = build_module(config)
    module.configure_model()
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": 3}
    module.on_save_checkpoint(checkpoint)
    (config.run_dir / "checkpoints").mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    torch.save(checkpoint, config.run_dir / "checkpoints" / "step_000003.ckpt")
    return config.run_dir


def sampled(pipeline: SwittiPipeline) -> tuple[Tensor, Tensor]:
    """(latent that the decoder gets, images)."""
    latents: list[Tensor] = []
    hook = pipeline.tokenizer.post_quant_conv.register_forward_pre_hook(
        lambda module, inputs: latents.append(inputs[0].clone())
    )
    images = pipeline(["cat", "dog"], seeds=[1, 2], output_type="pt")
    hook.remove()
    return torch.cat(latents), images


@pytest.mark.parametrize("part", ["decoder.", "post_quant_conv."])
def test_a_tuned_decoder_changes_images_and_nothing_before(
    config: RunConfig, run: Path, tmp_path: Path, part: str
) -> None:
    tuned = save(config, tmp_path / "tuned.safetensors", part)
    before, after = (
        load_tokenizer(tmp_path / f"{name}.safetensors", config=config.tokenizer)
        for name in ("before", "tuned")
    )
    side = config.tokenizer.resolution
    image = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(before.tokenize(image), after.tokenize(image))
    latent, images = sampled(load_pipeline(run, [])[0])
    other_latent, other_images = sampled(load_pipeline(run, [f"tokenizer_weights={tuned}"])[0])
    assert torch.equal(latent, other_latent)
    assert not torch.equal(images, other_images)


@pytest.mark.parametrize("part", ["quantize.embedding", "quantize.quant_resi"])
def test_another_codebook_is_refused(config: RunConfig, run: Path, tmp_path: Path, part: str) -> None:
    """Of the same shape and settings, which keys and sizes cannot tell apart."""
    other = save(config, tmp_path / "other.safetensors", part)
    with pytest.raises(
        UserError, match=r"tokenizer_weights=.*other\.safetensors: its codebook is not the one"
    ):
        load_pipeline(run, [f"tokenizer_weights={other}"])
    save(config, tmp_path / "before.safetensors", part)  # the file itself has been replaced
    with pytest.raises(UserError, match=r"before\.safetensors: its codebook is not the one"):
        load_pipeline(run, [])


def test_resuming_with_another_codebook_is_refused(config: RunConfig, run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(run / "checkpoints/step_000003.ckpt", weights_only=False)
    build_module(config).on_load_checkpoint(checkpoint)
    save(config, tmp_path / "before.safetensors", "quantize.embedding")
    with pytest.raises(UserError, match="tokenizer_weights: its codebook is not the one"):
        build_module(config).on_load_checkpoint(checkpoint)


@pytest.mark.parametrize("kind", ["run", "checkpoint", "exported", "file"])
def test_starting_from_a_generator_of_other_codes_is_refused(
    config: RunConfig, run: Path, tmp_path: Path, kind: str
) -> None:
    """Whatever init_from names, if it tells its codes. A tuned decoder has the same."""
    assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    config.init_from = str({
        "run": run,
        "checkpoint": run / "checkpoints/step_000003.ckpt",
        "exported": tmp_path / "out",
        "file": tmp_path / "out/generator/model.safetensors",
    }[kind])  # fmt: skip
    config.tokenizer_weights = str(save(config, tmp_path / "tuned.safetensors", "decoder."))
    build_module(config)
    config.tokenizer_weights = str(save(config, tmp_path / "other.safetensors", "quantize.embedding"))
    words = r"init_from=.* with tokenizer_weights=.*other\.safetensors: its codebook is not the one"
    with pytest.raises(UserError, match=words):
        build_module(config)
    build_module(config, fresh=False)  # resumed: the checkpoint has its own codes


def test_a_source_without_codes_may_be_started_from(config: RunConfig, run: Path, tmp_path: Path) -> None:
    """Exported before codes were told."""
    assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    beside = tmp_path / "out/generator/config.json"
    write_json(beside, {key: value for key, value in read_json(beside).items() if key != CODES})
    config.init_from = str(tmp_path / "out")
    config.tokenizer_weights = str(save(config, tmp_path / "other.safetensors", "quantize.embedding"))
    build_module(config)


def test_an_exported_pipeline_keeps_to_its_codes(config: RunConfig, run: Path, tmp_path: Path) -> None:
    """Another decoder may be given, another codebook not, nor may the folder's own be replaced."""
    out = tmp_path / "out"
    assert main([str(run), "--out", str(out)]) == 0
    tuned = save(config, tmp_path / "tuned.safetensors", "decoder.")
    assert read_parts(out, tokenizer=tuned).tokenizer.config.scales == config.tokenizer.scales
    other = save(config, tmp_path / "other.safetensors", "quantize.quant_resi")
    with pytest.raises(UserError, match=r"tokenizer=.*other\.safetensors: its codebook is not the one"):
        read_parts(out, tokenizer=other)
    shutil.copy(other, out / "tokenizer/model.safetensors")
    with pytest.raises(UserError, match=r"tokenizer=.*out: its codebook is not the one"):
        read_parts(out)


def test_another_pyramid_is_refused_by_name(config: RunConfig, run: Path, tmp_path: Path) -> None:
    config.tokenizer.scales = [1, 3]
    other = save(config, tmp_path / "wider.safetensors")
    with pytest.raises(UserError, match=r"wider.*tokenizer\.scales=\[1, 2\] \(the weights: \[1, 3\]\)"):
        load_pipeline(run, [f"tokenizer_weights={other}"])


def test_older_checkpoints_do_not_know_their_codes(config: RunConfig, run: Path, tmp_path: Path) -> None:
    path = run / "checkpoints" / "step_000003.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint[CODES]
    torch.save(checkpoint, path)
    other = save(config, tmp_path / "other.safetensors", "quantize.embedding")
    pipeline, _, step = load_pipeline(run, [f"tokenizer_weights={other}"])
    assert step == 3 and isinstance(pipeline.generator, ScaleTransformer)


def test_other_settings_of_a_run_stay_fixed(run: Path) -> None:
    with pytest.raises(UserError, match=r"seed=1: .* only sampling\.\* and tokenizer_weights"):
        load_pipeline(run, ["seed=1"])
