"""Settings of the RQ-VAE decoder's tuning. Imports no torch."""

from dataclasses import dataclass

from lightning_modules.tokenizer_config import ReconstructionLossConfig


@dataclass
class DecoderTuningConfig(ReconstructionLossConfig):
    """Everything before the decoder is frozen, so that only the losses on pictures are left."""
