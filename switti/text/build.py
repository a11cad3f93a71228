"""The text encoder that the settings name."""

import torch

from switti.text.base import TextEncoder
from switti.text.config import TextConfig


def build_text_encoder(
    config: TextConfig, device: torch.device | str = "cpu", cached: bool = False
) -> TextEncoder:
    """The encoder that `config` names, on `device`. UserError if its package or weights are missing.

    cached: no network is asked for a hub id, which must have been downloaded.
    """
    config.validate("text")
    if config.encoder == "minilm":
        from switti.text.minilm import MiniLMEncoder

        return MiniLMEncoder(max_length=config.max_length, device=device)
    from switti.text.clip_pair import ClipPairEncoder

    encoder = ClipPairEncoder(
        config.clip_l, config.big_g, max_length=config.max_length, device=device, cached=cached
    )
    encoder.check_widths(config.width, config.pooled_width)
    return encoder
