"""Trained runs as pipelines. Not a command itself."""

from dataclasses import replace
from pathlib import Path

import torch

from callbacks.checkpointing import find_resume
from configs.loading import SETTINGS, from_run
from configs.schema import RunConfig
from switti.checkpoint import fill, read_torch, sub_state
from switti.errors import UserError
from switti.models.rqvae import load_rqvae
from switti.models.text.base import build_text_encoder
from switti.models.transformer import ScaleTransformer
from switti.sampling.pipeline import SwittiPipeline


def find_run(target: Path) -> tuple[Path, Path]:
    """(run folder, checkpoint) of a run folder or of one of its checkpoints."""
    if target.is_file():
        folder = target.parent.parent
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{target} lies in no run folder: {folder} has no config.yaml")
        return folder, target
    if not (target / "config.yaml").is_file():
        raise UserError(f"{target} is neither a checkpoint nor a run folder (no config.yaml in it)")
    checkpoint = find_resume(target)
    if checkpoint is None:
        raise UserError(f"{target} has no whole checkpoint yet; train it with `python -m experiments.train`")
    return target, checkpoint


def load_pipeline(
    target: Path, settings: list[str], averaged: bool = True
) -> tuple[SwittiPipeline, RunConfig, int]:
    """(pipeline, resolved settings, step) of a trained generator.

    settings: `sampling.key=value` or `key=value` for the sampler. averaged: the moving average if the run kept one.
    """
    folder, checkpoint = find_run(target)
    named = [s if s.split("=")[0] in SETTINGS else f"sampling.{s}" for s in settings]
    foreign = [s for s in named if not s.startswith("sampling.")]
    if foreign:
        raise UserError(
            f"{foreign[0]}: a trained run's settings are fixed; only sampling.* can be given here"
        )
    config = from_run(folder, named)
    if config.task != "generator":
        raise UserError(f"{folder} is a {config.task} run; pictures are sampled from generator runs")
    content = read_torch(checkpoint)
    state = content.get("state_dict", {})
    name = "ema_generator" if averaged and any(k.startswith("ema_generator.") for k in state) else "generator"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = ScaleTransformer(replace(config.model))
    fill(generator, sub_state(state, name), str(checkpoint))
    tokenizer = load_rqvae(config.tokenizer, config.tokenizer_weights or "")
    pipeline = SwittiPipeline(
        generator.eval().requires_grad_(False).to(device),
        tokenizer.to(device),
        build_text_encoder(config.text, device),
        config.sampling,
        autocast=config.trainer.precision == "bf16-mixed",
    )
    return pipeline, config, int(content.get("global_step", 0))
