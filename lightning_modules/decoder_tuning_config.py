"""Settings of the RQ-VAE decoder's tuning. Imports no torch."""

from dataclasses import dataclass

from lightning_modules.tokenizer_config import ReconstructionLossConfig


@dataclass
class DecoderTuningConfig(ReconstructionLossConfig):
    """Tuning of the RQ-VAE's decoder (Section 4.3): the losses on images; everything before the decoder is frozen."""
