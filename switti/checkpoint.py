"""Weights from files into models: nothing is skipped silently, nothing executable is read."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from switti.errors import UserError

SHOWN = 6


def mismatches(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Every missing, unexpected and misshapen key, in words."""
    problems = [f"{key} is missing" for key in expected if key not in found]
    problems += [f"{key} is unexpected" for key in found if key not in expected]
    problems += [
        f"{key} is {list(found[key].shape)}, the settings need {list(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    return problems


def fill(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads `state` whole or raises UserError naming `source` and what does not fit."""
    problems = mismatches(model.state_dict(), state)
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError(f"{source} does not fit these settings: {'; '.join(problems[:SHOWN])}{more}")
    model.load_state_dict(state)


def read_torch(path: Path) -> dict[str, Any]:
    """A file written by torch.save, without running any code that it may carry.

    Raises UserError if it is missing, cut off, no such file, or holds anything but plain data and tensors.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{path} is no readable checkpoint: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return content


def sub_state(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below a module name, without it."""
    return {
        key.removeprefix(f"{prefix}."): value for key, value in state.items() if key.startswith(f"{prefix}.")
    }
