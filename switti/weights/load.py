"""Models from weights wherever they lie: a hub id, an exported or published folder, or a file of any usual kind."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from switti.config_values import from_values
from switti.errors import UserError
from switti.files import kind_of, read_json_object
from switti.models.config import GeneratorConfig
from switti.models.transformer import ScaleTransformer
from switti.scales import PYRAMIDS
from switti.suggestions import printable
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import CODES, RQVAE
from switti.weights.hub import fetch
from switti.weights.published import (
    GENERATORS,
    HEAD_WIDTH,
    TOKENIZERS,
    Visibility,
    generator_from_published,
    tokenizer_fields,
    tokenizer_from_published,
)
from switti.weights.state_dict import build_filled, fill, read_weights, sub_state
from switti.weights.tokenizer_file import EMBEDDED, check_settings, stored_settings, weights_path

Config = TypeVar("Config", GeneratorConfig, RQVAEConfig)

INDEX, CONFIG = "model_index.json", "config.json"
MAX_CONFIG_BYTES = 1 << 20
_FILES = ("model.safetensors", "pytorch_model.bin")


# ---- where weights lie ------------------------------------------------------------------------------------------


def locate(
    source: str | Path,
    part: str,
    file: str | None = None,
    revision: str | None = None,
    cached: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """(weights file, content of the config.json beside it or {}) of a file, a folder or a hub id.

    part: "generator" or "tokenizer", the subfolder of an exported pipeline. file: the wanted file of a hub repository.
    cached: no network is asked.
    """
    wanted = [file] if file else [CONFIG, INDEX, *_FILES, f"{part}/*"]
    path = fetch(source, wanted, revision, cached)
    if path.is_dir() and kind_of(path / INDEX):
        path = path / part
    if path.is_dir():
        names = [file] if file else list(_FILES)
        folder, path = path, next((path / n for n in names if kind_of(path / n)), path)
        if path == folder:
            raise UserError(f"{source}: {folder} holds none of {', '.join(names)}")
    return path, read_json_object(path.with_name(CONFIG), MAX_CONFIG_BYTES)


def config_fields(content: Mapping[str, Any], kind: type[Config], source: str) -> dict[str, Any]:
    """Fields of a config class from our config.json or a published one; what neither knows is left out."""
    names = {item.name for item in fields(kind)}
    found = {key: value for key, value in content.items() if key in names}
    resolution = content.get("reso")
    if resolution is not None:
        if not isinstance(resolution, int) or resolution not in PYRAMIDS:
            raise UserError(
                f"{source}: reso={printable(resolution)} in {CONFIG} is not one of "
                f"{', '.join(map(str, PYRAMIDS))}"
            )
        found["scales"] = PYRAMIDS[resolution]
    if kind is GeneratorConfig:
        if isinstance(found.get("depth"), int) and "width" not in found:
            found |= {"width": HEAD_WIDTH * found["depth"], "heads": found["depth"]}
        for theirs, ours, meaning in (
            ("use_ar", "visibility", ("non_causal", "causal")),
            ("use_swiglu_ffn", "ffn", ("gelu", "swiglu")),
            ("use_crop_cond", "crop_condition", (False, True)),
        ):
            if theirs in content:
                if not isinstance(content[theirs], bool):
                    raise UserError(
                        f"{source}: {theirs}={printable(content[theirs])} in {CONFIG} must be true or false"
                    )
                found[ours] = meaning[content[theirs]]
    return found


def checked(kind: type[Config], values: Mapping[str, Any], path: str, source: str) -> Config:
    """A config object out of what was found; values of a wrong type or range are UserErrors that name the source."""
    try:
        return from_values(kind, values, path)
    except UserError as error:
        raise UserError(f"{source}: its {CONFIG} does not make a {path}: {error}") from error


# ---- loading ----------------------------------------------------------------------------------------------------


def read_generator(
    source: str | Path,
    *,
    config: GeneratorConfig | None = None,
    visibility: Visibility | None = None,
    averaged: bool = True,
    revision: str | None = None,
) -> tuple[GeneratorConfig, dict[str, Tensor]]:
    """(settings, weights under our keys) without building a model; the arguments are those of `load_generator`."""
    release = GENERATORS.get(str(source))
    path, content = locate(source, "generator", release.file if release else None, revision)
    state = read_weights(path)
    for name in ("ema_generator", "generator") if averaged else ("generator",):
        state = sub_state(state, name) or state
    ours, masked, shown = generator_from_published(state, str(source))
    told = asdict(config) if config is not None else config_fields(content, GeneratorConfig, str(source))
    known: dict[str, Any] = {"heads": max(1, shown["width"] // HEAD_WIDTH)}
    if release is not None:
        known |= {"scales": PYRAMIDS[release.resolution], "visibility": release.visibility}
    known |= shown | ({"visibility": masked} if masked else {})
    # Shapes of the weights are compared key by key later; these two leave no trace in them.
    for name, mine in (("visibility", masked), ("scales", shown.get("scales"))):
        settled = name == "visibility" and visibility is not None
        if mine is not None and name in told and told[name] != mine and not settled:
            raise UserError(f"{source}: model.{name}={told[name]} is asked for, but its buffers say {mine}")
    known |= told | ({"visibility": visibility} if visibility else {})
    for name in ("visibility", "scales"):
        if known.get(name) is None:
            raise UserError(f"{source} does not say its model.{name}; give config= (or a {CONFIG} beside it)")
    return checked(GeneratorConfig, known, "model", str(source)), ours


def known_codes(source: str | Path) -> dict[str, Any]:
    """What `check_codes` asks of an exported generator; {} for any other source."""
    if str(source) in GENERATORS:
        return {}
    _, content = locate(source, "generator")
    return {CODES: content[CODES]} if CODES in content else {}


def load_generator(
    source: str | Path,
    *,
    config: GeneratorConfig | None = None,
    visibility: Visibility | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    averaged: bool = True,
    revision: str | None = None,
) -> ScaleTransformer:
    """A scale transformer in eval mode, frozen.

    source: hub id (`yresearch/Switti`), exported or published folder, or file (.safetensors, .pth, .pt, .bin, .ckpt).
    config: the settings; None reads them from config.json, the buffers and the shapes. visibility: overrides what the
    source says. averaged: the moving average of a training checkpoint if it has one. dtype: of the weights, except the
    crop frequencies; no float32 copy is made on the way.
    Raises UserError, for weights that do not fit WeightsError with every key in `details`.
    """
    settings, state = read_generator(
        source, config=config, visibility=visibility, averaged=averaged, revision=revision
    )
    model = build_filled(settings, state, str(source), dtype)
    return model.eval().requires_grad_(False).to(device)


def load_tokenizer(
    source: str | Path,
    *,
    config: RQVAEConfig | None = None,
    scales: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    cached: bool = False,
) -> RQVAE:
    """An RQ-VAE in eval mode, frozen, float32.

    source: as for `load_generator`, or "embedded:demo". scales: another pyramid than the source's own, whose weights
    do not depend on it. config: the settings, which must be those that the file holds (the pyramid only without
    scales); None reads them from the file, from config.json and from the shapes. cached: no network is asked for a
    hub id, which must have been downloaded.
    Raises UserError, for weights that do not fit WeightsError with every key in `details`.
    """
    release = TOKENIZERS.get(str(source))
    place = weights_path(source) if str(source).startswith(EMBEDDED) else source
    path, content = locate(place, "tokenizer", release.file if release else None, revision, cached)
    state, stored = read_weights(path), stored_settings(path)
    for name in ("ema_rqvae", "rqvae"):
        state = sub_state(state, name) or state
    if config is not None:
        check_settings(config, stored, path, other_scales=scales is not None)
    else:
        told = config_fields(stored | content, RQVAEConfig, str(source))
        shown = tokenizer_fields(state, str(source))
        wrong = [
            f"{name}={printable(told[name])} (the weights: {printable(shown[name])})"
            for name in shown
            if told.get(name, shown[name]) != shown[name]
        ]
        if wrong:
            raise UserError(f"{source}: its settings are not those of its weights: {', '.join(wrong)}")
        found = shown | told
        if "scales" not in found and release is not None:
            found["scales"] = PYRAMIDS[release.resolution]
        if "scales" not in found and scales is None:
            raise UserError(f"{source} does not say its tokenizer.scales; give scales= or config=")
        config = checked(RQVAEConfig, {"scales": list(scales or [])} | found, "tokenizer", str(source))
    if scales is not None:
        config = replace(config, scales=list(scales))
    tokenizer_fields(state, str(source))
    with torch.device("meta"):
        model = RQVAE(config)
    # Copied out of the file, which a training of days would otherwise keep mapped.
    copies = {key: value.clone() for key, value in tokenizer_from_published(state, config.scales).items()}
    fill(model, copies, str(source))
    return model.eval().requires_grad_(False).to(device)
