"""Small scale transformers and their inputs."""

import torch

from switti.models.config import GeneratorConfig
from switti.models.transformer import ScaleTransformer
from switti.scales import Pyramid

SCALES = [1, 2, 3, 5]


def tiny(**changes) -> GeneratorConfig:
    settings = {
        "depth": 2,
        "width": 32,
        "heads": 2,
        "scales": SCALES,
        "codebook_size": 24,
        "code_width": 6,
        "text_width": 12,
        "pooled_width": 10,
    }
    return GeneratorConfig(**(settings | changes))


def model(seed: int = 0, **changes) -> ScaleTransformer:
    """A model in float64 whose gates and head are not near zero, so that every term matters."""
    torch.manual_seed(seed)
    built = ScaleTransformer(tiny(**changes)).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return built


def inputs(batch: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    length = Pyramid(tuple(SCALES)).length

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.ones(batch, 7, dtype=torch.bool)
    mask[0, 3:] = False
    return {
        "x_BMC": normal(batch, length - 1, 6),
        "text_BTC": normal(batch, 7, 12),
        "mask_BT": mask,
        "pooled_BP": normal(batch, 10),
        "crop_B4": torch.tensor([[512, 600, 0, 44], [700, 512, 94, 0], [512, 512, 0, 0]])[:batch],
    }
