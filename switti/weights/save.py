"""Weights into safetensors files, each complete or absent."""

import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor

from switti.files import atomic_write
from switti.models.transformer import ScaleTransformer
from switti.tokenizer.rqvae import RQVAE
from switti.weights.tokenizer_file import GENERATOR_KEY, SETTINGS_KEY


def save_tokenizer(model: RQVAE, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Weights and settings as a safetensors file for `load_tokenizer`; the old file stays until the new is complete."""
    state = {key: value.detach().cpu().to(dtype).contiguous() for key, value in model.state_dict().items()}
    settings = {SETTINGS_KEY: json.dumps(asdict(model.config), sort_keys=True)}
    with atomic_write(Path(path)) as temporary:
        temporary.write_bytes(save(state, metadata=settings))


def save_generator(
    model: ScaleTransformer, path: str | Path, codes: Mapping[str, str], dtype: torch.dtype | None = None
) -> None:
    """Weights and settings as one safetensors file for `load_generator`, complete or absent.

    codes: the tokenizer's fingerprint by its key. dtype: see `generator_state`.
    """
    settings = {GENERATOR_KEY: json.dumps(asdict(model.config) | dict(codes), sort_keys=True)}
    write_weights(path, generator_state(model, dtype), settings)


def generator_state(model: ScaleTransformer, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A generator's weights in a type (None: as they are). The crop frequencies stay float32 in any case."""
    return {
        key: value if key == "crop_embed.weight" or dtype is None else value.to(dtype)
        for key, value in model.state_dict().items()
    }


def write_weights(
    path: str | Path, state: Mapping[str, Tensor], settings: Mapping[str, str] | None = None
) -> None:
    """A safetensors file, complete or absent. Tensors that share memory are written one by one."""
    plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(plain, temporary, metadata={"format": "pt", **(settings or {})})
        except SafetensorError as error:
            raise _system_error(error) from error


def _system_error(error: SafetensorError) -> OSError:
    """The operating system's error that safetensors quotes in its message."""
    quoted = re.search(r"os error (\d+)", str(error))
    number = int(quoted[1]) if quoted else errno.EIO
    return OSError(number, os.strerror(number))
