"""Fill, the last of the four steps of loading: weights into an empty model, with every key that does not fit named."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from switti.errors import UserError
from switti.models.config import GeneratorConfig
from switti.models.crop_embedding import FourierFeatures
from switti.models.kernels import Backend
from switti.models.norm import RMSNorm
from switti.models.transformer import ScaleTransformer
from switti.suggestions import printable
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE

SHOWN = 6


class WeightsError(UserError):
    """Weights that do not fit a model. details: every missing, unexpected and misshapen key, one line each."""

    def __init__(self, source: str, details: list[str]) -> None:
        more = f"; and {len(details) - SHOWN} more" if len(details) > SHOWN else ""
        count = f"{len(details)} key{'s' if len(details) != 1 else ''}"
        shown = "; ".join(details[:SHOWN])
        super().__init__(f"{source} does not fit these settings ({count}): {shown}{more}")
        self.details = details


def mismatches(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> list[str]:
    """Every missing, unexpected and misshapen key, and integers where weights are floating-point, one line each."""
    problems = [f"{key} is missing" for key in expected if key not in actual]
    problems += [f"{printable(key)} is unexpected" for key in actual if key not in expected]
    problems += [
        f"{key} is {list(actual[key].shape)}, the settings need {list(value.shape)}"
        for key, value in expected.items()
        if key in actual and actual[key].shape != value.shape
    ]
    problems += [
        f"{key} is {str(actual[key].dtype).removeprefix('torch.')}, not floating-point numbers"
        for key, value in expected.items()
        if key in actual and value.is_floating_point() and not actual[key].is_floating_point()
    ]
    return problems


def fill(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads all of `state`, in the model's own types, or raises WeightsError naming `source` and what does not fit.

    A model on the meta device takes the tensors over instead of copying them, so that no second set is ever held.
    """
    expected = model.state_dict()
    problems = mismatches(expected, state)
    if problems:
        raise WeightsError(source, problems)
    empty = any(value.is_meta for value in expected.values())
    model.load_state_dict({key: state[key].to(expected[key].dtype) for key in expected}, assign=empty)


def fill_generator(
    config: GeneratorConfig, state: Mapping[str, Tensor], source: str, dtype: torch.dtype = torch.float32
) -> ScaleTransformer:
    """A transformer with these weights, compared with the settings before anything is built or memory taken.

    Raises WeightsError naming `source` and every key that does not fit.
    """
    if problems := mismatches(expected_state(config), state):
        raise WeightsError(source, problems)
    model = build_empty(config, dtype)
    fill(model, state, source)
    return model


def fill_tokenizer(config: RQVAEConfig, state: Mapping[str, Tensor], source: str) -> RQVAE:
    """An RQ-VAE with copies of these weights. Mapped ones would keep a file open for the days of a training."""
    with torch.device("meta"):
        model = RQVAE(config)
    fill(model, {key: value.clone() for key, value in state.items()}, source)
    return model


def expected_state(config: GeneratorConfig) -> dict[str, Tensor]:
    """Keys, shapes and types of a transformer's weights as tensors without data, at the cost of one block."""
    first = "blocks.0."
    with torch.device("meta"):
        one = ScaleTransformer(replace(config, depth=1)).state_dict()
    block = {key.removeprefix(first): value for key, value in one.items() if key.startswith(first)}
    expected: dict[str, Tensor] = {}
    for key, value in one.items():
        if key.startswith(first):
            expected |= {
                f"blocks.{i}.{name}": item for i in range(config.depth) for name, item in block.items()
            }
            block = {}
        else:
            expected[key] = value
    return expected


def count_parameters(config: GeneratorConfig) -> int:
    """Number of elements in a transformer's weights, all of which are parameters."""
    return sum(value.numel() for value in expected_state(config).values())


def build_empty(
    config: GeneratorConfig, dtype: torch.dtype = torch.float32, backend: Backend = "auto"
) -> ScaleTransformer:
    """A transformer without weights (on the meta device) in its final type, for `fill` or `random_weights`.

    2.5 B parameters in bfloat16 so take 5 GB and never 10. The crop frequencies stay float32, and the tables that no
    file stores are real from the start.
    """
    with torch.device("meta"):
        model = ScaleTransformer(config, backend)
    model.to(dtype)
    model.build_tables(torch.device("cpu"))
    return model


@torch.no_grad()
def random_weights(
    model: ScaleTransformer, seed: int, device: torch.device | str = "cpu"
) -> ScaleTransformer:
    """Fresh initial weights for a model of `build_empty`, in its own type: to measure speed and memory without files.

    The same seed gives the same weights on one device and type; the global random state stays as it was.
    """
    model.to_empty(device=device)
    # `to_empty` emptied them as well.
    model.build_tables(torch.device(device))
    devices = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, FourierFeatures):
                nn.init.normal_(module.weight)
        for block in model.blocks:
            if isinstance(block.crop_cond_scales, Tensor):
                nn.init.zeros_(block.crop_cond_scales)
        model.reset_parameters()
    return model
