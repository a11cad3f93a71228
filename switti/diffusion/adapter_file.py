"""One safetensors file of both adapters of an invertible UNet, with the boundaries and the base they belong to.

A network is not told where its jumps end, so that boundaries are part of the weights. Nothing in a file is executed;
keys and shapes are compared with the base's before any memory is taken, as peft ignores keys that do not fit.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from switti.diffusion.boundaries import Boundaries
from switti.diffusion.latents import LatentSpace, space_from
from switti.diffusion.unet import ADAPTERS, TARGETS, InvertibleUNet, Role
from switti.errors import UserError
from switti.suggestions import printable
from switti.weights.fill import WeightsError, mismatches
from switti.weights.read import read_weights
from switti.weights.save import write_weights
from switti.weights.tokenizer_file import read_header

SETTINGS_KEY = "invertible_adapters"
LARGEST_RANK = 1024
# In front of the module's name in the released files, which do not say their alpha.
RELEASED_PREFIX = "unet.base_model.model."


@dataclass(frozen=True)
class AdapterSettings:
    """What a file says of its adapters. base: `weights_digest` of the UNet they were trained on."""

    base: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    boundaries: Boundaries
    latents: LatentSpace | None


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of names, shapes and values of the weights without adapters.

    Values are rounded to bfloat16 first, so that copies of a model in float32 and bfloat16 agree.
    """
    digest = hashlib.sha256()
    state = {key.replace(".base_layer.", "."): value for key, value in model.state_dict().items()}
    for key in sorted(state):
        if ".lora_" not in key:
            value = state[key].detach().to(torch.bfloat16).cpu().contiguous()
            digest.update(f"{key} {list(value.shape)} ".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_adapters(
    network: InvertibleUNet, path: str | Path, boundaries: Boundaries, latents: LatentSpace | None = None
) -> None:
    """Both adapters, complete or absent. latents: of the codec that training used."""
    settings = {
        "base": weights_digest(network.unet),
        "rank": network.rank,
        "alpha": network.alpha,
        "targets": list(network.targets),
        "boundaries": asdict(boundaries),
        "latents": None if latents is None else asdict(latents),
    }
    state: dict[str, Tensor] = {
        f"{role}.{key}": value for role in ADAPTERS for key, value in network.parameters(role).items()
    }
    write_weights(path, state, {SETTINGS_KEY: json.dumps(settings, sort_keys=True)})


def load_adapters(
    unet: Any, path: str | Path, *, off_grid: bool = False
) -> tuple[InvertibleUNet, AdapterSettings]:
    """Both adapters of a file on their base, which is changed in place.

    Raises UserError for a file of another base, with missing, foreign or misshapen weights, or without settings.
    """
    path = Path(path)
    content, shapes = read_header(path, SETTINGS_KEY)
    settings = _settings(content, path, off_grid)
    digest = weights_digest(unet)
    if settings.base != digest:
        raise UserError(
            f"{path} belongs to the base with digest {printable(settings.base[:12])}, this UNet's is {digest[:12]}; "
            "load the UNet that the adapters were trained on"
        )
    expected = adapter_shapes(unet, settings.rank, settings.targets)
    both = {f"{role}.{key}": value for role in ADAPTERS for key, value in expected.items()}
    _check(both, {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, str(path))
    state = read_weights(path)
    _check(both, state, str(path))
    network = InvertibleUNet(unet, settings.rank, settings.alpha, settings.targets)
    for role in ADAPTERS:
        network.fill(role, {key: state[f"{role}.{key}"] for key in expected})
    return network, settings


def fill_released(network: InvertibleUNet, role: Role, path: str | Path) -> None:
    """One adapter of a file in the released format: peft's keys, one student a file.

    The file names neither base nor boundaries nor alpha (8): those are the caller's to know.
    """
    state = {key.removeprefix(RELEASED_PREFIX): value for key, value in read_weights(path).items()}
    _check(dict(network.parameters(role)), state, str(path))
    network.fill(role, state)


def adapter_shapes(unet: nn.Module, rank: int, targets: Sequence[str] = TARGETS) -> dict[str, Tensor]:
    """Weights of one adapter as tensors without memory, by key."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in unet.named_modules():
        if not any(name == target or name.endswith(f".{target}") for target in targets):
            continue
        down: tuple[int, ...]
        up: tuple[int, ...]
        if isinstance(module, nn.Linear):
            down, up = (rank, module.in_features), (module.out_features, rank)
        elif isinstance(module, nn.Conv2d):
            down = (rank, module.in_channels, *module.kernel_size)
            up = (module.out_channels, rank, 1, 1)
        else:
            continue
        shapes |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def _check(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], source: str) -> None:
    if problems := mismatches(expected, actual):
        raise WeightsError(source, problems)


def _settings(content: Mapping[str, Any], path: Path, off_grid: bool) -> AdapterSettings:
    if not content:
        raise UserError(
            f"{path} holds no settings of two adapters ({SETTINGS_KEY}); released files are read one student at a time"
        )
    names = ("base", "rank", "alpha", "targets", "boundaries", "latents")
    base, rank, alpha, targets, times, latents = (content.get(name, "absent") for name in names)
    if not isinstance(base, str):
        raise UserError(f"{path}: base={printable(base)} must be a digest; save the adapters again")
    if type(rank) is not int or not 1 <= rank <= LARGEST_RANK:
        raise UserError(
            f"{path}: rank={printable(rank)} must be an integer in [1, {LARGEST_RANK}]; save the adapters again"
        )
    if type(alpha) not in (int, float) or not math.isfinite(alpha) or alpha <= 0:
        raise UserError(
            f"{path}: alpha={printable(alpha)} must be a positive number; save the adapters again"
        )
    if not isinstance(targets, list) or not all(
        isinstance(name, str) and re.fullmatch(r"\w+(\.\w+)*", name) for name in targets
    ):
        raise UserError(
            f"{path}: targets={printable(targets)} must be a list of module names; save the adapters again"
        )
    times = times if isinstance(times, dict) else {}
    points, lists = times.get("points"), (times.get("reverse"), times.get("forward"))
    if type(points) is not int or not all(
        isinstance(ends, list) and all(type(end) is int for end in ends) for ends in lists
    ):
        raise UserError(f"{path}: boundaries must be points, reverse and forward; save the adapters again")
    try:
        boundaries = Boundaries.given(times["reverse"], times["forward"], points, off_grid=off_grid)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    space = space_from(latents if isinstance(latents, dict) else None, str(path))
    return AdapterSettings(base, rank, float(alpha), tuple(targets), boundaries, space)
