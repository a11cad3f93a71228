"""Building the text encoder named in the settings."""

from typing import Any

import torch

from switti.errors import UserError
from switti.import_path import load_object
from switti.text.base import TextEncoder
from switti.text.config import TextConfig

_PARTS = ("name", "width", "pooled_width", "max_length", "truncated", "fingerprint", "pieces", "encode", "to")


def build_text_encoder(
    config: TextConfig, device: torch.device | str = "cpu", cached: bool = False
) -> TextEncoder:
    """The encoder that `config` names, on `device`. UserError if its package or weights are missing.

    `package.module:Name` is imported and called with `config`; it returns a TextEncoder.
    cached: no network is asked for a hub id, which must have been downloaded.
    """
    config.validate("text")
    if config.encoder == "minilm":
        from switti.text.minilm import MiniLMEncoder

        return MiniLMEncoder(max_length=config.max_length, device=device)
    if not config.is_built_in:
        return _own_encoder(config).to(device)
    from switti.text.clip_pair import ClipPairEncoder

    encoder = ClipPairEncoder(
        config.clip_l, config.big_g, max_length=config.max_length, device=device, cached=cached
    )
    encoder.check_widths(config.width, config.pooled_width)
    return encoder


def _own_encoder(config: TextConfig) -> TextEncoder:
    named = load_object("text.encoder", config.encoder)
    if not callable(named):
        raise UserError(f"text.encoder={config.encoder} is {type(named).__name__}, not a class or a function")
    encoder: Any = named(config)
    if missing := [part for part in _PARTS if not hasattr(encoder, part)]:
        raise UserError(
            f"text.encoder={config.encoder} is not a text encoder: it has no {', '.join(missing)} "
            "(switti.text.base.TextEncoder says what each is)"
        )
    for name in ("width", "pooled_width", "max_length"):
        if getattr(encoder, name) != getattr(config, name):
            raise UserError(
                f"text.{name}={getattr(config, name)}, but text.encoder={config.encoder} has {getattr(encoder, name)}"
            )
    return encoder
