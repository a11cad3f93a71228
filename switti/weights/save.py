"""Tokenizers into files: weights and settings together, complete or not at all."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save

from switti.files import atomic_write
from switti.tokenizer.rqvae import RQVAE
from switti.weights.tokenizer_file import SETTINGS_KEY


def save_tokenizer(model: RQVAE, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Weights and settings as a safetensors file for `load_tokenizer`; the old file stays until the new is complete."""
    state = {key: value.detach().cpu().to(dtype).contiguous() for key, value in model.state_dict().items()}
    settings = {SETTINGS_KEY: json.dumps(asdict(model.config), sort_keys=True)}
    with atomic_write(Path(path)) as temporary:
        temporary.write_bytes(save(state, metadata=settings))
