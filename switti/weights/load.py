"""Frozen models from weights wherever they are: a hub id, an exported or published folder, or a file of any kind.

Loading is one pass: `read` the tensors and stored settings, `describe` whose they are, `fit` them to the settings that
are asked for, `fill` an empty model.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from switti.models.config import GeneratorConfig
from switti.models.transformer import ScaleTransformer
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE
from switti.weights.describe import describe_generator, describe_tokenizer
from switti.weights.fill import fill_generator, fill_tokenizer
from switti.weights.fit import fit_generator, fit_tokenizer
from switti.weights.published import Visibility
from switti.weights.read import read_generator, read_tokenizer


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

    Args:
        source: hub id (`yresearch/Switti`), exported or published folder, or file (.safetensors, .pth, .pt, .bin,
            .ckpt).
        config: the settings; None reads them from config.json, the buffers and the shapes.
        visibility: overrides what the source says.
        dtype: of the weights, except the crop frequencies; no float32 copy is made on the way.
        averaged: the EMA of a training checkpoint if it has one.

    Raises:
        UserError: for weights that do not fit WeightsError, with every key in `details`.
    """
    contents = read_generator(source, averaged=averaged, revision=revision)
    description = describe_generator(contents)
    settings, state = fit_generator(description, config, visibility)
    model = fill_generator(settings, state, str(source), dtype)
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

    Args:
        source: as for `load_generator`, or "embedded:demo".
        config: the settings, which must be those that the file holds (the pyramid only without scales); None reads
            them from the file, from config.json and from the shapes.
        scales: another pyramid than the source's own; the weights do not depend on it.
        cached: no network is asked for a hub id, which must have been downloaded.

    Raises:
        UserError: for weights that do not fit WeightsError, with every key in `details`.
    """
    contents = read_tokenizer(source, revision=revision, cached=cached)
    description = describe_tokenizer(contents)
    settings, state = fit_tokenizer(description, config, scales)
    model = fill_tokenizer(settings, state, str(source))
    return model.eval().requires_grad_(False).to(device)
