"""Random samples of a generator's training batches, each a function of its number."""

from typing import Any

import torch


def random_sample(number: int, side: int) -> dict[str, Any]:
    """image [3, side, side] in [-1, 1], and the embedding of a caption of three tokens out of five."""
    generator = torch.Generator().manual_seed(number)
    return {
        "image": torch.rand(3, side, side, generator=generator) * 2 - 1,
        "key": str(number),
        "seed": torch.tensor(number),
        "crop": torch.tensor([512, 512, 0, 0]),
        "text": torch.randn(5, 12, generator=generator),
        "text_mask": torch.arange(5) < 3,
        "pooled": torch.randn(10, generator=generator),
    }
