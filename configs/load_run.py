"""Sampling pipelines from trained runs, exported folders and published weights."""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from callbacks.checkpointing import checkpoints_of, corruption, find_resume
from configs.loading import SETTINGS, from_run, parse
from configs.schema import RunConfig
from switti.distributed.sharded_checkpoint import STATE, is_sharded, read_tensors
from switti.errors import UserError
from switti.files import kind_of
from switti.models.config import GeneratorConfig
from switti.run_folder import CONFIG
from switti.sampling.pipeline import SwittiPipeline
from switti.sampling.pipeline_arguments import change_settings
from switti.suggestions import printable
from switti.text.build import build_text_encoder
from switti.tokenizer.rqvae import RQVAE, check_codes
from switti.weights.describe import describe_generator
from switti.weights.fill import fill_generator
from switti.weights.fit import fit_generator, resize_levels
from switti.weights.hub import is_hub_id
from switti.weights.load import load_tokenizer
from switti.weights.published import GENERATORS
from switti.weights.read import read_generator, sub_state, weights_in
from switti.weights.torch_files import read_torch

# Settings that weights depend on although no shape shows it: a run with init_from must keep them.
INHERITED = ("visibility", "heads", "query_key_norm", "rope", "rope_theta", "rope_size")


def find_run(target: Path) -> tuple[Path, Path]:
    """(run folder, checkpoint) of a run folder or of one of its checkpoints."""
    if is_checkpoint(target):
        folder = target.parent.parent
        if kind_of(folder / CONFIG) is None:
            raise UserError(f"{target} is not in a run folder: {folder} has no {CONFIG}")
        return folder, target
    if kind_of(target / CONFIG) is None:
        raise UserError(f"{target} is neither a checkpoint nor a run folder (no {CONFIG} in it)")
    checkpoint = find_resume(target)
    if checkpoint is None:
        if corrupt := checkpoints_of(target):
            raise UserError(
                f"{target} has no checkpoint that can be used: {corrupt[0].name}: {corruption(corrupt[0])}"
            )
        raise UserError(f"{target} has no checkpoint yet; train it with `python -m experiments.train`")
    return target, checkpoint


def is_checkpoint(target: Path) -> bool:
    """Whether `target` is a file or a sharded checkpoint."""
    return target.is_file() or is_sharded(target)


def is_run(target: Path) -> bool:
    """Whether `target` is a run folder or one of its checkpoints, rather than exported or published weights."""
    folder = target.parent.parent if is_checkpoint(target) else target
    return kind_of(folder / CONFIG) is not None


