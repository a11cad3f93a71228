"""Weights from files into models: nothing is skipped silently, nothing executable is read.

Shape suffixes: N scales, D width.
"""

import errno
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from switti.errors import UserError, first_line
from switti.files import atomic_write, check_regular, kind_of
from switti.models.config import GeneratorConfig
from switti.models.crop_embedding import FourierFeatures
from switti.models.norm import RMSNorm
from switti.models.transformer import ScaleTransformer
from switti.scales import Pyramid
from switti.suggestions import printable
from switti.weights.torch_files import read_torch

SHOWN = 6
TORCH_FILES = (".ckpt", ".pth", ".pt", ".bin")
WEIGHT_FILES = (".safetensors", *TORCH_FILES)


class WeightsError(UserError):
    """Weights that do not fit a model. details: every missing, unexpected and misshapen key, in words."""

    def __init__(self, source: str, details: list[str]) -> None:
        more = f"; and {len(details) - SHOWN} more" if len(details) > SHOWN else ""
        count = f"{len(details)} key{'s' if len(details) != 1 else ''}"
        shown = "; ".join(details[:SHOWN])
        super().__init__(f"{source} does not fit these settings ({count}): {shown}{more}")
        self.details = details


# ---- reading ----------------------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file or of a flat state dict written by torch.save (.pth, .pt, .bin, .ckpt).

    A dict around it under "state_dict" (Lightning) is opened; tensors are mapped, not copied, until they are used.
    Raises UserError for a file that is missing, cut off, of another kind or carries code.
    """
    path = Path(path)
    if kind_of(path) is None:
        raise UserError(f"no weights {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(check_regular(path))
        except (SafetensorError, OSError, ValueError) as error:
            reason = first_line(error)
            raise UserError(
                f"{path} is not a whole safetensors file ({reason}); copy or download it again"
            ) from error
    if path.suffix not in TORCH_FILES:
        raise UserError(f"{path} is not a weights file; known are {', '.join(WEIGHT_FILES)}")
    content = read_torch(path, mmap=True)
    return weights_in(content, path)


def weights_in(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights of a file of torch.save with this content: under "state_dict", or all of it.

    Raises UserError for anything but tensors by name.
    """
    state = content.get("state_dict", content)
    named = isinstance(state, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )
    if not named or not state:
        found = ", ".join(printable(key) for key in list(content)[:SHOWN])
        raise UserError(f"{path} holds no weights but {found or 'nothing'}")
    return dict(state)


def check_run(checkpoint: Mapping[str, Any], path: Path) -> None:
    """UserError if what a run is resumed from, beside its weights, is not of the form in which runs write it."""
    for name, (kind, items) in _FORM.items():
        if name not in checkpoint and name not in _NEEDED:
            continue
        value: Any = checkpoint.get(name)
        whole = type(value) is kind
        if isinstance(value, list):
            whole = whole and all(type(item) is items for item in value)
        if not whole or (kind is int and value < 0):
            found = printable(value) if kind in (int, str) else type(value).__name__
            raise UserError(f"{path} is not a checkpoint of a run: its {name} is {found}")


# Of the checkpoint's entries: the type, and that of each item of a list.
_FORM: dict[str, tuple[type, type | None]] = {
    "pytorch-lightning_version": (str, None), "epoch": (int, None), "global_step": (int, None), "loops": (dict, None),
    "callbacks": (dict, None), "optimizer_states": (list, dict), "lr_schedulers": (list, dict), "random": (list, dict),
    "ShardDataModule": (dict, None), "tokenizer_codes": (str, None),
}  # fmt: skip
_NEEDED = ("pytorch-lightning_version", "global_step")


def write_weights(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """A safetensors file, whole or not at all. Tensors that share memory are written each for itself."""
    plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(plain, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise _system_error(error) from error


def _system_error(error: SafetensorError) -> OSError:
    """The error of the operating system that safetensors tells in its own words."""
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number))


def sub_state(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below a module name, without it."""
    return {
        key.removeprefix(f"{prefix}."): value for key, value in state.items() if key.startswith(f"{prefix}.")
    }


# ---- into models ------------------------------------------------------------------------------------------------


def mismatches(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Every missing, unexpected and misshapen key, and integers where weights are floating-point, in words."""
    problems = [f"{key} is missing" for key in expected if key not in found]
    problems += [f"{printable(key)} is unexpected" for key in found if key not in expected]
    problems += [
        f"{key} is {list(found[key].shape)}, the settings need {list(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    problems += [
        f"{key} is {str(found[key].dtype).removeprefix('torch.')}, not floating-point numbers"
        for key, value in expected.items()
        if key in found and value.is_floating_point() and not found[key].is_floating_point()
    ]
    return problems


def fill(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads `state` whole, in the model's own types, or raises WeightsError naming `source` and what does not fit.

    A model on the meta device takes the tensors over instead of copying them, so that no second set is ever held.
    """
    expected = model.state_dict()
    problems = mismatches(expected, state)
    if problems:
        raise WeightsError(source, problems)
    empty = any(value.is_meta for value in expected.values())
    model.load_state_dict({key: state[key].to(expected[key].dtype) for key in expected}, assign=empty)


def expected_state(config: GeneratorConfig) -> dict[str, Tensor]:
    """Keys, shapes and types of a transformer's weights as tensors without data, at the cost of one block."""
    first = "blocks.0."
    with torch.device("meta"):
        one = ScaleTransformer(replace(config, depth=1)).state_dict()
    block = {key.removeprefix(first): value for key, value in one.items() if key.startswith(first)}
    expected: dict[str, Tensor] = {}
    for key, value in one.items():
        if key.startswith(first):
            expected |= {
                f"blocks.{i}.{name}": item for i in range(config.depth) for name, item in block.items()
            }
            block = {}
        else:
            expected[key] = value
    return expected


def count_parameters(config: GeneratorConfig) -> int:
    """Numbers in a transformer's weights, all of which are parameters."""
    return sum(value.numel() for value in expected_state(config).values())


def build_filled(
    config: GeneratorConfig, state: Mapping[str, Tensor], source: str, dtype: torch.dtype = torch.float32
) -> ScaleTransformer:
    """A transformer with these weights, compared with the settings before anything is built or memory taken.

    Raises WeightsError naming `source` and every key that does not fit.
    """
    if problems := mismatches(expected_state(config), state):
        raise WeightsError(source, problems)
    model = build_empty(config, dtype)
    fill(model, state, source)
    return model


def build_empty(config: GeneratorConfig, dtype: torch.dtype = torch.float32) -> ScaleTransformer:
    """A transformer without weights (on the meta device) in its final type, for `fill` or `random_weights`.

    2.5 B parameters in bfloat16 so take 5 GB and never 10. The crop frequencies stay float32, and the tables that no
    file stores are real from the start.
    """
    with torch.device("meta"):
        model = ScaleTransformer(config)
    model.to(dtype)
    model._add_tables(torch.device("cpu"))
    return model


@torch.no_grad()
def random_weights(
    model: ScaleTransformer, seed: int, device: torch.device | str = "cpu"
) -> ScaleTransformer:
    """Fresh initial weights for a model of `build_empty`, in its own type: to measure speed and memory without files.

    The same seed gives the same weights on one device and type; the global random state stays as it was.
    """
    model.to_empty(device=device)
    model._add_tables(torch.device(device))  # `to_empty` emptied them as well
    devices = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, FourierFeatures):
                nn.init.normal_(module.weight)
        for block in model.blocks:
            if isinstance(block.crop_cond_scales, Tensor):
                nn.init.zeros_(block.crop_cond_scales)
        model.reset_parameters()
    return model


# ---- from one pyramid to another --------------------------------------------------------------------------------


def nearest_levels(old_scales: Sequence[int], new_scales: Sequence[int]) -> list[int]:
    """For each new scale the old one at the nearest progress r = k / (N − 1); the coarser one on ties."""
    old, new = Pyramid(tuple(old_scales)).count, Pyramid(tuple(new_scales)).count
    # In whole numbers, for floating point would break ties by its rounding.
    return [min(range(old), key=lambda j: abs(j * (new - 1) - k * (old - 1))) for k in range(new)]


def resize_levels(
    state: Mapping[str, Tensor], old_scales: Sequence[int], new_scales: Sequence[int]
) -> dict[str, Tensor]:
    """A generator's weights for another pyramid, as when training goes on at a higher resolution.

    The rotary embedding is normalised, so nothing else depends on the sides. Each row of the level embedding
    [N, D] is taken from the scale at the nearest progress r = k / (N − 1): coarsest to coarsest, finest to finest, and
    pyramids of one length (256 and 512 px) keep every row. Raises UserError for learned absolute positions and for
    another side of the first scale, which cannot be carried over.
    """
    if list(old_scales) == list(new_scales):
        return dict(state)
    if "pos_1LC" in state:
        raise UserError(
            f"model.rope=false: learned positions of scales {list(old_scales)} do not fit {list(new_scales)}; "
            "only weights with rotary embedding change resolution"
        )
    if old_scales[0] != new_scales[0]:
        raise UserError(
            f"model.scales={list(new_scales)} must begin with {old_scales[0]} as the given weights do"
        )
    rows_N = torch.tensor(nearest_levels(old_scales, new_scales))
    return {**state, "lvl_embed.weight": state["lvl_embed.weight"][rows_N]}