def load_generator_state(checkpoint: Path, ema: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(generator's weights, other contents) of a run's checkpoint. ema: prefer the EMA, if the run kept one."""
    if is_sharded(checkpoint):
        rest = read_torch(checkpoint / STATE)
        for name in ("ema_generator", "generator") if ema else ("generator",):
            if state := read_tensors(checkpoint, f"state_dict.{name}."):
                return state, rest
        raise UserError(f"{checkpoint} does not contain a generator")
    content = read_torch(checkpoint)
    state = weights_in(content, checkpoint)
    name = "ema_generator" if ema and any(k.startswith("ema_generator.") for k in state) else "generator"
    return sub_state(state, name), content


def _step(content: Mapping[str, Any], checkpoint: Path) -> int:
    step = content.get("global_step", 0)
    if type(step) is not int or not 0 <= step < 2**63:
        raise UserError(f"{checkpoint} is not a checkpoint of a run: its global_step is {printable(step)}")
    return step


def sampling_overrides(settings: list[str], tokenizer: bool = False) -> list[str]:
    """`key=value` as `sampling.key=value`; other groups are refused. tokenizer: allow tokenizer_weights, too."""
    named = [s if s.split("=")[0] in SETTINGS else f"sampling.{s}" for s in settings]
    passed = ("sampling.", "tokenizer_weights=") if tokenizer else ("sampling.",)
    foreign = [s for s in named if not s.startswith(passed)]
    if foreign:
        also = " and tokenizer_weights (another decoder for the same tokens)" if tokenizer else ""
        raise UserError(
            f"{foreign[0]}: a trained run's settings are fixed; only sampling.*{also} can be given here"
        )
    return named


def load_frozen_tokenizer(config: RunConfig, other_scales: bool = False) -> RQVAE:
    """The tokenizer of `tokenizer_weights` (a file, a folder, a hub id or embedded:demo) with the run's settings.

    Weights that carry other settings are refused. other_scales: allow scales other than theirs.
    """
    if config.tokenizer_weights is None:
        raise UserError("tokenizer_weights is not set; give a file, or embedded:demo for the one that ships")
    try:
        scales = config.tokenizer.scales if other_scales else None
        return load_tokenizer(config.tokenizer_weights, config=config.tokenizer, scales=scales)
    except UserError as error:
        raise UserError(f"tokenizer_weights={config.tokenizer_weights}: {error}") from error


def load_pipeline(
    target: Path, settings: list[str], ema: bool = True
) -> tuple[SwittiPipeline, RunConfig, int]:
    """(pipeline, resolved settings, step) of a trained generator.

    Args:
        target: a run folder or one of its checkpoints.
        settings: `sampling.key=value` or `key=value` for the sampler, and tokenizer_weights=… for a tokenizer whose
            decoder was tuned.
        ema: use the EMA, if the run kept one.

    Raises:
        UserError: a setting that cannot be changed, or a tokenizer with another codebook or other scales.
    """
    folder, checkpoint = find_run(target)
    config = from_run(folder, sampling_overrides(settings, tokenizer=True))
    if config.task != "generator":
        raise UserError(f"{folder} is a {config.task} run; images are sampled from generator runs")
    state, content = load_generator_state(checkpoint, ema)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_frozen_tokenizer(config)
    check_codes(content, tokenizer, f"tokenizer_weights={config.tokenizer_weights}")
    generator = fill_generator(replace(config.model), state, str(checkpoint))
    pipeline = SwittiPipeline(
        generator.eval().requires_grad_(False).to(device),
        tokenizer.to(device),
        build_text_encoder(config.text, device),
        config.sampling,
        autocast=config.trainer.precision == "bf16-mixed",
        text_config=config.text,
    )
    return pipeline, config, _step(content, checkpoint)


def open_pipeline(target: Path, settings: list[str]) -> tuple[SwittiPipeline, dict[str, Any]]:
    """(pipeline, its origin as metadata) of a run, a checkpoint, an exported folder or a hub id."""
    if is_run(target):
        pipeline, _, step = load_pipeline(target, settings)
        return pipeline, {"run": str(target), "step": step}
    if not target.exists() and not is_hub_id(target):
        raise UserError(f"{target} is neither a run, a checkpoint, an exported folder nor a hub id")
    named = sampling_overrides(settings)
    changes: dict[str, Any] = {}
    for name, value in parse(named).items():
        _, *groups, last = name.split(".")
        reduce(lambda tree, group: tree.setdefault(group, {}), groups, changes)[last] = value
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Published weights are meant for bfloat16; exported ones carry their own type.
    published = str(target) in GENERATORS
    pipeline = SwittiPipeline.from_pretrained(
        target, device=device, dtype=torch.bfloat16 if published else None
    )
    pipeline.sampling = change_settings(pipeline.sampling, changes)
    return pipeline, {"run": str(target)}


def load_initial_state(source: str, config: RunConfig, tokenizer: RQVAE) -> dict[str, Tensor]:
    """Weights of `init_from` for this run's generator: a run, a checkpoint, an exported folder, a file or a hub id.

    The EMA is used if the source run kept one. Another resolution is allowed (see `resize_levels`); the settings of
    INHERITED must agree, and so must the tokenizer's codes if the source records them. Raises UserError naming the
    setting.
    """
    given, state, codes = _read_initial(source)
    check_codes(codes, tokenizer, f"init_from={source} with tokenizer_weights={config.tokenizer_weights}")
    for name in INHERITED:
        mine, theirs = getattr(config.model, name), getattr(given, name)
        if mine != theirs:
            raise UserError(f"model.{name}={mine}, but init_from={source} was trained with {name}={theirs}")
    return resize_levels(state, given.scales, config.model.scales)


def _read_initial(source: str) -> tuple[GeneratorConfig, dict[str, Tensor], Mapping[str, Any]]:
    path = Path(source).expanduser()
    if not is_run(path):
        plain = path.is_file() and not path.with_name("config.json").is_file()
        if plain and path.suffix == ".ckpt":
            raise UserError(f"init_from={source} is not in a run folder, whose {CONFIG} would describe it")
        description = describe_generator(read_generator(source))
        return *fit_generator(description), description.codes
    folder, checkpoint = find_run(path)
    before = from_run(folder)
    if before.task != "generator":
        raise UserError(f"init_from={source} is a {before.task} run; model.* starts from generator runs")
    return before.model, *load_generator_state(checkpoint)
